"""Rank chatbots and estimate all effects at once: Bradley–Terry–Davidson, ties included.

With η the log-odds of A over B, the odds of A : B : tie are exp(η/2) : exp(−η/2) : ν. Errors
are sandwich errors, clustered by prompt. What cannot be estimated is NaN, with a `reason`.
In all functions `model_a` and `model_b` are (N,) names, `labels` is (N,) int, 0 A, 1 B, 2 tie,
and `groups` (N,) the prompt of each battle; without it every battle is its own group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax
from scipy.stats import binomtest

from src.utils.schema import A_WINS, B_WINS, TIE, UNKNOWN_MODEL
from src.utils.stats.scores import Z_95, correct, proportion_interval

MIN_SUPPORT = 10  # battles in which a feature must differ before its effect is estimated
# A larger standard error, in log-odds, means that the data bound an effect on one side only.
MAX_STANDARD_ERROR = 5.0
_INSEPARABLE = "effects cannot be separated, or one side of one always wins"


def group_codes(groups: np.ndarray | None, n_pairs: int) -> np.ndarray:
    """Number the groups: (N,) any hashable -> (N,) int from 0; None: every battle is its own."""
    return np.arange(n_pairs) if groups is None else pd.factorize(np.asarray(groups))[0]


def davidson_logits(eta: np.ndarray, log_nu: np.ndarray | float) -> np.ndarray:
    """Compute the logits of Davidson's model, (N, C) in the order of `schema.LABELS`.

    `eta`, (N,), are log-odds of A over B; `log_nu`, (N,) or one for all, is the log weight of a
    tie: −inf means no ties.
    """
    ties = np.broadcast_to(log_nu, np.shape(eta))
    return np.column_stack([eta / 2, -eta / 2, ties])


def model_records(
    model_a: Sequence[str], model_b: Sequence[str], labels: np.ndarray
) -> pd.DataFrame:
    """Count each chatbot's battles and wins; unknown names are left out.

    Returns:
        One row per chatbot, most battles first: model, n, n_decided, win_share (of decided),
        low, high (Wilson), tie_share (of all).
    """
    names = np.concatenate([np.asarray(model_a), np.asarray(model_b)])
    won = np.concatenate([np.equal(labels, A_WINS), np.equal(labels, B_WINS)])
    each = pd.DataFrame({"model": names, "won": won, "tied": np.tile(np.equal(labels, TIE), 2)})
    known = each[each["model"] != UNKNOWN_MODEL].groupby("model", sort=True)
    table = known.agg(n=("won", "size"), n_won=("won", "sum"), n_tied=("tied", "sum")).reset_index()
    table["n_decided"] = table["n"] - table["n_tied"]
    table["win_share"] = table["n_won"] / table["n_decided"]  # NaN where all are ties
    table["low"], table["high"] = proportion_interval(table["n_won"], table["n_decided"])
    table["tie_share"] = table["n_tied"] / table["n"]
    table = table.drop(columns=["n_won", "n_tied"])
    return table.sort_values("n", ascending=False, kind="stable", ignore_index=True)


def head_to_head(
    model_a: Sequence[str], model_b: Sequence[str], labels: np.ndarray, n_shown: int = 10
) -> pd.DataFrame:
    """Count who beats whom among the `n_shown` most frequent chatbots, the best first.

    Returns:
        One row per ordered pair that met: model, opponent, n (decided battles), share won by
        model, low, high (Clopper and Pearson), p_value of the binomial test against one half, and
        p_holm, corrected for the number of pairs.
    """
    records = model_records(model_a, model_b, labels).head(n_shown)
    order = records.sort_values("win_share", ascending=False)["model"].tolist()
    a, b = map(pd.Index(order, dtype=object).get_indexer, (model_a, model_b))
    met = (labels != TIE) & (a >= 0) & (b >= 0) & (a != b)
    won = (labels == A_WINS) == (a < b)  # by the better one of the two, which is the first
    sides = {"model": np.minimum(a, b), "opponent": np.maximum(a, b), "won": won}
    meetings = pd.DataFrame(sides)[met].groupby(["model", "opponent"])["won"]
    table = meetings.agg(n="size", won="sum").reset_index()
    tests = [binomtest(*row).pvalue for row in table[["won", "n"]].to_numpy().tolist()]
    table["p_value"] = np.array(tests, dtype=float)
    table["p_holm"] = correct(tests)
    mirrored = table.rename(columns={"model": "opponent", "opponent": "model"})
    table = pd.concat([table, mirrored.assign(won=table["n"] - table["won"])])
    table = table.sort_values("model", kind="stable", ignore_index=True)
    table["share"] = table["won"] / table["n"]
    table["low"], table["high"] = proportion_interval(table["won"], table["n"], exact=True)
    each = dict(enumerate(order))
    return table.assign(model=table["model"].map(each), opponent=table["opponent"].map(each))


@dataclass(frozen=True)
class VoteModel:
    """A fitted Davidson model."""

    # model, n (battles), strength (log-odds against the mean of those shown), low, high, reason
    strengths: pd.DataFrame
    # "position A", "tie" (log ν) and every covariate: effect, log_odds_per_unit with its low and
    # high, log_odds (per standard deviation), sd, reason
    effects: pd.DataFrame
    n: int  # battles used
    reason: str | None = None  # why nothing was fitted


def fit_votes(
    covariates: pd.DataFrame, labels: np.ndarray, groups: np.ndarray | None = None
) -> VoteModel:
    """Fit all effects of N rows of differences A − B at once, without the chatbots' names."""
    codes = group_codes(groups, len(labels))
    return _fit(np.zeros((len(labels), 0)), [], covariates, np.asarray(labels), codes, 0)


def fit_bradley_terry(
    model_a: Sequence[str],
    model_b: Sequence[str],
    labels: np.ndarray,
    covariates: pd.DataFrame | None = None,
    groups: np.ndarray | None = None,
    min_battles: int = 30,
) -> VoteModel:
    """Estimate the chatbots' strengths, with ties, position and (where given) style held constant.

    η = strength_A − strength_B + position + covariates·β. Chatbots that no chain of wins and
    losses links to the rest have no finite strength and are left out of the fit (Ford 1957,
    doi:10.2307/2308513), as are unknown names. Strengths have mean zero over those reported.

    `covariates` are N rows, one column per difference A − B. A chatbot with fewer than
    `min_battles` is fitted but not reported.

    Source: Davidson 1970, doi:10.1080/01621459.1970.10481082; position as in Davidson and Beaver
        1977, doi:10.2307/2529467; style as in https://lmsys.org/blog/2024-08-28-style-control.
    """
    names = np.column_stack([np.asarray(model_a, dtype=object), np.asarray(model_b, dtype=object)])
    labels = np.asarray(labels)
    if covariates is None:
        covariates = pd.DataFrame(index=range(len(labels)))
    models = _linked_models(names, labels)
    kept = np.logical_and(*np.isin(names, models).T)
    a, b = _places(names[kept], models)
    one_hot = np.eye(len(models))
    codes = group_codes(groups, len(labels))[kept]
    style = covariates.loc[kept]
    fitted = _fit(one_hot[a] - one_hot[b], models, style, labels[kept], codes, min_battles)
    records = model_records(model_a, model_b, labels)[["model", "n"]]
    strengths = fitted.strengths.set_index("model").reindex(records["model"])
    rows = pd.concat([records, strengths.reset_index(drop=True)], axis=1)
    unlinked = ~rows["model"].isin(models)
    rows.loc[unlinked, "reason"] = "not linked to the other chatbots by both a win and a loss"
    rows = rows.sort_values("strength", ascending=False, kind="stable", ignore_index=True)
    reason = "the chatbots' names are unknown" if records.empty else fitted.reason
    return VoteModel(rows, fitted.effects, fitted.n, reason)


def _places(names: np.ndarray, models: list[str]) -> np.ndarray:
    """(2, N) int, the place in `models` of A and of B."""
    return pd.Categorical(names.ravel(), categories=models).codes.reshape(-1, 2).T


def _linked_models(names: np.ndarray, labels: np.ndarray) -> list[str]:
    """The largest set of chatbots linked both ways by chains of wins; a tie counts as both."""
    known = (names != UNKNOWN_MODEL).all(axis=1) & (names[:, 0] != names[:, 1])
    models = sorted(set(names[known].ravel()))
    a, b = _places(names[known], models)
    beats, is_beaten = labels[known] != B_WINS, labels[known] != A_WINS
    winners = np.concatenate([a[beats], b[is_beaten]])
    losers = np.concatenate([b[beats], a[is_beaten]])
    shape = len(models), len(models)
    graph = sparse.csr_matrix((np.ones(len(winners)), (winners, losers)), shape)
    _, component = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(component, minlength=1)
    linked = component == sizes.argmax()
    return np.array(models, dtype=object)[linked].tolist() if sizes.max() > 1 else []


def _fit(
    design: np.ndarray,
    models: list[str],
    covariates: pd.DataFrame,
    labels: np.ndarray,
    codes: np.ndarray,
    min_battles: int,
) -> VoteModel:
    """Fit the models (design: (N, M), 1 for A, −1 for B), the position and the covariates."""
    counts = (design != 0).sum(axis=0)
    values = covariates.to_numpy(dtype=np.float64)
    sds = values.std(axis=0) if len(values) else np.full(values.shape[1], np.nan)
    used = ((values != 0).sum(axis=0) >= MIN_SUPPORT) & (sds > 0)
    # The first chatbot is the reference and has no column.
    design = np.column_stack([design[:, 1:], np.ones(len(labels)), values[:, used] / sds[used]])
    n = max(len(models) - 1, 0)
    params, cov, reason = _maximise(_Votes(design, labels), codes, n)
    strengths = _strength_table(models, counts, params[:n], cov[:n, :n], min_battles)
    effects = _effect_table(covariates.columns, used, sds, params[n:], cov[n:, n:])
    if reason:
        strengths, effects = strengths.assign(reason=reason), effects.assign(reason=reason)
    return VoteModel(strengths, effects, 0 if reason else len(labels), reason)


@dataclass(frozen=True)
class _Votes:
    """The likelihood of N votes; parameters: one per column of the design, then any log ν."""

    design: np.ndarray  # (N, P) float
    labels: np.ndarray  # (N,) int

    @property
    def with_ties(self) -> bool:
        return bool((self.labels == TIE).any())

    def log_probs(self, params: np.ndarray) -> np.ndarray:
        eta = self.design @ params[: self.design.shape[1]]
        log_nu = params[-1] if self.with_ties else -np.inf
        return log_softmax(davidson_logits(eta, log_nu), axis=1)

    def row_scores(self, log_probs: np.ndarray) -> np.ndarray:
        """Gradient of the log-likelihood of each battle, one column per parameter."""
        residual = np.eye(log_probs.shape[1])[self.labels] - np.exp(log_probs)
        scores = self.design * ((residual[:, A_WINS] - residual[:, B_WINS]) / 2)[:, None]
        return np.column_stack([scores, residual[:, TIE]]) if self.with_ties else scores

    def information(self, log_probs: np.ndarray) -> np.ndarray:
        """Minus the Hessian of the log-likelihood, a square of the parameters."""
        a, b, tie = np.exp(log_probs).T
        side = (a - b) / 2
        block = self.design.T @ (self.design * ((a + b) / 4 - side**2)[:, None])
        if not self.with_ties:
            return block
        cross = -self.design.T @ (side * tie)[:, None]
        return np.block([[block, cross], [cross.T, np.array([[(tie * (1 - tie)).sum()]])]])


def _maximise(
    votes: _Votes, codes: np.ndarray, n_strengths: int
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Parameters (log ν last, NaN without ties), their clustered covariance, or why there are none.

    The first `n_strengths` columns of the design are strengths, known to be finite by the links.
    """
    n_a, n_b, n_ties = np.bincount(votes.labels, minlength=3)
    n_params, n_prompts = votes.design.shape[1] + 1, len(np.unique(codes))
    nothing = np.full(n_params, np.nan), np.full((n_params, n_params), np.nan)
    if min(n_a, n_b) == 0 or len(votes.labels) < MIN_SUPPORT + n_params:
        return *nothing, f"too few battles: {n_a} won by A, {n_b} by B, {n_ties} ties"
    if n_prompts < MIN_SUPPORT:
        return *nothing, f"{n_prompts} prompts, fewer than {MIN_SUPPORT}"

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        log_probs = votes.log_probs(params)
        mean = log_probs[np.arange(len(votes.labels)), votes.labels].mean()
        return -mean, -votes.row_scores(log_probs).mean(axis=0)

    def hessian(params: np.ndarray) -> np.ndarray:
        return votes.information(votes.log_probs(params)) / len(votes.labels)

    # With exact derivatives 57,477 battles of 64 chatbots take seconds; a general-purpose
    # likelihood class of a library differentiates numerically.
    start = np.zeros(n_params if n_ties else n_params - 1)
    options: Any = {"gtol": 1e-8}
    found = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options=options).x
    log_probs = votes.log_probs(found)
    information = votes.information(log_probs)
    # Where nothing bounds an effect, the information is singular or its standard error is huge.
    if np.linalg.cond(information) > 1e12:
        return *nothing, _INSEPARABLE
    bread = np.linalg.inv(information)
    if not np.all(np.sqrt(np.diag(bread))[n_strengths:] < MAX_STANDARD_ERROR):
        return *nothing, _INSEPARABLE
    by_prompt = pd.DataFrame(votes.row_scores(log_probs)).groupby(codes).sum().to_numpy()
    meat = by_prompt.T @ by_prompt * n_prompts / (n_prompts - 1)
    missing = n_params - len(found)
    cov = np.pad(bread @ meat @ bread, (0, missing), constant_values=np.nan)
    return np.append(found, [np.nan] * missing), cov, None


def _interval(name: str, estimate: np.ndarray, error: np.ndarray) -> dict[str, np.ndarray]:
    return {name: estimate, "low": estimate - Z_95 * error, "high": estimate + Z_95 * error}


def _strength_table(
    models: list[str], counts: np.ndarray, params: np.ndarray, cov: np.ndarray, min_battles: int
) -> pd.DataFrame:
    """Strengths of all models, from the parameters of all but the first, whose strength is 0."""
    shown = counts >= min_battles
    # The contrast makes the mean of those shown zero; the covariance follows it.
    contrast = (np.eye(len(models)) - shown / max(shown.sum(), 1))[:, 1:]
    strengths = np.where(shown, contrast @ params, np.nan)
    error = np.sqrt(np.diag(contrast @ cov @ contrast.T))
    table = pd.DataFrame({"model": models, **_interval("strength", strengths, error)})
    few = [None if n >= min_battles else f"{n} battles, fewer than {min_battles}" for n in counts]
    table["reason"] = few
    return table


def _effect_table(
    names: pd.Index, used: np.ndarray, sds: np.ndarray, params: np.ndarray, cov: np.ndarray
) -> pd.DataFrame:
    """Effects from parameters in the order position, covariates used, log ν."""
    table = pd.DataFrame({"effect": ["position A", "tie", *names]})
    fitted = np.append([True, True], used)
    order = np.insert(np.arange(len(params) - 1), 1, len(params) - 1)
    estimate, error, scale = np.full((3, len(table)), np.nan)
    estimate[fitted], error[fitted] = params[order], np.sqrt(np.diag(cov))[order]
    scale[fitted] = np.append([1, 1], sds[used])
    table = table.assign(**_interval("log_odds_per_unit", estimate / scale, error / scale))
    table["log_odds"], table["sd"] = estimate, scale
    table.loc[:1, ["log_odds", "sd"]] = np.nan  # position and tie have no spread
    few = f"the answers differ in fewer than {MIN_SUPPORT} battles"
    table["reason"] = ["no ties", "no ties", *[few] * len(names)]
    table.loc[np.isfinite(estimate), "reason"] = None
    return table
