"""Score probabilities: log loss, calibration, comparisons, and cluster-bootstrap intervals.

Losses are in nats per battle. Intervals resample whole groups (battles that share a prompt),
because the votes of one group are not independent. In all functions `probs` is (N, C) float
with rows that sum to 1 and columns in the order of `schema.LABELS`, `labels` (N,) int in
0..C-1, `groups` (N,) any hashable, `n_boot` the number of resamples and `seed` their seed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import logit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.tools import add_constant

from src.utils.runs import read_json, to_records
from src.utils.schema import (
    A_WINS,
    B_WINS,
    LABEL_NAMES,
    LABELS,
    TEXTS,
    TIE,
    average_over_swap,
    check_probs,
    join_turns,
    list_votes,
    probs_of,
    swap_labels,
    swap_probs,
)

MIN_PROB = 1e-15  # the competition clips here
Z_95 = float(norm.ppf(0.975))  # half the width of a 95 % interval, in standard errors
_PUBLISHED = Path(__file__).with_name("published_scores.json")
_MIN_BIN = 40  # battles in a bin of a reliability curve
_ECE_BINS = 15
_MIN_SUPPORT = 30  # prompts with, and without, what a calibration slope is about


def row_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute minus the log of the probability given to each vote: (N,) float64, nats.

    As in the competition, probabilities are clipped to [1e-15, 1] and renormalised. Raises
    ValueError where there is not one label per row of `probs`.
    """
    clipped = np.clip(np.asarray(probs, dtype=np.float64), MIN_PROB, 1)
    labels = np.asarray(labels)
    if clipped.ndim != 2 or labels.shape != clipped.shape[:1]:
        raise ValueError(
            f"labels: expected one per row of probs {clipped.shape}, got shape {labels.shape}"
        )
    return np.log(clipped.sum(axis=1)) - np.log(clipped[np.arange(len(labels)), labels])


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    """Average `row_losses`, the competition's score: (N, C), (N,) int -> nats per battle."""
    return float(row_losses(probs, labels).mean())


def score(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute log_loss (nats per battle), accuracy, brier (0 to 2) and ece (0 to 1).

    The Brier score sums squared errors over the classes. The calibration error is the mean gap
    between confidence and accuracy, in 15 bins of equal width on [0, 1].

    Source: Brier 1950, Verification of forecasts expressed in terms of probability; Guo et al.
        2017, arXiv:1706.04599, equation 3.
    """
    check_probs(probs, n_pairs=len(labels))
    votes = np.eye(len(LABELS))[labels]
    confidence = np.max(probs, axis=1)
    hit = np.argmax(probs, axis=1) == labels
    bins = np.minimum((confidence * _ECE_BINS).astype(int), _ECE_BINS - 1)
    gaps = np.bincount(bins, weights=hit - confidence)
    return {
        "log_loss": log_loss(probs, labels),
        "accuracy": float(hit.mean()),
        "brier": float(((probs - votes) ** 2).sum(axis=1).mean()),
        "ece": float(np.abs(gaps).sum() / len(labels)),
    }


def swap_gap(probs: np.ndarray, probs_swapped: np.ndarray) -> float:
    """Mean absolute difference between p(A, B) and the mirrored p(B, A); 0 is symmetric.

    `probs_swapped`, (N, C), is for A and B exchanged, its columns as the model gave them.
    """
    return float(np.abs(np.asarray(probs) - swap_probs(probs_swapped)).mean())


def class_prior(labels: np.ndarray) -> np.ndarray:
    """Share of each class, one vote added to each so that none is 0: (N,) int -> (C,) float64."""
    counts = np.bincount(labels, minlength=len(LABELS)) + 1.0
    return counts / counts.sum()


def held_out_prior(labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Predict each battle by the `class_prior` of the other folds: (N,), (N,) -> (N, C) float64."""
    probs = np.empty((len(labels), len(LABELS)))
    for fold in np.unique(folds):
        probs[folds == fold] = class_prior(labels[folds != fold])
    return probs


def prior_of(pairs: pd.DataFrame) -> np.ndarray:
    """Compute `held_out_prior` of N battles, over all votes on each: (N, C) float64."""
    rows, labels = list_votes(pairs)
    prior = held_out_prior(labels, pairs["fold"].to_numpy()[rows])
    return prior[np.unique(rows, return_index=True)[1]]


def draw_groups(groups: np.ndarray, max_pairs: int, seed: int) -> np.ndarray:
    """Draw whole groups, `max_pairs` battles at most but one group at least: sorted positions."""
    codes = pd.factorize(np.asarray(groups))[0]
    sizes = np.bincount(codes)
    order = np.random.default_rng(seed).permutation(len(sizes))
    drawn = order[np.cumsum(sizes[order]) <= max(max_pairs, sizes.max(initial=0))]
    return np.flatnonzero(np.isin(codes, drawn))


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Cluster-bootstrap confidence interval of the mean of `values`, (N,) float, e.g. row losses.

    Returns the lower and upper 95 % bound (percentiles), in the units of `values`.

    Source: Efron and Tibshirani 1993, chapter 13; for clusters, Field and Welsh 2007,
        doi:10.1111/j.1467-9868.2007.00593.x.
    """
    means = bootstrap_means(np.asarray(values)[:, None], groups, n_boot, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(
    values: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> np.ndarray:
    """Resample groups, the same for K columns of `values`: (N, K) float -> means, (n_boot, K)."""
    sums, sizes = _sum_groups(values, groups)
    draws = _draw_counts(len(sums), n_boot, seed)
    return np.array([counts @ sums / (counts @ sizes) for counts in draws])


def _sum_groups(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum (N, K) values over each of G groups, and count its rows: (G, K) and (G,) float64."""
    codes = pd.factorize(np.asarray(groups))[0]
    sums = [np.bincount(codes, weights=column) for column in np.asarray(values).T]
    return np.stack(sums, axis=1), np.bincount(codes).astype(np.float64)


def _draw_counts(n_groups: int, n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """Draw how often each group is in a resample: (G,) float64, `n_boot` times."""
    rng = np.random.default_rng(seed)
    for _ in range(n_boot):
        drawn = rng.integers(n_groups, size=n_groups)
        yield np.bincount(drawn, minlength=n_groups).astype(np.float64)


def measure_optimism(
    losses: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> float:
    """Estimate by how much the best of K models seems better than it is, in nats.

    Who is the best of many on some battles owes a part of it to chance. In each resample the best
    model is chosen, and compared with the one that is best on all battles, on the groups that the
    resample left out: equal models lose all that choosing seemed to gain, a clear winner nothing.
    `losses` are `row_losses` of K models, (N, K) float.

    Source: Tsamardinos et al. 2018, Bootstrapping the out-of-sample predictions for efficient and
        accurate cross-validation, doi:10.1007/s10994-018-5714-4.
    """
    sums, sizes = _sum_groups(losses, groups)
    best, gaps = sums.sum(axis=0).argmin(), []
    for counts in _draw_counts(len(sums), n_boot, seed):
        chosen, left_out = (counts @ sums).argmin(), counts == 0
        gap = (sums[left_out, chosen] - sums[left_out, best]).sum()
        gaps.append(gap / max(sizes[left_out].sum(), 1))
    return max(float(np.mean(gaps)), 0.0)


def p_of_mean(values: np.ndarray, groups: np.ndarray) -> float:
    """Test whether the mean of `values`, (N,) float, is 0: two-sided p; NaN below two groups.

    The normal approximation, with the standard error of a mean over clusters.
    """
    sums, sizes = _sum_groups(np.asarray(values)[:, None], groups)
    if len(sums) < 2:
        return float("nan")
    total = float(sums.sum())
    errors = sums[:, 0] - sizes * total / sizes.sum()
    error = np.sqrt((errors**2).sum() * len(sums) / (len(sums) - 1))
    return float(2 * norm.sf(abs(total) / error)) if error else float(total == 0)


def paired_difference(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Compare two models by their `row_losses` on the same battles, (N,) float each, in nats.

    Returns:
        mean of first − second, low, high (95 %); below 0 the first model is better.
    """
    differences = np.asarray(first) - np.asarray(second)
    low, high = bootstrap_interval(differences, groups, n_boot, seed)
    return {"mean": float(differences.mean()), "low": low, "high": high}


def proportion_interval(
    n_hits: ArrayLike, n: ArrayLike, exact: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Bound proportions at 95 % by Wilson, or `exact` by Clopper and Pearson: low, high (K,) float.

    `n_hits` and `n` are (K,) int, hits and trials; no trials give NaN.
    """
    trials = np.where(n, n, np.nan)
    return proportion_confint(np.asarray(n_hits), trials, method="beta" if exact else "wilson")


def correct(p_values: Any) -> np.ndarray:
    """Correct p-values for their number by Holm's method; NaN stays NaN, (N,) -> (N,) float.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    corrected = np.asarray(p_values, dtype=np.float64).copy()
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected


def share_interval(hits: ArrayLike, groups: ArrayLike) -> tuple[float, float]:
    """Bound the share of `hits`, (N,) bool with N > 0, at 95 %; groups count as what they are.

    Wilson's interval for the effective number of battles: N over the design effect, which is the
    variance of the share over groups by that over single battles.

    Source: Korn and Graubard 1998, Confidence intervals for proportions with small expected
        number of positive counts estimated from survey data.
    """
    values, codes = np.asarray(hits, dtype=np.float64), pd.factorize(np.asarray(groups))[0]
    n, share, sizes = len(values), values.mean(), np.bincount(codes)
    largest = float((sizes**2).sum() / n)  # where all battles of a group end alike
    spread = n * share * (1 - share)
    totals = np.bincount(codes, weights=values - share)
    effect = np.clip((totals**2).sum() / spread, 1, largest) if spread else largest
    low, high = proportion_interval(n * share / effect, n / effect)
    return float(low), float(high)


def reliability_curve(
    probs: np.ndarray, labels: np.ndarray, groups: np.ndarray, n_bins: int = 10
) -> pd.DataFrame:
    """Compare predicted and observed shares of each class, in bins of equally many battles.

    Returns:
        One row per class and bin of at least 40 battles, at most `n_bins`: label (int), predicted
        and observed (mean shares), low, high (of observed, by `share_interval`), n_rows.
    """
    n_bins = max(min(n_bins, len(probs) // _MIN_BIN), 1)
    curves = []
    for label in range(np.shape(probs)[1]):
        rows = pd.DataFrame({"predicted": probs[:, label], "observed": labels == label})
        # Where all predictions are equal, qcut finds no bin at all: that is one bin.
        bins = pd.qcut(rows["predicted"], n_bins, labels=False, duplicates="drop").fillna(0)
        for _, inside in rows.assign(group=groups).groupby(bins.to_numpy()):
            row = inside[["predicted", "observed"]].mean().to_dict() | {"label": label}
            row["low"], row["high"] = share_interval(inside["observed"], inside["group"])
            curves.append(row | {"n_rows": len(inside)})
    return pd.DataFrame(curves)


def calibrate_ties(
    models: Mapping[str, np.ndarray], labels: np.ndarray, groups: np.ndarray
) -> pd.DataFrame:
    """Measure how far P(tie) of each model, name -> `probs`, is calibrated.

    Whether a battle tied is regressed on the log-odds of P(tie). The slope is 1 for a calibrated
    model, below 1 where its probabilities spread too far, above 1 where they spread too little.

    Returns:
        One row per model: model, n (votes), predicted and observed (mean shares), low, high
        (95 %, of observed, over groups), slope, slope_low, slope_high, and p_value of the test
        that the slope is 1 and the intercept 0. The last four are NaN where ties, or other votes,
        are of fewer than 30 groups, or where predictions are all alike or never wrong.

    Source: Cox 1958, Two further applications of a model for binary regression, Biometrika 45;
        errors clustered by group, as in `stats.effects`.
    """
    tied, codes = np.asarray(labels) == TIE, pd.factorize(np.asarray(groups))[0]
    low, high = share_interval(tied, codes)
    seen = {"n": len(tied), "observed": tied.mean(), "low": low, "high": high}
    support = min(len(np.unique(codes[tied])), len(np.unique(codes[~tied])))
    rows = []
    for name, probs in models.items():
        row = {"model": name, **seen, "predicted": float(probs[:, TIE].mean())}
        log_odds = logit(np.clip(probs[:, TIE].astype(np.float64), MIN_PROB, 1 - MIN_PROB))
        if support >= _MIN_SUPPORT and _overlap(log_odds[tied], log_odds[~tied]):
            model = GLM(tied.astype(float), add_constant(log_odds), family=Binomial())
            fit = model.fit(cov_type="cluster", cov_kwds={"groups": codes})
            row["slope"], (row["slope_low"], row["slope_high"]) = fit.params[1], fit.conf_int()[1]
            row["p_value"] = float(fit.wald_test("const = 0, x1 = 1", scalar=True).pvalue)
        rows.append(row)
    columns = "model n predicted observed low high slope slope_low slope_high p_value"
    return pd.DataFrame(rows, columns=columns.split())


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether no threshold separates the two: else a logistic regression has no finite slope."""
    gap = 1e-6  # log-odds closer than this are alike
    return bool(first.min() + gap < second.max() and second.min() + gap < first.max())


def compare_models(
    models: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    reference: str,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score several models, name -> `probs`, and their differences to the one named `reference`.

    Returns:
        One row per model: model, log_loss, low, high (nats, 95 %), accuracy, ece, difference,
        difference_low, difference_high (log loss minus the reference's, paired).
    """
    losses = {name: row_losses(probs, labels) for name, probs in models.items()}
    rows = []
    for name, probs in models.items():
        low, high = bootstrap_interval(losses[name], groups, n_boot, seed)
        gap = paired_difference(losses[name], losses[reference], groups, n_boot, seed)
        row = {"model": name, "low": low, "high": high, "difference": gap["mean"]}
        row |= {"difference_low": gap["low"], "difference_high": gap["high"]}
        rows.append(row | score(probs, labels))
    columns = ["model", "log_loss", "low", "high", "accuracy", "ece"]
    columns += ["difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=columns)


def compare_runs(
    members: Mapping[str, np.ndarray],
    shared: pd.DataFrame,
    pairs: pd.DataFrame,
    truth: np.ndarray | None,
    reference: str,
    **bootstrap: int,
) -> pd.DataFrame:
    """Compare members on the battles that all of them held out, as `compare_models` does.

    `members`, name -> (N, C), predict the N battles `shared`; `truth`, (N, C), are their true
    probabilities. All `pairs` give the class prior. Each vote counts once.
    """
    rows, labels = list_votes(shared)
    prior = prior_of(pairs)[pd.Index(pairs["id"]).get_indexer(shared["id"])]
    models = {"the class prior": prior, **members}
    if truth is not None:
        models["the best reachable"] = truth
    models = {name: probs[rows] for name, probs in models.items()}
    groups = shared["group"].to_numpy()[rows]
    return compare_models(models, labels, groups, reference, **bootstrap)


def compare_slices(
    losses: np.ndarray,
    references: Mapping[str, np.ndarray],
    slices: Mapping[str, np.ndarray],
    groups: np.ndarray,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare a model's `row_losses` with those of references, (N,) float each, on slices.

    `slices` are name -> (N,) bool, the battles of that slice.

    Returns:
        One row per slice that holds at least two groups: slice, n_pairs, log_loss,
        the loss of each reference by its name, difference to the first with its 95 % bounds low
        and high (paired; below 0 the model is better), and verdict: better, worse or no
        different, by whether the interval excludes 0.
    """
    first = next(iter(references))
    rows = []
    for name, mask in slices.items():
        inside = np.asarray(groups)[mask]
        if len(pd.unique(inside)) < 2:
            continue
        gap = paired_difference(losses[mask], references[first][mask], inside, n_boot, seed)
        row = {"slice": name, "n_pairs": len(inside), "log_loss": losses[mask].mean()}
        row |= {other: values[mask].mean() for other, values in references.items()}
        rows.append(row | {"difference": gap["mean"], "low": gap["low"], "high": gap["high"]})
    columns = ["slice", "n_pairs", "log_loss", *references, "difference", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    excludes = [table["high"] < 0, table["low"] > 0]
    return table.assign(verdict=np.select(excludes, ["better", "worse"], "no different"))


def compare_leanings(
    probs: np.ndarray,
    labels: np.ndarray,
    leanings: Mapping[str, np.ndarray],
    groups: np.ndarray,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how far a model and people lean towards one side, e.g. the longer answer.

    `leanings` are name -> (N,) float; A where above 0, B where below, 0 leaves the battle out.

    Returns:
        One row per leaning and voter ("people" or "model"): leaning, voter, share of decided
        votes for that side, low, high (95 %), n (battles that count). NaN where n is 0.
    """
    rows = []
    for leaning, sides in leanings.items():
        kept = np.asarray(sides) != 0
        side = np.where(np.asarray(sides)[kept] > 0, A_WINS, B_WINS)
        for voter, votes in (("people", np.eye(len(LABELS))[labels]), ("model", probs)):
            row = {"leaning": leaning, "voter": voter, "n": int(kept.sum())}
            if kept.any():
                chosen = votes[kept][np.arange(len(side)), side]
                decided = votes[kept][:, [A_WINS, B_WINS]].sum(axis=1)
                share = chosen.sum() / max(decided.sum(), MIN_PROB)
                # The ratio of two means, linearised so that its interval is that of one mean.
                values = share + (chosen - share * decided) / max(decided.mean(), MIN_PROB)
                low, high = bootstrap_interval(values, np.asarray(groups)[kept], n_boot, seed)
                row |= {"share": share, "low": low, "high": high}
            rows.append(row)
    return pd.DataFrame(rows, columns=["leaning", "voter", "share", "low", "high", "n"])


def worst_battles(probs: np.ndarray, labels: np.ndarray, n_shown: int = 4) -> np.ndarray:
    """Find the battles whose vote got the lowest probability: (n_shown,) positions, worst first."""
    return np.argsort(-row_losses(probs, labels), kind="stable")[:n_shown]


def score_classes(
    probs: np.ndarray, labels: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Score the battles that ended in each way: how well, and how often, each vote was foreseen.

    Returns:
        One row per class: vote, n and share (of votes), predicted (mean probability of it),
        log_loss (nats, of these votes alone), recall (share of them to which this class was the
        most probable), each of these two with 95 % bounds over groups (_low, _high), precision
        (share of the battles that were called so and ended so). NaN: never voted, or never called.
    """
    called, losses = np.asarray(probs).argmax(axis=1), row_losses(probs, labels)
    rows = []
    for label, name in enumerate(LABEL_NAMES):
        voted, is_called = np.asarray(labels) == label, called == label
        row = {"vote": name, "n": int(voted.sum()), "share": voted.mean()}
        row["predicted"] = float(np.asarray(probs)[:, label].mean())
        if voted.any():
            inside, hits = np.asarray(groups)[voted], is_called[voted]
            low, high = bootstrap_interval(losses[voted], inside, n_boot, seed)
            row |= {"log_loss": losses[voted].mean(), "log_loss_low": low, "log_loss_high": high}
            low, high = share_interval(hits, inside)
            row |= {"recall": hits.mean(), "recall_low": low, "recall_high": high}
        row["precision"] = voted[is_called].mean() if is_called.any() else np.nan
        rows.append(row)
    columns = "vote n share predicted log_loss log_loss_low log_loss_high"
    return pd.DataFrame(rows, columns=f"{columns} recall recall_low recall_high precision".split())


def by_fold(oof: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Score each held-out fold, from `oof` and `pairs` as `summarise` takes them.

    Returns:
        One row per fold: fold, n_pairs, log_loss (nats per vote), accuracy.
    """
    places, rows, labels = _votes_on(oof, pairs)
    probs = probs_of(oof)[rows]
    votes = pd.DataFrame({"fold": pairs["fold"].to_numpy()[places], "id": places})
    votes["log_loss"] = row_losses(probs, labels)
    votes["accuracy"] = (probs.argmax(axis=1) == labels).astype(float)
    folds = votes.groupby("fold")
    table = folds[["log_loss", "accuracy"]].mean()
    table.insert(0, "n_pairs", folds["id"].nunique())
    return table.reset_index()


def describe_folds(folds: pd.DataFrame) -> str:
    """Say in one sentence how far the folds of `by_fold` differ."""
    if len(folds) == 1:
        return (
            f"One fold was held out ({folds['n_pairs'].iloc[0]:,} battles): no spread over folds."
        )
    mean, spread = folds["log_loss"].mean(), folds["log_loss"].std()
    hits, around = 100 * folds["accuracy"].mean(), 100 * folds["accuracy"].std()
    return (
        f"Over {len(folds)} folds: log loss {mean:.4f} ± {spread:.4f}, accuracy {hits:.1f} ± "
        f"{around:.1f} % (mean ± standard deviation of a fold)."
    )


def predict_by_length(pairs: pd.DataFrame) -> np.ndarray:
    """Predict each battle by its answers' lengths alone, from the votes of the other folds.

    A logistic regression on the log ratio of their characters learns from each battle in both
    orders, and the mean over both is symmetric. Where there is a single fold, it learns from that
    one. Returns (N, C) float64, rows sum to 1.
    """
    rows, labels = list_votes(pairs)
    folds = pairs["fold"].to_numpy()
    n_chars = [pairs[name].map(join_turns).str.len() for name in TEXTS[1:]]
    gaps = np.log1p(n_chars[0].to_numpy()) - np.log1p(n_chars[1].to_numpy())
    inputs = np.column_stack([gaps, np.abs(gaps)])
    mirrored = inputs * [-1, 1]
    probs = np.empty((len(pairs), len(LABELS)))
    for fold in np.unique(folds):
        kept = folds[rows] != fold
        kept |= kept.sum() == 0
        both = np.vstack([inputs[rows[kept]], mirrored[rows[kept]]])
        votes = np.concatenate([labels[kept], swap_labels(labels[kept])])
        model = LogisticRegression(C=10.0).fit(both, votes)
        orders = np.zeros((2, (folds == fold).sum(), len(LABELS)))  # a class may have no vote
        for order, each in zip(orders, (inputs, mirrored), strict=True):
            order[:, model.classes_] = model.predict_proba(each[folds == fold])
        probs[folds == fold] = average_over_swap(*orders)
    return probs


def read_published() -> pd.DataFrame:
    """Read scores that others published for this competition: name, log_loss, kind, source."""
    return pd.DataFrame(read_json(_PUBLISHED)["scores"])


def _votes_on(oof: pd.DataFrame, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of `pairs`, row of `oof` and label of each vote on the battles of `oof`, (V,) each."""
    places = pd.Series(np.arange(len(pairs)), index=pairs["id"]).loc[list(oof["id"])].to_numpy()
    rows, labels = list_votes(pairs.iloc[places])
    return places[rows], rows, labels


def summarise(
    oof: pd.DataFrame,
    pairs: pd.DataFrame,
    truth: np.ndarray | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score held-out probabilities beside what knows nothing and what knows everything.

    `oof` has id and one probability per class, for some of `pairs` in any order (KeyError where
    `pairs` lacks one); `truth` are the true probabilities in the order of `oof`, (N, C) float.
    Each vote counts once, where several people voted on a battle.

    Returns:
        What `score` returns; log_loss_low and log_loss_high, a 95 % interval; prior_log_loss, of
        the class prior of the other folds; with `truth` oracle_log_loss and excess_log_loss;
        by_class, the rows of `score_classes`.
    """
    places, rows, labels = _votes_on(oof, pairs)
    prior, groups = prior_of(pairs)[places], pairs["group"].to_numpy()[places]
    probs = probs_of(oof)[rows]
    truth = None if truth is None else truth[rows]
    low, high = bootstrap_interval(row_losses(probs, labels), groups, n_boot, seed)
    summary: dict[str, Any] = score(probs, labels) | {"log_loss_low": low, "log_loss_high": high}
    summary["prior_log_loss"] = log_loss(prior, labels)
    if truth is not None:
        summary["oracle_log_loss"] = log_loss(truth, labels)
        summary["excess_log_loss"] = summary["log_loss"] - summary["oracle_log_loss"]
    summary["by_class"] = to_records(score_classes(probs, labels, groups, n_boot, seed))
    return summary
