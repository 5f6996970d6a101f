"""What moves a vote: shares, curves and effects, each with a 95 % interval.

A battle is "decided" when it is no tie. An effect in log-odds is that of A over B
among decided battles; Davidson's model puts ties beside it in the same unit. What
cannot be estimated is NaN with a `reason`, never a wild number.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import sparse, stats
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import logit, softmax
from statsmodels.stats.proportion import proportion_confint

from src.utils.schema import A_WINS, B_WINS, LABEL_NAMES, TIE, UNKNOWN_MODEL

_ALPHA = 0.05
_Z = float(stats.norm.ppf(1 - _ALPHA / 2))
# What a modeller should do about an effect, by its name.
ADVICE = {
    "seat A": "publish the average over the swap, so that no seat is favoured",
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
MIN_SUPPORT = 10  # battles in which a feature must differ before its effect is estimated
# A standard error above this, in log-odds, says that the data bound the effect on one side only.
_MAX_STANDARD_ERROR = 5.0


def proportion_interval(n_hits: np.ndarray, n: np.ndarray, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
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
    low, high = proportion_confint(n_hits, np.maximum(n, 1), _ALPHA, method="beta" if exact else "wilson")
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
    return pd.DataFrame({"outcome": LABEL_NAMES, "n": counts, "share": share, "low": low, "high": high})


def position_effect(labels: np.ndarray) -> dict[str, Any]:
    """Test whether seat A is preferred.

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
    return _half_test(int(hits.sum()), int(kept.sum()), "no decided battle in which the answers differ")


def larger_wins_table(differences: np.ndarray, names: Sequence[str], labels: np.ndarray) -> pd.DataFrame:
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


def larger_wins_by(by: np.ndarray, values: np.ndarray, labels: np.ndarray, n_bins: int = 5) -> pd.DataFrame:
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


def win_rate_by(values: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> tuple[pd.DataFrame, pd.DataFrame]:
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
    return pd.DataFrame(dict(zip(columns, (means, left, right, n, _share(n_hits, n), low, high), strict=True)))[kept]


def effect_sizes(
    differences: np.ndarray,
    names: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    controls: np.ndarray | None = None,
) -> pd.DataFrame:
    """Estimate each feature's effect on who wins, one logistic regression a feature.

    The intercept takes up the seat. Errors are clustered by prompt, because votes on the
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
    held = np.ones((len(y), 1)) if controls is None else np.column_stack([np.ones(len(y)), controls[decided]])
    rows = [_effect_row(differences[decided, f], held, y, codes) for f in range(len(names))]
    columns = ["log_odds", "low", "high", "p_value", "log_odds_per_unit", "sd", "n", "n_differ", "reason"]
    table = pd.DataFrame(rows, columns=columns).astype({"reason": object})
    table.insert(0, "effect", list(names))
    return table.assign(reason=table["reason"].where(table["reason"].notna(), None))


def _group_codes(groups: np.ndarray | None, n_pairs: int) -> np.ndarray:
    return np.arange(n_pairs) if groups is None else pd.factorize(np.asarray(groups))[0]


def _effect_row(values: np.ndarray, held: np.ndarray, y: np.ndarray, codes: np.ndarray) -> list[Any]:
    n_differ, sd = int(np.count_nonzero(values)), float(values.std()) if len(values) else np.nan
    row = [np.nan] * 5 + [sd, len(y), n_differ]
    reason = _why_no_effect(values, held, y, codes, n_differ)
    if reason:
        return [*row, reason]
    estimate, error, reason = _fit_logit(np.column_stack([held, values / sd]), y, codes)
    if reason:
        return [*row, reason]
    p_value = float(2 * stats.norm.sf(abs(estimate) / error))
    return [estimate, estimate - _Z * error, estimate + _Z * error, p_value, estimate / sd, *row[5:], None]


def _why_no_effect(values: np.ndarray, held: np.ndarray, y: np.ndarray, codes: np.ndarray, n_differ: int) -> str | None:
    if len(y) < MIN_SUPPORT or len(np.unique(y)) < 2:
        return f"{len(y)} decided battles, {int(y.sum())} won by A: too few of one kind"
    if n_differ < MIN_SUPPORT or values.std() == 0:
        return f"the answers differ in {n_differ} decided battles, fewer than {MIN_SUPPORT}"
    if len(np.unique(codes)) < MIN_SUPPORT:
        return f"{len(np.unique(codes))} prompts, fewer than {MIN_SUPPORT}"
    residual = values - held @ np.linalg.lstsq(held, values, rcond=None)[0]
    return "cannot be told from what is held constant" if residual.std() < 1e-6 * values.std() else None


def _fit_logit(design: np.ndarray, y: np.ndarray, codes: np.ndarray) -> tuple[float, float, str | None]:
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


def model_records(model_a: Sequence[str], model_b: Sequence[str], labels: np.ndarray) -> pd.DataFrame:
    """Count each chatbot's battles and wins; unknown names are left out.

    Args:
        model_a: (N,) names in seat A.
        model_b: (N,) names in seat B.
        labels: (N,) int, 0 A, 1 B, 2 tie.

    Returns:
        One row a chatbot, most battles first: model, n, n_decided, win_share (of decided),
        low, high (Wilson), tie_share (of all).
    """
    labels = np.asarray(labels)
    seats = [
        pd.DataFrame({"model": np.asarray(names, dtype=object), "won": labels == seat, "tied": labels == TIE})
        for names, seat in ((model_a, A_WINS), (model_b, B_WINS))
    ]
    each = pd.concat(seats).query("model != @UNKNOWN_MODEL").groupby("model", sort=True)
    records = each.agg(n=("won", "size"), n_won=("won", "sum"), n_tied=("tied", "sum")).astype(int).reset_index()
    records["n_decided"] = records["n"] - records["n_tied"]
    records["win_share"] = _share(records["n_won"], records["n_decided"])
    records["low"], records["high"] = proportion_interval(records["n_won"], records["n_decided"])
    records["tie_share"] = _share(records["n_tied"], records["n"])
    kept = ["model", "n", "n_decided", "win_share", "low", "high", "tie_share"]
    return records[kept].sort_values("n", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True)
class VoteModel:
    """A fitted Davidson model.

    `strengths`, one row a chatbot: model, n (battles), strength (log-odds against the mean
    of those shown), low, high, reason. `effects`, one row each for "seat A", "tie" (log ν)
    and every covariate: effect, log_odds_per_unit, low, high (per unit), log_odds (per
    standard deviation), sd, reason. `n` battles used; `reason` why nothing was fitted.
    """

    strengths: pd.DataFrame
    effects: pd.DataFrame
    n: int
    log_likelihood: float = np.nan  # nats, summed over battles
    reason: str | None = None


_STRENGTH_COLUMNS = ("model", "n", "strength", "low", "high", "reason")
_EFFECT_COLUMNS = ("effect", "log_odds_per_unit", "low", "high", "log_odds", "sd", "reason")


def fit_votes(covariates: pd.DataFrame, labels: np.ndarray, groups: np.ndarray | None = None) -> VoteModel:
    """Fit all effects at once, ties included, without chatbots' names.

    Args:
        covariates: N rows, one column a difference A − B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        groups: (N,) prompt of each battle, for clustered errors.

    Returns:
        A `VoteModel` without strengths.
    """
    unknown = np.full(len(labels), UNKNOWN_MODEL, dtype=object)
    return _fit_davidson(_design_models(unknown, unknown, []), [], covariates, np.asarray(labels), groups)


def fit_bradley_terry(
    model_a: Sequence[str],
    model_b: Sequence[str],
    labels: np.ndarray,
    covariates: pd.DataFrame | None = None,
    groups: np.ndarray | None = None,
    min_battles: int = 30,
) -> VoteModel:
    """Estimate the chatbots' strengths, with ties, seat and (where given) style held constant.

    With η = strength_A − strength_B + seat + covariates·β, the odds of A : B : tie are
    exp(η/2) : exp(−η/2) : ν. Chatbots that no chain of wins and losses links to the rest
    have no finite strength and are left out of the fit (Ford 1957, doi:10.2307/2308513). Errors are sandwich
    errors, clustered by prompt. Without a tie the model is Bradley–Terry's.

    Args:
        model_a: (N,) names in seat A; battles with an unknown name are left out.
        model_b: (N,) names in seat B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        covariates: N rows, one column a difference A − B; None for no control.
        groups: (N,) prompt of each battle; None takes every battle for itself.
        min_battles: a chatbot with fewer is fitted but not reported.

    Returns:
        A `VoteModel`; strengths have mean zero over the chatbots reported.

    Source: Davidson 1970, doi:10.1080/01621459.1970.10481082; seat as in Davidson and Beaver
        1977, doi:10.2307/2529467; style as in https://lmsys.org/blog/2024-08-28-style-control.
    """
    model_a, model_b = np.asarray(model_a, dtype=object), np.asarray(model_b, dtype=object)
    labels = np.asarray(labels)
    records = model_records(model_a, model_b, labels)
    models = _linked_models(model_a, model_b, labels)
    kept = np.isin(model_a, models) & np.isin(model_b, models)
    if not kept.any():
        strengths = records[["model", "n"]].assign(strength=np.nan, low=np.nan, high=np.nan, reason=_UNLINKED)
        why = "the chatbots' names are unknown" if records.empty else "no two chatbots have beaten each other"
        return VoteModel(strengths, _no_effects(covariates, why), 0, reason=why)
    fitted = _fit_davidson(
        _design_models(model_a[kept], model_b[kept], models),
        models,
        None if covariates is None else covariates[kept],
        labels[kept],
        None if groups is None else np.asarray(groups)[kept],
        min_battles=min_battles,
    )
    rows = records[["model", "n"]].merge(fitted.strengths.drop(columns="n"), on="model", how="left")
    rows.loc[~rows["model"].isin(models), "reason"] = _UNLINKED
    rows = rows.sort_values("strength", ascending=False, kind="stable", ignore_index=True)
    return VoteModel(rows, fitted.effects, fitted.n, fitted.log_likelihood, fitted.reason)


_UNLINKED = "not linked to the other chatbots by both a win and a loss"


def _linked_models(model_a: np.ndarray, model_b: np.ndarray, labels: np.ndarray) -> list[str]:
    """The largest set of chatbots in which a chain of wins leads from each to each; a tie counts both ways."""
    known = (model_a != UNKNOWN_MODEL) & (model_b != UNKNOWN_MODEL) & (model_a != model_b)
    names = sorted({*model_a[known], *model_b[known]})
    if not names:
        return []
    a, b = (pd.Categorical(seat[known], categories=names).codes for seat in (model_a, model_b))
    beats, beaten = labels[known] != B_WINS, labels[known] != A_WINS
    edges = np.concatenate([a[beats], b[beaten]]), np.concatenate([b[beats], a[beaten]])
    graph = sparse.coo_matrix((np.ones(len(edges[0])), edges), shape=(len(names),) * 2)
    _, component = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(component)
    return [name for name, c in zip(names, component, strict=True) if c == sizes.argmax()] if sizes.max() > 1 else []


def _design_models(model_a: np.ndarray, model_b: np.ndarray, models: list[str]) -> np.ndarray:
    """(N, M − 1) float: +1 in A's column, −1 in B's; the first chatbot is the reference and has no column."""
    design = np.zeros((len(model_a), len(models)))
    if models:
        rows = np.arange(len(model_a))
        np.add.at(design, (rows, pd.Categorical(model_a, categories=models).codes), 1)
        np.add.at(design, (rows, pd.Categorical(model_b, categories=models).codes), -1)
    return design[:, 1:]


def _fit_davidson(
    design: np.ndarray,
    models: list[str],
    covariates: pd.DataFrame | None,
    labels: np.ndarray,
    groups: np.ndarray | None,
    min_battles: int = 0,
) -> VoteModel:
    covariates = pd.DataFrame(index=range(len(labels))) if covariates is None else covariates
    values = covariates.to_numpy(dtype=np.float64)
    supported = (values != 0).sum(axis=0) >= MIN_SUPPORT
    sds = values.std(axis=0) if len(values) else np.full(values.shape[1], np.nan)
    used = supported & (sds > 0)
    full = np.column_stack([design, np.ones(len(labels)), values[:, used] / sds[used]])
    n_battles = (design != 0).sum(axis=0)
    params, cov, log_likelihood, reason = _maximise(full, labels, _group_codes(groups, len(labels)), design.shape[1])
    if reason:
        return VoteModel(_no_strengths(models, reason), _no_effects(covariates, reason), len(labels), reason=reason)
    n_models = design.shape[1]
    # The reference's battles are those that no other chatbot's column shows.
    n_first = int((np.abs(design).sum(axis=1) == 1).sum())
    counts = np.array([n_first, *n_battles]) if models else np.array([], dtype=int)
    strengths = _strength_table(models, counts, params[:n_models], cov[:n_models, :n_models], min_battles)
    effects = _effect_table(covariates.columns, used, sds, params[n_models:], cov[n_models:, n_models:])
    return VoteModel(strengths, effects, len(labels), log_likelihood)


def _log_probs(params: np.ndarray, design: np.ndarray, with_ties: bool) -> tuple[np.ndarray, np.ndarray]:
    eta = design @ params[: design.shape[1]]
    log_nu = params[-1] if with_ties else -np.inf
    scores = np.column_stack([eta / 2, -eta / 2, np.full(len(eta), log_nu)])
    probs = softmax(scores, axis=1)
    return scores - scores.max(axis=1, keepdims=True), probs


def _row_scores(probs: np.ndarray, design: np.ndarray, labels: np.ndarray, with_ties: bool) -> np.ndarray:
    """(N, P) float, each battle's gradient of the log-likelihood."""
    side = ((labels == A_WINS) - probs[:, A_WINS] - (labels == B_WINS) + probs[:, B_WINS]) / 2
    columns = [design * side[:, None]]
    if with_ties:
        columns.append(((labels == TIE) - probs[:, TIE])[:, None])
    return np.hstack(columns)


def _information(probs: np.ndarray, design: np.ndarray, with_ties: bool) -> np.ndarray:
    """(P, P) float, minus the Hessian of the log-likelihood."""
    mean_side = (probs[:, A_WINS] - probs[:, B_WINS]) / 2
    variance = (probs[:, A_WINS] + probs[:, B_WINS]) / 4 - mean_side**2
    block = design.T @ (design * variance[:, None])
    if not with_ties:
        return block
    cross = -design.T @ (mean_side * probs[:, TIE])
    tie = (probs[:, TIE] * (1 - probs[:, TIE])).sum()
    return np.block([[block, cross[:, None]], [cross[None, :], np.array([[tie]])]])


def _maximise(
    design: np.ndarray, labels: np.ndarray, codes: np.ndarray, n_models: int
) -> tuple[np.ndarray, np.ndarray, float, str | None]:
    """Parameters (design's columns, then log ν), their clustered covariance, log-likelihood, and why not.

    The first `n_models` columns are strengths, whose existence the links have proven.
    """
    counts = np.bincount(labels, minlength=len(LABEL_NAMES))
    n_params, with_ties = design.shape[1] + 1, counts[TIE] > 0
    nothing = np.full(n_params, np.nan), np.full((n_params, n_params), np.nan), np.nan
    if min(counts[A_WINS], counts[B_WINS]) == 0 or len(labels) < MIN_SUPPORT + n_params:
        return *nothing, f"{len(labels)} battles ({counts[A_WINS]} A, {counts[B_WINS]} B, {counts[TIE]} tie): too few"
    if len(np.unique(codes)) < MIN_SUPPORT:
        return *nothing, f"{len(np.unique(codes))} prompts, fewer than {MIN_SUPPORT}"

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        scores, probs = _log_probs(params, design, with_ties)
        log_likelihood = scores[np.arange(len(labels)), labels] - np.log(np.exp(scores).sum(axis=1))
        return -log_likelihood.mean(), -_row_scores(probs, design, labels, with_ties).mean(axis=0)

    def hessian(params: np.ndarray) -> np.ndarray:
        return _information(_log_probs(params, design, with_ties)[1], design, with_ties) / len(labels)

    start = np.zeros(design.shape[1] + with_ties)
    result = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-8})
    cov, spread = _sandwich(result.x, design, labels, codes, with_ties)
    if not np.all(spread[n_models:] < _MAX_STANDARD_ERROR):
        return *nothing, "effects cannot be told apart, or one side of one always wins"
    if not with_ties:
        cov = np.pad(cov, (0, 1), constant_values=np.nan)
    return np.append(result.x, [] if with_ties else np.nan), cov, -float(result.fun) * len(labels), None


def _sandwich(
    params: np.ndarray, design: np.ndarray, labels: np.ndarray, codes: np.ndarray, with_ties: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Clustered covariance, and the model's own standard errors, which are huge where nothing bounds an effect."""
    probs = _log_probs(params, design, with_ties)[1]
    information = _information(probs, design, with_ties)
    if np.linalg.cond(information) > 1e12:
        return np.full_like(information, np.nan), np.full(len(params), np.inf)
    bread = np.linalg.inv(information)
    n_groups = codes.max() + 1
    rows = _row_scores(probs, design, labels, with_ties)
    members = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n_groups, len(codes)))
    by_group = members @ rows
    meat = by_group.T @ by_group * n_groups / max(n_groups - 1, 1)
    return bread @ meat @ bread, np.sqrt(np.diag(bread))


def _no_strengths(models: list[str], reason: str) -> pd.DataFrame:
    missing = np.full(len(models), np.nan)
    columns = (models, missing, missing, missing, missing, [reason] * len(models))
    return pd.DataFrame(dict(zip(_STRENGTH_COLUMNS, columns, strict=True)))


def _no_effects(covariates: pd.DataFrame | None, reason: str) -> pd.DataFrame:
    names = ["seat A", "tie", *([] if covariates is None else covariates.columns)]
    missing = np.full(len(names), np.nan)
    columns = (names, *[missing] * 5, [reason] * len(names))
    return pd.DataFrame(dict(zip(_EFFECT_COLUMNS, columns, strict=True)))


def _strength_table(
    models: list[str], counts: np.ndarray, params: np.ndarray, cov: np.ndarray, min_battles: int
) -> pd.DataFrame:
    if not models:
        return _no_strengths([], "")
    strengths, cov = np.append(0, params), np.pad(cov, (1, 0))
    shown = counts >= min_battles
    # Mean zero over those shown: the covariance follows the same contrast.
    contrast = np.eye(len(models)) - shown / max(shown.sum(), 1)
    strengths = np.where(shown, contrast @ strengths, np.nan)
    error = np.sqrt(np.diag(contrast @ cov @ contrast.T))
    reasons = [None if n >= min_battles else f"{n} battles, fewer than {min_battles}" for n in counts]
    columns = (models, counts, strengths, strengths - _Z * error, strengths + _Z * error, reasons)
    return pd.DataFrame(dict(zip(_STRENGTH_COLUMNS, columns, strict=True)))


def _effect_table(
    names: pd.Index, used: np.ndarray, sds: np.ndarray, params: np.ndarray, cov: np.ndarray
) -> pd.DataFrame:
    """Effects from parameters ordered seat, used covariates, log ν."""
    error = np.sqrt(np.diag(cov))
    order = [0, len(params) - 1, *range(1, len(params) - 1)]
    scale = np.array([1, 1, *sds[used]])
    estimate, error = params[order], error[order]
    effects = ["seat A", "tie", *names[used]]
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
    missing = _no_effects(pd.DataFrame(columns=names[~used]), f"differs in fewer than {MIN_SUPPORT} battles")[2:]
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
    half = pd.DataFrame(shares.values()).assign(effect=list(shares), measure="share of decided", null=0.5)
    odds = effects.assign(measure="log-odds per SD", null=0.0)
    columns = ["effect", "measure", "size", "low", "high", "n", "null"]
    parts = [half.rename(columns={"share": "size"})[columns], odds.rename(columns={"log_odds": "size"})[columns]]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    excludes = (table["low"] > table["null"]) | (table["high"] < table["null"])
    table["found"] = np.where(table["size"].isna(), "cannot be estimated", np.where(excludes, "yes", "no"))
    acted = (table["found"] == "yes") | (table["effect"] == "seat A")  # averaging over the swap costs no evidence
    table["advice"] = table["effect"].map(ADVICE).where(acted, "no reason to act in these battles")
    return table.drop(columns="null")


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Turn a table into plain JSON values, one dict a row; NaN becomes None."""
    return [
        {key: _to_json(value) for key, value in row.items()} for row in table.astype(object).to_dict(orient="records")
    ]


def _to_json(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not np.isfinite(plain) else plain
