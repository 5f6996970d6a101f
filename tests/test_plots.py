"""Figures: what is drawn, in which colour and order, and that each title is true."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from src.utils.stats import effects, extras, model_plots, plots, ranking
from tests.markup import NAMES


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


def test_the_title_claims_a_preference_for_length_only_where_there_is_one(ax):
    for n, claim in ((4, "No measurable"), (60, "The longer answer wins 75.0\u00a0%")):
        labels = np.resize([0, 0, 1, 1], n)
        words = np.resize([9, 9, 1, 1], n), np.resize([1, 1, 9, 1], n)
        words[1][3::4] = 0  # the last of each four is won by the shorter
        found = effects.win_share(labels, words[0] - words[1])
        plots.plot_length_difference(ax, *words, labels, found)
        assert ax.get_title(loc="left").startswith(claim)
    assert sum(bar.get_height() for bar in ax.patches) == 64


def test_chatbots_with_few_battles_are_not_ranked(axes):
    records = ranking.model_records(["x"] * 60 + ["rare"] * 3, ["y"] * 63, np.arange(63) % 3)
    left, right = plots.plot_model_records(axes, records, min_battles=30)
    assert [text.get_text() for text in left.get_yticklabels()] == ["y", "x"]
    won, tied, lost = (sum(bar.get_width() for bar in bars) for bars in left.containers)
    assert (won, tied, lost) == (41, 41, 41)
    assert "0 of 2" in right.get_title(loc="left").replace("\n", " ")


def test_without_a_ranked_chatbot_the_most_frequent_are_counted(axes):
    records = ranking.model_records(["x"] * 9, ["y"] * 4 + ["z"] * 5, np.zeros(9, dtype=int))
    plots.plot_model_records(axes, records, n_shown=2)
    widths = [bar.get_width() for bar in axes[0].patches]
    assert sum(widths) == 14 and not axes[1].axison


def test_only_meetings_with_enough_decided_battles_are_drawn(ax):
    names = np.array(["x"] * 40 + ["z"] * 5), np.array(["y"] * 40 + ["y"] * 5)
    meetings = ranking.head_to_head(*names, np.zeros(45, dtype=int))
    plots.plot_head_to_head(ax, meetings)
    assert sorted(text.get_text() for text in ax.texts) == ["0\n(40)", "100\n(40)"]
    assert "1 of 1" in ax.get_title(loc="left")


def test_a_cell_is_bold_only_where_its_share_is_clear(ax):
    values = np.ones(120)
    labels = np.r_[np.zeros(60), np.arange(60) % 2].astype(int)
    columns = pd.Categorical(np.repeat(["clear", "even"], 60))
    rows = pd.Categorical(["all"] * 120)
    plots.plot_length_grid(ax, effects.win_share_grid(rows, columns, labels, values))
    weights = {text.get_text(): text.get_weight() for text in ax.texts}
    assert weights == {"100\n(60)": "bold", "50\n(60)": "normal"}
    assert "1 of 2 cells, the shorter in 0" in ax.get_title(loc="left").replace("\n", " ")


def test_kinds_of_prompts_that_are_alike_are_called_so(axes):
    kinds = pd.Categorical(np.repeat(["code", "maths"], 200))
    labels = np.r_[np.full(200, 2), np.arange(200) % 2].astype(int)
    shares = extras.vote_shares(kinds, labels)
    longer = effects.win_share_by_level({"kind": kinds}, labels, np.ones(400))
    plots.plot_kinds(axes, shares[shares["outcome"] == "tie"], longer)
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in axes]
    assert titles[0] == "Kinds of prompt differ in ties"
    assert titles[1].startswith("No measurable")


def test_dots_are_hollow_where_nothing_is_measurable(ax):
    table = pd.DataFrame({"name": ["clear", "not"], "x": [1.0, 1.0], "low": [0.5, -1.0]})
    plots.draw_rows(ax, {"": ("#009E73", table.assign(high=2.0))}, "x", "name", ["clear", "not"])
    faces = [bars[0].get_markerfacecolor() for bars in ax.containers]
    assert faces == ["#009E73", "white"]


def test_smooth_curves_lie_over_their_bins_with_ratios_on_the_axis(axes, votes):
    values, labels = votes
    curves = effects.length_curves(values, labels)
    plots.plot_length_curves(axes, curves)
    for ax, name in zip(axes, ("longer", "ties"), strict=True):
        assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["1×", "1.5×"]
        bins = curves[f"{name}_bins"]["value"]
        assert len(ax.containers[0][0].get_xdata()) == len(bins) > 2
        drawn = ax.lines[0].get_xdata()
        assert bins.min() <= drawn.min() and drawn.max() <= bins.max()
    # The voters of this fixture take the sign of the value, the more the larger it is.
    assert "→" in axes[0].get_title(loc="left")
    assert "no measurable trend" in axes[1].get_title(loc="left").replace("\n", " ")


def test_bins_are_drawn_where_no_curve_can_be_fitted(axes):
    curves = effects.length_curves(np.ones(3), np.zeros(3, dtype=int))
    plots.plot_length_curves(axes, curves)
    for ax in axes:
        assert len(ax.containers[0][0].get_xdata()) == 1


def test_position_names_every_part_and_counts_what_matters(ax):
    labels = np.r_[np.zeros(90), np.ones(10), np.zeros(10), np.ones(90)].astype(int)
    shares = effects.win_share_by_level(
        {"half": np.repeat(["first", "second"], 100), "parity": np.arange(200) % 2}, labels
    )
    plots.plot_win_share_by_level(ax, shares, "position A")
    assert "1 of 2" in ax.get_title(loc="left")
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names[0] == "half" and names[3] == "parity" and len(names) == 6


def test_the_share_that_a_budget_truncates_is_shown_for_each_tokenizer(ax):
    plots.plot_token_distribution(
        ax, {"x": np.array([100, 600, 2000, 5000]), "y": np.array([1, 2, 3, 4])}
    )
    first, second = (text.get_text() for text in ax.get_legend().get_texts())
    assert "over 512: 75.0\u00a0%" in first and "over 512: 0.0\u00a0%" in second
    assert "50.0\u00a0% of these battles (x)" in ax.get_title(loc="left")


def test_budgets_longer_than_any_battle_are_left_out(ax):
    plots.plot_token_distribution(ax, {"x": np.array([10, 20, 40])})
    assert "over" not in ax.get_legend().get_texts()[0].get_text()
    assert ax.get_title(loc="left").startswith("No battle is longer than 1,024")


def test_effects_are_sorted_and_counted(ax, votes):
    values, labels = votes
    table = effects.effect_sizes(
        np.column_stack([-values, values, np.zeros(400)]), ["less", "more", "none"], labels
    )
    plots.plot_effects(ax, {"alone": table, "again": table})
    assert [text.get_text() for text in ax.get_yticklabels()] == ["less", "more"]
    assert ax.get_title(loc="left").startswith("2 of 2")


def test_punctuation_is_shown_by_count_and_per_character(ax):
    rows = [("commas", "by count", 0.6), ("commas", "per character", 0.4), ("!", "by count", 0.5)]
    shares = pd.DataFrame(rows, columns=["caption", "measure", "share"])
    plots.plot_punctuation_winner(ax, shares.assign(low=0.3, high=0.7))
    title = ax.get_title(loc="left").replace("\n", " ")
    assert title.startswith("No measurable") and "40.0\u00a0% (30.0–70.0) per character" in title
    plots.plot_punctuation_winner(ax, shares.assign(low=0.55, high=0.7))
    assert ax.get_title(loc="left").startswith("More commas win 60.0")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["!", "commas"]


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
    title = ax.get_title(loc="left").replace("\n", " ")
    assert title.startswith("1 of 2") and "not that of y " in title


def test_the_reason_is_shown_where_there_is_nothing_to_draw(ax, axes):
    nobody = ranking.model_records(["unknown"], ["unknown"], np.array([0]))
    nothing = ranking.fit_bradley_terry(["unknown"], ["unknown"], np.array([0])).strengths
    found = effects.effect_sizes(np.ones((1, 1)), ["x"], np.array([0]))
    plots.plot_model_records(np.array([ax, ax]), nobody)
    plots.plot_strengths(ax, {"as voted": nothing, "at equal style": nothing})
    plots.plot_effects(ax, {"alone": found, "held": found})
    plots.plot_length_difference(ax, np.ones(1), np.ones(1), np.array([2]), {})
    ties = effects.win_share_by_level({"turns": ["one"]}, np.array([2]))
    plots.plot_win_share_by_level(ax, ties, "position A")
    assert len(ax.texts) == 6 and not ax.axison
    plots.plot_length_curves(axes, effects.length_curves(np.ones(0), np.ones(0, dtype=int)))
    assert not axes[0].axison and not axes[1].axison


def test_a_share_is_written_in_percent():
    assert plots.percent(0.6131) == "61.3\u00a0%" and plots.percent(float("nan")) == "–"


def test_battles_beyond_a_single_budget_are_counted_and_drawn(ax):
    plots.plot_token_distribution(ax, {"x": np.array([10, 20, 2000, 40])}, [100])
    assert "25.0\u00a0%" in ax.get_title(loc="left")
    assert "over 100: 25.0\u00a0%" in ax.get_legend().get_texts()[0].get_text()


def test_drift_has_a_line_per_vote_and_names_what_moved(ax):
    labels = np.repeat([0, 2, 1], 300)
    times = pd.Series(pd.date_range("2025-01-01", periods=900, freq="h", tz="UTC"))
    plots.plot_drift(ax, extras.measure_drift(times, labels, both_bad=labels == 2))
    title = ax.get_title(loc="left")
    assert "A wins 100.0\u00a0% (" in title and "→ 0.0\u00a0% (" in title
    lines = [bars[0] for bars in ax.containers]
    assert len(lines) == 4 and all(len(line.get_xdata()) == 6 for line in lines)
    colors = [matplotlib.colors.to_hex(line.get_color()).upper() for line in lines]
    assert colors[:3] == list(plots.LABEL_COLORS)


def test_a_steady_vote_has_no_measurable_drift(ax):
    times = pd.Series(pd.date_range("2025-01-01", periods=900, freq="h", tz="UTC"))
    labels = np.random.default_rng(2).integers(3, size=900)
    drift = extras.measure_drift(times, labels)
    assert 0.02 < drift["p_value"].min() < 0.3  # chance, not nothing
    plots.plot_drift(ax, drift)
    assert ax.get_title(loc="left").startswith("No measurable drift")


def test_the_curve_of_data_claims_a_gain_only_where_its_interval_says_so(ax):
    curve = pd.DataFrame({"battles": [100, 200, 400], "log_loss": 1.0, "low": 0.9, "high": 1.1})
    trend = pd.DataFrame({"battles": [100.0, 9000.0], "log_loss": 1.0, "low": 0.9, "high": 1.1})
    trend = trend.assign(gain=0.05, gain_high=0.1)
    for low, claim in ((0.01, "9,000 battles would bring 0.050 (0.010–0.100)"), (-0.01, "No meas")):
        plots.plot_data_curve(ax, curve, trend.assign(gain_low=low), {"class prior": 1.1})
        assert ax.get_title(loc="left").startswith(claim)
    plots.plot_data_curve(ax, curve, trend[:0], {"class prior": 1.1})
    assert ax.get_title(loc="left").startswith("Too few")


def test_a_number_is_written_with_its_interval():
    assert plots.with_interval(0.618, 0.579, 0.657, "{:.1%}") == "61.8\u00a0% (57.9–65.7)"
    assert plots.with_interval(-0.01, -0.02, 0.0, "{:.2f}") == "−0.01 (−0.02 to 0.00)"
    assert plots.with_interval(np.nan, np.nan, np.nan) == "–"


def test_a_published_figure_is_written_and_closed(tmp_path, capsys):
    fig, _ = plots.make_figure()
    plots.publish(fig, tmp_path / "a.png", "simulated arena", 5, "What is seen.")
    assert (tmp_path / "a.png").stat().st_size > 1000 and not plt.fignum_exists(fig.number)


def draw_names(axes):
    """Every figure that shows a name from outside the suite, and all others with one, too."""
    interval = {"low": 0.3, "high": 0.7}
    rng = np.random.default_rng(0)
    n = len(NAMES)
    first, second = rng.integers(n, size=400), rng.integers(n, size=400)
    labels = rng.integers(3, size=400)
    models = np.array(NAMES)[first], np.array(NAMES)[second]
    records = ranking.model_records(*models, labels)
    fitted = ranking.fit_bradley_terry(*models, labels).strengths
    table = pd.DataFrame({"effect": NAMES, "log_odds": 0.5, **interval})
    shares = pd.DataFrame({"level": NAMES, "property": "x", "n": 9, "share": 0.5, **interval})
    leanings = pd.DataFrame({"leaning": NAMES, "share": 0.5, "n": 9, **interval})
    people = [leanings.assign(voter=voter) for voter in ("people", "model")]
    marks = pd.DataFrame({"caption": NAMES, "measure": "by count", "share": 0.5, **interval})
    rates = table.rename(columns={"log_odds": "log_odds_per_unit"})
    meetings = ranking.head_to_head(*models, labels)
    words = table.rename(columns={"effect": "word"}).assign(p_value=0.1, p_holm=1.0, weight=0.1)
    plots.plot_model_records(axes[:2], records)
    axes[1].set_yticks(range(len(NAMES)), NAMES)  # those of the axes beside it
    plots.plot_strengths(axes[2], {"as voted": fitted, "at equal style": fitted})
    plots.plot_effects(axes[3], {"alone": table, "held": table})
    plots.plot_win_share_by_level(axes[4], shares.assign(p_value=0.5), "position A")
    model_plots.plot_preferences(axes[5], pd.concat(people))
    plots.plot_punctuation_winner(axes[6], marks)
    plots.plot_planted(axes[7], pd.Series(0.5, index=NAMES), rates)
    gaps = {"difference": 0.1, "difference_low": 0.05, "difference_high": 0.2}
    rungs = pd.DataFrame({"model": NAMES, "log_loss": 1.0, **gaps})
    model_plots.plot_ladder(axes[8], rungs, "the class prior")
    plots.plot_word_effects(axes[9], words)
    plots.plot_head_to_head(axes[10], meetings)
    plots.plot_token_distribution(axes[11], dict.fromkeys(NAMES[:4], np.array([9, 99])))


def test_every_figure_shows_names_literally(tmp_path):
    fig, axes = plt.subplots(12, 1, figsize=(6, 40))
    draw_names(axes)
    fig.canvas.draw()
    for place, ax in enumerate(axes):
        texts = [text.get_text() for text in ax.findobj(matplotlib.text.Text)]
        for name in NAMES[:4]:
            assert any(name in text for text in texts), (place, name)
    # As text in the file, neither as the outlines of a formula nor as HTML.
    with plt.rc_context({"svg.fonttype": "none"}):
        fig.savefig(tmp_path / "figure.svg")
    plt.close(fig)
    page = (tmp_path / "figure.svg").read_text()
    for name in NAMES:
        shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert page.count(f">{shown}<") >= 6 and "<img" not in page


def test_a_figure_says_in_a_corner_what_was_measured():
    fig, ax = plots.make_figure()
    plots.note_source(fig, "simulated arena", 12_000)
    ax.plot([0, 1], [0, 1])
    fig.canvas.draw()
    assert [text.get_text() for text in fig.texts] == ["simulated arena · 12,000 battles"]
    plt.close(fig)
