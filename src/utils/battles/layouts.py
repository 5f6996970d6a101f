"""The table of layouts: how each is recognised by its columns, and how it is read.

A new layout is one entry of `LAYOUTS` and one test. Columns of all layouts: id, names of the
chatbots, and, where a file has them, language, timestamp and user; others are ignored.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.utils.battles.files import read_table
from src.utils.battles.texts import Note, decode_columns, read_messages, split_messages
from src.utils.paths import on_disk
from src.utils.schema import (
    A_WINS,
    B_WINS,
    BOTH_BAD,
    LABELS,
    MODELS,
    TEXTS,
    TIE,
    UNKNOWN_MODEL,
    Turns,
)

_N_SHOWN = 5  # rows that an error message lists
CONVERSATIONS = ("conversation_a", "conversation_b")

# By what each is called in files. A voter is a person who judges battles that others judge, too.
_VOTERS = (
    *("judge", "worker", "annotator", "annotator_id", "rater", "voter", "voter_id"),
    *("user", "user_id"),
)
_EXTRAS = {
    "language": ("language", "lang"),
    "timestamp": ("timestamp", "tstamp", "created_at"),
    "user": (*_VOTERS, "evaluation_session_id", "session_id", "session"),
}
_BATTLES = ("pair", "pair_id", "battle_id")
_CHATBOTS = {"chosen": ("chosen_model", "chosen-model"), "rejected": ("rejected_model",)}
_BLANK = ("", "none", "nan", "null", "<na>")
_YES_NO = {"1": 1, "true": 1, "0": 0, "false": 0} | dict.fromkeys(_BLANK, 0)
# One column `winner`, without case, blanks and punctuation.
_A = ("modela", "a", "left", "responsea", "answera", "assistanta", "winnermodela", "1")
_B = ("modelb", "b", "right", "responseb", "answerb", "assistantb", "winnermodelb", "2")
_TIES = ("tie", "draw", "equal", "both", "bothgood", "tiebothgood", "winnertie", "0")
_NEITHER = ("tiebothbad", "bothbad", "neither")
_WINNERS = dict.fromkeys(_A, A_WINS) | dict.fromkeys(_B, B_WINS)
_WINNERS |= dict.fromkeys((*_TIES, *_NEITHER), TIE)

Decoded = tuple[dict[str, list[Turns]], list[Note]]  # columns of texts, and what is odd in them


@dataclass(frozen=True)
class Layout:
    """One way to write battles down.

    `read_texts` gives the three columns of texts, and notes what is odd in them; `read_votes` gives
    labels, (N,) int8, -1 where they cannot be read. Both get the table and a seed, which draws
    positions; None leaves the chosen answer in position A.
    """

    name: str
    texts: tuple[str, ...]  # columns that a file of this layout has
    votes: tuple[str, ...]  # further columns of a file with votes
    read_texts: Callable[[pd.DataFrame, int | None], Decoded]
    read_votes: Callable[[pd.DataFrame, int], np.ndarray]

    def columns(self, labelled: bool) -> list[str]:
        """The columns that a file must have; without votes also ids."""
        return [*self.texts, *self.votes] if labelled else ["id", *self.texts]


def _read_texts(raw: pd.DataFrame, seed: int | None) -> Decoded:
    return decode_columns({name: raw[name].tolist() for name in TEXTS})


def _read_conversations(raw: pd.DataFrame, seed: int | None) -> Decoded:
    return _split_conversations(raw[list(CONVERSATIONS)], [None] * len(raw))


def _read_judged_turn(raw: pd.DataFrame, seed: int | None) -> Decoded:
    # MT-bench has the whole conversation also beside a vote on its first turn.
    return _split_conversations(raw[list(CONVERSATIONS)], raw["turn"].tolist())


def _split_conversations(cells: pd.DataFrame, n_turns: Sequence) -> Decoded:
    """Split two columns of conversations, A's and B's, each cut to so many turns or None."""
    texts: dict[str, list[Turns]] = {name: [] for name in TEXTS}
    notes: list[Note] = []
    for row, pair in enumerate(cells.itertuples(index=False, name=None)):
        prompts = []
        limit = str(n_turns[row]).strip().removesuffix(".0")
        end = int(limit) if limit.isdecimal() and int(limit) else None
        for place, cell in enumerate(pair):
            try:
                prompt, answer, expected = split_messages(read_messages(cell))
            except ValueError:
                answer = (cell if isinstance(cell, str) else None,)
                prompt, expected = (), "a list of messages with role and content"
            prompts.append(prompt[:end])
            texts[TEXTS[1 + place]].append(answer[:end])
            if expected:
                notes.append((row, cells.columns[place], expected, cell))
        texts["prompt"].append(prompts[0] or prompts[1] or (None,))
        if all(prompts) and prompts[0] != prompts[1]:
            expected = f"the user's turns of {cells.columns[0]}, which are kept"
            notes.append((row, cells.columns[1], expected, pair[1]))
    return texts, notes


def _read_chosen(raw: pd.DataFrame, seed: int | None) -> Decoded:
    sides = raw[["chosen", "rejected"]].astype(object)
    has_prompt = "prompt" in raw.columns
    n_chats = sum(map(_has_messages, sides["chosen"]))
    is_plain = has_prompt and n_chats * 2 < len(raw)
    if is_plain:
        columns = {"prompt": "prompt", "chosen": "response_a", "rejected": "response_b"}
        decoded, notes = decode_columns({name: raw[name].tolist() for name in columns})
        texts = {new: decoded[name] for name, new in columns.items()}
    else:
        if has_prompt:
            prompts = [_user_messages(cell) for cell in raw["prompt"]]
            for name in sides.columns:
                sides[name] = list(map(_add_prompt, prompts, sides[name]))
        texts, notes = _split_conversations(sides, [None] * len(raw))
    for row, is_right in enumerate(_draw_sides(raw, seed)):
        if is_right:
            a, b = texts["response_a"], texts["response_b"]
            a[row], b[row] = b[row], a[row]
    return texts, notes


def _has_messages(cell: Any) -> bool:
    try:
        return bool(read_messages(cell))
    except ValueError:
        return False


def _user_messages(cell: Any) -> list[dict[str, Any]]:
    return read_messages(cell) if _has_messages(cell) else [{"role": "user", "content": cell}]


def _add_prompt(prompt: list[dict[str, Any]], cell: Any) -> Any:
    """Put the prompt before a conversation that holds none; what is no conversation is kept."""
    if not _has_messages(cell):
        return [*prompt, {"role": "assistant", "content": cell}]
    messages = read_messages(cell)
    roles = [str(message.get("role") or message.get("from")).casefold() for message in messages]
    return messages if {"user", "human"} & {*roles} else [*prompt, *messages]


def _draw_sides(raw: pd.DataFrame, seed: int | None) -> np.ndarray:
    """(N,) 1 where the chosen answer is B; it depends on the texts, not on the order of rows."""
    if seed is None:
        return np.zeros(len(raw), dtype=np.int8)
    names = [name for name in ("prompt", "chosen", "rejected") if name in raw.columns]
    drawn = []
    for cells in raw[names].itertuples(index=False, name=None):
        text = json.dumps([seed, *map(str, cells)])
        drawn.append(hashlib.blake2b(text.encode(), digest_size=8).digest()[-1] & 1)
    return np.array(drawn, dtype=np.int8)


def _read_three_votes(raw: pd.DataFrame, seed: int) -> np.ndarray:
    votes = np.stack([_read_numbers(raw[name].tolist()) for name in LABELS], axis=1)
    is_wrong = ~(np.isin(votes, (0, 1)).all(axis=1) & (votes.sum(axis=1) == 1))
    return np.where(is_wrong, -1, votes.argmax(axis=1)).astype(np.int8)


def _read_numbers(cells: Sequence) -> np.ndarray:
    """0 and 1 of numbers, booleans and blanks, as numbers or texts: (N,) int, -1 for others."""
    keys = [re.sub(r"\.0*$", "", str(cell).strip().casefold()) for cell in cells]
    return np.array([_YES_NO.get(key, -1) for key in keys], dtype=int)


def _read_winner(raw: pd.DataFrame, seed: int) -> np.ndarray:
    return np.array([_WINNERS.get(_letters(cell), -1) for cell in raw["winner"]], dtype=np.int8)


def _letters(cell: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\.0+$", "", str(cell).strip().casefold()))


_CHAT = "conversations with one column winner"
LAYOUTS = (
    Layout("the competition's layout", TEXTS, LABELS, _read_texts, _read_three_votes),
    Layout("texts with one column winner (WSDM)", TEXTS, ("winner",), _read_texts, _read_winner),
    Layout(
        f"{_CHAT} and time (arena 33k, 100k)",
        (*CONVERSATIONS, "tstamp"),
        ("winner",),
        _read_conversations,
        _read_winner,
    ),
    Layout(
        "human judgments of MT-bench",
        (*CONVERSATIONS, "question_id", "judge", "turn"),
        ("winner",),
        _read_judged_turn,
        _read_winner,
    ),
    Layout(f"{_CHAT} (arena 140k)", CONVERSATIONS, ("winner",), _read_conversations, _read_winner),
    Layout("conversations", CONVERSATIONS, LABELS, _read_conversations, _read_three_votes),
    Layout(
        "chosen and rejected answers, positions drawn at random",
        ("chosen", "rejected"),
        (),
        _read_chosen,
        _draw_sides,
    ),
)
_ALWAYS = {"id", "question_id", *MODELS, *_BATTLES}
KNOWN_COLUMNS = _ALWAYS.union(
    *(layout.columns(labelled=True) for layout in LAYOUTS), *_EXTRAS.values(), *_CHATBOTS.values()
)


def has_votes(columns: Collection[str]) -> bool:
    """Whether a file with these columns is of a layout with votes."""
    return any({*columns}.issuperset(layout.columns(labelled=True)) for layout in LAYOUTS)


def find_layout(path: Path, columns: Sequence[str], labelled: bool) -> Layout:
    """Recognise the layout of a file by its columns.

    Raises:
        ValueError: none fits; what the closest one lacks is named.
    """
    lacking = []
    for layout in LAYOUTS:
        lacking.append([name for name in layout.columns(labelled) if name not in columns])
    if [] in lacking:
        return LAYOUTS[lacking.index([])]
    there = list(columns)
    if on_disk(path).is_file():
        there = list(read_table(path, header_only=True).columns)  # also those that no layout knows
    shares = [len(m) / len(lay.columns(labelled)) for m, lay in zip(lacking, LAYOUTS, strict=True)]
    closest = int(np.argmin(shares))  # the one with most of its columns there
    raise ValueError(
        f"{path}: expected columns {LAYOUTS[closest].columns(labelled)} ({LAYOUTS[closest].name}), "
        f"missing {lacking[closest]}, got {there}; docs/data.md lists the layouts"
    )


def describe_file(path: Path) -> str:
    """Say in one line what a training file is taken for, by the names of its columns.

    Raises:
        ValueError: the file cannot be read, or no layout fits.
    """
    columns = list(read_table(path, KNOWN_COLUMNS, header_only=True).columns)
    return f"{path}: read as {find_layout(path, columns, labelled=True).name}"


def read_labels(path: Path, raw: pd.DataFrame, layout: Layout, seed: int) -> dict[str, Any]:
    """Read the votes: label, and `vote_detail` where some vote was that both are bad.

    Raises:
        ValueError: a vote cannot be read; file, rows, ids and values are named.
    """
    labels = layout.read_votes(raw, seed)
    wrong = np.flatnonzero(labels < 0)
    if len(wrong):
        table = raw[list(layout.votes)]
        ids = raw["id"] if "id" in raw.columns else ["?"] * len(raw)
        shown = "; ".join(
            f"row {row + 1}, id {list(ids)[row]}: {table.iloc[row].tolist()}"
            for row in wrong[:_N_SHOWN]
        )
        expected = f"a single 1 in {list(LABELS)}"
        if layout.votes == ("winner",):
            expected = "model_a, model_b, tie, both_bad, or 1, 2, 0 in winner"
        raise ValueError(f"{path}: expected {expected}, got {len(wrong)} rows without: {shown}")
    found: dict[str, Any] = {"label": labels}
    if layout.votes == ("winner",):
        is_bad = raw["winner"].map(_letters).isin(_NEITHER)
        if is_bad.any():
            found["vote_detail"] = np.where(is_bad, BOTH_BAD, "").astype(object)
    return found


def read_names(raw: pd.DataFrame, layout: Layout, seed: int) -> dict[str, list[str]]:
    """Read the chatbots' names; blank ones are unknown."""
    columns: list[str | None] = list(MODELS)
    is_drawn = layout.read_votes is _draw_sides
    if is_drawn:
        columns = [_first(raw, names) for names in _CHATBOTS.values()]
    names = []
    for column in columns:
        cells = raw[column] if column in raw.columns else [""] * len(raw)
        names.append([_name(str(cell)) for cell in cells])
    if is_drawn:
        for row in np.flatnonzero(_draw_sides(raw, seed)):
            names[0][row], names[1][row] = names[1][row], names[0][row]
    return dict(zip(MODELS, names, strict=True))


def _name(cell: str) -> str:
    name = cell.strip()
    return UNKNOWN_MODEL if name.casefold() in _BLANK else name


def _first(raw: pd.DataFrame, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in raw.columns), None)


def read_extras(raw: pd.DataFrame) -> tuple[dict[str, Any], list[Note]]:
    """Read language, timestamp (UTC) and user where the file has them; blank is "", or no time."""
    extras: dict[str, Any] = {}
    notes: list[Note] = []
    for name, candidates in _EXTRAS.items():
        column = _first(raw, candidates)
        if column is None:
            continue
        cells = raw[column]
        texts = ["" if str(cell).strip().casefold() in _BLANK else str(cell) for cell in cells]
        extras[name] = [text.strip() for text in texts]
        if name == "timestamp":
            extras[name] = times = _read_times(extras[name])
            expected = "a time, ISO 8601 or seconds since 1970"
            for row in np.flatnonzero(times.isna() & pd.Series(texts).ne("")):
                notes.append((int(row), column, expected, cells[row]))
    return extras, notes


def _read_times(texts: list[str]) -> pd.Series:
    cells = pd.Series(texts, dtype=object)
    numbers = pd.to_numeric(cells, errors="coerce")
    # Milliseconds since 1970 are beyond the year 5000 when they are read as seconds.
    seconds = numbers.where(numbers < 1e11, numbers / 1000).to_numpy(dtype=float)
    seconds = np.where(np.abs(seconds) < 1e11, seconds, np.nan)
    epochs = pd.to_datetime(pd.Series(seconds), unit="s", utc=True, errors="coerce")
    written = pd.to_datetime(
        cells.where(numbers.isna()), utc=True, errors="coerce", format="ISO8601"
    )
    return epochs.fillna(written).astype("datetime64[us, UTC]")


def has_voters(columns: Collection[str]) -> bool:
    """Whether a file says who voted, or on which pair: then several votes may be on one battle."""
    return not {*_VOTERS, *_BATTLES}.isdisjoint(columns)
