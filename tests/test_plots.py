import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from src.utils.battles.style import density_differences, measure_style, style_differences
from src.utils.stats import effects, plots, ranking


@pytest.fixture
def ax():
    fig, axes = plt.subplots()
    yield axes
    fig.canvas.draw()  # what cannot be drawn fails here
    plt.close(fig)


@pytest.fixture
def votes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    return values, np.where(rng.random(400) < 0.2, 2, values + rng.normal(size=400) < 0).astype(int)


def test_shares_are_drawn_as_given_in_the_fixed_colours(ax):
    plots.plot_winner_shares(ax, effects.winner_shares(np.repeat([0, 1, 2], [50, 30, 20])))
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5, 0.3, 0.2])
    assert [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == list(
        plots.LABEL_COLORS
    )
    assert "A wins 50.0\u00a0%" in ax.get_title(loc="left")


def test_the_title_claims_what_the_lengths_show(ax):
    labels = np.array([0, 0, 1, 1, 2])
    plots.plot_length_difference(ax, np.array([9, 9, 1, 9, 9]), np.array([1, 1, 9, 1, 1]), labels)
    assert "75.0\u00a0%" in ax.get_title(loc="left")
    assert sum(bar.get_height() for bar in ax.patches) == 4


def test_chatbots_with_few_battles_are_not_ranked(ax):
    records = ranking.model_records(["x"] * 60 + ["rare"] * 3, ["y"] * 63, np.arange(63) % 3)
    plots.plot_win_rates(ax, records, min_battles=30)
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert len(names) == 2 and not any("rare" in name for name in names)


def test_usage_shows_the_busiest(ax):
    plots.plot_models_usage(
        ax,
        ranking.model_records(["x"] * 9, ["y"] * 4 + ["z"] * 5, np.zeros(9, dtype=int)),
        n_shown=2,
    )
    assert [bar.get_width() for bar in ax.patches] == [5, 9]


def test_a_smooth_curve_lies_over_its_bins_with_ratios_on_the_axis(ax, votes):
    values, labels = votes
    curve, _ = effects.length_curves(values, labels, n_boot=20)
    plots.plot_smooth_curve(
        ax, curve, effects.larger_wins_by(np.abs(values), values, labels, 4), null=0.5
    )
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["1×", "1.5×"]


def test_bins_are_drawn_where_no_curve_can_be_fitted(ax):
    nothing = effects.smooth_rate(np.arange(3.0), np.ones(3))
    bins = effects.larger_wins_by(np.ones(3), np.ones(3), np.zeros(3, dtype=int))
    plots.plot_smooth_curve(ax, nothing, bins)
    assert len(ax.containers[0][0].get_xdata()) == 1
    plots.plot_smooth_curve(ax, nothing, bins[:0])
    assert not ax.axison


def test_position_names_every_part_and_counts_what_matters(ax):
    labels = np.r_[np.zeros(90), np.ones(10), np.zeros(10), np.ones(90)].astype(int)
    shares = effects.position_by(
        {"half": np.repeat(["first", "second"], 100), "parity": np.arange(200) % 2}, labels
    )
    plots.plot_position_by(ax, shares)
    assert ax.get_title(loc="left") == "Position A's share depends on 1 of 2 properties"
    assert len(ax.get_yticklabels()) == 4


def test_what_a_budget_truncates_is_told_for_each_tokenizer(ax):
    plots.plot_token_distribution(
        ax, {"x": np.array([100, 600, 2000, 5000]), "y": np.array([1, 2, 3, 4])}
    )
    assert ax.texts[0].get_text().split("\n") == [" 75.0\u00a0%", "0.0\u00a0%"]
    assert "50.0\u00a0% of battles (x)" in ax.get_title(loc="left")


def test_length_by_prompt_names_every_bin(ax, votes):
    values, labels = votes
    bins = effects.larger_wins_by(np.arange(400.0), values, labels, n_bins=4)
    plots.plot_prompt_and_length_difference(ax, bins)
    assert len(ax.get_xticklabels()) == 4


def test_effects_are_sorted_and_counted(ax, votes):
    values, labels = votes
    table = effects.effect_sizes(
        np.column_stack([-values, values, np.zeros(400)]), ["less", "more", "none"], labels
    )
    plots.plot_effects(ax, {"alone": table, "again": table})
    assert [text.get_text() for text in ax.get_yticklabels()] == ["less", "more"]
    assert ax.get_title(loc="left").startswith("2 of 2")


def test_punctuation_is_shown_by_count_and_per_character(ax, demo_pairs):
    styles, labels = measure_style(demo_pairs), demo_pairs["label"].to_numpy()
    differences, names = style_differences(styles)
    marks = ["n_punctuation", "n_commas", "n_question_marks"]
    count = effects.larger_wins_table(
        differences[:, [names.index(name) for name in marks]], marks, labels
    )
    density = effects.larger_wins_table(density_differences(styles, marks), marks, labels)
    table = pd.concat([count.assign(measure="count"), density.assign(measure="per character")])
    plots.plot_punctuation_winner(ax, table.assign(caption=table["effect"]))
    assert "by count" in ax.get_title(loc="left") and "per character" in ax.get_title(loc="left")


def test_strengths_of_both_fits_share_their_rows(ax, demo_pairs):
    positions, labels = (
        (demo_pairs["model_a"], demo_pairs["model_b"]),
        demo_pairs["label"].to_numpy(),
    )
    fitted = ranking.fit_bradley_terry(*positions, labels)
    plots.plot_strengths(ax, {"as voted": fitted.strengths, "at equal style": fitted.strengths})
    assert len(ax.get_yticklabels()) == fitted.strengths["strength"].notna().sum()


def test_an_interval_around_a_negative_effect_covers_it(ax):
    estimated = pd.DataFrame(
        {"effect": ["x", "y"], "log_odds_per_unit": [-1.1, 2.0], "low": [-1.4, 1.5]}
    )
    estimated["high"] = [-0.9, 2.5]
    plots.plot_planted(ax, pd.Series({"x": -1.0, "y": 1.0}), estimated)
    assert ax.get_title(loc="left").startswith("1 of 2")


def test_nothing_to_show_is_said(ax):
    nobody = ranking.model_records(["unknown"], ["unknown"], np.array([0]))
    nothing = ranking.fit_bradley_terry(["unknown"], ["unknown"], np.array([0])).strengths
    found = effects.effect_sizes(np.ones((1, 1)), ["x"], np.array([0]))
    plots.plot_models_usage(ax, nobody)
    plots.plot_win_rates(ax, nobody)
    plots.plot_strengths(ax, {"as voted": nothing, "at equal style": nothing})
    plots.plot_effects(ax, {"alone": found, "held": found})
    plots.plot_length_difference(ax, np.ones(1), np.ones(1), np.array([2]))
    plots.plot_prompt_and_length_difference(
        ax, effects.larger_wins_by(np.ones(1), np.ones(1), np.array([2]))
    )
    assert len(ax.texts) == 6 and not ax.axison


def test_a_share_is_written_in_percent():
    assert plots.percent(0.6131) == "61.3\u00a0%" and plots.percent(float("nan")) == "–"


def test_the_ladder_says_what_its_last_rung_gains(ax):
    plots.plot_ladder(ax, ["prior", "floor"], [1.1, 1.05], [1.09, 1.03], [1.11, 1.07], best=1.0)
    assert ax.get_title(loc="left") == "floor takes 0.050 nats off prior"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["prior", "floor"]
    assert ax.get_yticks()[0] > ax.get_yticks()[1]  # the first rung is at the top


def test_reliability_is_drawn_in_the_fixed_colours(ax):
    curve = pd.DataFrame(
        {"label": [0, 1, 2], "predicted": 0.3, "observed": 0.4, "low": 0.3, "high": 0.5}
    )
    plots.plot_reliability(ax, curve, ece=0.1)
    assert [
        matplotlib.colors.to_hex(bars[0].get_color()).upper() for bars in ax.containers
    ] == list(plots.LABEL_COLORS)
    assert "10.0\u00a0%" in ax.get_title(loc="left")


def test_the_strongest_coefficient_is_named_and_at_the_top(ax):
    effects = pd.DataFrame({"caption": ["refusal", "words", "lists"], "effect": [-0.5, 0.2, 0.1]})
    plots.plot_coefficients(ax, effects, n_shown=2)
    assert [bar.get_width() for bar in ax.patches] == [0.2, -0.5]
    assert "refusal (-0.50)" in ax.get_title(loc="left")


def test_preferences_count_where_the_model_is_like_people(ax):
    shares = pd.DataFrame(
        [
            ("longer", "people", 0.6, 0.5, 0.7, 9),
            ("longer", "model", 0.65, 0.6, 0.7, 9),
            ("refusal", "people", 0.1, 0.05, 0.2, 4),
            ("refusal", "model", 0.5, 0.4, 0.6, 4),
            ("nothing", "people", np.nan, np.nan, np.nan, 0),
            ("nothing", "model", np.nan, np.nan, np.nan, 0),
        ],
        columns=["leaning", "voter", "share", "low", "high", "n"],
    )
    plots.plot_preferences(ax, shares)
    assert ax.get_title(loc="left").startswith("On 1 of 2 leanings")
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "refusal (n = 4)",
        "longer (n = 9)",
    ]


def test_an_ablation_is_drawn_dearest_first_and_counts_what_is_sure(ax):
    worth = pd.DataFrame(
        [("text", "A against B", 0.02, 0.01, 0.03), ("gaps", "tie", 0.01, -0.01, 0.03)],
        columns=["family", "of", "difference", "low", "high"],
    )
    plots.plot_ablation(ax, worth)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["text", "gaps"]
    assert list(ax.get_yticks()) == [1, 0]
    assert "1 of 2" in ax.get_title(loc="left")


def test_a_budget_names_what_it_cuts_and_the_title_what_the_smallest_costs(ax):
    cost, low, high = (
        [0.012, 0.003, 0.0, np.nan],
        [0.008, -0.001, 0.0, np.nan],
        [0.016, 0.007, 0.0, np.nan],
    )
    budgets = pd.DataFrame({"budget": [256, 512, 1024, 4096], "cut_share": [0.6, 0.4, 0.1, 0.0]})
    plots.plot_budgets(ax, budgets.assign(cost=cost, low=low, high=high))
    assert ax.get_title(loc="left") == "256 tokens instead of 1,024 cost +0.0120 nats per battle"
    assert ax.get_xticklabels()[0].get_text() == "256\n60.0\u00a0%"
