"""The single inference loop: battles to probabilities, within a deadline.

Validation, the submission and publishing all use it, so what is scored at home is what
runs on Kaggle. A `Reader` runs the model, in this process or in others.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from src.utils.config import FinetuneConfig
from src.utils.models.batches import is_canonical, make_batches
from src.utils.models.checkpoints import hidden_size
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.reading import LocalReader, Reader, ReaderLost
from src.utils.models.template import Encoded, encode_battles
from src.utils.schema import LABELS, swap_pairs, swap_probs

MIN_TOKENS = 256  # a battle is never cut below this for lack of time
_N_WARMUP = 3  # batches before the pace is trusted; the first one also warms the hardware up
_WINDOW = 15  # batches that the pace is measured over
_FILL = 0.97  # share of the remaining time that a new plan fills
_KEEP_S = 60.0  # between two calls of `keep`
_TOKENS_ON = {"cuda": 16_384, "cpu": 4_096}  # of one forward pass, where a config leaves it open

# How far a probability may move when a battle is read beside others, or with merged weights: by
# the dtype of the products, or LLM.int8, which moved a tiny Qwen3's by 0.007. Estimates, not
# measured on a GPU.
PRECISION_TOLERANCE: dict[torch.dtype | str, float] = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
    "8bit": 5e-2,
}


@dataclass(frozen=True)
class Prediction:
    """Probabilities of N battles, and how well each battle was read.

    The probabilities of a battle depend on its texts, the token budget and in which orders it was
    read. Batches of other sizes move them by rounding, up to `tolerance`, as matrix products of
    another shape add up in another order. LLM.int8 keeps in 16 bit what is an outlier anywhere in
    the batch, so a battle's neighbours change its probabilities by design.
    """

    # (N, C) float64, rows sum to 1; NaN: not reached, or logits not finite even in 32 bit
    probs: np.ndarray
    n_readings: np.ndarray  # (N,) int, 2 in both orders, 1 in one, 0 not at all
    is_cut: np.ndarray  # (N,) bool, read with fewer tokens than asked for, as time was short
    note: str = ""  # what went wrong
    # (N,) float, mean change of the probabilities when the answers are exchanged, before
    # averaging; NaN where a battle was read in one order only
    swap_gap: np.ndarray | None = None
    # (N, C) float64, the first reading alone, with A and B as in the given battles; `swap` reads
    # a battle in canonical order first
    first_probs: np.ndarray | None = None


def reading_budget(tokens_per_batch: int, device: torch.device) -> int:
    """Choose the tokens of one forward pass where a config leaves them open (0)."""
    return tokens_per_batch or _TOKENS_ON[device.type]


def tolerance(config: FinetuneConfig, model: nn.Module) -> float:
    """Look up in `PRECISION_TOLERANCE` by how much this model's probabilities may move."""
    if config.quantization == "8bit":
        return PRECISION_TOLERANCE["8bit"]
    device = next(model.parameters()).device
    return PRECISION_TOLERANCE[choose_dtype(device, hidden_size(model))]


def predict_probs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, **options: Any
) -> np.ndarray:
    """Predict how each battle is voted, with a model in this process: `Prediction.probs`.

    `options` are those of `predict_pairs`, of which max_tokens and tokens_per_batch are needed.
    """
    reader = LocalReader(model, tokenizer.pad_token_id)
    return predict_pairs(reader, tokenizer, pairs, **options).probs


def predict_pairs(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pd.DataFrame,
    *,
    max_tokens: int,
    tokens_per_batch: int,
    swap: bool = True,
    deadline: float = math.inf,
    progress: str = "",
    keep: Callable[[Prediction], None] | None = None,
    uncertainty: np.ndarray | None = None,
    twice_share: float = 1.0,
) -> Prediction:
    """Predict how each battle is voted, as well as time allows.

    With `swap` every battle is read twice: first with the answers in canonical order (that
    of their text), then exchanged; the two readings are averaged. The pace is measured all
    along. When the projected finish passes the deadline, quality is given up in this order:

    1. second readings, of the battles that the first reading left most certain. A battle
       read once is still symmetric (exchanging A and B gives the model the same input and
       exchanges the columns) but carries position bias;
    2. length: the battles not yet read are cut until all of them fit, to `MIN_TOKENS` at least;
    3. battles, most certain first (by `uncertainty`; else longest first), where even that is
       too slow. Another member of the blend answers for them.
    What was given up is taken up again where time is left after all.

    Args:
        max_tokens: token budget of one battle.
        tokens_per_batch: padded tokens of one forward pass, at most; 0: see `reading_budget`.
        swap: False reads each battle once, as given.
        deadline: `time.monotonic()` value, s, that must not be passed.
        progress: title of a progress bar; "" shows none.
        keep: called with the prediction so far, about once a minute.
        uncertainty: (N,) float, e.g. `measure_entropy` of other members; only its order counts.
        twice_share: share of the battles, 0 to 1, that get a second reading: the least certain.
    """
    readings = _Readings(pairs, tokenizer, max_tokens, swap, uncertainty, twice_share)
    note = read_battles(
        reader, readings, tokens_per_batch, deadline=deadline, progress=progress, keep=keep
    )
    return readings.result(note)


def read_battles(
    reader: Reader,
    readings: Any,
    tokens_per_batch: int,
    *,
    deadline: float = math.inf,
    progress: str = "",
    keep: Callable[[Prediction], None] | None = None,
) -> str:
    """Read batch by batch what `readings` want; return what went wrong, or an empty text.

    Options are those of `predict_pairs`. `readings` have `orders`, in which battles are read one
    after the other; `lengths`, (N,) int, tokens of each battle, and `n_tok` of all that is to be
    read; and the methods `wanted`, `row` and `put` of `_Readings`, with a deadline or `keep` all.
    """
    tokens_per_batch = reading_budget(tokens_per_batch, choose_device())
    style: dict[str, Any] = {"unit": "tok", "unit_scale": True, "file": sys.stdout}
    with tqdm(total=readings.n_tok, desc=progress, disable=not progress, **style) as bar:
        loop = _Loop(reader, readings, tokens_per_batch, deadline, bar, keep)
        try:
            for order in readings.orders:
                loop.read(order)
        except ReaderLost as error:
            return str(error)
    return ""


def measure_entropy(probs: np.ndarray) -> np.ndarray:
    """Measure how uncertain (N, C) probabilities are: (N,) float, nats; -inf where unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(probs == 0, 0.0, probs * np.log(probs)).sum(axis=1)
    return np.where(np.isfinite(entropy), entropy, -np.inf)


def choose_least_certain(uncertainty: np.ndarray, share: float) -> np.ndarray:
    """Choose the least certain share of the rows, rounded up: indices, ascending."""
    n_chosen = int(np.ceil(share * len(uncertainty)))
    return np.sort(np.argsort(-uncertainty, kind="stable")[:n_chosen])


@dataclass
class _Readings:
    """The token rows of N battles in one or both orders, and the probabilities read so far.

    Order 0 is the canonical one with `swap`, else the given one; order 1 exchanges the answers.
    """

    pairs: pd.DataFrame
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    swap: bool
    given_uncertainty: np.ndarray | None
    twice_share: float

    def __post_init__(self) -> None:
        n_pairs = len(self.pairs)
        self.orders = (0, 1) if self.swap else (0,)
        self._is_as_given = is_canonical(self.pairs) if self.swap else np.ones(n_pairs, dtype=bool)
        self.probs = np.full((2, n_pairs, len(LABELS)), np.nan)
        self.is_cut = np.zeros(n_pairs, dtype=bool)
        self._encoded = encode_battles(self.pairs, self.tokenizer, self.max_tokens)
        self.lengths = self._encoded.lengths
        self.n_tok = int(self.lengths.sum()) * len(self.orders)
        self._cut_rows: dict[int, tuple[Encoded, int]] = {}  # battle -> where its cut row is
        # Two equal answers need no second reading to be made symmetric.
        self._is_same = np.zeros(n_pairs, dtype=bool)
        if self.swap:
            self._is_same = self._is_as_given & is_canonical(swap_pairs(self.pairs))

    def row(self, order: int, battle: int) -> np.ndarray:
        """(tokens,) int32, what the model reads of a battle in this order."""
        encoded, place = self._cut_rows.get(battle, (self._encoded, battle))
        return encoded.row(place, bool(order) == self._is_as_given[battle])

    def wanted(self, order: int) -> np.ndarray:
        """Battles to read in this order, indices."""
        if order == 0:
            return np.arange(len(self.pairs))
        chosen = choose_least_certain(self.uncertainty(order), self.twice_share)
        return chosen[~self._is_same[chosen]]

    def put(self, order: int, battles: np.ndarray, values: np.ndarray) -> None:
        """Take the probabilities of these battles."""
        self.probs[order, battles] = values

    def uncertainty(self, order: int) -> np.ndarray:
        """(N,) float, from the first reading once it is there; shortness where nothing is known."""
        if order == 1:
            return measure_entropy(self.probs[0])
        return -self.lengths if self.given_uncertainty is None else self.given_uncertainty

    def cut(self, rows: np.ndarray, limit_tok: float, tokens_per_batch: int) -> None:
        """Cut these battles until they have `limit_tok` padded tokens or are at `MIN_TOKENS`."""
        lengths = self.lengths[rows]
        max_tokens = self.max_tokens
        while max_tokens > MIN_TOKENS:
            cut_lengths = np.minimum(lengths, max_tokens)
            if _count_padded(cut_lengths, tokens_per_batch) <= limit_tok:
                break
            max_tokens = max(MIN_TOKENS, int(max_tokens * 0.9))
        longer = rows[lengths > max_tokens]
        if len(longer):
            encoded = encode_battles(self.pairs.iloc[longer], self.tokenizer, max_tokens)
            self._cut_rows |= {row: (encoded, place) for place, row in enumerate(longer.tolist())}
            self.lengths[longer] = encoded.lengths
            self.is_cut[longer] = True
        self.max_tokens = max_tokens

    def result(self, note: str = "") -> Prediction:
        """What was read so far, with A and B as in the given battles."""
        first = self.probs[0]
        second = np.where(self._is_same[:, None], first, self.probs[1])
        both = np.stack([first, swap_probs(second)])
        n_readings = np.isfinite(both).all(axis=2).sum(axis=0)
        with np.errstate(invalid="ignore"):
            probs = np.nansum(both, axis=0) / n_readings[:, None]
        return Prediction(
            self._as_given(probs),
            n_readings,
            self.is_cut & (n_readings > 0),
            note,
            np.abs(both[0] - both[1]).mean(axis=1),
            self._as_given(first),
        )

    def _as_given(self, probs: np.ndarray) -> np.ndarray:
        """Exchange the columns of battles whose first reading was not in the given order."""
        return np.where(self._is_as_given[:, None], probs, swap_probs(probs))


def _count_padded(lengths: np.ndarray, tokens_per_batch: int) -> int:
    batches = make_batches(lengths, tokens_per_batch)
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@dataclass
class _Loop:
    """Sends batches to a reader and collects them, replanning by the measured pace."""

    reader: Reader
    readings: Any  # as for `read_battles`
    tokens_per_batch: int
    deadline: float
    bar: tqdm
    keep: Callable[[Prediction], None] | None

    def __post_init__(self) -> None:
        self._kept_at = self._received_at = time.monotonic()
        self._n_sent = self._n_received = 0
        # (seconds, padded tokens) of the last batches
        self._measured: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._under_way: dict[int, np.ndarray] = {}  # key -> battles of the batch

    def read(self, order: int) -> None:
        """Read the wanted battles in this order, as far as time allows."""
        self._plan(self.readings.wanted(order), postponed=np.zeros(0, dtype=int))
        while True:
            while len(self._under_way) < self.reader.capacity:
                if (batch := self._next_batch(order)) is None:
                    break
                self._n_sent += 1
                self._under_way[self._n_sent] = batch
                token_rows = [self.readings.row(order, row) for row in batch.tolist()]
                self.reader.send(self._n_sent, token_rows)
            if not self._under_way or not self._receive(order):
                return

    def _plan(self, rows: np.ndarray, postponed: np.ndarray) -> None:
        """Plan to read these rows, longest first; for the postponed ones time seems too short."""
        batches = make_batches(self.readings.lengths[rows], self.tokens_per_batch)
        self._planned = [rows[batch] for batch in batches]
        self._planned_tok = sum(map(self._padded, self._planned))
        self._postponed = postponed

    def _next_batch(self, order: int) -> np.ndarray | None:
        """Take the next batch out of the plan; None when no other can be read in time."""
        affordable_tok = self._affordable_tok()
        if affordable_tok <= 0:
            return None
        if not self._planned or self._planned_tok > affordable_tok:
            is_pace_unknown = self._planned and self._n_received < _N_WARMUP
            if is_pace_unknown and self._padded(self._planned[-1]) <= affordable_tok:
                return self._take(-1)  # the shortest
            self._replan(order)
        return self._take(0) if self._planned else None

    def _take(self, place: int) -> np.ndarray:
        batch = self._planned.pop(place)
        self._planned_tok -= self._padded(batch)
        return batch

    def _affordable_tok(self) -> float:
        """Padded tokens that can still be read in time, beside those under way."""
        left_s = self.deadline - time.monotonic()
        if left_s < 0:
            return 0.0
        if not self._measured:
            return math.inf
        seconds, n_tok = np.sum(self._measured, axis=0)
        under_way_tok = sum(map(self._padded, self._under_way.values()))
        return left_s * n_tok / max(seconds, 1e-9) - under_way_tok

    def _replan(self, order: int) -> None:
        """Fit the unread battles into the time left: cut all, then postpone the most certain."""
        unread = np.concatenate([*self._planned, self._postponed])
        if not len(unread):
            return
        affordable_tok = self._affordable_tok()
        # A little time stays free, so that a batch that is a little slow does not change the plan.
        limit_tok = _FILL * affordable_tok
        if order == 0:
            self.readings.cut(unread, limit_tok, self.tokens_per_batch)
        lengths = self.readings.lengths
        rows = unread[np.argsort(-self.readings.uncertainty(order)[unread], kind="stable")]
        rows = rows[lengths[rows] <= affordable_tok]  # a longer one would block all others
        while True:
            n_rows = np.searchsorted(np.cumsum(lengths[rows]), limit_tok, side="right")
            chosen = rows[: max(1, n_rows)]
            padded_tok = _count_padded(lengths[chosen], self.tokens_per_batch)
            if len(chosen) <= 1 or padded_tok <= affordable_tok:
                break
            limit_tok *= _FILL
        self._plan(chosen, postponed=np.setdiff1d(unread, chosen))

    def _receive(self, order: int) -> bool:
        """Wait for a batch; False when the deadline passes first."""
        received = self.reader.receive(self.deadline)
        if received is None:
            self._under_way.clear()
            return False
        key, values = received
        batch = self._under_way.pop(key)
        self.readings.put(order, batch, values)
        self.bar.update(int(self.readings.lengths[batch].sum()))
        now = time.monotonic()
        self._measured.append((now - self._received_at, self._padded(batch)))
        self._received_at = now
        self._n_received += 1
        if self._n_received == _N_WARMUP:
            self._measured.popleft()
        if self.keep and now - self._kept_at > _KEEP_S:
            self.keep(self.readings.result())
            self._kept_at = now
        return True

    def _padded(self, batch: np.ndarray) -> int:
        return len(batch) * int(self.readings.lengths[batch].max())
