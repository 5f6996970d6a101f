"""Effects: textbook values, coverage of the intervals, symmetry, and what cannot be estimated."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit

from src.utils.schema import swap_labels
from src.utils.stats import effects


def draw_votes(n, seed, slope=0.8, position=0.2, tie=0.3):
    """Votes that follow one difference x, in pairs of battles with a shared prompt."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    decided = (rng.random(n) > expit(slope * x + position)).astype(int)
    return x, np.where(rng.random(n) < tie, 2, decided), np.arange(n) // 2


def test_winner_shares_sum_to_one_and_lie_in_their_intervals():
    shares = effects.winner_shares(np.array([0, 0, 1, 2, 2, 2]))
    assert shares["n"].tolist() == [2, 1, 3] and shares["share"].sum() == pytest.approx(1)
    assert ((shares["low"] < shares["share"]) & (shares["share"] < shares["high"])).all()


def test_exchanging_the_positions_mirrors_the_position_effect():
    labels = np.repeat([0, 1, 2], [60, 40, 30])
    effect, mirrored = effects.win_share(labels), effects.win_share(swap_labels(labels))
    assert effect["share"] == 0.6 and effect["n"] == 100
    assert effect["low"] == pytest.approx(1 - mirrored["high"])
    assert effect["p_value"] == pytest.approx(0.0569, abs=1e-4)
    assert mirrored["p_value"] == pytest.approx(effect["p_value"])


def test_ties_alone_give_no_share():
    effect = effects.win_share(np.array([2, 2]))
    assert np.isnan(effect["share"]) and effect["n"] == 0 and effect["reason"]


def test_the_share_of_the_larger_counts_decided_battles_that_differ():
    effect = effects.win_share(np.array([0, 1, 1, 0, 2]), np.array([3.0, -1.0, 2.0, 0.0, 5.0]))
    assert effect["n"] == 3 and effect["share"] == pytest.approx(2 / 3)


def test_position_and_length_are_not_found_where_there_is_none():
    found = np.zeros(2)
    for seed in range(400):
        x, labels, _ = draw_votes(300, seed=seed, slope=0, position=0)
        position, longer = effects.win_share(labels), effects.win_share(labels, x)
        found += position["p_value"] < 0.05, not longer["low"] < 0.5 < longer["high"]
    assert max(found) <= 0.05 * 400 + 4 * np.sqrt(400 * 0.05 * 0.95), found / 400


def test_levels_are_even_and_named_by_their_bounds():
    levels = effects.cut_levels(np.arange(1, 9), 2, " turns")
    assert list(levels.categories) == ["1–4 turns", "4–8 turns"]
    assert list(levels.codes) == [0] * 4 + [1] * 4
    assert list(effects.cut_levels(np.ones(3), 4).categories) == ["1"]
    assert len(effects.cut_levels(np.empty(0), 4)) == 0


def test_position_is_found_to_depend_only_on_what_moves_it():
    rng = np.random.default_rng(0)
    part, idle = rng.integers(2, size=2000), rng.integers(3, size=2000)
    b_wins = (rng.random(2000) > np.where(part == 1, 0.65, 0.45)).astype(int)
    labels = np.where(rng.random(2000) < 0.2, 2, b_wins)
    table = effects.win_share_by_level({"part": part, "idle": idle}, labels)
    assert table["n"].sum() == 2 * (labels != 2).sum()
    p_values = table.groupby("property")["p_value"].first()
    assert p_values["part"] < 1e-6 and p_values["idle"] > 0.01
    nothing = effects.win_share_by_level({"part": ["x"]}, np.array([2]))
    assert np.isnan(nothing["share"].iloc[0])


def test_shares_by_level_are_those_of_each_level_alone():
    x, labels, _ = draw_votes(300, seed=1)
    level = np.arange(300) % 3
    table = effects.win_share_by_level({"level": level}, labels, x).set_index("level")
    for name, row in table.iterrows():
        alone = effects.win_share(labels[level == name], x[level == name])
        assert row[["n", "share", "low", "high"]].tolist() == pytest.approx(
            [alone[key] for key in ("n", "share", "low", "high")]
        )


@pytest.mark.parametrize("ratio", [[1.0], [2.0, 2.0, -2.0], [1.0, 1.0, 2.0]])
def test_bins_take_few_and_equal_values(ratio):
    bins = effects.length_curves(np.array(ratio), np.zeros(len(ratio), dtype=int))["longer_bins"]
    assert bins["n"].sum() == len(ratio)
    assert bins["share"] @ bins["n"] == (np.array(ratio) > 0).sum()


# ── smooth curves ─────────────────────────────────────────────────────────────────────


def test_the_longer_wins_more_and_ties_are_rarer_the_more_lengths_differ():
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    decided = (rng.random(4000) > expit(2 * x)).astype(int)
    labels = np.where(rng.random(4000) < 0.5 * np.exp(-np.abs(x)), 2, decided)
    curves = effects.length_curves(x, labels, np.arange(4000) // 2)
    assert curves["longer_bins"]["n"].sum() == (labels != 2).sum()
    assert curves["ties_bins"]["n"].between(249, 251).all()  # 16 bins of equal count
    for name, sign in (("longer", 1), ("ties", -1)):
        curve, bins = curves[name], curves[f"{name}_bins"]
        assert sign * (curve["share"].iloc[-1] - curve["share"].iloc[0]) > 0.15
        near = np.interp(bins["value"], curve["value"], curve["share"])
        assert np.abs(near - bins["share"]).max() < 0.1
        assert curve["share"].between(curve["low"], curve["high"]).all()


def test_exchanging_the_positions_changes_no_length_curve():
    x, labels, groups = draw_votes(1000, seed=8)
    given = effects.length_curves(x, labels, groups)
    mirrored = effects.length_curves(-x, swap_labels(labels), groups)
    for name, table in given.items():
        assert len(table)
        pd.testing.assert_frame_equal(table, mirrored[name])


def test_the_band_of_a_smooth_curve_covers_the_true_curve_at_about_its_rate():
    inside = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = np.abs(rng.normal(size=1500))
        curve = effects.smooth_rate(x, rng.random(1500) < expit(1.2 * np.tanh(x)))
        truth = expit(1.2 * np.tanh(curve["value"]))
        inside.append(truth.between(curve["low"], curve["high"]))
    rate = np.mean(inside)
    assert 0.9 <= rate <= 0.99, f"{rate:.1%} of the curve lies in its 95 % band"


def test_votes_that_repeat_widen_the_band_of_their_curve():
    x, labels, _ = draw_votes(800, seed=3)
    again = np.repeat(np.arange(800), 4)
    hits = (labels == 2)[again]
    clustered, naive = (effects.smooth_rate(x[again], hits, groups) for groups in (again, None))
    ratio = (clustered["high"] - clustered["low"]).mean() / (naive["high"] - naive["low"]).mean()
    assert ratio == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("values", "n_hits"), [(np.arange(60.0), 20), (np.ones(400), 200), (np.empty(0), 0)]
)
def test_too_little_gives_no_curve(values, n_hits):
    assert effects.smooth_rate(values, np.arange(len(values)) < n_hits).empty


# ── effects of single features ────────────────────────────────────────────────────────


def test_effect_agrees_with_a_plain_logistic_regression():
    x, labels, _ = draw_votes(2000, seed=1)
    kept = labels != 2
    row = effects.effect_sizes(x[:, None], ["x"], labels).iloc[0]
    plain = sm.Logit((labels[kept] == 0).astype(float), sm.add_constant(x[kept])).fit(disp=0)
    assert row["log_odds_per_unit"] == pytest.approx(plain.params[1], rel=1e-6)
    assert row["log_odds"] == pytest.approx(plain.params[1] * x[kept].std(), rel=1e-6)


def test_holding_the_cause_constant_removes_what_only_follows_it():
    x, labels, groups = draw_votes(6000, seed=3)
    follower = (x + np.random.default_rng(0).normal(size=len(x)))[:, None]
    alone = effects.effect_sizes(follower, ["f"], labels, groups).iloc[0]
    held = effects.effect_sizes(follower, ["f"], labels, groups, controls=x[:, None]).iloc[0]
    assert alone["low"] > 0.3 and held["low"] < 0 < held["high"]


def test_clusters_widen_the_interval_when_votes_repeat():
    x, labels, _ = draw_votes(400, seed=3)
    again = np.repeat(np.arange(400), 4)
    widths = []
    for groups in (again, None):
        row = effects.effect_sizes(x[again, None], ["x"], labels[again], groups).iloc[0]
        widths.append(row["high"] - row["low"])
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.02)


def test_intervals_cover_the_true_effect_at_their_rate_and_nulls_are_rarely_found():
    covered = found = 0
    for seed in range(200):
        x, labels, groups = draw_votes(500, seed=seed, slope=0.5)
        noise = np.random.default_rng(seed + 1000).normal(size=500)
        both = np.column_stack([x, noise])
        row, null = (
            r for _, r in effects.effect_sizes(both, ["x", "n"], labels, groups).iterrows()
        )
        covered += row["low"] / row["sd"] < 0.5 < row["high"] / row["sd"]
        found += not null["low"] < 0 < null["high"]
    # Four standard errors of a binomial around 95 % and 5 % of 200.
    assert 178 <= covered <= 200 and found <= 22, (covered, found)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "labels", "part"),
    [
        (np.ones(1), np.array([0]), "1 battles"),
        (np.linspace(-1, 1, 50), np.zeros(50, dtype=int), "50 of them won by A"),
        (np.linspace(-1, 1, 50), np.full(50, 2), "0 battles"),
        (np.zeros(50), np.arange(50) % 2, "from 0 in 0 battles"),
        (np.ones(50), np.arange(50) % 2, "constant"),
        (np.linspace(-1, 1, 50), (np.arange(50) < 25).astype(int), "no finite estimate"),
    ],
)
def test_what_cannot_be_estimated_has_a_reason(values, labels, part):
    row = effects.effect_sizes(values[:, None], ["x"], labels).iloc[0]
    assert np.isnan(row["log_odds"]) and np.isnan(row["low"]) and part in row["reason"]


def test_the_verdict_is_yes_only_where_the_corrected_test_says_so():
    x, labels, groups = draw_votes(2000, seed=5)
    noise = np.random.default_rng(7).normal(size=2000)
    three = np.column_stack([x, noise, np.zeros(2000)])
    found = effects.effect_sizes(three, ["n_words", "noise", "n_urls"], labels, groups)
    verdict = effects.make_verdict({"position A": effects.win_share(labels)}, found)
    verdict = verdict.set_index("effect")
    expected = ["yes", "no", "cannot be estimated"]
    assert verdict.loc[["n_words", "noise", "n_urls"], "found"].tolist() == expected
    assert verdict.loc["position A", "advice"] == effects.ADVICE["position A"]
    assert verdict.index[0] == "position A" and verdict.index[1] == "n_words"
    known = verdict["p_value"].notna()
    assert (verdict["p_holm"] >= verdict["p_value"])[known].all()


def test_effects_of_chance_are_rarely_called_found():
    rng = np.random.default_rng(11)
    n_found = 0
    for _ in range(20):
        noise, labels = rng.normal(size=(400, 15)), rng.integers(3, size=400)
        found = effects.effect_sizes(noise, [f"x{i}" for i in range(15)], labels)
        verdict = effects.make_verdict({"position A": effects.win_share(labels)}, found)
        n_found += (verdict["found"] == "yes").sum()
    assert n_found <= 3  # without a correction about 15 of the 300


def test_a_missing_p_value_is_not_counted_by_the_correction():
    corrected = effects.correct([0.01, np.nan, 0.04])
    assert corrected[0] == pytest.approx(0.02) and corrected[2] == pytest.approx(0.04)
    assert np.isnan(corrected[1])


def test_cells_split_the_battles_by_two_properties():
    labels = np.array([0, 0, 1, 1, 2])
    rows = pd.Categorical(["x", "x", "y", "y", "y"])
    columns = pd.Categorical(["p", "q", "p", "p", "q"])
    table = effects.win_share_grid(rows, columns, labels, np.ones(5)).set_index(["row", "column"])
    assert table["n"].to_dict() == {("x", "p"): 1, ("x", "q"): 1, ("y", "p"): 2, ("y", "q"): 0}
    assert table.loc[("y", "p"), "share"] == 0 and np.isnan(table.loc[("y", "q"), "share"])


# ── leak ──────────────────────────────────────────────────────────────────────────────


def make_leaky(n_prompts, n_again, seed=0):
    """Battles whose vote depends on the prompt alone, each prompt asked `n_again` times."""
    rng = np.random.default_rng(seed)
    words = rng.integers(10**6, size=(n_prompts, 8)).astype(str)
    rows = np.repeat(np.arange(n_prompts), n_again)
    answers = [(f"answer {i}",) for i in range(len(rows))]
    pairs = {"prompt": [(" ".join(words[row]),) for row in rows]}
    pairs |= {"response_a": answers, "response_b": answers, "group": rows}
    return pd.DataFrame(pairs | {"label": rng.integers(3, size=n_prompts)[rows]})


def test_a_random_split_flatters_a_model_that_remembers_prompts():
    leak = effects.measure_leak(make_leaky(60, 5), np.zeros((300, 1)))
    assert leak["battles"].tolist() == [300, 300]  # all battles, and those whose prompt repeats
    assert (leak["leak"] > 0.05).all() and (leak["low"] > 0).all()
    assert "no measurable" not in effects.describe_leak(leak)


def test_without_repeats_there_is_no_leak_to_find():
    differences = np.random.default_rng(0).normal(size=(300, 2))
    leak = effects.measure_leak(make_leaky(300, 1), differences)
    assert leak["battles"].tolist() == [300] and abs(leak["leak"].iloc[0]) < 0.02


def test_a_leak_with_an_interval_over_zero_is_not_measurable():
    leak = pd.DataFrame({"leak": [-0.0019], "low": [-0.004], "high": [0.001]})
    text = effects.describe_leak(leak)
    assert "no measurable" in text and "−0.0019" in text


def test_the_leak_is_measured_on_whole_groups():
    leak = effects.measure_leak(make_leaky(60, 5), np.zeros((300, 1)), max_pairs=102)
    assert leak["battles"].tolist() == [100, 100]


@pytest.mark.parametrize("n_prompts", [0, 1, 4])
def test_too_few_prompts_measure_no_leak(n_prompts):
    leak = effects.measure_leak(make_leaky(n_prompts, 2), np.zeros((2 * n_prompts, 1)))
    assert leak.empty and "too few" in effects.describe_leak(leak)


def test_the_future_costs_what_the_voters_changed(demo_pairs):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3000, 1))
    newest = np.arange(3000) >= 2400
    texts = demo_pairs[["prompt", "response_a", "response_b"]].iloc[np.zeros(3000, dtype=int)]
    costs = {}
    for name, sign in (("steady", 1), ("changed", np.where(newest, -1, 1))):
        won = sign * values[:, 0] + rng.logistic(size=3000) < 0
        pairs = texts.assign(group=np.arange(3000), label=won.astype(int))
        costs[name] = effects.measure_future(pairs, values, newest).iloc[0]
    assert costs["steady"]["battles"] == costs["changed"]["battles"] == 600
    assert costs["steady"]["low"] < 0.01 and abs(costs["steady"]["cost"]) < 0.01
    assert costs["changed"]["low"] > 0.02
    assert "not measurably" in effects.describe_future(costs["steady"].to_frame().T)
    assert "harder, by" in effects.describe_future(costs["changed"].to_frame().T)
    found = costs["changed"]
    assert found["cost"] == pytest.approx(found["future"] - found["other_prompts"])


def test_a_future_with_a_single_vote_is_not_measured(demo_pairs):
    newest = np.arange(len(demo_pairs)) >= 200
    differences = np.ones((len(demo_pairs), 1))
    one = demo_pairs.assign(label=np.where(newest, demo_pairs["label"], 0))
    assert effects.measure_future(one, differences, newest).empty
    assert "Too few" in effects.describe_future(effects.measure_future(one, differences, newest))
    assert effects.measure_future(demo_pairs, differences, newest & False).empty


def test_ties_are_counted_by_likeness_refusals_and_length():
    n = 48
    style = pd.DataFrame({"word_jaccard": np.linspace(0.1, 0.9, n), "is_identical": 0.0})
    style["is_refusal_a"], style["is_refusal_b"] = np.arange(n) % 2.0, np.arange(n) % 4 > 1
    style["n_chars_a"], style["n_chars_b"] = np.arange(n), np.arange(n)[::-1]
    style.loc[n - 10 :, "is_identical"] = 1
    properties = effects.tie_properties(style)
    alike, refused, longer = properties.values()
    assert alike.value_counts()["the same text"] == 10 and alike[0] == "10–30 %"
    assert refused[:4].tolist() == ["none", "one", "one", "both"]
    assert longer[0] == longer[n - 1] == longer.categories[-1]


def test_levels_show_the_ties_seen_and_predicted_and_hide_those_of_few_battles():
    labels = np.repeat([2, 0], [30, 25])
    probs = np.tile([0.2, 0.2, 0.6], (55, 1))
    probs[:20] = 0.1, 0.1, 0.8
    levels = pd.Categorical(np.repeat(["a", "b", "rare"], [20, 30, 5]))
    table = effects.tie_shares({"kind": levels}, labels, probs)
    assert table["level"].tolist() == ["a", "b"] and table["n"].tolist() == [20, 30]
    assert table["share"].tolist() == pytest.approx([1, 1 / 3])
    assert table["predicted"].tolist() == pytest.approx([0.8, 0.6])
    assert table["p_value"].iloc[0] < 0.001
