"""The notebooks as a pipeline: what each reads and writes, and whether it is up to date.

A complete run leaves `run.json`: the parameters, and the state (size, time of change, hash) of
the notebook's code and of each file that it read or wrote. While these are unchanged, the
notebook is up to date.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from src.utils import paths
from src.utils.config import NOTEBOOKS, SuiteError, read_parameters
from src.utils.runs import hash_file, hash_json, read_json

RECORD, CHECKPOINTS, CODE = "run.json", "checkpoints", "the notebook's code"
EARLIER = "earlier"  # finished models of other settings, set aside by 03 and 04
MODELS = ("02_baseline", "03_modernbert", "04_qwen")
_PLACES = ("DATA", "TEST")  # what raw data hold matters, not where they lie
Files = dict[str, tuple[str, ...]]  # notebook -> names in its run folder


@dataclass(frozen=True)
class Stage:
    """One notebook of the pipeline; a file name that ends in `/` is a folder with some file."""

    name: str  # of the notebook's file (without its ending) and of its run folder
    outputs: tuple[str, ...]  # if the last one exists, the run completed
    reads: Files = field(default_factory=dict)  # of notebooks that must be complete
    may_read: Files = field(default_factory=dict)
    raw: tuple[str, ...] = ()  # raw tables that it reads: train, test, sample_submission
    chosen_by: str = ""  # parameter that says which of MODELS it reads; if empty, all


_PAIRS: Files = {"01_eda": ("pairs.parquet", "truth.parquet")}
_MODEL = ("config.json", "model/", "oof.parquet", "figures/", "metrics.json")
_BLEND = ("blend.json", "oof.parquet", "slices.csv", "figures/", "metrics.json")
_SUBMITTED = ("submission.csv", "figures/", "timing.json")
_TEST = ("test", "sample_submission")
_CARD = ("model/", "README.md", "parity.json")
_WEIGHTS: Files = {"05_ensemble": ("blend.json",)}
# Without metrics.json: scores follow from the rest, and its timings change with every run.
_SCORED: Files = dict.fromkeys(MODELS, ("config.json", "oof.parquet"))
_LOADED: Files = dict.fromkeys(MODELS, ("config.json", "model/", "base/"))
_PUBLISHED: Files = dict.fromkeys(MODELS[1:], ("config.json", "model/", "base/", "oof.parquet"))

STAGES = (
    Stage("01_eda", ("pairs.parquet", "figures/", "bias.json"), raw=("train",)),
    Stage("02_baseline", _MODEL, _PAIRS),
    Stage("03_modernbert", ("history.csv", *_MODEL), _PAIRS),
    Stage("04_qwen", ("history.csv", *_MODEL), _PAIRS),
    Stage("05_ensemble", _BLEND, _PAIRS | _SCORED, chosen_by="MEMBERS"),
    Stage("06_kaggle_inference", _SUBMITTED, _WEIGHTS, _LOADED, raw=_TEST),
    Stage("07_publish", _CARD, _PAIRS, _SCORED | _PUBLISHED),
)


def files_under(folder: Path, pattern: str) -> list[Path]:
    """List one file, or all files of a folder if its name ends in `/`."""
    path = folder / pattern
    found = path.rglob("*") if pattern.endswith("/") else [path]
    return sorted(file for file in found if file.is_file())


def hash_content(path: Path) -> str:
    """Hash a file, of a notebook only the code cells."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return hash_json([cell.source for cell in cells if cell.cell_type == "code"])
    return hash_file(path)


def measure_states(files: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Measure size (bytes), time of change (ns) and hash of each file."""
    return {name: [*_stat(path), hash_content(path)] for name, path in files.items()}


def _stat(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _changes(before: Mapping[str, list[Any]], now: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for name in sorted({*before, *now}):
        if name not in now or not now[name].is_file():
            yield name, "missing"
        elif name not in before:
            yield name, "new"
        # An unchanged size and time of change spare the hashing.
        elif before[name][:2] != _stat(now[name]) and before[name][2] != hash_content(now[name]):
            yield name, "changed"


@dataclass
class Pipeline:
    """Notebooks, their parameters (from `config.make_parameters`) and their run folders."""

    artifacts: Path  # folder of the run folders
    parameters: Mapping[str, Mapping[str, Any]]
    notebooks: Path = NOTEBOOKS
    stages: Sequence[Stage] = STAGES
    force: bool = False  # run what is up to date, too

    def __post_init__(self) -> None:
        """Read the notebooks' default parameters."""
        self.by_name = {stage.name: stage for stage in self.stages}
        self.sources = {name: self.notebooks / f"{name}.ipynb" for name in self.by_name}
        self.defaults = {name: read_parameters(path) for name, path in self.sources.items()}

    def all_parameters(self, name: str) -> dict[str, Any]:
        """Return a notebook's parameters, defaults included, without the places of its data."""
        known = {**self.defaults[name], **self.parameters.get(name, {})}
        return {key: known[key] for key in known if key not in _PLACES}

    def needs(self, stage: Stage) -> dict[str, tuple[str, ...]]:
        """Return earlier notebook -> files, with only the models that were chosen."""
        chosen = self.all_parameters(stage.name).get(stage.chosen_by) or MODELS
        unused = set(MODELS).difference(chosen)
        return {name: files for name, files in stage.reads.items() if name not in unused}

    def missing_input(self, stage: Stage, selected: Sequence[str] = ()) -> str:
        """Name a notebook that must run first and is not selected; empty if there is none."""
        for name, files in self.needs(stage).items():
            outputs = self.by_name[name].outputs
            for file in (outputs[-1], *[file for file in files if file in outputs]):
                if name not in selected and not files_under(self.artifacts / name, file):
                    path, hint = self.artifacts / name / file, f"make run NB={name[:2]}"
                    choice = f", or set {stage.chosen_by}" if stage.chosen_by else ""
                    return f"{stage.name} reads {path}, missing: {hint}{choice}"
        return ""

    def inputs(self, stage: Stage) -> dict[str, Path]:
        """Find every file that a notebook's result depends on, apart from the library."""
        found = {CODE: self.sources[stage.name]}
        for name, patterns in (self.needs(stage) | stage.may_read).items():
            for pattern in patterns:
                files = files_under(self.artifacts / name, pattern)
                found |= {str(file.relative_to(self.artifacts)): file for file in files}
        raw = self._find_raw(stage)
        if "train" in stage.raw and raw.kind != "demo":  # 01 makes the demo's tables itself
            tables = map(paths.on_disk, raw.train)
            found |= {f"training file {i}": path for i, path in enumerate(tables, 1)}
        for table, path in (("test", raw.test), ("sample_submission", raw.sample_submission)):
            if table in stage.raw and path:
                found[f"raw {table}"] = paths.on_disk(path)
        return found

    def outputs(self, stage: Stage) -> dict[str, Path]:
        """Find every file in a run folder, apart from checkpoints, earlier models, `run.json`."""
        folder = self.artifacts / stage.name
        files = {str(file.relative_to(folder)): file for file in files_under(folder, "./")}
        own = (RECORD, f"{CHECKPOINTS}/", f"{EARLIER}/")
        return {name: file for name, file in files.items() if not name.startswith(own)}

    def check_profile(self, named: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
        """Return what to remember of `named`; SuiteError if finished models have other profiles."""
        models = [self.artifacts / name / "model" for name in MODELS[1:]]
        found = " and ".join(str(folder) for folder in models if any(folder.glob("[!.]*/*")))
        before = paths.read_remembered(self.artifacts).get("PROFILE", "")
        is_other = found and before not in ("", named.get("PROFILE"))
        if is_other and {*names}.isdisjoint(MODELS[1:]):
            return {**named, "PROFILE": before}  # which the models still have
        if is_other and not self.force:
            raise SuiteError(
                f"PROFILE={named['PROFILE']}, but models of PROFILE={before} are in {found}. Give "
                f"ARTIFACTS=<another folder>, PROFILE={before}, or FORCE=1, which deletes them."
            )
        return dict(named)

    def lacks_test(self, stage: Stage) -> bool:
        """Return whether a notebook predicts test battles and there are none."""
        raw = self._find_raw(stage)
        return "test" in stage.raw and raw.test is None and raw.kind != "demo"

    def _find_raw(self, stage: Stage) -> paths.RawData:
        passed = self.parameters.get(stage.name, {})
        return paths.find_raw_data(*(str(passed.get(name, "")) for name in _PLACES))

    def read_record(self, stage: Stage) -> dict[str, Any]:
        """Read `run.json` of the last complete run; empty if there is none."""
        path = self.artifacts / stage.name / RECORD
        record = read_json(path) if path.exists() else {}
        return record if "inputs" in record else {}  # older versions wrote another layout

    def damage(self, stage: Stage) -> dict[str, str]:
        """Compare outputs with those of the last complete run: name -> missing or changed."""
        before = self.read_record(stage).get("outputs", {})  # a file that was added does no harm
        return dict(_changes(before, {name: self.artifacts / stage.name / name for name in before}))

    def why_run(self, stage: Stage) -> str:
        """Explain why a notebook must run, as a short phrase; empty if it is up to date."""
        record = self.read_record(stage)
        if self.force or not record:
            return "FORCE=1" if self.force else "no complete run"
        for name, value in self.all_parameters(stage.name).items():
            if record["parameters"].get(name) != value:
                return f"{name} was {record['parameters'].get(name)}, is {value}"
        for name, change in self.damage(stage).items():
            return f"output {name} is {change}"
        for name, change in _changes(record["inputs"], self.inputs(stage)):
            return f"{name} is {change}"
        return ""
