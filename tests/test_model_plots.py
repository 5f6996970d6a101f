"""Figures of models: what is drawn, in which colour and order, and that each title is true."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from src.utils.schema import LABEL_NAMES
from src.utils.stats import model_plots, plots, scores
from tests.votes import blur, make_votes


def ladder(*gaps):
    table = pd.DataFrame(gaps, columns=["model", "difference", "difference_low", "difference_high"])
    return table.assign(log_loss=1 + table["difference"])


def test_the_ladder_is_sorted_and_its_title_is_about_what_is_published(ax):
    table = ladder(("prior", 0.2, 0.19, 0.21), ("blend", 0.02, 0.01, 0.03), ("net", 0.1, 0, 0.2))
    model_plots.plot_ladder(ax, table, "the best reachable", "net")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["prior", "net", "blend"]
    assert "net: no measurable difference to the best reachable" in words(ax)
    colors = [bars[0].get_color() for bars in ax.containers]
    assert [color == plots.ACCENT for color in colors] == [False, True, False]


def words(ax):
    return " ".join(ax.get_title(loc="left").split())


def test_ours_stands_among_published_scores_on_real_battles_only(ax):
    published = pd.DataFrame(
        {"name": ["a", "b"], "log_loss": [1.05, 0.98], "kind": "cross-validated"}
    )
    ours = {"name": "ours", "log_loss": 1.01, "low": 1.0, "high": 1.02, "kind": "here"}
    model_plots.plot_published(ax, published, ours)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "ours", "b"]
    assert "Below the interval: 1 published scores; above: 1" in words(ax)
    ax.clear()
    model_plots.plot_published(ax, published, None)
    assert "simulated" in words(ax) and len(ax.get_yticklabels()) == 2


def test_reliability_is_drawn_in_the_fixed_colours(ax):
    curve = pd.DataFrame(
        {"label": [0, 1, 2], "predicted": 0.3, "observed": 0.4, "low": 0.3, "high": 0.5}
    )
    model_plots.plot_reliability(ax, curve, ece=0.1)
    assert [
        matplotlib.colors.to_hex(bars[0].get_color()).upper() for bars in ax.containers
    ] == list(plots.LABEL_COLORS)
    assert "10.0 points" in ax.get_title(loc="left")


def test_ties_are_drawn_before_and_after_and_the_title_is_about_after(ax):
    truth, labels = make_votes(600)
    models = {"sharp": blur(truth, 0, power=3.0), "blend": truth}
    curves = {
        name: scores.reliability_curve(probs, labels, np.arange(600))
        for name, probs in models.items()
    }
    calibration = scores.calibrate_ties(models, labels, np.arange(600))
    model_plots.plot_tie_calibration(ax, curves, calibration)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(models)
    after = curves["blend"][curves["blend"]["label"] == 2]
    assert ax.containers[1][0].get_xdata().tolist() == after["predicted"].tolist()
    assert words(ax).startswith("P(tie) of blend: no measurable miscalibration")


def test_battles_without_a_tie_are_drawn_too(ax):
    probs, labels = np.tile([0.5, 0.4, 0.1], (90, 1)), np.arange(90) % 2
    curve = scores.reliability_curve(probs, labels, np.arange(90))
    calibration = scores.calibrate_ties({"blend": probs}, labels, np.arange(90))
    model_plots.plot_tie_calibration(ax, {"alone": curve, "blend": curve}, calibration)
    assert "not measurable here" in words(ax) and ax.get_xlim() == pytest.approx((0.07, 0.13))


def test_preferences_name_and_colour_where_the_model_is_unlike_people(ax):
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
    assert words(ax).endswith("on: refusal")
    *_, unlike = ax.containers
    assert unlike[0].get_xdata().tolist() == [0.5]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["refusal (n = 4)", "longer (n = 9)"]
    ax.clear()
    model_plots.plot_preferences(ax, shares[:2])
    assert "all 1 leanings" in words(ax)


def test_slices_are_sorted_by_loss_and_the_title_names_the_worse(ax):
    table = pd.DataFrame({"slice": ["a", "b"], "n_pairs": 40, "log_loss": [1.1, 0.9]})
    table = table.assign(length=1.0, prior=1.1, verdict=["worse", "better"])
    model_plots.plot_slices(ax, table, ["length", "prior"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b (n = 40)", "a (n = 40)"]
    assert "better than length on 1 of 2 slices, worse on: a" in words(ax)


def history(**columns):
    table = pd.DataFrame({"fold": [0, 0, 1], "seed": 0, "epoch": [0.5, 1, 1], "train_loss": 1.0})
    table = table.assign(log_loss=[np.nan, 1.0, 1.02], tokens_per_second=9.0, learning_rate=0.1)
    return table.assign(**columns)


def test_training_is_drawn_over_minutes_with_validations_where_there_are_some():
    fig, axes = plt.subplots(2, 2)
    new = {"minutes": [1, 2, 3], "train_accuracy": 0.5, "accuracy": [np.nan, 0.4, 0.5]}
    model_plots.plot_training(axes, history(**new, memory_mib=900.0), prior=1.1)
    assert axes[0, 0].lines[0].get_xdata().tolist() == [2]  # held out, of the first model
    assert {line.get_label() for line in axes[0, 0].lines} >= {
        "training",
        "held out",
        "class prior",
    }
    assert axes[0, 1].get_xlabel().startswith("minutes")
    assert "no GPU" in axes[1, 1].get_title(loc="left")
    fig.canvas.draw()
    plt.close(fig)


def test_a_history_of_an_older_version_is_drawn_over_epochs_and_memory_names_the_gpu(ax):
    fig, axes = plt.subplots(2, 2)
    model_plots.plot_training(axes, history(), prior=1.1)
    assert axes[0, 0].get_xlabel() == "epochs"
    plt.close(fig)
    model_plots.plot_memory(ax, history(memory_mib=900.0, reserved_mib=1000.0))
    assert words(ax) == "Memory of the GPU" and len(ax.get_legend().get_texts()) == 2


def test_penalties_of_heads_are_plain_numbers_and_the_best_is_named(ax):
    rows = {"head": "logistic", "penalty": [100.0, 1e3, 1e4], "log_loss": [1.0, 0.9, 1.05]}
    model_plots.plot_heads(ax, pd.DataFrame({**rows, "train_loss": 0.8}), prior=1.1)
    ax.figure.canvas.draw()
    named = {text.get_text() for text in ax.get_xticklabels()}
    assert {"100", "1,000", "10,000"} <= named and "0.900 nats" in words(ax)


def test_probabilities_above_ninety_percent_are_counted(ax):
    model_plots.plot_probabilities(ax, np.array([[0.95, 0.03, 0.02], [0.4, 0.3, 0.3]]))
    assert "50.0\u00a0%" in ax.get_title(loc="left")


def test_a_certain_outcome_lies_in_its_corner_in_its_colour(ax):
    model_plots.plot_probabilities(ax, np.eye(3), labels=np.array([0, 1, 2]))
    corners = {text.get_text(): text.get_position() for text in ax.texts}
    for dots, name, color in zip(ax.collections, LABEL_NAMES, plots.LABEL_COLORS, strict=True):
        (place,) = dots.get_offsets()
        assert np.allclose(place, corners[name], atol=0.04)
        assert matplotlib.colors.to_hex(dots.get_facecolor()[0]).upper() == color
