"""TODO"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeResult, minimize
from scipy.special import softmax
from sklearn.model_selection import GroupKFold

from src.utils.config import Config
from src.utils.schema import LABELS, TIE, check_probs
from src.utils.stats.scores import _CLIP, log_loss, row_losses

_POOLS = ("log", "linear")
# Standard deviations of the Gaussian priors of a blend: a few hundred rows cannot move it
# far, thousands can. Chosen on 898 real battles, see notebooks/LOG.md.
_WEIGHT_SD, _BIAS_SD = 0.07, 0.1
_N_REWEIGHTINGS = 200
_MIN_SCALE = 1e-3  # keeps the temperature finite when no member knows anything
_ABSENT_WEIGHT = 1e-9  # a member of no weight still speaks where it is alone


@dataclass(frozen=True)
class Blend(Config):
    """How to make one prediction of several: weighted mean, then temperature, then a bias for ties.

    On the log scale p ∝ exp(Σ wₘ log pₘ / T + b), on the linear one p ∝ exp(log(Σ wₘ pₘ) / T + b),
    where b is `tie_bias` for the tie and 0 for A and B alike, which keeps the mirror exact.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]  # one per member, at least 0, sum to 1
    temperature: float = 1.0  # above 1 makes the blend less sure
    tie_bias: float = 0.0  # nats added to the log probability of a tie
    pool: str = "log"  # scale of the mean: log or linear

    def __post_init__(self) -> None:
        """Check ranges."""
        if len(set(self.members)) != len(self.weights) or not self.members:
            raise ValueError(
                f"weights: expected one per distinct member {self.members}, got {self.weights}"
            )
        if min(self.weights) < 0 or not np.isclose(sum(self.weights), 1):
            raise ValueError(f"weights: expected at least 0 with sum 1, got {self.weights}")
        if not (
            np.isfinite(self.temperature) and self.temperature > 0 and np.isfinite(self.tie_bias)
        ):
            raise ValueError(
                f"temperature, tie_bias: expected finite, the first above 0, got {self.temperature}, {self.tie_bias}"
            )
        if self.pool not in _POOLS:
            raise ValueError(f"pool: expected one of {_POOLS}, got {self.pool!r}")


def fit_blend(members: Mapping[str, np.ndarray], labels: np.ndarray) -> Blend:
    """Fit weights, temperature and tie bias to votes by penalised log loss.

    Both scales of the mean are fitted and the better one kept; they have the same number
    of parameters, so neither has an edge. Gaussian priors pull towards temperature 1, no
    bias, and weights that say how surely each member is the best (`_prior_weights`): equal
    for members that cannot be told apart, all on the best where it is plain.

    Args:
        members: name -> (N, C) float, rows sum to 1; best predictions on held-out rows.
        labels: (N,) int in 0..C-1.

    Raises:
        ValueError: no members, or probabilities of one that are none.

    Source: log scale: Genest and Zidek 1986, logarithmic opinion pool; temperature: Guo et al.
    2017, arXiv:1706.04599; stacking: Yao et al. 2018, arXiv:1704.02030.
    """
    if not members:
        raise ValueError("members: expected at least one, got none")
    stacked = _stack(members, len(labels))
    prior = _prior_weights(stacked, np.asarray(labels))
    fits = [_fit_pool(stacked, np.asarray(labels), prior, pool) for pool in _POOLS[: len(members)]]
    best, pool = min(zip(fits, _POOLS, strict=False), key=lambda fit: fit[0].fun)
    scales, tie_bias = best.x[:-1], best.x[-1]
    weights = scales / scales.sum()
    return Blend(
        tuple(members), tuple(weights.tolist()), float(1 / scales.sum()), float(tie_bias), pool
    )


def apply_blend(blend: Blend, members: Mapping[str, np.ndarray]) -> np.ndarray:
    """Blend the members that are there, row by row.

    Args:
        blend: from `fit_blend`.
        members: name -> (N, C) float; a member may be missing, and any row of one may be NaN.
            The weights of those present are scaled to sum to 1.

    Returns:
        (N, C) float64, rows sum to 1.

    Raises:
        ValueError: a name that the blend does not know, or a row that no member has predicted.
    """
    unknown = sorted(set(members) - set(blend.members))
    if unknown or not members:
        raise ValueError(f"members: expected some of {list(blend.members)}, got {sorted(members)}")
    stacked = np.stack([np.asarray(probs, dtype=np.float64) for probs in members.values()])
    weights = (
        np.array([blend.weights[blend.members.index(name)] for name in members]) + _ABSENT_WEIGHT
    )
    present = np.isfinite(stacked).all(axis=2)  # (M, N)
    if not present.any(axis=0).all():
        row = int(np.flatnonzero(~present.any(axis=0))[0])
        raise ValueError(
            f"members: row {row}: expected a prediction by at least one of {sorted(members)}, got none"
        )
    shares = present * weights[:, None]
    logits = _pool(
        np.where(present[:, :, None], stacked, 1.0), shares / shares.sum(axis=0), blend.pool
    )
    return _sharpen(logits, 1 / blend.temperature, blend.tie_bias)


def cross_fit_blend(
    members: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    n_folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Blend honestly: each row by a blend that was fitted on other groups.

    Args:
        members: name -> (N, C) float, rows sum to 1.
        labels: (N,) int in 0..C-1.
        groups: (N,) any hashable; a group is never split.
        n_folds: parts; at most the number of groups.
        seed: of the parting.

    Returns:
        (N, C) float64, rows sum to 1.
    """
    labels = np.asarray(labels)
    codes, _ = pd.factorize(np.asarray(groups))
    blended = np.full((len(labels), len(LABELS)), np.nan)
    for fit_rows, held_rows in GroupKFold(n_folds, shuffle=True, random_state=seed).split(
        codes, groups=codes
    ):
        blend = fit_blend(
            {name: probs[fit_rows] for name, probs in members.items()}, labels[fit_rows]
        )
        blended[held_rows] = apply_blend(
            blend, {name: probs[held_rows] for name, probs in members.items()}
        )
    return blended


def choose_blend(
    members: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    n_folds: int = 5,
    seed: int = 0,
) -> tuple[Blend, np.ndarray, str]:
    """Publish the blend where it is no worse than the best member alone, else that member.

    Args:
        members: name -> (N, C) float, rows sum to 1.
        labels: (N,) int in 0..C-1.
        groups: (N,) any hashable; a group is never split.
        n_folds: parts of the cross-fit.
        seed: of the parting.

    Returns:
        The blend to publish, which knows every member; its probabilities on these rows,
        (N, C), each row by a blend that did not see it; and a sentence that says which was
        chosen and why.
    """
    blended = cross_fit_blend(members, labels, groups, n_folds, seed)
    losses = {name: log_loss(probs, labels) for name, probs in members.items()}
    best, loss = min(losses, key=losses.get), log_loss(blended, labels)
    said = f"cross-fitted blend {loss:.4f}, best member {best} alone {losses[best]:.4f} nats per battle"
    if loss <= losses[best]:
        return fit_blend(members, labels), blended, f"The blend is published: {said}."
    weights = tuple(float(name == best) for name in members)
    return (
        Blend(tuple(members), weights),
        members[best],
        f"The blend is no better and {best} is published: {said}.",
    )


def _stack(members: Mapping[str, np.ndarray], n_pairs: int) -> np.ndarray:
    for name, probs in members.items():
        try:
            check_probs(probs, n_pairs=n_pairs)
        except ValueError as error:
            raise ValueError(f"member {name!r}: {error}") from error
    return np.stack([np.asarray(probs, dtype=np.float64) for probs in members.values()])


def _pool(stacked: np.ndarray, shares: np.ndarray, pool: str) -> np.ndarray:
    """Mean of (M, N, C) with shares (M, N) that sum to 1 over M; log scale, (N, C)."""
    if pool == "linear":
        return np.log(np.clip(np.einsum("mnc,mn->nc", stacked, shares), _CLIP, 1))
    return np.einsum("mnc,mn->nc", np.log(np.clip(stacked, _CLIP, 1)), shares)


def _sharpen(logits: np.ndarray, scale: float, tie_bias: float) -> np.ndarray:
    logits = scale * logits
    logits[:, TIE] += tie_bias
    return softmax(logits, axis=1)


def _prior_weights(stacked: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How surely each member is the best, (M,): pseudo-BMA+, Yao et al. 2018, section 3.4.

    Rows are reweighted at random (a Bayesian bootstrap), so that a lead that rests on
    chance is shared out.
    """
    losses = np.stack([row_losses(probs, labels) for probs in stacked])
    rng = np.random.default_rng(0)
    draws = [softmax(-losses @ rng.exponential(size=len(labels))) for _ in range(_N_REWEIGHTINGS)]
    return np.mean(draws, axis=0)


def _fit_pool(
    stacked: np.ndarray, labels: np.ndarray, prior: np.ndarray, pool: str
) -> OptimizeResult:
    """Minimise the penalised log loss over (weight / temperature of each member, tie bias)."""
    n_members, n_pairs = stacked.shape[:2]

    def penalised_loss(x: np.ndarray) -> float:
        scales, tie_bias = x[:-1], x[-1]
        shares = np.repeat((scales / scales.sum())[:, None], n_pairs, axis=1)
        probs = _sharpen(_pool(stacked, shares, pool), scales.sum(), tie_bias)
        penalty = ((scales - prior) ** 2).sum() / _WEIGHT_SD**2 + (tie_bias / _BIAS_SD) ** 2
        return log_loss(probs, labels) + penalty / 2 / n_pairs

    floor = _MIN_SCALE / n_members
    bounds = [(floor, 10.0)] * n_members + [(-5.0, 5.0)]
    start = np.append(np.maximum(prior, floor), 0.0)
    return minimize(penalised_loss, start, method="L-BFGS-B", bounds=bounds)
