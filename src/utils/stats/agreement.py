"""Measure how far people agree, and so how well any model could predict one vote.

Where several people voted on one battle, the votes of the others predict each vote in turn. In
all functions `votes` is (N, C) int, the votes on each battle in the order of `schema.LABELS`,
and `groups` (N,) the prompt of each battle, whose battles are resampled together.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.utils import schema
from src.utils.runs import read_json
from src.utils.schema import LABELS
from src.utils.stats import scores

SMOOTHING = 0.5  # votes added to each class, Jeffreys' prior: no share is 0
_REFERENCE = Path(__file__).with_name("human_reference.json")


def count_votes(pairs: pd.DataFrame) -> np.ndarray | None:
    """Take the votes on each battle, (N, C) int; None where no battle has two."""
    if not {*schema.VOTES} <= {*pairs.columns}:
        return None
    votes = pairs[list(schema.VOTES)].fillna(0).to_numpy(dtype=int)
    return votes if (votes.sum(axis=1) > 1).any() else None


def measure_agreement(
    votes: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Predict each vote by the other votes on its battle; battles with one vote are left out.

    Returns:
        agreement, the share of other people who voted as one did (0..1, mean over votes);
        log_loss, of the others' shares with `SMOOTHING` votes added to each class, and
        prior_log_loss, of the share of each vote among all (nats per vote); their 95 % bounds
        agreement_low, agreement_high, log_loss_low and log_loss_high, which resample prompts;
        n_votes, n_battles, n_prompts, and mean_others, the votes that predict one.
    """
    kept = votes.sum(axis=1) > 1
    votes, groups = votes[kept], np.asarray(groups)[kept]
    battles, labels = schema.spread_votes(votes)
    others = votes[battles] - np.eye(len(LABELS), dtype=int)[labels]
    n_others = others.sum(axis=1)
    agreed = others[np.arange(len(labels)), labels] / n_others
    smoothed = others + SMOOTHING
    losses = scores.row_losses(smoothed / smoothed.sum(axis=1, keepdims=True), labels)
    prior = np.tile(scores.class_prior(labels), (len(labels), 1))
    found: dict[str, Any] = {"prior_log_loss": scores.log_loss(prior, labels)}
    for name, values in (("agreement", agreed), ("log_loss", losses)):
        low, high = scores.bootstrap_interval(values, groups[battles], n_boot, seed)
        found |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    counts = {"n_votes": len(labels), "n_battles": len(votes), "n_prompts": len(set(groups))}
    return found | counts | {"mean_others": float(n_others.mean())}


def read_reference() -> dict[str, Any]:
    """Read what `measure_agreement` found on public votes, with `source`, `url` and `licence`."""
    return read_json(_REFERENCE)


def describe_agreement(found: dict[str, Any]) -> str:
    """Say in one sentence what `measure_agreement` found, and from how many prompts."""
    where = ""
    if "source" in found:
        where = f" ({found['source']}, {found['licence']}; {found['caveat']})"
    text = (
        "Two people agree on {agreement:.0%} of votes "
        "({agreement_low:.0%} to {agreement_high:.0%}); the other {mean_others:.1f} votes on a "
        "battle predict one at {log_loss:.2f} nats ({log_loss_low:.2f} to {log_loss_high:.2f}), "
        "where the class prior scores {prior_log_loss:.2f}: {n_votes:,} votes on {n_battles:,} "
        "battles, {n_prompts:,} prompts"
    )
    return f"{text.format(**found)}{where}."


def add_people(table: pd.DataFrame, found: dict[str, Any]) -> pd.DataFrame:
    """Add what `measure_agreement` found as a marked row to a table of `scores.compare_models`."""
    where = "other battles" if "source" in found else "the same battle"
    row = {"model": f"people: others' votes, on {where}*", "log_loss": found["log_loss"]}
    row |= {"low": found["log_loss_low"], "high": found["log_loss_high"]}
    return pd.concat([table, pd.DataFrame([row])], ignore_index=True)
