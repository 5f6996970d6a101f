"""The only gradient-free walk over batches: battles to probabilities, under a clock.

Validation, the submission and the audit all pass through here, so that what is
scored at home is what runs on Kaggle.
"""

import sys
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from src.utils.batches import collate, encode_both_orders, is_canonical, make_batches
from src.utils.mirror import average_over_swap, swap_probs
from src.utils.models import choose_dtype, in_float32
from src.utils.schema import LABELS


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
    """Predict how each battle is voted.

    With `swap` every battle is read twice. The first reading puts the answers in
    canonical order (that of their text), the second exchanges them, and the two are
    averaged. When time is short the second readings are given up first; a battle
    read only once keeps its first reading, which is still symmetric (exchanging A and
    B gives the model the same input and exchanges the columns) but carries position
    bias. Then battles are given up, longest first.

    Args:
        model: a sequence classifier, logits in `LABELS` order; its mode is restored.
        tokenizer: its tokenizer.
        pairs: N battles; only the texts are read.
        max_tokens: budget of one battle.
        tokens_per_batch: padded tokens of one forward pass.
        swap: average over both orders; False reads each battle once, as given.
        deadline: `time.monotonic()` value, s, that must not be passed; None never stops.
        progress: title of a progress bar with the time left; "" shows none.

    Returns:
        (N, C) float64, rows sum to 1; NaN where a battle was not reached or its logits
        were not finite even in 32 bit. They depend on no other row of `pairs`.
    """
    if not len(pairs):
        return np.zeros((0, len(LABELS)))
    given, swapped = encode_both_orders(pairs, tokenizer, max_tokens)
    keeps = is_canonical(pairs) if swap else np.ones(len(pairs), dtype=bool)
    first = [a if keep else b for a, b, keep in zip(given, swapped, keeps, strict=True)]
    second = [b if keep else a for a, b, keep in zip(given, swapped, keeps, strict=True)]
    n_tokens = sum(map(len, first)) * (2 if swap else 1)
    walk = _Walk(model, tokenizer.pad_token_id, tokens_per_batch, deadline)
    with tqdm(total=n_tokens, desc=progress, unit="tok", unit_scale=True, disable=not progress, file=sys.stdout) as bar:
        probs = walk.read(first, bar)
        if swap:
            probs_swapped = walk.read(second, bar)
            # Two answers that read the same need no second reading to be made symmetric.
            same = np.array([a == b for a, b in zip(first, second, strict=True)])
            probs_swapped[same] = probs[same]
            probs = _average_where_read(probs, probs_swapped)
    return np.where(keeps[:, None], probs, swap_probs(probs))


def _average_where_read(probs: np.ndarray, probs_swapped: np.ndarray) -> np.ndarray:
    averaged = probs.copy()
    twice = np.isfinite(probs).all(axis=1) & np.isfinite(probs_swapped).all(axis=1)
    averaged[twice] = average_over_swap(probs[twice], probs_swapped[twice])
    only_second = ~np.isfinite(probs).all(axis=1) & np.isfinite(probs_swapped).all(axis=1)
    averaged[only_second] = swap_probs(probs_swapped[only_second])
    return averaged


class _Walk:
    """One model over many batches, with the pace that it keeps."""

    def __init__(self, model: nn.Module, pad_id: int, tokens_per_batch: int, deadline: float | None) -> None:
        self.model, self.pad_id, self.tokens_per_batch = model, pad_id, tokens_per_batch
        self.deadline = float("inf") if deadline is None else deadline
        self.seconds = self.n_tok = 0.0

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], bar: tqdm) -> np.ndarray:
        """Probabilities of each row, (N, C) float64; NaN where time ran out."""
        probs = np.full((len(rows), len(LABELS)), np.nan)
        lengths = np.array([len(row) for row in rows])
        batches = deque(make_batches(lengths, self.tokens_per_batch))
        left_tok = float(sum(_padded(lengths, batch) for batch in batches))
        was_training = self.model.training
        self.model.eval()
        while batches:
            # Longest first as long as all will fit; else shortest first, which reaches the most rows.
            batch = batches.popleft() if self._projected(left_tok) <= self.deadline else batches.pop()
            n_tok = _padded(lengths, batch)
            if self._projected(n_tok) > self.deadline:
                break
            probs[batch] = self._predict([rows[row] for row in batch], n_tok)
            left_tok -= n_tok
            bar.update(int(lengths[batch].sum()))
        self.model.train(was_training)
        return probs

    def _projected(self, n_tok: float) -> float:
        return time.monotonic() + (n_tok * self.seconds / self.n_tok if self.n_tok else 0.0)

    def _predict(self, rows: list[Sequence[int]], n_tok: float) -> np.ndarray:
        start = time.monotonic()
        logits = self._logits(rows, choose_dtype(_device(self.model)))
        lost = ~torch.isfinite(logits).all(dim=1)
        if lost.any():
            with in_float32(self.model):
                again = [self._logits([row], torch.float32) for row, is_lost in zip(rows, lost, strict=True) if is_lost]
            logits[lost] = torch.cat(again)
        self.seconds += time.monotonic() - start
        self.n_tok += n_tok
        logits[~torch.isfinite(logits).all(dim=1)] = torch.nan
        return torch.softmax(logits, dim=1).numpy()

    def _logits(self, rows: list[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
        device = _device(self.model)
        batch = {name: tensor.to(device) for name, tensor in collate(rows, self.pad_id).items()}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(**batch).logits.double().cpu()


def _padded(lengths: np.ndarray, batch: np.ndarray) -> int:
    return len(batch) * int(lengths[batch].max())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
