"""Draw the figures, one claim each in its title: `plot_x(ax, data) -> ax`.

A function draws on the axes `ax` that it is given; it never opens, shows or saves a figure.
A, B and tie have one fixed colour everywhere. Tables come from `stats.effects`, `stats.ranking`
and `stats.scores`; their columns `low` and `high` are 95 % intervals, losses nats per battle.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from src.utils.schema import A_WINS, LABEL_COLORS, LABEL_NAMES, TIE

ACCENT, MUTED = "#009E73", "#BBBBBB"
BLACK: dict[str, Any] = {"color": "black", "linewidth": 1}

_WIDTH, _LOW, _TALL = 9.0, 3.6, 5.4  # of every figure, inches
_SMALL: dict[str, Any] = {"fontsize": 8, "color": "#777777"}

# Names are shown as they are: dollars in one ("alpha$x_1$") are no formula, and stop no figure.
matplotlib.rcParams["text.parse_math"] = False

Series = dict[str, tuple[str, pd.DataFrame]]  # name -> its colour and table


def use_style() -> None:
    """Set the suite's look once, in a notebook's import cell."""
    look = {"axes.titleweight": "bold", "axes.titlesize": 12, "figure.dpi": 100}
    sns.set_theme(style="whitegrid", context="notebook", rc=look)


def make_figure(n_columns: int = 1, tall: bool = False) -> tuple[Figure, Any]:
    """Open a figure of the suite's one width, with one axes or an array of them side by side."""
    size = (_WIDTH, _TALL if tall else _LOW)
    return plt.subplots(1, n_columns, figsize=size, layout="constrained")


def note_source(fig: Figure, source: str, n_pairs: int) -> None:
    """Write into a corner what was measured: "simulated arena · 12,000 battles"."""
    fig.text(1, 0, f"{source} · {n_pairs:,} battles", ha="right", va="top", **_SMALL)


def percent(share: float) -> str:
    """Write a share for a title: 0.613 -> "61.3 %" (with a no-break space), NaN -> "–"."""
    return "–" if np.isnan(share) else f"{100 * share:.1f}\u00a0%"


def label_axes(ax: Axes, title: str, x: str, y: str, percent_on: str = "") -> Axes:
    """Write the title and both axes; those in `percent_on` ("x", "y" or "xy") show shares."""
    ax.set_title(title, loc="left")
    ax.set(xlabel=x, ylabel=y)
    for name in percent_on:
        getattr(ax, f"{name}axis").set_major_formatter(PercentFormatter(1))
    return ax


def explain(ax: Axes, reason: str) -> Axes:
    """Fill axes that have nothing to show with the reason."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, reason, ha="center", va="center", wrap=True, transform=ax.transAxes)
    return ax


def draw_intervals(
    ax: Axes, table: pd.DataFrame, value: str, at: Any, vertical: bool = False, **look: Any
) -> None:
    """Draw dots with their intervals at places `at`; rows without a value are left out."""
    kept = table[value].notna().to_numpy()
    places, rows = np.asarray(at)[kept], table[kept]
    values = rows[value].to_numpy(dtype=float)
    reach = np.abs(rows[["low", "high"]].to_numpy(dtype=float).T - values)
    look = {"fmt": "o", "capsize": 3, "markersize": 5, **look}
    if vertical:
        ax.errorbar(places, values, yerr=reach, **look)
    else:
        ax.errorbar(values, places, xerr=reach, **look)


def draw_rows(
    ax: Axes, series: Series, value: str, key: str, order: list[str], null: float = 0
) -> None:
    """Draw a row per name in `order`, from the bottom, an interval per series, a line at `null`."""
    shifts = np.linspace(0.13, -0.13, len(series)) if len(series) > 1 else np.zeros(1)
    for (name, (color, table)), shift in zip(series.items(), shifts, strict=True):
        shown = table[table[key].isin(order)]
        places = shown[key].map(order.index).to_numpy(dtype=float) + shift
        draw_intervals(ax, shown, value, places, color=color, label=name)
    ax.set_yticks(range(len(order)), order)
    ax.axvline(null, **BLACK)
    if len(series) > 1:
        ax.legend(loc="best")


def plot_winner_shares(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Show who wins, from `effects.winner_shares`."""
    bars = ax.bar(shares["outcome"], shares["share"], color=LABEL_COLORS)
    draw_intervals(ax, shares, "share", range(3), vertical=True, fmt="none", color="black")
    counts = zip(shares["share"].map(percent), shares["n"], strict=True)
    texts = [f"{share}\nn = {n:,}" for share, n in counts]
    ax.bar_label(bars, texts, label_type="center", color="white")
    a, b, tie = shares["share"].map(percent)
    title = f"A wins {a}, B wins {b}, and {tie} are ties"
    return label_axes(ax, title, "vote", "share of battles (95 % interval)", percent_on="y")


def plot_drift(ax: Axes, drift: pd.DataFrame) -> Axes:
    """Show how the share of each vote changes over time, from `extras.measure_drift`."""
    colors = dict(zip((*LABEL_NAMES, "both bad"), (*LABEL_COLORS, "#CC79A7"), strict=True))
    moved = []
    outcomes, span = pd.unique(drift["outcome"]), drift["time"].max() - drift["time"].min()
    for place, outcome in enumerate(outcomes):
        rows = drift[(drift["outcome"] == outcome) & (drift["n"] > 0)]
        # Side by side, so that every interval can be read.
        times = rows["time"].dt.tz_convert(None) + (place - 1) * span / 150
        look = {"fmt": "o-", "color": colors[outcome], "label": outcome}
        draw_intervals(ax, rows, "share", times, vertical=True, **look)
        if rows["p_value"].iloc[0] < 0.05 / len(outcomes):
            first, last = rows["share"].iloc[[0, -1]].map(percent)
            moved.append(f"{outcome} {first} → {last}")
    ax.set_ylim(0, None)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(ax.xaxis.get_major_locator()))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    n_periods = drift["level"].nunique()
    title = f"First to last period: {', '.join(moved)}"
    if not moved:
        title = f"No measurable drift of the votes over {n_periods} periods"
    y = "share of battles (95 % interval)"
    return label_axes(ax, title, "time (UTC), mean of each period", y, percent_on="y")


def plot_models_usage(ax: Axes, records: pd.DataFrame, n_shown: int = 25) -> Axes:
    """Show how many battles each chatbot fought, from `ranking.model_records`."""
    if records.empty:
        return explain(ax, "No chatbot is named in these battles.")
    shown = records.head(n_shown)[::-1]
    ax.barh(shown["model"], shown["n"], color=ACCENT)
    first = records.iloc[0]
    among = f", the {len(shown)} busiest shown" if len(records) > len(shown) else ""
    title = f"{len(records)} chatbots{among}: {first['model']} fought {first['n']:,} battles"
    return label_axes(ax, title, "battles fought, in either position", "chatbot")


def plot_win_rates(
    ax: Axes, records: pd.DataFrame, min_battles: int = 30, n_shown: int = 25
) -> Axes:
    """Rank chatbots with enough battles by their wins, from `ranking.model_records`."""
    shown = records[(records["n"] >= min_battles) & (records["n_decided"] > 0)].head(n_shown)
    if shown.empty:
        return explain(ax, f"No named chatbot fought {min_battles} battles or more.")
    shown = shown.sort_values("win_share")
    names = [f"{row.model} ({row.n_decided:,})" for row in shown.itertuples()]
    draw_rows(ax, {"": (ACCENT, shown.assign(name=names))}, "win_share", "name", names, null=0.5)
    ends = shown.iloc[[0, -1]]
    worst, best = ends["win_share"].map(percent) + " (" + ends["model"] + ")"
    x = "share of decided battles won (95 % interval)"
    return label_axes(ax, f"From {worst} to {best}", x, "chatbot (decided battles)", percent_on="x")


def plot_length_difference(
    ax: Axes, n_chars_a: np.ndarray, n_chars_b: np.ndarray, labels: np.ndarray
) -> Axes:
    """Show by how much the winner is longer; `n_chars_a` and `n_chars_b` are (N,) characters."""
    gain = np.where(labels == A_WINS, n_chars_a - n_chars_b, n_chars_b - n_chars_a)[labels != TIE]
    if not len(gain):
        return explain(ax, "No decided battle.")
    reach = max(float(np.quantile(np.abs(gain), 0.98)), 1.0)
    bins = np.linspace(-reach, reach, 41).tolist()
    for name, color, part in (("shorter", MUTED, gain < 0), ("longer", ACCENT, gain > 0)):
        ax.hist(gain[part], bins=bins, color=color, label=f"winner is {name}: {part.sum():,}")
    median = float(np.median(gain))
    ax.axvline(0, **BLACK)
    ax.axvline(median, color="black", linestyle="--", label=f"median {median:+,.0f} characters")
    ax.legend()
    share = percent((gain > 0).sum() / max((gain != 0).sum(), 1))
    x = "characters of the winner − characters of the loser (middle 98 %)"
    return label_axes(
        ax, f"The longer answer wins {share} of decided battles", x, "decided battles"
    )


def plot_punctuation_winner(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Compare how often more punctuation wins, by `measure`: "by count" and "per character"."""
    shares = shares.dropna(subset=["share"])
    if shares.empty:
        return explain(ax, "No decided battle with answers that differ in punctuation.")
    order = list(dict.fromkeys(shares["caption"]))[::-1]
    colors = {"by count": MUTED, "per character": ACCENT}
    series = {name: (colors[name], shares[shares["measure"] == name]) for name in colors}
    draw_rows(ax, series, "share", "caption", order, null=0.5)
    first = shares[shares["caption"] == order[-1]]
    found = ", ".join(first["share"].map(percent) + " " + first["measure"])
    x = "decided battles won by the answer with more (95 % interval)"
    return label_axes(ax, f"More {order[-1]} win: {found}", x, "punctuation", percent_on="x")


def plot_win_share_by_level(ax: Axes, shares: pd.DataFrame, winner: str) -> Axes:
    """Show whether the share of `winner` depends on the battle, `effects.win_share_by_level`."""
    shares = shares[shares["n"] > 0][::-1]
    if shares.empty:
        return explain(ax, "No decided battle.")
    names = [f"{row.property}: {row.level} (n = {row.n:,})" for row in shares.itertuples()]
    shares = shares.assign(name=names)
    for place, (_, rows) in enumerate(shares.groupby("property", sort=False)):
        draw_rows(ax, {"": ((ACCENT, "black")[place % 2], rows)}, "share", "name", names, null=0.5)
    p_values = shares.groupby("property")["p_value"].first().dropna()
    n_moved = int((p_values < 0.05 / len(p_values)).sum())
    name = winner[:1].upper() + winner[1:]
    title = f"{name}'s share depends on {n_moved} of {len(p_values)} properties"
    x = f"decided battles won by {winner} (95 % interval)"
    return label_axes(ax, title, x, "battles with …", percent_on="x")


def plot_length_curves(axes: np.ndarray, curves: dict[str, pd.DataFrame]) -> np.ndarray:
    """Draw `effects.length_curves` on two axes: who wins, and ties, by the length ratio."""
    bins, ties = curves["longer_bins"], curves["ties" if len(curves["ties"]) else "ties_bins"]
    if ties.empty:
        return np.array([explain(ax, "No battle to show.") for ax in axes])
    x = "words of the longer over the shorter answer"
    _draw_curve(axes[0], curves["longer"], bins, ACCENT)
    axes[0].axhline(0.5, **BLACK)
    overall = percent((bins["n"] * bins["share"]).sum() / bins["n"].sum() if len(bins) else np.nan)
    title = f"More words win {overall} of decided battles"
    label_axes(axes[0], title, x, "P(longer wins | decided)", percent_on="y")
    _draw_curve(axes[1], curves["ties"], curves["ties_bins"], LABEL_COLORS[TIE])
    first, last = ties["share"].iloc[[0, -1]].map(percent)
    title = f"Ties: {first} at equal, {last} at unequal length"
    label_axes(axes[1], title, x, "P(tie)", percent_on="y")
    return axes


def _draw_curve(ax: Axes, curve: pd.DataFrame, bins: pd.DataFrame, color: str) -> None:
    """Draw a rate as a smooth curve with its band, over its bins, by a log ratio from 0 up."""
    band: dict[str, Any] = {"alpha": 0.2, "linewidth": 0, "label": "95 % band"}
    ax.fill_between(curve["value"], curve["low"], curve["high"], color=color, **band)
    ax.plot(curve["value"], curve["share"], color=color, label="smooth curve")
    if len(curve):
        bins = bins[bins["value"] <= curve["value"].max()]
    look = {"color": MUTED, "markersize": 4, "label": "equal bins"}
    draw_intervals(ax, bins, "share", bins["value"], vertical=True, **look)
    end = max([0.0, *curve["value"], *bins["value"]])
    ticks = [ratio for ratio in (1, 1.5, 2, 3, 5, 8, 16, 32) if np.log(ratio) <= end]
    ax.set_xticks(np.log(ticks), [f"{ratio:g}×" for ratio in ticks])
    ax.legend(loc="best")


def plot_token_distribution(
    ax: Axes, lengths: dict[str, np.ndarray], budgets: Sequence[int] = (1024, 512, 2048, 3072)
) -> Axes:
    """Show how long battles are, tokenizer -> (N,) int tokens, and what each budget truncates."""
    every = np.maximum(np.concatenate(list(lengths.values())), 1)
    edges = np.geomspace(max(np.quantile(every, 0.002), 1), max(every.max(), *budgets) * 1.2, 50)
    look: dict[str, Any] = {"bins": edges, "histtype": "step", "linewidth": 2}
    colors = (ACCENT, "#CC79A7", "#E69F00", "#56B4E9")
    for (name, counts), color in zip(lengths.items(), colors, strict=False):
        ax.hist(counts, color=color, label=f"{name}, median {np.median(counts):,.0f}", **look)
    ax.set_xscale("log")
    top = ax.get_ylim()[1] * 1.3
    for budget in budgets:
        cut = "\n".join(percent(float((counts > budget).mean())) for counts in lengths.values())
        ax.axvline(budget, linestyle=":", **BLACK)
        ax.text(budget, top * 0.98, f" {cut}", va="top", fontsize=9)
    ticks = sorted({64, 128, 256, *budgets, 8192})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    ax.minorticks_off()
    ax.set(ylim=(0, top), xlim=(edges[0], edges[-1]))
    several = "one line per tokenizer, in this order at each budget" if len(lengths) > 1 else None
    ax.legend(loc="upper left", title=several)
    first, counts = next(iter(lengths.items()))
    cut = percent(float((counts > budgets[0]).mean()))
    of = f" ({first})" if several else ""  # else the legend names it, and the title fits
    title = f"A budget of {budgets[0]:,} tokens truncates {cut} of battles{of}"
    x = "tokens of prompt and both answers (log scale; at each budget: share truncated)"
    return label_axes(ax, title, x, "battles")


def plot_effects(ax: Axes, effects: dict[str, pd.DataFrame]) -> Axes:
    """Compare two series of `effects.effect_sizes`; the second gives order and title."""
    (first, others), (name, table) = effects.items()
    known = table.dropna(subset=["log_odds"]).sort_values("log_odds")
    if known.empty:
        return explain(ax, "No effect can be estimated from these battles.")
    series = {first: (MUTED, others), name: (ACCENT, known)}
    draw_rows(ax, series, "log_odds", "effect", known["effect"].tolist())
    n_clear = int(((known["low"] > 0) | (known["high"] < 0)).sum())
    title = f"{n_clear} of {len(known)} style differences move the vote, {name}"
    x = "log-odds of winning per standard deviation (95 % interval)"
    return label_axes(ax, title, x, "more of …")


def plot_strengths(ax: Axes, strengths: dict[str, pd.DataFrame], n_shown: int = 25) -> Axes:
    """Compare two series of `ranking.VoteModel.strengths`; the first gives the order."""
    first = next(iter(strengths.values())).dropna(subset=["strength"])
    if first.empty:
        return explain(ax, "No strength can be estimated: too few battles between named chatbots.")
    order = first.nlargest(n_shown, "n").sort_values("strength")["model"].tolist()
    pairs = zip((MUTED, ACCENT), strengths.items(), strict=True)
    series = {name: (color, rows[rows["model"].isin(order)]) for color, (name, rows) in pairs}
    draw_rows(ax, series, "strength", "model", order)
    spreads = [f"{rows['strength'].std():.2f} {name}" for name, (_, rows) in series.items()]
    title = f"Standard deviation of strengths: {', '.join(spreads)}"
    return label_axes(ax, title, "strength, log-odds against the mean (95 % interval)", "chatbot")


def plot_planted(ax: Axes, planted: pd.Series, estimated: pd.DataFrame) -> Axes:
    """Compare `ranking.VoteModel.effects` with planted ones, by name, in units of the latter."""
    columns = ["log_odds_per_unit", "low", "high"]
    rows = estimated.set_index("effect").loc[list(planted.index), columns].div(planted, axis=0)
    # Dividing by a negative effect exchanges the bounds.
    rows["low"], rows["high"] = rows[["low", "high"]].min(axis=1), rows[["low", "high"]].max(axis=1)
    names = [f"{name} ({size:+.2f})" for name, size in planted.items()]
    series = {"": (ACCENT, rows.assign(name=names))}
    draw_rows(ax, series, "log_odds_per_unit", "name", names[::-1], null=1)
    covered = int(((rows["low"] <= 1) & (rows["high"] >= 1)).sum())
    title = f"{covered} of {len(rows)} intervals cover the planted effect"
    x = "estimated / planted effect (95 % interval)"
    return label_axes(ax, title, x, "effect (planted size, log-odds)")
