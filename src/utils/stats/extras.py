"""Use what some files know beyond texts and votes: time, language, and ties that are both bad.

Files without these columns get None, or no slices. `labels` are (N,) int, 0 A, 1 B, 2 tie, and
intervals 95 % (Wilson).
"""

import numpy as np
import pandas as pd

from src.utils.schema import A_WINS, B_WINS, BOTH_BAD, LABEL_NAMES
from src.utils.stats import effects
from src.utils.stats.plots import with_interval

_MIN_SLICE = 20  # battles of a language that has a level of its own
_BATTLES_PER_PERIOD = 150


def find_both_bad(pairs: pd.DataFrame) -> np.ndarray | None:
    """Which ties said that both answers are bad, (N,) bool; None where no vote says so."""
    if "vote_detail" not in pairs.columns:
        return None
    both_bad = (pairs["vote_detail"] == BOTH_BAD).to_numpy()
    return both_bad if both_bad.any() else None


def find_times(pairs: pd.DataFrame) -> pd.Series | None:
    """When each battle was fought, (N,) UTC or NaT; None where fewer than two times are known."""
    if "timestamp" not in pairs.columns:
        return None
    times = pd.to_datetime(pairs["timestamp"], utc=True)
    return times if times.nunique() > 1 else None


def find_languages(pairs: pd.DataFrame, n_shown: int = 8) -> pd.Categorical | None:
    """The language that the file gives, (N,), the most frequent first; rare ones are "other".

    None where the file names fewer than two languages, or none for 20 battles.
    """
    if "language" not in pairs.columns:
        return None
    names = pairs["language"].fillna("").astype(str).str.strip().replace("", "unknown")
    counts = names.value_counts()
    frequent = counts[counts >= _MIN_SLICE].index[:n_shown].tolist()
    names = names.where(names.isin(frequent), "other")
    shown = [*frequent, *({"other"} & set(names) - set(frequent))]
    return pd.Categorical(names, shown) if len(shown) > 1 else None


def cut_periods(times: pd.Series, n_periods: int | None = None) -> pd.Categorical:
    """Cut times into periods with about equally many battles, named by their days.

    Battles without a time are in none. By default a period has some 150 battles, and there are
    2 to 12.
    """
    known = times.dropna()
    n = n_periods or int(np.clip(len(known) // _BATTLES_PER_PERIOD, 2, 12))
    edges = known.quantile(np.linspace(0, 1, n + 1)).drop_duplicates().tolist()
    days = [f"{edge:%Y-%m-%d}" for edge in edges]
    names = [f"{days[i]} to {days[i + 1]}" for i in range(len(edges) - 1)]
    if len(set(names)) < len(names):
        names = [f"{edges[i]:%Y-%m-%d %H:%M} on, part {i + 1}" for i in range(len(edges) - 1)]
    codes = np.searchsorted(edges[1:-1], times.fillna(edges[0]), side="right")
    codes = np.where(times.isna(), -1, codes).astype(np.int64)
    return pd.Categorical.from_codes(codes, pd.Index(names, dtype=object))


def vote_shares(
    levels: pd.Categorical, labels: np.ndarray, both_bad: np.ndarray | None = None
) -> pd.DataFrame:
    """Share of each vote by level: of A, B and tie and, of these ties, `both_bad`, (N,) bool.

    Returns:
        One row per outcome and level: level, outcome, n (battles of the level), share, low, high,
        and p_value of the chi-square test that the outcome has one share on all levels.
    """
    hits = {name: labels == label for label, name in enumerate(LABEL_NAMES)}
    if both_bad is not None:
        hits["both bad"] = both_bad
    tables = []
    for outcome, hit in hits.items():
        tables.append(effects.share_by_level(levels, hit))
        tables[-1].insert(1, "outcome", outcome)
    return pd.concat(tables, ignore_index=True)


def both_bad_effects(
    both_bad: np.ndarray, properties: pd.DataFrame, groups: np.ndarray
) -> pd.DataFrame:
    """Estimate what makes people call both answers bad, each of `properties` (N, K) alone.

    Returns:
        The rows of `effects.effect_sizes` that can be estimated, the largest first: effect,
        log_odds (per standard deviation), low, high, p_value.
    """
    outcome = np.where(both_bad, A_WINS, B_WINS)  # of two outcomes, where there is no tie
    values = properties.to_numpy(dtype=np.float64)
    table = effects.effect_sizes(values, properties.columns.tolist(), outcome, groups)
    table = table.dropna(subset="log_odds").sort_values("log_odds", ascending=False)
    return table[["effect", "log_odds", "low", "high", "p_value"]]


def measure_drift(
    times: pd.Series, labels: np.ndarray, both_bad: np.ndarray | None = None
) -> pd.DataFrame:
    """Follow the shares of the votes over time: `vote_shares` by period, with its mean `time`."""
    periods = cut_periods(times)
    table = vote_shares(periods, labels, both_bad)
    middle = times.groupby(np.asarray(periods, dtype=object)).mean()
    return table.assign(time=table["level"].map(middle))


def summarise_shares(shares: pd.DataFrame) -> pd.DataFrame:
    """Lay `vote_shares` out for people: a row per level, "31.2 % (28.9–33.5)" per outcome."""
    columns = zip(shares["share"], shares["low"], shares["high"], strict=True)
    cells = [with_interval(share, low, high, "{:.1%}") for share, low, high in columns]
    table = shares.assign(cell=cells)
    wide = table.pivot(index="level", columns="outcome", values="cell")
    first = table[table["outcome"] == table["outcome"].iloc[0]]
    wide = wide.loc[first["level"], pd.unique(table["outcome"])]
    wide = wide.rename_axis(columns=None).reset_index().assign(battles=first["n"].tolist())
    return wide[wide["battles"] > 0]


def slice_extras(pairs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Slice battles by the language and the time that their file gives: name -> (N,) bool."""
    slices: dict[str, np.ndarray] = {}
    times = find_times(pairs)
    periods = None if times is None else cut_periods(times, 4)
    for kind, levels in (("language in the file", find_languages(pairs)), ("time", periods)):
        if levels is not None:
            for code, level in enumerate(levels.categories):
                slices[f"{kind}: {level}"] = levels.codes == code
    return slices
