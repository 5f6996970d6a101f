"""Battles to token ids, and token ids to batches under a token budget.

The template's own pieces are ids that are never cut; what people and chatbots wrote
is tokenised with special tokens taken as plain text, cut fairly, and set between
them. An encoder reads [CLS] prompt [SEP] A [SEP] B [SEP], each answer under its name:
to tell one side of a [SEP] from the other by position alone is hard to learn. A
decoder reads the same three as one chat message and is asked for its answer, so
that the last token, which the classification head reads, is always the template's.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from src.utils.models.template import text_of
from src.utils.schema import TEXTS

_POOL_BATCHES = 32  # batches whose rows are sorted together: larger pads less and shuffles less


def is_canonical(pairs: pd.DataFrame) -> np.ndarray:
    """Tell which battles stand in canonical order: (N,) bool, answer A is not the later in code point order."""
    keys = [[tuple(map(text_of, turns)) for turns in pairs[name]] for name in TEXTS[1:]]
    return np.array([a <= b for a, b in zip(*keys, strict=True)], dtype=bool)


def make_batches(
    lengths: Sequence[int] | np.ndarray,
    tokens_per_batch: int,
    seed: int | None = None,
    epoch: int = 0,
) -> list[np.ndarray]:
    """Group rows of like length so that rows x longest stays within a token budget.

    Args:
        lengths: (N,) tokens of each row.
        tokens_per_batch: padded tokens of one batch at most; a longer row goes alone.
        seed: None sorts all rows, longest first, which wastes least and meets the largest
            batch at once. A number shuffles for training: rows are dealt into pools that
            are sorted apart, then the batches are shuffled.
        epoch: changes the shuffle.

    Returns:
        Row indices of each batch; every row once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return []
    if seed is None:
        return _fill(np.argsort(-lengths, kind="stable"), lengths, tokens_per_batch)
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(len(lengths))
    n_pools = max(1, round(lengths.sum() / (tokens_per_batch * _POOL_BATCHES)))
    batches: list[np.ndarray] = []
    for pool in np.array_split(rows, n_pools):
        batches += _fill(pool[np.argsort(-lengths[pool], kind="stable")], lengths, tokens_per_batch)
    return [batches[place] for place in rng.permutation(len(batches))]


def make_packs(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, seed: int, epoch: int = 0
) -> list[np.ndarray]:
    """Group rows at random so that their own tokens stay within a budget: for batches without padding.

    Args:
        lengths: (N,) tokens of each row.
        tokens_per_batch: tokens of one batch at most; a longer row goes alone.
        seed: and `epoch`: of the order.

    Returns:
        Row indices of each batch; every row once.
    """
    packs: list[list[int]] = []
    n_tok = 0
    for row in np.random.default_rng((seed, epoch)).permutation(len(lengths)):
        if not packs or n_tok + lengths[row] > tokens_per_batch:
            packs.append([])
            n_tok = 0
        packs[-1].append(row)
        n_tok += lengths[row]
    return [np.array(pack) for pack in packs]


def _fill(rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    batches, start = [], 0
    while start < len(rows):
        # Rows come longest first, so the first of a batch is the width of all.
        n_rows = max(1, tokens_per_batch // max(int(lengths[rows[start]]), 1))
        batches.append(rows[start : start + n_rows])
        start += n_rows
    return batches


def collate(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to their longest.

    Left padding would move the [CLS] that an encoder reads, and a missing mask lets
    both models attend to padding; neither raises.

    Returns:
        `input_ids` and `attention_mask`, both (rows, longest) int64.
    """
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = torch.as_tensor(np.asarray(row), dtype=torch.int64)
        attention_mask[place, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
