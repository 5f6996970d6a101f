"""Find texts of real battles in pages: the competition grants nobody to publish them."""

import re
from collections.abc import Iterable
from html import unescape

_WINDOW, _STEP = 32, 8  # letters: whatever repeats 40 letters in a row is found
_SHORT = 20  # letters of the shortest whole text that is searched for


class Quotes:
    """The texts of real battles, by their letters and digits alone, as markup may part words."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Index texts: every window of letters, and short texts whole."""
        self._windows: set[str] = set()
        self._whole: set[str] = set()
        for text in texts:
            letters = _letters(text)
            places = range(0, len(letters) - _WINDOW + 1, _STEP)
            self._windows |= {letters[place : place + _WINDOW] for place in places}
            if _SHORT <= len(letters) < _WINDOW + _STEP:
                self._whole.add(letters)

    def find(self, page: str) -> str:
        """Return the first passage of a page (Markdown or HTML) that repeats a battle, or "".

        Blocks of Python are left out: they are ours, and people ask chatbots for such lines, too.
        """
        page = re.sub(r"```python\s.*?```", "", page, flags=re.DOTALL)
        letters = _letters(re.sub(r"<[^<>]*>", "", unescape(page)))
        for place in range(len(letters) - _WINDOW + 1):
            if (passage := letters[place : place + _WINDOW]) in self._windows:
                return passage
        return next((text for text in self._whole if text in letters), "")


def _letters(text: str) -> str:
    return re.sub(r"\W|_", "", text.lower())
