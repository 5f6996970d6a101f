"""Push the built kernel and wait for its run: `make kernel-push`. It never submits.

The kaggle client exits with 0 even when a push fails, so its output is read.
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
# "The following are not valid dataset sources: [...]": pushed all the same, but runs without them.
REFUSED = re.compile(
    r"error|not valid|invalid|forbidden|unauthorized|could not find", re.IGNORECASE
)
ENDED = re.compile(r"complete|error|cancel", re.IGNORECASE)


class PushError(Exception):
    """Kaggle did not accept the kernel, or its run failed; the message quotes Kaggle."""


def ask_kaggle(*arguments: str) -> str:
    """What the kaggle client prints, also when it fails."""
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
        PushError: Kaggle did not report that everything was accepted.
    """
    metadata_path = folder / "kernel-metadata.json"
    if not metadata_path.exists():
        raise PushError(f"{metadata_path}: not found. Run `make kernel` first.")
    metadata = read_json(metadata_path)
    if metadata["id"].startswith(PLACEHOLDER):
        raise PushError("the owner is a placeholder: build with KAGGLE_USERNAME=<you> make kernel")
    output = ask("kernels", "push", "-p", str(folder))
    if not PUSHED.search(output) or REFUSED.search(output):
        raise PushError(f"Kaggle did not accept all of it:\n{output}")
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
