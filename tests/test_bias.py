import json
import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from src.utils import bias
from src.utils.mirror import swap_labels

# American League 1987, wins of the row's team over the column's (Agresti, Categorical Data Analysis, table 10.10).
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
WINS = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
)
# As published (Agresti; the R package BradleyTerry2 gives the same), Baltimore at 0.
ABILITIES = (1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0)


def draw_votes(n: int, seed: int, slope: float = 0.8, seat: float = 0.2, nu: float = 0.9) -> tuple:
    """Votes of a Davidson model on one covariate, in pairs of battles with a shared prompt."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    eta = slope * x + seat
    weights = np.column_stack([np.exp(eta / 2), np.exp(-eta / 2), np.full(n, nu)])
    cumulated = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return x, (rng.random((n, 1)) > cumulated).sum(axis=1), np.arange(n) // 2


def test_winner_shares_sum_to_one_and_lie_in_their_intervals():
    shares = bias.winner_shares(np.array([0, 0, 1, 2, 2, 2]))
    assert shares["n"].tolist() == [2, 1, 3] and shares["share"].sum() == pytest.approx(1)
    assert ((shares["low"] < shares["share"]) & (shares["share"] < shares["high"])).all()


def test_intervals_of_a_proportion_match_the_textbook():
    assert bias.proportion_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert bias.proportion_interval(5, 10, exact=True) == pytest.approx((0.1871, 0.8129), abs=1e-4)


def test_no_trials_give_no_interval():
    assert np.isnan(bias.proportion_interval(np.array([0]), np.array([0]))).all()


def test_exchanging_the_seats_mirrors_the_position_effect():
    labels = np.repeat([0, 1, 2], [60, 40, 30])
    effect, mirrored = bias.position_effect(labels), bias.position_effect(swap_labels(labels))
    assert effect["share"] == 0.6 and effect["n"] == 100
    assert effect["low"] == pytest.approx(1 - mirrored["high"]) and effect["log_odds"] == pytest.approx(np.log(1.5))
    assert effect["p_value"] == pytest.approx(mirrored["p_value"]) == pytest.approx(0.0569, abs=1e-4)


def test_ties_alone_say_nothing_about_position():
    effect = bias.position_effect(np.array([2, 2]))
    assert np.isnan(effect["share"]) and effect["reason"] == "no decided battle"


def test_larger_wins_counts_decided_battles_that_differ():
    effect = bias.larger_wins(np.array([3.0, -1.0, 2.0, 0.0, 5.0]), np.array([0, 1, 1, 0, 2]))
    assert effect["n"] == 3 and effect["share"] == pytest.approx(2 / 3)


def test_win_rate_rises_with_what_voters_like_and_every_battle_is_counted():
    x, labels, _ = draw_votes(4000, seed=0, slope=2)
    wins, ties = bias.win_rate_by(x, labels, n_bins=8)
    assert wins["n"].sum() == (labels != 2).sum() and ties["n"].sum() == len(labels)
    assert wins["share"].is_monotonic_increasing
    assert ties["share"].iloc[0] > ties["share"].iloc[-1]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
def test_win_rate_takes_few_and_equal_values(values):
    wins, ties = bias.win_rate_by(np.array(values), np.zeros(len(values), dtype=int), n_bins=10)
    assert wins["n"].sum() == ties["n"].sum() == len(values)


def test_effect_agrees_with_a_plain_logistic_regression():
    x, labels, _ = draw_votes(2000, seed=1)
    kept = labels != 2
    row = bias.effect_sizes(x[:, None], ["x"], labels).iloc[0]
    plain = sm.Logit((labels[kept] == 0).astype(float), sm.add_constant(x[kept])).fit(disp=0)
    assert row["log_odds_per_unit"] == pytest.approx(plain.params[1], rel=1e-6)
    assert row["log_odds"] == pytest.approx(plain.params[1] * x[kept].std(), rel=1e-6)


def test_holding_the_cause_constant_removes_what_only_follows_it():
    x, labels, groups = draw_votes(6000, seed=3)
    follower = x + np.random.default_rng(0).normal(size=len(x))
    alone = bias.effect_sizes(follower[:, None], ["f"], labels, groups).iloc[0]
    held = bias.effect_sizes(follower[:, None], ["f"], labels, groups, controls=x[:, None]).iloc[0]
    assert alone["low"] > 0.3 and held["low"] < 0 < held["high"]


def test_clusters_widen_the_interval_when_votes_repeat():
    x, labels, _ = draw_votes(400, seed=3)
    again = np.repeat(np.arange(400), 4)
    clustered, naive = (
        bias.effect_sizes(x[again, None], ["x"], labels[again], groups).iloc[0] for groups in (again, None)
    )
    ratio = (clustered["high"] - clustered["low"]) / (naive["high"] - naive["low"])
    assert ratio == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        (np.ones(1), np.array([0]), "too few"),
        (np.random.default_rng(0).normal(size=50), np.zeros(50, dtype=int), "too few"),
        (np.random.default_rng(0).normal(size=50), np.full(50, 2), "too few"),
        (np.zeros(50), np.arange(50) % 2, "differ in 0"),
        (np.linspace(-1, 1, 50), (np.arange(50) < 25).astype(int), "no finite estimate"),
    ],
)
def test_what_cannot_be_estimated_says_why(values, labels, said):
    for table in (
        bias.effect_sizes(values[:, None], ["x"], labels),
        bias.fit_votes(pd.DataFrame({"x": values}), labels).effects.query("effect == 'x'"),
    ):
        row = table.iloc[0]
        assert np.isnan(row["log_odds"]) and np.isnan(row["low"]) and row["reason"]
    assert said in bias.effect_sizes(values[:, None], ["x"], labels)["reason"].iloc[0]


def test_strengths_match_the_published_example():
    wins = [(TEAMS[i], TEAMS[j]) for i in range(7) for j in range(7) for _ in range(WINS[i, j])]
    winner, loser = np.array(wins).T
    # Each game from both sides: seats are then even, as the published model has none.
    fitted = bias.fit_bradley_terry(np.r_[winner, loser], np.r_[loser, winner], np.repeat([0, 1], len(winner)))
    strengths = fitted.strengths.set_index("model")["strength"]
    np.testing.assert_allclose(strengths[list(TEAMS)] - strengths["Baltimore"], ABILITIES, atol=2e-4)
    assert strengths.sum() == pytest.approx(0, abs=1e-9)
    assert fitted.effects["log_odds_per_unit"].iloc[0] == pytest.approx(0, abs=1e-6)  # the seat
    assert fitted.effects["reason"].iloc[1] == "no ties"


def test_davidson_recovers_what_was_planted():
    x, labels, groups = draw_votes(20_000, seed=4, slope=0.8, seat=0.2, nu=0.9)
    effects = bias.fit_votes(pd.DataFrame({"x": x}), labels, groups).effects.set_index("effect")
    for name, planted in (("x", 0.8), ("seat A", 0.2), ("tie", np.log(0.9))):
        row = effects.loc[name]
        assert row["low"] < planted < row["high"] and row["high"] - row["low"] < 0.15


@pytest.mark.parametrize("method", ["davidson", "logit"])
def test_intervals_cover_the_planted_effect_at_their_rate_and_nulls_are_rarely_found(method):
    covered, found = 0, 0
    for seed in range(200):
        x, labels, groups = draw_votes(500, seed=seed, slope=0.5)
        noise = np.random.default_rng(seed + 1000).normal(size=500)
        both = np.column_stack([x, noise])
        if method == "davidson":
            table = bias.fit_votes(pd.DataFrame(both, columns=["x", "noise"]), labels, groups).effects
            row, null = table.iloc[2], table.iloc[3]
            low, high = row["low"], row["high"]
        else:
            table = bias.effect_sizes(both, ["x", "noise"], labels, groups)
            row, null = table.iloc[0], table.iloc[1]
            low, high = row["low"] / row["sd"], row["high"] / row["sd"]
        covered += low < 0.5 < high
        found += not null["low"] < 0 < null["high"]
    # Four standard errors of a binomial around 95 % and 5 % of 200.
    assert 178 <= covered <= 200 and found <= 22


def test_strengths_and_style_on_the_demo_arena(demo_pairs):
    labels, groups = demo_pairs["label"].to_numpy(), demo_pairs["group"].to_numpy()
    fitted = bias.fit_bradley_terry(demo_pairs["model_a"], demo_pairs["model_b"], labels, groups=groups)
    shown = fitted.strengths.dropna(subset="strength").set_index("model")["strength"]
    assert shown["demo-owl"] > shown["demo-dodo"]
    assert fitted.reason is None and fitted.n == len(demo_pairs)


def test_exchanging_the_seats_changes_no_strength_and_negates_the_seat(demo_pairs):
    labels = demo_pairs["label"].to_numpy()
    seats = demo_pairs["model_a"], demo_pairs["model_b"]
    given = bias.fit_bradley_terry(*seats, labels)
    mirrored = bias.fit_bradley_terry(*seats[::-1], swap_labels(labels))
    columns = ["strength", "low", "high"]
    np.testing.assert_allclose(
        given.strengths.sort_values("model")[columns], mirrored.strengths.sort_values("model")[columns], atol=1e-5
    )
    seat, seat_mirrored = (fitted.effects["log_odds_per_unit"].iloc[0] for fitted in (given, mirrored))
    assert seat == pytest.approx(-seat_mirrored, abs=1e-5)


def test_unknown_names_are_not_ranked():
    unknown = ["unknown"] * 20
    fitted = bias.fit_bradley_terry(unknown, unknown, np.arange(20) % 3)
    assert fitted.strengths.empty and fitted.n == 0 and "unknown" in fitted.reason
    assert bias.model_records(unknown, unknown, np.arange(20) % 3).empty


def test_a_model_that_never_loses_gets_no_strength():
    rng = np.random.default_rng(0)
    model_a, model_b = ["champion"] * 40 + ["x", "y"] * 50, ["y"] * 40 + ["y", "x"] * 50
    labels = np.r_[np.zeros(40, dtype=int), rng.integers(3, size=100)]
    fitted = bias.fit_bradley_terry(model_a, model_b, labels)
    rows = fitted.strengths.set_index("model")
    assert np.isnan(rows.loc["champion", "strength"]) and "not linked" in rows.loc["champion", "reason"]
    assert np.isfinite(rows.loc[["x", "y"], "strength"]).all() and fitted.n == 100


def test_a_strength_that_cannot_be_told_from_its_seat_is_not_reported():
    labels = np.random.default_rng(0).integers(3, size=100)
    fitted = bias.fit_bradley_terry(["x"] * 100, ["y"] * 100, labels)
    assert fitted.strengths["strength"].isna().all() and "cannot be told apart" in fitted.reason


def test_a_model_with_few_battles_is_fitted_but_not_reported():
    rng = np.random.default_rng(0)
    model_a, model_b = ["x"] * 100 + ["rare"] * 6, ["y"] * 103 + ["x"] * 3
    fitted = bias.fit_bradley_terry(model_a, model_b, np.r_[rng.integers(3, size=100), 0, 1, 2, 0, 1, 2])
    rows = fitted.strengths.set_index("model")
    assert np.isnan(rows.loc["rare", "strength"]) and rows.loc["rare", "reason"] == "6 battles, fewer than 30"
    assert fitted.n == 106 and rows.loc[["x", "y"], "strength"].sum() == pytest.approx(0)


@pytest.mark.parametrize("labels", [[0], [2], [0, 0, 0], [0, 1], [0, 1, 2]])
def test_a_handful_of_battles_gives_reasons_not_numbers(labels):
    labels = np.array(labels)
    model_a, model_b = ["x"] * len(labels), ["y"] * len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = bias.fit_bradley_terry(model_a, model_b, labels, pd.DataFrame({"z": np.arange(len(labels)) * 1.0}))
        bias.position_effect(labels)
        bias.winner_shares(labels)
        bias.model_records(model_a, model_b, labels)
    assert fitted.strengths["strength"].isna().all() and fitted.reason
    assert fitted.effects["log_odds_per_unit"].isna().all()


def test_the_verdict_says_found_only_where_the_interval_excludes_nothing():
    x, labels, groups = draw_votes(2000, seed=5)
    noise = np.random.default_rng(7).normal(size=2000)
    effects = bias.effect_sizes(
        np.column_stack([x, noise, np.zeros(2000)]), ["n_words", "noise", "n_urls"], labels, groups
    )
    verdict = bias.make_verdict({"seat A": bias.position_effect(labels)}, effects).set_index("effect")
    assert verdict.loc[["n_words", "noise", "n_urls"], "found"].tolist() == ["yes", "no", "cannot be estimated"]
    assert verdict.loc["seat A", "advice"] == bias.ADVICE["seat A"]


def test_records_hold_nothing_that_json_refuses():
    table = pd.DataFrame({"x": [np.float32(1.5), np.nan], "n": np.array([1, 2]), "reason": [None, "few"]})
    records = bias.to_records(table)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert records[1]["x"] is None and records[0] == {"x": 1.5, "n": 1, "reason": None}
