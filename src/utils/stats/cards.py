"""A battle as a card: prompt, both answers side by side, the vote, and a model's probabilities.

Everything that people or chatbots wrote is escaped. Long texts are folded, without script.
"""

from collections.abc import Sequence
from html import escape

import pandas as pd
from IPython.display import HTML

from src.utils.schema import (
    LABEL_COLORS,
    LABEL_NAMES,
    MODELS,
    TEXTS,
    TIE,
    UNKNOWN_MODEL,
    clean_text,
)

_SHOWN = 500  # characters of a text; the rest is folded
_BOX = "border:1px solid #8884;border-radius:6px;padding:8px;overflow-wrap:anywhere;"
_TEXT = "white-space:pre-wrap;text-align:left;"
_COLUMN = "flex:1 1 280px;min-width:0;"


def choose_example(pairs: pd.DataFrame, style: pd.DataFrame) -> pd.Series:
    """Choose a battle that is quickly read: English, one turn, decided, short, in plain prose.

    `style` is that of `style.measure_style`. Where no battle is all of this, most of it counts.
    """
    n_chars = style["n_chars_a"] + style["n_chars_b"]
    lines = style["n_lines_a"] + style["n_lines_b"]
    wishes = [
        style["script_prompt"] == "English",
        style["n_turns"] == 1,
        pairs["label"] != TIE,
        (pairs[list(MODELS)] != UNKNOWN_MODEL).all(axis=1),
        style["n_chars_prompt"].between(40, 150),
        n_chars.between(300, 700) & (lines < 8),
        style["share_non_ascii_a"] + style["share_non_ascii_b"] == 0,
        style["is_refusal_a"] + style["is_refusal_b"] == 0,
        style["has_code_prompt"] == 0,
        style["prompt_overlap_a"] + style["prompt_overlap_b"] > 0.6,
    ]
    n_met = sum(wish.to_numpy().astype(int) for wish in wishes)
    # Among equals, the first by length, so that the choice depends on no order of rows.
    order = pd.DataFrame({"met": -n_met, "n": n_chars.to_numpy(), "id": pairs["id"].astype(str)})
    return pairs.iloc[order.reset_index(drop=True).sort_values(["met", "n", "id"]).index[0]]


def show_battle(battle: pd.Series, probs: Sequence[float] | None = None, title: str = "") -> HTML:
    """Show a battle as a card in a notebook or a page.

    Args:
        battle: a row of `pairs`: prompt, response_a, response_b; model_a, model_b, label if known.
        probs: P(A wins), P(B wins), P(tie), each 0 to 1, drawn as a bar.
        title: a line above the card, e.g. "Confident and wrong".
    """
    parts = [f"<b>{escape(clean_text(title))}</b>"] if title else []
    parts.append(f"<div style='{_BOX}{_TEXT}margin:4px 0'>{_fold(battle[TEXTS[0]])}</div>")
    sides = [_show_answer(battle, side) for side in ("a", "b")]
    parts.append(f"<div style='display:flex;flex-wrap:wrap;gap:8px'>{''.join(sides)}</div>")
    label = battle.get("label")
    if label is not None and not pd.isna(label):
        color, name = LABEL_COLORS[int(label)], LABEL_NAMES[int(label)]
        chip = f"background:{color};color:white;border-radius:9px;padding:1px 9px"
        parts.append(f"<div style='margin:6px 0'>vote: <span style='{chip}'>{name}</span></div>")
    if probs is not None:
        parts.append(_draw_bar(probs))
    # Dollars in a text are no formula.
    look = "class='tex2jax_ignore mathjax_ignore' style='max-width:900px;margin:8px 0'"
    return HTML(f"<div {look}>{''.join(parts)}</div>")


def _show_answer(battle: pd.Series, side: str) -> str:
    color = LABEL_COLORS["ab".index(side)]
    name = escape(clean_text(str(battle.get(f"model_{side}") or "unknown")))
    head = f"<div style='color:{color}'><b>{side.upper()}</b> · {name}</div>"
    look = f"{_BOX}{_COLUMN}border-top:3px solid {color};{_TEXT}"
    return f"<div style='{look}'>{head}{_fold(battle[f'response_{side}'])}</div>"


def _fold(turns: Sequence[str | None]) -> str:
    """Escape the turns of a text; what goes beyond `_SHOWN` characters opens with a click."""
    text = clean_text("\n⏎ next turn\n".join(turn or "(no text)" for turn in turns))
    shown, rest = escape(text[:_SHOWN]), escape(text[_SHOWN:])
    if not rest:
        return shown
    more = f"… {len(text) - _SHOWN:,} more characters"
    return f"{shown}<details><summary>{more}</summary>{rest}</details>"


def _draw_bar(probs: Sequence[float]) -> str:
    cells = []
    for name, color, share in zip(LABEL_NAMES, LABEL_COLORS, probs, strict=True):
        look = f"flex:{max(share, 0.01):.4f} 1 0;background:{color};overflow:hidden;padding:2px 6px"
        cells.append(f"<span style='{look}'>{name} {share:.0%}</span>")
    row = "display:flex;color:white;white-space:nowrap;border-radius:6px;overflow:hidden"
    return f"<div style='{row}'>{''.join(cells)}</div>"
