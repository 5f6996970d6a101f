"""Push a built kernel, check what Kaggle made of it, and wait for its run: `make kernel-push`.

It never submits. The kaggle client exits with 0 even when a push fails, so its output is read; and
it drops some sources without a word, so the metadata are pulled back and compared.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.utils import paths
from src.utils.runs import read_json

KAGGLE = str(Path(sys.executable).with_name("kaggle"))
METADATA = "kernel-metadata.json"
PLACEHOLDER = "OWNER/"
PUSHED = re.compile(r"successfully pushed", re.IGNORECASE)
# "The following are not valid dataset sources: [...]": pushed all the same, but runs without them.
REFUSED = re.compile(
    r"error|not valid|invalid|forbidden|unauthorized|could not find", re.IGNORECASE
)
ENDED = re.compile(r"complete|error|cancel", re.IGNORECASE)
SOURCES = ("competition_sources", "dataset_sources", "kernel_sources", "model_sources")
SETTINGS = ("enable_gpu", "enable_internet", "is_private", "machine_shape")
# What comes back has had prefixes: "code/ada/x", "c/llm-classification-finetuning".
PREFIX = re.compile(r"^(code|dataset|datasets|models?|competitions?|c|d)/")
NEXT = {
    "01": "look at it.",
    "02": "make kernel NB=06 KERNELS=02 reads its output.",
    "03": "the large letters at its end say whether the training is finished.",
    "04": "the large letters at its end say whether the training is finished.",
    "05": "make kernel NB=06 reads its blend, see kaggle_kernel/README.md.",
    "06": "Output → submission.csv → Submit to competition.",
    "07": "look at parity.json.",
}


class PushError(Exception):
    """Kaggle did not accept the kernel, or its run failed; the message quotes Kaggle."""


def ask_kaggle(*arguments: str) -> str:
    """What the kaggle client prints, also when it fails."""
    ran = subprocess.run([KAGGLE, *arguments], capture_output=True, text=True)
    return (ran.stdout + ran.stderr).strip()


def push(folder: Path, ask: Callable[..., str] = ask_kaggle) -> str:
    """Push a kernel, and check that Kaggle has all of it.

    Args:
        folder: holds `kernel-metadata.json` and the notebook.
        ask: runs the kaggle client.

    Returns:
        Id of the kernel.

    Raises:
        PushError: Kaggle did not report that everything was accepted, or dropped something.
    """
    metadata_path = folder / METADATA
    if not metadata_path.exists():
        number = folder.parent.name
        raise PushError(f"{metadata_path}: not found. Run `make kernel NB={number}` first.")
    metadata = read_json(metadata_path)
    if metadata["id"].startswith(PLACEHOLDER):
        raise PushError("the owner is a placeholder: build with KAGGLE_USERNAME=<you> make kernel")
    output = ask("kernels", "push", "-p", str(folder))
    if not PUSHED.search(output) or REFUSED.search(output):
        raise PushError(f"Kaggle did not accept all of it:\n{output}")
    check_pushed(metadata, ask)
    return metadata["id"]


def check_pushed(asked: Mapping[str, Any], ask: Callable[..., str] = ask_kaggle) -> None:
    """Pull the metadata of a pushed kernel back; PushError if they lack what was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        output = ask("kernels", "pull", asked["id"], "-p", folder, "-m")
        path = Path(folder) / METADATA
        if not path.exists():
            raise PushError(f"{asked['id']}: its metadata could not be pulled back:\n{output}")
        if differences := compare(asked, read_json(path)):
            raise PushError(
                f"{asked['id']} was pushed, but Kaggle has it otherwise than asked:\n"
                + "\n".join(differences)
                + "\nAdd it by hand on the kernel's page (Edit, Add Input or Settings, then Save "
                "Version), or correct the build and push again. Its run that has begun lacks it."
            )


def compare(asked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Name each source and setting that was asked for and is not found, one line each."""
    lines = []
    for kind in SOURCES:
        there = {_plain(kind, source) for source in found.get(kind) or ()}
        for source in asked.get(kind) or ():
            if _plain(kind, source) not in there:
                lines.append(f"  {kind}: {source} is missing, found {sorted(there) or 'none'}")
    for name in SETTINGS:
        if name in asked and asked[name] != found.get(name):
            lines.append(f"  {name}: expected {asked[name]}, found {found.get(name)}")
    return lines


def _plain(kind: str, source: str) -> str:
    source = source.lower()
    n_parts = {"competition_sources": 1, "model_sources": 5}.get(kind, 2)
    if source.count("/") >= n_parts:
        source = PREFIX.sub("", source)
    return source


def wait_for_run(
    kernel_id: str,
    ask: Callable[..., str] = ask_kaggle,
    *,
    every_s: float = 60,
    limit_s: float = 13 * 3600,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Ask for the status until the run has ended.

    Returns:
        Kaggle's last answer.

    Raises:
        PushError: the run failed, was cancelled, or did not end in time.
    """
    output = ""
    for _ in range(max(1, int(limit_s / every_s))):
        output = ask("kernels", "status", kernel_id)
        status = re.search(r'status "([^"]+)"', output)
        if status and ENDED.search(status[1]):
            if "complete" in status[1].lower():
                return output
            raise PushError(
                f"the run did not succeed: {output}\nIts log: kaggle kernels output {kernel_id}"
            )
        print(output, flush=True)
        sleep(every_s)
    raise PushError(f"the run has not ended after {limit_s / 3600:.0f} hours: {output}")


def main() -> int:
    """Push from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebook", default="06", choices=sorted(NEXT), help="01 to 07")
    options = parser.parse_args()
    try:
        kernel_id = push(paths.ROOT / "build" / "kaggle" / options.notebook / "kernel")
        print(f"{kernel_id}: pushed, with every source that was asked for. It runs on Kaggle now;")
        print("what waits here may be stopped (Ctrl-C) without stopping it.", flush=True)
        print(wait_for_run(kernel_id))
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"https://www.kaggle.com/code/{kernel_id}: {NEXT[options.notebook]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
