"""Where things are, at home and on Kaggle: for notebooks, the runner and the submission.

Raw data: what the caller names, else `data/raw`, else Kaggle's input folder, else
nothing, and then the demo arena is used. Kaggle mounts inputs in an old and a new
layout, so files are found by name, never by an assumed path.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The rehearsal of the kernel lays Kaggle's folders elsewhere.
KAGGLE = Path(os.environ.get("ARENA_KAGGLE_ROOT", "/kaggle"))
KAGGLE_INPUT = KAGGLE / "input"
KAGGLE_WORKING = KAGGLE / "working"
TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")


def on_kaggle() -> bool:
    """Whether this is a Kaggle kernel."""
    return KAGGLE_WORKING.is_dir() and "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def artifacts_dir() -> Path:
    """The folder of all run folders: `$ARENA_ARTIFACTS`, else Kaggle's output, else `artifacts/`."""
    given = os.environ.get("ARENA_ARTIFACTS")
    if given:
        return Path(given).resolve()
    return (KAGGLE_WORKING if on_kaggle() else ROOT) / "artifacts"


def run_dir(name: str) -> Path:
    """The run folder of a notebook, e.g. `run_dir("02_baseline")`; made when missing."""
    folder = artifacts_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def submission_path(folder: Path) -> Path:
    """Where `submission.csv` goes: a run folder, on Kaggle the top of the output, where the competition looks."""
    return (KAGGLE_WORKING if on_kaggle() else folder) / "submission.csv"


def find_run(name: str) -> Path | None:
    """The finished run folder of a notebook: here, else in Kaggle's inputs; None when there is none."""
    candidates = [artifacts_dir() / name]
    if on_kaggle():
        candidates += sorted(path for path in KAGGLE_INPUT.rglob(name) if path.is_dir())
    return next((path for path in candidates if (path / "metrics.json").exists()), None)


def find_checkpoints(name: str) -> list[Path]:
    """Find attached checkpoints by name in Kaggle's inputs, the best match first.

    A checkpoint is a folder with `config.json` and safetensors. Its path holds the name,
    small and capital letters, punctuation and the framework's folder aside, so that both
    layouts and every mirror are found: `qwen3-4b-instruct-2507/transformers/default/1`.

    Args:
        name: hub id, e.g. "Qwen/Qwen3-4B-Instruct-2507"; the owner is not looked at.
    """
    if not on_kaggle():
        return []
    wanted = _letters(name.rsplit("/", 1)[-1])
    found = []
    for config in sorted(KAGGLE_INPUT.rglob("config.json")):
        parts = [
            _letters(part)
            for part in config.parent.relative_to(KAGGLE_INPUT).parts
            if part != "transformers"
        ]
        if wanted in "".join(parts) and any(config.parent.glob("*.safetensors")):
            found.append((wanted not in parts, config.parent))
    return [folder for _, folder in sorted(found)]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def choose_profile(profile: str) -> str:
    """Settle "auto": "demo" when the battles are those of the demo arena, else "full".

    Args:
        profile: "auto", "none" (parameters as they stand; what the runner passes), or a
            profile's name, which is handed back.
    """
    if profile != "auto":
        return profile
    return "demo" if (artifacts_dir() / "01_eda" / "truth.parquet").exists() else "full"


@dataclass(frozen=True)
class RawData:
    """The files of one data source; `kind` is "given", "raw", "kaggle" or "demo"."""

    kind: str
    train: tuple[Path, ...]
    test: Path | None
    sample_submission: Path | None


def find_table(folder: Path, stem: str) -> Path | None:
    """The table `stem` in a folder, whichever of the accepted endings it has; None when absent."""
    return next(
        (path for suffix in TABLE_SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None
    )


def find_raw_data(data: str = "", test: str = "") -> RawData:
    """Find the training and test files.

    Args:
        data: a folder in the competition's layout (`train`, `test`, `sample_submission`
            as .csv, .csv.gz or .parquet), a training file, or several training files
            separated by spaces; a `|` separates paths that hold spaces. A folder without a
            `train` file gives every other table in it. Empty: `data/raw`, else Kaggle's
            input, else the demo arena that 01 made.
        test: a test file, where it does not lie beside the training files.

    Returns:
        The files. `train` is empty when only the demo arena remains and 01 has yet to make it.

    Raises:
        FileNotFoundError: a path is given and does not exist, or a folder holds no table.
    """
    if data.strip():
        return _with_test(_given_data(data), test)
    raw = ROOT / "data" / "raw"
    if find_table(raw, "train"):
        return _with_test(_folder_data(raw, "raw"), test)
    if on_kaggle():
        tests = sorted(KAGGLE_INPUT.rglob("test.csv"))
        folder = next(
            (path.parent for path in tests if (path.parent / "sample_submission.csv").exists()),
            None,
        )
        if folder:
            return _with_test(_folder_data(folder, "kaggle"), test)
    return _with_test(_folder_data(artifacts_dir() / "01_eda" / "arena", "demo"), test)


def _given_data(data: str) -> RawData:
    whole = Path(data.strip()).expanduser()
    if whole.is_dir():
        source = _folder_data(whole, "given")
        if source.train or source.test:
            return source
        raise FileNotFoundError(
            f"{whole}: expected train{TABLE_SUFFIXES[0]} or another table, found none"
        )
    words = data.split("|") if "|" in data else [data] if whole.exists() else data.split()
    files = tuple(Path(word.strip()).expanduser() for word in words)
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such data file or folder (looked from {Path.cwd()})"
            )
    return RawData(
        "given",
        files,
        find_table(files[0].parent, "test"),
        find_table(files[0].parent, "sample_submission"),
    )


def _folder_data(folder: Path, kind: str) -> RawData:
    train = find_table(folder, "train")
    test, sample = find_table(folder, "test"), find_table(folder, "sample_submission")
    if train or kind != "given":
        return RawData(kind, (train,) if train else (), test, sample)
    others = sorted(path for path in folder.iterdir() if path.name.endswith(TABLE_SUFFIXES))
    return RawData(kind, tuple(path for path in others if path not in (test, sample)), test, sample)


def _with_test(source: RawData, test: str) -> RawData:
    if not test.strip():
        return source
    path = Path(test.strip()).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such test file (looked from {Path.cwd()})")
    sample = find_table(path.parent, "sample_submission")
    return RawData(source.kind, source.train, path, sample)
