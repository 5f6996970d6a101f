"""Test battles to a submission that is valid from the first minute on.

The CPU baseline answers for every battle before any network is loaded, and
`submission.csv` is written at once. Each network then improves it, in processes of its own,
the one worth most per second first. One that fails or runs out of time costs quality, never rows.
"""

import contextlib
import functools
import html
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from src.utils import paths
from src.utils.config import FinetuneConfig
from src.utils.models.baseline import Baseline, load_baseline
from src.utils.models.checkpoints import find_base, load_tokenizer
from src.utils.models.predict import (
    Prediction,
    choose_least_certain,
    measure_entropy,
    predict_pairs,
)
from src.utils.models.reading import Reader, load_reader, open_reader
from src.utils.runs import measure_versions, read_json, write_table
from src.utils.schema import LABELS, check_probs
from src.utils.stats.blend import Blend, apply_blend

SUBMISSION_COLUMNS = ("id", *LABELS)

Keep = Callable[[Prediction], None]  # is given what a model has predicted so far
Predict = Callable[[pd.DataFrame, "_Member", Keep], Prediction]
Network = tuple[Reader, PreTrainedTokenizerBase, FinetuneConfig]  # a model that is open


@dataclass
class MemberTiming:
    """What one member of the blend did for the submission."""

    member: str
    status: str  # complete, partial (time ran out), given up, failed, absent or zero weight
    n_asked: int  # battles that it was to predict: all, or the least certain share
    n_reached: int = 0  # battles that it predicted
    n_twice: int = 0  # battles that each of its models read in both orders
    n_cut: int = 0  # battles that were read shorter than trained, because time was short
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The probabilities of the submission, and how they came about."""

    probs: np.ndarray  # (N, C) float64, rows sum to 1
    timings: list[MemberTiming]  # one per member of the blend
    n_pairs_by_members: dict[str, int]  # "a + b" -> battles that got exactly these members
    # Member -> (N, C) float64, NaN where it has not read; and (N,), see `Prediction.swap_gap`.
    members: dict[str, np.ndarray] = field(default_factory=dict)
    swap_gaps: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Submission:
    """The file `submission.csv`, replaced as better probabilities arrive."""

    path: Path
    ids: np.ndarray  # (N,) ids of the test battles
    sample_ids: np.ndarray  # (M,) ids that the competition expects, in its order

    def write(self, probs: np.ndarray) -> Path:
        """Write (N, C) probabilities, read them back, and check them as the competition would."""
        write_table(self.path, make_submission(self.ids, probs, self.sample_ids))
        check_submission(pd.read_csv(self.path, dtype={"id": str}), self.sample_ids)
        return self.path


def make_submission(ids: np.ndarray, probs: np.ndarray, sample_ids: np.ndarray) -> pd.DataFrame:
    """Order predictions as in the sample: M rows of id and one float64 column per label.

    Arguments are those of `Submission`; of an id that repeats the first row is taken. ValueError
    if an expected id has no prediction, or a prediction was not expected.
    """
    check_probs(probs, n_pairs=len(ids))
    table = pd.DataFrame(probs, index=ids, columns=list(LABELS), dtype=np.float64)
    table = table[~table.index.duplicated()]
    expected = pd.Index(sample_ids)
    missing, extra = expected.difference(table.index), table.index.difference(expected)
    if len(missing) or len(extra):
        raise ValueError(
            f"submission: expected the {len(expected)} ids of the sample, got {len(table)}: "
            f"{len(missing)} missing (first {missing[:3].tolist()}), "
            f"{len(extra)} unexpected (first {extra[:3].tolist()})"
        )
    return table.loc[expected].rename_axis("id").reset_index()


def check_submission(submission: pd.DataFrame, sample_ids: np.ndarray) -> pd.DataFrame:
    """Return a table read back from `submission.csv`; ValueError if it would not be accepted."""
    columns = list(submission.columns)
    if columns != list(SUBMISSION_COLUMNS):
        raise ValueError(f"submission: expected columns {list(SUBMISSION_COLUMNS)}, got {columns}")
    if submission["id"].astype(str).tolist() != [str(value) for value in sample_ids]:
        raise ValueError("submission: expected the ids of sample_submission in order, got others")
    check_probs(submission[list(LABELS)].to_numpy(dtype=np.float64), tolerance=1e-6)
    return submission


class Models:
    """Opens the models of runs, each for its turn, with a progress bar.

    `n_workers` is that of `open_reader`. With 0 all are read in this process, and stay in its
    memory for any number of calls.
    """

    def __init__(self, n_workers: int | None = None) -> None:
        self.n_workers = n_workers
        self.baselines: dict[Path, Baseline] = {}  # by run folder, where they are kept
        self._networks: dict[Path, Network] = {}

    def load_baseline(self, run: Path) -> Baseline:
        """Load the CPU baseline of a run folder."""
        if run in self.baselines:
            return self.baselines[run]
        read_json(run / "config.json")  # names a damaged run
        return load_baseline(run / "model")

    @contextlib.contextmanager
    def open_network(self, folder: Path, deadline: float = math.inf) -> Iterator[Network]:
        """Open a fine-tuned model; the deadline is a `time.monotonic()` value."""
        if folder in self._networks:
            yield self._networks[folder]
            return
        config = read_settings(folder)
        load = functools.partial(load_reader, folder, config, find_base(folder, config))
        with contextlib.closing(open_reader(load, deadline, self.n_workers)) as reader:
            network = (reader, load_tokenizer(folder), config)
            if self.n_workers == 0:
                self._networks[folder] = network
            yield network


def predict_submission(
    pairs: pd.DataFrame,
    runs: Mapping[str, Path | None],
    blend: Blend,
    submission: Submission | None,
    *,
    deadline_s: float,
    cascade: float = 1.0,
    models: Models | None = None,
    ask_all: bool = False,
) -> Outcome:
    """Predict every battle as well as time allows: the CPU baseline, then network by network.

    When time is short, the last networks in the order of `order_networks` are given up first;
    then, of the one under way, what `predict_pairs` states: second readings, length, and the
    most certain battles, which keep what other members predict. With `cascade` below 1 the
    first network reads every battle once, and that share of them, the least certain, twice;
    the other networks, or the only one there is, read that share only.

    Args:
        runs: member of the blend -> its finished run folder or published model, or None where
            there is none.
        submission: written after the CPU baseline, after each network, and each minute; or None.
        deadline_s: seconds from now that must not be passed, margin included.
        cascade: share, above 0 to 1; the least certain have the highest entropy so far.
        models: opens the models; None opens each for its turn, with progress bars.
        ask_all: networks of weight zero predict, too, for `Outcome.members`.

    ValueError if `cascade` is out of range, RuntimeError if no member could predict a battle.
    """
    if not 0 < cascade <= 1:
        raise ValueError(f"cascade: expected a share above 0, at most 1, got {cascade}")
    deadline = time.monotonic() + deadline_s
    models = models or Models()
    state = _State(pairs, blend, submission)
    for name, member in state.members.items():
        run = runs.get(name)
        if run is None:
            member.give_up("absent", "no finished run; execute its notebook")
        elif not _is_network(run):
            state.run(member, functools.partial(_predict_baseline, models, run))
    networks = order_networks(runs, blend)
    # With two networks or more, the first one reads every battle.
    n_weighted = len({name for name, _ in networks if state.members[name].weight})
    for name, folder in networks:
        member = state.members[name]
        if member.uncertainty is None:
            state.choose_battles(member, cascade, n_weighted > 1 and name == networks[0][0])
        if not member.weight and state.is_reached.all() and not ask_all:
            member.give_up("zero weight", "")
        elif time.monotonic() >= deadline:
            member.give_up("given up", f"{folder.name}: no time was left")
        else:
            state.run(member, functools.partial(_predict_network, models, folder, deadline))
    timings = [member.timing(name) for name, member in state.members.items()]
    if len(pairs) and not state.is_reached.any():
        notes = "; ".join(f"{timing.member}: {timing.note}" for timing in timings)
        raise RuntimeError(f"submission: expected a prediction of any member, got none ({notes})")
    outcome = Outcome(state.blend(), timings, state.count_members())
    return replace(outcome, members=state.known(), swap_gaps=state.swap_gaps())


def order_networks(runs: Mapping[str, Path | None], blend: Blend) -> list[tuple[str, Path]]:
    """Order the models of all networks, member and folder, by worth per second, most first.

    The worth is the weight in the blend, for the second model of a network half of it, for
    the third a third; the size of the weights stands for the seconds.
    """
    worth: dict[tuple[str, Path], float] = {}
    for name, weight in zip(blend.members, blend.weights, strict=True):
        run = runs.get(name)
        if run is None or not _is_network(run):
            continue
        stored = _read_stored(run)
        bases = []
        if stored.get("lora_rank") or stored.get("train") == "head":  # their base is read, too
            bases = [run / "base", *paths.find_checkpoints(stored["checkpoint"])[:1]]
        for place, folder in enumerate(list_models(run), start=1):
            files = [file for part in (folder, *bases) for file in part.glob("*.safetensors")]
            n_bytes = sum(file.stat().st_size for file in files)
            worth[name, folder] = weight / place / max(n_bytes, 1)
    return sorted(worth, key=lambda model: -worth[model])


def list_models(run: Path) -> list[Path]:
    """List the models of a network's run, its refit first; a published folder is its own."""
    if _is_published(run):
        return [run]
    models = run / "model"
    folders = [*models.glob("refit"), *sorted(models.glob("fold_*"))]
    if _read_stored(run).get("train") == "head":
        folders = folders[:1]  # the heads of all folds would read the same base again
    # Where none is found, the first is tried all the same: its error says what is missing.
    return folders or [models / "fold_0"]


def read_settings(folder: Path) -> FinetuneConfig:
    """Read the settings that a model of `list_models` predicts with."""
    run = folder.parents[1] / "config.json"
    if folder.parent.name == "model" and run.exists():
        return FinetuneConfig.from_json(read_json(run))
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= {*weights.keys()}
    head: Any = "contrast" if any("contrast." in name for name in names) else "joint"
    default = FinetuneConfig(checkpoint=str(folder), revision="", head=head)
    architecture = read_json(folder / "config.json")
    if "battle" in architecture:  # 07 wrote it
        return replace(default, predict_tokens=architecture["battle"]["max_tokens"])
    longest = architecture.get("max_position_embeddings")
    return replace(default, predict_tokens=min(default.predict_tokens, longest or sys.maxsize))


def _read_stored(run: Path) -> dict[str, Any]:
    """Read a run's settings unchecked: what is wrong with them is said when a model is loaded."""
    return {} if _is_published(run) else read_json(run / "config.json")


def _is_published(run: Path) -> bool:
    return (run / "origin.json").exists()


def _is_network(run: Path) -> bool:
    if _is_published(run):
        return True
    try:
        return "checkpoint" in _read_stored(run)
    except (OSError, ValueError):
        return False  # the attempt to load it reports the damage


@dataclass
class _Member:
    """What one member is to predict, and what its models have predicted so far."""

    weight: float
    rows: np.ndarray  # (M,) int, ascending, the battles to predict
    uncertainty: np.ndarray | None = None  # (M,) float, once the battles are chosen
    twice_share: float = 1.0  # of these battles, least certain first, in both orders
    predictions: list[Prediction] = field(default_factory=list)  # one per model, of M battles
    status: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def give_up(self, status: str, note: str) -> None:
        self.status = self.status or status
        self.notes += [note] if note else []

    def timing(self, name: str) -> MemberTiming:
        timing = MemberTiming(name, self.status, len(self.rows))
        timing.seconds = round(self.seconds, 2)
        timing.note = "; ".join(self.notes)
        if self.predictions:
            is_read = np.stack([_is_known(each.probs) for each in self.predictions])
            is_twice = [each.n_readings == 2 for each in self.predictions]
            is_cut = [each.is_cut for each in self.predictions]
            timing.status = "complete" if is_read.all() and not self.notes else "partial"
            timing.n_reached = int(is_read.any(axis=0).sum())
            timing.n_twice = int(np.all(is_twice, axis=0).sum())
            timing.n_cut = int(np.any(is_cut, axis=0).sum())
        return timing


def _is_known(probs: np.ndarray) -> np.ndarray:
    return np.isfinite(probs).all(axis=-1)


class _State:
    """What all members have predicted so far, and the file that holds their blend."""

    def __init__(self, pairs: pd.DataFrame, blend: Blend, submission: Submission | None) -> None:
        self._pairs, self._blend, self._submission = pairs, blend, submission
        weights = zip(blend.members, blend.weights, strict=True)
        self.members = {name: _Member(weight, np.arange(len(pairs))) for name, weight in weights}

    def run(self, member: _Member, predict: Predict) -> None:
        """Let one model of a member predict, and write the submission; an error is noted."""
        complete = list(member.predictions)

        def keep(*early: Prediction) -> None:
            member.predictions = [*complete, *early]
            if self._submission and (self.is_reached.any() or not len(self._pairs)):
                self._submission.write(self.blend())

        start = time.monotonic()
        try:
            prediction = predict(self._pairs.iloc[member.rows], member, keep)
            complete.append(prediction)
            member.notes += [prediction.note] if prediction.note else []
            keep()
        except Exception as error:  # whatever a damaged model does, the others must still submit
            traceback.print_exc()
            member.predictions = complete
            member.give_up("failed", f"{type(error).__name__}: {error}")
        member.seconds += time.monotonic() - start

    def choose_battles(self, member: _Member, cascade: float, is_first: bool) -> None:
        """Choose what a network reads, the same for each of its models."""
        # A battle that nobody has read is the least certain.
        uncertainty = np.full(len(self._pairs), np.log(len(LABELS)))
        uncertainty[self.is_reached] = measure_entropy(self.blend()[self.is_reached])
        reads_all = is_first or cascade == 1 or not self.is_reached.all()
        member.rows = choose_least_certain(uncertainty, 1.0 if reads_all else cascade)
        member.uncertainty = uncertainty[member.rows]
        member.twice_share = cascade if reads_all else 1.0

    def swap_gaps(self) -> dict[str, np.ndarray]:
        """Network -> (N,), the mean over its models, NaN where one has not read twice."""
        gaps = {}
        for name, member in self.members.items():
            found = [each.swap_gap for each in member.predictions if each.swap_gap is not None]
            if found:
                gaps[name] = np.full(len(self._pairs), np.nan)
                gaps[name][member.rows] = np.mean(found, axis=0)
        return gaps

    def known(self) -> dict[str, np.ndarray]:
        """Member -> (N, C), the mean over its models, NaN where none has read."""
        known = {}
        for name, member in self.members.items():
            if member.predictions:
                stacked = np.stack([each.probs for each in member.predictions])
                n_read = _is_known(stacked).sum(axis=0)
                known[name] = np.full((len(self._pairs), len(LABELS)), np.nan)
                with np.errstate(invalid="ignore"):
                    known[name][member.rows] = np.nansum(stacked, axis=0) / n_read[:, None]
        return known

    @property
    def is_reached(self) -> np.ndarray:
        """(N,) bool, some member has predicted the battle."""
        nobody = np.zeros(len(self._pairs), dtype=bool)
        return np.any([nobody, *map(_is_known, self.known().values())], axis=0)

    def blend(self) -> np.ndarray:
        """(N, C) float64; a battle that no member reached gets the symmetric mean of the others."""
        reached = self.is_reached
        probs = np.empty((len(self._pairs), len(LABELS)))
        if reached.any():
            known = {name: member[reached] for name, member in self.known().items()}
            probs[reached] = apply_blend(self._blend, known)
            a, b, tie = probs[reached].mean(axis=0)
            probs[~reached] = ((a + b) / 2, (a + b) / 2, tie)
        return probs

    def count_members(self) -> dict[str, int]:
        """Count the battles by the members that predicted them, most frequent first."""
        kinds = np.full(len(self._pairs), "", dtype=object)
        for name, probs in self.known().items():
            kinds[_is_known(probs)] += f" + {name}"
        counts = Counter(kind.removeprefix(" + ") or "mean of the others" for kind in kinds)
        return dict(counts.most_common())


def _predict_baseline(
    models: Models, run: Path, pairs: pd.DataFrame, member: _Member, keep: Keep
) -> Prediction:
    probs = models.load_baseline(run).predict_probs(pairs)
    return Prediction(probs, np.full(len(pairs), 2), np.zeros(len(pairs), dtype=bool))


def _predict_network(
    models: Models, folder: Path, deadline: float, pairs: pd.DataFrame, member: _Member, keep: Keep
) -> Prediction:
    with models.open_network(folder, deadline) as (reader, tokenizer, config):
        return predict_pairs(
            reader,
            tokenizer,
            pairs,
            max_tokens=config.predict_tokens,
            tokens_per_batch=config.tokens_per_batch,
            deadline=deadline,
            progress="" if models.n_workers == 0 else f"{folder.parents[1].name} {folder.name}",
            keep=keep,
            uncertainty=member.uncertainty,
            twice_share=member.twice_share,
        )


def list_left_out(outcome: Outcome) -> list[dict[str, str]]:
    """List the members that the submission lacks though the blend gives them weight, and why."""
    return [
        {"member": timing.member, "status": timing.status, "note": timing.note}
        for timing in outcome.timings
        if timing.n_asked and not timing.n_reached and timing.status != "zero weight"
    ]


def describe_left_out(outcome: Outcome) -> str:
    """Say in Markdown, in large letters, which members the submission lacks; empty if none."""
    lines = []
    for left in list_left_out(outcome):
        note = html.escape(left["note"]).replace("`", "'") or "no reason is known"
        lines.append(f"# Left out: {left['member']} ({left['status']})\n\n{note}")
    return "\n\n".join(lines)


def describe_timing(outcome: Outcome, *, n_pairs: int, seconds: float, deadline_s: float) -> dict:
    """Describe a submission for `timing.json`: totals, members of each battle, versions."""
    return {
        "n_pairs": n_pairs,
        "seconds": round(seconds, 2),
        "deadline_s": deadline_s,
        "n_pairs_by_members": outcome.n_pairs_by_members,
        "members": [asdict(timing) for timing in outcome.timings],
        "left_out": list_left_out(outcome),
        "versions": measure_versions(),
    }
