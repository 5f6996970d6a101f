"""What moves a vote: shares, curves and effects, each with a 95 % interval.

A battle is "decided" when it is no tie. An effect in log-odds is that of A over B
among decided battles; Davidson's model puts ties beside it in the same unit. What
cannot be estimated is NaN with a `reason`, never a wild number.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import sparse, stats
from scipy.special import expit, logit
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, KFold
from sklearn.preprocessing import SplineTransformer
from statsmodels.stats.proportion import proportion_confint

from src.utils.schema import A_WINS, LABEL_NAMES, TEXTS, TIE, Turns

_ALPHA = 0.05
_Z = float(stats.norm.ppf(1 - _ALPHA / 2))
# What a modeller should do about an effect, by its name.
ADVICE = {
    "position A": "publish the average over the swap, so that no position is favoured",
    "n_words": "show the model both lengths: cut both answers by one rule",
    "n_punctuation": "counts follow length: trust the rate per character instead",
    "punctuation_per_char": "a style cue of its own: keep the text as written, strip nothing",
    "n_list_items": "keep line breaks and list marks in the model's input",
    "n_headers": "keep markdown in the model's input",
    "n_bold": "keep markdown in the model's input",
    "n_code_blocks": "keep code fences in the model's input",
    "is_refusal": "never cut the opening of an answer: refusals open it",
    "prompt_overlap": "keep the prompt beside both answers when cutting to a budget",
    "lexical_diversity": "repetition is seen late in an answer: keep its end as well",
    "mean_word_length": "a cue of register, left to the model",
}


def proportion_interval(
    n_hits: np.ndarray, n: np.ndarray, exact: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Bound a proportion at 95 %.

    Args:
        n_hits: (K,) int, or one int.
        n: (K,) int, trials; 0 gives NaN.
        exact: Clopper and Pearson's interval instead of Wilson's.

    Returns:
        low, high: (K,) float in [0, 1].

    Example:
        5 of 10 -> (0.237, 0.763) by Wilson, (0.187, 0.813) exact.
    """
    n_hits, n = np.asarray(n_hits), np.asarray(n)
    low, high = proportion_confint(
        n_hits, np.maximum(n, 1), _ALPHA, method="beta" if exact else "wilson"
    )
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


def _share(n_hits: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.where(np.asarray(n) > 0, n_hits / np.maximum(n, 1), np.nan)


def winner_shares(labels: np.ndarray) -> pd.DataFrame:
    """Count who wins.

    Args:
        labels: (N,) int, 0 A, 1 B, 2 tie.

    Returns:
        One row a label: outcome, n, share, low, high (Wilson).
    """
    counts = np.bincount(labels, minlength=len(LABEL_NAMES))
    low, high = proportion_interval(counts, np.full(len(counts), len(labels)))
    share = _share(counts, np.full(len(counts), len(labels)))
    return pd.DataFrame(
        {"outcome": LABEL_NAMES, "n": counts, "share": share, "low": low, "high": high}
    )


def position_effect(labels: np.ndarray) -> dict[str, Any]:
    """Test whether position A is preferred.

    Args:
        labels: (N,) int, 0 A, 1 B, 2 tie.

    Returns:
        `share` of A among decided battles with exact bounds `low`, `high`; `p_value` of the
        binomial test against one half; `log_odds` with bounds; `n` decided; `reason`.
    """
    n, n_a = int((labels != TIE).sum()), int((labels == A_WINS).sum())
    return _half_test(n_a, n, "no decided battle")


def _half_test(n_hits: int, n: int, reason: str) -> dict[str, Any]:
    low, high = (float(bound) for bound in proportion_interval(n_hits, n, exact=True))
    share = n_hits / n if n else np.nan
    # A bound of 0 or 1 has no finite log-odds.
    odds = [float(logit(value)) if 0 < value < 1 else np.nan for value in (share, low, high)]
    return {
        "share": share,
        "low": low,
        "high": high,
        "p_value": float(stats.binomtest(n_hits, n).pvalue) if n else np.nan,
        **dict(zip(("log_odds", "log_odds_low", "log_odds_high"), odds, strict=True)),
        "n": n,
        "reason": None if n else reason,
    }


def cut_levels(
    values: np.ndarray, n_levels: int = 3, unit: str = "", digits: int = 0
) -> pd.Categorical:
    """Cut a property into levels of equal count, named by their bounds.

    Args:
        values: (N,) float.
        n_levels: levels at most; equal bounds are merged.
        unit: written behind each name.
        digits: decimals of the bounds.

    Returns:
        N levels in rising order.

    Example:
        [1, 2, 3, 4], 2 levels, " turns" -> "1–2 turns" and "2–4 turns", two battles each.
    """
    quantiles = np.quantile(values, np.linspace(0, 1, n_levels + 1)) if len(values) else np.zeros(1)
    edges = np.unique(np.round(quantiles, digits))
    bounds = [f"{edge:,.{digits}f}" for edge in edges]
    names = [f"{low}–{high}{unit}" for low, high in pairwise(bounds)] or [bounds[0] + unit]
    return pd.Categorical.from_codes(np.searchsorted(edges[1:-1], values, side="left"), names)


def position_by(properties: Mapping[str, Sequence], labels: np.ndarray) -> pd.DataFrame:
    """Split the preference for position A by properties of the battle.

    Args:
        properties: name -> the level of each of N battles (a categorical keeps its order).
        labels: (N,) int, 0 A, 1 B, 2 tie; ties are left out.

    Returns:
        One row a level: property, level, n (decided), share (won by A), low, high (exact), and
        p_value of the chi-square test that the property's levels share one rate.
    """
    decided = labels != TIE
    hits = labels[decided] == A_WINS
    parts = [
        _position_levels(name, pd.Categorical(levels)[decided], hits)
        for name, levels in properties.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _position_levels(name: str, levels: pd.Categorical, hits: np.ndarray) -> pd.DataFrame:
    n = np.bincount(levels.codes, minlength=len(levels.categories))
    n_hits = np.bincount(levels.codes, weights=hits, minlength=len(n)).astype(int)
    low, high = proportion_interval(n_hits, n, exact=True)
    seen = np.column_stack([n_hits, n - n_hits])[n > 0]
    testable = len(seen) > 1 and seen.sum(axis=0).all()
    return pd.DataFrame(
        {
            "property": name,
            "level": list(levels.categories),
            "n": n,
            "share": _share(n_hits, n),
            "low": low,
            "high": high,
            "p_value": float(stats.chi2_contingency(seen).pvalue) if testable else np.nan,
        }
    )


def larger_wins(values: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Test whether the answer with more of something wins.

    Args:
        values: (N,) float, difference A − B; battles with 0 are left out.
        labels: (N,) int, 0 A, 1 B, 2 tie; ties are left out.

    Returns:
        As `position_effect`, for the share won by the answer with the larger value.
    """
    kept = (labels != TIE) & (values != 0)
    hits = (values[kept] > 0) == (labels[kept] == A_WINS)
    return _half_test(
        int(hits.sum()), int(kept.sum()), "no decided battle in which the answers differ"
    )


def larger_wins_table(
    differences: np.ndarray, names: Sequence[str], labels: np.ndarray
) -> pd.DataFrame:
    """Test feature by feature whether the answer with more of it wins.

    Args:
        differences: (N, F) float, each A − B.
        names: F names.
        labels: (N,) int, 0 A, 1 B, 2 tie.

    Returns:
        One row a feature: effect, then the fields of `larger_wins`.
    """
    table = pd.DataFrame([larger_wins(column, labels) for column in differences.T])
    table.insert(0, "effect", list(names))
    return table


def larger_wins_by(
    by: np.ndarray, values: np.ndarray, labels: np.ndarray, n_bins: int = 5
) -> pd.DataFrame:
    """Trace how often the answer with more of something wins, as the battle itself changes.

    Args:
        by: (N,) float, a property of the battle, e.g. the prompt's length.
        values: (N,) float, difference A − B; battles with 0 are left out.
        labels: (N,) int, 0 A, 1 B, 2 tie; ties are left out.
        n_bins: bins of equal count at most.

    Returns:
        One row a bin of `by`: value (mean), left, right, n, share, low, high (Wilson).
    """
    kept = (labels != TIE) & (values != 0)
    return _rate_by(by[kept], (values[kept] > 0) == (labels[kept] == A_WINS), n_bins)


def win_rate_by(
    values: np.ndarray, labels: np.ndarray, n_bins: int = 10
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trace how votes follow a difference between the answers.

    Args:
        values: (N,) float, difference A − B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        n_bins: bins of equal count at most; bins with equal edges are merged.

    Returns:
        wins: P(A wins | decided) by difference. One row a bin: value (mean), left, right
            (edges), n, share, low, high (Wilson).
        ties: P(tie) by |difference|, the same columns.
    """
    decided = labels != TIE
    return (
        _rate_by(values[decided], labels[decided] == A_WINS, n_bins),
        _rate_by(np.abs(values), ~decided, n_bins),
    )


def _rate_by(values: np.ndarray, hits: np.ndarray, n_bins: int) -> pd.DataFrame:
    columns = ["value", "left", "right", "n", "share", "low", "high"]
    if not len(values):
        return pd.DataFrame(columns=columns, dtype=np.float64)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n_bins + 1)))
    codes = np.searchsorted(edges[1:-1], values, side="right")
    n, n_hits = np.bincount(codes), np.bincount(codes, weights=hits).astype(int)
    kept = n > 0
    left, right = edges[: len(n)], edges[np.minimum(np.arange(len(n)) + 1, len(edges) - 1)]
    low, high = proportion_interval(n_hits, n)
    means = _share(np.bincount(codes, weights=values), n)
    return pd.DataFrame(
        dict(zip(columns, (means, left, right, n, _share(n_hits, n), low, high), strict=True))
    )[kept]


def length_curves(
    length_ratio: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    n_boot: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trace how the pull of length and the chance of a tie follow the log length ratio.

    Args:
        length_ratio: (N,) float, log length of A over B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        groups: (N,) prompt of each battle; the bands resample whole prompts.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        longer: P(the longer answer wins | decided) by |log length ratio|, from `smooth_rate`.
        ties: P(tie) by |log length ratio|, from `smooth_rate`.
    """
    gap, codes = np.abs(length_ratio), _group_codes(groups, len(labels))
    kept = (labels != TIE) & (gap > 0)
    won = (length_ratio > 0) == (labels == A_WINS)
    longer = smooth_rate(gap[kept], won[kept], codes[kept], n_boot, seed)
    return longer, smooth_rate(gap, labels == TIE, codes, n_boot, seed)


_N_POINTS = 61
_CURVE_SUPPORT = 50  # fewer hits or misses bound no curve


def smooth_rate(
    values: np.ndarray,
    hits: np.ndarray,
    groups: np.ndarray | None = None,
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Trace a rate as a smooth curve with a bootstrap band.

    Logistic regression on a cubic spline with a light roughness penalty; values beyond the
    central 98 % are drawn in to its ends. A resample takes whole groups and two Newton steps
    from the estimate of all rows.

    Args:
        values: (N,) float.
        hits: (N,) bool.
        groups: (N,) prompt of each battle; None takes every battle for itself.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        61 rows: value, share, low, high (95 %, pointwise, percentiles); none where fewer than
        50 battles are hits or misses, or all values are equal.

    Source: Eilers and Marx 1996, doi:10.1214/ss/1038425655 (penalised splines); Field and
        Welsh 2007, doi:10.1111/j.1467-9868.2007.00593.x (resampling of clusters).
    """
    columns = ["value", "share", "low", "high"]
    hits = np.asarray(hits, dtype=np.float64)
    if min(hits.sum(), (1 - hits).sum()) < _CURVE_SUPPORT:
        return pd.DataFrame(columns=columns, dtype=np.float64)
    ends = np.quantile(values, [0.01, 0.99])
    values = np.clip(values, *ends)
    knots = np.unique(np.quantile(values, np.linspace(0, 1, 6 if len(values) > 2000 else 4)))
    if len(knots) < 3:
        return pd.DataFrame(columns=columns, dtype=np.float64)
    spline = SplineTransformer(degree=3, knots=knots[:, None]).fit(values[:, None])
    basis, grid = spline.transform(values[:, None]), np.linspace(*ends, _N_POINTS)
    shown = spline.transform(grid[:, None])
    start = np.full(basis.shape[1], logit(hits.mean()))
    coefs = _newton_rate(basis, hits, np.ones(len(hits)), start, n_steps=20)
    weights = _resample_weights(_group_codes(groups, len(hits)), n_boot, seed)
    draws = np.array([_newton_rate(basis, hits, weight, coefs, n_steps=2) for weight in weights])
    low, high = np.quantile(expit(draws @ shown.T), [_ALPHA / 2, 1 - _ALPHA / 2], axis=0)
    return pd.DataFrame(dict(zip(columns, (grid, expit(shown @ coefs), low, high), strict=True)))


def _newton_rate(
    basis: np.ndarray, hits: np.ndarray, weights: np.ndarray, coefs: np.ndarray, n_steps: int
) -> np.ndarray:
    """Coefficients of a weighted logistic regression whose second differences are penalised."""
    roughness = np.diff(np.eye(len(coefs)), n=2, axis=0)
    penalty = roughness.T @ roughness + 1e-6 * np.eye(len(coefs))
    for _ in range(n_steps):
        rates = expit(basis @ coefs)
        gradient = basis.T @ (weights * (hits - rates)) - penalty @ coefs
        information = basis.T @ (basis * (weights * rates * (1 - rates))[:, None]) + penalty
        coefs = coefs + np.linalg.solve(information, gradient)
    return coefs


def _resample_weights(codes: np.ndarray, n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn when whole groups are: n_boot times (N,) float."""
    rng, n_groups = np.random.default_rng(seed), int(codes.max(initial=-1)) + 1
    for _ in range(n_boot):
        drawn = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        yield drawn[codes].astype(np.float64)


def effect_sizes(
    differences: np.ndarray,
    names: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    controls: np.ndarray | None = None,
) -> pd.DataFrame:
    """Estimate each feature's effect on who wins, one logistic regression a feature.

    The intercept takes up the position. Errors are clustered by prompt, because votes on the
    same prompt are not independent.

    Args:
        differences: (N, F) float, each A − B.
        names: F names.
        labels: (N,) int, 0 A, 1 B, 2 tie; only decided battles are used.
        groups: (N,) prompt of each battle; None takes every battle for itself.
        controls: (N, K) float, differences to hold constant, e.g. the log length ratio.

    Returns:
        One row a feature: effect, log_odds (per standard deviation), low, high, p_value,
        log_odds_per_unit, sd, n (decided battles), n_differ (those in which the answers
        differ), reason (why there is no estimate, or None).

    Source: White 1982, doi:10.2307/1912526; clusters as in Cameron and Miller 2015, doi:10.3368/jhr.50.2.317.
    """
    decided = labels != TIE
    y = (labels[decided] == A_WINS).astype(np.float64)
    codes = _group_codes(groups, len(labels))[decided]
    return _estimate_effects(
        differences[decided], names, y, codes, None if controls is None else controls[decided]
    )


def tie_effects(
    features: np.ndarray,
    names: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    controls: np.ndarray | None = None,
) -> pd.DataFrame:
    """Estimate each feature's effect on whether a battle is a tie, one logistic regression a feature.

    Args:
        features: (N, F) float, properties of the battle that do not change under the swap.
        names: F names.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        groups: (N,) prompt of each battle, for clustered errors.
        controls: (N, K) float, properties to hold constant.

    Returns:
        As `effect_sizes`, in log-odds of a tie; n counts all battles, n_differ those in which
        the feature is not 0.
    """
    y = (labels == TIE).astype(np.float64)
    return _estimate_effects(features, names, y, _group_codes(groups, len(labels)), controls)


def _estimate_effects(
    features: np.ndarray,
    names: Sequence[str],
    y: np.ndarray,
    codes: np.ndarray,
    controls: np.ndarray | None,
) -> pd.DataFrame:
    held = (
        np.ones((len(y), 1)) if controls is None else np.column_stack([np.ones(len(y)), controls])
    )
    rows = [_effect_row(features[:, f], held, y, codes) for f in range(len(names))]
    columns = [
        "log_odds",
        "low",
        "high",
        "p_value",
        "log_odds_per_unit",
        "sd",
        "n",
        "n_differ",
        "reason",
    ]
    table = pd.DataFrame(rows, columns=columns).astype({"reason": object})
    table.insert(0, "effect", list(names))
    return table.assign(reason=table["reason"].where(table["reason"].notna(), None))


def _group_codes(groups: np.ndarray | None, n_pairs: int) -> np.ndarray:
    return np.arange(n_pairs) if groups is None else pd.factorize(np.asarray(groups))[0]


def _effect_row(
    values: np.ndarray, held: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> list[Any]:
    n_differ, sd = int(np.count_nonzero(values)), float(values.std()) if len(values) else np.nan
    row = [np.nan] * 5 + [sd, len(y), n_differ]
    reason = _why_no_effect(values, held, y, codes, n_differ)
    if reason:
        return [*row, reason]
    estimate, error, reason = _fit_logit(np.column_stack([held, values / sd]), y, codes)
    if reason:
        return [*row, reason]
    p_value = float(2 * stats.norm.sf(abs(estimate) / error))
    return [
        estimate,
        estimate - _Z * error,
        estimate + _Z * error,
        p_value,
        estimate / sd,
        *row[5:],
        None,
    ]


def _why_no_effect(
    values: np.ndarray, held: np.ndarray, y: np.ndarray, codes: np.ndarray, n_differ: int
) -> str | None:
    if len(y) < MIN_SUPPORT or len(np.unique(y)) < 2:
        return f"{len(y)} battles, {int(y.sum())} of them one way: too few of one kind"
    if n_differ < MIN_SUPPORT:
        return f"seen in {n_differ} battles, where {MIN_SUPPORT} are needed"
    if values.std() == 0:
        return "alike in all battles"
    if len(np.unique(codes)) < MIN_SUPPORT:
        return f"{len(np.unique(codes))} prompts, fewer than {MIN_SUPPORT}"
    residual = values - held @ np.linalg.lstsq(held, values, rcond=None)[0]
    return (
        "cannot be told from what is held constant"
        if residual.std() < 1e-6 * values.std()
        else None
    )


def _fit_logit(
    design: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> tuple[float, float, str | None]:
    """Coefficient and clustered standard error of the last column, and why there are none."""
    separated = "one side of the effect always wins: no finite estimate"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = sm.Logit(y, design)
            result = model.fit(disp=0, cov_type="cluster", cov_kwds={"groups": codes})
            spread = float(np.sqrt(np.linalg.inv(-model.hessian(result.params))[-1, -1]))
        except (np.linalg.LinAlgError, sm.tools.sm_exceptions.PerfectSeparationError):
            return np.nan, np.nan, separated
    if not result.mle_retvals["converged"] or not spread < _MAX_STANDARD_ERROR:
        return np.nan, np.nan, separated
    return float(result.params[-1]), float(result.bse[-1]), None


_LEAK_CHARS = 400  # of each text's opening, enough to know a prompt again
_N_HASHED = 2**14


def score_both_splits(
    pairs: pd.DataFrame,
    differences: np.ndarray,
    n_folds: int = 5,
    max_pairs: int = 8_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score one cheap model on a split that keeps prompts whole and on one that does not.

    The model is a logistic regression on style differences, their absolute values, and the
    hashed words that open the prompt and the answers. What it gains on the random split it
    remembered.

    Args:
        pairs: N battles with texts as tuples of turns, `label` and `group`.
        differences: (N, F) float, style differences A − B.
        n_folds: parts, each held out once.
        max_pairs: battles at most; whole groups are drawn.
        seed: of the draw and of both splits.

    Returns:
        One row a battle scored, with the index of `pairs`: group, is_repeated (another battle
        has its prompt), grouped and random (nats, held out). None where fewer groups than
        `n_folds` or one kind of vote remain.
    """
    kept = _draw_groups(pairs["group"].to_numpy(), max_pairs, seed)
    pairs, differences = pairs[kept], differences[kept]
    labels, groups = pairs["label"].to_numpy(), pd.factorize(pairs["group"])[0]
    losses = pd.DataFrame(
        {"group": pairs["group"], "is_repeated": pairs["group"].duplicated(keep=False)}
    )
    if len(np.unique(groups)) < n_folds or len(np.unique(labels)) < 2:
        return losses.assign(grouped=np.nan, random=np.nan)[:0]
    features = _leak_features(pairs, differences)
    splits = {
        "grouped": GroupKFold(n_folds, shuffle=True, random_state=seed).split(
            labels, labels, groups
        ),
        "random": KFold(n_folds, shuffle=True, random_state=seed).split(labels),
    }
    for name, folds in splits.items():
        losses[name] = 0.0
        for train, test in folds:
            losses.iloc[test, losses.columns.get_loc(name)] = _leak_losses(
                features, labels, train, test
            )
    return losses


def _draw_groups(groups: np.ndarray, max_pairs: int, seed: int) -> np.ndarray:
    """(N,) bool, whole groups in random order until they hold `max_pairs` battles."""
    codes = pd.factorize(groups)[0]
    sizes = np.bincount(codes)
    order = np.random.default_rng(seed).permutation(len(sizes))
    return np.isin(codes, order[np.cumsum(sizes[order]) <= max(max_pairs, sizes.max(initial=0))])


def _opening(turns: Turns) -> str:
    text = "\n".join((turn or "")[:_LEAK_CHARS] for turn in turns)[:_LEAK_CHARS]
    return text.encode("utf-8", "replace").decode()  # the hashing has no room for lone surrogates


def _leak_features(pairs: pd.DataFrame, differences: np.ndarray) -> sparse.csr_matrix:
    words = HashingVectorizer(n_features=_N_HASHED, alternate_sign=False)
    prompt, a, b = (words.transform([_opening(turns) for turns in pairs[name]]) for name in TEXTS)
    style = np.column_stack([differences, np.abs(differences)])
    style = (style - style.mean(axis=0)) / np.maximum(style.std(axis=0), 1e-9)
    return sparse.hstack(
        [sparse.csr_matrix(np.clip(style, -4, 4) / 4), prompt, a - b], format="csr"
    )


def _leak_losses(
    features: sparse.csr_matrix, labels: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 60 steps are enough for a comparison
        model = LogisticRegression(C=0.1, max_iter=60).fit(features[train], labels[train])
    probs = np.full((len(test), len(LABEL_NAMES)), 1e-6)
    probs[:, model.classes_] = model.predict_proba(features[test])
    return -np.log(np.maximum(probs[np.arange(len(test)), labels[test]], 1e-6))


def _effect_table(
    names: pd.Index, used: np.ndarray, sds: np.ndarray, params: np.ndarray, cov: np.ndarray
) -> pd.DataFrame:
    """Effects from parameters ordered position, used covariates, log ν."""
    error = np.sqrt(np.diag(cov))
    order = [0, len(params) - 1, *range(1, len(params) - 1)]
    scale = np.array([1, 1, *sds[used]])
    estimate, error = params[order], error[order]
    effects = ["position A", "tie", *names[used]]
    columns = (
        effects,
        estimate / scale,
        (estimate - _Z * error) / scale,
        (estimate + _Z * error) / scale,
        np.where(np.arange(len(scale)) < 2, np.nan, estimate),
        np.where(np.arange(len(scale)) < 2, np.nan, scale),
        [None if np.isfinite(value) else "no ties" for value in estimate],
    )
    table = pd.DataFrame(dict(zip(_EFFECT_COLUMNS, columns, strict=True)))
    missing = _no_effects(
        pd.DataFrame(columns=names[~used]), f"differs in fewer than {MIN_SUPPORT} battles"
    )[2:]
    return table if missing.empty else pd.concat([table, missing], ignore_index=True)


def make_verdict(shares: dict[str, dict[str, Any]], effects: pd.DataFrame) -> pd.DataFrame:
    """Put the findings into one table.

    Args:
        shares: name -> result of `position_effect` or `larger_wins`.
        effects: rows of `effect_sizes`.

    Returns:
        One row an effect: effect, measure, size, low, high (95 %), n (decided battles), found
        ("yes": the interval excludes no effect, "no", or "cannot be estimated"), advice.
    """
    half = pd.DataFrame(shares.values()).assign(
        effect=list(shares), measure="share of decided", null=0.5
    )
    odds = effects.assign(measure="log-odds per SD", null=0.0)
    columns = ["effect", "measure", "size", "low", "high", "n", "null"]
    parts = [
        half.rename(columns={"share": "size"})[columns],
        odds.rename(columns={"log_odds": "size"})[columns],
    ]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    excludes = (table["low"] > table["null"]) | (table["high"] < table["null"])
    table["found"] = np.where(
        table["size"].isna(), "cannot be estimated", np.where(excludes, "yes", "no")
    )
    acted = (table["found"] == "yes") | (
        table["effect"] == "position A"
    )  # averaging over the swap costs no evidence
    table["advice"] = table["effect"].map(ADVICE).where(acted, "no reason to act in these battles")
    return table.drop(columns="null")


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Turn a table into plain JSON values, one dict a row; NaN becomes None."""
    return [
        {key: _to_json(value) for key, value in row.items()}
        for row in table.astype(object).to_dict(orient="records")
    ]


def _to_json(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not np.isfinite(plain) else plain


MIN_SUPPORT = 10  # battles in which a feature must differ before its effect is estimated
# A standard error above this, in log-odds, says that the data bound the effect on one side only.
_MAX_STANDARD_ERROR = 5.0
_EFFECT_COLUMNS = ("effect", "log_odds_per_unit", "low", "high", "log_odds", "sd", "reason")


def _no_effects(covariates: pd.DataFrame | None, reason: str) -> pd.DataFrame:
    names = ["position A", "tie", *([] if covariates is None else covariates.columns)]
    missing = np.full(len(names), np.nan)
    columns = (names, *[missing] * 5, [reason] * len(names))
    return pd.DataFrame(dict(zip(_EFFECT_COLUMNS, columns, strict=True)))
