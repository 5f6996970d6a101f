"""Download the competition's battles into `data/raw`: python -m src.utils.battles.download."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from src.utils import paths
from src.utils.schema import LABELS, MODELS, PAIR_COLUMNS

COMPETITION = "llm-classification-finetuning"
HUB_COPY = "lmarena-ai/arena-human-preference-55k"  # the same training rows; no test rows
BY_HAND = f"""Download the battles by hand:
  1. sign in at https://www.kaggle.com/competitions/{COMPETITION},
     accept the rules, and press "Download All" under Data
  2. unzip train.csv, test.csv and sample_submission.csv into {{folder}}
  or take train.csv from https://huggingface.co/datasets/{HUB_COPY}
Then: make run PROFILE=full DATA=data/raw"""


def download_from_kaggle(folder: Path) -> None:
    """Download train, test and sample submission with the credentials that kagglehub finds."""
    import kagglehub
    from kagglehub.config import get_kaggle_credentials

    if get_kaggle_credentials() is None:
        raise PermissionError(
            "no Kaggle credentials (KAGGLE_API_TOKEN, or kaggle.json from your account's settings)"
        )
    kagglehub.competition_download(COMPETITION, output_dir=str(folder))


def download_with_cli(folder: Path) -> None:
    """Download the same with the kaggle command, which supports other ways to sign in."""
    program = Path(sys.executable).with_name("kaggle")
    options = f"competitions download -c {COMPETITION} --quiet -p".split()
    ran = subprocess.run(
        [program, *options, folder], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    output = (ran.stdout + ran.stderr).strip()
    if "Authentication required" in output:
        raise PermissionError("nobody is signed in (kaggle auth login)")
    if ran.returncode:
        raise ConnectionError(output.splitlines()[-1] if output else f"exit code {ran.returncode}")


def download_from_hub(folder: Path) -> None:
    """Download the public copy of the training rows."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(HUB_COPY, "train.csv", repo_type="dataset", local_dir=folder)


SOURCES: Mapping[str, Callable[[Path], None]] = {
    "kagglehub": download_from_kaggle,
    "the kaggle command": download_with_cli,
    "the hub's public copy": download_from_hub,
}


def download(folder: Path, sources: Mapping[str, Callable[[Path], None]] = SOURCES) -> str:
    """Download the battles from the first source that works, completely or not at all.

    Returns:
        The name of the source; empty if the folder already has a training table.

    Raises:
        ConnectionError: no source worked; the message has the reasons and what to do by hand.
    """
    if paths.find_table(folder, "train"):
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, download_into in sources.items():
        # Beside the target, so that moving a finished file is one step of the file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as staging:
            try:
                download_into(Path(staging))
                _move_tables(Path(staging), folder)
                return name
            # Networks and accounts fail in many ways; the next source is tried.
            except Exception as error:
                failures.append(f"  {name}: {str(error).strip() or type(error).__name__}")
    reasons = "\n".join(failures)
    raise ConnectionError(f"no source worked:\n{reasons}\n{BY_HAND.format(folder=folder)}")


def _move_tables(staging: Path, folder: Path) -> None:
    for archive in list(staging.rglob("*.zip")):
        zipfile.ZipFile(archive).extractall(staging)
    train = next(staging.rglob("train.csv"), None)
    if train is None:
        raise FileNotFoundError("expected train.csv in the download, found none")
    with open(train, encoding="utf-8") as file:
        names = file.readline().strip().replace('"', "").split(",")
    missing = [name for name in (*PAIR_COLUMNS, *MODELS, *LABELS) if name not in names]
    if missing:
        raise ValueError(
            f"train.csv: expected the competition's columns, missing {missing}, got {names[:12]}"
        )
    # Train last: its existence means that the others are there.
    for name in ("sample_submission.csv", "test.csv", "train.csv"):
        for file_found in staging.rglob(name):
            os.replace(file_found, folder / name)


def main() -> int:
    """Download into `data/raw`, and return the exit code."""
    folder = paths.ROOT / "data" / "raw"
    try:
        source = download(folder)
    except ConnectionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: downloaded from {source}" if source else f"{folder}: already there")
    if not paths.find_table(folder, "test"):
        print("There are no test rows: without TEST=<file> notebook 06 is skipped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
