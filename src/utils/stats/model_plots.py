"""Draw the figures of models: scores, calibration, what they learned; `plot_x(ax, data) -> ax`.

Style, colours and helpers are those of `stats.plots`.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from src.utils.schema import LABEL_NAMES, TIE
from src.utils.stats.plots import (
    ACCENT,
    BLACK,
    LABEL_COLORS,
    MUTED,
    draw_intervals,
    draw_rows,
    label_axes,
    percent,
)


def plot_probabilities(ax: Axes, probs: np.ndarray) -> Axes:
    """Show how the predicted probabilities of A, B and tie, (N, C) float, are distributed."""
    look: dict[str, Any] = {"bins": np.linspace(0, 1, 26), "histtype": "step", "linewidth": 2}
    for name, color, column in zip(LABEL_NAMES, LABEL_COLORS, probs.T, strict=True):
        ax.hist(column, color=color, label=f"P({name})", **look)
    ax.set_xlim(0, 1)
    ax.legend(frameon=False)
    confident = percent((probs.max(axis=1) > 0.9).mean() if len(probs) else np.nan)
    title = f"{confident} of the battles get a probability above 0.9"
    return label_axes(ax, title, "predicted probability", "battles")


def plot_ladder(
    ax: Axes, names: list[str], means: Any, lows: Any, highs: Any, oracle: float | None = None
) -> Axes:
    """Compare the log losses of K models, the first at the top, the last accented.

    Args:
        means, lows, highs: (K,) float, log loss and bounds of its interval.
        oracle: log loss of the true probabilities of simulated battles.
    """
    table = pd.DataFrame({"loss": list(means), "low": list(lows), "high": list(highs)})
    white = {"facecolor": "white", "linewidth": 0, "pad": 1}
    look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "bbox": white}
    for row, loss in enumerate(table["loss"]):
        color = ACCENT if row == len(names) - 1 else MUTED
        draw_intervals(ax, table[row : row + 1], "loss", [-row], color=color, markersize=8)
        ax.annotate(f"{loss:.4f}", (loss, -row), xytext=(0, 9), **look)
    if oracle is not None:
        label = f"oracle {oracle:.4f} (simulated battles)"  # else nobody knows the truth
        ax.axvline(oracle, color="black", linestyle="--", label=label)
        ax.legend(loc="lower right")
    ax.set_yticks(-np.arange(len(names)), names)
    ax.set_ylim(0.4 - len(names), 0.7)
    title = f"{names[-1]} is {_gain(table['loss'].iloc[0], table['loss'].iloc[-1])} {names[0]}"
    return label_axes(
        ax, title, "log loss, nats per battle (95 % interval), lower is better", "model"
    )


def _gain(before: float, after: float) -> str:
    return f"{abs(before - after):.3f} nats {'below' if after <= before else 'above'}"


def plot_reliability(ax: Axes, curve: pd.DataFrame, ece: float) -> Axes:
    """Compare observed with predicted shares, from `scores.reliability_curve`; `ece` is 0..1."""
    end = min(1.0, float(curve[["predicted", "high"]].to_numpy().max()) + 0.05)
    ax.plot([0, end], [0, end], **BLACK)
    for label, (name, color) in enumerate(zip(LABEL_NAMES, LABEL_COLORS, strict=True)):
        bins = curve[curve["label"] == label]
        look = {"fmt": "o-", "color": color, "label": name}
        draw_intervals(ax, bins, "observed", bins["predicted"], vertical=True, **look)
    ax.set(xlim=(0, end), ylim=(0, end))
    ax.legend()
    title = f"Confidence and accuracy differ by {percent(ece)} on average"
    y = "observed share (95 % interval)"
    return label_axes(ax, title, "predicted probability", y, percent_on="xy")


def plot_coefficients(ax: Axes, effects: pd.DataFrame, n_shown: int = 15) -> Axes:
    """Show what a model learned: caption, effect (log-odds per SD), the strongest first."""
    shown = effects.head(n_shown)[::-1]
    ax.barh(shown["caption"], shown["effect"], color=np.where(shown["effect"] > 0, ACCENT, MUTED))
    ax.axvline(0, **BLACK)
    first = effects.iloc[0]
    title = f"Strongest, all else equal: {first['caption']} ({first['effect']:+.2f})"
    x = "log-odds of winning per standard deviation more than the other answer"
    return label_axes(ax, title, x, "more of …")


def plot_preferences(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Compare the leanings of a model with those of people, from `scores.compare_leanings`."""
    shares = shares.dropna(subset=["share"])
    names = [f"{row.leaning} (n = {row.n:,})" for row in shares.itertuples()]
    shares = shares.assign(name=names)
    people, model = (shares[shares["voter"] == voter] for voter in ("people", "model"))
    order = model["name"].tolist()[::-1]
    series = {"people": ("black", people), "model": (ACCENT, model)}
    draw_rows(ax, series, "share", "name", order, null=0.5)
    ax.set_ylim(-0.5, len(order) - 0.5)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    low, high = people["low"].to_numpy(), people["high"].to_numpy()
    n_inside = int(model["share"].between(low, high).sum())
    title = f"On {n_inside} of {len(order)} leanings the model is within people's interval"
    x = "share of decided votes (95 % interval)"
    return label_axes(ax, title, x, "votes for … (battles that differ in it)", percent_on="x")


def plot_budgets(ax: Axes, budgets: pd.DataFrame) -> Axes:
    """Show what token budgets cost against the longest with a cost, and how many battles each cuts.

    Args:
        budgets: budget, cut_share, cost (NaN where not measured), low, high.
    """
    places = np.arange(len(budgets))
    draw_intervals(ax, budgets, "cost", places, vertical=True, fmt="o-", color=ACCENT)
    ax.axhline(0, **BLACK)
    cut = zip(budgets["budget"], budgets["cut_share"].map(percent), strict=True)
    ax.set_xticks(places, [f"{budget:,}\n{share}" for budget, share in cut])
    ax.set_xlim(-0.5, len(budgets) - 0.5)
    read = budgets.dropna(subset=["cost"])
    least, own, cost = read["budget"].iloc[0], read["budget"].iloc[-1], read["cost"].iloc[0]
    title = f"{least:,} tokens instead of {own:,} cost {cost:+.4f} nats per battle"
    x = "tokens of a battle at most, and the share of battles that this cuts"
    return label_axes(ax, title, x, "log loss added, nats per battle (95 % interval)")


def plot_learning_curve(
    ax: Axes, history: pd.DataFrame, prior: float, oracle: float | None = None
) -> Axes:
    """Show how the loss fell; `history`: fold, seed, epoch, train_loss, log_loss by validation.

    Of a frozen base it has head and penalty instead of the epoch, and `plot_heads` shows it.
    """
    if "penalty" in history.columns:
        return plot_heads(ax, history, prior, oracle)
    models = history.groupby(["fold", "seed"])
    for place, (_, rows) in enumerate(models):
        hidden = "_" if place else ""  # one entry in the legend is enough
        ax.plot(rows["epoch"], rows["log_loss"], "o-", color=ACCENT, label=f"{hidden}held out")
        ax.plot(rows["epoch"], rows["train_loss"], ".:", color=MUTED, label=f"{hidden}training")
    ax.axhline(prior, linestyle="--", label=f"class prior {prior:.3f}", **BLACK)
    if oracle is not None:
        ax.axhline(oracle, linestyle="-.", label=f"oracle {oracle:.3f}", **BLACK)
    ax.set_xlim(0, None)
    ax.legend(frameon=False)
    last = float(models["log_loss"].last().mean())
    title = f"Held-out battles: {_gain(prior, last)} the class prior"
    return label_axes(ax, title, "epochs", "log loss (nats per battle)")


def plot_heads(ax: Axes, history: pd.DataFrame, prior: float, oracle: float | None = None) -> Axes:
    """Show what the heads lost that were tried inside the training folds, the mean over models.

    `history`: head, penalty, train_loss, log_loss.
    """
    for (head, rows), marker in zip(history.groupby("head"), "os^D", strict=False):
        means = rows.groupby("penalty")[["log_loss", "train_loss"]].mean()
        ax.plot(means.index, means["log_loss"], f"{marker}-", color=ACCENT, label=f"{head}, unseen")
        ax.plot(
            means.index, means["train_loss"], f"{marker}:", color=MUTED, label=f"{head}, training"
        )
    ax.axhline(prior, linestyle="--", label=f"class prior {prior:.3f}", **BLACK)
    if oracle is not None:
        ax.axhline(oracle, linestyle="-.", label=f"oracle {oracle:.3f}", **BLACK)
    ax.set_xscale("log")
    ax.set_ylim(None, prior + 0.5 * (prior - history["train_loss"].min()))
    ax.legend(frameon=False, fontsize=8)
    best = history.groupby(["head", "penalty"])["log_loss"].mean()
    title = f"Prompts not seen: the best head {_gain(prior, float(best.min()))} the class prior"
    return label_axes(ax, title, "penalty of squared weights", "log loss (nats per battle)")


def plot_ablation(ax: Axes, worth: pd.DataFrame) -> Axes:
    """Show what each family of features is worth, from `ablation.ablate`, the best at the top."""
    order = worth["family"].tolist()[::-1]
    series = {
        "in the odds of A or B": (ACCENT, worth[worth["of"] == "A against B"]),
        "in the odds of a tie": (LABEL_COLORS[TIE], worth[worth["of"] == "tie"]),
    }
    draw_rows(ax, series, "difference", "family", order)
    n_sure = int((worth["low"] > 0).sum())
    title = f"Missed by more than chance: {n_sure} of {len(worth)} families"
    x = "log loss added by leaving it out, nats per battle (95 % interval)"
    return label_axes(ax, title, x, "family of features")
