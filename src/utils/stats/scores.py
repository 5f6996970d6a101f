"""How good probabilities are, how sure we are of that, and how to blend several models.

Every loss is in nats per battle. Intervals resample groups (battles that share a
prompt), not rows, since rows of one group are no independent evidence. A blend is
symmetric by construction: A and B share one bias, so exchanging the answers
exchanges the two columns.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from src.utils.schema import (
    A_WINS,
    B_WINS,
    LABEL_NAMES,
    LABELS,
    TEXTS,
    TIE,
    Turns,
    check_probs,
    probs_of,
)

_CLIP = 1e-15  # the competition's
_MIN_BIN = 40  # battles in a bin of a reliability curve


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
        raise ValueError(
            f"labels: expected one for each row of probs {clipped.shape}, got shape {labels.shape}"
        )
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


def swap_gap(probs: np.ndarray, probs_swapped: np.ndarray) -> float:
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
    sums, counts = (
        np.bincount(codes, weights=np.asarray(values, dtype=np.float64)),
        np.bincount(codes),
    )
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    for i in range(n_boot):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    losses_1: np.ndarray,
    losses_2: np.ndarray,
    groups: np.ndarray,
    n_boot: int = 1000,
    seed: int = 0,
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
        bins = np.nan_to_num(
            np.asarray(bins, dtype=float)
        )  # one value everywhere leaves no bin at all
        for b in np.unique(bins):
            inside = bins == b
            interval = binomtest(int(hit[inside].sum()), int(inside.sum())).proportion_ci(
                method="wilson"
            )
            rows.append(
                (
                    label,
                    predicted[inside].mean(),
                    hit[inside].mean(),
                    interval.low,
                    interval.high,
                    inside.sum(),
                )
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
            | {
                "difference": gap["mean"],
                "difference_low": gap["low"],
                "difference_high": gap["high"],
            }
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
        gap = paired_difference(
            losses[mask], reference[mask], np.asarray(groups)[mask], n_boot, seed
        )
        verdict = "better" if gap["high"] < 0 else "worse" if gap["low"] > 0 else "no different"
        rows.append(
            (
                name,
                int(mask.sum()),
                losses[mask].mean(),
                reference[mask].mean(),
                *gap.values(),
                verdict,
            )
        )
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


def confident_errors(
    pairs: pd.DataFrame, probs: np.ndarray, n_shown: int = 8, n_chars: int = 300
) -> pd.DataFrame:
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
    return pd.DataFrame(
        columns | {name: [_excerpt(pairs[name].iloc[i], n_chars) for i in worst] for name in TEXTS}
    )


def _excerpt(turns: Turns, n_chars: int) -> str:
    joined = " ‖ ".join(" ".join((turn or "").split()) or "(nothing)" for turn in turns)
    text = joined.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= n_chars else text[:n_chars] + " …"


def summarise(
    oof: pd.DataFrame,
    pairs: pd.DataFrame,
    truth: np.ndarray | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Score held-out probabilities beside what knows nothing and what knows everything.

    Args:
        oof: id and one probability per class, N battles of `pairs` in any order.
        pairs: every battle, with id, label, group and fold.
        truth: (N, C) float, the true probabilities in the order of `oof`, where known.
        n_boot: resamples of the interval.
        seed: of the resampling.

    Returns:
        What `score` returns; log_loss_low and log_loss_high, a 95 % interval; prior_log_loss, of
        the class prior of the other folds; with `truth` oracle_log_loss and excess_log_loss.

    Raises:
        KeyError: `oof` has a battle that `pairs` lacks.
    """
    places = pd.Series(np.arange(len(pairs)), index=pairs["id"]).loc[list(oof["id"])].to_numpy()
    prior = held_out_prior(pairs["label"].to_numpy(), pairs["fold"].to_numpy())[places]
    labels, groups = pairs["label"].to_numpy()[places], pairs["group"].to_numpy()[places]
    probs = probs_of(oof)
    low, high = bootstrap_interval(row_losses(probs, labels), groups, n_boot, seed)
    summary = score(probs, labels) | {"log_loss_low": low, "log_loss_high": high}
    summary["prior_log_loss"] = log_loss(prior, labels)
    if truth is not None:
        summary["oracle_log_loss"] = log_loss(truth, labels)
        summary["excess_log_loss"] = summary["log_loss"] - summary["oracle_log_loss"]
    return summary
