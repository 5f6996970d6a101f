"""What a model is trained on: battles in both orders, what it is to say of each, and the plan of batches.

The whole plan is laid out before the first step, so that a resumed run enters it at
any batch.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from src.utils.batches import encode_both_orders, make_batches, make_packs
from src.utils.config import FinetuneConfig
from src.utils.mirror import swap_probs
from src.utils.schema import LABELS, check_probs, probs_of


class Examples(Dataset):
    """Every battle twice: item 2i is battle i as given, item 2i + 1 is its mirror."""

    def __init__(self, pairs: pd.DataFrame, tokenizer, config: FinetuneConfig) -> None:
        orders = encode_both_orders(pairs, tokenizer, config.max_tokens)
        # A Python int takes 36 bytes in a list, here 4.
        self.rows = [[np.array(row, dtype=np.int32) for row in rows] for rows in orders]
        targets = make_targets(pairs, config)
        self.targets = np.stack([targets, swap_probs(targets)])
        self.lengths = np.array([max(len(a), len(b)) for a, b in zip(*self.rows, strict=True)])

    def __len__(self) -> int:
        return 2 * len(self.lengths)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        row, order = divmod(int(item), 2)
        return self.rows[order][row], self.targets[order, row]


def make_targets(pairs: pd.DataFrame, config: FinetuneConfig) -> np.ndarray:
    """What the model is to say of each battle: the vote, mixed with soft labels where there are some.

    The teachers of soft labels were fitted to votes that are held out here, so what a
    student of theirs scores is faintly optimistic.

    Args:
        pairs: N battles with `id` and `label`.
        config: `soft_labels` and `soft_weight` are read.

    Returns:
        (N, C) float32, rows sum to 1.

    Raises:
        FileNotFoundError: no such file of soft labels.
        ValueError: it holds something else, or none of these battles.

    Source: distillation, Hinton et al. 2015, arXiv:1503.02531.
    """
    votes = np.eye(len(LABELS), dtype=np.float32)[pairs["label"].to_numpy(dtype=np.int64)]
    if not config.soft_labels:
        return votes
    soft = _read_soft_labels(Path(config.soft_labels).expanduser(), pairs["id"])
    known = np.isfinite(soft).all(axis=1, keepdims=True)
    weight = np.where(known, config.soft_weight, 0.0)
    return ((1 - weight) * votes + weight * np.where(known, soft, 0.0)).astype(np.float32)


def _read_soft_labels(path: Path, ids: pd.Series) -> np.ndarray:
    """(N, C) float64 in the order of the ids; NaN where a battle has none."""
    if not path.is_file():
        raise FileNotFoundError(f"soft_labels: {path} not found; 05 writes it with WRITE_SOFT_LABELS=True")
    table = pd.read_parquet(path)
    missing = [name for name in ("id", *LABELS) if name not in table.columns]
    if missing or table["id"].duplicated().any():
        raise ValueError(f"soft_labels: {path}: expected one row an id and columns {LABELS}, lacks {missing}")
    check_probs(probs_of(table))
    if not ids.isin(table["id"]).any():
        raise ValueError(f"soft_labels: {path}: expected some of the {len(ids)} training battles, found none")
    return table.set_index("id")[list(LABELS)].reindex(ids).to_numpy(dtype=np.float64)


def plan_batches(lengths: np.ndarray, config: FinetuneConfig, is_packed: bool = False) -> list[list[int]]:
    """Lay out every batch of a training run.

    Args:
        lengths: (N,) tokens of each battle.
        config: n_epochs, both_orders, tokens_per_batch and seed are read.
        is_packed: batches have no padding: they are filled at random to the budget. Else
            battles of like length share a batch.

    Returns:
        Items of each batch: 2i is battle i as given, 2i + 1 is its mirror. With
        `both_orders` every epoch has each battle in both, side by side in one batch. Else it
        has each battle once; epochs 2k and 2k + 1 have it in opposite orders. A fraction of
        an epoch takes that share of its batches.
    """
    plan: list[list[int]] = []
    make = make_packs if is_packed else make_batches
    for epoch in range(math.ceil(config.n_epochs)):
        orders = np.random.default_rng((config.seed, epoch // 2)).integers(0, 2, len(lengths)) ^ (epoch % 2)
        budget = config.tokens_per_batch // (2 if config.both_orders else 1)
        batches = make(lengths, budget, config.seed, epoch)
        n_batches = math.ceil(min(1.0, config.n_epochs - epoch) * len(batches))
        for rows in batches[:n_batches]:
            items = 2 * rows + orders[rows]
            plan.append((np.stack([items, items ^ 1], axis=1).ravel() if config.both_orders else items).tolist())
    return plan
