"""Say in a sentence what an estimate shows: true for any data, and silent where nothing is known.

A number is given with its 95 % interval, and called an effect only where that excludes none.
Tables are those of `stats.effects`, `stats.extras`, `stats.ranking` and `models.insight`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from src.utils.schema import clean_text
from src.utils.stats.plots import ALPHA, is_clear, number, with_interval

Found = Any  # a row or mapping with the names of `effects.win_share` or `effects.effect_sizes`


def share_of(found: Found) -> str:
    """Write a share with its interval: "61.8 % (57.9–65.7)"."""
    return with_interval(found["share"], found["low"], found["high"], "{:.1%}")


def size_of(row: Found, text: str = "{:+.2f}") -> str:
    """Write an effect of `effects.effect_sizes` with its interval: "+0.33 (+0.14 to +0.51)"."""
    return with_interval(row["log_odds"], row["low"], row["high"], text)


def join_names(names: Iterable[str], otherwise: str = "none", n_shown: int = 6) -> str:
    """Join names for a sentence: "a, b and c", or "a, b and 7 more"."""
    names = list(names)
    if len(names) > n_shown + 1:
        names = [*names[:n_shown], f"{len(names) - n_shown} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or otherwise


def literal(name: str) -> str:
    """Write a name from a file so that neither Markdown nor HTML reads anything into it."""
    return "".join(
        char if char.isalnum() or char in " -.,()" else f"&#{ord(char)};"
        for char in clean_text(str(name))
    )


def describe_gap(gap: float, low: float, high: float, reference: str) -> str:
    """Say how far a loss is from a reference, or that the interval (low, high) holds 0; nats."""
    if low <= 0 <= high:
        found = with_interval(gap, low, high, "{:+.3f}")
        return f"no measurable difference to {reference} ({found.replace(' (', ', ', 1)}"
    near, far = sorted((abs(low), abs(high)))
    side = "above" if gap > 0 else "below"
    return f"{abs(gap):.3f} nats ({near:.3f} to {far:.3f}) {side} {reference}"


def describe_winner(found: Found, who: str) -> str:
    """Say whether `who` ("position A", "the longer answer") wins more than half."""
    name = who[:1].upper() + who[1:]
    if found["n"] == 0:
        return f"No decided battle can tell whether {who} wins more often."
    of = f"{share_of(found)} of {found['n']:,} decided battles"
    if found["p_value"] < ALPHA:
        return f"{name} wins {'only ' if found['share'] < 0.5 else ''}**{of}**."
    return f"{name} wins {of}: no measurable preference."


def describe_ties(shares: pd.DataFrame, prior_log_loss: float) -> str:
    """Say how frequent ties are, and what a guess scores, from `effects.winner_shares`."""
    tie, most = shares.iloc[-1], shares.iloc[int(shares["share"].to_numpy().argmax())]
    text = f"Ties are {share_of(tie)} of votes." if tie["n"] else "No vote is a tie."
    return (
        f"{text} Always guessing “{most['outcome']}” would be right in {share_of(most)}. "
        f"The class prior, which knows only these shares, scores **{prior_log_loss:.3f} nats** "
        "per battle, lower is better: what every model must beat."
    )


def describe_near_equal(in_characters: Found, in_words: Found, n_chars: int, n_words: int) -> str:
    """Say who wins where the answers are about equally long, in both units of length."""
    parts = []
    for unit, n, found in (("characters", n_chars, in_characters), ("words", n_words, in_words)):
        text = describe_winner(found, "the longer answer")
        parts.append(f"Within {n} {unit} of each other, {text[:1].lower()}{text[1:]}")
    return " ".join(parts)


def describe_levels(table: pd.DataFrame, what: str) -> str:
    """Say on which properties of `effects.win_share_by_level` a share depends, and its extremes."""
    table = table[table["n"] > 0]
    p_values = table.groupby("property", sort=False)["p_value"].first().dropna()
    moved = p_values.index[p_values < ALPHA / max(len(p_values), 1)]
    parts = []
    for name in moved:
        parts.append(f"by {name}, from {_name_ends(table[table['property'] == name])}")
    if parts:
        return f"{what} differs {'; '.join(parts)}."
    return f"{what} does not measurably depend on {join_names(p_values.index, 'anything here')}."


def _name_ends(rows: pd.DataFrame) -> str:
    """Name the levels with the smallest and the largest share."""
    ends = rows.sort_values("share").iloc[[0, -1]].to_dict("records")
    return " to ".join(f"{share_of(row)} for {row['level']}" for row in ends)


def describe_grid(table: pd.DataFrame) -> str:
    """Name the cells of `effects.win_share_grid` in which the longer answer wins most and least."""
    clear = table[is_clear(table)].sort_values("share", ascending=False)
    if clear.empty:
        return (
            "No cell differs measurably from one half; empty or small cells can only vary widely."
        )
    ends = clear.iloc[[0, -1]] if len(clear) > 1 else clear
    parts = []
    for row in ends.to_dict("records"):
        where = f"prompts of {row['row']} characters, ratio {row['column']}"
        parts.append(f"{share_of(row)} for {where}")
    return f"Of the cells that differ from one half, the longer answer wins {join_names(parts)}."


def describe_interactions(table: pd.DataFrame) -> str:
    """Say what strengthens or weakens the effect of length, after Holm's correction."""
    clear = table[is_clear(table)]
    parts = []
    for row in clear.to_dict("records"):
        verb = "strengthens" if row["log_odds"] > 0 else "weakens"
        parts.append(f"{row['effect']} {verb} it, {size_of(row)}")
    return f"{join_names(parts)}." if parts else "Nothing measured here changes what length does."


def describe_effects(table: pd.DataFrame, n_named: int = 3) -> str:
    """Name the largest effects that are clear after Holm's correction, up and down."""
    clear = table[is_clear(table)].sort_values("log_odds", ascending=False)
    if clear.empty:
        return "At equal length no style difference moves the vote measurably."
    up, down = clear[clear["log_odds"] > 0], clear[clear["log_odds"] < 0][::-1]
    parts = []
    for rows, verb in ((up, "more of these helps"), (down, "more of these hurts")):
        named = [f"{row['effect']} {size_of(row)}" for row in rows[:n_named].to_dict("records")]
        if named:
            parts.append(f"{verb}: {join_names(named)}")
    return f"At equal length, {'; '.join(parts)} (log-odds per SD)."


def lay_out_verdict(verdict: pd.DataFrame, captions: Mapping[str, str]) -> pd.DataFrame:
    """Lay `effects.make_verdict` out for people: the shares, and the effects that were found."""
    is_share = verdict["measure"] == "share of decided"
    table = verdict[is_share | (verdict["found"] == "yes")]
    sizes = []
    for row in table.to_dict("records"):
        text = "{:+.2f}" if row["measure"] == "log-odds per SD" else "{:.1%}"
        unit = " per SD" if row["measure"] == "log-odds per SD" else " of decided"
        sizes.append(with_interval(row["size"], row["low"], row["high"], text) + unit)
    answers = {"yes": "yes", "no": "no measurable effect"}
    p_values = np.where(table["p_holm"] < 0.001, "< 0.001", table["p_holm"].map("{:.3f}".format))
    return pd.DataFrame(
        {
            "what": table["effect"].map(lambda name: captions.get(name, name)),
            "effect (95 % interval)": sizes,
            "p (Holm)": p_values,
            "moves a vote": table["found"].map(lambda name: answers.get(name, name)),
            "for a modeller": table["advice"],
        }
    )


def describe_shrinkage(alone: pd.DataFrame, equal: pd.DataFrame) -> str:
    """Say which effects are there alone and gone at equal length."""
    both = alone.merge(equal, on="effect", suffixes=("_alone", ""))
    is_alone = (both["p_value_alone"] < ALPHA / max(len(both), 1)) & both["log_odds"].notna()
    gone = both[is_alone & ~is_clear(both)]["effect"].tolist()
    stays = both[is_alone & is_clear(both)]["effect"].tolist()
    text = ""
    if gone:
        text += (
            f"Clear alone and not at equal length, perhaps length in disguise: {join_names(gone)}. "
        )
    if stays:
        text += f"Clear in both: {join_names(stays)}."
    return text


def describe_strengths(plain: pd.DataFrame, styled: pd.DataFrame) -> str:
    """Say how many chatbots are ranked, and whose strength was style."""
    ranked = plain.dropna(subset=["strength"])
    if ranked.empty:
        return "No chatbot is ranked."
    both = ranked.merge(styled, on="model", suffixes=("", "_styled"))
    apart = both[(both["low"] > both["high_styled"]) | (both["high"] < both["low_styled"])]
    first = ranked.iloc[0]
    best = with_interval(first["strength"], first["low"], first["high"], "{:+.2f}")
    text = f"{len(ranked)} chatbots are ranked; first is {literal(first['model'])}, {best}."
    if apart.empty:
        return f"{text} Holding style constant moves none of them measurably."
    return f"{text} At equal style {join_names(map(literal, apart['model']))} moved measurably."


def describe_records(records: pd.DataFrame, min_battles: int) -> str:
    """Name the chatbots that win measurably more or less than half, of `ranking.model_records`."""
    ranked = records[(records["n"] >= min_battles) & (records["n_decided"] > 0)]
    if ranked.empty:
        return f"No chatbot with a name fought {min_battles} battles."
    ranked = ranked[is_clear(ranked, 0.5)].sort_values("win_share", ascending=False)
    up, down = ranked[ranked["win_share"] > 0.5], ranked[ranked["win_share"] < 0.5][::-1]
    return (
        f"Measurably above one half: {join_names(map(literal, up['model']))}. "
        f"Below: {join_names(map(literal, down['model']))}."
    )


def describe_kinds(ties: pd.DataFrame, longer: pd.DataFrame) -> str:
    """Say where ties are most frequent, and where length counts most, by kind of prompt."""
    parts = []
    for table, what in ((ties, "the share of ties"), (longer, "how often the longer answer wins")):
        table = table[table["n"] > 0]
        if len(table) and table["p_value"].iloc[0] < ALPHA / 2:
            parts.append(f"{what} goes from {_name_ends(table)}")
        else:
            parts.append(f"{what} shows no measurable difference between kinds")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def describe_words(words: pd.DataFrame, member: str, weight: float) -> str:
    """Name the clearest words of `insight.word_effects`, and how far the saved model agrees."""
    known = words.dropna(subset=["log_odds"])
    clear = known[is_clear(known)]
    if known.empty:
        return "Too few battles to estimate the effect of a word."
    named = []
    for rows, verb in (
        (clear[clear["log_odds"] > 0], "helps"),
        (clear[clear["log_odds"] < 0], "hurts"),
    ):
        best = rows.nsmallest(5, "p_value")["word"].map(lambda word: f"“{literal(word)}”")
        named.append(f"{verb}: {join_names(best)}")
    found = "No word stands out clearly."
    if len(clear):
        found = f"At equal length, more of a word {'; '.join(named)}."
    agreement = known["log_odds"].corr(known["weight"])
    return (
        f"{found} Over {len(known):,} words the weights of the saved {member} member correlate "
        f"with these effects at {number(agreement, '{:.2f}')}; that member has "
        f"{number(weight, '{:.0%}')} of the blend's weight."
    )


def describe_growth(curve: pd.DataFrame, trend: pd.DataFrame) -> str:
    """Say what more battles bring, from `insight.learning_curve` and `insight.extrapolate`."""
    if trend.empty:
        return "There are too few battles to say what more of them would bring."
    first, last, end = curve.iloc[0], curve.iloc[-1], trend.iloc[-1]
    text = (
        f"From {first['battles']:,.0f} to {last['battles']:,.0f} battles the loss goes from "
        f"{first['log_loss']:.3f} to {last['log_loss']:.3f} nats"
    )
    gain = with_interval(end["gain"], end["gain_low"], end["gain_high"])
    if not end["gain_low"] > 0:
        return f"{text}; more battles would bring no measurable gain."
    return f"{text}; {end['battles']:,.0f} would bring {gain} more, if the trend holds."


def describe_score(result: Mapping[str, float], n_pairs: int) -> str:
    """Say what a model scores beside the class prior and the oracle, from `scores.summarise`."""
    bounds = result["log_loss_low"], result["log_loss_high"]
    text = (
        f"The CPU baseline scores **{with_interval(result['log_loss'], *bounds)} nats** per "
        f"battle, accuracy {number(result['accuracy'], '{:.1%}')}, on {n_pairs:,} battles held "
        f"out in turn; the class prior scores {result['prior_log_loss']:.3f}."
    )
    if "oracle_log_loss" not in result:
        return f"{text} A neural model has to beat this to be worth its cost."
    return (
        f"{text} The oracle log loss is {result['oracle_log_loss']:.3f}: "
        f"{result['excess_log_loss']:.3f} nats are left to learn."
    )


def describe_slope(found: Found) -> str:
    """Say whether a row of `scores.calibrate_ties` is calibrated, and if not, how it errs."""
    if pd.isna(found["p_value"]):
        return "calibration not measurable here"
    slope = with_interval(found["slope"], found["slope_low"], found["slope_high"], "{:.2f}")
    if not found["p_value"] < ALPHA:
        return f"no measurable miscalibration (slope {slope.replace(' (', ', ', 1)}"
    if found["slope_high"] < 1:
        return f"spread too far, slope {slope}"
    if found["slope_low"] > 1:
        return f"spread too little, slope {slope}"
    side = "high" if found["predicted"] > found["observed"] else "low"
    return f"too {side} on average, slope {slope}"


def describe_ties_foreseen(calibration: pd.DataFrame) -> str:
    """Say how many ties were predicted and seen, and how well, from `scores.calibrate_ties`."""
    parts = []
    for row in calibration.to_dict("records"):
        mean = number(row["predicted"], "{:.1%}")
        parts.append(f"{row['model']} predicts {mean} on average, {describe_slope(row)}")
    seen = calibration.iloc[0]
    share = with_interval(seen["observed"], seen["low"], seen["high"], "{:.1%}")
    return f"Of {seen['n']:,} votes {share} are ties: {'; '.join(parts)}."


def describe_misses(levels: pd.DataFrame) -> str:
    """Name the levels of `effects.tie_shares` where the prediction leaves the interval."""
    missed = levels[~levels["predicted"].between(levels["low"], levels["high"])]
    parts = []
    for row in missed.to_dict("records"):
        mean = number(row["predicted"], "{:.1%}")
        parts.append(f"{row['property']}: {row['level']} ({mean}, seen {share_of(row)})")
    if not parts:
        return "On no level is the prediction outside the interval of what is seen."
    return (
        f"The prediction is outside the interval on {len(parts)} of {len(levels)} levels, where "
        f"one in twenty is expected by chance: {join_names(parts)}."
    )


def describe_training(fitted: Found, is_head: bool) -> str:
    """Say what learned from how many battles, how fast; `fitted` is a `training.fit.FitResult`."""
    learned = f"**{fitted.n_parameters:,}** weights learned from {fitted.n_train_pairs:,} battles"
    minutes = f"{fitted.seconds / 60:.1f} minutes"
    speed = f"{fitted.tokens_per_second:,.0f} tokens per second"
    if is_head:
        return (
            f"{learned} per fold, on states of the frozen base, which reads {speed}; trying the "
            f"heads took {minutes}."
        )
    return f"{learned} per fold in {minutes} of steps: {speed}, {fitted.padding_share:.1%} padding."
