"""Ranking: published leagues, coverage of the intervals, symmetry, and what cannot be estimated."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from src.utils.battles import demo
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.paths import REAL_DATA
from src.utils.schema import swap_labels
from src.utils.stats import ranking

# American League 1987, wins of the row's team over the column's (Agresti, Categorical Data
# Analysis, table 10.10).
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

# Six brands of chocolate pudding, Davidson 1970, example 2: brands i and j, tasters for i, for j,
# and for neither (as in the R package PlackettLuce, data set "pudding").
PUDDING = np.array(
    [
        (1, 2, 19, 22, 16), (1, 3, 16, 19, 12), (2, 3, 19, 19, 10), (1, 4, 18, 23, 13),
        (2, 4, 23, 19, 9), (3, 4, 19, 20, 15), (1, 5, 13, 19, 18), (2, 5, 16, 20, 12),
        (3, 5, 16, 15, 17), (4, 5, 17, 14, 16), (1, 6, 18, 21, 12), (2, 6, 22, 20, 12),
        (3, 6, 13, 18, 10), (4, 6, 14, 19, 18), (5, 6, 11, 21, 12),
    ]
)  # fmt: skip
# PlackettLuce's vignette prints these, stopped after 7 iterations "to obtain the same worth
# parameters as Davidson".
PUDDING_WORTHS = (0.1388005, 0.1729985, 0.1617420, 0.1653930, 0.1586805, 0.2023855)
PUDDING_NU = 0.7468147


def draw_votes(n, seed, slope=0.5, position=0.2, log_nu=-0.1):
    """Votes of a Davidson model on one covariate, in pairs of battles with a shared prompt."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    probs = softmax(ranking.davidson_logits(slope * x + position, log_nu), axis=1)
    labels = (rng.random((n, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return x, labels, np.arange(n) // 2


def test_probabilities_of_hand_worked_odds():
    eta = np.array([0.0, 2 * np.log(3)])
    probs = softmax(ranking.davidson_logits(eta, np.array([np.log(2), 0.0])), axis=1)
    np.testing.assert_allclose(probs, [[0.25, 0.25, 0.5], [9 / 13, 1 / 13, 3 / 13]])
    no_ties = softmax(ranking.davidson_logits(eta, -np.inf), axis=1)
    np.testing.assert_allclose(no_ties, [[0.5, 0.5, 0], [0.9, 0.1, 0]])


def test_strengths_match_the_published_example():
    wins = [(TEAMS[i], TEAMS[j]) for i in range(7) for j in range(7) for _ in range(WINS[i, j])]
    winner, loser = np.array(wins).T
    # Each game from both sides: the published model has no position.
    sides = np.append(winner, loser), np.append(loser, winner)
    fitted = ranking.fit_bradley_terry(*sides, np.repeat([0, 1], len(winner)))
    strengths = fitted.strengths.set_index("model")["strength"]
    found = strengths[list(TEAMS)] - strengths["Baltimore"]
    np.testing.assert_allclose(found, ABILITIES, atol=2e-4)
    assert strengths.sum() == pytest.approx(0, abs=1e-9)
    effects = fitted.effects.set_index("effect")
    assert effects.loc["position A", "log_odds_per_unit"] == pytest.approx(0, abs=1e-6)
    assert np.isnan(effects.loc["tie", "log_odds_per_unit"]) and effects.loc["tie", "reason"]


def test_strengths_and_ties_match_davidsons_own_example():
    votes = np.repeat(PUDDING[:, :2], PUDDING[:, 2:].sum(axis=1), axis=0)
    labels = np.concatenate([np.repeat([0, 1, 2], counts) for counts in PUDDING[:, 2:]])
    i, j = votes.astype(str).T
    # Each tasting from both sides: the published model has no position.
    both = np.append(i, j), np.append(j, i), np.append(labels, swap_labels(labels))
    fitted = ranking.fit_bradley_terry(*both)
    worths = softmax(fitted.strengths.sort_values("model")["strength"].to_numpy(dtype=float))
    np.testing.assert_allclose(worths, PUDDING_WORTHS, atol=2e-4)
    log_nu = fitted.effects.set_index("effect").loc["tie", "log_odds_per_unit"]
    assert np.exp(log_nu) == pytest.approx(PUDDING_NU, abs=2e-3)


def test_mt_bench_strengths_are_in_the_known_order():
    path = REAL_DATA / "transfer" / "mtbench_human.csv.gz"
    if not path.exists():
        pytest.skip(f"the MT-bench votes are not available: {path} is missing")
    pairs = add_groups_and_folds(load_pairs(path)[0])
    votes = pairs["model_a"], pairs["model_b"], pairs["label"]
    order = ranking.fit_bradley_terry(*votes, groups=pairs["group"]).strengths["model"].tolist()
    assert order[0] == "gpt-4" and order[-2:] == ["alpaca-13b", "llama-13b"] and len(order) == 6


def test_davidson_recovers_what_was_planted():
    x, labels, groups = draw_votes(20_000, seed=4, slope=0.8)
    found = ranking.fit_votes(pd.DataFrame({"x": x}), labels, groups).effects.set_index("effect")
    for name, planted in (("x", 0.8), ("position A", 0.2), ("tie", -0.1)):
        row = found.loc[name]
        assert row["low"] < planted < row["high"] and row["high"] - row["low"] < 0.15


def test_intervals_cover_the_planted_effect_at_their_rate_and_nulls_are_rarely_found():
    covered = found = 0
    for seed in range(200):
        x, labels, groups = draw_votes(500, seed=seed)
        noise = np.random.default_rng(seed + 1000).normal(size=500)
        table = ranking.fit_votes(pd.DataFrame({"x": x, "noise": noise}), labels, groups).effects
        rows = table.set_index("effect")[["low", "high"]]
        covered += rows.loc["x", "low"] < 0.5 < rows.loc["x", "high"]
        found += not rows.loc["noise", "low"] < 0 < rows.loc["noise", "high"]
    # Four standard errors of a binomial around 95 % and 5 % of 200.
    assert 178 <= covered <= 200 and found <= 22, (covered, found)


N_ARENAS, N_VOTES = 150, 900


def test_demo_intervals_cover_every_planted_effect_at_their_rate():
    pairs, probs = demo.make_battles(1800, seed=11)
    groups = add_groups_and_folds(pairs)["group"].to_numpy()
    measured_a, measured_b = (
        np.array(list(map(demo.measure_answer, pairs["prompt"], pairs[f"response_{side}"])))
        for side in "ab"
    )
    measured = pd.DataFrame(measured_a - measured_b, columns=demo.MEASURES)
    planted = {name: getattr(demo.EFFECTS, name) for name in demo.MEASURES}
    planted |= {"position A": demo.EFFECTS.position, "tie": np.log(demo.EFFECTS.nu), "noise": 0.0}
    covered = dict.fromkeys(planted, 0)
    for seed in range(N_ARENAS):
        # A fresh sample of the battles with fresh votes by the true probabilities.
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(probs), N_VOTES, replace=False)
        labels = (rng.random((N_VOTES, 1)) > probs[rows].cumsum(axis=1)[:, :-1]).sum(axis=1)
        covariates = measured.iloc[rows].assign(noise=rng.normal(size=N_VOTES))
        found = ranking.fit_votes(covariates, labels, groups[rows]).effects.set_index("effect")
        for name, size in planted.items():
            covered[name] += found.loc[name, "low"] < size < found.loc[name, "high"]
    rates = {name: count / N_ARENAS for name, count in covered.items()}
    # Four standard errors: ± 7.1 points for one effect over 150 arenas, ± 2.4 for the mean of nine.
    assert min(rates.values()) >= 0.879, rates
    assert 0.926 <= np.mean(list(rates.values())) <= 0.974, rates


def test_repeated_votes_of_one_prompt_add_no_certainty_to_a_strength(demo_pairs):
    again = demo_pairs.loc[demo_pairs.index.repeat(4)]
    votes = again["model_a"], again["model_b"], again["label"]
    widths = {}
    for name, groups in (("clustered", again["id"]), ("naive", None)):
        rows = ranking.fit_bradley_terry(*votes, groups=groups).strengths.dropna(subset="strength")
        widths[name] = (rows["high"] - rows["low"]).mean()
    assert widths["clustered"] / widths["naive"] == pytest.approx(2, rel=0.02)


def test_exchanging_the_positions_changes_no_strength_and_negates_the_position(demo_pairs):
    labels = demo_pairs["label"].to_numpy()
    a, b = demo_pairs["model_a"], demo_pairs["model_b"]
    given = ranking.fit_bradley_terry(a, b, labels)
    mirrored = ranking.fit_bradley_terry(b, a, swap_labels(labels))
    assert given.reason is None and given.n == len(demo_pairs)
    strengths, others = (
        fitted.strengths.set_index("model").sort_index()[["strength", "low", "high"]]
        for fitted in (given, mirrored)
    )
    assert strengths.loc["demo-owl", "strength"] > strengths.loc["demo-dodo", "strength"]
    np.testing.assert_allclose(strengths, others, atol=1e-5)
    position, other = (f.effects["log_odds_per_unit"].iloc[0] for f in (given, mirrored))
    assert position == pytest.approx(-other, abs=1e-5) and abs(position) > 1e-3


def test_records_count_both_positions_and_leave_out_unknown_names():
    records = ranking.model_records(
        ["x", "x", "y", "unknown"], ["y", "y", "x", "x"], [0, 2, 0, 1]
    ).set_index("model")
    assert records.loc["x", ["n", "n_decided"]].tolist() == [4, 3]
    assert records.loc["x", "win_share"] == pytest.approx(2 / 3)
    assert records.loc["y", "tie_share"] == pytest.approx(1 / 3) and len(records) == 2
    assert ranking.model_records(["unknown"], ["unknown"], [0]).empty


def test_unknown_names_are_not_ranked():
    unknown = ["unknown"] * 20
    fitted = ranking.fit_bradley_terry(unknown, unknown, np.arange(20) % 3)
    assert fitted.strengths.empty and fitted.n == 0 and "unknown" in fitted.reason


def test_a_model_that_never_loses_gets_no_strength():
    rng = np.random.default_rng(0)
    model_a, model_b = ["champion"] * 40 + ["x", "y"] * 50, ["y"] * 40 + ["y", "x"] * 50
    labels = np.append(np.zeros(40, dtype=int), rng.integers(3, size=100))
    fitted = ranking.fit_bradley_terry(model_a, model_b, labels)
    rows = fitted.strengths.set_index("model")
    assert np.isnan(rows.loc["champion", "strength"]) and "link" in rows.loc["champion", "reason"]
    assert np.isfinite(rows.loc[["x", "y"], "strength"]).all() and fitted.n == 100


def test_a_strength_that_the_position_explains_is_not_reported():
    labels = np.random.default_rng(0).integers(3, size=100)
    fitted = ranking.fit_bradley_terry(["x"] * 100, ["y"] * 100, labels)
    assert fitted.strengths["strength"].isna().all() and "separated" in fitted.reason


def test_a_model_with_few_battles_is_fitted_but_not_reported():
    rng = np.random.default_rng(0)
    model_a, model_b = ["x"] * 100 + ["rare"] * 6, ["y"] * 103 + ["x"] * 3
    labels = np.append(rng.integers(3, size=100), [0, 1, 2, 0, 1, 2])
    fitted = ranking.fit_bradley_terry(model_a, model_b, labels)
    rows = fitted.strengths.set_index("model")
    assert np.isnan(rows.loc["rare", "strength"])
    assert {"6", "30"} <= set(rows.loc["rare", "reason"].split())
    assert fitted.n == 106 and rows.loc[["x", "y"], "strength"].sum() == pytest.approx(0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [[0], [2], [0, 0, 0], [0, 1], [0, 1, 2]])
def test_a_handful_of_battles_gives_reasons_not_numbers(labels):
    model_a, model_b = ["x"] * len(labels), ["y"] * len(labels)
    covariates = pd.DataFrame({"z": np.arange(len(labels)) * 1.0})
    fitted = ranking.fit_bradley_terry(model_a, model_b, np.array(labels), covariates)
    assert fitted.strengths["strength"].isna().all() and fitted.reason
    assert fitted.effects["log_odds_per_unit"].isna().all()
    assert fitted.strengths["reason"].notna().all() and fitted.effects["reason"].notna().all()


def test_meetings_count_both_positions_and_no_ties():
    first = np.array(["x", "y", "x", "x", "y"])
    second = np.array(["y", "x", "y", "y", "z"])
    table = ranking.head_to_head(first, second, np.array([0, 1, 1, 2, 0]))
    rows = table.set_index(["model", "opponent"])
    assert rows.loc[("x", "y"), ["n", "share"]].tolist() == [3, pytest.approx(2 / 3)]
    assert rows.loc[("y", "x"), "share"] == pytest.approx(1 / 3)
    assert len(table) == 4 and (table["p_holm"] >= table["p_value"]).all()
    assert ranking.head_to_head(["unknown"], ["unknown"], np.array([0])).empty
