"""Group rows of token ids into batches under a token budget, and pad them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from src.utils.schema import TEXTS, clean_text

Lengths = Sequence[int] | np.ndarray  # (N,) tokens of each row

_POOL_BATCHES = 32  # batches whose rows are sorted together: more pads less and shuffles less


def is_canonical(pairs: pd.DataFrame) -> np.ndarray:
    """Report which battles are in canonical order: (N,) bool, A is not after B by code points."""
    a, b = ([tuple(map(clean_text, turns)) for turns in pairs[name]] for name in TEXTS[1:])
    return np.array([one <= other for one, other in zip(a, b, strict=True)], dtype=bool)


def make_batches(
    lengths: Lengths, tokens_per_batch: int, seed: int | None = None, epoch: int = 0
) -> list[np.ndarray]:
    """Group rows of similar length so that rows x longest is within a token budget.

    Without a `seed` all rows are sorted, longest first, which pads least and meets the largest
    batch at once. A number shuffles for training, with `epoch`: rows are dealt into pools, each
    pool is sorted, and the batches are shuffled. A longer row gets a batch of its own.

    Returns:
        Row indices of each batch; every row once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return []
    if seed is None:
        return _fill(np.arange(len(lengths)), lengths, tokens_per_batch)
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(len(lengths))
    n_pools = max(1, round(lengths.sum() / (tokens_per_batch * _POOL_BATCHES)))
    batches: list[np.ndarray] = []
    for pool in np.array_split(rows, n_pools):
        batches += _fill(pool, lengths, tokens_per_batch)
    return [batches[place] for place in rng.permutation(len(batches))]


def _fill(rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    batches, start = [], 0
    while start < len(rows):
        # Rows are sorted, longest first, so the first row of a batch is the longest.
        n_rows = max(1, tokens_per_batch // max(int(lengths[rows[start]]), 1))
        batches.append(rows[start : start + n_rows])
        start += n_rows
    return batches


def make_packs(
    lengths: Lengths, tokens_per_batch: int, seed: int, epoch: int = 0
) -> list[np.ndarray]:
    """Group rows at random so that their tokens are within a budget: for batches without padding.

    Arguments and result are those of `make_batches`.
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


def collate(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest.

    Left padding would move the [CLS] that an encoder reads, and without a mask both models would
    attend to padding; neither raises an error.

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
