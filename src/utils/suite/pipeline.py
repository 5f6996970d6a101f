"""What each notebook reads and must leave, with which parameters, and whether it is whole.

`STAGES` is the river as a table. After a success a run folder gets `run.json`: hashes
of the notebook's code, its parameters, everything it read and everything it left.
While all of these are unchanged on disk the notebook is whole and need not run, so
that deleting one artifact remakes that notebook, and a later one only where the
content that it reads has changed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.utils import paths
from src.utils.config import SuiteError, find_name, read_parameters
from src.utils.runs import hash_file, hash_json, read_json, write_json

NOTEBOOKS = paths.ROOT / "notebooks"
STAMP = "run.json"
CHECKPOINTS = "checkpoints"
MODELS = ("02_baseline", "03_modernbert", "04_qwen")

# Fields of metrics.json that differ between two equal runs: seconds, tokens_per_second, peak_mib.
_TIMINGS = re.compile(r"second|_mib$")


@dataclass(frozen=True)
class Stage:
    """One notebook of the river.

    Args:
        name: the notebook's file name without its ending, and that of its run folder.
        leaves: files that it must leave; a name that ends in `/` is a folder that holds at least one.
        mark: the file it writes last, whose existence means that the run completed.
        reads: earlier notebook -> files that it reads; one that the earlier notebook does
            not promise is read where it is there.
        may_read: the same for notebooks that it can do without.
        raw: which raw tables it reads: train, test, sample_submission.
        chosen_by: a parameter that holds which of `MODELS` it reads; empty reads all.
    """

    name: str
    leaves: tuple[str, ...]
    mark: str
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    may_read: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    raw: tuple[str, ...] = ()
    chosen_by: str = ""


_PAIRS = {"01_eda": ("pairs.parquet", "truth.parquet")}
_SCORED = ("config.json", "oof.parquet", "metrics.json")
_LOADED = ("config.json", "model/", "base/")
_MODEL = ("config.json", "model/", "oof.parquet", "figures/", "metrics.json")

STAGES = (
    Stage("01_eda", ("pairs.parquet", "figures/", "bias.json"), "bias.json", raw=("train",)),
    Stage("02_baseline", _MODEL, "metrics.json", reads=_PAIRS),
    Stage("03_modernbert", (*_MODEL, "history.csv"), "metrics.json", reads=_PAIRS),
    Stage("04_qwen", (*_MODEL, "history.csv"), "metrics.json", reads=_PAIRS),
    Stage(
        "05_ensemble",
        ("blend.json", "report.html", "figures/", "metrics.json"),
        "metrics.json",
        reads=_PAIRS | dict.fromkeys(MODELS, _SCORED),
        chosen_by="MEMBERS",
    ),
    Stage(
        "06_kaggle_inference",
        ("submission.csv", "figures/", "timing.json"),
        "timing.json",
        reads={"05_ensemble": ("blend.json",)},
        may_read=dict.fromkeys(MODELS, _LOADED),
        raw=("test", "sample_submission"),
    ),
    Stage(
        "07_publish",
        ("model/", "README.md", "parity.json"),
        "parity.json",
        reads=_PAIRS | dict.fromkeys(MODELS[1:], (*_LOADED, "oof.parquet", "metrics.json")),
        chosen_by="SOURCE",
    ),
)


# ── what was asked for ────────────────────────────────────────────────────────────────


def choose_notebooks(only: str, names: Sequence[str]) -> list[str]:
    """Turn what was asked for into notebook names, in the river's order.

    Args:
        only: names or numbers separated by commas or spaces, ranges with a dash; empty takes all.
        names: every notebook, in order.

    Raises:
        SuiteError: there is no such notebook; the nearest name is suggested.

    Example:
        "02,04-05" -> ["02_baseline", "04_qwen", "05_ensemble"]
    """
    chosen = set() if only.strip() else set(names)
    for part in re.split(r"[,\s]+", only.strip()) if only.strip() else []:
        first, _, last = part.partition("-")
        start, end = (
            names.index(find_name(first, names)),
            names.index(find_name(last or first, names)),
        )
        if end < start:
            raise SuiteError(f"notebooks {part!r}: expected a range that goes up, such as 02-05")
        chosen.update(names[start : end + 1])
    return [name for name in names if name in chosen]


def absolute_data(given: Sequence[str]) -> str:
    """Make data paths absolute, because a kernel runs in another folder.

    Args:
        given: paths; one text may hold several, as in `paths.find_raw_data`.

    Returns:
        The paths, joined by " | "; empty when none is given.
    """
    words: list[str] = []
    for text in given:
        if Path(text).expanduser().exists():
            words.append(text)
        else:
            words += text.split("|") if "|" in text else text.split()
    return " | ".join(
        str(Path(word.strip()).expanduser().resolve()) for word in words if word.strip()
    )


# ── whether a notebook is whole ───────────────────────────────────────────────────────


class HashCache:
    """Hashes of files, remembered as long as size and time of change stay the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = read_json(path) if path.exists() else {}

    def of(self, path: Path) -> str:
        """The hash of a file; of `metrics.json` without its timings, which two equal runs do not share."""
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:2] != state:
            known = self._known[str(path)] = [*state, _hash_content(path)]
        return known[2]

    def save(self) -> None:
        """Keep what was learned for the next call."""
        write_json(
            self._path, {path: known for path, known in self._known.items() if os.path.exists(path)}
        )


def _hash_content(path: Path) -> str:
    if path.name != "metrics.json":
        return hash_file(path)
    try:
        return hash_json(
            {key: value for key, value in read_json(path).items() if not _TIMINGS.search(key)}
        )
    except (ValueError, AttributeError):
        return hash_file(path)


def files_under(folder: Path, pattern: str) -> list[Path]:
    """The files that a promise names: one file, or every file of a folder written with a closing `/`."""
    path = folder / pattern
    found = path.rglob("*") if pattern.endswith("/") else [path]
    return sorted(file for file in found if file.is_file())


def hash_leavings(folder: Path, hashes: HashCache) -> dict[str, str]:
    """Hash what a run folder holds, checkpoints and the stamp aside: file name -> hash."""
    left = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = file.relative_to(folder)
        if file.is_file() and str(name) != STAMP and CHECKPOINTS not in name.parts:
            left[str(name)] = hashes.of(file)
    return left


def hash_library() -> str:
    """The hash of the package's source, to say on a skip that it changed since."""
    library = Path(__file__).resolve().parents[1]
    return hash_json(
        {str(file.relative_to(library)): hash_file(file) for file in sorted(library.rglob("*.py"))}
    )


def _hash_code(notebook: Path) -> str:
    import nbformat  # slow

    cells = nbformat.read(notebook, as_version=4).cells
    return hash_json([cell.source for cell in cells if cell.cell_type == "code"])


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> str:
    for name in sorted({*before, *now}):
        if name not in now:
            return f"{what}{name} is missing"
        if name not in before:
            return f"{what}{name} is new"
        if before[name] != now[name]:
            return f"{what}{name} changed"
    return ""


@dataclass
class River:
    """Where the notebooks lie, where their runs go, and with which parameters.

    Args:
        artifacts: folder of the run folders.
        parameters: notebook -> parameter -> value, from `make_parameters`.
        notebooks: folder of the notebooks.
        stages: the notebooks, in order.
        force: run what would be skipped.
    """

    artifacts: Path
    parameters: Mapping[str, Mapping[str, Any]]
    notebooks: Path = NOTEBOOKS
    stages: Sequence[Stage] = STAGES
    force: bool = False

    def __post_init__(self) -> None:
        """Open the cache of hashes."""
        self.hashes = HashCache(self.artifacts / "hashes.json")
        self.by_name = {stage.name: stage for stage in self.stages}
        self.defaults = {
            name: read_parameters(self.notebooks / f"{name}.ipynb") for name in self.by_name
        }

    def folder(self, name: str) -> Path:
        """The run folder of a notebook."""
        return self.artifacts / name

    def source(self, stage: Stage) -> Path:
        """The notebook's file."""
        return self.notebooks / f"{stage.name}.ipynb"

    def needs(self, stage: Stage) -> dict[str, tuple[str, ...]]:
        """Earlier notebook -> files that a notebook cannot do without, with the models it was told to use."""
        known = self.defaults[stage.name] | dict(self.parameters.get(stage.name, {}))
        chosen = known.get(stage.chosen_by) or MODELS
        return {
            name: files
            for name, files in stage.reads.items()
            if name not in MODELS or name in chosen
        }

    def missing_upstream(self, stage: Stage, selected: Sequence[str] = ()) -> str:
        """What an earlier notebook should have left and did not, as a sentence; empty when all is there."""
        for name, files in self.needs(stage).items():
            promised = [file for file in files if file in self.by_name[name].leaves] + [
                self.by_name[name].mark
            ]
            absent = [file for file in promised if not files_under(self.folder(name), file)]
            if absent and name not in selected:
                other = (
                    f", or choose other models with {stage.name}.{stage.chosen_by}"
                    if stage.chosen_by
                    else ""
                )
                return (
                    f"{stage.name} reads {name}/{absent[0]}, which is missing in {self.artifacts}. "
                    f"Run {name} first: make run NB={name[:2]}{other}"
                )
        return ""

    def make_key(self, stage: Stage) -> dict[str, Any]:
        """Everything that a notebook's result depends on, library code aside."""
        passed = dict(self.parameters.get(stage.name, {}))
        read = {}
        for name, files in (*self.needs(stage).items(), *stage.may_read.items()):
            for file in (
                found for pattern in files for found in files_under(self.folder(name), pattern)
            ):
                read[str(file.relative_to(self.artifacts))] = self.hashes.of(file)
        return {
            "code": _hash_code(self.source(stage)),
            # Where raw data lie is no matter, only what they hold.
            "parameters": {
                key: value for key, value in passed.items() if key not in ("DATA", "TEST")
            },
            "raw": self._hash_raw(stage, passed),
            "read": read,
        }

    def lacks_test(self, stage: Stage) -> bool:
        """Whether a notebook predicts test battles and there are none (the demo arena's are made by 01)."""
        if "test" not in stage.raw:
            return False
        source = self._find_raw(self.parameters.get(stage.name, {}))
        return source.test is None and source.kind != "demo"

    @staticmethod
    def _find_raw(passed: Mapping[str, Any]) -> paths.RawData:
        return paths.find_raw_data(str(passed.get("DATA", "")), str(passed.get("TEST", "")))

    def _hash_raw(self, stage: Stage, passed: Mapping[str, Any]) -> dict[str, str]:
        if not stage.raw:
            return {}
        source = self._find_raw(passed)
        if source.kind == "demo" and "train" in stage.raw:
            return {"kind": "demo"}
        tables = {f"train file {i}": path for i, path in enumerate(source.train, 1)}
        tables |= {"test": source.test, "sample_submission": source.sample_submission}
        found = {
            name: path for name, path in tables.items() if path and name.split()[0] in stage.raw
        }
        return {"kind": source.kind} | {name: self.hashes.of(path) for name, path in found.items()}

    def damage(self, stage: Stage) -> dict[str, bool]:
        """Files that are not as the last finished run left them: name -> whether there still is one."""
        folder = self.folder(stage.name)
        if not (folder / STAMP).exists():
            return {}
        left, now = read_json(folder / STAMP)["left"], hash_leavings(folder, self.hashes)
        # A file that somebody added, such as a file manager, is no damage.
        return {name: name in now for name in left if now.get(name) != left[name]}

    def why_run(self, stage: Stage) -> str:
        """Why a notebook must run, as a short phrase; empty when it is whole and can be skipped."""
        folder = self.folder(stage.name)
        if self.force:
            return "FORCE=1"
        if not (folder / STAMP).exists():
            return (
                f"{STAMP} is missing"
                if (folder / stage.mark).exists()
                else "there is no finished run"
            )
        stamp, key = read_json(folder / STAMP), self.make_key(stage)
        if stamp["code"] != key["code"]:
            return "its code changed"
        for name in sorted({*stamp["parameters"], *key["parameters"]}):
            before, now = (
                stamp["parameters"].get(name, "its default"),
                key["parameters"].get(name, "its default"),
            )
            if before != now:
                return f"{name} was {before}, is {now}"
        return (
            _difference(stamp["raw"], key["raw"], "raw data: ")
            or next(
                (
                    f"{name} is {'changed' if now else 'missing'}"
                    for name, now in self.damage(stage).items()
                ),
                "",
            )
            or _difference(stamp["read"], key["read"], "")
        )
