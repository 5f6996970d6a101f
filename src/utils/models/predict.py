"""The only gradient-free walk over batches: battles to probabilities, under a clock.

Validation, the submission and the audit all pass through here, so that what is
scored at home is what runs on Kaggle. What reads the batches is a `Reader`: a model
in this process, or one in other processes.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from src.utils.models.batches import collate, is_canonical, make_batches
from src.utils.models.checkpoints import hidden_size, in_float32
from src.utils.models.hardware import choose_dtype
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.models.template import count_tokens, encode_both_orders
from src.utils.schema import LABELS, average_over_swap, swap_probs
from src.utils.stats.scores import bootstrap_interval, row_losses

MIN_TOKENS = 256  # a battle is never cut below this for lack of time
_N_MEASURED = 3  # batches before the pace is trusted; the first one warms the hardware up
_WINDOW = 16  # batches that the pace is measured over
_FILL = 0.97  # share of the time left that a new plan fills
_KEEP_S = 60.0


@dataclass(frozen=True)
class Prediction:
    """What a model says of N battles, and how well it read each.

    Args:
        probs: (N, C) float64, rows sum to 1; NaN where a battle was not reached, or its
            logits were not finite even in 32 bit.
        n_readings: (N,) int, 2 in both orders, 1 in one, 0 not at all.
        is_cut: (N,) bool, read with fewer tokens than asked, because time was short.
        note: what went wrong on the way, or "".
        swap_gap: (N,) float, mean change of a battle's probabilities when its answers are
            exchanged, before averaging; NaN where it was read in one order alone.
    """

    probs: np.ndarray
    n_readings: np.ndarray
    is_cut: np.ndarray
    note: str = ""
    swap_gap: np.ndarray | None = None


Rows = Sequence[np.ndarray]  # token ids of each battle


class ReaderLost(Exception):
    """Nobody is left who could read; what was read before is kept."""


class Reader(Protocol):
    """What turns token rows into probabilities, one or several batches at a time."""

    capacity: int  # batches that may be under way at once

    def send(self, key: int, rows: Rows) -> None:
        """Start to read a batch."""

    def receive(self, deadline: float) -> tuple[int, np.ndarray] | None:
        """Wait for a batch: its key and (rows, C) float64; None when the deadline passes first."""


class LocalReader:
    """A model in this process, one batch at a time; a `Reader`.

    Args:
        model: a sequence classifier.
        pad_id: token of the padding.
        packing: reads a batch as one row without padding, where `packing.can_pack` knows the model.
    """

    capacity = 1

    def __init__(self, model: nn.Module, pad_id: int, *, packing: bool = True) -> None:
        self.model, self.pad_id = model, pad_id
        self.is_packed = packing and can_pack(model)
        if self.is_packed:
            enable_packing(model)
        self._done: deque[tuple[int, np.ndarray]] = deque()

    def send(self, key: int, rows: Rows) -> None:
        """Read a batch at once."""
        self._done.append((key, self.read(rows)))

    def receive(self, deadline: float) -> tuple[int, np.ndarray]:
        """Hand back the batch that was read."""
        return self._done.popleft()

    def read(self, rows: Rows) -> np.ndarray:
        """Probabilities of each row, (rows, C) float64.

        A batch that memory does not hold is halved until it does. NaN where one row alone
        is too long, or where logits are not finite even in 32 bit.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            return self._read(rows)
        finally:
            self.model.train(was_training)

    def _read(self, rows: Rows) -> np.ndarray:
        try:
            return self._predict(rows)
        except torch.OutOfMemoryError:
            pass  # tried again below, where the failed pass no longer holds its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            return np.full((1, len(LABELS)), np.nan)
        half = len(rows) // 2
        return np.concatenate([self._read(rows[:half]), self._read(rows[half:])])

    @torch.no_grad()
    def _predict(self, rows: Rows) -> np.ndarray:
        logits = self._logits(rows, choose_dtype(_device(self.model), hidden_size(self.model)))
        lost = ~torch.isfinite(logits).all(dim=1)
        if lost.any():
            with in_float32(self.model):
                again = [
                    self._logits([row], torch.float32)
                    for row, is_lost in zip(rows, lost, strict=True)
                    if is_lost
                ]
            logits[lost] = torch.cat(again)
        logits[~torch.isfinite(logits).all(dim=1)] = torch.nan
        return torch.softmax(logits, dim=1).numpy()

    def _logits(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        device = _device(self.model)
        batch = collate_packed(rows) if self.is_packed else collate(rows, self.pad_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(**batch).logits.double().cpu()


class SteadyReader(LocalReader):
    """One pass a batch, whatever comes: where weights are parted, every process must make the same passes."""

    @torch.no_grad()
    def _read(self, rows: Rows) -> np.ndarray:
        logits = self._logits(rows, choose_dtype(_device(self.model), hidden_size(self.model)))
        return torch.softmax(logits, dim=1).numpy()


def predict_probs(
    model: nn.Module,
    tokenizer,
    pairs: pd.DataFrame,
    *,
    max_tokens: int,
    tokens_per_batch: int,
    swap: bool = True,
    deadline: float | None = None,
    progress: str = "",
) -> np.ndarray:
    """Predict how each battle is voted, with a model in this process.

    Args:
        model: a sequence classifier, logits in `LABELS` order; its mode is restored.
        tokenizer: and the other arguments: as for `predict_pairs`.

    Returns:
        `Prediction.probs`: (N, C) float64, rows sum to 1. They depend on no other row of `pairs`.
    """
    return predict_pairs(
        LocalReader(model, tokenizer.pad_token_id),
        tokenizer,
        pairs,
        max_tokens=max_tokens,
        tokens_per_batch=tokens_per_batch,
        swap=swap,
        deadline=deadline,
        progress=progress,
    ).probs


def predict_pairs(
    reader: Reader,
    tokenizer,
    pairs: pd.DataFrame,
    *,
    max_tokens: int,
    tokens_per_batch: int,
    swap: bool = True,
    deadline: float | None = None,
    progress: str = "",
    keep: Callable[[Prediction], None] | None = None,
    uncertainty: np.ndarray | None = None,
    twice_share: float = 1.0,
) -> Prediction:
    """Predict how each battle is voted, as well as time allows.

    With `swap` every battle is read twice. The first reading puts the answers in
    canonical order (that of their text), the second exchanges them, and the two are
    averaged. The pace is measured over the first batches and all along. When the
    projected finish passes the deadline, this is given up, in this order:

    1. second readings, of the battles that the first left most certain. A battle read once
       is still symmetric (exchanging A and B gives the model the same input and exchanges
       the columns) but carries position bias;
    2. length: the battles not yet read are cut until all of them fit, to `MIN_TOKENS` at least;
    3. battles, most certain first (by `uncertainty`; else longest first), where even that is
       too slow. Theirs is the answer of another member.

    Which battles are read goes by certainty; how they are batched, by length. What was put
    off is taken up again where time is left after all.

    Args:
        reader: of the model.
        tokenizer: its tokenizer.
        pairs: N battles; only the texts are read.
        max_tokens: budget of one battle.
        tokens_per_batch: padded tokens of one forward pass.
        swap: average over both orders; False reads each battle once, as given.
        deadline: `time.monotonic()` value, s, that must not be passed; None never stops.
        progress: title of a progress bar with the time left; "" shows none.
        keep: gets what is known so far, about once a minute.
        uncertainty: (N,) float, how little is known of each battle, e.g. `measure_entropy` of
            what other members say; any order of magnitude.
        twice_share: share of the battles, 0 to 1, that get a second reading: the least certain ones.
    """
    if not len(pairs):
        return Prediction(
            np.zeros((0, len(LABELS))), np.zeros(0, dtype=int), np.zeros(0, dtype=bool)
        )
    readings = _Readings(pairs, tokenizer, max_tokens, swap, uncertainty, twice_share)
    n_tok = sum(readings.lengths(order).sum() for order in readings.orders)
    with tqdm(
        total=n_tok,
        desc=progress,
        unit="tok",
        unit_scale=True,
        disable=not progress,
        file=sys.stdout,
    ) as bar:
        walk = _Walk(
            reader,
            readings,
            tokens_per_batch,
            float("inf") if deadline is None else deadline,
            bar,
            keep,
        )
        try:
            for order in readings.orders:
                walk.read(order)
        except ReaderLost as error:
            return readings.result(str(error))
    return readings.result()


def measure_entropy(probs: np.ndarray) -> np.ndarray:
    """How uncertain (N, C) probabilities are: (N,) float, nats; -inf where they are not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(probs == 0, 0.0, probs * np.log(probs)).sum(axis=1)
    return np.where(np.isfinite(entropy), entropy, -np.inf)


def choose_least_certain(uncertainty: np.ndarray, share: float) -> np.ndarray:
    """The rows of the least certain share, at least one where any is asked for: indices, ascending."""
    n_chosen = int(np.ceil(share * len(uncertainty)))
    return np.sort(np.argsort(-uncertainty, kind="stable")[:n_chosen])


class _Readings:
    """The token rows of N battles in one or both orders, and what was read of them."""

    def __init__(
        self,
        pairs: pd.DataFrame,
        tokenizer,
        max_tokens: int,
        swap: bool,
        uncertainty: np.ndarray | None,
        twice_share: float,
    ) -> None:
        self._uncertainty, self._twice_share = uncertainty, twice_share
        self._pairs, self._tokenizer, self._width = pairs, tokenizer, max_tokens
        self._keeps = is_canonical(pairs) if swap else np.ones(len(pairs), dtype=bool)
        self.orders = (0, 1) if swap else (0,)
        self.rows: tuple[list, list] = ([None] * len(pairs), [None] * len(pairs))
        self.probs = tuple(np.full((len(pairs), len(LABELS)), np.nan) for _ in range(2))
        self.is_cut = np.zeros(len(pairs), dtype=bool)
        self._encode(np.arange(len(pairs)), max_tokens)
        # Two answers that read the same need no second reading to be made symmetric.
        self._same = (
            np.array([np.array_equal(a, b) for a, b in zip(*self.rows, strict=True)]) & swap
        )

    def _encode(self, rows: np.ndarray, max_tokens: int) -> None:
        given, swapped = encode_both_orders(self._pairs.iloc[rows], self._tokenizer, max_tokens)
        for row, a, b in zip(rows, given, swapped, strict=True):
            both = (
                np.asarray(a, dtype=np.int32),
                np.asarray(b, dtype=np.int32),
            )  # a list takes eight times as much
            self.rows[0][row], self.rows[1][row] = both if self._keeps[row] else both[::-1]

    def lengths(self, order: int) -> np.ndarray:
        return np.array([len(row) for row in self.rows[order]])

    def wanted(self, order: int) -> np.ndarray:
        """Battles to read in this order."""
        if not order:
            return np.arange(len(self._same))
        chosen = choose_least_certain(self.uncertainty(order), self._twice_share)
        return chosen[~self._same[chosen]]

    def uncertainty(self, order: int) -> np.ndarray:
        """(N,) float; by the first reading once it is there, and by shortness where nothing is known."""
        if order:
            return measure_entropy(self.probs[0])
        return -self.lengths(0) if self._uncertainty is None else self._uncertainty

    def cut(self, rows: np.ndarray, n_tok: float, tokens_per_batch: int) -> bool:
        """Cut these battles so that together they have `n_tok` padded tokens; False when nothing is left to cut."""
        lengths = self.lengths(0)[rows]
        width = min(self._width, int(lengths.max()))
        if width <= MIN_TOKENS:
            return False
        while (
            width > MIN_TOKENS
            and _count_padded(np.minimum(lengths, width), tokens_per_batch) > n_tok
        ):
            width = max(MIN_TOKENS, int(width * 0.9))
        if width >= lengths.max():
            return False
        long = rows[lengths > width]
        self._encode(long, width)
        self.is_cut[long] = True
        self._width = width
        return True

    def result(self, note: str = "") -> Prediction:
        first, second = self.probs[0].copy(), self.probs[1].copy()
        second[self._same] = first[self._same]
        n_readings = np.isfinite(first).all(axis=1).astype(int) + np.isfinite(second).all(axis=1)
        probs = _average_where_read(first, second)
        return Prediction(
            np.where(self._keeps[:, None], probs, swap_probs(probs)),
            n_readings,
            self.is_cut & (n_readings > 0),
            note,
            np.abs(first - swap_probs(second)).mean(axis=1),
        )


def _count_padded(lengths: np.ndarray, tokens_per_batch: int) -> int:
    return sum(
        len(batch) * int(lengths[batch].max()) for batch in make_batches(lengths, tokens_per_batch)
    )


def _average_where_read(probs: np.ndarray, probs_swapped: np.ndarray) -> np.ndarray:
    averaged = probs.copy()
    twice = np.isfinite(probs).all(axis=1) & np.isfinite(probs_swapped).all(axis=1)
    averaged[twice] = average_over_swap(probs[twice], probs_swapped[twice])
    only_second = ~np.isfinite(probs).all(axis=1) & np.isfinite(probs_swapped).all(axis=1)
    averaged[only_second] = swap_probs(probs_swapped[only_second])
    return averaged


class _Pace:
    """Tokens per second over the last batches."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)], maxlen=_WINDOW)
        self.n_batches = 0

    def add(self, n_tok: float) -> None:
        self._marks.append((time.monotonic(), self._marks[-1][1] + n_tok))
        self.n_batches += 1
        if self.n_batches == _N_MEASURED:
            self._marks.popleft()

    @property
    def seconds_per_tok(self) -> float:
        (start, n_start), (end, n_end) = self._marks[0], self._marks[-1]
        return (end - start) / (n_end - n_start) if n_end > n_start else 0.0


class _Walk:
    """A reader over many batches: what it reads next, by the pace that it keeps."""

    def __init__(
        self,
        reader: Reader,
        readings: _Readings,
        tokens_per_batch: int,
        deadline: float,
        bar: tqdm,
        keep: Callable[[Prediction], None] | None,
    ) -> None:
        self._reader, self._readings, self._tokens_per_batch = reader, readings, tokens_per_batch
        self._deadline, self._bar, self._keep = deadline, bar, keep
        self._pace, self._kept_at = _Pace(), time.monotonic()
        self._batches: deque[np.ndarray] = deque()
        self._put_off = np.zeros(0, dtype=int)  # battles that there is no time for, as it looks
        self._under_way: dict[int, np.ndarray] = {}
        self._key = 0

    def read(self, order: int) -> None:
        """Read every battle in this order, as far as time goes."""
        self._plan(order, self._readings.wanted(order))
        while True:
            while (
                len(self._under_way) < self._reader.capacity
                and (batch := self._choose(order)) is not None
            ):
                self._key += 1
                self._under_way[self._key] = batch
                self._reader.send(self._key, [self._readings.rows[order][row] for row in batch])
            if not self._under_way or not self._receive(order):
                return

    def _plan(self, order: int, rows: np.ndarray) -> None:
        """Plan to read these rows, by length; what was put off before is forgotten."""
        self._lengths = self._readings.lengths(order)
        self._put_off = np.zeros(0, dtype=int)
        batches = make_batches(self._lengths[rows], self._tokens_per_batch)
        self._batches = deque(rows[batch] for batch in batches)
        self._left_tok = float(sum(map(self._padded, self._batches)))

    def _choose(self, order: int) -> np.ndarray | None:
        """The next batch of those that are planned, longest first; None when no other can be read in time."""
        is_late = self._projected(self._left_tok) > self._deadline
        if is_late and self._pace.n_batches < _N_MEASURED and self._batches:
            return self._take(-1)  # the shortest, until the pace is known
        if is_late and order == 0 and self._cut():
            return self._choose(order)
        if is_late or not self._batches:
            self._put_off_the_most_certain(order)
        return self._take(0) if self._batches else None

    def _take(self, place: int) -> np.ndarray | None:
        batch = self._batches[place]
        if self._projected(self._padded(batch)) > self._deadline:
            return None
        del self._batches[place]
        self._left_tok -= self._padded(batch)
        return batch

    def _put_off_the_most_certain(self, order: int) -> None:
        """Plan the least certain of the battles not yet read, as many as there is time for."""
        rows = self._unread()
        rows = rows[np.argsort(-self._readings.uncertainty(order)[rows], kind="stable")]
        chosen = self._fit(rows)
        self._plan(order, rows[chosen])
        self._put_off = rows[~chosen]

    def _fit(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) bool, the first that can be read in time; a row that alone takes too long is passed over."""
        affordable_tok = self._affordable_tok()
        chosen = self._lengths[rows] <= affordable_tok
        # A little is left free, so that not every batch that is a little slow changes the plan.
        limit_tok = _FILL * affordable_tok
        while chosen.any():
            limit_tok = max(limit_tok, self._lengths[rows[np.argmax(chosen)]])
            chosen &= np.cumsum(self._lengths[rows] * chosen) <= limit_tok
            if _count_padded(self._lengths[rows[chosen]], self._tokens_per_batch) <= affordable_tok:
                break
            limit_tok *= _FILL
        return chosen

    def _unread(self) -> np.ndarray:
        return np.concatenate([*self._batches, self._put_off])

    def _affordable_tok(self) -> float:
        pace = self._pace.seconds_per_tok
        left_s = self._deadline - time.monotonic()
        return (
            left_s / pace - sum(map(self._padded, self._under_way.values()))
            if pace
            else float("inf")
        )

    def _cut(self) -> bool:
        rows = self._unread()
        is_cut = self._readings.cut(rows, self._affordable_tok(), self._tokens_per_batch)
        if is_cut:
            self._plan(0, rows)
        return is_cut

    def _receive(self, order: int) -> bool:
        received = self._reader.receive(self._deadline)
        if received is None:
            self._under_way.clear()
            return False
        key, probs = received
        batch = self._under_way.pop(key)
        self._pace.add(self._padded(batch))
        self._readings.probs[order][batch] = probs
        self._bar.update(int(self._lengths[batch].sum()))
        if self._keep and time.monotonic() - self._kept_at > _KEEP_S:
            self._keep(self._readings.result())
            self._kept_at = time.monotonic()
        return True

    def _projected(self, n_tok: float) -> float:
        under_way_tok = sum(map(self._padded, self._under_way.values()))
        return time.monotonic() + (under_way_tok + n_tok) * self._pace.seconds_per_tok

    def _padded(self, batch: np.ndarray) -> int:
        return len(batch) * int(self._lengths[batch].max())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


BUDGETS = (128, 256, 512, 1024, 2048, 3072, 4096)
BUDGET_COLUMNS = ("budget", "cut_share", "log_loss", "cost", "low", "high")


def measure_budgets(
    model: nn.Module,
    tokenizer,
    pairs: pd.DataFrame,
    *,
    max_tokens: int,
    tokens_per_batch: int,
    budgets: Sequence[int] = BUDGETS,
    n_pairs: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Let a trained model read held-out battles at smaller budgets, and score it at each.

    A battle is read again only at the budgets that cut it further.

    Args:
        model: and `tokenizer`: from `load_finetuned`.
        pairs: battles that it has not seen, with label and group.
        max_tokens: budget that the model predicts with, against which the cost is counted.
        tokens_per_batch: padded tokens of one forward pass at most.
        budgets: tokens of one battle; above `max_tokens` only the share that is cut is told.
        n_pairs: battles at most, drawn at random.
        seed: of the draw.

    Returns:
        One row a budget, `max_tokens` among them: cut_share, log_loss in nats per battle, cost (log loss
        above that at `max_tokens`) with its 95 % interval low to high. NaN above `max_tokens`.
    """
    pairs = pairs.sample(min(n_pairs, len(pairs)), random_state=seed).reset_index(drop=True)
    n_tok, labels = count_tokens(pairs, tokenizer), pairs["label"].to_numpy()
    budgets = sorted({*budgets, max_tokens})
    table = pd.DataFrame(
        {"budget": budgets, "cut_share": [float((n_tok > budget).mean()) for budget in budgets]}
    )
    options = {"tokens_per_batch": tokens_per_batch, "swap": True}
    whole = row_losses(
        predict_probs(model, tokenizer, pairs, max_tokens=max_tokens, **options), labels
    )
    for row, budget in enumerate(budgets[: budgets.index(max_tokens) + 1]):
        losses, is_cut = whole.copy(), n_tok > budget
        if budget < max_tokens and is_cut.any():
            probs = predict_probs(model, tokenizer, pairs[is_cut], max_tokens=budget, **options)
            losses[is_cut] = row_losses(probs, labels[is_cut])
        low, high = bootstrap_interval(losses - whole, pairs["group"].to_numpy(), seed=seed)
        table.loc[row, ["log_loss", "cost", "low", "high"]] = (
            losses.mean(),
            (losses - whole).mean(),
            low,
            high,
        )
    return table[list(BUDGET_COLUMNS)].astype({"budget": np.int64})
