"""Draw the figures of models: scores, calibration, what they learned; `plot_x(ax, data) -> ax`.

Style, colours and helpers are those of `stats.plots`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.utils.schema import LABEL_NAMES, TIE
from src.utils.stats.plots import (
    ACCENT,
    BLACK,
    LABEL_COLORS,
    MUTED,
    draw_intervals,
    draw_rows,
    label_axes,
    make_figure,
    percent,
    place_legend,
)
from src.utils.stats.sentences import describe_gap, describe_slope

_OTHER, _ALARM = "#777777", "#CC79A7"
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25), "ncol": 3}
_BELOW["frameon"] = False
_HISTORY = ("fold", "seed", "minutes", "epoch")


def plot_probabilities(ax: Axes, probs: np.ndarray, labels: np.ndarray | None = None) -> Axes:
    """Show predicted probabilities as points of a triangle, whose corners are certain outcomes.

    Args:
        probs: (N, C) float, rows sum to 1.
        labels: (N,) int, the votes, which colour the points where they are known.
    """
    height = np.sqrt(3) / 2
    corners = np.array([[0, 0], [1, 0], [0.5, height]])
    middle, edges = corners.mean(axis=0), (corners + np.roll(corners, -1, axis=0)) / 2
    ax.plot(*np.vstack([corners, corners[:1]]).T, **BLACK)
    for edge in edges:  # beyond these lines another outcome is the likeliest
        ax.plot(*np.vstack([middle, edge]).T, color=MUTED, linewidth=1)
    look: dict[str, Any] = {"s": 14, "alpha": 0.6, "linewidths": 0, "zorder": 3}
    points = probs @ corners
    if labels is None:
        ax.scatter(*points.T, color=ACCENT, **look)
    for label, name in enumerate(LABEL_NAMES if labels is not None else ()):
        chosen = points[labels == label]
        ax.scatter(*chosen.T, color=LABEL_COLORS[label], label=f"vote: {name}", **look)
    if labels is not None:
        ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), markerscale=2)
    places = ((-0.03, 0, "right"), (1.03, 0, "left"), (0.5, height + 0.03, "center"))
    for (x, y, side), name, color in zip(places, LABEL_NAMES, LABEL_COLORS, strict=True):
        ax.text(x, y, name, color=color, ha=side, va="bottom", fontweight="bold")
    ax.set_aspect("equal")
    ax.set_axis_off()
    likeliest, sure = probs.argmax(axis=1), probs.max(axis=1) > 0.9
    shares = [float(rows.mean()) if len(rows) else np.nan for rows in (likeliest == TIE, sure)]
    title = f"A tie is the likeliest in {percent(shares[0])} of battles; "
    title += f"{percent(shares[1])} get a probability above 0.9"
    return label_axes(ax, title, "", "")


def plot_ladder(ax: Axes, table: pd.DataFrame, reference: str, published: str = "") -> Axes:
    """Compare models by their paired differences to a reference, the best at the top.

    Args:
        table: of `scores.compare_models`.
        reference: whom the differences are to, for the title: "the class prior".
        published: the model that is coloured and named in the title; empty: the best one.
    """
    rows = table.sort_values("log_loss", ascending=False).reset_index(drop=True)
    rows = rows.assign(low=rows["difference_low"], high=rows["difference_high"], mark="o")
    published = published or rows["model"].iloc[-1]
    colors = np.where(rows["model"] == published, ACCENT, _OTHER)
    _draw_losses(ax, rows.assign(name=rows["model"], color=colors), "difference")
    ax.text(1.02, len(rows) - 0.4, "log loss", transform=ax.get_yaxis_transform(), fontsize=9)
    ax.axvline(0, **BLACK)
    gap = rows[rows["model"] == published].iloc[0]
    title = f"{published}: {describe_gap(gap['difference'], gap['low'], gap['high'], reference)}"
    x = f"log loss minus that of {reference}, nats per battle (paired 95 % interval)"
    return label_axes(ax, title, x, "")


def _draw_losses(ax: Axes, rows: pd.DataFrame, value: str) -> None:
    """Draw a row per name, from the bottom: `value` in its mark and colour; log_loss beside it."""
    for place, row in enumerate(rows.to_dict("records")):
        look = {"color": row["color"], "fmt": row["mark"], "markersize": 8}
        draw_intervals(ax, rows[place : place + 1], value, [place], **look)
        look = {"color": row["color"], "weight": "bold" if row["color"] == ACCENT else "normal"}
        look |= {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1.02, place, f"{row['log_loss']:.3f}", **look)
    ax.set_yticks(range(len(rows)), rows["name"])
    ax.set_ylim(-0.6, len(rows) - 0.4)


def plot_published(ax: Axes, published: pd.DataFrame, ours: Mapping[str, float] | None) -> Axes:
    """Draw published scores of this competition as a strip, and ours among them.

    Args:
        published: name, log_loss, kind; of `scores.read_published`.
        ours: name, log_loss, low, high on real battles; None: simulated ones, not comparable.
    """
    rows = published.assign(low=np.nan, high=np.nan, color=_OTHER)
    title = "What others reached on real battles (this run's are simulated: not comparable)"
    if ours is not None:
        rows = pd.concat([rows, pd.DataFrame([{**ours, "color": ACCENT}])], ignore_index=True)
        models = published[~published["name"].str.startswith("class prior")]
        n_worse = int((models["log_loss"] > ours["high"]).sum())
        n_better = int((models["log_loss"] < ours["low"]).sum())
        interval = f"{ours['log_loss']:.3f} ({ours['low']:.3f} to {ours['high']:.3f})"
        title = (
            f"Ours: {interval}. Below the interval: {n_better} published scores; above: {n_worse}"
        )
    rows = rows.sort_values("log_loss", ascending=False).reset_index(drop=True)
    marks = np.where(rows["kind"].str.contains("leaderboard"), "s", "o")
    _draw_losses(ax, rows.assign(mark=marks), "log_loss")
    x = "log loss, nats per battle (circle: cross-validated, square: a leaderboard)"
    return label_axes(ax, title, x, "")


def plot_reliability(ax: Axes, curve: pd.DataFrame, ece: float) -> Axes:
    """Compare observed with predicted shares, from `scores.reliability_curve`; `ece` is 0..1."""
    shown = sorted(set(curve["label"]))
    bins = {LABEL_NAMES[label]: curve[curve["label"] == label] for label in shown}
    _draw_reliability(ax, bins, [LABEL_COLORS[label] for label in shown])
    title = f"Confidence and accuracy differ by {100 * ece:.1f} points"
    y = "observed share (95 % interval)"
    return label_axes(ax, title, "predicted probability", y, percent_on="xy")


def plot_tie_calibration(
    ax: Axes, curves: Mapping[str, pd.DataFrame], calibration: pd.DataFrame
) -> Axes:
    """Compare observed with predicted ties before and after, e.g. of a member and of the blend.

    Args:
        curves: model -> its `scores.reliability_curve`; the last is the one that counts.
        calibration: of the same models, from `scores.calibrate_ties`.
    """
    bins = {name: curve[curve["label"] == TIE] for name, curve in curves.items()}
    _draw_reliability(ax, bins, (_OTHER, ACCENT))
    last = calibration.iloc[-1]
    title = f"P(tie) of {last['model']}: {describe_slope(last)}"
    y = "ties observed (95 % interval)"
    return label_axes(ax, title, "P(tie) predicted, bins of equal size", y, percent_on="xy")


def _draw_reliability(ax: Axes, bins: Mapping[str, pd.DataFrame], colors: Sequence[str]) -> None:
    """Draw reliability curves by name, and the diagonal, over the part where they are."""
    predicted = pd.concat(bins.values())["predicted"]
    ax.axline((predicted.mean(),) * 2, slope=1, **BLACK)
    for (name, rows), color in zip(bins.items(), colors, strict=True):
        look = {"fmt": "o-", "color": color, "label": name}
        draw_intervals(ax, rows, "observed", rows["predicted"], vertical=True, **look)
    ax.set_xlim(max(predicted.min() - 0.03, -0.01), min(predicted.max() + 0.03, 1.01))
    ax.legend()


def plot_preferences(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Compare the leanings of a model with those of people, from `scores.compare_leanings`."""
    shares = shares.dropna(subset=["share"])
    names = [f"{row.leaning} (n = {row.n:,})" for row in shares.itertuples()]
    shares = shares.assign(name=names)
    people, model = (shares[shares["voter"] == voter] for voter in ("people", "model"))
    order = model["name"].tolist()[::-1]
    is_inside = model["share"].between(people["low"].to_numpy(), people["high"].to_numpy())
    series = {"people": ("black", people), "model, as people": (ACCENT, model[is_inside])}
    series["model, unlike people"] = (_ALARM, model[~is_inside])
    draw_rows(ax, series, "share", "name", order, null=0.5)
    outside = ", ".join(model["leaning"][~is_inside])
    title = f"The model is outside people's interval on: {outside}"
    if not outside:
        title = f"On all {len(order)} leanings the model is within people's interval"
    x = "share of decided votes (95 % interval)"
    return label_axes(ax, title, x, "votes for …", percent_on="x")


def plot_slices(ax: Axes, slices: pd.DataFrame, references: Sequence[str]) -> Axes:
    """Show the loss on each slice of `scores.compare_slices`, the hardest at the top.

    `references` are its columns to draw beside the model; differences are to the first.
    """
    rows = slices.sort_values("log_loss").reset_index(drop=True)
    names = [f"{row.slice} (n = {row.n_pairs:,})" for row in rows.itertuples()]
    places = np.arange(len(rows))
    marks = zip(references, ("|", "x", "v"), ("black", _OTHER, _ALARM), strict=False)
    for name, mark, color in marks:
        ax.plot(rows[name], places, mark, color=color, markersize=9, label=name)
    ax.plot(rows["log_loss"], places, "o", color=ACCENT, markersize=7, label="published")
    ax.set_yticks(places, names)
    place_legend(ax)
    n_better, first = int((rows["verdict"] == "better").sum()), references[0]
    title = f"Measurably better than {first} on {n_better} of {len(rows)} slices"
    worse = rows.loc[rows["verdict"] == "worse", "slice"]
    title += f", worse on: {', '.join(worse)}" if len(worse) else ", worse on none"
    return label_axes(ax, title, "log loss, nats per battle", "")


def draw_training(history: pd.DataFrame, prior: float) -> Figure:
    """Open a figure of a training history; of a frozen base it shows the heads that were tried."""
    if "penalty" in history.columns:
        fig, ax = make_figure(tall=True)
        plot_heads(ax, history, prior)
        return fig
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), layout="constrained")
    plot_training(axes, history, prior)
    return fig


def plot_training(axes: np.ndarray, history: pd.DataFrame, prior: float = np.nan) -> np.ndarray:
    """Draw a history on 2 × 2 axes: loss, accuracy, speed and learning rate, memory.

    Args:
        history: `trainer.HISTORY_COLUMNS`; each model's minutes start at 0.
        prior: log loss of the class prior, nats per battle.
    """
    loss, accuracy, speed, memory = np.ravel(axes)
    seen = {"training": "train_loss", "held out": "log_loss"}
    plot_history(loss, history, seen, "log loss, nats", "Log loss")
    loss.axhline(prior, linestyle="--", label="class prior", **BLACK)
    loss.legend(**_BELOW)
    seen = {"training": "train_accuracy", "held out": "accuracy"}
    plot_history(accuracy, history, seen, "accuracy", "Accuracy", percent_on="y")
    seen = {"tokens per second": "tokens_per_second"}
    plot_history(speed, history, seen, "tokens per second", "Speed and learning rate")
    speed.set_ylim(0, None)
    rate = speed.twinx()
    plot_history(rate, history, {"learning rate": "learning_rate"}, "learning rate")
    rate.lines[0].set(color=_ALARM, linestyle="--")
    rate.grid(visible=False)
    speed.legend(handles=[speed.lines[0], rate.lines[0]], **_BELOW)
    plot_memory(memory, history)
    return axes


def plot_memory(ax: Axes, history: pd.DataFrame) -> Axes:
    """Show memory over the minutes of training: of the GPU, else of the process, and say which."""
    has_gpu = "reserved_mib" in history and history["reserved_mib"].notna().any()
    used = {"most used so far": "memory_mib", "most reserved so far": "reserved_mib"}
    title = "Memory of the GPU"
    if not has_gpu:
        used, title = {"resident": "memory_mib"}, "Memory of the process (no GPU)"
    plot_history(ax, history, used, "MiB", title=title)
    most = np.nanmax(history.reindex(columns=[*used.values()]).to_numpy(float), initial=0)
    ax.set_ylim(0, 1.2 * most or None)
    return ax


def plot_history(
    ax: Axes,
    history: pd.DataFrame,
    shown: Mapping[str, str],
    y: str,
    title: str = "",
    **options: Any,
) -> Axes:
    """Draw columns of a history, label -> column, over the minutes of training of each model."""
    history = history.reindex(
        columns=[*dict.fromkeys([*history.columns, *_HISTORY, *shown.values()])]
    )
    # Runs of an older version noted no minutes.
    x = "minutes" if history["minutes"].notna().all() else "epoch"
    looks = ((ACCENT, "o-"), (_ALARM, "-")) if len(shown) > 1 else ((ACCENT, "-"),)
    for (label, column), (color, mark) in zip(list(shown.items())[::-1], looks, strict=True):
        for place, (_, rows) in enumerate(history.groupby(["fold", "seed"])):
            rows = rows[rows[column].notna()]
            hidden = "_" if place else ""  # one entry in the legend is enough
            look: dict[str, Any] = {"markersize": 4, "linewidth": 1.5 if mark == "o-" else 1}
            ax.plot(rows[x], rows[column], mark, color=color, label=f"{hidden}{label}", **look)
    ax.set_xlim(0, None)
    if len(shown) > 1:
        ax.legend(**_BELOW)
    unit = "minutes of training" if x == "minutes" else "epochs"
    return label_axes(ax, title, unit, y, **options)


def plot_heads(ax: Axes, history: pd.DataFrame, prior: float) -> Axes:
    """Show what the heads lost that were tried inside the training folds, the mean over models.

    `history`: head, penalty, train_loss, log_loss.
    """
    for (head, rows), marker in zip(history.groupby("head"), "os^D", strict=False):
        means = rows.groupby("penalty")[["log_loss", "train_loss"]].mean()
        ax.plot(means.index, means["log_loss"], f"{marker}-", color=ACCENT, label=f"{head}, unseen")
        ax.plot(
            means.index, means["train_loss"], f"{marker}:", color=_OTHER, label=f"{head}, training"
        )
    ax.axhline(prior, linestyle="--", label=f"class prior {prior:.3f}", **BLACK)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")  # powers would show their markup
    ax.set_ylim(None, prior + 0.5 * (prior - history["train_loss"].min()))
    place_legend(ax)
    best = history.groupby(["head", "penalty"])["log_loss"].mean().min()
    title = f"The best head tried loses {best:.3f} nats on prompts that it did not see"
    return label_axes(ax, title, "penalty of squared weights", "log loss (nats per battle)")
