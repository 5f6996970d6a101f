"""Sentences about results: each says what its numbers say, and claims nothing that they do not."""

import html
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from src.utils.stats import effects, extras, ranking, sentences
from tests.markup import NAMES


def found(n_hits, n):
    return effects.win_share(np.repeat([0, 1], [n_hits, n - n_hits]))


def make_effects(**sizes):
    rows = [(name, size, size - 0.1, size + 0.1) for name, size in sizes.items()]
    table = pd.DataFrame(rows, columns=["effect", "log_odds", "low", "high"])
    p_values = np.where(table["log_odds"].abs() > 0.1, 0.001, 0.9)
    return table.assign(p_value=p_values, p_holm=p_values, n=100, reason=None)


@pytest.mark.parametrize(
    ("n_hits", "n", "part"),
    [(80, 100, "wins **80.0"), (52, 100, "no measurable preference"), (0, 0, "No decided battle")],
)
def test_a_winner_is_one_only_where_the_test_says_so(n_hits, n, part):
    assert part in sentences.describe_winner(found(n_hits, n), "position A")


def test_without_ties_none_are_claimed():
    text = sentences.describe_ties(effects.winner_shares(np.array([0, 1, 1])), 0.693)
    assert "No vote is a tie" in text and "B wins" in text and "0.693" in text


def test_near_equal_lengths_name_the_side_that_wins():
    text = sentences.describe_near_equal(found(10, 60), found(0, 0), 75, 12)
    assert "75 characters of each other, the longer answer wins only **16.7" in text
    assert "12 words of each other, no decided battle" in text


def test_levels_name_only_properties_that_matter():
    labels = np.r_[np.zeros(90), np.ones(10), np.zeros(10), np.ones(90)].astype(int)
    levels = {"half": np.repeat(["first", "second"], 100), "parity": np.arange(200) % 2}
    table = effects.win_share_by_level(levels, labels)
    text = sentences.describe_levels(table, "This share")
    assert "by half" in text and "for second" in text and "parity" not in text
    alone = sentences.describe_levels(table[table["property"] == "parity"], "This share")
    assert "does not measurably depend on parity" in alone


def test_the_largest_clear_effects_come_first_by_side():
    text = sentences.describe_effects(make_effects(small=0.2, large=0.9, none=0.05, bad=-0.5))
    assert text.index("large") < text.index("small") < text.index("bad")
    assert "none" not in text and "hurts: bad −0.50" in text
    assert "no style difference" in sentences.describe_effects(make_effects(none=0.05))


def test_what_is_gone_at_equal_length_is_named():
    alone, equal = make_effects(length=0.5, style=0.5), make_effects(length=0.05, style=0.4)
    text = sentences.describe_shrinkage(alone, equal)
    gone, stays = text.split("Clear in both")
    assert "length." in gone and "style" in stays and "style" not in gone


def test_interactions_say_which_way():
    text = sentences.describe_interactions(make_effects(code=-0.5, turns=0.4, other=0.0))
    assert "code weakens" in text and "turns strengthens" in text and "other" not in text
    assert "Nothing" in sentences.describe_interactions(make_effects(other=0.0))


def test_the_verdict_lists_the_shares_and_what_was_found():
    tested = {"position A": found(50, 100)}
    verdict = effects.make_verdict(tested, make_effects(n_lines=0.5, noise=0.01))
    table = sentences.lay_out_verdict(verdict, {"n_lines": "line breaks"})
    assert table["what"].tolist() == ["position A", "line breaks"]
    assert table["moves a vote"].tolist() == ["no measurable effect", "yes"]


def test_strengths_name_who_moved():
    plain = pd.DataFrame({"model": ["x", "y"], "strength": [1.0, -1.0]})
    plain = plain.assign(low=plain["strength"] - 0.1, high=plain["strength"] + 0.1)
    styled = plain.assign(strength=[0.5, -1.0], low=[0.4, -1.1], high=[0.6, -0.9])
    assert "x moved measurably" in sentences.describe_strengths(plain, styled)
    assert "moves none" in sentences.describe_strengths(plain, plain)
    nobody = plain.assign(strength=np.nan)
    assert sentences.describe_strengths(nobody, nobody) == "No chatbot is ranked."


def test_records_name_winners_and_losers():
    labels = np.zeros(60, dtype=int)
    text = sentences.describe_records(ranking.model_records(["x"] * 60, ["y"] * 60, labels), 30)
    assert "above one half: x" in text and "Below: y" in text
    few = ranking.model_records(["x"] * 6, ["y"] * 6, labels[:6])
    assert "No chatbot" in sentences.describe_records(few, 30)


def test_kinds_claim_no_difference_of_chance():
    rng = np.random.default_rng(0)
    kinds, labels = pd.Categorical(np.repeat(["a", "b"], 300)), rng.integers(3, size=600)
    ties = extras.vote_shares(kinds, labels)
    longer = effects.win_share_by_level({"kind": kinds}, labels, rng.normal(size=600))
    text = sentences.describe_kinds(ties[ties["outcome"] == "tie"], longer)
    assert text.count("no measurable difference") == 2


def test_cells_name_the_extremes():
    rows, columns = pd.Categorical(["short"] * 120), pd.Categorical(np.repeat(["1 ×", "2 ×"], 60))
    labels = np.r_[np.arange(60) % 2, np.zeros(60)].astype(int)
    table = effects.win_share_grid(rows, columns, labels, np.ones(120))
    assert "ratio 2 ×" in sentences.describe_grid(table)
    assert "No cell" in sentences.describe_grid(table[:1])


def test_words_are_named_only_where_they_are_clear():
    words = make_effects(good=0.5, bad=-0.5, the=0.01).rename(columns={"effect": "word"})
    words["weight"] = words["log_odds"] / 2
    text = sentences.describe_words(words, "text", 0.97)
    assert "“good”" in text and "hurts: “bad”" in text and "“the”" not in text
    assert "at 1.00" in text and "97\u00a0%" in text
    none = sentences.describe_words(words[words["word"] == "the"], "text", 0.0)
    assert "No word stands out" in none


def test_growth_is_claimed_only_with_an_interval_above_0():
    curve = pd.DataFrame({"battles": [100, 800], "log_loss": [1.06, 1.03]})
    trend = pd.DataFrame({"battles": [9000.0], "gain": [0.02], "gain_high": [0.05]})
    assert "would bring 0.020" in sentences.describe_growth(curve, trend.assign(gain_low=0.01))
    assert "no measurable gain" in sentences.describe_growth(curve, trend.assign(gain_low=-0.01))
    assert "too few" in sentences.describe_growth(curve, trend[:0])


def test_a_score_stands_beside_the_prior_and_the_oracle():
    result = {"log_loss": 1.031, "log_loss_low": 1.0, "log_loss_high": 1.06, "accuracy": 0.48}
    result["prior_log_loss"] = 1.097
    assert "oracle" not in sentences.describe_score(result, 898)
    known = result | {"oracle_log_loss": 1.02, "excess_log_loss": 0.011}
    assert "0.011 nats are left" in sentences.describe_score(known, 898)


def test_long_lists_of_names_are_cut():
    assert sentences.join_names("abc") == "a, b and c"
    assert sentences.join_names("abcdefghij", n_shown=2) == "a, b and 8 more"
    assert sentences.join_names([]) == "none"


def test_no_name_from_a_file_becomes_markup():
    records = ranking.model_records([NAMES[-1]] * 60, [NAMES[0]] * 60, np.zeros(60, dtype=int))
    text = sentences.describe_records(records, 30)
    assert "<" not in text and "$" not in text and "_" not in text and "alpha" in text
    assert html.unescape(sentences.literal(NAMES[-1])) == NAMES[-1]


def test_a_longer_answer_that_loses_wins_only_a_part():
    assert "wins only **20.0" in sentences.describe_winner(found(20, 100), "the longer answer")


@pytest.mark.parametrize(
    ("gap", "side"), [((0.05, 0.04, 0.06), "above"), ((-0.05, -0.06, -0.04), "below")]
)
def test_a_clear_gap_has_its_size_interval_and_side(gap, side):
    told = sentences.describe_gap(*gap, "the class prior")
    assert told == f"0.050 nats (0.040 to 0.060) {side} the class prior"


def test_a_gap_whose_interval_holds_0_is_no_difference():
    told = sentences.describe_gap(-0.001, -0.002, 0.001, "its best member")
    assert told == "no measurable difference to its best member (−0.001, −0.002 to +0.001)"


def test_a_head_is_said_to_learn_on_states_and_speaks_of_no_steps():
    seen = {"n_parameters": 579, "n_train_pairs": 1200, "seconds": 60.0, "padding_share": 0.1}
    fitted = SimpleNamespace(**seen, tokens_per_second=1e3)
    trained, head = (sentences.describe_training(fitted, is_head) for is_head in (False, True))
    assert "of steps" in trained and "10.0% padding" in trained and "frozen" not in trained
    assert "frozen" in head and "steps" not in head and "padding" not in head


@pytest.mark.parametrize(
    ("slope", "p_value", "part"),
    [
        ((0.95, 0.7, 1.2), 0.4, "no measurable miscalibration (slope 0.95, 0.70–1.20)"),
        ((0.6, 0.5, 0.7), 0.001, "too far, slope 0.60 (0.50–0.70)"),
        ((1.6, 1.4, 1.8), 0.001, "too little, slope 1.60"),
        ((1.0, 0.9, 1.1), 0.001, "too high on average"),
        ((np.nan, np.nan, np.nan), np.nan, "not measurable here"),
    ],
)
def test_calibration_of_ties_is_doubted_only_where_the_test_says_so(slope, p_value, part):
    row = dict(zip(["slope", "slope_low", "slope_high"], slope, strict=True))
    row |= {"model": "blend", "n": 900, "p_value": p_value, "predicted": 0.31}
    table = pd.DataFrame([row | {"observed": 0.3, "low": 0.27, "high": 0.33}])
    text = sentences.describe_ties_foreseen(table)
    assert part in text and "Of 900 votes 30.0" in text and "blend predicts 31.0" in text


def test_misses_are_the_levels_whose_interval_excludes_the_prediction():
    table = pd.DataFrame({"property": "kind", "level": ["maths", "advice"], "n": 90})
    table = table.assign(share=[0.47, 0.26], low=[0.37, 0.2], high=[0.57, 0.33], predicted=0.3)
    text = sentences.describe_misses(table)
    assert "1 of 2 levels" in text and "kind: maths" in text and "advice" not in text
    assert "On no level" in sentences.describe_misses(table[1:])
