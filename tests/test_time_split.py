"""Splitting by time: whole prompts, nothing trained on later battles, refusals that say why."""

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.time_split import PAST, describe_time_split, hold_out_newest, why_no_split


def make_times(n_pairs=1000, n_prompts=600, seed=0):
    rng = np.random.default_rng(seed)
    days = pd.to_timedelta(rng.uniform(0, 100, n_pairs), unit="D")
    times = pd.Timestamp("2025-01-01", tz="UTC") + days
    return pd.DataFrame({"group": rng.integers(n_prompts, size=n_pairs), "timestamp": times})


def test_nothing_is_trained_on_later_battles_and_prompts_stay_together():
    assert why_no_split(make_times()) == ""
    pairs = hold_out_newest(make_times(), n_folds=5)
    assert set(pairs["fold"]) == {0, PAST}
    assert (pairs.groupby("group")["fold"].nunique() == 1).all()
    assert 0.15 < (pairs["fold"] == 0).mean() < 0.25
    last = pairs.groupby("group")["timestamp"].transform("max")
    assert last[pairs["fold"] == PAST].max() < last[pairs["fold"] == 0].min()
    newest = pairs["timestamp"] > pairs["timestamp"][pairs["fold"] == PAST].max()
    assert (pairs["fold"][newest] == 0).all() and newest.sum() > 50


def test_the_split_does_not_depend_on_the_order_of_rows():
    pairs = make_times()
    folds = hold_out_newest(pairs)["fold"]
    assert hold_out_newest(pairs[::-1])["fold"].sort_index().equals(folds)


def test_the_sentence_says_how_many_scored_battles_are_not_of_the_future():
    pairs = pd.DataFrame({"group": [1, 2, 3, 4, 5, 5], "id": range(6)})
    days = [f"2025-01-0{day}" for day in (1, 2, 3, 4, 2, 5)]
    pairs = hold_out_newest(pairs.assign(timestamp=pd.to_datetime(days, utc=True)), n_folds=3)
    assert pairs["fold"].tolist() == [PAST] * 4 + [0, 0]
    said = describe_time_split(pairs)
    assert {"4", "2;", "1", "2025-01-04"} <= set(said.split())
    assert "earlier" not in describe_time_split(pairs[pairs["id"] != 4])


@pytest.mark.parametrize("column", [None, pd.NaT])
def test_missing_times_are_refused_with_their_number(column):
    pairs = make_times(10)
    if column is None:
        pairs = pairs.drop(columns="timestamp")
    else:
        pairs.loc[3, "timestamp"] = column
    assert why_no_split(pairs)
    with pytest.raises(ValueError, match=f"SPLIT=time.*got {10 if column is None else 1} without"):
        hold_out_newest(pairs)


def test_a_single_moment_is_refused():
    with pytest.raises(ValueError, match="several moments, got 1"):
        hold_out_newest(make_times(10).assign(timestamp=pd.Timestamp("2025-01-01", tz="UTC")))
