"""Estimate what moves a vote: shares, curves and effects, each with a 95 % interval.

A battle is "decided" when it is not a tie. An effect is the log-odds of A over B among
decided battles. What cannot be estimated is NaN, with a `reason`. In all functions `labels`
is (N,) int, 0 A, 1 B, 2 tie, and `groups` (N,) the prompt of each battle, for clustered
errors; without it every battle is its own group.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import sparse, stats
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, KFold
from sklearn.preprocessing import SplineTransformer

from src.utils.schema import A_WINS, LABEL_NAMES, TEXTS, TIE, join_turns
from src.utils.stats import scores
from src.utils.stats.plots import with_interval
from src.utils.stats.ranking import MAX_STANDARD_ERROR, MIN_SUPPORT, group_codes
from src.utils.stats.scores import correct

# What a modeller should do about an effect, by its name.
ADVICE = {
    "position A": "publish the average over the swap, so that no position is favoured",
    "more words": "show the model both lengths: cut both answers by one rule",
    "more punctuation": "counts follow length: trust the rate per character instead",
    "punctuation_per_char": "a style cue of its own: keep the text as written, strip nothing",
    "n_lines": "keep line breaks in the model's input",
    "n_list_items": "keep line breaks and list marks in the model's input",
    "n_headers": "keep markdown in the model's input",
    "n_bold": "keep markdown in the model's input",
    "has_apology": "never cut the start of an answer: that is where apologies are",
    "is_refusal": "never cut the start of an answer: that is where refusals are",
    "prompt_overlap": "keep the prompt beside both answers when cutting to a budget",
}

_SIDES = pd.Index(["none", "one", "both"])
_MIN_LEVEL = 10  # battles of a level whose share of ties is compared


def winner_shares(labels: np.ndarray) -> pd.DataFrame:
    """Count who wins: one row per label, outcome, n, share, low, high (Wilson)."""
    n = np.bincount(labels, minlength=len(LABEL_NAMES))
    table = pd.DataFrame({"outcome": LABEL_NAMES, "n": n, "share": n / max(len(labels), 1)})
    table["low"], table["high"] = scores.proportion_interval(n, np.full(len(n), len(labels)))
    return table


def win_share(labels: np.ndarray, values: np.ndarray | None = None) -> dict[str, Any]:
    """Test whether position A, or the answer with more of something, wins more than half.

    With `values`, (N,) float differences A − B, battles with 0 are left out.

    Returns:
        `share` of decided battles with exact bounds `low`, `high`; `p_value` of the binomial
        test against one half; `n` battles; `reason`.
    """
    kept, hits = _decided(labels, values)
    n = int(kept.sum())
    found: dict[str, Any] = dict.fromkeys(("share", "low", "high", "p_value"), np.nan)
    if n == 0:
        return found | {"n": n, "reason": "no decided battle with a difference"}
    test = stats.binomtest(int(hits[kept].sum()), n)
    found["low"], found["high"] = test.proportion_ci(method="exact")
    return found | {"share": test.statistic, "p_value": test.pvalue, "n": n, "reason": None}


def win_share_grid(
    rows: pd.Categorical, columns: pd.Categorical, labels: np.ndarray, values: np.ndarray
) -> pd.DataFrame:
    """Split the share of `win_share` by two properties of the battle at once, (N,) each.

    Returns:
        One row per cell: row, column, what `win_share` returns, and p_holm, its p-value corrected
        for the number of cells.
    """
    cells = []
    for row, row_name in enumerate(rows.categories):
        for column, column_name in enumerate(columns.categories):
            inside = (rows.codes == row) & (columns.codes == column)
            cell = {"row": row_name, "column": column_name}
            cells.append(cell | win_share(labels[inside], values[inside]))
    table = pd.DataFrame(cells)
    return table.assign(p_holm=correct(table["p_value"]))


def _decided(labels: np.ndarray, values: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Which battles count, and whether A (or the answer with the larger value) won: (N,) bool."""
    values = np.ones(len(labels)) if values is None else values
    return (labels != TIE) & (values != 0), (labels == A_WINS) == (values > 0)


def cut_levels(
    values: np.ndarray, n_levels: int = 3, unit: str = "", digits: int = 0
) -> pd.Categorical:
    """Cut a property into levels of about equal count, named by their bounds, which have `digits`.

    Example:
        [1, 2, 3, 4], 2 levels, " turns" -> "1–2 turns" and "2–4 turns", two battles each.
    """
    quantiles = np.quantile(values, np.linspace(0, 1, n_levels + 1)) if len(values) else np.zeros(1)
    edges = np.unique(np.round(quantiles, digits))
    bounds = [f"{edge:,.{digits}f}" for edge in edges]
    names = [f"{low}–{high}{unit}" for low, high in pairwise(bounds)] or [bounds[0] + unit]
    codes = np.searchsorted(edges[1:-1], values)
    return pd.Categorical.from_codes(codes, pd.Index(names, dtype=object))


def win_share_by_level(
    properties: Mapping[str, Sequence], labels: np.ndarray, values: np.ndarray | None = None
) -> pd.DataFrame:
    """Split the share of `win_share` by properties of the battle.

    `properties` are name -> the level of each battle, (N,); a categorical keeps its order.

    Returns:
        One row per level: property, level, n, share, low, high (exact), and p_value of the
        chi-square test that all levels of the property have one share.
    """
    kept, hits = _decided(labels, values)
    tables = []
    for name, levels in properties.items():
        table = share_by_level(pd.Categorical(levels)[kept], hits[kept], exact=True)
        table.insert(0, "property", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def share_by_level(levels: pd.Categorical, hits: np.ndarray, exact: bool = False) -> pd.DataFrame:
    """Count the share of `hits`, (N,) bool, on each level; battles without a level are left out.

    Returns:
        One row per level: level, n, share, low, high (Wilson, or `exact`), and p_value of the
        chi-square test that all levels have one share.
    """
    known = levels.codes >= 0
    n = np.bincount(levels.codes[known], minlength=len(levels.categories))
    n_hits = np.bincount(levels.codes[known & hits], minlength=len(n))
    table = pd.DataFrame({"level": list(levels.categories), "n": n})
    table["share"] = n_hits / table["n"]  # NaN where n is 0
    table["low"], table["high"] = scores.proportion_interval(n_hits, n, exact)
    seen = np.column_stack([n_hits, n - n_hits])[n > 0]
    testable = len(seen) > 1 and seen.sum(axis=0).all()
    return table.assign(p_value=stats.chi2_contingency(seen).pvalue if testable else np.nan)


def tie_properties(style: pd.DataFrame) -> dict[str, pd.Categorical]:
    """Sort battles of `style.measure_style` by what may make a tie likely: name -> levels, (N,)."""
    shared = cut_levels(100 * style["word_jaccard"].to_numpy(), 4, " %")
    is_same = style["is_identical"].to_numpy() > 0
    codes = np.where(is_same, len(shared.categories), shared.codes)
    names = pd.Index([*shared.categories, "the same text"], dtype=object)
    refusals = (style["is_refusal_a"] + style["is_refusal_b"]).to_numpy(dtype=int)
    longer = style[["n_chars_a", "n_chars_b"]].max(axis=1).to_numpy()
    return {
        "words that both answers use": pd.Categorical.from_codes(codes, names),
        "answers that refuse": pd.Categorical.from_codes(refusals, _SIDES),
        "the longer answer": cut_levels(longer, 4, " characters"),
    }


def tie_shares(
    properties: Mapping[str, pd.Categorical], labels: np.ndarray, probs: np.ndarray
) -> pd.DataFrame:
    """Compare how often battles tie with P(tie) of `probs`, (N, 3), on each level of properties.

    Returns:
        One row per level of 10 battles or more: property, what `share_by_level` returns of ties,
        and predicted, the mean of P(tie).
    """
    tables = []
    for name, levels in properties.items():
        table = share_by_level(levels, labels == TIE)
        table.insert(0, "property", name)
        sums = np.bincount(levels.codes, weights=probs[:, TIE], minlength=len(table))
        tables.append(table.assign(predicted=sums / table["n"]))
    table = pd.concat(tables, ignore_index=True)
    return table[table["n"] >= _MIN_LEVEL].reset_index(drop=True)


def _rate_by_bin(values: np.ndarray, hits: np.ndarray, n_bins: int) -> pd.DataFrame:
    """The rate in bins of equal count: value (mean), n, share, low, high (Wilson)."""
    if not len(values):
        return pd.DataFrame(columns=["value", "n", "share", "low", "high"], dtype=np.float64)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n_bins + 1)))
    bins = np.searchsorted(edges[1:-1], values, side="right")
    rows = pd.DataFrame({"value": values, "hit": hits}).groupby(bins)
    table = rows.agg(value=("value", "mean"), n=("hit", "size"), share=("hit", "mean"))
    low, high = scores.proportion_interval(rows["hit"].sum().to_numpy(), table["n"].to_numpy())
    return table.assign(low=low, high=high)


def length_curves(
    length_ratio: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, pd.DataFrame]:
    """Trace how who wins and the chance of a tie follow the log length ratio, (N,) float, A over B.

    Returns:
        "longer" and "ties", smooth curves (`smooth_rate`) of P(the longer answer wins | decided)
        and P(tie) by the absolute log ratio; "longer_bins" and "ties_bins", the same in bins;
        "trends", the p_value of Spearman's correlation with the log ratio, `what` by `what`.
    """
    gap, codes = np.abs(length_ratio), group_codes(groups, len(labels))
    n_bins = int(np.clip(len(labels) // 150, 4, 16))
    kept, won = _decided(labels, length_ratio)
    tests = {"longer": (gap[kept], won[kept]), "ties": (gap, labels == TIE)}
    trends = [(name, _test_trend(*values)) for name, values in tests.items()]
    return {
        "trends": pd.DataFrame(trends, columns=["what", "p_value"]),
        "longer": smooth_rate(gap[kept], won[kept], codes[kept]),
        "longer_bins": _rate_by_bin(gap[kept], won[kept], n_bins),
        "ties": smooth_rate(gap, labels == TIE, codes),
        "ties_bins": _rate_by_bin(gap, labels == TIE, n_bins),
    }


def _test_trend(values: np.ndarray, hits: np.ndarray) -> float:
    if len(np.unique(values)) < 2 or len(np.unique(hits)) < 2:
        return np.nan  # nothing varies
    return float(stats.spearmanr(values, hits).pvalue)


_CURVE_SUPPORT = 50  # hits and misses that a curve needs


def smooth_rate(
    values: np.ndarray, hits: np.ndarray, groups: np.ndarray | None = None
) -> pd.DataFrame:
    """Trace a rate as a smooth curve: a logistic regression on a cubic spline.

    `values`, (N,) float, beyond the central 98 % are moved to its ends.

    Returns:
        61 rows: value, share, low, high (95 %, pointwise); none for fewer than 50 hits or misses.
    """
    nothing = pd.DataFrame(columns=["value", "share", "low", "high"], dtype=np.float64)
    if min(np.sum(hits), len(hits) - np.sum(hits)) < _CURVE_SUPPORT:
        return nothing
    low, high = np.quantile(values, [0.01, 0.99])
    values = np.clip(values, low, high)
    knots = np.unique(np.quantile(values, np.linspace(0, 1, 4)))
    if len(knots) < 3:
        return nothing
    spline = SplineTransformer(degree=3, knots=knots[:, None]).fit(values[:, None])
    basis, grid = spline.transform(values[:, None]), np.linspace(low, high, 61)
    model = sm.GLM(hits.astype(float), basis, family=sm.families.Binomial())
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": group_codes(groups, len(hits))})
    curve = fit.get_prediction(spline.transform(grid[:, None])).summary_frame()
    curve = curve.rename(columns={"mean": "share", "mean_ci_lower": "low", "mean_ci_upper": "high"})
    return curve[["share", "low", "high"]].assign(value=grid)


def effect_sizes(
    differences: np.ndarray,
    names: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    controls: np.ndarray | None = None,
) -> pd.DataFrame:
    """Estimate each feature's effect on who wins, with one logistic regression per feature.

    `differences` are (N, F) float, A − B, `controls` (N, K) others to hold constant, e.g. the log
    length ratio. The intercept is the effect of the position.

    Returns:
        One row per feature: effect, log_odds (per standard deviation), low, high, p_value,
        log_odds_per_unit, sd, n (decided battles), n_differ (those in which the answers
        differ), reason (why there is no estimate, else missing).

    Source: White 1982, doi:10.2307/1912526; clusters as in Cameron and Miller 2015,
        doi:10.3368/jhr.50.2.317.
    """
    decided = labels != TIE
    y = (labels[decided] == A_WINS).astype(np.float64)
    codes = group_codes(groups, len(labels))[decided]
    held = np.ones((len(y), 1))
    if controls is not None:
        held = np.column_stack([held, controls[decided]])
    rows = []
    for name, values in zip(names, differences[decided].T, strict=True):
        row: dict[str, Any] = {"effect": name, "sd": values.std() if len(values) else np.nan}
        row |= {"n": len(y), "n_differ": np.count_nonzero(values)}
        rows.append(row | _estimate_effect(values, held, y, codes))
    columns = ["effect", "log_odds", "low", "high", "p_value"]
    columns += ["log_odds_per_unit", "sd", "n", "n_differ", "reason"]
    return pd.DataFrame(rows, columns=columns)


def _estimate_effect(
    values: np.ndarray, held: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> dict[str, Any]:
    """Estimate, interval and p-value of one feature, or the reason why there is none."""
    reason = _why_no_effect(values, held, y, codes)
    if reason:
        return {"reason": reason}
    sd = values.std()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of separation, which is found below
        try:
            model = sm.Logit(y, np.column_stack([held, values / sd]))
            fit = model.fit(disp=0, cov_type="cluster", cov_kwds={"groups": codes})
            spread = np.sqrt(np.linalg.inv(-model.hessian(fit.params))[-1, -1])
        except (np.linalg.LinAlgError, sm.tools.sm_exceptions.PerfectSeparationError):
            spread = np.inf
    if not (spread < MAX_STANDARD_ERROR and fit.mle_retvals["converged"]):
        return {"reason": "one side of the effect always wins: no finite estimate"}
    found = {"log_odds": fit.params[-1], "log_odds_per_unit": fit.params[-1] / sd}
    found["low"], found["high"] = fit.conf_int()[-1]
    return found | {"p_value": fit.pvalues[-1]}


def _why_no_effect(
    values: np.ndarray, held: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> str | None:
    n_differ, n_prompts = np.count_nonzero(values), len(np.unique(codes))
    if len(y) < MIN_SUPPORT or len(np.unique(y)) < 2:
        return f"{len(y)} battles, {int(y.sum())} of them won by A: too few of one kind"
    if n_differ < MIN_SUPPORT:
        return f"differs from 0 in {n_differ} battles, fewer than {MIN_SUPPORT}"
    if n_prompts < MIN_SUPPORT:
        return f"{n_prompts} prompts, fewer than {MIN_SUPPORT}"
    residual = values - held @ np.linalg.lstsq(held, values, rcond=None)[0]
    is_determined = residual.std() < 1e-6 * np.abs(values).max()
    return "fully determined by what is held constant" if is_determined else None


_LEAK_CHARS = 400  # of the start of each text, enough to recognise a prompt


def measure_leak(
    pairs: pd.DataFrame,
    differences: np.ndarray,
    n_folds: int = 5,
    max_pairs: int = 8_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how much a random split flatters a model, against one that keeps prompts together.

    The model is a logistic regression on style `differences`, (N, F) float, their absolute
    values, and the hashed words that open each text. What it gains on the random split it
    remembered. Whole groups are drawn, `max_pairs` battles at most.

    Returns:
        All battles, and those whose prompt repeats: part, battles, grouped, random (nats, held
        out), leak (grouped − random), low, high (95 %). None where fewer groups than `n_folds`
        or one kind of vote remain.
    """
    kept = scores.draw_groups(pairs["group"].to_numpy(), max_pairs, seed)
    pairs, differences = pairs.iloc[kept], differences[kept]
    labels = pd.factorize(pairs["label"], sort=True)[0]
    groups = pd.factorize(pairs["group"])[0]
    columns = ["part", "battles", "grouped", "random", "leak", "low", "high"]
    if len(np.unique(groups)) < n_folds or len(np.unique(labels)) < 2:
        return pd.DataFrame(columns=columns)
    features = _leak_features(pairs, differences)
    grouped = GroupKFold(n_folds, shuffle=True, random_state=seed).split(features, groups=groups)
    random = KFold(n_folds, shuffle=True, random_state=seed).split(features)
    losses = [_simple_losses(features, labels, folds) for folds in (grouped, random)]
    repeats = pairs["group"].duplicated(keep=False).to_numpy()
    parts = {"all battles": np.ones_like(repeats), "battles whose prompt repeats": repeats}
    table = scores.compare_slices(losses[0], {"random": losses[1]}, parts, groups)
    return table.drop(columns="verdict").set_axis(columns, axis=1)


def describe_leak(leak: pd.DataFrame) -> str:
    """Say in one clause what `measure_leak` found."""
    if leak.empty:
        return "too few battles to measure what a random split leaks"
    found = leak.iloc[0]
    numbers = with_interval(found["leak"], found["low"], found["high"], "{:+.4f}")
    if found["low"] > 0:
        return f"a random split flatters a simple model by {numbers} nats"
    return f"a random split gives a simple model no measurable advantage: {numbers} nats"


def measure_future(
    pairs: pd.DataFrame,
    differences: np.ndarray,
    is_newest: np.ndarray,
    n_folds: int = 5,
    max_pairs: int = 8_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how much harder the future is than other prompts of the same time.

    The model of `measure_leak` predicts the newest battles, `is_newest` (N,) bool, twice: trained
    on the older ones alone, and on as many battles of all times with other prompts.

    Returns:
        battles, other_prompts, future (nats, of the newest battles), cost (future −
        other_prompts), low, high (95 %). No row where a part holds fewer than two kinds of vote.
    """
    kept = scores.draw_groups(pairs["group"].to_numpy(), max_pairs, seed)
    pairs, differences, newest = pairs.iloc[kept], differences[kept], is_newest[kept]
    labels, groups = pd.factorize(pairs["label"], sort=True)[0], pairs["group"].to_numpy()
    columns = ["battles", "other_prompts", "future", "cost", "low", "high"]
    n_prompts = len(np.unique(groups[newest]))
    if n_prompts < 2 or set(labels[~newest]) != set(labels) or len(set(labels)) < 2:
        return pd.DataFrame(columns=columns)
    features = _leak_features(pairs, differences)
    folds = GroupKFold(n_folds, shuffle=True, random_state=seed).split(features, groups=groups)
    grouped = _simple_losses(features, labels, folds)[newest]
    past = [(np.flatnonzero(~newest), np.flatnonzero(newest))]
    future = _simple_losses(features, labels, past)[newest]
    gap = scores.paired_difference(future, grouped, groups[newest])
    row = (len(future), grouped.mean(), future.mean(), *gap.values())
    return pd.DataFrame([row], columns=columns)


def describe_future(future: pd.DataFrame) -> str:
    """Say in one sentence what `measure_future` found."""
    if future.empty:
        return "Too few battles to measure how much harder the newest are."
    found = future.iloc[0]
    cost = with_interval(found["cost"], found["low"], found["high"], "{:+.4f}")
    text = (
        f"The newest {found['battles']:,.0f} battles: a simple model of the past scores "
        f"{found['future']:.4f} nats, one of other prompts of all times "
        f"{found['other_prompts']:.4f}"
    )
    if found["low"] > 0:
        return f"{text}. The future is harder, by {cost}."
    return f"{text}: the future is not measurably harder ({cost})."


def _simple_losses(
    features: sparse.csr_matrix, labels: np.ndarray, folds: Iterable[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Losses of a logistic regression on what each fold holds out, (N,) nats; NaN elsewhere."""
    losses = np.full(len(labels), np.nan)
    for fitted, held_out in folds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 60 steps are enough for a comparison
            model = LogisticRegression(C=0.1, max_iter=60).fit(features[fitted], labels[fitted])
        probs = model.predict_proba(features[held_out])
        losses[held_out] = scores.row_losses(probs, labels[held_out])
    return losses


def _leak_features(pairs: pd.DataFrame, differences: np.ndarray) -> sparse.csr_matrix:
    words = HashingVectorizer(n_features=2**14, alternate_sign=False)
    openings = pairs[list(TEXTS)].map(lambda turns: join_turns(turns)[:_LEAK_CHARS])
    prompt, a, b = (words.transform(openings[name]) for name in TEXTS)
    style = np.column_stack([differences, np.abs(differences)])
    style = (style - style.mean(axis=0)) / np.maximum(style.std(axis=0), 1e-9)
    return sparse.hstack([np.clip(style, -4, 4) / 4, prompt, a - b], format="csr")


def make_verdict(shares: dict[str, dict[str, Any]], effects: pd.DataFrame) -> pd.DataFrame:
    """Put results of `win_share`, by name, and rows of `effect_sizes` into one table.

    Returns:
        `shares` first, then the effects, those found and the largest before others: effect,
        measure, size, low, high (95 %), n (decided battles), p_value, p_holm (corrected for all
        that were estimated), found ("yes" where p_holm is below 0.05, "no", or "cannot be
        estimated"), advice (of what was found).
    """
    half = pd.DataFrame(shares.values()).rename(columns={"share": "size"})
    half = half.assign(effect=list(shares), measure="share of decided")
    odds = effects.rename(columns={"log_odds": "size"}).assign(measure="log-odds per SD")
    columns = ["effect", "measure", "size", "low", "high", "n", "p_value"]
    table = pd.concat([half[columns], odds[columns]], ignore_index=True)
    table["p_holm"] = correct(table["p_value"])
    table["found"] = np.where(table["p_holm"] < 0.05, "yes", "no")
    table.loc[table["size"].isna(), "found"] = "cannot be estimated"
    # Averaging over the swap is right whatever the evidence.
    acted = (table["found"] == "yes") | (table["effect"] == "position A")
    table["advice"] = table["effect"].map(ADVICE).where(acted)
    rest = table[len(half) :].assign(is_found=table["found"] == "yes", reach=table["size"].abs())
    rest = rest.sort_values(["is_found", "reach"], ascending=False)[table.columns]
    return pd.concat([table[: len(half)], rest], ignore_index=True)
