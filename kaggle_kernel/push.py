"""Push the built kernel and wait for its run: `make kernel-push`. It never submits.

The kaggle client prints failures without failing, so its words are read.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from src.utils import paths
from src.utils.runs import read_json

KAGGLE = str(Path(sys.executable).with_name("kaggle"))
PLACEHOLDER = "OWNER/"
PUSHED = re.compile(r"successfully pushed", re.IGNORECASE)
# "The following are not valid dataset sources: [...]": pushed all the same, and then it runs without them.
REFUSED = re.compile(
    r"error|not valid|invalid|forbidden|unauthorized|could not find", re.IGNORECASE
)
ENDED = re.compile(r"complete|error|cancel", re.IGNORECASE)


class PushError(Exception):
    """Kaggle did not take the kernel, or its run failed; the text says what Kaggle said."""


def ask_kaggle(*arguments: str) -> str:
    """What the kaggle client prints; it is no error when it fails."""
    ran = subprocess.run([KAGGLE, *arguments], capture_output=True, text=True)
    return (ran.stdout + ran.stderr).strip()


def push(folder: Path, ask: Callable[..., str] = ask_kaggle) -> str:
    """Push a kernel.

    Args:
        folder: holds `kernel-metadata.json` and the notebook.
        ask: runs the kaggle client.

    Returns:
        Id of the kernel.

    Raises:
        PushError: Kaggle said anything but that all was taken.
    """
    metadata_path = folder / "kernel-metadata.json"
    if not metadata_path.exists():
        raise PushError(f"{metadata_path}: not found. Run `make kernel` first.")
    metadata = read_json(metadata_path)
    if metadata["id"].startswith(PLACEHOLDER):
        raise PushError("the owner is a placeholder: build with KAGGLE_USERNAME=<you> make kernel")
    said = ask("kernels", "push", "-p", str(folder))
    if not PUSHED.search(said) or REFUSED.search(said):
        raise PushError(f"Kaggle did not take all of it:\n{said}")
    return metadata["id"]


def wait_for_run(
    kernel_id: str,
    ask: Callable[..., str] = ask_kaggle,
    *,
    every_s: float = 60,
    limit_s: float = 12 * 3600,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Ask for the status until the run has ended.

    Returns:
        What Kaggle said last.

    Raises:
        PushError: the run failed, was cancelled, or did not end in time.
    """
    said = ""
    for _ in range(max(1, int(limit_s / every_s))):
        said = ask("kernels", "status", kernel_id)
        status = re.search(r'status "([^"]+)"', said)
        if status and ENDED.search(status[1]):
            if "complete" in status[1].lower():
                return said
            raise PushError(
                f"the run did not succeed: {said}\nIts log: kaggle kernels output {kernel_id}"
            )
        print(said, flush=True)
        sleep(every_s)
    raise PushError(f"the run has not ended after {limit_s / 3600:.0f} hours: {said}")


def main() -> int:
    """Push from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=paths.ROOT / "build" / "kaggle" / "kernel")
    options = parser.parse_args()
    try:
        kernel_id = push(options.folder)
        print(wait_for_run(kernel_id))
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"https://www.kaggle.com/code/{kernel_id}: Output → submission.csv → Submit to competition."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
