"""Train a small head on the states of a frozen base: on the CPU, in minutes.

The states are standardised and, where they are many, projected onto the directions in which those
of each layer and place vary most. A logistic regression and a network of two layers are tried,
each with several penalties, by cross-validation grouped by prompt inside the training battles, so
that nothing that scores a fold is chosen on it. Both readings of a battle are learned from, with
exchanged votes.

For 57,477 battles and two layers of 2,560: 1,536 projected columns, 0.7 GB in 32 bit and 3 GB in
all at the peak; a head takes minutes on two cores.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import GroupKFold
from torch import nn

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import find_base_folder, load_base_tokenizer, write_head
from src.utils.models.frozen import make_head
from src.utils.runs import atomic_folder, write_json, write_manifest, write_table
from src.utils.schema import LABELS, probs_table, swap_probs
from src.utils.training.data import loss_of, make_targets
from src.utils.training.earlier import RECORD
from src.utils.training.heldout import Member
from src.utils.training.states import States, make_keys

HEAD_COLUMNS = ("fold", "seed", "head", "penalty", "train_loss", "log_loss")
# Sum of squared weights that costs a battle's nat, times two; it does not grow with the battles.
PENALTIES = {"logistic": (100.0, 1e3, 3e3, 1e4, 3e4, 1e5), "network": (100.0, 1e3, 1e4)}
_N_HIDDEN = {"logistic": 0, "network": 64}
_N_INNER = 3  # parts of the cross-validation
_MOST_TRIED = 20_000  # battles of the cross-validation at most
_MOST_DIRECTIONS = 256  # of one layer and place
_SAMPLE = 8192  # readings that the directions are found in
_N_EPOCHS, _ROWS_PER_STEP, _RATE, _DROPOUT = 12, 256, 1e-3, 0.2  # of the network


@dataclass
class Columns:
    """How states become the columns that a head is trained on: x = (states − mean) @ matrix."""

    mean: np.ndarray  # (width,) float32
    scale: np.ndarray  # (width,) one over the standard deviation
    directions: list[np.ndarray] | None  # of each layer and place, (hidden, k), orthonormal

    def apply(self, states: np.ndarray) -> np.ndarray:
        """Turn (M, width) states into (M, columns) float32."""
        standard = (states - self.mean) * self.scale
        if self.directions is None:
            return standard
        blocks = np.split(standard, len(self.directions), axis=1)
        return np.concatenate([b @ d for b, d in zip(blocks, self.directions, strict=True)], axis=1)

    def unfold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a layer on columns, (outputs, columns) and (outputs,), into one on states."""
        full = weight.double().numpy()
        if self.directions is not None:
            ends = np.cumsum([d.shape[1] for d in self.directions])[:-1]
            blocks = np.split(full, ends, axis=1)
            pairs = zip(blocks, self.directions, strict=True)
            full = np.concatenate([block @ d.T for block, d in pairs], axis=1)
        full = full * self.scale
        shifted = bias.double().numpy() - full @ self.mean
        return torch.from_numpy(full).float(), torch.from_numpy(shifted).float()


def find_columns(states: States, rows: np.ndarray, seed: int) -> Columns:
    """Find mean, scale and directions from the readings of the training battles, without votes."""
    total, squares = np.zeros(states.width), np.zeros(states.width)
    for _, some in states.stream(rows):
        total += some.sum(axis=0, dtype=np.float64)
        squares += np.square(some, dtype=np.float64).sum(axis=0)
    mean = total / len(rows)
    spread = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))
    scale = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
    columns = Columns(mean.astype(np.float32), scale.astype(np.float32), None)
    if states.width // states.n_blocks <= _MOST_DIRECTIONS:
        return columns
    sample = np.random.default_rng(seed).permutation(len(rows))[:_SAMPLE]
    blocks = np.split(columns.apply(states.take(rows[sample])), states.n_blocks, axis=1)
    columns.directions = []
    for block in blocks:
        _, vectors = np.linalg.eigh(block.T @ block)
        columns.directions.append(vectors[:, -_MOST_DIRECTIONS:].astype(np.float32))
    return columns


@dataclass
class Readings:
    """Columns and targets of N battles in both orders."""

    columns: torch.Tensor  # (2, N, columns) float32
    targets: torch.Tensor  # (2, N, 2, C) float32, of `make_targets`

    def part(self, battles: np.ndarray) -> "Readings":
        """Return the readings of some battles."""
        chosen = torch.from_numpy(battles)
        return Readings(self.columns[:, chosen], self.targets[:, chosen])


def fit_head(
    kind: str, penalty: float, readings: Readings, config: FinetuneConfig
) -> nn.Sequential:
    """Fit a head: its mean loss (`loss_of`) over the readings, and a penalty on squared weights.

    The regression is fitted to the end by L-BFGS; the network for 12 epochs by Adam, with a rate
    that goes to zero.
    """
    torch.manual_seed(config.seed)
    x, targets = readings.columns.flatten(0, 1), readings.targets.flatten(0, 1)
    head = make_head(x.shape[1], _N_HIDDEN[kind])
    matrices = [weight for weight in head.parameters() if weight.ndim > 1]

    def measure(rows: torch.Tensor, wanted: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        loss, _ = loss_of(head(nn.functional.dropout(rows, dropout)), wanted, config)
        squares = sum(weight.square().sum() for weight in matrices)
        return loss / len(rows) + penalty / 2 * squares / len(x)

    if kind == "logistic":
        for weight in head.parameters():
            nn.init.zeros_(weight)
        solver = torch.optim.LBFGS(
            head.parameters(), max_iter=150, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )
        solver.step(lambda: _take_back(measure(x, targets), solver))
        return head.eval()
    optimizer = torch.optim.Adam(head.parameters(), lr=_RATE)
    n_steps = _N_EPOCHS * -(-len(x) // _ROWS_PER_STEP)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, n_steps + 1)
    for _ in range(_N_EPOCHS):
        for some in torch.randperm(len(x)).split(_ROWS_PER_STEP):
            _take_back(measure(x[some], targets[some], _DROPOUT), optimizer)
            optimizer.step()
            schedule.step()
    return head.eval()


def _take_back(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss.backward()
    return loss


@torch.no_grad()
def predict_readings(head: nn.Sequential, columns: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Predict battles from (2, N, columns): (N, C) float64 in both orders, columns as given."""
    given, exchanged = torch.softmax(head(columns).double(), dim=2).numpy()
    return given, swap_probs(exchanged)


def score(head: nn.Sequential, readings: Readings, config: FinetuneConfig) -> float:
    """Score the mean over both orders: nats per battle, as `loss_of` reports them."""
    probs = np.mean(predict_readings(head, readings.columns), axis=0)
    logits = torch.from_numpy(np.log(np.maximum(probs, 1e-30))).float()
    return float(loss_of(logits, readings.targets[0], config)[1] / len(probs))


def try_heads(readings: Readings, groups: np.ndarray, config: FinetuneConfig) -> list[dict]:
    """Try each kind of head with each penalty: what they lose on prompts that they did not see.

    `groups` has the prompt of each battle. Returns one row per head, the best first: head, penalty,
    train_loss and log_loss, nats per battle, seconds.
    """
    some = np.arange(len(groups))
    if len(groups) > _MOST_TRIED:
        order = pd.Series(groups).sample(frac=1, random_state=config.seed).unique()
        places = pd.Index(order).get_indexer(groups)
        some = np.sort(np.argsort(places, kind="stable")[:_MOST_TRIED])
    n_parts = min(_N_INNER, len(np.unique(groups[some])))
    parts = [*GroupKFold(n_parts).split(some, groups=groups[some])]
    rows = []
    for kind, penalties in PENALTIES.items():
        for penalty in penalties:
            started, losses = time.perf_counter(), []
            for train, test in parts:
                head = fit_head(kind, penalty, readings.part(some[train]), config)
                seen = score(head, readings.part(some[train]), config)
                losses.append([seen, score(head, readings.part(some[test]), config)])
            train_loss, log_loss = np.mean(losses, axis=0).tolist()
            row: dict[str, Any] = {"head": kind, "penalty": penalty, "train_loss": train_loss}
            seconds = time.perf_counter() - started
            rows.append(row | {"log_loss": log_loss, "seconds": seconds})
    return sorted(rows, key=lambda row: row["log_loss"])


def _project(states: States, rows: np.ndarray, columns: Columns) -> torch.Tensor:
    """Columns of N battles in both orders, (2, N, columns); `rows` are (N, 2) of the states."""
    wanted = rows.T.ravel()
    projected = torch.empty(0)
    for places, some in states.stream(wanted):
        found = torch.from_numpy(columns.apply(some))
        if not len(projected):
            projected = torch.empty(len(wanted), found.shape[1])
        projected[torch.from_numpy(places)] = found
    return projected.unflatten(0, (2, -1))


def train_head(
    states: States, train_pairs: pd.DataFrame, heldout: pd.DataFrame, member: Member
) -> tuple[nn.Sequential, np.ndarray, dict]:
    """Choose a head, fit it to all training battles, and predict the held-out ones.

    Returns:
        The head, which reads states as they are; (N, C) probabilities of `heldout`, the mean of
        both orders; and the record of the training.
    """
    config, started = member.config, time.perf_counter()
    rows = states.find(make_keys(train_pairs))
    is_read = np.flatnonzero((rows >= 0).all(axis=1))
    train_pairs, rows = train_pairs.iloc[is_read], rows[is_read]
    columns = find_columns(states, rows.ravel(), config.seed)
    targets = make_targets(train_pairs, config)
    both = torch.from_numpy(np.stack([targets, swap_probs(targets)]))
    readings = Readings(_project(states, rows, columns), both)
    tried = try_heads(readings, train_pairs["group"].to_numpy(), config)
    head = fit_head(tried[0]["head"], tried[0]["penalty"], readings, config)
    probs, swap_gap = _predict(states, heldout, columns, head)
    of_model = {"fold": member.fold, "seed": config.seed}
    record = {
        "history": [of_model | row for row in tried],
        "n_parameters": sum(weight.numel() for weight in head.parameters()),
        "n_train_pairs": len(train_pairs),
        "swap_gap": swap_gap,
        "seconds": time.perf_counter() - started,
    }
    return _unfold(head, columns), probs, record


def _predict(
    states: States, pairs: pd.DataFrame, columns: Columns, head: nn.Sequential
) -> tuple[np.ndarray, float | None]:
    """Predict battles in both orders, (N, C), and measure the gap between the orders."""
    rows = states.find(make_keys(pairs))
    is_read = (rows >= 0).all(axis=1)
    if not is_read.any():
        return np.zeros((0, len(LABELS))), None
    given, exchanged = predict_readings(head, _project(states, rows[is_read], columns))
    probs = np.empty((len(pairs), len(LABELS)))
    probs[is_read] = (given + exchanged) / 2
    a, b, tie = probs[is_read].mean(axis=0)
    probs[~is_read] = ((a + b) / 2, (a + b) / 2, tie)  # no finite states: those of the others
    return probs, float(np.abs(given - exchanged).mean())


def _unfold(head: nn.Sequential, columns: Columns) -> nn.Sequential:
    """Make the head that reads states as they are."""
    first: Any = head[0]
    weight, bias = columns.unfold(first.weight.detach(), first.bias.detach())
    served = make_head(weight.shape[1], len(bias) if len(head) > 1 else 0)
    served.load_state_dict(head.state_dict() | {"0.weight": weight, "0.bias": bias})
    return served.eval()


def write_member(
    head: nn.Sequential,
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
