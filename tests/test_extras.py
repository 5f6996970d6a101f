"""Time, language and both-bad: levels, shares with intervals, drift and slices."""

import numpy as np
import pandas as pd
import pytest

from src.utils.stats import extras


@pytest.fixture
def pairs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    days = np.arange(900) / 10
    is_bad = rng.random(900) < days / 200
    times = pd.Timestamp("2025-01-01", tz="UTC") + pd.to_timedelta(days, unit="D")
    languages = np.array(["English", "German", " ", None, "Klingon"], dtype=object)
    languages = languages[
        np.r_[np.zeros(500), np.ones(300), np.full(60, 2), np.full(35, 3), np.full(5, 4)].astype(
            int
        )
    ]
    table = pd.DataFrame({"timestamp": times, "language": languages})
    labels = np.where(is_bad, 2, rng.integers(3, size=900))
    return table.assign(vote_detail=np.where(is_bad, "both_bad", ""), label=labels)


def test_columns_that_a_file_lacks_or_that_say_nothing_give_none(pairs):
    plain = pairs[["label"]]
    assert extras.find_times(plain) is None and extras.find_languages(plain) is None
    assert extras.find_both_bad(plain) is None and extras.slice_extras(plain) == {}
    constant = plain.assign(timestamp=pairs["timestamp"].iloc[0], language="English")
    constant = constant.assign(vote_detail="")
    assert extras.find_times(constant) is None and extras.find_languages(constant) is None
    assert extras.find_both_bad(constant) is None and extras.slice_extras(constant) == {}


def test_rare_languages_are_other_and_blank_ones_unknown(pairs):
    languages = extras.find_languages(pairs)
    assert list(languages.categories) == ["English", "German", "unknown", "other"]
    assert np.bincount(languages.codes).tolist() == [500, 300, 95, 5]
    assert list(extras.find_languages(pairs, n_shown=1).categories) == ["English", "other"]
    assert extras.find_languages(pairs[880:]) is None  # no language has enough battles


def test_periods_hold_equally_many_battles_in_order_and_none_without_a_time(pairs):
    times = pairs["timestamp"].copy()
    times[[0, 899]] = pd.NaT
    periods = extras.cut_periods(times, 3)
    assert (periods.codes == -1).sum() == 2
    assert np.bincount(periods.codes[1:-1]) == pytest.approx([300, 299, 299], abs=1)
    assert periods.categories[0].startswith("2025-01-01 to 2025-01-")
    assert (np.diff(periods.codes[1:-1]) >= 0).all()


def test_periods_of_one_day_have_different_names():
    times = pd.Series(pd.date_range("2025-01-01", periods=400, freq="min", tz="UTC"))
    assert len(set(extras.cut_periods(times, 4).categories)) == 4


def test_a_drift_is_found_where_there_is_one_and_nowhere_else(pairs):
    both_bad = extras.find_both_bad(pairs)
    drift = extras.measure_drift(pairs["timestamp"], pairs["label"].to_numpy(), both_bad)
    assert drift["outcome"].unique().tolist() == ["A wins", "B wins", "tie", "both bad"]
    assert drift.groupby("level")["n"].first().sum() == 900
    shares = drift[drift["outcome"] == "both bad"]
    assert shares["time"].is_monotonic_increasing and shares["p_value"].iloc[0] < 1e-6
    assert (shares["low"] <= shares["share"]).all() and (shares["share"] <= shares["high"]).all()
    assert shares["share"].iloc[0] < 0.15 < 0.35 < shares["share"].iloc[-1]
    rng = np.random.default_rng(1)
    steady = extras.measure_drift(pairs["timestamp"], rng.integers(3, size=900))
    assert steady["p_value"].min() > 0.01
    votes = steady.groupby("level")["share"].sum()
    assert votes.to_numpy() == pytest.approx(1)


def test_shares_are_laid_out_for_people(pairs):
    shares = extras.vote_shares(extras.find_languages(pairs), pairs["label"].to_numpy())
    table = extras.summarise_shares(shares)
    assert table["level"].tolist() == ["English", "German", "unknown", "other"]
    assert table["battles"].tolist() == [500, 300, 95, 5]
    share = (pairs["label"][:500] == 0).mean()
    assert table["A wins"].iloc[0].startswith(f"{100 * share:.1f}\u00a0% (")


def test_every_battle_is_in_one_slice_of_each_kind(pairs):
    slices = extras.slice_extras(pairs)
    kinds = pd.DataFrame(slices).T.groupby(lambda name: name.split(":")[0]).sum()
    assert set(kinds.index) == {"language in the file", "time"} and (kinds == 1).all(axis=None)
    assert len(slices) == 8


def test_what_makes_both_bad_is_found(pairs):
    both_bad, rng = extras.find_both_bad(pairs), np.random.default_rng(2)
    properties = {"late": np.arange(900), "early": -np.arange(900), "noise": rng.normal(size=900)}
    properties = pd.DataFrame(properties).assign(constant=1.0)
    moved = extras.both_bad_effects(both_bad, properties, np.arange(900))
    assert moved["effect"].tolist() == ["late", "noise", "early"]
    low, high = moved["low"].to_numpy(), moved["high"].to_numpy()
    assert low[0] > 0.3 and low[1] < 0 < high[1] and high[2] < -0.3
