"""TODO"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import softmax

from src.utils.schema import A_WINS, B_WINS, LABEL_NAMES, TIE, UNKNOWN_MODEL
from src.utils.stats.effects import (
    _ALPHA,
    _MAX_STANDARD_ERROR,
    _Z,
    MIN_SUPPORT,
    _effect_table,
    _group_codes,
    _no_effects,
    _resample_weights,
    _share,
    proportion_interval,
    tie_effects,
)


def model_records(
    model_a: Sequence[str], model_b: Sequence[str], labels: np.ndarray
) -> pd.DataFrame:
    """Count each chatbot's battles and wins; unknown names are left out.

    Args:
        model_a: (N,) names in position A.
        model_b: (N,) names in position B.
        labels: (N,) int, 0 A, 1 B, 2 tie.

    Returns:
        One row a chatbot, most battles first: model, n, n_decided, win_share (of decided),
        low, high (Wilson), tie_share (of all).
    """
    labels = np.asarray(labels)
    positions = [
        pd.DataFrame(
            {
                "model": np.asarray(names, dtype=object),
                "won": labels == position,
                "tied": labels == TIE,
            }
        )
        for names, position in ((model_a, A_WINS), (model_b, B_WINS))
    ]
    each = pd.concat(positions).query("model != @UNKNOWN_MODEL").groupby("model", sort=True)
    records = (
        each.agg(n=("won", "size"), n_won=("won", "sum"), n_tied=("tied", "sum"))
        .astype(int)
        .reset_index()
    )
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
    of those shown), low, high, reason. `effects`, one row each for "position A", "tie" (log ν)
    and every covariate: effect, log_odds_per_unit, low, high (per unit), log_odds (per
    standard deviation), sd, reason. `n` battles used; `reason` why nothing was fitted.
    """

    strengths: pd.DataFrame
    effects: pd.DataFrame
    n: int
    log_likelihood: float = np.nan  # nats, summed over battles
    reason: str | None = None


_STRENGTH_COLUMNS = ("model", "n", "strength", "low", "high", "reason")


def fit_votes(
    covariates: pd.DataFrame, labels: np.ndarray, groups: np.ndarray | None = None
) -> VoteModel:
    """Fit all effects at once, ties included, without chatbots' names.

    Args:
        covariates: N rows, one column a difference A − B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        groups: (N,) prompt of each battle, for clustered errors.

    Returns:
        A `VoteModel` without strengths.
    """
    unknown = np.full(len(labels), UNKNOWN_MODEL, dtype=object)
    return _fit_davidson(
        _design_models(unknown, unknown, []), [], covariates, np.asarray(labels), groups
    )


def fit_bradley_terry(
    model_a: Sequence[str],
    model_b: Sequence[str],
    labels: np.ndarray,
    covariates: pd.DataFrame | None = None,
    groups: np.ndarray | None = None,
    min_battles: int = 30,
) -> VoteModel:
    """Estimate the chatbots' strengths, with ties, position and (where given) style held constant.

    With η = strength_A − strength_B + position + covariates·β, the odds of A : B : tie are
    exp(η/2) : exp(−η/2) : ν. Chatbots that no chain of wins and losses links to the rest
    have no finite strength and are left out of the fit (Ford 1957, doi:10.2307/2308513). Errors are sandwich
    errors, clustered by prompt. Without a tie the model is Bradley–Terry's.

    Args:
        model_a: (N,) names in position A; battles with an unknown name are left out.
        model_b: (N,) names in position B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        covariates: N rows, one column a difference A − B; None for no control.
        groups: (N,) prompt of each battle; None takes every battle for itself.
        min_battles: a chatbot with fewer is fitted but not reported.

    Returns:
        A `VoteModel`; strengths have mean zero over the chatbots reported.

    Source: Davidson 1970, doi:10.1080/01621459.1970.10481082; position as in Davidson and Beaver
        1977, doi:10.2307/2529467; style as in https://lmsys.org/blog/2024-08-28-style-control.
    """
    model_a, model_b = np.asarray(model_a, dtype=object), np.asarray(model_b, dtype=object)
    labels = np.asarray(labels)
    records = model_records(model_a, model_b, labels)
    models = _linked_models(model_a, model_b, labels)
    kept = np.isin(model_a, models) & np.isin(model_b, models)
    if not kept.any():
        strengths = records[["model", "n"]].assign(
            strength=np.nan, low=np.nan, high=np.nan, reason=_UNLINKED
        )
        why = (
            "the chatbots' names are unknown"
            if records.empty
            else "no two chatbots have beaten each other"
        )
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
    a, b = (
        pd.Categorical(position[known], categories=names).codes for position in (model_a, model_b)
    )
    beats, beaten = labels[known] != B_WINS, labels[known] != A_WINS
    edges = np.concatenate([a[beats], b[beaten]]), np.concatenate([b[beats], a[beaten]])
    graph = sparse.coo_matrix((np.ones(len(edges[0])), edges), shape=(len(names),) * 2)
    _, component = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(component)
    return (
        [name for name, c in zip(names, component, strict=True) if c == sizes.argmax()]
        if sizes.max() > 1
        else []
    )


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
    full, used, sds = _add_covariates(design, covariates)
    n_battles = (design != 0).sum(axis=0)
    params, cov, log_likelihood, reason = _maximise(
        full, labels, _group_codes(groups, len(labels)), design.shape[1]
    )
    if reason:
        return VoteModel(
            _no_strengths(models, reason),
            _no_effects(covariates, reason),
            len(labels),
            reason=reason,
        )
    n_models = design.shape[1]
    # The reference's battles are those that no other chatbot's column shows.
    n_first = int((np.abs(design).sum(axis=1) == 1).sum())
    counts = np.array([n_first, *n_battles]) if models else np.array([], dtype=int)
    strengths = _strength_table(
        models, counts, params[:n_models], cov[:n_models, :n_models], min_battles
    )
    effects = _effect_table(
        covariates.columns, used, sds, params[n_models:], cov[n_models:, n_models:]
    )
    return VoteModel(strengths, effects, len(labels), log_likelihood)


def _add_covariates(
    design: np.ndarray, covariates: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The design with a column for the position and the supported covariates, which these are, and all spreads."""
    values = covariates.to_numpy(dtype=np.float64)
    sds = values.std(axis=0) if len(values) else np.full(values.shape[1], np.nan)
    used = ((values != 0).sum(axis=0) >= MIN_SUPPORT) & (sds > 0)
    return np.column_stack([design, np.ones(len(design)), values[:, used] / sds[used]]), used, sds


def _log_probs(
    params: np.ndarray, design: np.ndarray, with_ties: bool
) -> tuple[np.ndarray, np.ndarray]:
    eta = design @ params[: design.shape[1]]
    log_nu = params[-1] if with_ties else -np.inf
    scores = np.column_stack([eta / 2, -eta / 2, np.full(len(eta), log_nu)])
    probs = softmax(scores, axis=1)
    return scores - scores.max(axis=1, keepdims=True), probs


def _row_scores(
    probs: np.ndarray, design: np.ndarray, labels: np.ndarray, with_ties: bool
) -> np.ndarray:
    """(N, P) float, each battle's gradient of the log-likelihood."""
    side = ((labels == A_WINS) - probs[:, A_WINS] - (labels == B_WINS) + probs[:, B_WINS]) / 2
    columns = [design * side[:, None]]
    if with_ties:
        columns.append(((labels == TIE) - probs[:, TIE])[:, None])
    return np.hstack(columns)


def _information(
    probs: np.ndarray, design: np.ndarray, with_ties: bool, n: np.ndarray | float = 1.0
) -> np.ndarray:
    """(P, P) float, minus the Hessian of the log-likelihood; `n` counts the votes of each row."""
    mean_side = (probs[:, A_WINS] - probs[:, B_WINS]) / 2
    variance = (probs[:, A_WINS] + probs[:, B_WINS]) / 4 - mean_side**2
    block = design.T @ (design * (n * variance)[:, None])
    if not with_ties:
        return block
    cross = -design.T @ (n * mean_side * probs[:, TIE])
    tie = (n * probs[:, TIE] * (1 - probs[:, TIE])).sum()
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
        return (
            *nothing,
            f"{len(labels)} battles ({counts[A_WINS]} A, {counts[B_WINS]} B, {counts[TIE]} tie): too few",
        )
    if len(np.unique(codes)) < MIN_SUPPORT:
        return *nothing, f"{len(np.unique(codes))} prompts, fewer than {MIN_SUPPORT}"

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        scores, probs = _log_probs(params, design, with_ties)
        log_likelihood = scores[np.arange(len(labels)), labels] - np.log(np.exp(scores).sum(axis=1))
        return -log_likelihood.mean(), -_row_scores(probs, design, labels, with_ties).mean(axis=0)

    def hessian(params: np.ndarray) -> np.ndarray:
        return _information(_log_probs(params, design, with_ties)[1], design, with_ties) / len(
            labels
        )

    start = np.zeros(design.shape[1] + with_ties)
    result = minimize(
        loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-8}
    )
    cov, spread = _sandwich(result.x, design, labels, codes, with_ties)
    if not np.all(spread[n_models:] < _MAX_STANDARD_ERROR):
        return *nothing, "effects cannot be told apart, or one side of one always wins"
    if not with_ties:
        cov = np.pad(cov, (0, 1), constant_values=np.nan)
    return (
        np.append(result.x, [] if with_ties else np.nan),
        cov,
        -float(result.fun) * len(labels),
        None,
    )


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
    members = sparse.csr_matrix(
        (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n_groups, len(codes))
    )
    by_group = members @ rows
    meat = by_group.T @ by_group * n_groups / max(n_groups - 1, 1)
    return bread @ meat @ bread, np.sqrt(np.diag(bread))


def _no_strengths(models: list[str], reason: str) -> pd.DataFrame:
    missing = np.full(len(models), np.nan)
    columns = (models, missing, missing, missing, missing, [reason] * len(models))
    return pd.DataFrame(dict(zip(_STRENGTH_COLUMNS, columns, strict=True)))


def _strength_table(
    models: list[str], counts: np.ndarray, params: np.ndarray, cov: np.ndarray, min_battles: int
) -> pd.DataFrame:
    if not models:
        return _no_strengths([], "")
    strengths, cov = np.append(0, params), np.pad(cov, (1, 0))
    shown = counts >= min_battles
    contrast = _centre(shown)
    strengths = np.where(shown, contrast @ strengths, np.nan)
    error = np.sqrt(np.diag(contrast @ cov @ contrast.T))
    reasons = [
        None if n >= min_battles else f"{n} battles, fewer than {min_battles}" for n in counts
    ]
    columns = (models, counts, strengths, strengths - _Z * error, strengths + _Z * error, reasons)
    return pd.DataFrame(dict(zip(_STRENGTH_COLUMNS, columns, strict=True)))


def _centre(shown: np.ndarray) -> np.ndarray:
    """(M, M) float, the contrast that makes the mean of those shown zero; covariances follow it too."""
    return np.eye(len(shown)) - shown / max(shown.sum(), 1)


def bootstrap_strengths(
    model_a: Sequence[str],
    model_b: Sequence[str],
    labels: np.ndarray,
    covariates: pd.DataFrame | None = None,
    groups: np.ndarray | None = None,
    min_battles: int = 30,
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Bound the strengths of `fit_bradley_terry` again, by resampling whole prompts.

    A resample takes Newton steps from the estimate of all battles, two without covariates
    and one with them (whose battles cannot be pooled into counts).

    Args:
        model_a: (N,) names in position A.
        model_b: (N,) names in position B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        covariates: N rows, one column a difference A − B; None for no control.
        groups: (N,) prompt of each battle; None takes every battle for itself.
        min_battles: a chatbot with fewer is fitted but not reported.
        n_boot: resamples.
        seed: of the resampling.

    Returns:
        One row a chatbot that `fit_bradley_terry` reports: model, low, high (95 %,
        percentiles); none where it reports none.

    Source: Efron and Tibshirani 1993, chapter 13; Field and Welsh 2007, doi:10.1111/j.1467-9868.2007.00593.x.
    """
    model_a, model_b = np.asarray(model_a, dtype=object), np.asarray(model_b, dtype=object)
    labels, codes = np.asarray(labels), _group_codes(groups, len(labels))
    models = _linked_models(model_a, model_b, labels)
    kept = np.isin(model_a, models) & np.isin(model_b, models)
    design = _design_models(model_a[kept], model_b[kept], models)
    controls = pd.DataFrame(index=range(len(design))) if covariates is None else covariates[kept]
    full, _, _ = _add_covariates(design, controls)
    labels, codes = labels[kept], pd.factorize(codes[kept])[0]
    nothing = pd.DataFrame({"model": [], "low": [], "high": []})
    if not kept.any():
        return nothing
    params, _, _, reason = _maximise(full, labels, codes, design.shape[1])
    if reason:
        return nothing
    draws = _resample_davidson(
        params, full, labels, codes, n_boot, seed, n_steps=2 if covariates is None else 1
    )
    names = np.concatenate([model_a[kept], model_b[kept]])
    shown = np.array([(names == name).sum() for name in models]) >= min_battles
    strengths = np.column_stack([np.zeros(n_boot), draws[:, : len(models) - 1]]) @ _centre(shown).T
    low, high = np.quantile(strengths, [_ALPHA / 2, 1 - _ALPHA / 2], axis=0)
    return pd.DataFrame({"model": models, "low": low, "high": high})[shown].reset_index(drop=True)


def _resample_davidson(
    params: np.ndarray,
    design: np.ndarray,
    labels: np.ndarray,
    codes: np.ndarray,
    n_boot: int,
    seed: int,
    n_steps: int,
) -> np.ndarray:
    """(n_boot, P) float, parameters of each resample."""
    with_ties = bool((labels == TIE).any())
    params = params if with_ties else params[:-1]
    # Battles with the same row of the design are one row with counts.
    rows, cells = (
        np.unique(design, axis=0, return_inverse=True)
        if n_steps > 1
        else (design, np.arange(len(design)))
    )
    rows = rows.astype(np.float32)  # half the time, and exact to a thousandth of a standard error
    places, n_classes = cells.ravel() * len(LABEL_NAMES) + labels, len(LABEL_NAMES)
    first = _log_probs(params, rows, with_ties)[1]
    draws = np.empty((n_boot, len(params)))
    for draw, weights in zip(draws, _resample_weights(codes, n_boot, seed), strict=True):
        votes = np.bincount(places, weights=weights, minlength=len(rows) * n_classes).reshape(
            -1, n_classes
        )
        draw[:] = params + _davidson_step(first, rows, votes, with_ties)
        for _ in range(n_steps - 1):
            draw += _davidson_step(_log_probs(draw, rows, with_ties)[1], rows, votes, with_ties)
    return draws


def _davidson_step(
    probs: np.ndarray, design: np.ndarray, votes: np.ndarray, with_ties: bool
) -> np.ndarray:
    """One Newton step on votes counted by row and label; the shortest one where a resample says too little."""
    votes, probs = votes.astype(design.dtype), probs.astype(design.dtype)
    n = votes.sum(axis=1)
    surplus = votes - n[:, None] * probs
    gradient = design.T @ ((surplus[:, A_WINS] - surplus[:, B_WINS]) / 2)
    if with_ties:
        gradient = np.append(gradient, surplus[:, TIE].sum())
    information = _information(probs, design, with_ties, n).astype(np.float64)
    return np.linalg.lstsq(information, gradient, rcond=1e-7)[0]


def compare_intervals(strengths: pd.DataFrame, resampled: pd.DataFrame) -> pd.DataFrame:
    """Lay sandwich and bootstrap intervals side by side.

    Args:
        strengths: of `fit_bradley_terry`.
        resampled: of `bootstrap_strengths`.

    Returns:
        One row a chatbot: model, n, strength, low, high (sandwich), boot_low, boot_high, and
        width_ratio, bootstrap over sandwich.
    """
    both = strengths[["model", "n", "strength", "low", "high"]].dropna(subset=["strength"])
    bounds = resampled.set_index("model")
    both = both.assign(
        **{
            f"boot_{side}": both["model"].map(bounds[side]).astype(float)
            for side in ("low", "high")
        }
    )
    return both.assign(
        width_ratio=(both["boot_high"] - both["boot_low"]) / (both["high"] - both["low"])
    )


def name_families(models: Sequence[str]) -> np.ndarray:
    """The family of each chatbot: the letters that open its name, "unknown" where there are none.

    Example:
        "gpt-4-0613", "gpt35", "claude-2.1" -> "gpt", "gpt", "claude"
    """
    opened = (re.match(r"[A-Za-z]+", str(name)) for name in models)
    return np.array(
        [match[0].lower() if match else UNKNOWN_MODEL for match in opened], dtype=object
    )


def family_ties(
    model_a: Sequence[str],
    model_b: Sequence[str],
    labels: np.ndarray,
    strengths: pd.DataFrame,
    groups: np.ndarray | None = None,
    controls: np.ndarray | None = None,
) -> pd.DataFrame:
    """Estimate whether rivals of one family tie more often.

    Within a family one answer's gain is the other's loss, so ties are all that a shared
    family can move.

    Args:
        model_a: (N,) names in position A.
        model_b: (N,) names in position B.
        labels: (N,) int, 0 A, 1 B, 2 tie.
        strengths: of `fit_bradley_terry`; battles of chatbots without strength are left out.
        groups: (N,) prompt of each battle, for clustered errors.
        controls: (N, K) float, properties of the battle to hold constant beside the gap in strength.

    Returns:
        Two rows of `tie_effects` for a shared family, per unit in `log_odds_per_unit`: "alone"
        and "at equal strength".
    """
    known = strengths.dropna(subset=["strength"]).set_index("model")["strength"]
    gap = np.abs(
        pd.Series(model_a).map(known).to_numpy(float)
        - pd.Series(model_b).map(known).to_numpy(float)
    )
    kept = np.isfinite(gap)
    same = (name_families(model_a) == name_families(model_b)).astype(np.float64)[kept, None]
    held = gap[kept, None] if controls is None else np.column_stack([gap, controls])[kept]
    labels, codes = np.asarray(labels)[kept], _group_codes(groups, len(labels))[kept]
    return pd.concat(
        [
            tie_effects(same, ["alone"], labels, codes),
            tie_effects(same, ["at equal strength"], labels, codes, held),
        ],
        ignore_index=True,
    )
