"""Where things are, at home and on Kaggle: for notebooks, the runner and the submission.

Kaggle mounts inputs in an old and a new layout, so files are found by name, never by path.
"""

import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

ROOT = Path(__file__).resolve().parents[2]
# Real battles for tests and benchmarks; their text is never committed.
REAL_DATA = Path(os.environ.get("ARENA_REAL_DATA", ROOT / "data" / "real")).expanduser()
KAGGLE = Path(os.environ.get("ARENA_KAGGLE_ROOT", "/kaggle"))  # the rehearsal moves it
KAGGLE_INPUT = KAGGLE / "input"
KAGGLE_WORKING = KAGGLE / "working"
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")
DEMO = "demo"  # as DATA: the demo arena, whatever is in data/raw
SETTINGS = "settings.json"  # in an artifacts folder: what the last `make run` there named
_REMEMBERED: TypeAdapter[Any] = TypeAdapter(dict[Literal["PROFILE", "DATA", "TEST"], str])


def on_kaggle() -> bool:
    """Whether this is a Kaggle kernel."""
    return KAGGLE_WORKING.is_dir() and "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def artifacts_dir() -> Path:
    """The folder of run folders: `$ARENA_ARTIFACTS`, else Kaggle's output, else `artifacts/`."""
    if given := os.environ.get("ARENA_ARTIFACTS"):
        return Path(given).resolve()
    return (KAGGLE_WORKING if on_kaggle() else ROOT) / "artifacts"


def run_dir(name: str) -> Path:
    """The run folder of a notebook, e.g. `run_dir("02_baseline")`; created when missing."""
    folder = artifacts_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def submission_path(folder: Path) -> Path:
    """Where `submission.csv` goes: a run folder, on Kaggle the top of the output instead."""
    return (KAGGLE_WORKING if on_kaggle() else folder) / "submission.csv"


def find_run(name: str) -> Path | None:
    """The complete run folder of a notebook: here, else in Kaggle's inputs, else None."""
    candidates = [artifacts_dir() / name]
    if on_kaggle():
        candidates += sorted(KAGGLE_INPUT.rglob(name))
    return next((path for path in candidates if (path / "metrics.json").exists()), None)


def find_checkpoints(name: str) -> list[Path]:
    """Find attached checkpoints by name in Kaggle's inputs, the best match first.

    A checkpoint is a folder with `config.json` and safetensors. Its path holds the name without
    owner, up to case, punctuation and the framework's folder, so that both layouts and every
    mirror are found: `qwen3-4b-instruct-2507/transformers/default/1`.
    """
    wanted = _letters(name.rsplit("/", 1)[-1])
    found = []
    for config in sorted(KAGGLE_INPUT.rglob("config.json")) if on_kaggle() else ():
        places = config.parent.relative_to(KAGGLE_INPUT).parts
        parts = [_letters(part) for part in places if part != "transformers"]
        if wanted in "".join(parts) and any(config.parent.glob("*.safetensors")):
            found.append((wanted not in parts, config.parent))
    return [folder for _, folder in sorted(found)]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def read_remembered(artifacts: Path) -> dict[str, str]:
    """Read what runs in an artifacts folder named of PROFILE, DATA, TEST; ValueError if damaged."""
    path = artifacts / SETTINGS
    try:
        return _REMEMBERED.validate_json(path.read_bytes()) if path.exists() else {}
    except ValidationError as error:
        expected = "expected JSON with texts for some of PROFILE, DATA and TEST"
        found = f"{error.errors()[0]['msg']}; delete the file and name them once more"
        raise ValueError(f"{path}: {expected}, got {found}") from error


def choose_profile(profile: str, artifacts: Path | None = None) -> str:
    """Resolve "auto": what a run in that folder named last; else demo for its arena, else full."""
    folder = artifacts or artifacts_dir()
    if profile != "auto":
        return profile
    is_demo = (folder / "01_eda" / "truth.parquet").exists()
    return read_remembered(folder).get("PROFILE") or ("demo" if is_demo else "full")


@dataclass(frozen=True)
class RawData:
    """The files of one data source."""

    kind: str  # given, raw, kaggle or demo
    train: tuple[Path, ...]  # empty where 01 has yet to make the demo arena
    test: Path | None
    sample_submission: Path | None


def on_disk(path: Path) -> Path:
    """The file that holds `path`: itself, or the archive of `archive.zip/train.csv`."""
    archives = (folder for folder in path.parents if folder.suffix.lower() == ".zip")
    return next(filter(Path.is_file, archives), path)


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def list_tables(folder: Path) -> list[Path]:
    """The tables in a folder or a zip, sorted; those in a zip have paths like a folder's."""
    if not _is_archive(folder):
        files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    else:
        try:
            with zipfile.ZipFile(folder) as archive:
                files = [folder / name for name in archive.namelist()]
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{folder}: expected a zip with train.csv, got {error}; download it again"
            ) from error
        files = [path for path in files if "__MACOSX" not in path.parts]
    return sorted(path for path in files if path.name.lower().endswith(TABLE_SUFFIXES))


def find_table(folder: Path, stem: str) -> Path | None:
    """The table `stem` in a folder or zip, with any of the accepted suffixes; None when absent."""
    names = {path.name.lower(): path for path in list_tables(folder)}
    found = (names.get(f"{stem}{suffix}") for suffix in TABLE_SUFFIXES)
    return next(filter(None, found), None)


def find_raw_data(data: str = "", test: str = "") -> RawData:
    """Find the training and test files; FileNotFoundError if a given path has none.

    Args:
        data: a folder in the competition's layout (`train`, `test`, `sample_submission` with any
            of the suffixes), or a zip of one; a training file; or several of these separated by
            spaces; a `|` separates paths that hold spaces. A folder without a `train` file gives
            every other table in it, or what its zip holds.
            Empty: `data/raw`, else Kaggle's input, else as "demo": the arena that 01 makes.
        test: a test file that is not beside the training files.

    Raises:
        FileNotFoundError: a path is given and does not exist, or a folder holds no table.
        ValueError: a zip is damaged.
    """
    data = data.strip()
    source = _read_given(data) if data else _search()
    if not test.strip():
        return source
    path = _existing(test)
    if _is_archive(path):
        path = find_table(path, "test") or path
    return replace(_read_folder(path.parent, source.kind), train=source.train, test=path)


def make_absolute(data: str) -> str:
    """Make the paths of `find_raw_data`'s arguments absolute, to hold in any working folder."""
    if data in ("", DEMO):
        return data
    path = Path(data).expanduser()
    is_one = path.is_dir() or _is_archive(path)
    return " | ".join(map(os.path.abspath, [path] if is_one else _read_given(data).train))


def _search() -> RawData:
    raw = _read_folder(ROOT / "data" / "raw", "raw")
    if raw.train:
        return raw
    for path in sorted(KAGGLE_INPUT.rglob("test.csv")) if on_kaggle() else ():
        if (path.parent / "sample_submission.csv").exists():
            return _read_folder(path.parent, "kaggle")
    return _read_given(DEMO)


def _existing(text: str) -> Path:
    path = Path(text.strip()).expanduser()
    if not on_disk(path).is_file():
        raise FileNotFoundError(f"{path}: no such data file or folder (looked from {Path.cwd()})")
    return path


def _read_given(data: str) -> RawData:
    if data == DEMO:
        return _read_folder(artifacts_dir() / "01_eda" / "arena", DEMO)
    path = Path(data).expanduser()
    if not path.is_dir() and not _is_archive(path):
        is_one = on_disk(path).exists()
        texts = [data] if is_one else data.split("|" if "|" in data else None)
        files: list[Path] = []
        for file in map(_existing, texts):
            files += _read_folder(file, "given").train if _is_archive(file) else [file]
        return replace(_read_folder(files[0].parent, "given"), train=tuple(files))
    source = _read_folder(path, "given")
    if not source.train and not source.test:
        raise FileNotFoundError(f"{path}: expected a table such as train.csv, found none")
    return source


def _read_folder(folder: Path, kind: str) -> RawData:
    stems = ("train", "test", "sample_submission")
    train, test, sample = (find_table(folder, stem) for stem in stems)
    files = [train] if train else []
    if kind == "given" and not train:
        files = [path for path in list_tables(folder) if path not in (test, sample)]
    if not files and folder.is_dir():
        for archive in sorted(filter(_is_archive, folder.glob("*.zip"))):
            if (packed := _read_folder(archive, kind)).train:
                return replace(packed, test=test or packed.test)
    return RawData(kind, tuple(files), test, sample)
