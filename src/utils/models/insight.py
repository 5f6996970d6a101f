"""Look into the CPU baseline: which words and signs move a vote, what more battles would bring."""

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer

from src.utils.config import BaselineConfig
from src.utils.models import baseline
from src.utils.models.features import WORD_PATTERN, Features
from src.utils.schema import join_turns, list_votes, vote_shares
from src.utils.stats import effects, scores
from src.utils.stats.blend import apply_blend, fit_blend

_MAX_PAIRS = 8_000  # battles are enough to estimate 200 words within a minute
_MIN_HELD_OUT = 2_000  # battles that a curve is measured on, or all folds
_MIN_LEARNED = 80
_N_DRAWS = 500
_POWERS = np.linspace(0.2, 1.2, 11)  # exponents of a learning curve, beyond those usually found
COMPETITION_SIZE = 57_477


def word_effects(
    model: baseline.Baseline,
    pairs: pd.DataFrame,
    member: str = "words",
    n_words: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate which words and signs move a vote, and look up what the saved model makes of them.

    The `n_words` that tell the answers apart in most battles are chosen without a look at the
    votes. Each is a share of an answer's words, as the words member reads it, and has a logistic
    regression of its own on decided battles, with the log ratio of lengths held constant.

    Returns:
        One row per word: word, the columns of `effects.effect_sizes` (log-odds per standard
        deviation, 95 % intervals clustered by prompt), p_holm, and weight, the log-odds that the
        saved `member` ("words" or "text") gives to one standard deviation.
    """
    pairs = pairs.iloc[scores.draw_groups(pairs["group"].to_numpy(), _MAX_PAIRS, seed)]
    texts = [join_turns(turns) for name in ("response_a", "response_b") for turns in pairs[name]]
    counter = CountVectorizer(token_pattern=WORD_PATTERN)  # as the words member
    counts = counter.fit_transform(texts).astype(np.float64)
    n_each = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    shares = counts.multiply(1 / n_each[:, None]).tocsr()
    differences = shares[: len(pairs)] - shares[len(pairs) :]
    order = np.argsort(-np.diff(differences.tocsc().indptr), kind="stable")[:n_words]
    words = counter.get_feature_names_out()[order]
    values = differences[:, order].toarray()
    length = np.log1p(n_each[: len(pairs)]) - np.log1p(n_each[len(pairs) :])
    labels, groups = pairs["label"].to_numpy(), pairs["group"].to_numpy()
    table = effects.effect_sizes(values, list(words), labels, groups, controls=length[:, None])
    table["p_holm"] = effects.correct(table["p_value"])
    table["weight"] = model.word_weights(list(words), member) * table["sd"]
    return table.rename(columns={"effect": "word"})


def learning_curve(
    pairs: pd.DataFrame,
    config: BaselineConfig,
    features: Features,
    members: dict[str, np.ndarray],
    n_sizes: int = 4,
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Score the CPU baseline by the number of battles that it learned from, halved in turn.

    As many folds are held out as give 2,000 battles. The blend is that of the other folds' members
    (`members` of `baseline.cross_fit`), so no battle is scored by weights fitted to its vote.

    Returns:
        curve: one row per size: battles (mean over folds), log_loss (nats), low, high (95 %).
        losses: (K, V) float, nats, one row per size, one column per vote.
        groups: (V,) int, the prompt of each vote.
    """
    folds = pairs["fold"].to_numpy()
    places = np.flatnonzero(folds >= 0)
    used = np.unique(folds[places])
    sizes = np.cumsum([(folds == fold).sum() for fold in used])
    used = used[: 1 + int(np.searchsorted(sizes, _MIN_HELD_OUT))]
    losses, groups, counts = [], [], []
    for fold in used:
        found, n_learned = _score_sizes(pairs, config, features, members, fold, n_sizes)
        rows, _ = list_votes(pairs[folds == fold])
        losses.append(found)
        counts.append(n_learned)
        groups.append(pairs["group"].to_numpy()[folds == fold][rows])
    n_common = min(map(len, losses))
    every = np.concatenate([rows[-n_common:] for rows in losses], axis=1)
    together = np.concatenate(groups)
    curve = pd.DataFrame({"battles": np.mean([n[-n_common:] for n in counts], axis=0).round()})
    curve["log_loss"] = every.mean(axis=1)
    bounds = [scores.bootstrap_interval(row, together) for row in every]
    curve["low"], curve["high"] = np.transpose(bounds)
    return curve, every, together


def _score_sizes(
    pairs: pd.DataFrame,
    config: BaselineConfig,
    features: Features,
    members: dict[str, np.ndarray],
    fold: int,
    n_sizes: int,
) -> tuple[np.ndarray, list[int]]:
    """Losses of a fold's votes by the battles learned from, ascending; the last row is of all."""
    folds, votes = pairs["fold"].to_numpy(), vote_shares(pairs)
    held_out, rest = folds == fold, np.flatnonzero(folds != fold)
    rows, labels = list_votes(pairs[held_out])
    scored = folds[folds >= 0]
    other_rows, other_labels = list_votes(pairs[(folds >= 0) & ~held_out])
    others = {name: probs[scored != fold][other_rows] for name, probs in members.items()}
    mine = {name: probs[scored == fold] for name, probs in members.items()}
    # With a single scored fold there are no others: equal weights then.
    blend = fit_blend(others, other_labels) if len(other_labels) else None
    found, counts = [], []
    for halvings in range(n_sizes, -1, -1):
        n = len(rest) // 2**halvings
        if n < _MIN_LEARNED and halvings:
            continue
        if halvings:
            drawn = rest[scores.draw_groups(pairs["group"].to_numpy()[rest], n, seed=0)]
            ensemble = baseline.fit_ensemble(features.take(drawn), votes[drawn], config)
            predicted = ensemble.predict(features.take(held_out))
        else:
            drawn, predicted = rest, mine
        probs = apply_blend(blend, predicted) if blend else np.mean([*predicted.values()], axis=0)
        found.append(scores.row_losses(probs[rows], labels))
        counts.append(len(drawn))
    return np.array(found), counts


def extrapolate(
    curve: pd.DataFrame, losses: np.ndarray, groups: np.ndarray, target: int = 0, seed: int = 0
) -> pd.DataFrame:
    """Extend a learning curve to `target` battles as log_loss = c + a / battles ** b.

    The interval resamples prompts and fits a, b and c to each resample. It holds only if the curve
    keeps its form. By default the target is the competition's size, or four times the battles at
    hand where these are more than half of it.

    Returns:
        battles, log_loss, low, high from the smallest size to the target; gain, gain_low, gain_high
        (nats) against the largest size measured. None for fewer than three sizes.
    """
    columns = ["battles", "log_loss", "low", "high", "gain", "gain_low", "gain_high"]
    if len(curve) < 3:
        return pd.DataFrame(columns=columns)
    n = curve["battles"].to_numpy(dtype=float)
    target = target or (COMPETITION_SIZE if 2 * n[-1] < COMPETITION_SIZE else int(4 * n[-1]))
    grid = np.geomspace(n[0], target, 40)
    rng = np.random.default_rng(seed)
    codes = pd.factorize(groups)[0]
    sums = np.stack([np.bincount(codes, weights=row) for row in losses])
    sizes = np.bincount(codes)
    paths, ends = [], []
    for _ in range(_N_DRAWS):
        drawn = rng.integers(len(sizes), size=len(sizes))
        means = sums[:, drawn].sum(axis=1) / sizes[drawn].sum()
        power, slope, level = _fit_power_law(n, means)
        paths.append(level + slope * grid**-power)
        ends.append(level + slope * n[-1] ** -power)
    gains = np.array(ends)[:, None] - np.array(paths)
    bounds = np.quantile(paths, [0.5, 0.025, 0.975], axis=0)
    values = grid, *bounds, *np.quantile(gains, [0.5, 0.025, 0.975], axis=0)
    return pd.DataFrame(dict(zip(columns, values, strict=True)))


def _fit_power_law(n: np.ndarray, means: np.ndarray) -> tuple[float, float, float]:
    """The exponent, slope and level with the smallest squared error."""
    fits = []
    for power in _POWERS:
        (slope, level), squares, *_ = np.polyfit(n**-power, means, 1, full=True)
        fits.append((squares.sum(), power, slope, level))
    return min(fits)[1:]
