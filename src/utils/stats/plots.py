"""Draw the figures, one claim each in its title: `plot_x(ax, data) -> ax`.

A function draws on the axes `ax` that it is given; `make_figure` opens a figure and `publish`
shows and saves it.
A, B and tie have one fixed colour everywhere. Tables come from `stats.effects`, `stats.ranking`
and `stats.scores`; their columns `low` and `high` are 95 % intervals, losses nats per battle.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.utils.runs import write_figure
from src.utils.schema import A_WINS, LABEL_COLORS, LABEL_NAMES, TIE

ACCENT, MUTED = "#009E73", "#BBBBBB"
BLACK: dict[str, Any] = {"color": "black", "linewidth": 1}
_HOLLOW: dict[str, Any] = {"color": "#777777", "mfc": "white"}
ALPHA = 0.05  # of a test that decides a title

_WIDTH, _LOW, _TALL = 9.0, 3.6, 5.4  # of every figure, inches
_TITLE_CHARS, _HALF_CHARS = 86, 34  # of a line over the whole width, and over half of it
_EDGE = 0.013  # of the width is left free
_SMALL: dict[str, Any] = {"fontsize": 8, "color": "#777777"}

# Names are shown as they are: dollars in one ("alpha$x_1$") are no formula, and stop no figure.
matplotlib.rcParams["text.parse_math"] = False

Series = dict[str, tuple[str, pd.DataFrame]]  # name -> its colour and table


def use_style() -> None:
    """Set the suite's look once, in a notebook's import cell."""
    look = {"axes.titleweight": "bold", "axes.titlesize": 12, "figure.dpi": 100}
    sns.set_theme(style="whitegrid", context="notebook", rc=look)
    shell = get_ipython()
    if shell:  # else a notebook crops each figure to a width of its own
        line = "InlineBackend.print_figure_kwargs = {'bbox_inches': None}"
        shell.run_line_magic("config", line)


def make_figure(n_columns: int = 1, tall: bool = False) -> tuple[Figure, Any]:
    """Open a figure of the suite's one width, with one axes or an array of them side by side."""
    size = (_WIDTH, _TALL if tall else _LOW)
    return plt.subplots(1, n_columns, figsize=size, layout="constrained")


def note_source(fig: Figure, source: str, n_pairs: int) -> None:
    """Write into a corner what was measured, e.g. "simulated arena · 12,000 battles".

    Args:
        source: of `runs.read_source`.
    """
    # As a label of the figure it gets room of its own from the layout.
    fig.supxlabel(f"{source} · {n_pairs:,} battles", x=1 - _EDGE, ha="right", **_SMALL)
    # Over long names of rows, too, the title starts at the figure's edge. It takes part in the
    # layout, which therefore stays as it is once the title has moved.
    for step in range(2 if len(fig.axes) == 1 else 0):
        fig.draw_without_rendering()
        if step:
            fig.set_layout_engine("none")
        place = fig.axes[0].get_position()
        x = (_EDGE - place.x0) / place.width
        fig.axes[0].set_title(fig.axes[0].get_title("left"), loc="left", x=x)


def publish(fig: Figure, path: Path, source: str, n_pairs: int, sentence: str = "") -> None:
    """Finish a figure: note its source, write it, show it, and under it a sentence of Markdown."""
    note_source(fig, source, n_pairs)
    write_figure(path, fig)
    display(fig)
    plt.close(fig)  # else a notebook shows it again, below the sentence
    if sentence:
        display(Markdown(sentence))


def percent(share: float) -> str:
    """Write a share for a title: 0.613 -> "61.3 %" (with a no-break space), NaN -> "–"."""
    return number(share, "{:.1%}")


def number(value: Any, text: str = "{:,.3f}") -> str:
    """Write a value by a format, with a true minus and a space before "%"; missing is "–"."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    written = text.format(value)
    if not pd.api.types.is_number(value):
        return written
    return written.replace("-", "−").replace("%", "\u00a0%")


def with_interval(value: float, low: float, high: float, text: str = "{:,.3f}") -> str:
    """Write an estimate with its interval: "61.8 % (57.9–65.7)", "−0.010 (−0.020 to 0.001)"."""
    if pd.isna(value) or pd.isna(low):
        return number(value, text)
    ends = [number(end, text).removesuffix("\u00a0%") for end in (low, high)]
    between = " to " if {"−", "+"} & set("".join(ends)) else "–"
    return f"{number(value, text)} ({between.join(ends)})"


def label_axes(ax: Axes, title: str, x: str, y: str, percent_on: str = "") -> Axes:
    """Write the title and both axes; those in `percent_on` ("x", "y" or "xy") show shares."""
    place = ax.get_subplotspec()
    n_columns = place.get_gridspec().ncols if place else 1
    # Beside other axes a title keeps to its own; else it wraps at the figure's edge.
    ax.set_title(fill(title, _TITLE_CHARS if n_columns == 1 else _HALF_CHARS), loc="left")
    ax.set(xlabel=x, ylabel=y)
    for name in percent_on:
        axis = getattr(ax, f"{name}axis")
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # whole per cents
    return ax


def place_legend(ax: Axes, **look: Any) -> None:
    """Put the legend beside the axes, clear of the grid and of what is drawn."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, **look)


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


def is_clear(table: pd.DataFrame, null: float = 0) -> pd.Series:
    """Which rows exclude `null`: by the corrected `p_holm` where there is one, else by interval."""
    if "p_holm" in table:
        return table["p_holm"] < ALPHA
    return (table["low"] > null) | (table["high"] < null)


def draw_rows(
    ax: Axes, series: Series, value: str, key: str, order: list[str], null: float = 0
) -> None:
    """Draw a row per name in `order`, from the bottom, an interval per series, a line at `null`.

    Dots are hollow where `is_clear` finds no difference from `null`.
    """
    shifts = np.linspace(0.16, -0.16, len(series)) if len(series) > 1 else np.zeros(1)
    for (name, (color, table)), shift in zip(series.items(), shifts, strict=True):
        shown = table[table[key].isin(order)]
        clear = is_clear(shown, null)
        for rows, face in ((shown[clear], color), (shown[~clear], "white")):
            places = rows[key].map(order.index).to_numpy(dtype=float) + shift
            draw_intervals(ax, rows, value, places, color=color, mfc=face)
        if name:
            ax.plot([], [], color=color, marker="o", label=name)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.axvline(null, **BLACK)
    if len(series) > 1:
        ax.plot([], [], marker="o", label="hollow: no\nmeasurable effect", **_HOLLOW)
        place_legend(ax)


def plot_winner_shares(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Show who wins, from `effects.winner_shares`."""
    bars = ax.bar(shares["outcome"], shares["share"], color=LABEL_COLORS, width=0.6)
    draw_intervals(ax, shares, "share", range(3), vertical=True, fmt="none", color="black")
    texts = [f"{n:,}" for n in shares["n"]]
    ax.bar_label(bars, texts, label_type="center", color="white")
    found = [_write_share(row) for row in shares.to_dict("records")]
    title = f"A wins {found[0]}, B wins {found[1]}; ties are {found[2]}"
    return label_axes(ax, title, "", "share of battles (95 % interval)", percent_on="y")


def _write_share(row: Any) -> str:
    return with_interval(row["share"], row["low"], row["high"], "{:.1%}")


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
        if rows["p_value"].iloc[0] < ALPHA / len(outcomes):
            first, last = (_write_share(rows.iloc[row]) for row in (0, -1))
            moved.append(f"{outcome} {first} → {last}")
    ax.set_ylim(0, None)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(ax.xaxis.get_major_locator()))
    place_legend(ax)
    n_periods = drift["level"].nunique()
    title = f"First to last period: {', '.join(moved)}"
    if not moved:
        title = f"No measurable drift of the votes over {n_periods} periods"
    y = "share of battles (95 % interval)"
    return label_axes(ax, title, "time (UTC), mean of each period", y, percent_on="y")


def plot_model_records(
    axes: np.ndarray, records: pd.DataFrame, min_battles: int = 30, n_shown: int = 15
) -> np.ndarray:
    """Show on two axes the wins, ties and losses of chatbots, from `ranking.model_records`.

    Shares of wins are shown for the most frequent chatbots with `min_battles` or more.
    """
    left, right = axes
    ranked = records[(records["n"] >= min_battles) & (records["n_decided"] > 0)].head(n_shown)
    shown = (ranked if len(ranked) else records.head(n_shown)).sort_values("win_share")
    if shown.empty:
        return np.array([explain(ax, "No chatbot is named in these battles.") for ax in axes])
    names, start = shown["model"].tolist(), np.zeros(len(shown))
    won = shown["win_share"].fillna(0) * shown["n_decided"]
    counts = {"won": won, "tied": shown["n"] - shown["n_decided"], "lost": shown["n_decided"] - won}
    for (name, count), color in zip(counts.items(), (ACCENT, MUTED, "#E69F00"), strict=True):
        left.barh(range(len(names)), count, left=start, color=color, label=name)
        start = start + count.to_numpy()
    left.set_yticks(range(len(names)), names)
    below = (0.5, -1.1 / left.figure.get_figheight())
    left.legend(loc="upper center", bbox_to_anchor=below, ncols=3, frameon=False)
    among = f", {len(shown)} of them shown" if len(records) > len(shown) else ""
    label_axes(left, f"{len(records):,} chatbots{among}", "battles, in either position", "")
    if ranked.empty:
        return np.array([left, explain(right, f"No chatbot fought {min_battles} battles.")])
    draw_rows(right, {"": (ACCENT, shown)}, "win_share", "model", names, null=0.5)
    right.set_yticks(range(len(names)), [""] * len(names))
    right.set_ylim(left.get_ylim())
    x = "decided battles won (95 % interval)"
    n_clear = int(is_clear(shown, 0.5).sum())
    title = f"{n_clear} of {len(shown)} win measurably more or less than half"
    return np.array([left, label_axes(right, title, x, "", percent_on="x")])


def plot_head_to_head(ax: Axes, table: pd.DataFrame, min_battles: int = 10) -> Axes:
    """Show who beats whom, from `ranking.head_to_head`, where enough battles were decided."""
    known = table[table["n"] >= min_battles]
    if known.empty:
        return explain(ax, f"No two chatbots met in {min_battles} decided battles or more.")
    order = list(pd.unique(table["model"]))
    shares = known.pivot(index="model", columns="opponent", values="share")
    shares = shares.reindex(index=order, columns=order)
    _draw_cells(ax, shares, known.set_index(["model", "opponent"]))
    once = known[known["model"] < known["opponent"]]  # each meeting is there from both sides
    n_clear = int(is_clear(once, 0.5).sum())
    title = f"One side wins measurably more often in {n_clear} of {len(once)} meetings"
    return label_axes(ax, f"{title} (Holm's correction)", "against", "share won by")


def _draw_cells(ax: Axes, shares: pd.DataFrame, known: pd.DataFrame) -> None:
    """Colour shares around one half, each with its battles, and bold where `is_clear`."""
    texts = (100 * known["share"]).map("{:.0f}".format) + known["n"].map("\n({:,})".format)
    look: dict[str, Any] = {"cmap": "PuOr", "vmin": 0, "vmax": 1, "linewidths": 1, "fmt": ""}
    look |= {"annot": texts.unstack().reindex_like(shares), "annot_kws": {"fontsize": 8}}
    sns.heatmap(shares.astype(float), ax=ax, cbar=False, **look)
    ax.grid(visible=False)
    drawn = shares.stack().dropna()
    clear = is_clear(known, 0.5).reindex(drawn.index)
    for text, share, is_bold in zip(ax.texts, drawn, clear, strict=True):
        text.set(weight="bold" if is_bold else "normal")
        text.set_color("white" if abs(share - 0.5) > 0.3 else "black")
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=0 if len(shares.columns) < 7 else 45)


def plot_length_grid(ax: Axes, table: pd.DataFrame) -> Axes:
    """Show where the longer answer wins, from `effects.win_share_grid`; numbers are per cents."""
    known = table[table["n"] > 0]
    if known.empty:
        return explain(ax, "No decided battle.")
    shares = known.pivot(index="row", columns="column", values="share")
    shares = shares.reindex(index=pd.unique(table["row"]), columns=pd.unique(table["column"]))
    _draw_cells(ax, shares[::-1], known.set_index(["row", "column"]))
    clear = known[is_clear(known, 0.5)]
    n_longer, n_shorter = (clear["share"] > 0.5).sum(), (clear["share"] < 0.5).sum()
    title = (
        f"The longer answer wins measurably in {n_longer} of {len(known)} cells, "
        f"the shorter in {n_shorter} (Holm's correction)"
    )
    x = "words of the longer over the shorter answer   (cell: % won by the longer, decided battles)"
    return label_axes(ax, title, x, "characters of the prompt")


def plot_kinds(axes: np.ndarray, ties: pd.DataFrame, longer: pd.DataFrame) -> np.ndarray:
    """Show on two axes how ties, and what length does, differ by kind of prompt.

    Args:
        ties: rows of `extras.vote_shares` for the tie.
        longer: of `effects.win_share_by_level`, its `level` the same kinds.
    """
    ties, longer = ties[ties["n"] > 0], longer[longer["n"] > 0]
    overall = float((ties["share"] * ties["n"]).sum() / max(ties["n"].sum(), 1))
    parts = (
        (ties, overall, "ties", "share of ties"),
        (longer, 0.5, "what length does", "share of decided battles"),
    )
    order = ties["level"].tolist()[::-1]
    for ax, (rows, null, what, x) in zip(axes, parts, strict=True):
        draw_rows(ax, {"": (ACCENT, rows)}, "share", "level", order, null=null)
        is_moved = len(rows) > 0 and rows["p_value"].iloc[0] < ALPHA / 2
        begin = "Kinds of prompt differ" if is_moved else "No measurable difference"
        label_axes(ax, f"{begin} in {what}", f"{x} (95 % interval)", "", percent_on="x")
    counts = ties.set_index("level")["n"]
    axes[0].set_yticks(range(len(order)), [f"{name} ({counts[name]:,})" for name in order])
    axes[1].set_yticks(range(len(order)), [""] * len(order))
    return axes


def plot_length_difference(
    ax: Axes, n_words_a: np.ndarray, n_words_b: np.ndarray, labels: np.ndarray, longer: Any
) -> Axes:
    """Show by how much the winner is longer.

    Args:
        n_words_a, n_words_b: (N,) words of each answer.
        longer: of `effects.win_share`, which the title states.
    """
    gain = np.where(labels == A_WINS, n_words_a - n_words_b, n_words_b - n_words_a)[labels != TIE]
    gain = gain[gain != 0]
    if not len(gain):
        return explain(ax, "No decided battle with answers of unequal length.")
    reach = max(float(np.quantile(np.abs(gain), 0.98)), 1.0)
    bins = np.linspace(-reach, reach, 41).tolist()
    for name, color, part in (("shorter", MUTED, gain < 0), ("longer", ACCENT, gain > 0)):
        ax.hist(gain[part], bins=bins, color=color, label=f"winner is\n{name}: {part.sum():,}")
    ax.axvline(0, **BLACK)
    median = float(np.median(gain))
    ax.axvline(median, color="black", linestyle="--", label=f"median\n{median:+,.0f} words")
    place_legend(ax)
    only = "only " if longer["share"] < 0.5 else ""
    title = f"The longer answer wins {only}{_write_share(longer)} of decided battles"
    if not longer["p_value"] < ALPHA:
        title = f"No measurable preference for the longer answer: it wins {_write_share(longer)}"
    x = "words of the winner − words of the loser (middle 98 %)"
    return label_axes(ax, title, x, "decided battles")


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
    found = [f"{_write_share(row)} {row['measure']}" for row in first.to_dict("records")]
    title = f"More {order[-1]} win {', '.join(found)}"
    if not is_clear(first, 0.5).any():
        title = f"No measurable preference for more {order[-1]}: {', '.join(found)}"
    x = "decided battles won by the answer with more (95 % interval)"
    return label_axes(ax, title, x, "", percent_on="x")


def plot_win_share_by_level(ax: Axes, shares: pd.DataFrame, winner: str) -> Axes:
    """Show whether the share of `winner` depends on the battle, `effects.win_share_by_level`."""
    shares = shares[shares["n"] > 0]
    if shares.empty:
        return explain(ax, "No decided battle.")
    names: list[str] = []
    for name, rows in shares.groupby("property", sort=False):
        ax.axhline(0.5 - len(names), color=MUTED, linewidth=1)
        names.append(str(name))
        at = -np.arange(len(names), len(names) + len(rows))
        clear = is_clear(rows, 0.5).to_numpy()
        for part, face in ((clear, ACCENT), (~clear, "white")):
            draw_intervals(ax, rows[part], "share", at[part], color=ACCENT, mfc=face)
        names += [f"{row.level} (n = {row.n:,})" for row in rows.itertuples()]
    ax.set_yticks(-np.arange(len(names)), names)
    ax.set_ylim(0.4 - len(names), 0.6)
    ax.grid(visible=False, axis="y")
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name in set(shares["property"]) else "normal")
    ax.axvline(0.5, **BLACK)
    p_values = shares.groupby("property")["p_value"].first().dropna()
    n_moved = int((p_values < ALPHA / max(len(p_values), 1)).sum())
    name = winner[:1].upper() + winner[1:]
    title = f"How often {winner} wins depends on {n_moved} of {len(p_values)} properties"
    if not n_moved:
        title = f"No measurable difference in how often {winner} wins"
    x = f"decided battles won by {winner} (95 % interval)"
    return label_axes(ax, title, x, "", percent_on="x")


def plot_length_curves(axes: np.ndarray, curves: dict[str, pd.DataFrame]) -> np.ndarray:
    """Draw `effects.length_curves` on two axes: who wins, and ties, by the length ratio."""
    bins, ties = curves["longer_bins"], curves["ties_bins"]
    if ties.empty:
        return np.array([explain(ax, "No battle to show.") for ax in axes])
    x = "words of the longer over the shorter answer"
    _draw_curve(axes[0], curves["longer"], bins, ACCENT)
    axes[0].axhline(0.5, **BLACK)
    trends = curves["trends"].set_index("what")["p_value"]
    title = _compare_ends(bins, "Wins of the longer", trends["longer"])
    label_axes(axes[0], title, x, "P(longer wins | decided)", percent_on="y")
    _draw_curve(axes[1], curves["ties"], ties, LABEL_COLORS[TIE])
    label_axes(axes[1], _compare_ends(ties, "Ties", trends["ties"]), x, "P(tie)", percent_on="y")
    return axes


def _compare_ends(bins: pd.DataFrame, what: str, p_value: float) -> str:
    """State the first and the last bin where the rate has a trend."""
    if not p_value < ALPHA or len(bins) < 2:
        return f"{what}: no measurable trend with unequal lengths"
    return f"{what}: {' → '.join(_write_share(bins.iloc[end]) for end in (0, -1))}"


def _draw_curve(ax: Axes, curve: pd.DataFrame, bins: pd.DataFrame, color: str) -> None:
    """Draw a rate as a smooth curve with its band, over its bins, by a log ratio from 0 up."""
    # Beyond the middle of the outer bins few battles bend the curve.
    curve = curve[curve["value"].between(bins["value"].min(), bins["value"].max())]
    band: dict[str, Any] = {"alpha": 0.2, "linewidth": 0, "label": "95 % band"}
    ax.fill_between(curve["value"], curve["low"], curve["high"], color=color, **band)
    ax.plot(curve["value"], curve["share"], color=color, label="smooth curve")
    look = {"color": "#777777", "markersize": 4, "label": "equal bins"}
    draw_intervals(ax, bins, "share", bins["value"], vertical=True, **look)
    end = max([0.0, *curve["value"], *bins["value"]])
    ratios = (1, 1.5, 2, 3, 5, 8, 16, 32) if end < np.log(6) else (1, 2, 4, 8, 16, 32)
    ticks = [ratio for ratio in ratios if np.log(ratio) <= end]
    ax.set_xticks(np.log(ticks), [f"{ratio:g}×" for ratio in ticks])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize=9)


def plot_token_distribution(
    ax: Axes, lengths: dict[str, np.ndarray], budgets: Sequence[int] = (1024, 512, 2048, 3072)
) -> Axes:
    """Show how long battles are, tokenizer -> (N,) int tokens, and what each budget truncates.

    The title is about the first budget; budgets that no battle comes near are left out.
    """
    every = np.maximum(np.concatenate(list(lengths.values())), 1)
    main, longest = budgets[0], int(every.max())
    shown = [budget for budget in sorted(budgets) if budget <= 1.5 * longest]
    end = 1.2 * max(longest, *shown, 1)
    edges = np.geomspace(max(np.quantile(every, 0.002), 1), end, 50)
    colors = (ACCENT, "#CC79A7", "#E69F00", "#56B4E9")
    for (name, counts), color in zip(lengths.items(), colors, strict=False):
        cuts = [f"over {n:,}: {percent(float((counts > n).mean()))}" for n in shown]
        label = "\n".join([name, f"median {np.median(counts):,.0f}", *cuts])
        ax.hist(counts, edges.tolist(), color=color, label=label, histtype="step", linewidth=2)
    for budget in shown:
        ax.axvline(budget, linestyle=":", **BLACK)
    ax.set_xscale("log")
    ticks = [n for n in sorted({16, 32, 64, 128, 256, *shown, 8192}) if edges[0] <= n <= end]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    ax.minorticks_off()
    ax.set_xlim(edges[0], edges[-1])
    place_legend(ax)
    first, counts = next(iter(lengths.items()))
    cut = percent(float((counts > main).mean()))
    of = f" ({first})" if len(lengths) > 1 else ""
    title = f"A budget of {main:,} tokens truncates {cut} of these battles{of}"
    if not (counts > main).any():
        title = f"No battle is longer than {main:,} tokens: the longest has {counts.max():,}{of}"
    x = "tokens of prompt and both answers (log scale; dotted: budgets)"
    return label_axes(ax, title, x, "battles")


def plot_effects(ax: Axes, effects: dict[str, pd.DataFrame], n_shown: int = 14) -> Axes:
    """Compare two series of `effects.effect_sizes`; the second gives order and title.

    The largest effects are shown; the title counts all of them.
    """
    (first, others), (name, table) = effects.items()
    known = table.dropna(subset=["log_odds"])
    if known.empty:
        return explain(ax, "No effect can be estimated from these battles.")
    size = known["log_odds"].abs()
    shown = known[size >= size.nlargest(n_shown).iloc[-1]].sort_values("log_odds")
    series = {first: (MUTED, others), name: (ACCENT, known)}
    draw_rows(ax, series, "log_odds", "effect", shown["effect"].tolist())
    n_clear = int(is_clear(known).sum())
    corrected = " (Holm's correction)" if "p_holm" in known else ""
    some = f", the {len(shown)} largest shown" if len(shown) < len(known) else ""
    title = f"{n_clear} of {len(known)} effects move the vote {name}{corrected}{some}"
    x = "log-odds of winning per standard deviation (95 % interval)"
    return label_axes(ax, title, x, "")


def plot_strengths(ax: Axes, strengths: dict[str, pd.DataFrame], n_shown: int = 15) -> Axes:
    """Compare two series of `ranking.VoteModel.strengths`; the first gives the order."""
    first = next(iter(strengths.values())).dropna(subset=["strength"])
    if first.empty:
        return explain(ax, "No strength can be estimated: too few battles between named chatbots.")
    order = first.nlargest(n_shown, "n").sort_values("strength")["model"].tolist()
    pairs = zip((MUTED, ACCENT), strengths.items(), strict=True)
    series = {name: (color, rows[rows["model"].isin(order)]) for color, (name, rows) in pairs}
    draw_rows(ax, series, "strength", "model", order)
    counts = [f"{int(is_clear(rows).sum())} {name}" for name, (_, rows) in series.items()]
    title = f"Measurably above or below the mean of {len(order)} chatbots: {', '.join(counts)}"
    return label_axes(ax, title, "strength, log-odds against the mean (95 % interval)", "")


def plot_planted(ax: Axes, planted: pd.Series, estimated: pd.DataFrame) -> Axes:
    """Compare `ranking.VoteModel.effects` with planted ones, by name, in units of the latter."""
    columns = ["log_odds_per_unit", "low", "high"]
    rows = estimated.set_index("effect").loc[list(planted.index), columns].div(planted, axis=0)
    # Dividing by a negative effect exchanges the bounds.
    rows["low"], rows["high"] = rows[["low", "high"]].min(axis=1), rows[["low", "high"]].max(axis=1)
    names = [f"{name} ({size:+.2f})" for name, size in planted.items()]
    draw_intervals(ax, rows[::-1], "log_odds_per_unit", range(len(rows)), color=ACCENT)
    ax.set_yticks(range(len(rows)), names[::-1])
    ax.axvline(1, **BLACK)
    missed = rows.index[(rows["low"] > 1) | (rows["high"] < 1)]
    title = f"{len(rows) - len(missed)} of {len(rows)} intervals cover the planted effect"
    if len(missed):
        title += f"; not that of {', '.join(missed)} (one in twenty is expected to miss)"
    x = "estimated over planted effect (95 % interval); planted log-odds in brackets"
    return label_axes(ax, title, x, "")


def plot_word_effects(ax: Axes, words: pd.DataFrame, n_shown: int = 15) -> Axes:
    """Show which words and signs move a vote, from `insight.word_effects`, and what a model uses.

    The `n_shown` strongest of each sign are shown, by how clear their effect is.
    """
    known = words.dropna(subset=["log_odds"])
    if known.empty:
        return explain(ax, "Too few battles to estimate the effect of a word.")
    parts = []
    for side in (known[known["log_odds"] < 0], known[known["log_odds"] > 0]):
        parts.append(side.nsmallest(n_shown, "p_value"))
    shown = pd.concat(parts).sort_values("log_odds", ignore_index=True)
    draw_rows(ax, {"": (ACCENT, shown)}, "log_odds", "word", shown["word"].tolist())
    ax.tick_params(axis="y", labelsize=9)
    ax.plot(
        shown["weight"], range(len(shown)), "k|", markersize=9, label="weight in the\nsaved model"
    )
    place_legend(ax)
    n_clear = int(is_clear(known).sum())
    title = f"{n_clear} of {len(known):,} frequent words and signs move a vote (Holm's correction)"
    x = "log-odds of winning per SD more of it, at equal length (95 % interval)"
    return label_axes(ax, title, x, "")


def plot_data_curve(ax: Axes, curve: pd.DataFrame, trend: pd.DataFrame, guides: Any) -> Axes:
    """Show log loss by the number of battles learned from, from `insight.learning_curve`.

    Args:
        trend: of `insight.extrapolate`; its last row is the number that the title is about.
        guides: name -> log loss of what knows nothing or everything, drawn as lines.
    """
    draw_intervals(ax, curve, "log_loss", curve["battles"], vertical=True, color=ACCENT)
    if len(trend):
        band: dict[str, Any] = {"color": ACCENT, "alpha": 0.2, "linewidth": 0}
        ax.plot(trend["battles"], trend["log_loss"], "--", color=ACCENT, label="trend")
        ax.fill_between(trend["battles"], trend["low"], trend["high"], **band, label="95 % band")
    for (name, loss), style in zip(guides.items(), ("-", ":"), strict=False):
        ax.axhline(loss, linestyle=style, label=f"{name}\n{loss:.3f}", **BLACK)
    ax.set_xscale("log")
    ticks = sorted({int(n) for n in curve["battles"]} | set(trend["battles"].tail(1).astype(int)))
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    ax.minorticks_off()
    place_legend(ax)
    x = "battles learned from (log scale)"
    title = "Too few sizes to say what more battles would bring"
    if len(trend):
        end = trend.iloc[-1]
        gain = with_interval(end["gain"], end["gain_low"], end["gain_high"])
        title = f"{int(end['battles']):,} battles would bring {gain} nats more, if the trend holds"
        if not end["gain_low"] > 0:
            title = f"No measurable gain from {int(end['battles']):,} battles: {gain} nats"
    return label_axes(ax, title, x, "log loss (95 % interval)")
