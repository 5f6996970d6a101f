"""Download battles by name, e.g. into `data/arena-140k`: python -m src.utils.battles.download NAME.

Without a name, the competition's go into `data/raw`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from pyarrow.dataset import dataset

from src.utils import paths
from src.utils.battles.files import read_table
from src.utils.schema import LABELS, MODELS, PAIR_COLUMNS

COMPETITION = "llm-classification-finetuning"
_ARENA = "Chiang et al. 2024, Chatbot Arena, arXiv:2403.04132"
_PROMPTS_CC_BY = "user prompts CC BY 4.0, answers under the terms of the models' providers"
_KAGGLE_RULES = "the competition's rules on Kaggle, which you accept there; no grant to pass it on"


@dataclass(frozen=True)
class Battles:
    """A public set of battles: where it is, under which licence, and whom to cite."""

    licence: str
    citation: str
    competition: str = ""  # on Kaggle
    hub: str = ""  # repository of the data set on the Hugging Face hub
    pattern: str = "*.parquet"  # its files of battles there
    columns: tuple[str, ...] = ("model_a", "model_b", "winner", "conversation_a", "conversation_b")

    @property
    def page(self) -> str:
        """Where people read its terms."""
        kaggle = f"https://www.kaggle.com/competitions/{self.competition}"
        return kaggle if self.competition else f"https://huggingface.co/datasets/{self.hub}"


_COMPETITION_COLUMNS = (*PAIR_COLUMNS, *MODELS, *LABELS)
_HUB_COPY = "lmarena-ai/arena-human-preference-55k"  # the same training rows; no test rows
SETS: Mapping[str, Battles] = {
    "competition": Battles(
        _KAGGLE_RULES, _ARENA, COMPETITION, _HUB_COPY, "train.csv", _COMPETITION_COLUMNS
    ),
    "arena-55k": Battles(
        "Apache 2.0", _ARENA, hub=_HUB_COPY, pattern="train.csv", columns=_COMPETITION_COLUMNS
    ),
    "arena-100k": Battles(_PROMPTS_CC_BY, _ARENA, hub="lmarena-ai/arena-human-preference-100k"),
    "arena-140k": Battles(_PROMPTS_CC_BY, _ARENA, hub="lmarena-ai/arena-human-preference-140k"),
    "wsdm": Battles(
        _KAGGLE_RULES,
        "WSDM Cup 2025, Multilingual Chatbot Arena, Kaggle",
        "wsdm-cup-multilingual-chatbot-arena",
        columns=(*PAIR_COLUMNS, "winner"),
    ),
    "mt-bench": Battles(
        "CC BY 4.0",
        "Zheng et al. 2023, Judging LLM-as-a-Judge with MT-Bench, arXiv:2306.05685",
        hub="lmsys/mt_bench_human_judgments",
        pattern="data/human-*.parquet",
    ),
}


def download_from_kaggle(folder: Path, competition: str = COMPETITION) -> None:
    """Download a competition's files with the kaggle command, which knows all ways to sign in."""
    program = Path(sys.executable).with_name("kaggle")
    options = f"competitions download -c {competition} --quiet -p".split()
    ran = subprocess.run(
        [program, *options, folder], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    output = (ran.stdout + ran.stderr).strip()
    if "Authentication required" in output:
        raise PermissionError("nobody is signed in (kaggle auth login, or KAGGLE_API_TOKEN)")
    if ran.returncode:
        raise ConnectionError(output.splitlines()[-1] if output else f"exit code {ran.returncode}")


def download_from_hub(folder: Path, repository: str, pattern: str) -> None:
    """Download the files of a data set that match a pattern, in their newest version."""
    from huggingface_hub import snapshot_download

    snapshot_download(repository, repo_type="dataset", allow_patterns=pattern, local_dir=folder)


Source = Callable[[Path], object]


def list_sources(battles: Battles) -> dict[str, Source]:
    """The places of a set, in the order in which they are tried: name -> download into a folder."""
    sources: dict[str, Source] = {}
    if battles.competition:
        sources["Kaggle"] = lambda folder: download_from_kaggle(folder, battles.competition)
    if battles.hub:
        sources["the hub"] = lambda folder: download_from_hub(folder, battles.hub, battles.pattern)
    return sources


def download(
    folder: Path,
    sources: Mapping[str, Source] | None = None,
    battles: Battles = SETS["competition"],
) -> str:
    """Download a set from the first source that works, completely or not at all.

    `sources` are those of `list_sources` where none are given.

    Returns:
        The name of the source; empty if the folder already has a training table.

    Raises:
        ConnectionError: no source worked; the message has the reasons and what to do by hand.
    """
    if paths.find_table(folder, "train"):
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, download_into in (sources or list_sources(battles)).items():
        # Beside the target, so that moving a finished file is one step of the file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as staging:
            try:
                download_into(Path(staging))
                _move_tables(Path(staging), folder, battles.columns)
                return name
            # Networks and accounts fail in many ways; the next source is tried.
            except Exception as error:
                failures.append(f"  {name}: {str(error).strip() or type(error).__name__}")
    reasons = "\n".join(failures)
    raise ConnectionError(f"no source worked:\n{reasons}\n{_by_hand(folder, battles)}")


def _by_hand(folder: Path, battles: Battles) -> str:
    """What to do where no source works."""
    lines = [f"Download the battles by hand, from {battles.page}"]
    if battles.competition:
        lines += ['  sign in, accept the rules, press "Download All" under Data, and unzip there']
    lines += [f"  put the training table into {folder}, as train.csv or train.parquet"]
    if battles.competition and battles.hub:
        lines += [f"  or take it from https://huggingface.co/datasets/{battles.hub}"]
    return "\n".join([*lines, f"Then give the folder as DATA={folder}"])


def _move_tables(staging: Path, folder: Path, columns: tuple[str, ...]) -> None:
    for archive in list(staging.rglob("*.zip")):
        zipfile.ZipFile(archive).extractall(staging)
    train = _find_train(staging, columns)
    names = list(read_table(train, header_only=True).columns)
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(
            f"{train.name}: expected columns {list(columns)}, missing {missing}, got {names[:12]}"
        )
    # Train last: its existence means that the others are there.
    for stem in ("sample_submission", "test"):
        for file in staging.rglob(f"{stem}.*"):
            os.replace(file, folder / file.name)
    os.replace(train, folder / f"train{train.suffix}")


def _find_train(staging: Path, columns: tuple[str, ...]) -> Path:
    """Find the table of battles in a download; the parts of one are joined."""
    tables = [path for path in staging.rglob("train.*") if path.suffix in (".csv", ".parquet")]
    if tables:
        return tables[0]
    found = sorted(staging.rglob("*.parquet"))
    if not found:
        raise FileNotFoundError("expected train.csv or parquet files in the download, found none")
    # A repository may hold other tables too, such as embeddings.
    parts = [part for part in found if set(columns) <= {*read_table(part, header_only=True)}]
    if len(parts) < 2:
        return (parts or found)[0]
    joined = staging / "train.parquet"
    with pq.ParquetWriter(joined, pq.read_schema(parts[0])) as writer:
        for batch in dataset(parts).to_batches(batch_size=1024):
            writer.write_batch(batch)
    return joined


def main(arguments: Sequence[str] = ()) -> int:
    """Download a set, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="competition", choices=SETS)
    name = parser.parse_args(arguments).name
    battles = SETS[name]
    folder = paths.ROOT / "data" / ("raw" if name == "competition" else name)
    print(f"{name}: {battles.page}\nLicence: {battles.licence}\nCite: {battles.citation}")
    try:
        source = download(folder, battles=battles)
    except ConnectionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: downloaded from {source}" if source else f"{folder}: already there")
    if not paths.find_table(folder, "test"):
        print("There are no test rows: without TEST=<file> notebook 06 is skipped.")
    if name != "competition":
        print(f"Then: DATA=data/{name}, with a folder of its own in ARTIFACTS")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
