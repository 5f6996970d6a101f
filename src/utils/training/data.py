"""Make the training data: battles in both orders, targets and their loss, the plan of batches."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from src.utils.battles import layouts
from src.utils.battles.files import read_table
from src.utils.battles.readers import hash_prompt, load_pairs
from src.utils.config import FinetuneConfig
from src.utils.models.batches import make_batches, make_packs
from src.utils.models.template import encode_battles
from src.utils.schema import LABELS, MODELS, TEXTS, UNKNOWN_MODEL, probs_of, swap_probs, vote_shares
from src.utils.training.processes import rank

NO_VOTE = -1  # label of a battle that has a soft label only


class Examples:
    """Every battle twice: item 2i is battle i as given, item 2i + 1 has its answers exchanged.

    An item has token ids, (tokens,) int32, and a target, (2, C) float32, of `make_targets`;
    `lengths` is (N,) int.
    """

    def __init__(
        self, pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig
    ) -> None:
        self.encoded = encode_battles(pairs, tokenizer, config.max_tokens)
        self.lengths = self.encoded.lengths
        targets = make_targets(pairs, config)
        self.targets = np.stack([targets, swap_probs(targets)])

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        battle, order = divmod(item, 2)
        return self.encoded.row(battle, bool(order)), self.targets[order, battle]


def make_targets(pairs: pd.DataFrame, config: FinetuneConfig) -> np.ndarray:
    """Put each battle's votes beside its soft label, for `loss_of`; zeros for what it lacks.

    The teachers of soft labels were fitted to votes that are held out here, so their student's
    score is slightly optimistic.

    `pairs` are N battles with `id` and `label`, which may be `NO_VOTE`. Returns (N, 2, C) float32:
    the vote (one 1, or the shares of several votes), the soft label (sums to 1).

    ValueError if the file does not fit, or a battle has neither vote nor soft label.
    """
    votes = vote_shares(pairs)
    soft = np.zeros_like(votes)
    if config.soft_labels:
        soft = _read_soft_labels(find_file(config.soft_labels), pairs)
    has_neither = ~votes.any(axis=1) & ~soft.any(axis=1)
    if has_neither.any():
        battle = pairs[has_neither].iloc[0]
        raise ValueError(
            f"{battle.get('source', 'pairs')}, id {battle['id']}: expected a vote or a soft label, "
            f"found neither, as in {has_neither.sum()} battles; add them to the file of soft_labels"
        )
    return np.stack([votes, soft], axis=1).astype(np.float32)


def loss_of(
    logits: torch.Tensor, targets: torch.Tensor, config: FinetuneConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss to minimise and the one to report: sums over the rows, nats.

    With temperature T and weight w (`soft_temperature`, `soft_weight`) a row's loss is
    (1 - w) × cross-entropy(vote, softmax(z)) + w × T² × cross-entropy(teacher, softmax(z / T)),
    where the teacher is the soft label to the power 1 / T, normalised; w is 0 without a soft label
    and 1 without a vote. T² keeps the soft term's gradient the same size at every T. Reported is
    the log loss of the vote, or of a battle without one the cross-entropy with its soft label.

    `logits` are (rows, C) 32-bit, `targets` (rows, 2, C), of `make_targets`.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    votes, soft = targets.unbind(1)
    has_vote, has_soft = votes.any(1), soft.any(1)
    log_probs = logits.log_softmax(1)
    vote_losses = -(votes * log_probs).sum(1)
    if not has_soft.any():
        return vote_losses.sum(), vote_losses.sum()
    teacher = soft ** (1 / config.soft_temperature)
    teacher = teacher / teacher.sum(1, keepdim=True).clamp_min(1e-9)
    student = (logits / config.soft_temperature).log_softmax(1)
    soft_losses = -(config.soft_temperature**2) * (teacher * student).sum(1)
    weight = torch.where(has_vote, config.soft_weight, 1.0) * has_soft
    loss = (1 - weight) * vote_losses + weight * soft_losses
    reported = torch.where(has_vote, vote_losses, -(soft * log_probs).sum(1))
    return loss.sum(), reported.sum()


def count_hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count rows whose most probable class is the commonest of `targets`, both as in `loss_of`."""
    votes, soft = targets.unbind(1)
    wanted = torch.where(votes.any(1, keepdim=True), votes, soft)
    return (logits.argmax(1) == wanted.argmax(1)).sum().float()


def find_file(name: str) -> Path:
    """The path of a file that a setting names; `~` is the home folder. It must exist."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; 05 writes soft labels (WRITE_SOFT_LABELS=True)"
        )
    return path


def _read_soft_labels(path: Path, pairs: pd.DataFrame) -> np.ndarray:
    """(N, C) float64 in the order of the battles; zeros where one has none."""
    table, ids = read_table(path), pairs["id"]
    try:
        probs = probs_of(table)
        rows = pd.Index(table["id"].astype(str)).get_indexer(pd.Index(ids.astype(str)))
    except (KeyError, ValueError, pd.errors.InvalidIndexError) as error:
        raise ValueError(
            f"soft_labels: {path}: expected columns id and {LABELS}, one row per id: {error}"
        ) from error
    folds = sorted(set(pairs["fold"]) - {NO_VOTE})  # none: extra battles, which may have votes
    if folds and (rows < 0).all():
        raise ValueError(
            f"soft_labels: {path}: expected some of the {len(ids)} battles to train on, of folds "
            f"{folds}, found none: 05 (WRITE_SOFT_LABELS=True) writes what its members held out. "
            "Set FOLDS to another fold than the teachers', or give 05 teachers that hold out all"
        )
    return np.where(rows[:, None] < 0, 0.0, probs[rows])


def add_extra_battles(
    pairs: pd.DataFrame, is_heldout: np.ndarray, config: FinetuneConfig
) -> pd.DataFrame:
    """Take the battles to train on: those of the arena not held out, and `extra_battles`.

    An extra battle is dropped when its prompt occurs in the held-out battles (compared by
    `readers.hash_prompt`), or when it repeats a battle of the arena (same id, same texts).
    Without a vote its label is `NO_VOTE`, and it needs a row in `soft_labels`.

    `pairs` are all N battles of the arena, with `group`; `is_heldout`, (N,) bool, says which of
    them this model must not see. `config.extra_battles` names files of any layout that 01 reads.

    ValueError for an id of another battle, or neither vote nor soft label; where is named.
    """
    train_pairs = pairs[~is_heldout]
    if not config.extra_battles:
        return train_pairs
    tables = [_read_extra(find_file(name)) for name in config.extra_battles]
    extra = pd.concat(tables, ignore_index=True)
    is_repeated = _find_repeated(extra, pairs)
    # A group may hold several prompts, those of a user.
    heldout = {hash_prompt(turns) for turns in pairs.loc[is_heldout, "prompt"]}
    is_leak = extra["group"].isin(heldout).to_numpy() & ~is_repeated
    added = extra[~is_repeated & ~is_leak]
    if len(added):
        make_targets(added, config)  # refuses a battle without a target before a model is loaded
    if rank() == 0:
        n_votes = (added["label"] != NO_VOTE).sum()
        print(
            f"extra battles: {len(extra):,} read, {len(added):,} added ({n_votes:,} with a vote); "
            f"dropped {is_repeated.sum():,} repeated and {is_leak.sum():,} with a held-out prompt"
        )
    tables = [train_pairs.astype({"id": object}), added.astype({"id": object})]
    return pd.concat(tables, ignore_index=True)


def _read_extra(path: Path) -> pd.DataFrame:
    is_labelled = layouts.has_votes(read_table(path, header_only=True).columns)
    extra, _ = load_pairs(path, labelled=is_labelled, quiet=rank() != 0)
    if not is_labelled:
        extra = extra.assign(**dict.fromkeys(MODELS, UNKNOWN_MODEL), label=NO_VOTE)
    groups = [hash_prompt(turns) for turns in extra["prompt"]]
    sources = [f"extra_battles: {path}, row {row}" for row in range(1, len(extra) + 1)]
    return extra.assign(group=groups, fold=NO_VOTE, source=sources)


def _find_repeated(extra: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray:
    """(M,) bool, which extra battles are in the arena, or further up, with the same id."""
    battles = pd.concat([pairs, extra])[["id", *TEXTS]].astype({"id": str})
    has_known_id = battles.duplicated("id").to_numpy()[len(pairs) :]
    has_known_texts = battles.duplicated().to_numpy()[len(pairs) :]
    clashes = extra[has_known_id & ~has_known_texts]
    if len(clashes):
        raise ValueError(
            f"{clashes['source'].iloc[0]}, id {clashes['id'].iloc[0]}: expected an id of its own, "
            "got the id of another battle; give the extra battles other ids, in soft_labels too"
        )
    return has_known_id


def plan_steps(
    lengths: np.ndarray, config: FinetuneConfig, is_packed: bool = False
) -> list[list[int]]:
    """Plan every optimizer step of a training run, so that a resumed run can start at any of them.

    Args:
        lengths: (N,) tokens of each battle.
        config: n_epochs, both_orders, tokens_per_step and seed are read.
        is_packed: rows of a step are drawn at random; else they have similar lengths.

    Returns:
        Items of each step, see `Examples`. With `both_orders` every epoch has each battle in
        both, side by side; else in one, and epochs 2k and 2k + 1 in opposite ones. A fraction of
        an epoch takes this share of its steps.
    """
    plan: list[list[int]] = []
    make = make_packs if is_packed else make_batches
    budget = config.tokens_per_step // (2 if config.both_orders else 1)
    for epoch in range(math.ceil(config.n_epochs)):
        rng = np.random.default_rng((config.seed, epoch // 2))
        orders = rng.integers(0, 2, len(lengths)) ^ (epoch % 2)
        steps = make(lengths, budget, config.seed, epoch)
        n_steps = math.ceil(min(1.0, config.n_epochs - epoch) * len(steps))
        for rows in steps[:n_steps]:
            items = 2 * rows + orders[rows]
            if config.both_orders:
                items = np.stack([items, items ^ 1], axis=1).ravel()
            plan.append(items.tolist())
    return plan


def split_step(
    items: Sequence[int], lengths: np.ndarray, tokens_per_batch: int, is_packed: bool
) -> list[list[int]]:
    """Split a step into passes of at most so many tokens, padding included; no item is lost.

    `lengths`, (N,), are those of the N items; a longer item gets a pass of its own.
    """
    order = np.arange(len(items)) if is_packed else np.argsort(-lengths, kind="stable")
    passes: list[list[int]] = []
    n_tok = 0
    for place in order:
        # Without packing items come longest first: a pass is as wide as its first one.
        width = lengths[place] if is_packed or not n_tok else n_tok // len(passes[-1])
        if not passes or n_tok + width > tokens_per_batch:
            passes.append([])
            n_tok, width = 0, lengths[place]
        passes[-1].append(items[place])
        n_tok += width
    return passes
