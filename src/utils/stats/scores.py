"""How good probabilities are, how sure we are of that, and how to blend several models.

Every loss is in nats per battle. Intervals resample groups (battles that share a
prompt), not rows, since rows of one group are no independent evidence. A blend is
symmetric by construction: A and B share one bias, so exchanging the answers
exchanges the two columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeResult, minimize
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.model_selection import GroupKFold

from src.utils.config import Config
from src.utils.schema import A_WINS, B_WINS, LABEL_NAMES, LABELS, TEXTS, TIE, Turns, check_probs

_CLIP = 1e-15  # the competition's
_POOLS = ("log", "linear")
# Standard deviations of the Gaussian priors of a blend: a few hundred rows cannot move it
# far, thousands can. Chosen on 898 real battles, see notebooks/LOG.md.
_WEIGHT_SD, _BIAS_SD = 0.07, 0.1
_N_REWEIGHTINGS = 200
_MIN_BIN = 40  # battles in a bin of a reliability curve
_MIN_SCALE = 1e-3  # keeps the temperature finite when no member knows anything
_ABSENT_WEIGHT = 1e-9  # a member of no weight still speaks where it is alone


def row_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score each battle by minus the log of the probability that its vote was given.

    Args:
        probs: (N, C) float; clipped to [1e-15, 1] and renormalised as the competition does.
        labels: (N,) int in 0..C-1.

    Returns:
        (N,) float64, nats.

    Example:
        [[.5, .25, .25]] with label 0 -> [0.693]
    """
    clipped = np.clip(np.asarray(probs, dtype=np.float64), _CLIP, 1)
    labels = np.asarray(labels)
    if clipped.ndim != 2 or labels.shape != clipped.shape[:1]:
        raise ValueError(f"labels: expected one for each row of probs {clipped.shape}, got shape {labels.shape}")
    return np.log(clipped.sum(axis=1)) - np.log(clipped[np.arange(len(labels)), labels])


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `row_losses`, nats per battle: the competition's score, lower is better."""
    return float(row_losses(probs, labels).mean())


def accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Share of battles whose likeliest class was the vote, 0..1."""
    return float((np.argmax(probs, axis=1) == labels).mean())


def brier(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance between probabilities and the one-hot vote, summed over classes, 0..2.

    Source: Brier 1950, Verification of forecasts expressed in terms of probability.
    """
    votes = np.eye(np.shape(probs)[1])[labels]
    return float(((probs - votes) ** 2).sum(axis=1).mean())


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> float:
    """How far confidence and accuracy lie apart, on average over bins of confidence, 0..1.

    Args:
        probs: (N, C) float, rows sum to 1.
        labels: (N,) int in 0..C-1.
        n_bins: bins of equal width on [0, 1].

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence = np.max(probs, axis=1)
    hit = np.argmax(probs, axis=1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=hit - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def swap_consistency(probs: np.ndarray, probs_swapped: np.ndarray) -> float:
    """Mean absolute difference between p(A, B) and the mirrored p(B, A); 0 is symmetric.

    Args:
        probs: (N, C) float, rows sum to 1.
        probs_swapped: (N, C) float, the same battles predicted with A and B exchanged;
            columns still as the model gave them.
    """
    mirrored = np.asarray(probs_swapped)[:, [B_WINS, A_WINS, TIE]]
    return float(np.abs(np.asarray(probs) - mirrored).mean())


def class_prior(labels: np.ndarray) -> np.ndarray:
    """Share of each class, with one vote added to each so that none is zero: (N,) int -> (C,) float64."""
    counts = np.bincount(labels, minlength=len(LABELS)) + 1.0
    return counts / counts.sum()


def held_out_prior(labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Predict each battle by `class_prior` of the other folds, the rung below every model.

    Args:
        labels: (N,) int in 0..C-1.
        folds: (N,) any hashable.

    Returns:
        (N, C) float64, rows sum to 1.
    """
    probs = np.empty((len(labels), len(LABELS)))
    for fold in np.unique(folds):
        probs[folds == fold] = class_prior(labels[folds != fold])
    return probs


def score(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score probabilities in every way: log_loss (nats per battle), accuracy, brier, ece."""
    check_probs(probs, n_pairs=len(labels))
    return {
        "log_loss": log_loss(probs, labels),
        "accuracy": accuracy(probs, labels),
        "brier": brier(probs, labels),
        "ece": expected_calibration_error(probs, labels),
    }


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Estimate between what bounds the mean lies, by resampling whole groups.

    Args:
        values: (N,) float, e.g. row losses.
        groups: (N,) any hashable, e.g. the `group` column.
        n_boot: resamples.
        seed: of the resampling.
        level: share of the resampled means inside the bounds.

    Returns:
        Lower and upper bound, in the units of `values`.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval); Field and Welsh
    2007 for whole clusters.
    """
    codes, _ = pd.factorize(np.asarray(groups))
    sums, counts = np.bincount(codes, weights=np.asarray(values, dtype=np.float64)), np.bincount(codes)
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    for i in range(n_boot):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    losses_1: np.ndarray, losses_2: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Compare two models on the same battles: mean of losses_1 - losses_2 with its 95 % interval.

    Args:
        losses_1: (N,) float, `row_losses` of the first model, nats.
        losses_2: (N,) float, of the second, same rows.
        groups: (N,) any hashable; whole groups are resampled.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        mean, low, high in nats per battle; below 0 the first model is better.
    """
    differences = np.asarray(losses_1) - np.asarray(losses_2)
    low, high = bootstrap_interval(differences, groups, n_boot, seed)
    return {"mean": float(differences.mean()), "low": low, "high": high}


def reliability_curve(probs: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> pd.DataFrame:
    """Compare predicted and observed shares, class by class, in bins of equally many battles.

    Args:
        probs: (N, C) float, rows sum to 1.
        labels: (N,) int in 0..C-1.
        n_bins: bins per class; fewer come back where predictions repeat, or where a bin
            would hold fewer than 40 battles.

    Returns:
        One row per class and bin: label (int), predicted and observed (mean shares), low and
        high (95 % Wilson interval of observed), n_rows.
    """
    rows, n_bins = [], max(min(n_bins, len(probs) // _MIN_BIN), 1)
    for label in range(np.shape(probs)[1]):
        predicted, hit = probs[:, label], np.asarray(labels) == label
        bins = pd.qcut(predicted, n_bins, labels=False, duplicates="drop")
        bins = np.nan_to_num(np.asarray(bins, dtype=float))  # one value everywhere leaves no bin at all
        for b in np.unique(bins):
            inside = bins == b
            interval = binomtest(int(hit[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
            rows.append(
                (label, predicted[inside].mean(), hit[inside].mean(), interval.low, interval.high, inside.sum())
            )
    return pd.DataFrame(rows, columns=["label", "predicted", "observed", "low", "high", "n_rows"])


def compare_models(
    models: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    reference: str,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score several models on the same battles, beside one of them.

    Args:
        models: name -> (N, C) float, rows sum to 1.
        labels: (N,) int in 0..C-1.
        groups: (N,) any hashable; intervals resample whole groups.
        reference: the model that differences are taken to.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        One row a model: model, log_loss, low, high (nats, 95 %), accuracy, ece, difference,
        difference_low, difference_high (log loss less the reference's, paired).
    """
    losses = {name: row_losses(probs, labels) for name, probs in models.items()}
    rows = []
    for name, probs in models.items():
        low, high = bootstrap_interval(losses[name], groups, n_boot, seed)
        gap = paired_difference(losses[name], losses[reference], groups, n_boot, seed)
        scores = score(probs, labels)
        rows.append(
            {"model": name, "log_loss": scores["log_loss"], "low": low, "high": high}
            | {key: scores[key] for key in ("accuracy", "ece")}
            | {"difference": gap["mean"], "difference_low": gap["low"], "difference_high": gap["high"]}
        )
    return pd.DataFrame(rows)


def compare_slices(
    losses: np.ndarray,
    reference: np.ndarray,
    slices: Mapping[str, np.ndarray],
    groups: np.ndarray,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare a model with a reference on parts of the battles.

    Args:
        losses: (N,) float, `row_losses` of the model, nats.
        reference: (N,) float, of the reference, same rows.
        slices: name -> (N,) bool, the battles of that slice.
        groups: (N,) any hashable; intervals resample whole groups.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        One row a slice that holds at least two groups: slice, n_pairs, log_loss, reference,
        difference with its 95 % bounds low and high (paired; below 0 the model is better),
        and verdict: better, worse or no different, by whether the interval leaves 0 out.
    """
    rows = []
    for name, mask in slices.items():
        mask = np.asarray(mask, dtype=bool)
        if len(set(np.asarray(groups)[mask])) < 2:
            continue
        gap = paired_difference(losses[mask], reference[mask], np.asarray(groups)[mask], n_boot, seed)
        verdict = "better" if gap["high"] < 0 else "worse" if gap["low"] > 0 else "no different"
        rows.append((name, int(mask.sum()), losses[mask].mean(), reference[mask].mean(), *gap.values(), verdict))
    columns = ["slice", "n_pairs", "log_loss", "reference", "difference", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def preference_share(
    probs: np.ndarray, sides: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Measure how often the decided votes go to a named side, e.g. to the longer answer.

    Args:
        probs: (N, C) float, rows sum to 1; for people, the one-hot votes.
        sides: (N,) float; above 0 names A, below 0 names B, 0 leaves the battle out.
        groups: (N,) any hashable; intervals resample whole groups.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        share (0..1) with its 95 % bounds low and high, and n, the battles that count; NaN
        where none does.

    Example:
        probs [[.6, .2, .2]] with side +1 -> share .75
    """
    sides, kept = np.sign(sides), np.asarray(sides) != 0
    if not kept.any():
        return {"share": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    named = np.where(sides > 0, probs[:, A_WINS], probs[:, B_WINS])[kept]
    decided = probs[kept][:, [A_WINS, B_WINS]].sum(axis=1)
    share = named.sum() / max(decided.sum(), _CLIP)
    # The ratio of two means, linearised so that its interval is one of a mean.
    values = share + (named - share * decided) / max(decided.mean(), _CLIP)
    low, high = bootstrap_interval(values, np.asarray(groups)[kept], n_boot, seed)
    return {"share": float(share), "low": low, "high": high, "n": int(kept.sum())}


def confident_errors(pairs: pd.DataFrame, probs: np.ndarray, n_shown: int = 8, n_chars: int = 300) -> pd.DataFrame:
    """Pick the battles whose vote was held least likely, and cut their texts to be read.

    Args:
        pairs: N battles with `label`; texts are tuples of turns.
        probs: (N, C) float, rows sum to 1.
        n_shown: battles at most.
        n_chars: characters of each text at most.

    Returns:
        One row a battle, the worst first: id, vote, held likeliest, p(vote), prompt,
        response_a, response_b, turns parted by ‖. Plain text, safe for UTF-8; it is not
        escaped, which `DataFrame.to_html` does unless told otherwise.
    """
    labels = pairs["label"].to_numpy(dtype=int)
    worst = np.argsort(-row_losses(probs, labels), kind="stable")[:n_shown]
    names = np.array(LABEL_NAMES)
    columns = {
        "id": pairs["id"].to_numpy()[worst],
        "vote": names[labels[worst]],
        "held likeliest": names[probs[worst].argmax(axis=1)],
        "p(vote)": probs[worst, labels[worst]].round(3),
    }
    return pd.DataFrame(columns | {name: [_excerpt(pairs[name].iloc[i], n_chars) for i in worst] for name in TEXTS})


def _excerpt(turns: Turns, n_chars: int) -> str:
    joined = " ‖ ".join(" ".join((turn or "").split()) or "(nothing)" for turn in turns)
    text = joined.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= n_chars else text[:n_chars] + " …"


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
            raise ValueError(f"weights: expected one per distinct member {self.members}, got {self.weights}")
        if min(self.weights) < 0 or not np.isclose(sum(self.weights), 1):
            raise ValueError(f"weights: expected at least 0 with sum 1, got {self.weights}")
        if not (np.isfinite(self.temperature) and self.temperature > 0 and np.isfinite(self.tie_bias)):
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
    return Blend(tuple(members), tuple(weights.tolist()), float(1 / scales.sum()), float(tie_bias), pool)


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
    weights = np.array([blend.weights[blend.members.index(name)] for name in members]) + _ABSENT_WEIGHT
    present = np.isfinite(stacked).all(axis=2)  # (M, N)
    if not present.any(axis=0).all():
        row = int(np.flatnonzero(~present.any(axis=0))[0])
        raise ValueError(f"members: row {row}: expected a prediction by at least one of {sorted(members)}, got none")
    shares = present * weights[:, None]
    logits = _pool(np.where(present[:, :, None], stacked, 1.0), shares / shares.sum(axis=0), blend.pool)
    return _sharpen(logits, 1 / blend.temperature, blend.tie_bias)


def cross_fit_blend(
    members: Mapping[str, np.ndarray], labels: np.ndarray, groups: np.ndarray, n_folds: int = 5, seed: int = 0
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
    for fit_rows, held_rows in GroupKFold(n_folds, shuffle=True, random_state=seed).split(codes, groups=codes):
        blend = fit_blend({name: probs[fit_rows] for name, probs in members.items()}, labels[fit_rows])
        blended[held_rows] = apply_blend(blend, {name: probs[held_rows] for name, probs in members.items()})
    return blended


def choose_blend(
    members: Mapping[str, np.ndarray], labels: np.ndarray, groups: np.ndarray, n_folds: int = 5, seed: int = 0
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
    return Blend(tuple(members), weights), members[best], f"The blend is no better and {best} is published: {said}."


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


def _fit_pool(stacked: np.ndarray, labels: np.ndarray, prior: np.ndarray, pool: str) -> OptimizeResult:
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
