"""Load "a model", whatever form it has, and predict battles with it.

A model is an artifacts folder with its blend, one run folder in it, a published folder, or a hub
id. The CPU baseline is loaded at once; torch, and the networks with it, when they are asked for.
"""

import math
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.utils.config import SuiteError, name_model
from src.utils.models.baseline import Baseline, load_baseline
from src.utils.paths import list_tables
from src.utils.runs import read_json
from src.utils.stats.blend import Blend, apply_blend

BASELINE, ENSEMBLE = "02_baseline", "05_ensemble"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MISTAKES = (ValueError, OSError, RuntimeError, SuiteError)  # whose message says enough
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # nothing that runs


@dataclass(frozen=True)
class Source:
    """Where the members of a model are."""

    runs: dict[str, Path]  # member -> run folder, or published folder
    blend: Blend
    absent: tuple[str, ...] = ()  # members without a finished run; other weights are scaled up
    artifacts: Path | None = None  # the folder of all runs, where there is one

    @property
    def is_demo(self) -> bool:
        """Whether the model has learned from the simulated arena."""
        return bool(self.artifacts and (self.artifacts / "01_eda" / "truth.parquet").exists())


@dataclass(frozen=True)
class Answer:
    """The probabilities of N battles and how they came about."""

    probs: np.ndarray  # (N, C) float64, rows sum to 1
    members: dict[str, np.ndarray]  # member -> (N, C), NaN where time was short
    swap_gaps: dict[str, np.ndarray] = field(default_factory=dict)  # see `Prediction.swap_gap`
    notes: tuple[str, ...] = ()  # what went wrong or was given up


def find_model(place: str | Path, revision: str = "") -> Source:
    """Find a model by its folder or hub id; `revision` is a commit of the hub.

    Raises:
        FileNotFoundError: there is no such folder, it holds no finished model, or the hub does
            not have it; the message says what was expected.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return _find_in_folder(folder)
    if not _HUB_ID.fullmatch(str(place)):
        raise FileNotFoundError(
            f"{place}: no such folder; expected an artifacts folder, a run folder, a published "
            "model, or a hub id as owner/name. `make run` makes artifacts/"
        )
    from huggingface_hub import snapshot_download  # is slow to import

    try:
        found = snapshot_download(str(place), revision=revision or None, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub and what it stands on raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{place}: no such folder here, and the hub gave none ({reason[0]})"
        ) from error
    return _find_in_folder(Path(found), str(place))


def _find_in_folder(folder: Path, name: str = "") -> Source:
    name = name or folder.resolve().name
    if (folder / "origin.json").exists():
        return Source({name: folder}, Blend((name,), (1.0,)))
    if (folder / "model" / "origin.json").exists():  # the run folder of 07
        return _find_in_folder(folder / "model", name)
    if (folder / "blend.json").exists():
        return _find_blend(folder.parent)
    if (folder / "metrics.json").exists() and (folder / "model").is_dir():
        return Source({name: folder}, Blend((name,), (1.0,)), (), folder.resolve().parent)
    if (folder / ENSEMBLE / "metrics.json").exists():
        return _find_blend(folder)
    if (folder / BASELINE / "metrics.json").exists():
        return _find_in_folder(folder / BASELINE)
    complete = sorted(path.parent.name for path in folder.glob("*/metrics.json"))
    raise FileNotFoundError(
        f"{folder}: expected {ENSEMBLE} or {BASELINE}, a finished run, or a published model with "
        f"origin.json; found {complete or 'no finished run'}. `make run` makes them"
    )


def _find_blend(artifacts: Path) -> Source:
    blend = Blend.from_json(read_json(artifacts / ENSEMBLE / "blend.json"))
    runs = {name: artifacts / name for name in blend.members}
    runs = {name: run for name, run in runs.items() if (run / "metrics.json").exists()}
    if not runs:
        raise FileNotFoundError(f"{artifacts}: expected a finished run of {blend.members}")
    absent = tuple(name for name in blend.members if name not in runs)
    return Source(runs, blend, absent, artifacts)


def list_files(path: str | Path) -> list[Path]:
    """List the battle files at a path: itself, or the tables in a zip or folder."""
    path = Path(path).expanduser()
    if path.suffix.lower() == ".zip" or path.is_dir():
        files = list_tables(path)
        if not files:
            raise ValueError(f"{path}: expected a table of battles in it, found none")
        return files
    return [path]


class Predictor:
    """A model that is loaded once and predicts any number of battles, one call at a time."""

    def __init__(self, place: str | Path, revision: str = "") -> None:
        """Find a model and load its CPU baseline; see `find_model`."""
        self.source = find_model(place, revision)
        self.runs = dict(self.source.runs)  # without those that cannot be loaded
        self.baselines: dict[str, Baseline] = {}
        for name, run in self.runs.items():
            if (run / "model" / "baseline.json").exists():
                self.baselines[name] = load_baseline(run / "model")
        self.is_ready = False  # whether every network that is wanted has been loaded
        self._models: Any = None
        self._lock = threading.Lock()

    @property
    def baseline(self) -> Baseline | None:
        """The CPU baseline, where it is a member."""
        return next(iter(self.baselines.values()), None)

    @property
    def networks(self) -> list[str]:
        """The members that are networks."""
        return [name for name in self.runs if name not in self.baselines]

    def name(self, member: str) -> str:
        """Name what a member really is, for people."""
        if member in self.baselines:
            return "CPU baseline"
        run = self.source.runs.get(member)
        config = read_json(run / "config.json") if run else {}
        if "checkpoint" not in config:
            return member
        return name_model(config["checkpoint"], config.get("train", ""))

    def load_networks(self, ask_all: bool = False) -> None:
        """Load the networks into this process; with `ask_all` also those of weight zero.

        Raises:
            RuntimeError: a model cannot be loaded; the others predict without it.
        """
        weights = dict(zip(self.source.blend.members, self.source.blend.weights, strict=True))
        wanted = [name for name in self.networks if weights[name] or ask_all or not self.baselines]
        self.is_ready = not wanted
        if self.is_ready:
            return
        from src.utils.delivery.submit import Models, list_models  # imports torch

        models = Models(n_workers=0)
        models.baselines = {self.runs[name]: each for name, each in self.baselines.items()}
        trouble = []
        for name in wanted:
            try:
                for folder in list_models(self.runs[name]):
                    with models.open_network(folder):
                        pass  # is kept
            except Exception as error:  # whatever is wrong with one, the others still predict
                trouble.append(f"{name}: {type(error).__name__}: {error}")
                del self.runs[name]
        with self._lock:
            self._models = models
        self.is_ready = True
        if trouble:
            raise RuntimeError("; ".join(trouble))

    def predict(
        self, pairs: pd.DataFrame, deadline_s: float = math.inf, ask_all: bool = False
    ) -> Answer:
        """Predict N battles (`schema.PAIR_COLUMNS`), within so many seconds where that is given.

        Before the networks are loaded the CPU baseline answers alone. Quality is given up as in
        `predict_submission`, which also says what `ask_all` does.

        Raises:
            RuntimeError: no member could predict a battle, or none is loaded yet.
        """
        deadline = time.monotonic() + deadline_s
        with self._lock:
            if self._models is None or not self.networks:
                return self._predict_baseline(pairs)
            return self._predict_all(pairs, deadline - time.monotonic(), ask_all)

    def _predict_baseline(self, pairs: pd.DataFrame) -> Answer:
        if not self.baselines:
            expected = "expected a model that is loaded"
            raise RuntimeError(f"{expected}, found none: the networks are still being loaded")
        members = {name: each.predict_probs(pairs) for name, each in self.baselines.items()}
        return Answer(apply_blend(self.source.blend, members), members)

    def _predict_all(self, pairs: pd.DataFrame, left_s: float, ask_all: bool) -> Answer:
        from src.utils.delivery.submit import predict_submission

        outcome = predict_submission(
            pairs,
            {name: self.runs.get(name) for name in self.source.blend.members},
            self.source.blend,
            None,
            deadline_s=left_s,
            models=self._models,
            ask_all=ask_all,
        )
        notes = []
        for timing in outcome.timings:
            if timing.status in ("failed", "partial", "given up"):
                notes.append(f"{timing.member}: {timing.status}. {timing.note}".rstrip(". "))
        return Answer(outcome.probs, outcome.members, outcome.swap_gaps, tuple(notes))
