"""Show a table in a notebook: literally, whatever its names and texts hold.

A chatbot's name or a text may hold HTML (`<img …>`), or dollars that a page would typeset as a
formula. This is the only place where a notebook turns a table into HTML.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from pandas.io.formats.style import Styler

from src.utils.stats.plots import number, with_interval

_NAMES = {"id": "{}", "row": "{}", "seed": "{}"}  # numbers that name something: 20240501
_NO_FORMULAS = 'class="tex2jax_ignore mathjax_ignore"'  # for MathJax 2 and 3 or later
_HEADERS = {"n": "battles", "n_pairs": "battles", "log_odds": "log-odds", "p_value": "p"}
_HEADERS |= {"ece": "calibration error", "p_holm": "p (Holm)"}
_IDENTIFIER = re.compile("[a-z][a-z0-9_]*")  # of ours, which no chatbot's name is changed for


def show(
    table: pd.DataFrame,
    formats: Mapping[str, str] | None = None,
    digits: int = 4,
    intervals: Mapping[str, tuple[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
    best: str = "",
) -> Styler:
    """Style a table for people: escaped, thousands separated, missing as "–", no empty column.

    Args:
        formats: column -> format, e.g. "{:.1%}" or "{:+.3f}"; others get `digits` decimals.
        intervals: column -> the columns of its bounds, shown with it as "0.920 (0.910–0.928)".
        headers: column -> header; the others lose their underscores.
        best: column whose smallest value makes its row bold.
    """
    cells = _write_cells(table, formats, digits, intervals, headers)
    table = table.reset_index(drop=True)
    is_best = table[best] == table[best].min() if best else np.zeros(len(table), dtype=bool)
    texts = [title for title, column in cells.items() if not column.attrs["is_number"]]
    styler = pd.DataFrame(cells, index=table.index).style.format(escape="html")
    styler = styler.format_index(escape="html", axis=1).hide(axis="index")
    styler = styler.set_properties(subset=pd.Index(texts), **{"text-align": "left"})
    left = [f"th.col{place}" for place, title in enumerate(cells) if title in texts]
    if left:
        props = "text-align: left"
        styler = styler.set_table_styles([{"selector": ", ".join(left), "props": props}])
    if best:
        styler = styler.apply(lambda _: ["font-weight: bold" if row else "" for row in is_best])
    return styler.set_table_attributes(_NO_FORMULAS)


def to_text(
    table: pd.DataFrame,
    formats: Mapping[str, str] | None = None,
    digits: int = 4,
    intervals: Mapping[str, tuple[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Write a table for a terminal, as `show` does for a page: words to the left, numbers right."""
    lines = [""] * (len(table) + 1)
    for title, column in _write_cells(table, formats, digits, intervals, headers).items():
        texts = [title, *column]
        width = max(map(len, texts))
        for row, text in enumerate(texts):
            aligned = text.rjust(width) if column.attrs["is_number"] else text.ljust(width)
            lines[row] += ("  " if lines[row] else "") + aligned
    return "\n".join(line.rstrip() for line in lines)


def _write_cells(
    table: pd.DataFrame,
    formats: Mapping[str, str] | None,
    digits: int,
    intervals: Mapping[str, tuple[str, str]] | None,
    headers: Mapping[str, str] | None,
) -> dict[str, pd.Series]:
    """Header -> cells as texts, with `attrs["is_number"]`; arguments are those of `show`."""
    intervals, formats = intervals or {}, _NAMES | dict(formats or {})
    bounds = {name for pair in intervals.values() for name in pair}
    cells: dict[str, pd.Series] = {}
    for name in table.columns:
        column = table[name]
        is_empty = len(column) > 0 and (column.isna() | column.astype(str).eq("")).all()
        if name in bounds or is_empty:
            continue
        text = formats.get(name) or _choose_format(column, digits)
        if name in intervals:
            low, high = (table[bound] for bound in intervals[name])
            rows = zip(column, low, high, strict=True)
            written = [with_interval(*row, text=text) for row in rows]
        else:
            written = [number(value, text) for value in column]
        title = _name_column(name, headers or {})
        cells[title] = pd.Series(written, dtype=object)
        cells[title].attrs["is_number"] = pd.api.types.is_numeric_dtype(column)
    return cells


def _choose_format(column: pd.Series, digits: int) -> str:
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return "{}"
    is_count = (column.dropna() % 1 == 0).all()  # also 12,000.0, which a missing value made
    return "{:,.0f}" if is_count else f"{{:,.{digits}f}}"


def _name_column(name: str, headers: Mapping[str, str]) -> str:
    known = _HEADERS | dict(headers)
    if name in known or not _IDENTIFIER.fullmatch(str(name)):
        return known.get(name, name)
    return name.replace("_", " ")


class Findings:
    """A box on the first screen of a notebook that its last cell fills.

    >>> in_short = Findings()
    >>> in_short.fill(["The longer answer wins 61.8 % (57.9 to 65.7) of decided battles.", ...])
    """

    def __init__(self) -> None:
        """Show an empty box here."""
        empty = Markdown("*What this notebook finds will stand here when it has run.*")
        self._box = display(empty, display_id=True)

    def fill(self, sentences: Sequence[str]) -> None:
        """Show sentences, generated from the results, as bullets in the box."""
        bullets = "\n".join(f"- {sentence}" for sentence in sentences)
        self._box.update(Markdown(f"**In short**\n\n{bullets}"))
