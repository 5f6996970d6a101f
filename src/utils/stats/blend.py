"""Blend several models: weighted mean, temperature and tie bias, fitted to held-out votes.

A blend is symmetric by construction: A and B share one bias, so exchanging the answers
exchanges the two columns. In all functions `members` is name -> (N, C) float, held-out
predictions whose rows sum to 1, `labels` (N,) int in 0..C-1, and `groups` (N,) any hashable.
"""

from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.optimize import OptimizeResult, minimize
from scipy.special import softmax
from sklearn.model_selection import GroupKFold

from src.utils.config import Config
from src.utils.runs import read_json
from src.utils.schema import LABELS, TIE, check_probs, probs_of, probs_table
from src.utils.stats.scores import MIN_PROB, log_loss, row_losses

Members = Mapping[str, np.ndarray]
Pool = Literal["log", "linear"]
# Standard deviations of the Gaussian priors of a blend: a few hundred rows cannot move it
# far, thousands can. Chosen on 898 real battles, see notebooks/LOG.md.
_WEIGHT_SD, _BIAS_SD = 0.07, 0.1
_N_REWEIGHTINGS = 200
_MIN_SCALE = 1e-3  # keeps the temperature finite when no member knows anything
_MIN_WEIGHT = 1e-9  # a member of weight 0 still counts where it is the only one


@dataclass(frozen=True)
class Blend(Config):
    """How to combine several predictions: weighted mean, then temperature, then a bias for ties.

    On the log scale p ∝ exp(Σ wₘ log pₘ / T + b), on the linear one p ∝ exp(log(Σ wₘ pₘ) / T + b),
    where b is `tie_bias` for the tie and 0 for A and B, which keeps the mirror exact.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]  # one per member, at least 0, sum to 1
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # above 1: less confident
    tie_bias: float = Field(default=0.0, allow_inf_nan=False)  # added to a tie's log probability
    pool: Pool = "log"  # scale of the mean

    def __post_init__(self) -> None:
        """Check what spans several fields."""
        if len(set(self.members)) != len(self.weights) or not self.members:
            names = f"distinct member {self.members}"
            raise ValueError(f"weights: expected one per {names}, got {self.weights}")
        if min(self.weights) < 0 or not np.isclose(sum(self.weights), 1):
            raise ValueError(f"weights: expected at least 0 with sum 1, got {self.weights}")


def read_members(
    runs: Mapping[str, Path | None],
    battles: pd.DataFrame,
    data_hash: str,
    own: Mapping[str, pd.DataFrame] | None = None,
) -> tuple[dict[str, np.ndarray], pd.DataFrame, list[str]]:
    """Read the predictions of all complete runs, on the battles that all of them held out.

    `runs` is name -> run folder, None where there is no complete run; one whose `data_hash`
    differs was made from other battles and is skipped. `own`, name -> predictions of a run that is
    not yet complete, is compared on all its battles: runs that lack some of them are skipped, too.

    Returns:
        `members`, the battles that they predict, and a line per run: read, or why skipped.
    """
    tables, notes = {}, []
    own = {name: oof.set_index("id") for name, oof in (own or {}).items()}
    for name, folder in runs.items():
        if folder is None:
            notes.append(f"{name}: skipped, no complete run")
        elif read_json(folder / "metrics.json")["data_hash"] != data_hash:
            notes.append(f"{name}: skipped, made from other battles or folds")
        else:
            table = pd.read_parquet(folder / "oof.parquet").set_index("id")
            if not all(rows.index.isin(table.index).all() for rows in own.values()):
                notes.append(f"{name}: skipped, held out other battles")
                continue
            tables[name] = table
            notes.append(f"{name}: {len(tables[name]):,} held-out battles")
    tables |= own
    if not tables:
        raise ValueError(f"members: expected a complete run of one of {list(runs)}, got {notes}")
    shared = [battles["id"].isin(table.index) for table in tables.values()]
    pairs = battles[np.all(shared, axis=0)].reset_index(drop=True)
    if pairs.empty:
        raise ValueError(f"members: expected battles held out by all, found none: {notes}")
    return {name: probs_of(table.loc[pairs["id"]]) for name, table in tables.items()}, pairs, notes


def fit_blend(members: Members, labels: np.ndarray) -> Blend:
    """Fit weights, temperature and tie bias to votes by penalised log loss, on the better scale.

    Gaussian priors pull towards temperature 1, no bias, and weights that are the probability of
    each member to be the best (`_prior_weights`).

    Source: log scale: Genest and Zidek 1986, logarithmic opinion pool; temperature: Guo et al.
        2017, arXiv:1706.04599; stacking: Yao et al. 2018, arXiv:1704.02030.
    """
    if not members:
        raise ValueError("members: expected at least one, got none")
    labels = np.asarray(labels)
    for name, probs in members.items():
        check_probs(probs, n_pairs=len(labels), name=f"member {name!r}")
    stacked = np.stack([np.asarray(probs, dtype=np.float64) for probs in members.values()])
    prior = _prior_weights(stacked, labels)
    # The two scales are the same for a single member.
    fits = {
        pool: _fit_pool(stacked, labels, prior, pool) for pool in get_args(Pool)[: len(members)]
    }
    pool = min(fits, key=lambda name: fits[name].fun)
    scales, tie_bias = fits[pool].x[:-1], float(fits[pool].x[-1])
    weights = tuple((scales / scales.sum()).tolist())
    return Blend(tuple(members), weights, float(1 / scales.sum()), tie_bias, pool)


def apply_blend(blend: Blend, members: Members) -> np.ndarray:
    """Blend the members that are there, row by row: (N, C) float64, rows sum to 1.

    A member may be missing, and any row of one may be NaN; the other weights are scaled up.
    ValueError for a name that the blend does not know, or a row that no member predicted.
    """
    unknown = sorted(set(members) - set(blend.members))
    if unknown or not members:
        raise ValueError(f"members: expected some of {list(blend.members)}, got {sorted(members)}")
    stacked = np.stack([np.asarray(probs, dtype=np.float64) for probs in members.values()])
    weights = np.array([blend.weights[blend.members.index(name)] for name in members])
    present = np.isfinite(stacked.sum(axis=2))  # (M, N)
    if not present.any(axis=0).all():
        row = int(present.any(axis=0).argmin())
        raise ValueError(f"row {row}: expected a prediction by one of {sorted(members)}, got none")
    shares = present * (weights + _MIN_WEIGHT)[:, None]
    stacked = np.where(present[:, :, None], stacked, 1.0)
    logits = _pool(stacked, shares / shares.sum(axis=0), blend.pool)
    return _sharpen(logits, 1 / blend.temperature, blend.tie_bias)


def cross_fit_blend(
    members: Members, labels: np.ndarray, groups: np.ndarray, n_folds: int = 5, seed: int = 0
) -> np.ndarray:
    """Blend each row with weights that were fitted on other groups: (N, C) float64."""
    labels, codes = np.asarray(labels), pd.factorize(np.asarray(groups))[0]
    blended = np.full((len(labels), len(LABELS)), np.nan)
    folds = GroupKFold(n_folds, shuffle=True, random_state=seed)
    for fit_rows, held_rows in folds.split(codes, groups=codes):
        seen = {name: probs[fit_rows] for name, probs in members.items()}
        held = {name: probs[held_rows] for name, probs in members.items()}
        blended[held_rows] = apply_blend(fit_blend(seen, labels[fit_rows]), held)
    return blended


def choose_blend(
    members: Members,
    labels: np.ndarray,
    blended: np.ndarray,
    names: Mapping[str, str] | None = None,
) -> tuple[Blend, np.ndarray, str]:
    """Choose what `cross_fit_blend` made where it is no worse than the best member, else that.

    Returns:
        The blend to publish, which knows every member; its probabilities, (N, C), none of them
        from a fit to its own row; and a sentence that gives the choice and why, with `names`
        in place of the members' own.
    """
    losses = {name: log_loss(probs, labels) for name, probs in members.items()}
    best, loss = min(losses, key=lambda name: losses[name]), log_loss(blended, labels)
    name = (names or {}).get(best, best)
    scores = f"cross-fitted blend {loss:.4f}, best member {name} alone {losses[best]:.4f} nats"
    if loss <= losses[best]:
        return fit_blend(members, labels), blended, f"The blend is published: {scores}."
    alone = Blend(tuple(members), tuple(float(name == best) for name in members))
    return alone, members[best], f"The blend is no better, so {name} is published: {scores}."


def make_soft_labels(
    blend: Blend,
    runs: Mapping[str, Path],
    battles: pd.DataFrame,
    pairs: pd.DataFrame,
    probs: np.ndarray,
) -> pd.DataFrame:
    """Make a soft label of every battle that at least one member of a blend held out.

    `pairs`, which all members held out, keep `probs`, (N, C), where no row was fitted to its own
    vote. Others get the blend of the members that they have, the other weights scaled up; no
    weight was fitted to them. `runs` is name -> run folder, `battles` are all, in order.

    Returns:
        id, `members` (the names that count in this row, e.g. "02_baseline + 04_qwen"), and one
        float32 column per class.
    """
    tables = [pd.read_parquet(runs[name] / "oof.parquet") for name in blend.members]
    # Reindexed to all battles: NaN where a member did not hold a battle out.
    held = [table.set_index("id").reindex(battles["id"])[list(LABELS)] for table in tables]
    stacked = np.stack([table.to_numpy(dtype=np.float64) for table in held])
    present = np.isfinite(stacked).all(axis=2)
    has_any = present.any(axis=0)
    ids = battles["id"][has_any]
    blended = apply_blend(blend, dict(zip(blend.members, stacked[:, has_any], strict=True)))
    blended[pd.Index(ids).get_indexer(pairs["id"])] = probs
    counts = present & (np.array(blend.weights) > 0)[:, None]
    counts = np.where(counts.any(axis=0), counts, present)[:, has_any]
    names = [" + ".join(compress(blend.members, column)) for column in counts.T]
    return probs_table(ids, blended, members=names)


def _pool(stacked: np.ndarray, shares: np.ndarray, pool: Pool) -> np.ndarray:
    """Mean of (M, N, C) with shares (M, N) that sum to 1 over M; log scale, (N, C)."""
    if pool == "linear":
        return np.log(np.clip(np.einsum("mnc,mn->nc", stacked, shares), MIN_PROB, 1))
    return np.einsum("mnc,mn->nc", np.log(np.clip(stacked, MIN_PROB, 1)), shares)


def _sharpen(logits: np.ndarray, scale: float, tie_bias: float) -> np.ndarray:
    logits = scale * logits
    logits[:, TIE] += tie_bias
    return softmax(logits, axis=1)


def _prior_weights(stacked: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probability of each member to be the best, (M,): pseudo-BMA+, Yao et al. 2018, section 3.4.

    Rows are reweighted at random (a Bayesian bootstrap), so that a lead by chance is shared.
    """
    losses = np.stack([row_losses(probs, labels) for probs in stacked])
    rng = np.random.default_rng(0)
    draws = [softmax(-losses @ rng.exponential(size=len(labels))) for _ in range(_N_REWEIGHTINGS)]
    return np.mean(draws, axis=0)


def _fit_pool(
    stacked: np.ndarray, labels: np.ndarray, prior: np.ndarray, pool: Pool
) -> OptimizeResult:
    """Minimise the penalised log loss over (weight / temperature of each member, tie bias)."""
    n_members, n_pairs = stacked.shape[:2]

    def penalised_loss(x: np.ndarray) -> float:
        scales, tie_bias = x[:-1], x[-1]
        shares = np.repeat((scales / scales.sum())[:, None], n_pairs, axis=1)
        probs = _sharpen(_pool(stacked, shares, pool), scales.sum(), tie_bias)
        penalty = ((scales - prior) ** 2).sum() / _WEIGHT_SD**2 + (tie_bias / _BIAS_SD) ** 2
        return log_loss(probs, labels) + penalty / 2 / n_pairs

    lowest = _MIN_SCALE / n_members
    bounds = [(lowest, 10.0)] * n_members + [(-5.0, 5.0)]
    start = np.append(np.maximum(prior, lowest), 0.0)
    return minimize(penalised_loss, start, method="L-BFGS-B", bounds=bounds)
