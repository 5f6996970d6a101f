"""Show a table in a notebook: literally, whatever its names and texts hold.

A chatbot's name or a text may hold HTML (`<img …>`), or dollars that a page would typeset as a
formula. This is the only place where a notebook turns a table into HTML.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from IPython.display import Markdown, display
from pandas.io.formats.style import Styler

_NAMES = {"id": "{}", "row": "{}", "seed": "{}"}  # numbers that name something: 20240501
_NO_FORMULAS = 'class="tex2jax_ignore mathjax_ignore"'  # for MathJax 2 and 3 or later


def show(
    table: pd.DataFrame,
    formats: Mapping[str, str] | None = None,
    digits: int = 4,
    index: bool = False,
) -> Styler:
    """Style a table for people: cells and headers escaped, thousands separated, missing as "–".

    Args:
        formats: column -> format, e.g. "{:.1%}"; the others get `digits` decimals.
        index: show the index, which is escaped, too.
    """
    table = table if index else table.reset_index(drop=True)
    styler = table.style.format(escape="html", precision=digits, na_rep="–", thousands=",")
    named = {name: text for name, text in _NAMES.items() if name in table}
    for column, text in (named | dict(formats or {})).items():
        styler = styler.format(text, subset=[column], na_rep="–", escape="html")
    styler = styler.format_index(escape="html", axis=1)
    styler = styler.format_index(escape="html", axis=0) if index else styler.hide(axis="index")
    texts = pd.Index([n for n in table.columns if not pd.api.types.is_numeric_dtype(table[n])])
    styler = styler.set_properties(subset=texts, **{"text-align": "left"})
    return styler.set_table_attributes(_NO_FORMULAS)


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
