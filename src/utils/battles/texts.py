"""Make turns of cells: lists as JSON or Python writes them, plain text, and conversations.

Whether a column holds JSON lists, Python lists or plain text is decided once for the column, by
what most of its cells are. A cell that is something else is kept as one turn and noted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.utils.schema import Turns

Note = tuple[int, str, str, Any]  # row from 0, column, what was expected, what was found

JSON_EXPECTED = "a JSON list of strings and nulls"
_PYTHON_EXPECTED = "a list of texts as Python writes it"
_PLAIN_EXPECTED = "a text"
_MIN_CELLS = 10  # a column with fewer cells that are not blank follows the file's other columns
_MAX_DEPTH = 100  # brackets within brackets in a cell

# strict=False: raw line breaks inside a string are text, not damage.
_JSON = json.JSONDecoder(strict=False)
_TEXT_TYPES = {str, type(None)}
_TOKEN = re.compile(
    r"""\s*+(?:
        (?P<string>'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+")
        |(?P<number>[-+]?\d[\d.]*+(?:[eE][-+]?\d++)?)
        |(?P<word>[A-Za-z_]\w*+=?)
        |(?P<sign>[][(){},:])
    )\s*+""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_ESCAPED |= {"0": "\0", "\\": "\\", "'": "'", '"': '"'}
_WORDS = {"None": None, "nan": None, "NaN": None, "True": True, "False": False}
_PAIRS = {"[": "]", "(": ")", "{": "}"}

_USERS = ("user", "human", "prompter", "question")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


def decode_turns(cell: Any) -> tuple[Turns, str | None]:
    """Decode one text cell: a JSON list of strings and nulls, or already a list or array.

    Returns:
        The turns; and None, or what was expected where the cell was something else and is
        therefore kept as a single turn.
    """
    turns: Any = None
    if isinstance(cell, str):
        try:
            turns, end = _JSON.raw_decode(cell)
            if end != len(cell):  # blanks, or damage
                turns = _JSON.decode(cell)
        except (ValueError, RecursionError):
            return (cell,), JSON_EXPECTED
    elif isinstance(cell, (list, tuple, np.ndarray)):
        turns = list(cell)
    if isinstance(turns, list) and turns:
        if _is_texts(turns):
            return tuple(turns), None
        kept = tuple(t if isinstance(t, str | None) else _dump(t) for t in turns)
        return kept, JSON_EXPECTED
    is_text = isinstance(cell, str) and turns is not None  # neither missing nor JSON's null
    return (cell if is_text else None,), JSON_EXPECTED


def _is_texts(turns: list) -> bool:
    return {*map(type, turns)} <= _TEXT_TYPES or all(isinstance(t, str | None) for t in turns)


def _dump(value: Any) -> str:
    return json.dumps(value, default=str)


def parse_literal(text: str) -> Any:
    """Parse a list as Python or numpy prints it, without running or compiling anything.

    Commas may be missing, as in numpy's print; `array(…, dtype=object)` counts as its list; nan is
    None. Raises ValueError or TypeError for anything else.
    """
    # Each level: how it closes, its items, whether it is numpy's array.
    levels: list[tuple[str, list, bool]] = [("", [], False)]
    place = 0
    is_array = False
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None or len(levels) > _MAX_DEPTH:
            raise ValueError(f"expected a list of texts, got {text[place : place + 40]!r}")
        place = token.end()
        items = levels[-1][1]
        if (body := token["string"]) is not None:
            body = body[1:-1]
            items.append(_ESCAPE.sub(_unescape, body) if "\\" in body else body)
        elif token["number"]:
            items.append(json.loads(token["number"].lstrip("+")))
        elif (word := token["word"]) in _WORDS:
            items.append(_WORDS[word])
        elif word == "array":
            is_array = True
        elif (sign := token["sign"]) in _PAIRS:
            levels.append((_PAIRS[sign], [], is_array and sign == "("))
            is_array = False
        elif sign and sign == levels[-1][0]:
            *_, was_array = levels.pop()
            value = dict(zip(items[::2], items[1::2], strict=True)) if sign == "}" else items
            levels[-1][1].append(items[0] if was_array and items else value)
        elif sign not in (None, ",", ":") or word not in (None, "dtype=", "object"):
            raise ValueError(f"expected a list of texts, got {token[0]!r} in it")
    if len(levels) > 1 or len(levels[0][1]) != 1:
        raise ValueError("expected one list of texts, closed by a bracket")
    return levels[0][1][0]


def _unescape(found: re.Match) -> str:
    digits, character = found[1] or found[2] or found[3], found[4]
    return chr(int(digits, 16)) if digits else _ESCAPED.get(character, found[0])


def decode_columns(columns: Mapping[str, Sequence]) -> tuple[dict[str, list[Turns]], list[Note]]:
    """Decode columns of texts, each as what most of its cells are; and note the odd cells."""
    read: dict[str, list[tuple[Turns, str | None]]] = {}
    n_filled, n_json, n_lists = {}, {}, {}
    for name, cells in columns.items():
        read[name] = [decode_turns(cell) for cell in cells]
        n_json[name] = [expected for _, expected in read[name]].count(None)
        n_filled[name] = n_json[name]
        if n_json[name] < len(cells):
            n_filled[name] = len(cells) - sum(map(_is_blank, cells))
        n_lists[name] = n_json[name]
        if n_json[name] * 2 < n_filled[name]:
            n_lists[name] += sum(_decode_python(cell)[1] is None for cell in cells)
    decoded, notes = {}, []
    for name, cells in columns.items():
        # A handful of cells says little: in a file of lists a single plain text is damage.
        pool = [name] if n_filled[name] >= _MIN_CELLS else list(columns)
        filled, found, lists = (sum(n[k] for k in pool) for n in (n_filled, n_json, n_lists))
        if found * 2 < filled:
            decode = _decode_python if lists * 2 >= filled else _decode_plain
            read[name] = [decode(cell) for cell in cells]
        decoded[name] = [turns for turns, _ in read[name]]
        for row, (_, expected) in enumerate(read[name]):
            if expected:
                notes.append((row, name, expected, cells[row]))
    return decoded, notes


def _is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell) or _is_nan(cell)


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and cell != cell


def _decode_python(cell: Any) -> tuple[Turns, str | None]:
    if not isinstance(cell, str):
        return decode_turns(cell)
    if cell.lstrip().startswith("["):
        try:
            turns = parse_literal(cell)
        except (ValueError, TypeError):
            return (cell,), _PYTHON_EXPECTED
        if turns and isinstance(turns, list) and _is_texts(turns):
            return tuple(turns), None
    return (cell,), _PYTHON_EXPECTED


def _decode_plain(cell: Any) -> tuple[Turns, str | None]:
    if isinstance(cell, str):
        return (cell,), None
    if cell is None or _is_nan(cell):
        return (None,), _PLAIN_EXPECTED
    turns, problem = decode_turns(cell)
    return (turns if problem is None else (_dump(cell),)), _PLAIN_EXPECTED


def read_messages(cell: Any) -> list[dict[str, Any]]:
    """Read a conversation, a list of role and content, as JSON, Python or numpy writes it.

    A transcript of "Human:" and "Assistant:" is read, too.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(cell, str):
        if _TRANSCRIPT.match(cell):
            _, *parts = _TRANSCRIPT.split(cell)
            turns = zip(parts[::2], parts[1::2], strict=True)
            return [{"role": role, "content": content} for role, content in turns]
        try:
            cell = _JSON.decode(cell)
        except (ValueError, RecursionError):
            try:
                cell = parse_literal(cell)
            except TypeError as error:
                raise ValueError(str(error)) from error
    messages = list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else []
    if not messages or not all(map(_is_message, messages)):
        raise ValueError("expected a list of messages with role and content")
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def split_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Turns, Turns, str | None]:
    """Split a conversation into the turns of the prompt and those of the answer.

    What the system says is put before the next turn of the user. An answer that was never given
    is None.

    Returns:
        Prompt and answer, and what was expected where the conversation was something else.
    """
    prompt: list[str | None] = []
    answer: list[str | None] = []
    system, expected = "", None
    for message in messages:
        role = str(message.get("role") or message.get("from") or "").strip().casefold()
        text, is_whole = _join_parts(message.get("content", message.get("value")))
        expected = expected if is_whole else "content that is text"
        if role == "system":
            system += f"{text or ''}\n\n"
        elif role in _USERS:
            # One answer to each turn of the user: turns stay side by side.
            if len(answer) < len(prompt):
                answer.append(None)
                expected = "an answer to every turn of the user"
            prompt.append(system + text if system and text is not None else text)
            system = ""
        else:
            answer.append(text)
    if len(answer) < len(prompt):
        answer.append(None)
        expected = "a conversation that ends with an answer"
    if len(answer) != len(prompt):
        expected = "as many answers as turns of the user"
    return tuple(prompt or [None]), tuple(answer or [None]), expected


def _join_parts(content: Any) -> tuple[str | None, bool]:
    """The text of a message's content, a string or a list of parts; and whether that is all."""
    if content is None or isinstance(content, str):
        return content, True
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, (list, tuple, np.ndarray)):
        return str(content), False
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            texts.append(text)
    return "\n".join(texts) if texts else None, len(texts) == len(content)
