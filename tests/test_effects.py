import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit, softmax

from src.utils.battles import demo
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.schema import swap_labels
from src.utils.stats import effects, ranking

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


# Six brands of chocolate pudding, Davidson 1970, example 2: brands i and j, tasters for i, for j, and for neither
# (as in the R package PlackettLuce, data set "pudding").
PUDDING = np.array(
    [
        (1, 2, 19, 22, 16), (1, 3, 16, 19, 12), (2, 3, 19, 19, 10), (1, 4, 18, 23, 13), (2, 4, 23, 19, 9),
        (3, 4, 19, 20, 15), (1, 5, 13, 19, 18), (2, 5, 16, 20, 12), (3, 5, 16, 15, 17), (4, 5, 17, 14, 16),
        (1, 6, 18, 21, 12), (2, 6, 22, 20, 12), (3, 6, 13, 18, 10), (4, 6, 14, 19, 18), (5, 6, 11, 21, 12),
    ]
)  # fmt: skip
# PlackettLuce's vignette prints these, stopped after 7 iterations "to obtain the same worth parameters as Davidson".
PUDDING_WORTHS, PUDDING_NU = (
    (0.1388005, 0.1729985, 0.1617420, 0.1653930, 0.1586805, 0.2023855),
    0.7468147,
)
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def draw_votes(
    n: int, seed: int, slope: float = 0.8, position: float = 0.2, nu: float = 0.9
) -> tuple:
    """Votes of a Davidson model on one covariate, in pairs of battles with a shared prompt."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    eta = slope * x + position
    weights = np.column_stack([np.exp(eta / 2), np.exp(-eta / 2), np.full(n, nu)])
    cumulated = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return x, (rng.random((n, 1)) > cumulated).sum(axis=1), np.arange(n) // 2


def test_winner_shares_sum_to_one_and_lie_in_their_intervals():
    shares = effects.winner_shares(np.array([0, 0, 1, 2, 2, 2]))
    assert shares["n"].tolist() == [2, 1, 3] and shares["share"].sum() == pytest.approx(1)
    assert ((shares["low"] < shares["share"]) & (shares["share"] < shares["high"])).all()


def test_intervals_of_a_proportion_match_the_textbook():
    assert effects.proportion_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert effects.proportion_interval(5, 10, exact=True) == pytest.approx(
        (0.1871, 0.8129), abs=1e-4
    )


def test_no_trials_give_no_interval():
    assert np.isnan(effects.proportion_interval(np.array([0]), np.array([0]))).all()


def test_exchanging_the_positions_mirrors_the_position_effect():
    labels = np.repeat([0, 1, 2], [60, 40, 30])
    effect, mirrored = effects.position_effect(labels), effects.position_effect(swap_labels(labels))
    assert effect["share"] == 0.6 and effect["n"] == 100
    assert effect["low"] == pytest.approx(1 - mirrored["high"]) and effect[
        "log_odds"
    ] == pytest.approx(np.log(1.5))
    assert (
        effect["p_value"] == pytest.approx(mirrored["p_value"]) == pytest.approx(0.0569, abs=1e-4)
    )


def test_ties_alone_say_nothing_about_position():
    effect = effects.position_effect(np.array([2, 2]))
    assert np.isnan(effect["share"]) and effect["reason"] == "no decided battle"


def test_larger_wins_counts_decided_battles_that_differ():
    effect = effects.larger_wins(np.array([3.0, -1.0, 2.0, 0.0, 5.0]), np.array([0, 1, 1, 0, 2]))
    assert effect["n"] == 3 and effect["share"] == pytest.approx(2 / 3)


def test_win_rate_rises_with_what_voters_like_and_every_battle_is_counted():
    x, labels, _ = draw_votes(4000, seed=0, slope=2)
    wins, ties = effects.win_rate_by(x, labels, n_bins=8)
    assert wins["n"].sum() == (labels != 2).sum() and ties["n"].sum() == len(labels)
    assert wins["share"].is_monotonic_increasing
    assert ties["share"].iloc[0] > ties["share"].iloc[-1]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
def test_win_rate_takes_few_and_equal_values(values):
    wins, ties = effects.win_rate_by(np.array(values), np.zeros(len(values), dtype=int), n_bins=10)
    assert wins["n"].sum() == ties["n"].sum() == len(values)


def test_effect_agrees_with_a_plain_logistic_regression():
    x, labels, _ = draw_votes(2000, seed=1)
    kept = labels != 2
    row = effects.effect_sizes(x[:, None], ["x"], labels).iloc[0]
    plain = sm.Logit((labels[kept] == 0).astype(float), sm.add_constant(x[kept])).fit(disp=0)
    assert row["log_odds_per_unit"] == pytest.approx(plain.params[1], rel=1e-6)
    assert row["log_odds"] == pytest.approx(plain.params[1] * x[kept].std(), rel=1e-6)


def test_holding_the_cause_constant_removes_what_only_follows_it():
    x, labels, groups = draw_votes(6000, seed=3)
    follower = x + np.random.default_rng(0).normal(size=len(x))
    alone = effects.effect_sizes(follower[:, None], ["f"], labels, groups).iloc[0]
    held = effects.effect_sizes(follower[:, None], ["f"], labels, groups, controls=x[:, None]).iloc[
        0
    ]
    assert alone["low"] > 0.3 and held["low"] < 0 < held["high"]


def test_clusters_widen_the_interval_when_votes_repeat():
    x, labels, _ = draw_votes(400, seed=3)
    again = np.repeat(np.arange(400), 4)
    clustered, naive = (
        effects.effect_sizes(x[again, None], ["x"], labels[again], groups).iloc[0]
        for groups in (again, None)
    )
    ratio = (clustered["high"] - clustered["low"]) / (naive["high"] - naive["low"])
    assert ratio == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        (np.ones(1), np.array([0]), "too few"),
        (np.random.default_rng(0).normal(size=50), np.zeros(50, dtype=int), "too few"),
        (np.random.default_rng(0).normal(size=50), np.full(50, 2), "too few"),
        (np.zeros(50), np.arange(50) % 2, "seen in 0"),
        (np.linspace(-1, 1, 50), (np.arange(50) < 25).astype(int), "no finite estimate"),
    ],
)
def test_what_cannot_be_estimated_says_why(values, labels, said):
    for table in (
        effects.effect_sizes(values[:, None], ["x"], labels),
        ranking.fit_votes(pd.DataFrame({"x": values}), labels).effects.query("effect == 'x'"),
    ):
        row = table.iloc[0]
        assert np.isnan(row["log_odds"]) and np.isnan(row["low"]) and row["reason"]
    assert said in effects.effect_sizes(values[:, None], ["x"], labels)["reason"].iloc[0]


def test_strengths_match_the_published_example():
    wins = [(TEAMS[i], TEAMS[j]) for i in range(7) for j in range(7) for _ in range(WINS[i, j])]
    winner, loser = np.array(wins).T
    # Each game from both sides: positions are then even, as the published model has none.
    fitted = ranking.fit_bradley_terry(
        np.r_[winner, loser], np.r_[loser, winner], np.repeat([0, 1], len(winner))
    )
    strengths = fitted.strengths.set_index("model")["strength"]
    np.testing.assert_allclose(
        strengths[list(TEAMS)] - strengths["Baltimore"], ABILITIES, atol=2e-4
    )
    assert strengths.sum() == pytest.approx(0, abs=1e-9)
    assert fitted.effects["log_odds_per_unit"].iloc[0] == pytest.approx(0, abs=1e-6)  # the position
    assert fitted.effects["reason"].iloc[1] == "no ties"


def test_strengths_and_ties_match_davidsons_own_example():
    votes = [
        (i, j, label)
        for i, j, *counts in PUDDING
        for label, count in enumerate(counts)
        for _ in range(count)
    ]
    i, j, labels = np.array(votes).T
    # Each tasting from both sides: the published model has no position.
    fitted = ranking.fit_bradley_terry(
        np.r_[i, j].astype(str), np.r_[j, i].astype(str), np.r_[labels, swap_labels(labels)]
    )
    worths = softmax(fitted.strengths.sort_values("model")["strength"].to_numpy(dtype=float))
    np.testing.assert_allclose(worths, PUDDING_WORTHS, atol=2e-4)
    assert np.exp(fitted.effects["log_odds_per_unit"].iloc[1]) == pytest.approx(
        PUDDING_NU, abs=2e-3
    )


def test_davidson_recovers_what_was_planted():
    x, labels, groups = draw_votes(20_000, seed=4, slope=0.8, position=0.2, nu=0.9)
    found = ranking.fit_votes(pd.DataFrame({"x": x}), labels, groups).effects.set_index("effect")
    for name, planted in (("x", 0.8), ("position A", 0.2), ("tie", np.log(0.9))):
        row = found.loc[name]
        assert row["low"] < planted < row["high"] and row["high"] - row["low"] < 0.15


@pytest.mark.parametrize("method", ["davidson", "logit"])
def test_intervals_cover_the_planted_effect_at_their_rate_and_nulls_are_rarely_found(method):
    covered, found = 0, 0
    for seed in range(200):
        x, labels, groups = draw_votes(500, seed=seed, slope=0.5)
        noise = np.random.default_rng(seed + 1000).normal(size=500)
        both = np.column_stack([x, noise])
        if method == "davidson":
            table = ranking.fit_votes(
                pd.DataFrame(both, columns=["x", "noise"]), labels, groups
            ).effects
            row, null = table.iloc[2], table.iloc[3]
            low, high = row["low"], row["high"]
        else:
            table = effects.effect_sizes(both, ["x", "noise"], labels, groups)
            row, null = table.iloc[0], table.iloc[1]
            low, high = row["low"] / row["sd"], row["high"] / row["sd"]
        covered += low < 0.5 < high
        found += not null["low"] < 0 < null["high"]
    # Four standard errors of a binomial around 95 % and 5 % of 200.
    rates = f"{covered / 200:.1%} of intervals cover (95 % promised), {found / 200:.1%} of nulls are found (5 % promised)"
    assert 178 <= covered <= 200 and found <= 22, rates


def test_strengths_and_style_on_the_demo_arena(demo_pairs):
    labels, groups = demo_pairs["label"].to_numpy(), demo_pairs["group"].to_numpy()
    fitted = ranking.fit_bradley_terry(
        demo_pairs["model_a"], demo_pairs["model_b"], labels, groups=groups
    )
    shown = fitted.strengths.dropna(subset="strength").set_index("model")["strength"]
    assert shown["demo-owl"] > shown["demo-dodo"]
    assert fitted.reason is None and fitted.n == len(demo_pairs)


def test_exchanging_the_positions_changes_no_strength_and_negates_the_position(demo_pairs):
    labels = demo_pairs["label"].to_numpy()
    positions = demo_pairs["model_a"], demo_pairs["model_b"]
    given = ranking.fit_bradley_terry(*positions, labels)
    mirrored = ranking.fit_bradley_terry(*positions[::-1], swap_labels(labels))
    columns = ["strength", "low", "high"]
    np.testing.assert_allclose(
        given.strengths.sort_values("model")[columns],
        mirrored.strengths.sort_values("model")[columns],
        atol=1e-5,
    )
    position, position_mirrored = (
        fitted.effects["log_odds_per_unit"].iloc[0] for fitted in (given, mirrored)
    )
    assert position == pytest.approx(-position_mirrored, abs=1e-5)


def test_unknown_names_are_not_ranked():
    unknown = ["unknown"] * 20
    fitted = ranking.fit_bradley_terry(unknown, unknown, np.arange(20) % 3)
    assert fitted.strengths.empty and fitted.n == 0 and "unknown" in fitted.reason
    assert ranking.model_records(unknown, unknown, np.arange(20) % 3).empty


def test_a_model_that_never_loses_gets_no_strength():
    rng = np.random.default_rng(0)
    model_a, model_b = ["champion"] * 40 + ["x", "y"] * 50, ["y"] * 40 + ["y", "x"] * 50
    labels = np.r_[np.zeros(40, dtype=int), rng.integers(3, size=100)]
    fitted = ranking.fit_bradley_terry(model_a, model_b, labels)
    rows = fitted.strengths.set_index("model")
    assert (
        np.isnan(rows.loc["champion", "strength"])
        and "not linked" in rows.loc["champion", "reason"]
    )
    assert np.isfinite(rows.loc[["x", "y"], "strength"]).all() and fitted.n == 100


def test_a_strength_that_cannot_be_told_from_its_position_is_not_reported():
    labels = np.random.default_rng(0).integers(3, size=100)
    fitted = ranking.fit_bradley_terry(["x"] * 100, ["y"] * 100, labels)
    assert fitted.strengths["strength"].isna().all() and "cannot be told apart" in fitted.reason


def test_a_model_with_few_battles_is_fitted_but_not_reported():
    rng = np.random.default_rng(0)
    model_a, model_b = ["x"] * 100 + ["rare"] * 6, ["y"] * 103 + ["x"] * 3
    fitted = ranking.fit_bradley_terry(
        model_a, model_b, np.r_[rng.integers(3, size=100), 0, 1, 2, 0, 1, 2]
    )
    rows = fitted.strengths.set_index("model")
    assert (
        np.isnan(rows.loc["rare", "strength"])
        and rows.loc["rare", "reason"] == "6 battles, fewer than 30"
    )
    assert fitted.n == 106 and rows.loc[["x", "y"], "strength"].sum() == pytest.approx(0)


@pytest.mark.parametrize("labels", [[0], [2], [0, 0, 0], [0, 1], [0, 1, 2]])
def test_a_handful_of_battles_gives_reasons_not_numbers(labels):
    labels = np.array(labels)
    model_a, model_b = ["x"] * len(labels), ["y"] * len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = ranking.fit_bradley_terry(
            model_a, model_b, labels, pd.DataFrame({"z": np.arange(len(labels)) * 1.0})
        )
        effects.position_effect(labels)
        effects.winner_shares(labels)
        ranking.model_records(model_a, model_b, labels)
    assert fitted.strengths["strength"].isna().all() and fitted.reason
    assert fitted.effects["log_odds_per_unit"].isna().all()


def test_the_verdict_says_found_only_where_the_interval_excludes_nothing():
    x, labels, groups = draw_votes(2000, seed=5)
    noise = np.random.default_rng(7).normal(size=2000)
    found = effects.effect_sizes(
        np.column_stack([x, noise, np.zeros(2000)]), ["n_words", "noise", "n_urls"], labels, groups
    )
    verdict = effects.make_verdict(
        {"position A": effects.position_effect(labels)}, found
    ).set_index("effect")
    assert verdict.loc[["n_words", "noise", "n_urls"], "found"].tolist() == [
        "yes",
        "no",
        "cannot be estimated",
    ]
    assert verdict.loc["position A", "advice"] == effects.ADVICE["position A"]


def test_records_hold_nothing_that_json_refuses():
    table = pd.DataFrame(
        {"x": [np.float32(1.5), np.nan], "n": np.array([1, 2]), "reason": [None, "few"]}
    )
    records = effects.to_records(table)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert records[1]["x"] is None and records[0] == {"x": 1.5, "n": 1, "reason": None}


# ── coverage on the demo arena, whose true probabilities are known ────────────────────

N_ARENAS, N_VOTES = 150, 900


@pytest.fixture(scope="module")
def arena():
    """1,800 demo battles: what voters look at (A − B), true probabilities, prompts."""
    pairs, probs = demo.make_battles(1800, seed=11)
    measured = [
        np.array(list(map(demo.measure_answer, pairs["prompt"], pairs[f"response_{side}"])))
        for side in "ab"
    ]
    return (
        pd.DataFrame(measured[0] - measured[1], columns=demo.MEASURES),
        probs,
        add_groups_and_folds(pairs),
    )


def vote_again(arena, seed):
    """A fresh sample of the arena's battles with fresh votes by the true probabilities."""
    measured, probs, pairs = arena
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(probs), N_VOTES, replace=False)
    labels = (rng.random((N_VOTES, 1)) > probs[rows].cumsum(axis=1)[:, :-1]).sum(axis=1)
    noise = rng.normal(size=N_VOTES)
    return (
        measured.iloc[rows].reset_index(drop=True).assign(noise=noise),
        labels,
        pairs["group"].to_numpy()[rows],
    )


def test_demo_intervals_cover_every_planted_effect_at_their_rate(arena):
    planted = {
        **{name: getattr(demo.EFFECTS, name) for name in demo.MEASURES},
        "position A": demo.EFFECTS.position,
    }
    planted |= {"tie": np.log(demo.EFFECTS.nu), "noise": 0.0}
    covered = dict.fromkeys(planted, 0)
    for seed in range(N_ARENAS):
        found = ranking.fit_votes(*vote_again(arena, seed)).effects.set_index("effect")
        for name, size in planted.items():
            covered[name] += found.loc[name, "low"] < size < found.loc[name, "high"]
    rates = {name: count / N_ARENAS for name, count in covered.items()}
    mean = np.mean(list(rates.values()))
    said = f"95 % promised, {mean:.1%} covered; by effect {rates}; a null is found in {1 - rates['noise']:.1%}"
    print(said)
    # Four standard errors: 95 % ± 7.1 points for one effect over 150 arenas, ± 2.4 for the mean of nine.
    assert min(rates.values()) >= 0.879 and 0.926 <= mean <= 0.974, said


def test_position_and_length_are_not_found_where_there_is_none():
    found_position = found_length = 0
    for seed in range(400):
        x, labels, _ = draw_votes(300, seed=seed, slope=0, position=0)
        position, longer = effects.position_effect(labels), effects.larger_wins(x, labels)
        found_position += position["p_value"] < 0.05
        found_length += not longer["low"] < 0.5 < longer["high"]
    said = f"found where nothing is: position {found_position / 400:.1%}, length {found_length / 400:.1%} (5 % promised)"
    assert max(found_position, found_length) <= 0.05 * 400 + 4 * np.sqrt(400 * 0.05 * 0.95), said


def test_the_band_of_a_smooth_curve_covers_the_true_curve_at_about_its_rate():
    inside = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = np.abs(rng.normal(size=1500))
        curve = effects.smooth_rate(
            x, rng.random(1500) < expit(1.2 * np.tanh(x)), n_boot=100, seed=seed
        )
        inside.append(
            curve[["low", "high"]].sub(expit(1.2 * np.tanh(curve["value"])), axis=0).prod(axis=1)
            < 0
        )
    rate = np.mean(inside)
    assert 0.88 <= rate <= 0.99, f"{rate:.1%} of the curve lies in its 95 % band"


# ── smooth curves ─────────────────────────────────────────────────────────────────────


def test_exchanging_the_positions_changes_no_length_curve():
    x, labels, groups = draw_votes(1000, seed=8)
    for given, mirrored in zip(
        effects.length_curves(x, labels, groups, 20),
        effects.length_curves(-x, swap_labels(labels), groups, 20),
        strict=True,
    ):
        pd.testing.assert_frame_equal(given, mirrored)
        assert (
            len(given)
            and (given["low"] <= given["share"]).all()
            and (given["share"] <= given["high"]).all()
        )


def test_a_resampled_curve_is_what_a_full_fit_would_give():
    rng = np.random.default_rng(0)
    basis, hits = np.eye(6)[rng.integers(6, size=600)], (rng.random(600) < 0.6).astype(float)
    start = effects._newton_rate(basis, hits, np.ones(600), np.zeros(6), n_steps=20)
    weights = next(effects._resample_weights(np.arange(600), 1, seed=1))
    assert weights.sum() == 600
    two, full = (effects._newton_rate(basis, hits, weights, start, n_steps) for n_steps in (2, 20))
    np.testing.assert_allclose(two, full, atol=1e-3)


def test_votes_that_repeat_widen_the_band_of_their_curve():
    x, labels, _ = draw_votes(800, seed=3)
    again = np.repeat(np.arange(800), 4)
    hits = (labels == 2)[again]
    clustered, naive = (effects.smooth_rate(x[again], hits, groups) for groups in (again, None))
    ratio = (clustered["high"] - clustered["low"]).mean() / (naive["high"] - naive["low"]).mean()
    assert ratio == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(
    ("values", "n_hits"), [(np.arange(60.0), 20), (np.ones(400), 200), (np.empty(0), 0)]
)
def test_too_little_gives_no_curve(values, n_hits):
    assert effects.smooth_rate(values, np.arange(len(values)) < n_hits).empty


# ── position by part, levels ──────────────────────────────────────────────────────────


def test_levels_are_even_and_named_by_their_bounds():
    levels = effects.cut_levels(np.arange(1, 9), 2, " turns")
    assert (
        list(levels.categories) == ["1–4 turns", "4–8 turns"]
        and list(levels.codes) == [0] * 4 + [1] * 4
    )
    assert list(effects.cut_levels(np.ones(3), 4).categories) == ["1"]
    assert len(effects.cut_levels(np.empty(0), 4)) == 0


def test_position_is_found_to_depend_only_on_what_moves_it():
    rng = np.random.default_rng(0)
    part, idle = rng.integers(2, size=2000), rng.integers(3, size=2000)
    labels = np.where(
        rng.random(2000) < 0.2, 2, (rng.random(2000) > np.where(part == 1, 0.65, 0.45)).astype(int)
    )
    table = effects.position_by({"part": part, "idle": idle}, labels)
    assert table["n"].sum() == 2 * (labels != 2).sum()
    p_values = table.groupby("property")["p_value"].first()
    assert p_values["part"] < 1e-6 and p_values["idle"] > 0.01
    assert np.isnan(effects.position_by({"part": ["x"]}, np.array([2]))["share"].iloc[0])


# ── strengths by bootstrap ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("styled", [False, True])
def test_bootstrap_and_sandwich_agree_on_the_demo_arena(arena, styled):
    measured, _, pairs = arena
    positions, labels = (pairs["model_a"], pairs["model_b"]), pairs["label"].to_numpy()
    covariates = measured[["log_words", "lists"]] if styled else None
    fitted = ranking.fit_bradley_terry(*positions, labels, covariates, pairs["group"])
    both = ranking.compare_intervals(
        fitted.strengths,
        ranking.bootstrap_strengths(*positions, labels, covariates, pairs["group"], n_boot=1000),
    )
    assert len(both) == len(demo.CHATBOTS)
    assert both["width_ratio"].median() == pytest.approx(1, abs=0.1), both["width_ratio"].describe()
    assert both["width_ratio"].between(0.85, 1.15).all(), both["width_ratio"].describe()


def test_a_resampled_strength_is_what_a_full_fit_would_give(arena):
    measured, _, pairs = arena
    labels = pairs["label"].to_numpy()
    models = sorted({*pairs["model_a"]})
    design = ranking._design_models(
        pairs["model_a"].to_numpy(object), pairs["model_b"].to_numpy(object), models
    )
    full, _, _ = ranking._add_covariates(design, measured[["log_words"]])
    codes = np.arange(len(labels))
    params, cov, _, _ = ranking._maximise(full, labels, codes, design.shape[1])
    weights = next(effects._resample_weights(codes, 1, seed=3)).astype(int)
    again = np.repeat(codes, weights)
    exact, _, _, _ = ranking._maximise(full[again], labels[again], again, design.shape[1])
    for n_steps, tolerance in ((1, 0.1), (2, 0.01)):
        (draw,) = ranking._resample_davidson(
            params, full, labels, codes, 1, seed=3, n_steps=n_steps
        )
        assert (np.abs(draw - exact) / np.sqrt(np.diag(cov))).max() < tolerance


def test_no_strength_gives_no_bootstrap():
    unknown = ["unknown"] * 20
    assert ranking.bootstrap_strengths(unknown, unknown, np.arange(20) % 3).empty
    nothing = ranking.fit_bradley_terry(unknown, unknown, np.arange(20) % 3).strengths
    assert ranking.compare_intervals(
        nothing, ranking.bootstrap_strengths(["x"], ["y"], np.array([0]))
    ).empty


def test_mt_bench_strengths_are_in_the_known_order():
    path = REAL_DATA / "transfer" / "mtbench_human.csv.gz"
    if not path.exists():
        pytest.skip(f"MT-bench votes are not at hand: {path} is missing")
    pairs = add_groups_and_folds(load_pairs(path)[0])
    fitted = ranking.fit_bradley_terry(
        pairs["model_a"], pairs["model_b"], pairs["label"], groups=pairs["group"]
    )
    order = fitted.strengths["model"].tolist()
    assert order[0] == "gpt-4" and order[-2:] == ["alpaca-13b", "llama-13b"] and len(order) == 6


# ── families ──────────────────────────────────────────────────────────────────────────


def test_families_are_the_letters_that_open_a_name():
    names = ["gpt-4-0613", "GPT35", "claude-2.1", "4x"]
    assert ranking.name_families(names).tolist() == ["gpt", "gpt", "claude", "unknown"]


def test_kin_that_tie_more_often_are_found_and_one_family_alone_is_not_judged():
    rng = np.random.default_rng(0)
    names = np.array(["red-1", "red-2", "blue-1", "blue-2"])
    a, b = np.array([rng.choice(4, 2, replace=False) for _ in range(3000)]).T
    kin = np.char.partition(names[a], "-")[:, 0] == np.char.partition(names[b], "-")[:, 0]
    labels = np.where(rng.random(3000) < np.where(kin, 0.5, 0.2), 2, rng.integers(2, size=3000))
    strengths = ranking.fit_bradley_terry(names[a], names[b], labels).strengths
    table = ranking.family_ties(names[a], names[b], labels, strengths)
    assert (table["low"] > 0).all() and table["log_odds_per_unit"].iloc[0] == pytest.approx(
        np.log(4), abs=0.3
    )
    alike = ranking.family_ties(["red-1"] * 99, ["red-2"] * 99, labels[:99], strengths)
    assert alike["log_odds"].isna().all() and alike["reason"].notna().all()


# ── leak ──────────────────────────────────────────────────────────────────────────────


def make_leaky(n_prompts, n_again, seed=0):
    """Battles whose vote is decided by the prompt's words, each prompt asked `n_again` times."""
    rng = np.random.default_rng(seed)
    prompts = [
        " ".join(f"w{word}" for word in rng.integers(10**6, size=8)) for _ in range(n_prompts)
    ]
    rows = np.repeat(np.arange(n_prompts), n_again)
    labels = rng.integers(3, size=n_prompts)[rows]
    text = pd.Series([(f"answer {i}",) for i in range(len(rows))], dtype=object)
    return pd.DataFrame(
        {
            "prompt": pd.Series([(prompts[row],) for row in rows], dtype=object),
            "response_a": text,
            "response_b": text,
            "label": labels,
            "group": rows,
        }
    )


def test_a_random_split_flatters_a_model_that_remembers_prompts():
    pairs = make_leaky(60, 5)
    losses = effects.score_both_splits(pairs, np.random.default_rng(0).normal(size=(300, 2)))
    assert len(losses) == 300 and losses["is_repeated"].all()
    assert losses["grouped"].mean() - losses["random"].mean() > 0.05


def test_without_repeats_there_is_no_leak_to_find():
    losses = effects.score_both_splits(
        make_leaky(300, 1), np.random.default_rng(0).normal(size=(300, 2))
    )
    gap = losses["grouped"] - losses["random"]
    assert not losses["is_repeated"].any() and abs(gap.mean()) <= 4 * gap.std() / np.sqrt(300)


def test_the_leak_is_measured_on_whole_groups():
    losses = effects.score_both_splits(make_leaky(60, 5), np.zeros((300, 1)), max_pairs=100)
    assert len(losses) == 100 and (losses["group"].value_counts() == 5).all()


@pytest.mark.parametrize("n_prompts", [0, 1, 4])
def test_too_few_prompts_measure_no_leak(n_prompts):
    assert effects.score_both_splits(make_leaky(n_prompts, 2), np.zeros((2 * n_prompts, 1))).empty
