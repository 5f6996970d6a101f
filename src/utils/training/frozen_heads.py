"""Train a small head on the states of a frozen base: on the CPU, in minutes.

The head is the model of the CPU baseline (`models.baseline`), on the answers' mean states: their
difference says who wins, their sum whether it is a tie. Both, and the state at the read-out, have a
penalty of their own, chosen by cross-validation grouped by prompt inside the training battles, so
that nothing that scores a fold is chosen on it; the read-out is read only where that helps there.
A head is fitted to the mean of both readings of a battle, and chosen by how it serves: the mean of
what it predicts for either. States are standardised and turned into the directions in which each
layer and part varies most.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from sklearn.model_selection import GroupKFold

from src.utils.config import FinetuneConfig
from src.utils.models.baseline import Blocks, Davidson, fit_davidson
from src.utils.models.checkpoints import find_base_folder, load_base_tokenizer, write_head
from src.utils.models.frozen import DavidsonHead, split_parts
from src.utils.runs import atomic_folder, write_json, write_manifest, write_table
from src.utils.schema import LABELS, probs_table, swap_probs
from src.utils.training.data import make_targets
from src.utils.training.earlier import RECORD
from src.utils.training.heldout import Member
from src.utils.training.states import States, make_keys

HEAD_COLUMNS = ("fold", "seed", "head", "penalty", "train_loss", "log_loss")
# One over the prior variance of what a part adds to a battle's log-odds.
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_START = {"winner": 3.0, "tie": 3.0, "read-out": math.inf}
_PARTS = ("winner", "read-out", "tie", "read-out")  # of `split_parts`: whose penalty each has
_SIGNS = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None, None]  # of the exchanged reading
_N_INNER = 3  # parts of the cross-validation
_MOST_TRIED = 10_000  # battles of the cross-validation at most
_MOST_DIRECTIONS = 512  # of one layer and part
_SAMPLE = 4096  # battles that the directions are found in


@dataclass
class Columns:
    """How states become the columns that a head is fitted to, each part by itself."""

    mean: torch.Tensor  # (4, layers, hidden)
    matrices: torch.Tensor  # (4, layers, hidden, directions)

    def apply(self, states: np.ndarray) -> torch.Tensor:
        """Turn (M, width) states into (4, M, columns) float32."""
        parts = split_parts(torch.from_numpy(states), self.mean.shape[2]) - self.mean[:, None]
        return torch.einsum("pmlh,plhk->pmlk", parts, self.matrices).flatten(2)

    def make_head(self, model: Davidson, penalties: dict[str, float]) -> DavidsonHead:
        """Make the head that reads states as they are."""
        head = DavidsonHead(*self.mean.shape[1:])
        full = torch.zeros(self.mean.shape, dtype=torch.float64)
        shape = (-1, *self.matrices.shape[1::2])  # no read-out, or a second part
        for side, found in enumerate((model.differences, model.shared)):
            weights = torch.from_numpy(found).double().unflatten(0, shape)
            for place, weight in enumerate(weights, start=2 * side):
                scaled = self.matrices[place].double() * penalties[_PARTS[place]] ** -0.5
                full[place] = torch.einsum("lhk,lk->lh", scaled, weight)
        moved = (full * self.mean).sum((1, 2))
        biases = torch.stack([-moved[:2].sum(), model.intercept - moved[2:].sum()])
        head.load_state_dict({"weights": full.float(), "biases": biases.float()})
        return head.eval()


def find_columns(states: States, rows: np.ndarray, seed: int) -> Columns:
    """Find the columns in training battles, without their votes; `rows` are (N, 2) of states."""
    sample = rows[np.random.default_rng(seed).permutation(len(rows))[:_SAMPLE]]
    given, exchanged = (
        split_parts(torch.from_numpy(states.take(r)), states.hidden) for r in sample.T
    )
    mean = (given.mean(1) + exchanged.mean(1)) / 2
    mean[0] = 0  # keeps the sign of a difference
    battles = given - mean[:, None] + _SIGNS[..., None] * (exchanged - mean[:, None])
    spread = battles.square().mean(1).sqrt() / 2
    scale = torch.where(spread > 1e-6, 1 / spread, 0.0)
    battles *= scale[:, None]
    _, vectors = torch.linalg.eigh(torch.einsum("pmlh,pmlg->plhg", battles, battles))
    scale = scale / math.prod(mean.shape[1:]) ** 0.5  # so that the squares of a row sum to about 1
    return Columns(mean, scale[..., None] * vectors[..., -_MOST_DIRECTIONS:])


def project(states: States, rows: np.ndarray, columns: Columns) -> torch.Tensor:
    """Find the columns of N battles in both orders, (4, 2, N, columns), signs as of the given one.

    `rows` are (N, 2) of the states.
    """
    n_layers, _, n_directions = columns.matrices.shape[1:]
    found = torch.empty(4, 2, len(rows), n_layers * n_directions)
    for order in (0, 1):
        for places, some in states.stream(rows[:, order]):
            found[:, order, torch.from_numpy(places)] = columns.apply(some)
    found[:, 1] *= _SIGNS
    return found


def _blocks(columns: torch.Tensor, penalties: dict[str, float]) -> tuple[Blocks, Blocks]:
    """Scale (4, N, columns) by their penalties: what tells the winner, and what tells a tie."""
    parts: list[tuple[np.ndarray | csr_matrix, np.ndarray]] = []
    for part, name in zip(columns.numpy(), _PARTS, strict=True):
        scale = np.asarray(penalties[name] ** -0.5, dtype=np.float32)
        parts.append((part if scale else part[:, :0], scale))
    return Blocks(parts[:2]), Blocks(parts[2:])


def fit_head(columns: torch.Tensor, votes: np.ndarray, penalties: dict[str, float]) -> Davidson:
    """Fit to the mean of both readings, `columns` of `project`, and (N, C) shares of votes."""
    return fit_davidson(*_blocks(columns.mean(1), penalties), votes, ridge=1.0)


def predict_columns(
    model: Davidson, columns: torch.Tensor, penalties: dict[str, float]
) -> np.ndarray:
    """Predict from columns of `project` as the head serves, both orders' mean: (N, C)."""
    both = [model.predict(*_blocks(columns[:, order], penalties)) for order in (0, 1)]
    return np.mean(both, axis=0)


def choose_penalties(
    columns: torch.Tensor, taught: np.ndarray, votes: np.ndarray, groups: np.ndarray, seed: int
) -> tuple[dict[str, float], list[dict]]:
    """Choose the penalties, one after the other, by what is lost on prompts that were not seen.

    A penalty changes only for a gain above its standard error: with few battles the choice itself
    costs more than it brings. Heads learn from `taught` and are scored on `votes`, (N, C) each;
    `groups` has the prompt of each battle.

    Returns the penalties, infinite for a part that is not read, and a row per head tried: head
    (the part whose penalty is tried), penalty, train_loss and log_loss, nats per battle.
    """
    order = pd.Series(groups).sample(frac=1, random_state=seed).unique()
    some = np.argsort(pd.Index(order).get_indexer(groups), kind="stable")[:_MOST_TRIED]
    n_parts = min(_N_INNER, len(np.unique(groups[some])))
    parts = [*GroupKFold(n_parts).split(some, groups=groups[some])]

    def measure(penalties: dict[str, float]) -> tuple[float, np.ndarray]:
        """Measure the loss in training, and of each battle when it is not seen."""
        seen, unseen = [], np.empty(len(some))
        for train, test in parts:
            model = fit_head(columns[:, :, some[train]], taught[some[train]], penalties)
            probs = predict_columns(model, columns[:, :, some], penalties)
            losses = -(votes[some] * np.log(probs)).sum(axis=1)
            seen.append(losses[train].mean())
            unseen[test] = losses[test]
        return float(np.mean(seen)), unseen

    chosen, rows = _START, []
    _, kept = measure(chosen)
    for name in _START:
        found = []
        for penalty in PENALTIES:
            train_loss, losses = measure(chosen | {name: penalty})
            log_loss = float(losses.mean())
            row = {"head": name, "penalty": penalty, "train_loss": train_loss}
            rows.append(row | {"log_loss": log_loss})
            found.append((log_loss, penalty, losses))
        _, penalty, losses = min(found, key=lambda each: each[0])
        gains = kept - losses
        if gains.mean() > gains.std() / len(gains) ** 0.5:
            chosen, kept = chosen | {name: penalty}, losses
    return chosen, rows


def _mix(targets: np.ndarray, config: FinetuneConfig) -> tuple[np.ndarray, np.ndarray]:
    """What (N, 2, C) targets teach, (N, C), and what they are scored on.

    Teacher and vote are mixed by SOFT_WEIGHT, at a temperature of 1.
    """
    votes, soft = targets[:, 0].astype(float), targets[:, 1]
    has_vote, has_soft = (np.asarray(each.any(axis=1)) for each in (votes, soft))
    weight = (np.where(has_vote, config.soft_weight, 1.0) * has_soft)[:, None]
    return (1 - weight) * votes + weight * soft, np.where(has_vote[:, None], votes, soft)


def train_head(
    states: States, train_pairs: pd.DataFrame, heldout: pd.DataFrame, member: Member
) -> tuple[DavidsonHead, np.ndarray, dict]:
    """Choose penalties, fit a head to all training battles, and predict the held-out ones.

    Returns:
        The head; (N, C) probabilities of `heldout`, the mean of both orders; and the record of the
        training.
    """
    config, started = member.config, time.perf_counter()
    rows = states.find(make_keys(train_pairs))
    is_read = np.flatnonzero((rows >= 0).all(axis=1))
    train_pairs, rows = train_pairs.iloc[is_read], rows[is_read]
    directions = find_columns(states, rows, config.seed)
    columns = project(states, rows, directions)
    taught, votes = _mix(make_targets(train_pairs, config), config)
    groups = train_pairs["group"].to_numpy()
    penalties, tried = choose_penalties(columns, taught, votes, groups, config.seed)
    model = fit_head(columns, taught, penalties)
    head = directions.make_head(model, penalties)
    probs, swap_gap = predict_heldout(states, heldout, head)
    record = {
        "history": [{"fold": member.fold, "seed": config.seed} | row for row in tried],
        "penalties": {name: value for name, value in penalties.items() if value < math.inf},
        "n_parameters": sum(weight.numel() for weight in head.parameters()),
        "n_train_pairs": len(train_pairs),
        "swap_gap": swap_gap,
        "seconds": time.perf_counter() - started,
    }
    return head, probs, record


@torch.no_grad()
def predict_heldout(
    states: States, pairs: pd.DataFrame, head: DavidsonHead
) -> tuple[np.ndarray, float | None]:
    """Predict battles in both orders, (N, C), and measure the gap between the orders."""
    rows = states.find(make_keys(pairs))
    is_read = (rows >= 0).all(axis=1)
    if not is_read.any():
        return np.zeros((0, len(LABELS))), None
    both = np.empty((2, int(is_read.sum()), len(LABELS)))
    for order in (0, 1):
        for places, some in states.stream(rows[is_read, order]):
            both[order, places] = head(torch.from_numpy(some)).double().softmax(1).numpy()
    given, exchanged = both[0], swap_probs(both[1])
    probs = np.empty((len(pairs), len(LABELS)))
    probs[is_read] = (given + exchanged) / 2
    a, b, tie = probs[is_read].mean(axis=0)
    probs[~is_read] = ((a + b) / 2, (a + b) / 2, tie)  # no finite states: those of the others
    return probs, float(np.abs(given - exchanged).mean())


def write_member(
    head: DavidsonHead,
    probs: np.ndarray,
    record: dict,
    heldout: pd.DataFrame,
    member: Member,
    run_dir: Path,
    base: Path | None,
) -> None:
    """Write the folder of a finished model, as `FoldTrainer` writes others; it appears at once."""
    config = member.config
    source, tokenizer = find_base_folder(config, base), load_base_tokenizer(config, base)
    record = {"identity": member.identity, "predict_tokens": config.predict_tokens, **record}
    with atomic_folder(run_dir / "model" / member.name) as folder:
        write_head(head, config, source, tokenizer, folder)
        write_manifest(folder)  # without what follows, which a new prediction replaces
        if len(heldout):
            table = probs_table(heldout["id"], probs, fold=member.fold)
            write_table(folder / "oof.parquet", table)
        write_json(folder / RECORD, record)
