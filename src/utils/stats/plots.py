"""Figures, one claim each: `plot_x(ax, arrays) -> ax`.

A function draws on the axes that it is given; it never opens, shows or saves a
figure. A, B and tie have one fixed colour everywhere.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import PercentFormatter

from src.utils.schema import A_WINS, LABEL_NAMES, TIE

# Okabe-Ito colours, told apart by colour-blind readers, in LABELS order.
LABEL_COLORS = ("#0072B2", "#D55E00", "#7F7F7F")
ACCENT, MUTED = "#009E73", "#BBBBBB"


def use_style() -> None:
    """Set the suite's look once, in a notebook's import cell."""
    sns.set_theme(
        style="whitegrid", context="notebook", rc={"axes.titleweight": "bold", "axes.titlesize": 12}
    )
    plt.rcParams["figure.dpi"] = 100


def percent(share: float) -> str:
    """Write a share for a title: 0.613 -> "61.3 %" (with a no-break space), NaN -> "–"."""
    return "–" if np.isnan(share) else f"{100 * share:.1f}\u00a0%"


def _percent_axis(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1))


def _say(ax: Axes, text: str) -> Axes:
    """Fill axes that have nothing to show with the reason."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", wrap=True, transform=ax.transAxes)
    return ax


def _draw_intervals(
    ax: Axes, table: pd.DataFrame, value: str, y: np.ndarray, **style: object
) -> None:
    """Dots with horizontal intervals `low` to `high`; rows without a value are left out."""
    kept = table[value].notna().to_numpy()
    rows = table[kept]
    reach = np.abs(
        rows[["low", "high"]].to_numpy(dtype=float).T - rows[value].to_numpy(dtype=float)
    )
    ax.errorbar(rows[value], y[kept], xerr=reach, fmt="o", capsize=3, markersize=5, **style)


def plot_winner_shares(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Show who wins, with intervals.

    Args:
        ax: axes to draw on.
        shares: from `bias.winner_shares`: outcome, n, share, low, high.
    """
    reach = np.abs(shares[["low", "high"]].to_numpy().T - shares["share"].to_numpy())
    bars = ax.bar(shares["outcome"], shares["share"], yerr=reach, color=LABEL_COLORS, capsize=6)
    ax.bar_label(
        bars,
        [f"{percent(row.share)}\nn = {row.n:,}" for row in shares.itertuples()],
        label_type="center",
        color="white",
    )
    a, b, tie = shares["share"]
    ax.set(xlabel="vote", ylabel="share of battles (95 % interval)")
    ax.set_title(
        f"A wins {percent(a)}, B wins {percent(b)}, and {percent(tie)} are ties", loc="left"
    )
    _percent_axis(ax.yaxis)
    return ax


def plot_models_usage(ax: Axes, records: pd.DataFrame, n_shown: int = 25) -> Axes:
    """Show how many battles each chatbot fought.

    Args:
        ax: axes to draw on.
        records: from `bias.model_records`, most battles first.
        n_shown: chatbots at most.
    """
    if records.empty:
        return _say(ax, "No chatbot is named in these battles.")
    shown = records.head(n_shown)[::-1]
    ax.barh(shown["model"], shown["n"], color=ACCENT)
    ax.set(xlabel="battles fought, in either position", ylabel="chatbot")
    first = records.iloc[0]
    among = f", the {len(shown)} busiest shown" if len(records) > len(shown) else ""
    ax.set_title(
        f"{len(records)} chatbots{among}: {first['model']} fought {first['n']:,} battles",
        loc="left",
    )
    return ax


def plot_win_rates(
    ax: Axes, records: pd.DataFrame, min_battles: int = 30, n_shown: int = 25
) -> Axes:
    """Rank the chatbots by their share of decided battles won, with intervals.

    Args:
        ax: axes to draw on.
        records: from `bias.model_records`.
        min_battles: chatbots with fewer are left out.
        n_shown: chatbots at most, those with most battles.
    """
    shown = (
        records[(records["n"] >= min_battles) & (records["n_decided"] > 0)]
        .head(n_shown)
        .sort_values("win_share")
    )
    if shown.empty:
        return _say(ax, f"No named chatbot fought {min_battles} battles or more.")
    _draw_intervals(ax, shown, "win_share", np.arange(len(shown)), color=ACCENT)
    labels = [f"{row.model} ({row.n_decided:,})" for row in shown.itertuples()]
    ax.set_yticks(np.arange(len(shown)), labels)
    ax.axvline(0.5, color="black", linewidth=1)
    ax.set(
        xlabel="share of decided battles won (95 % interval)", ylabel="chatbot (decided battles)"
    )
    best, worst = shown.iloc[-1], shown.iloc[0]
    ax.set_title(
        f"From {percent(worst['win_share'])} ({worst['model']}) to {percent(best['win_share'])} ({best['model']})",
        loc="left",
    )
    _percent_axis(ax.xaxis)
    return ax


def plot_length_difference(
    ax: Axes, n_chars_a: np.ndarray, n_chars_b: np.ndarray, labels: np.ndarray
) -> Axes:
    """Show by how much the winner is longer.

    Args:
        ax: axes to draw on.
        n_chars_a: (N,) characters of answer A.
        n_chars_b: (N,) characters of answer B.
        labels: (N,) int, 0 A, 1 B, 2 tie; ties are left out.
    """
    decided = labels != TIE
    gain = np.where(labels == A_WINS, n_chars_a - n_chars_b, n_chars_b - n_chars_a)[decided]
    if not len(gain):
        return _say(ax, "No decided battle.")
    reach = max(float(np.quantile(np.abs(gain), 0.98)), 1.0)
    bins = np.linspace(-reach, reach, 41)
    for part, color, name in (
        (gain < 0, MUTED, "winner is shorter"),
        (gain > 0, ACCENT, "winner is longer"),
    ):
        ax.hist(gain[part], bins=bins, color=color, label=f"{name}: {part.sum():,}")
    median = float(np.median(gain))
    ax.axvline(0, color="black", linewidth=1)
    ax.axvline(median, color=ACCENT, linestyle="--", label=f"median {median:+,.0f} characters")
    ax.set(
        xlabel="characters of the winner − characters of the loser (middle 98 %)",
        ylabel="decided battles",
    )
    share = (gain > 0).sum() / max((gain != 0).sum(), 1)
    ax.set_title(f"The longer answer wins {percent(share)} of decided battles", loc="left")
    ax.legend()
    return ax


def plot_prompt_and_length_difference(ax: Axes, bins: pd.DataFrame) -> Axes:
    """Show whether the pull of length depends on the prompt's length.

    Args:
        ax: axes to draw on.
        bins: from `bias.larger_wins_by` of prompt length: left, right (characters), n,
            share (won by the longer answer), low, high.
    """
    kept = bins.dropna(subset=["share"])
    if kept.empty:
        return _say(ax, "No decided battle with answers of different length.")
    x = np.arange(len(kept))
    reach = np.abs(kept[["low", "high"]].to_numpy().T - kept["share"].to_numpy())
    ax.errorbar(x, kept["share"], yerr=reach, fmt="o-", color=ACCENT, capsize=4)
    ax.set_xticks(
        x, [f"{row.left:,.0f}–{row.right:,.0f}\nn = {row.n:,}" for row in kept.itertuples()]
    )
    ax.axhline(0.5, color="black", linewidth=1)
    ax.set(
        xlabel="characters of the prompt, decided battles",
        ylabel="won by the longer answer (95 % interval)",
    )
    low, high = kept["share"].min(), kept["share"].max()
    ax.set_title(
        f"By prompt length, {percent(low)} to {percent(high)} go to the longer answer", loc="left"
    )
    _percent_axis(ax.yaxis)
    return ax


def plot_punctuation_winner(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Compare, mark by mark, how often the answer with more of it wins: by count and per character.

    Args:
        ax: axes to draw on.
        shares: one row a mark and measure: caption, measure ("count" or "per character"),
            share, low, high.
    """
    shares = shares.dropna(subset=["share"])
    if shares.empty:
        return _say(ax, "No decided battle with answers that differ in punctuation.")
    marks = list(dict.fromkeys(shares["caption"]))[::-1]
    series = (("count", MUTED, 0.12), ("per character", ACCENT, -0.12))
    for measure, color, shift in series:
        part = shares[shares["measure"] == measure]
        y = part["caption"].map(marks.index).to_numpy(dtype=float) + shift
        _draw_intervals(ax, part, "share", y, color=color, label=measure)
    ax.set_yticks(range(len(marks)), marks)
    ax.axvline(0.5, color="black", linewidth=1)
    ax.set(xlabel="decided battles won by the answer with more (95 % interval)", ylabel="mark")
    first = shares[shares["caption"] == marks[-1]].set_index("measure")["share"].map(percent)
    said = ", ".join(
        f"{share} {'by count' if measure == 'count' else measure}"
        for measure, share in first.items()
    )
    ax.set_title(f"More {marks[-1]} win: {said}", loc="left")
    ax.legend()
    _percent_axis(ax.xaxis)
    return ax


def plot_position_by(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Show whether the preference for position A depends on the battle.

    Args:
        ax: axes to draw on.
        shares: from `bias.position_by`: property, level, n, share, low, high, p_value.
    """
    rows = shares[shares["n"] > 0]
    if rows.empty:
        return _say(ax, "No decided battle.")
    y = np.arange(len(rows))[::-1]
    properties = list(dict.fromkeys(rows["property"]))
    for place, name in enumerate(properties):
        inside = (rows["property"] == name).to_numpy()
        _draw_intervals(ax, rows[inside], "share", y[inside], color=(ACCENT, "black")[place % 2])
    ax.set_yticks(y, [f"{row.property}: {row.level} (n = {row.n:,})" for row in rows.itertuples()])
    ax.axvline(0.5, color="black", linewidth=1)
    ax.set(
        xlabel="decided battles won by position A (95 % interval)",
        ylabel="battles with …",
        ylim=(-0.6, len(rows) - 0.4),
    )
    n_moved = int((rows.groupby("property")["p_value"].first() < 0.05 / len(properties)).sum())
    ax.set_title(
        f"Position A's share depends on {n_moved} of {len(properties)} properties", loc="left"
    )
    _percent_axis(ax.xaxis)
    return ax


_RATIOS = (1, 1.5, 2, 3, 5, 8, 16, 32)


def plot_smooth_curve(
    ax: Axes,
    curve: pd.DataFrame,
    bins: pd.DataFrame,
    color: str = ACCENT,
    null: float | None = None,
) -> Axes:
    """Draw a rate as a smooth curve with its band over binned rates; the caller names the claim.

    Args:
        ax: axes to draw on.
        curve: from `bias.smooth_rate`; value is a log ratio, 0 or above.
        bins: from `bias.larger_wins_by` or `win_rate_by` of the same, drawn as dots.
        color: of line and band.
        null: the rate that would mean no effect, drawn as a line.
    """
    bins = bins.dropna(subset=["share"])
    if curve.empty and bins.empty:
        return _say(ax, "No battle to show.")
    if null is not None:
        ax.axhline(null, color="black", linewidth=1)
    ax.fill_between(
        curve["value"],
        curve["low"],
        curve["high"],
        color=color,
        alpha=0.2,
        linewidth=0,
        label="95 % band",
    )
    ax.plot(curve["value"], curve["share"], color=color, label="smooth curve")
    shown = bins if curve.empty else bins[bins["value"] <= curve["value"].max()]
    reach = np.abs(
        shown[["low", "high"]].to_numpy(dtype=float).T - shown["share"].to_numpy(dtype=float)
    )
    ax.errorbar(
        shown["value"],
        shown["share"],
        yerr=reach,
        fmt="o",
        color=MUTED,
        markersize=4,
        label="equal bins",
    )
    end = max(
        curve["value"].max() if len(curve) else 0.0, shown["value"].max() if len(shown) else 0.0
    )
    ticks = [ratio for ratio in _RATIOS if np.log(ratio) <= end] or [1]
    ax.set_xticks(np.log(ticks), [f"{ratio:g}×" for ratio in ticks])
    ax.legend(loc="best")
    _percent_axis(ax.yaxis)
    return ax


def plot_token_distribution(
    ax: Axes, lengths: dict[str, np.ndarray], budgets: tuple[int, ...] = (512, 1024, 2048, 3072)
) -> Axes:
    """Show how long battles are in the tokens of each tokenizer, and what each budget truncates.

    Args:
        ax: axes to draw on.
        lengths: tokenizer -> (N,) int, tokens of each battle.
        budgets: tokens that a model may read of one battle.
    """
    every = np.maximum(np.concatenate(list(lengths.values())), 1)
    edges = np.geomspace(max(np.quantile(every, 0.002), 1), max(every.max(), budgets[-1]) * 1.2, 50)
    colors = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for (name, counts), color in zip(lengths.items(), colors, strict=False):
        ax.hist(
            counts,
            bins=edges,
            histtype="step",
            linewidth=2,
            color=color,
            label=f"{name}, median {np.median(counts):,.0f}",
        )
    ax.set_xscale("log")
    top = ax.get_ylim()[1] * 1.3
    for budget in budgets:
        cut = "\n".join(percent(float((counts > budget).mean())) for counts in lengths.values())
        ax.axvline(budget, color="black", linewidth=1, linestyle=":")
        ax.text(budget, top * 0.98, f" {cut}", va="top", fontsize=9)
    ax.set_xticks(
        [64, 128, 256, *budgets, 8192],
        [f"{tick:,}" for tick in (64, 128, 256, *budgets, 8192)],
        rotation=45,
    )
    ax.minorticks_off()
    ax.set(ylim=(0, top), xlim=(edges[0], edges[-1]), ylabel="battles")
    ax.set_xlabel("tokens of prompt and both answers (log scale; at each budget: share truncated)")
    first = next(iter(lengths))
    cut = percent(float((lengths[first] > budgets[1]).mean()))
    ax.set_title(
        f"A budget of {budgets[1]:,} tokens truncates {cut} of battles ({first})", loc="left"
    )
    ax.legend(
        loc="upper left",
        title="one line a tokenizer, in this order at each budget" if len(lengths) > 1 else None,
    )
    return ax


def plot_effects(ax: Axes, effects: dict[str, pd.DataFrame]) -> Axes:
    """Forest plot: effects in log-odds per standard deviation, with intervals.

    Args:
        ax: axes to draw on.
        effects: series name -> rows of `bias.effect_sizes` (effect, log_odds, low, high); the
            first series is drawn muted, the second accented, and gives the order.
    """
    order = (
        list(effects.values())[-1]
        .dropna(subset=["log_odds"])
        .sort_values("log_odds")["effect"]
        .tolist()
    )
    if not order:
        return _say(ax, "No effect can be estimated from these battles.")
    shifts = np.linspace(0.15, -0.15, len(effects)) if len(effects) > 1 else [0.0]
    for (name, table), color, shift in zip(
        effects.items(), (MUTED, ACCENT)[-len(effects) :], shifts, strict=True
    ):
        part = table[table["effect"].isin(order)]
        y = part["effect"].map(order.index).to_numpy(dtype=float) + shift
        _draw_intervals(ax, part, "log_odds", y, color=color, label=name)
    ax.set_yticks(range(len(order)), order)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="log-odds of winning per standard deviation (95 % interval)", ylabel="more of …")
    last = list(effects.values())[-1].set_index("effect")
    n_clear = int(((last["low"] > 0) | (last["high"] < 0)).sum())
    ax.set_title(
        f"{n_clear} of {len(order)} style differences move the vote, {list(effects)[-1]}",
        loc="left",
    )
    ax.legend(loc="lower right")
    return ax


def plot_strengths(ax: Axes, strengths: dict[str, pd.DataFrame], n_shown: int = 25) -> Axes:
    """Leaderboard before and after control for style.

    Args:
        ax: axes to draw on.
        strengths: series name -> `VoteModel.strengths`; the first, drawn muted, gives the order.
        n_shown: chatbots at most, those with most battles.
    """
    first = next(iter(strengths.values())).dropna(subset=["strength"])
    if first.empty:
        return _say(ax, "No strength can be estimated: too few battles between named chatbots.")
    order = first.nlargest(n_shown, "n").sort_values("strength")["model"].tolist()
    spreads = {}
    for (name, table), color, shift in zip(
        strengths.items(), (MUTED, ACCENT), (0.15, -0.15), strict=True
    ):
        part = table[table["model"].isin(order)]
        y = part["model"].map(order.index).to_numpy(dtype=float) + shift
        _draw_intervals(ax, part, "strength", y, color=color, label=name)
        spreads[name] = part["strength"].std()
    ax.set_yticks(range(len(order)), order)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="strength, log-odds against the mean (95 % interval)", ylabel="chatbot")
    said = ", ".join(f"{spread:.2f} {name}" for name, spread in spreads.items())
    ax.set_title(f"Spread of strengths: {said}", loc="left")
    ax.legend(loc="lower right")
    return ax


def plot_planted(ax: Axes, planted: pd.Series, estimated: pd.DataFrame) -> Axes:
    """Lay estimated effects beside those that were planted, each divided by the planted size.

    Args:
        ax: axes to draw on.
        planted: true effect, indexed by name, none of them 0.
        estimated: effect, log_odds_per_unit, low, high.
    """
    rows = estimated.set_index("effect").loc[
        list(planted.index), ["log_odds_per_unit", "low", "high"]
    ]
    ratios = rows.div(planted, axis=0)
    # Dividing by a negative effect exchanges the bounds.
    bounds = np.sort(ratios[["low", "high"]].to_numpy(), axis=1)
    ratios = ratios.assign(low=bounds[:, 0], high=bounds[:, 1])
    _draw_intervals(ax, ratios, "log_odds_per_unit", np.arange(len(ratios))[::-1], color=ACCENT)
    ax.set_yticks(
        np.arange(len(ratios))[::-1], [f"{name} ({value:+.2f})" for name, value in planted.items()]
    )
    ax.axvline(1, color="black", linewidth=1)
    ax.set(xlabel="estimated / planted effect (95 % interval)", ylabel="effect (planted size)")
    covered = int(((bounds[:, 0] <= 1) & (bounds[:, 1] >= 1)).sum())
    ax.set_title(f"{covered} of {len(ratios)} intervals cover the planted effect", loc="left")
    return ax


def plot_probabilities(ax: Axes, probs: np.ndarray) -> Axes:
    """Draw how the predicted probabilities of A, B and tie spread over the battles.

    Args:
        ax: where to draw.
        probs: (N, C) float, rows sum to 1.
    """
    edges = np.linspace(0, 1, 26)
    for name, color, column in zip(LABEL_NAMES, LABEL_COLORS, probs.T, strict=True):
        ax.hist(column, bins=edges, histtype="step", linewidth=2, color=color, label=f"P({name})")
    sure = (probs.max(axis=1) > 0.9).mean() if len(probs) else 0.0
    ax.set(xlim=(0, 1), xlabel="predicted probability", ylabel="battles")
    ax.set_title(f"{sure:.0%} of the battles get a probability above 0.9")
    ax.legend(frameon=False)
    return ax


def plot_ladder(
    ax: Axes,
    names: list[str],
    means: np.ndarray,
    lows: np.ndarray,
    highs: np.ndarray,
    best: float | None = None,
) -> Axes:
    """Draw log losses as rungs, first at the top, the last accented.

    Args:
        ax: axes to draw on.
        names: K models, from the simplest to the fullest.
        means: (K,) float, log loss in nats per battle.
        lows: (K,) float, lower bounds of the 95 % intervals.
        highs: (K,) float, upper bounds.
        best: the best reachable log loss, where it is known.
    """
    means, rungs = np.asarray(means), np.arange(len(names))[::-1]
    colors, white = (
        [MUTED] * (len(names) - 1) + [ACCENT],
        {"facecolor": "white", "linewidth": 0, "pad": 1},
    )
    for rung, mean, low, high, color in zip(rungs, means, lows, highs, colors, strict=True):
        ax.errorbar(
            mean,
            rung,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=color,
            capsize=4,
            markersize=8,
        )
        ax.annotate(
            f"{mean:.4f}",
            (mean, rung),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            bbox=white,
        )
    if best is not None:
        ax.axvline(best, color="black", linestyle="--", label=f"best reachable {best:.4f}")
        ax.legend(loc="lower right")
    ax.set_yticks(rungs, names)
    ax.set(xlabel="log loss, nats per battle (95 % interval), lower is better", ylabel="model")
    ax.set_ylim(-0.6, len(names) - 0.3)
    ax.set_title(f"{names[-1]} takes {means[0] - means[-1]:.3f} nats off {names[0]}", loc="left")
    return ax


def plot_reliability(ax: Axes, curve: pd.DataFrame, ece: float) -> Axes:
    """Draw observed against predicted shares for A, B and tie.

    Args:
        ax: axes to draw on.
        curve: from `metrics.reliability_curve`: label, predicted, observed, low, high.
        ece: expected calibration error, 0..1.
    """
    reach = min(1.0, float(curve[["predicted", "high"]].to_numpy().max()) + 0.05)
    ax.plot([0, reach], [0, reach], color="black", linewidth=1)
    for label, bins in curve.groupby("label"):
        ends = np.abs(bins[["low", "high"]].to_numpy().T - bins["observed"].to_numpy())
        ax.errorbar(
            bins["predicted"], bins["observed"], yerr=ends, fmt="o-", capsize=3, markersize=4,
            color=LABEL_COLORS[label], label=LABEL_NAMES[label],
        )  # fmt: skip
    ax.set(
        xlabel="predicted probability",
        ylabel="observed share (95 % interval)",
        xlim=(0, reach),
        ylim=(0, reach),
    )
    ax.set_title(f"Confidence and accuracy lie {percent(ece)} apart on average", loc="left")
    ax.legend()
    _percent_axis(ax.xaxis)
    _percent_axis(ax.yaxis)
    return ax


def plot_coefficients(ax: Axes, effects: pd.DataFrame, n_shown: int = 15) -> Axes:
    """Draw what a model makes of each feature, the strongest at the top.

    Args:
        ax: axes to draw on.
        effects: caption, effect (log-odds per standard deviation), the strongest first.
        n_shown: features at most.
    """
    shown = effects.head(n_shown)[::-1]
    colors = np.where(shown["effect"] > 0, ACCENT, MUTED)
    ax.barh(shown["caption"], shown["effect"], color=colors)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(
        xlabel="log-odds of winning per standard deviation more than the other answer",
        ylabel="more of …",
    )
    first = effects.iloc[0]
    ax.set_title(
        f"Strongest, all else equal: {first['caption']} ({first['effect']:+.2f})", loc="left"
    )
    return ax


def plot_preferences(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Lay the leanings of a model beside those of people, on the same battles.

    Args:
        ax: axes to draw on.
        shares: one row a leaning and voter: leaning, voter ("people" or "model"), and share, low,
            high and n of `metrics.preference_share`.
    """
    shares = shares.dropna(subset=["share"])
    counts = shares.drop_duplicates("leaning").set_index("leaning")["n"][::-1]
    for voter, color, shift in (("people", "black", 0.12), ("model", ACCENT, -0.12)):
        part = shares[shares["voter"] == voter]
        y = part["leaning"].map(list(counts.index).index).to_numpy(dtype=float) + shift
        _draw_intervals(ax, part, "share", y, color=color, label=voter)
    ax.set_yticks(range(len(counts)), [f"{leaning} (n = {n:,})" for leaning, n in counts.items()])
    ax.set_ylim(-0.5, len(counts) - 0.5)
    ax.axvline(0.5, color="black", linewidth=1)
    ax.set(
        xlabel="share of decided votes (95 % interval)",
        ylabel="votes for … (battles that differ in it)",
    )
    people, model = (
        shares[shares["voter"] == voter].set_index("leaning") for voter in ("people", "model")
    )
    n_inside = int(model["share"].between(people["low"], people["high"]).sum())
    ax.set_title(
        f"On {n_inside} of {len(counts)} leanings the model is where people may well be", loc="left"
    )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _percent_axis(ax.xaxis)
    return ax


def plot_token_lengths(ax: Axes, lengths: np.ndarray, budget: int) -> Axes:
    """Show how long battles are, and which are cut.

    Args:
        ax: axes to draw on.
        lengths: (N,) int, tokens of each battle before anything is cut.
        budget: most tokens that the model reads of one battle.
    """
    top = max(budget * 1.25, np.quantile(lengths, 0.99))
    # The last bar gathers what lies beyond the axis.
    ax.hist(np.minimum(lengths, top), bins=np.linspace(0, top, 41), color=ACCENT)
    ax.axvline(budget, color="black", linewidth=1.5)
    ax.text(budget, ax.get_ylim()[1] * 0.95, f" budget {budget:,}", va="top")
    ax.set(
        xlim=(0, top),
        xlabel="tokens of a battle (the last bar holds all longer ones)",
        ylabel="battles",
    )
    ax.set_title(f"{percent(float((lengths > budget).mean()))} of the battles are cut", loc="left")
    return ax


def plot_budgets(ax: Axes, budgets: pd.DataFrame) -> Axes:
    """Show what smaller token budgets cost, and how many battles each cuts.

    Args:
        ax: axes to draw on.
        budgets: from `budgets.measure_budgets`: budget, cut_share, cost, low, high; the longest
            budget with a cost is the one that the others are compared to.
    """
    place, is_read = np.arange(len(budgets)), budgets["cost"].notna().to_numpy()
    read = budgets[is_read]
    reach = np.abs(read[["low", "high"]].to_numpy().T - read["cost"].to_numpy()).clip(min=0)
    ax.errorbar(place[is_read], read["cost"], yerr=reach, fmt="o-", capsize=5, color=ACCENT)
    ax.axhline(0, color="black", linewidth=1)
    names = [f"{row.budget:,}\n{percent(row.cut_share)}" for row in budgets.itertuples()]
    ax.set_xticks(place, names)
    least, own, dearest = read["budget"].iloc[0], read["budget"].iloc[-1], read["cost"].iloc[0]
    ax.set_xlabel("tokens of a battle at most, and the share of battles that this cuts")
    ax.set_ylabel("log loss added, nats per battle")
    ax.set_xlim(-0.5, len(budgets) - 0.5)
    ax.set_title(
        f"{least:,} tokens instead of {own:,} cost {dearest:+.4f} nats per battle", loc="left"
    )
    return ax


def plot_learning_curve(
    ax: Axes, history: pd.DataFrame, prior: float, best: float | None = None
) -> Axes:
    """Show how the loss fell in training, beside what knows nothing and what knows everything.

    Args:
        ax: axes to draw on.
        history: fold, seed, epoch, train_loss, log_loss (nats per battle), one row a validation.
        prior: log loss of the class shares, nats per battle.
        best: log loss of the true probabilities, where they are known.
    """
    models = history.groupby(["fold", "seed"])
    for place, (_, rows) in enumerate(models):
        names = ("held out", "training") if place == 0 else (None, None)
        ax.plot(rows["epoch"], rows["log_loss"], marker="o", color=ACCENT, label=names[0])
        ax.plot(
            rows["epoch"],
            rows["train_loss"],
            marker=".",
            linestyle=":",
            color=MUTED,
            label=names[1],
        )
    ax.axhline(prior, color="black", linewidth=1, linestyle="--", label=f"class shares {prior:.3f}")
    if best is not None:
        ax.axhline(
            best,
            color=LABEL_COLORS[0],
            linewidth=1,
            linestyle="-.",
            label=f"best reachable {best:.3f}",
        )
    gain = prior - models["log_loss"].min().mean()
    side = "below" if gain > 0 else "above"
    ax.set(xlabel="epochs", ylabel="log loss (nats per battle)", xlim=(0, None))
    ax.set_title(f"Held-out battles: {abs(gain):.3f} nats {side} the class shares", loc="left")
    ax.legend(frameon=False)
    return ax


def plot_ablation(ax: Axes, worth: pd.DataFrame) -> Axes:
    """Draw what each family of features is worth, the dearest at the top.

    Args:
        ax: axes to draw on.
        worth: family, of, difference, low, high in nats per battle; above 0 it is worth having.
    """
    y = np.arange(len(worth))[::-1]
    for of, color, said in (
        ("A against B", ACCENT, "A against B"),
        ("tie", LABEL_COLORS[TIE], "a tie"),
    ):
        part = (worth["of"] == of).to_numpy()
        if part.any():
            _draw_intervals(
                ax, worth[part], "difference", y[part], color=color, label=f"in the odds of {said}"
            )
    ax.set_yticks(y, worth["family"])
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="log loss added by leaving it out, nats per battle (95 % interval)")
    n_sure = int((worth["low"] > 0).sum())
    ax.set_title(f"Missed by more than chance: {n_sure} of {len(worth)} families", loc="left")
    ax.legend(loc="lower right")
    return ax
