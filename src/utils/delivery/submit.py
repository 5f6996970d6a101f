"""Test battles to a submission that is valid from the first minute on.

The CPU baseline answers for every battle before any neural network is loaded, and
`submission.csv` is written at once. Each network replaces it by a better one (written
whole, then renamed), in the order of worth per second. A network that fails or runs
out of time costs quality, never rows. Each runs in processes of its own, one a GPU.
"""

import contextlib
import multiprocessing
import os
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from src.utils.config import FinetuneConfig
from src.utils.models.baseline import load_baseline
from src.utils.models.checkpoints import TINY, check_base, load_finetuned, load_tokenizer
from src.utils.models.hardware import choose_device
from src.utils.models.predict import (
    LocalReader,
    Prediction,
    Reader,
    ReaderLost,
    Rows,
    choose_least_certain,
    measure_entropy,
    predict_pairs,
)
from src.utils.runs import measure_versions, read_json, write_table
from src.utils.schema import LABELS, check_probs
from src.utils.stats.blend import Blend, apply_blend

_STARTED, _READY, _FAILED = "started", "ready", "failed"
_LEAVE_S = 3.0

# Name of a checkpoint -> folders of that name, the best match first: `paths.find_checkpoints`.
FindCheckpoints = Callable[[str], Sequence[Path]]


@dataclass(frozen=True)
class MemberTiming:
    """What one member of the blend did for the submission."""

    member: str
    status: (
        str  # "whole", "partly" (time ran out), "given up", "failed", "absent" or "without weight"
    )
    n_asked: int  # battles that it was to predict: all, or the least certain share
    n_reached: int  # battles that it predicted
    seconds: float
    note: str = ""
    n_twice: int = 0  # battles that every model of it read in both orders
    n_cut: int = 0  # battles that were read shorter than trained, because time was short


@dataclass(frozen=True)
class Outcome:
    """The submission's probabilities, and how they came about.

    Args:
        probs: (N, C) float64, rows sum to 1.
        timings: one a member of the blend.
        n_pairs_by_members: "member + member" -> battles that got exactly these members.
    """

    probs: np.ndarray
    timings: list[MemberTiming]
    n_pairs_by_members: dict[str, int]


class Submission:
    """The file `submission.csv`, upgraded as better probabilities arrive.

    Args:
        path: of the file.
        ids: (N,) ids of the test battles.
        sample_ids: (M,) ids that the competition expects, in its order.
    """

    def __init__(self, path: Path, ids: np.ndarray, sample_ids: np.ndarray) -> None:
        self.path, self._ids, self._sample_ids = path, ids, sample_ids

    def write(self, probs: np.ndarray) -> Path:
        """Write (N, C) probabilities, read them back, and check them as the competition would."""
        write_table(self.path, make_submission(self._ids, probs, self._sample_ids))
        check_submission(pd.read_csv(self.path, dtype={"id": str}), self._sample_ids)
        return self.path


def _find_none(name: str) -> Sequence[Path]:
    return ()


# ---- the plan ----------------------------------------------------------------


def predict_submission(
    pairs: pd.DataFrame,
    runs: Mapping[str, Path | None],
    blend: Blend,
    submission: Submission,
    *,
    deadline_s: float,
    cascade: float = 1.0,
    find_checkpoints: FindCheckpoints = _find_none,
    n_workers: int | None = None,
) -> Outcome:
    """Predict every battle as well as time allows: the CPU baseline, then network by network.

    What is worth most per second runs first: a network by its weight in the blend over the
    size of its weights, the second fold of a network at half the worth, and so on. So what
    is given up first, when time is short, is the networks worth least per second; then, of
    the one under way, what `predict_pairs` states: second readings, then length, then the
    battles that are most certain by what was written before. A battle is never given up: it
    keeps what was written before.

    With `cascade` below 1 the costly work goes to the least certain battles from the start:
    the first network reads every battle once and that share of them twice; the other
    networks, or the only one there is, read that share alone.

    Args:
        pairs: N test battles, `schema.PAIR_COLUMNS`.
        runs: member name -> its finished run folder, or None where there is none.
        blend: weights of the members; those that are missing are left out, row by row.
        submission: written after the CPU baseline, after each network, and each minute in between.
        deadline_s: seconds from now that must not be passed; it holds the margin.
        cascade: share of the battles, above 0 to 1, least certain first by the entropy of what is
            known so far, that the costly work is spent on.
        find_checkpoints: finds the attached bases of adapters by name.
        n_workers: processes of a network; None takes one a GPU, or one on the CPU.

    Raises:
        ValueError: `cascade` is no such share.
        RuntimeError: not one member could predict a battle, so there is nothing to submit.
    """
    if not 0 < cascade <= 1:
        raise ValueError(f"cascade: expected a share above 0, at most 1, got {cascade}")
    deadline = time.monotonic() + deadline_s
    board = _Board(pairs, blend, submission)
    for name in blend.members:
        if not _is_network(runs.get(name)):
            board.run_baseline(name, runs.get(name))
    networks = order_networks(runs, blend, find_checkpoints)
    weighty = {name for name, _ in networks if blend.weights[blend.members.index(name)]}
    cheap = networks[0][0] if len(weighty) > 1 else None
    for name, folder in networks:
        ask = board.ask(name, cascade, is_cheap=name == cheap)
        board.run_network(name, folder, ask, Means(deadline, n_workers, find_checkpoints))
    timings = [board.members[name].timing() for name in blend.members]
    if not board.is_reached.any() and len(pairs):
        notes = "; ".join(f"{timing.member}: {timing.note}" for timing in timings)
        raise RuntimeError(
            f"submission: expected at least one member of the blend to predict, got none ({notes})"
        )
    return Outcome(board.blend(), timings, board.count_members())


def order_networks(
    runs: Mapping[str, Path | None], blend: Blend, find_checkpoints: FindCheckpoints = _find_none
) -> list[tuple[str, Path]]:
    """Order the models of all networks by worth per second, most first.

    Returns:
        Member and folder of each model.
    """
    worth: dict[tuple[str, Path], float] = {}
    for name, weight in zip(blend.members, blend.weights, strict=True):
        run = runs.get(name)
        if not _is_network(run):
            continue
        found = [*(run / "model").glob("refit"), *sorted((run / "model").glob("fold_*"))]
        # Where none is there, the first is still asked for, and says that it is missing.
        for place, folder in enumerate(found or [run / "model" / "fold_0"]):
            worth[name, folder] = (
                weight / (place + 1) / max(_weights_mib(run, folder, find_checkpoints), 1e-6)
            )
    return sorted(worth, key=worth.get, reverse=True)


def _is_network(run: Path | None) -> bool:
    try:
        return run is not None and "checkpoint" in read_json(run / "config.json")
    except (OSError, ValueError):
        return False  # the attempt to load it tells what is damaged


def _weights_mib(run: Path, folder: Path, find_checkpoints: FindCheckpoints) -> float:
    """Size of the weights that a forward pass goes through; stands for its seconds before any is measured."""
    config = read_json(run / "config.json")
    checkpoint, folders = str(config["checkpoint"]), [folder]
    if config.get("lora_rank"):
        folders += (
            [run / "base"] if checkpoint.startswith(TINY) else [*find_checkpoints(checkpoint)]
        )
    return (
        sum(file.stat().st_size for place in folders[:2] for file in place.glob("*.safetensors"))
        / 2**20
    )


@dataclass(frozen=True)
class Ask:
    """Which battles a network is to read, and how well they are known."""

    rows: np.ndarray  # (M,) int, ascending
    uncertainty: np.ndarray  # (M,) float
    twice_share: float = 1.0  # of them, least certain first, in both orders


@dataclass(frozen=True)
class Means:
    """What a network has to read with."""

    deadline: float  # time.monotonic(), s
    n_workers: int | None = None
    find_checkpoints: FindCheckpoints = _find_none


@dataclass
class _Member:
    """What one member has predicted so far: the mean over its models, row by row."""

    name: str
    n_pairs: int
    ask: Ask | None = None  # None asks for every battle
    n_models: int = 0
    status: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._total, self._n_read = (
            np.zeros((self.n_pairs, len(LABELS))),
            np.zeros((self.n_pairs, 1)),
        )
        self._n_readings, self._is_cut = (
            np.zeros(self.n_pairs, dtype=int),
            np.zeros(self.n_pairs, dtype=bool),
        )

    def add(self, prediction: Prediction) -> None:
        self._total, self._n_read = self._sums_with(prediction)
        self._n_readings += prediction.n_readings
        self._is_cut |= prediction.is_cut
        self.n_models += 1
        if prediction.note:
            self.notes.append(prediction.note)

    def _sums_with(self, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
        reached = np.isfinite(prediction.probs).all(axis=1, keepdims=True)
        return self._total + np.where(reached, prediction.probs, 0), self._n_read + reached

    def probs(self, prediction: Prediction | None = None) -> np.ndarray:
        """(N, C), NaN where none has read; with `prediction` as if it were whole."""
        total, n_read = self._sums_with(prediction) if prediction else (self._total, self._n_read)
        with np.errstate(invalid="ignore"):
            return total / n_read

    def timing(self) -> MemberTiming:
        asked = slice(None) if self.ask is None else self.ask.rows
        n_asked = len(self._n_read[asked])
        n_reached = int((self._n_read > 0).sum())
        read_by_all = self.n_models > 0 and bool((self._n_read[asked] >= self.n_models).all())
        status = self.status or ("whole" if read_by_all and not self.notes else "partly")
        n_twice = int((self._n_readings >= 2 * max(self.n_models, 1)).sum())
        note = "; ".join(self.notes)
        return MemberTiming(
            self.name,
            status,
            n_asked,
            n_reached,
            round(self.seconds, 2),
            note,
            n_twice,
            int(self._is_cut.sum()),
        )


class _Board:
    """What all members say so far, and the file that says it to the competition."""

    def __init__(self, pairs: pd.DataFrame, blend: Blend, submission: Submission) -> None:
        self._pairs, self._blend, self._submission = pairs, blend, submission
        self.members = {name: _Member(name, len(pairs)) for name in blend.members}

    def run_baseline(self, name: str, run: Path | None) -> None:
        member = self.members[name]
        if run is None:
            member.status = "absent"
            member.notes.append("no finished run; execute its notebook")
            return
        with self._surviving(member):
            probs = _predict_baseline(run, self._pairs)
            reached = np.isfinite(probs).all(axis=1)
            member.add(Prediction(probs, 2 * reached, np.zeros(len(probs), dtype=bool)))
            self.write()

    def ask(self, name: str, cascade: float, *, is_cheap: bool) -> Ask:
        """What a network is to read; the same for each of its models."""
        member = self.members[name]
        if member.ask is None:
            uncertainty = self._measure_uncertainty()
            reads_all = is_cheap or cascade == 1 or not self.is_reached.all()
            rows = choose_least_certain(uncertainty, 1.0 if reads_all else cascade)
            member.ask = Ask(rows, uncertainty[rows], cascade if reads_all else 1.0)
        return member.ask

    def _measure_uncertainty(self) -> np.ndarray:
        """(N,) nats; a battle that nobody has read is the least certain."""
        uncertainty = np.full(len(self._pairs), np.log(len(LABELS)))
        if len(self._pairs) and self.is_reached.any():
            uncertainty[self.is_reached] = measure_entropy(self.blend()[self.is_reached])
        return uncertainty

    def run_network(self, name: str, folder: Path, ask: Ask, means: Means) -> None:
        member = self.members[name]
        if not self._blend.weights[self._blend.members.index(name)] and self.is_reached.all():
            member.status = "without weight"
            return
        if time.monotonic() >= means.deadline:
            member.notes.append(f"{folder.name}: given up, no time was left")
            member.status = member.status or ("" if member.n_models else "given up")
            return
        with self._surviving(member):
            part = self._pairs.iloc[ask.rows]
            prediction = _predict_network(
                folder,
                part,
                ask,
                means,
                lambda early: self.write({name: member.probs(self._spread(early, ask.rows))}),
            )
            member.add(self._spread(prediction, ask.rows))
            self.write()

    def _spread(self, prediction: Prediction, rows: np.ndarray) -> Prediction:
        """A prediction of some battles as one of all."""
        n_pairs = len(self._pairs)
        probs, n_readings = np.full((n_pairs, len(LABELS)), np.nan), np.zeros(n_pairs, dtype=int)
        is_cut = np.zeros(n_pairs, dtype=bool)
        probs[rows], n_readings[rows], is_cut[rows] = (
            prediction.probs,
            prediction.n_readings,
            prediction.is_cut,
        )
        return Prediction(probs, n_readings, is_cut, prediction.note)

    @contextlib.contextmanager
    def _surviving(self, member: _Member) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except Exception as error:  # whatever a damaged model does, the others must still submit
            traceback.print_exc()
            member.notes.append(f"{type(error).__name__}: {error}")
            member.status = "" if member.n_models else "failed"
        else:
            member.status = ""
        finally:
            member.seconds += time.monotonic() - start

    def _known(self) -> dict[str, np.ndarray]:
        return {name: member.probs() for name, member in self.members.items() if member.n_models}

    @property
    def is_reached(self) -> np.ndarray:
        """(N,) bool, some member has predicted the battle."""
        known = [np.isfinite(probs).all(axis=1) for probs in self._known().values()]
        return np.any(known, axis=0) if known else np.zeros(len(self._pairs), dtype=bool)

    def blend(self, early: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """(N, C) float64. A battle that no member reached, for want of a CPU baseline, gets the mean of the others."""
        known = self._known() | dict(early or {})
        if not known:
            return np.zeros((0, len(LABELS)))
        reached = np.any([np.isfinite(probs).all(axis=1) for probs in known.values()], axis=0)
        probs = np.empty((len(self._pairs), len(LABELS)))
        probs[reached] = apply_blend(
            self._blend, {name: rows[reached] for name, rows in known.items()}
        )
        if not reached.all():
            a, b, tie = probs[reached].mean(axis=0)
            probs[~reached] = ((a + b) / 2, (a + b) / 2, tie)
        return probs

    def write(self, early: Mapping[str, np.ndarray] | None = None) -> None:
        known = self._known() | dict(early or {})
        if not len(self._pairs) or any(
            np.isfinite(probs).all(axis=1).any() for probs in known.values()
        ):
            self._submission.write(self.blend(early))

    def count_members(self) -> dict[str, int]:
        reached = {name: np.isfinite(probs).all(axis=1) for name, probs in self._known().items()}
        kinds = Counter(
            " + ".join(name for name in reached if reached[name][row]) or "mean of the others"
            for row in range(len(self._pairs))
        )
        return dict(kinds.most_common())


def _predict_baseline(run: Path, pairs: pd.DataFrame) -> np.ndarray:
    read_json(run / "config.json")
    return load_baseline(run / "model").predict_probs(pairs)


def _predict_network(
    folder: Path, pairs: pd.DataFrame, ask: Ask, means: Means, keep: Callable[[Prediction], None]
) -> Prediction:
    """Predict with one fold's model, in processes of its own where they can be had."""
    run = folder.parents[1]
    config = FinetuneConfig.from_json(read_json(run / "config.json"))
    tokenizer = load_tokenizer(folder)
    base = find_base(folder, config, means.find_checkpoints)
    with open_reader(
        folder, config, base, n_workers=means.n_workers, deadline=means.deadline
    ) as reader:
        return predict_pairs(
            reader,
            tokenizer,
            pairs,
            max_tokens=config.predict_tokens,
            tokens_per_batch=config.tokens_per_batch,
            deadline=means.deadline,
            progress=f"{run.name} {folder.name}",
            keep=keep,
            uncertainty=ask.uncertainty,
            twice_share=ask.twice_share,
        )


def find_base(
    folder: Path, config: FinetuneConfig, find_checkpoints: FindCheckpoints
) -> Path | None:
    """Find the attached base of an adapter: the one that it was trained on, by its weights.

    Returns:
        Its folder; None where none is needed or none is attached.

    Raises:
        ValueError: checkpoints of its name are attached, and all have other weights.
    """
    if not config.lora_rank or config.checkpoint.startswith(TINY):
        return None
    problems = []
    for base in find_checkpoints(config.checkpoint):
        try:
            return check_base(folder, base)
        except ValueError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return None


# ---- processes ----------------------------------------------------------------


class CannotStart(Exception):
    """Processes are not to be had here."""


@contextlib.contextmanager
def open_reader(
    folder: Path,
    config: FinetuneConfig,
    base: Path | None,
    *,
    n_workers: int | None = None,
    deadline: float,
) -> Iterator[Reader]:
    """Give a reader of one model: in processes of its own, or in this one where none can be started.

    Args:
        folder: of the fine-tuned model.
        config: settings that it was trained with.
        base: as for `models.load_finetuned`.
        n_workers: processes; None takes one for each GPU, or one on the CPU.
        deadline: `time.monotonic()` value by which the model must be loaded.

    Raises:
        RuntimeError: the model cannot be loaded.
    """
    try:
        pool = Pool(folder, config, base, _plan_workers(n_workers), deadline)
    except CannotStart as error:
        warnings.warn(
            f"{folder}: read in this process, as no other can be started ({error})", stacklevel=2
        )
        model, tokenizer = load_finetuned(folder, config, base)
        yield LocalReader(model, tokenizer.pad_token_id, packing=config.packing)
        return
    with pool:
        yield pool


def _plan_workers(n_workers: int | None) -> list[int | None]:
    """The GPU of each worker, None for the CPU."""
    n_gpus = torch.cuda.device_count() if choose_device().type == "cuda" else 0
    return [worker % n_gpus if n_gpus else None for worker in range(n_workers or max(n_gpus, 1))]


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    under_way: dict[int, Rows] = field(default_factory=dict)


class Pool:
    """One model, loaded in several processes that take batches from one queue; a `Reader`.

    A process that is free gets the next batch, so none waits for a slower one. The
    batches of a process that dies are read by the others.

    Args:
        folder: and `config`, `base`: as for `open_reader`.
        devices: GPU of each process, None for the CPU.
        deadline: by which the first must be ready.

    Raises:
        CannotStart: no process came to life.
        RuntimeError: none could load the model.
    """

    def __init__(
        self,
        folder: Path,
        config: FinetuneConfig,
        base: Path | None,
        devices: list[int | None],
        deadline: float,
    ) -> None:
        n_threads = max(1, (os.cpu_count() or 1) // len(devices)) if len(devices) > 1 else 0
        self._workers: list[_Worker] = []
        self._failures: list[str] = []
        self._orphans: deque[tuple[int, Rows]] = deque()
        try:
            for device in devices:
                self._workers.append(_start_worker(folder, config, base, device, n_threads))
            self._await_ready(deadline)
        except BaseException:
            self.close()
            raise
        # The second batch lies ready while the first is read.
        self.capacity = 2 * len(self._workers)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, which gives their memory back; one that does not leave by itself is killed."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(_LEAVE_S)
            worker.process.kill()
            worker.process.join()
        self._workers = []

    def _await_ready(self, deadline: float) -> None:
        waiting = list(self._workers)
        n_started = 0
        while waiting:
            ready = wait(
                [worker.connection for worker in waiting], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise RuntimeError("time ran out while the model was being loaded")
            for worker in [worker for worker in waiting if worker.connection in ready]:
                word = self._hear(worker)
                n_started += word is not None and word[0] == _STARTED
                if word is None or word[0] == _READY:
                    waiting.remove(worker)
        if not self._workers and n_started:
            raise RuntimeError("; ".join(self._failures))
        if not self._workers:
            raise CannotStart("; ".join(self._failures))

    def _hear(self, worker: _Worker) -> tuple | None:
        """The next word of a worker; None when it is lost, which leaves its batches to the others."""
        try:
            word = worker.connection.recv()
            if word[0] != _FAILED:
                return word
            failure = word[1]
        except (EOFError, OSError):
            worker.process.join(5)
            failure = f"a process ended with code {worker.process.exitcode}"
        self._drop(worker, failure)
        return None

    def _drop(self, worker: _Worker, failure: str) -> None:
        self._failures.append(failure)
        self._workers.remove(worker)
        self._orphans.extend(worker.under_way.items())
        worker.connection.close()
        worker.process.kill()
        worker.process.join()

    def send(self, key: int, rows: Rows) -> None:
        """Hand a batch to the process that has the least to do."""
        self._orphans.append((key, rows))
        self._send_orphans()

    def _send_orphans(self) -> None:
        while self._orphans:
            if not self._workers:
                raise ReaderLost("; ".join(self._failures))
            worker = min(self._workers, key=lambda worker: len(worker.under_way))
            key, rows = self._orphans.popleft()
            worker.under_way[key] = rows
            try:
                worker.connection.send((key, rows))
            except OSError:
                self._drop(worker, f"a process ended with code {worker.process.exitcode}")

    def receive(self, deadline: float) -> tuple[int, np.ndarray] | None:
        """Wait for a batch: its key and (rows, C) float64; None when the deadline passes first."""
        while True:
            left_s = max(0.0, min(deadline - time.monotonic(), 1e6))
            ready = wait([worker.connection for worker in self._workers], left_s)
            if not ready:
                return None
            worker = next(worker for worker in self._workers if worker.connection is ready[0])
            word = self._hear(worker)
            if word is not None:
                del worker.under_way[word[0]]
                return word
            self._send_orphans()


def _start_worker(
    folder: Path, config: FinetuneConfig, base: Path | None, device: int | None, n_threads: int
) -> _Worker:
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would share the state of CUDA and of threads
    here, there = context.Pipe()
    process = context.Process(
        target=_serve, args=(there, folder, config, base, device, n_threads), daemon=True
    )
    try:
        process.start()
    except (OSError, RuntimeError) as error:
        raise CannotStart(str(error)) from error
    there.close()
    return _Worker(process, here)


def _serve(
    connection: Connection,
    folder: Path,
    config: FinetuneConfig,
    base: Path | None,
    device: int | None,
    n_threads: int,
) -> None:
    """The life of a worker: load, then read what comes, until the other end is closed."""
    try:
        connection.send((_STARTED, None))
        if device is not None:
            torch.cuda.set_device(device)
        if n_threads:
            torch.set_num_threads(n_threads)
        model, tokenizer = load_finetuned(folder, config, base)
        reader = LocalReader(model, tokenizer.pad_token_id, packing=config.packing)
        connection.send((_READY, None))
        while True:
            key, rows = connection.recv()
            connection.send((key, reader.read(rows)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # told to the other end, which decides
        connection.send((_FAILED, f"{type(error).__name__}: {error}"))


def describe_timing(outcome: Outcome, *, n_pairs: int, seconds: float, deadline_s: float) -> dict:
    """What goes into `timing.json`: totals, what the battles got, one entry a member, and versions."""
    return {
        "n_pairs": n_pairs,
        "seconds": round(seconds, 2),
        "deadline_s": deadline_s,
        "n_pairs_by_members": outcome.n_pairs_by_members,
        "members": [asdict(timing) for timing in outcome.timings],
        "versions": measure_versions(),
    }


SUBMISSION_COLUMNS = ("id", *LABELS)


def make_submission(ids: np.ndarray, probs: np.ndarray, sample_ids: np.ndarray) -> pd.DataFrame:
    """Order predictions as the sample submission does, every id once.

    Args:
        ids: (N,) ids of the test rows; an id that repeats must repeat its probabilities,
            the first is taken.
        probs: (N, C) float, rows sum to 1, columns in `LABELS` order.
        sample_ids: (M,) ids that the competition expects, in its order.

    Returns:
        A table of M rows: id and one float64 column per label.

    Raises:
        ValueError: an expected id has no prediction, or a prediction is not asked for.
    """
    check_probs(probs, n_pairs=len(ids))
    table = pd.DataFrame({"id": ids}).drop_duplicates("id")
    table[list(LABELS)] = np.asarray(probs, dtype=np.float64)[table.index]
    expected = pd.Index(sample_ids)
    missing, extra = expected.difference(table["id"]), pd.Index(table["id"]).difference(expected)
    if len(missing) or len(extra):
        raise ValueError(
            f"submission: expected the sample's {len(expected)} ids; "
            f"{len(missing)} missing (first {missing[:3].tolist()}), {len(extra)} unasked (first {extra[:3].tolist()})"
        )
    return table.set_index("id").loc[expected].rename_axis("id").reset_index()


def check_submission(submission: pd.DataFrame, sample_ids: np.ndarray) -> pd.DataFrame:
    """Assert what the competition asserts, and hand the table back.

    Args:
        submission: as read back from `submission.csv`.
        sample_ids: (M,) ids of `sample_submission.csv`, in order.

    Raises:
        ValueError: other columns, other ids or order, or a row that is no probability.
    """
    if tuple(submission.columns) != SUBMISSION_COLUMNS:
        raise ValueError(
            f"submission: expected columns {list(SUBMISSION_COLUMNS)}, got {list(submission.columns)}"
        )
    if submission["id"].astype(str).tolist() != [str(value) for value in sample_ids]:
        raise ValueError(
            "submission: expected the ids of sample_submission in its order, got others"
        )
    if len(submission):
        check_probs(submission[list(LABELS)].to_numpy(dtype=np.float64), tolerance=1e-6)
    return submission
