"""Figures of models: what is drawn, in which colour and order, and that each title is true."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from src.utils.stats import model_plots, plots


@pytest.mark.parametrize(("last", "side"), [(1.05, "below"), (1.15, "above")])
def test_the_ladder_compares_the_last_model_with_the_first(ax, last, side):
    bounds = [1.09, last - 0.02], [1.11, last + 0.02]
    model_plots.plot_ladder(ax, ["prior", "blend"], [1.1, last], *bounds, oracle=1.0)
    assert {"blend", "0.050", side, "prior"} <= set(ax.get_title(loc="left").split())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["prior", "blend"]
    assert ax.get_yticks()[0] > ax.get_yticks()[1]  # the first model is at the top
    assert "1.0000" in ax.get_legend().get_texts()[0].get_text()


def test_reliability_is_drawn_in_the_fixed_colours(ax):
    curve = pd.DataFrame(
        {"label": [0, 1, 2], "predicted": 0.3, "observed": 0.4, "low": 0.3, "high": 0.5}
    )
    model_plots.plot_reliability(ax, curve, ece=0.1)
    assert [
        matplotlib.colors.to_hex(bars[0].get_color()).upper() for bars in ax.containers
    ] == list(plots.LABEL_COLORS)
    assert "10.0\u00a0%" in ax.get_title(loc="left")


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
    model_plots.plot_preferences(ax, shares)
    assert ax.get_title(loc="left").startswith("On 1 of 2 leanings")
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "refusal (n = 4)",
        "longer (n = 9)",
    ]


def test_a_budget_names_what_it_cuts_and_the_title_what_the_smallest_costs(ax):
    cost, low, high = (
        [0.012, 0.003, 0.0, np.nan],
        [0.008, -0.001, 0.0, np.nan],
        [0.016, 0.007, 0.0, np.nan],
    )
    budgets = pd.DataFrame({"budget": [256, 512, 1024, 4096], "cut_share": [0.6, 0.4, 0.1, 0.0]})
    model_plots.plot_budgets(ax, budgets.assign(cost=cost, low=low, high=high))
    assert {"256", "1,024", "+0.0120"} <= set(ax.get_title(loc="left").split())
    assert ax.get_xticklabels()[0].get_text() == "256\n60.0\u00a0%"


def test_the_learning_curve_names_the_gain_over_the_class_prior(ax):
    history = pd.DataFrame({"fold": [0, 0, 1], "seed": 0, "epoch": [0.5, 1, 1]})
    history = history.assign(train_loss=1.0, log_loss=[1.05, 1.0, 1.02])
    model_plots.plot_learning_curve(ax, history, prior=1.1, oracle=0.9)
    assert "0.090" in ax.get_title(loc="left") and len(ax.get_legend().get_texts()) == 4


def test_probabilities_above_ninety_percent_are_counted(ax):
    model_plots.plot_probabilities(ax, np.array([[0.95, 0.03, 0.02], [0.4, 0.3, 0.3]]))
    assert "50.0\u00a0%" in ax.get_title(loc="left")
