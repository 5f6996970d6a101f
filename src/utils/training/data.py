"""What a model is trained on: battles in both orders, what it is to say of each, and the plan of batches.

The whole plan is laid out before the first step, so that a resumed run enters it at
any batch.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from src.utils.battles.readers import hash_prompt, load_pairs, read_table
from src.utils.config import FinetuneConfig
from src.utils.models.batches import make_batches, make_packs
from src.utils.models.template import encode_both_orders
from src.utils.schema import LABELS, MODELS, TEXTS, UNKNOWN_MODEL, check_probs, swap_probs
from src.utils.training.processes import rank

NO_VOTE = -1  # label of a battle that soft labels alone teach


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

    A battle without a vote has its soft label alone.

    The teachers of soft labels were fitted to votes that are held out here, so what a
    student of theirs scores is faintly optimistic.

    Args:
        pairs: N battles with `id` and `label`, which may be `NO_VOTE`.
        config: `soft_labels` and `soft_weight` are read.

    Returns:
        (N, C) float32, rows sum to 1.

    Raises:
        FileNotFoundError: no such file of soft labels.
        ValueError: it holds something else, or none of these battles, or a battle has
            neither a vote nor a soft label.

    Source: distillation, Hinton et al. 2015, arXiv:1503.02531.
    """
    labels = pairs["label"].to_numpy(dtype=np.int64)
    has_vote = (labels != NO_VOTE)[:, None]
    votes = np.eye(len(LABELS))[labels] * has_vote
    soft = np.full_like(votes, np.nan)
    if config.soft_labels:
        soft = _read_soft_labels(find_file(config.soft_labels), pairs["id"])
    known = np.isfinite(soft).all(axis=1, keepdims=True)
    untaught = ~(has_vote | known)[:, 0]
    if untaught.any():
        battle = pairs[untaught].iloc[0]
        raise ValueError(
            f"{battle['source'] if 'source' in pairs else 'pairs'}, id {battle['id']}: expected a vote or a soft "
            f"label, got neither, as {int(untaught.sum())} battles; name predictions of these battles in soft_labels"
        )
    weight = np.where(known, np.where(has_vote, config.soft_weight, 1.0), 0.0)
    return ((1 - weight) * votes + weight * np.where(known, soft, 0.0)).astype(np.float32)


def find_file(name: str) -> Path:
    """The path of a file that a setting names; `~` is the home folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; 05 writes soft labels with WRITE_SOFT_LABELS=True, 06 a submission.csv"
        )
    return path


def _read_soft_labels(path: Path, ids: pd.Series) -> np.ndarray:
    """(N, C) float64 in the order of the ids; NaN where a battle has none."""
    table = read_table(path)
    missing = [name for name in ("id", *LABELS) if name not in table.columns]
    if missing or table["id"].duplicated().any():
        raise ValueError(
            f"soft_labels: {path}: expected one row an id and columns {LABELS}, lacks {missing}"
        )
    try:
        probs = check_probs(table[list(LABELS)].to_numpy(dtype=np.float64))
    except ValueError as error:
        raise ValueError(f"soft_labels: {path}: {error}") from error
    rows = pd.Index(table["id"].astype(str)).get_indexer(ids.astype(str))
    if (rows < 0).all():
        raise ValueError(
            f"soft_labels: {path}: expected some of the {len(ids)} training battles, found none"
        )
    return np.where(rows[:, None] < 0, np.nan, probs[rows])


# ---- battles from elsewhere ------------------------------------------------------


def add_extra_battles(
    pairs: pd.DataFrame, is_heldout: np.ndarray, config: FinetuneConfig
) -> pd.DataFrame:
    """Take the battles to train on: those of the arena that are not held out, and those of `extra_battles`.

    An extra battle is never held out. It is left out where its prompt occurs in the
    held-out battles (as `data.hash_prompt` compares prompts), or where it is a battle of
    the arena over again (same id, same texts).

    Args:
        pairs: all battles of the arena, with `group`.
        is_heldout: (N,) bool, which of them this model must not see.
        config: `extra_battles` names files in the competition's layout, with votes or without;
            `soft_labels` must know those without.

    Returns:
        Battles; those without a vote have the label `NO_VOTE`. How many came from where is printed.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: an id stands for another battle already, or a battle has neither a vote
            nor a soft label; file, row and id are named.
    """
    train_pairs = pairs[~is_heldout]
    if not config.extra_battles:
        return train_pairs
    extra = pd.concat(
        [_read_extra(find_file(name)) for name in config.extra_battles], ignore_index=True
    )
    is_known = _find_repeated(extra, pairs)
    leaks = (extra["group"].isin(pairs.loc[is_heldout, "group"]) & ~is_known).to_numpy()
    added = extra[~is_known & ~leaks]
    if len(added):
        make_targets(
            added, config
        )  # which refuses a battle that has nothing to teach, before a model is loaded
    if rank() == 0:
        print(
            f"extra battles: {len(extra):,} read, {len(added):,} added ({(added['label'] != NO_VOTE).sum():,} with a "
            f"vote); {is_known.sum():,} stand in the arena, {leaks.sum():,} have a held-out prompt"
        )
    return pd.concat(
        [train_pairs.astype({"id": object}), added.astype({"id": object})], ignore_index=True
    )


def _read_extra(path: Path) -> pd.DataFrame:
    is_labelled = set(LABELS) <= set(read_table(path).columns)
    extra, _ = load_pairs(path, labelled=is_labelled)
    if not is_labelled:
        extra = extra.assign(**dict.fromkeys(MODELS, UNKNOWN_MODEL), label=NO_VOTE)
    groups = [hash_prompt(turns) for turns in extra["prompt"]]
    sources = [f"extra_battles: {path}, row {row}" for row in range(1, len(extra) + 1)]
    return extra.assign(group=groups, fold=NO_VOTE, source=sources)


def _find_repeated(extra: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray:
    """(M,) bool, which extra battles stand in the arena, or above, under the same id."""
    texts_of = dict(
        zip(
            pairs["id"].astype(str), zip(*(pairs[name] for name in TEXTS), strict=True), strict=True
        )
    )
    is_known = np.zeros(len(extra), dtype=bool)
    for place, (key, *texts) in enumerate(
        zip(extra["id"].astype(str), *(extra[name] for name in TEXTS), strict=True)
    ):
        is_known[place] = key in texts_of
        if texts_of.setdefault(key, tuple(texts)) != tuple(texts):
            raise ValueError(
                f"{extra['source'].iloc[place]}, id {key}: expected an id of its own, "
                "got that of another battle; give the extra battles other ids, in soft_labels too"
            )
    return is_known


def plan_batches(
    lengths: np.ndarray, config: FinetuneConfig, is_packed: bool = False
) -> list[list[int]]:
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
        orders = np.random.default_rng((config.seed, epoch // 2)).integers(0, 2, len(lengths)) ^ (
            epoch % 2
        )
        budget = config.tokens_per_batch // (2 if config.both_orders else 1)
        batches = make(lengths, budget, config.seed, epoch)
        n_batches = math.ceil(min(1.0, config.n_epochs - epoch) * len(batches))
        for rows in batches[:n_batches]:
            items = 2 * rows + orders[rows]
            plan.append(
                (
                    np.stack([items, items ^ 1], axis=1).ravel() if config.both_orders else items
                ).tolist()
            )
    return plan
