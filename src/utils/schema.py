"""Columns, classes and their order; checks of tables and probabilities; exchanging A and B.

A battle is one row: a prompt, two answers, and how a person voted. In memory the three
texts are tuples of turns, `str` or `None` (the data hold nulls).
"""

import re

import numpy as np
import pandas as pd

# The classes and their order, which is that of the competition's submission. These are
# also the names of every probability column.
LABELS = ("winner_model_a", "winner_model_b", "winner_tie")
A_WINS, B_WINS, TIE = range(3)
LABEL_NAMES = ("A wins", "B wins", "tie")  # for people
LABEL_COLORS = ("#0072B2", "#D55E00", "#7F7F7F")  # Okabe-Ito, distinct for colour-blind readers
SWAPPED_LABELS = [B_WINS, A_WINS, TIE]  # each class after A and B are exchanged

TEXTS = ("prompt", "response_a", "response_b")
MODELS = ("model_a", "model_b")
UNKNOWN_MODEL = "unknown"

PAIR_COLUMNS = ("id", *TEXTS)
LABELLED_COLUMNS = (*PAIR_COLUMNS, *MODELS, "label")
FROZEN_COLUMNS = (*LABELLED_COLUMNS, "group", "fold")
# Where a file has them: how many people voted for each class; "both_bad", else ""; the language;
# when (UTC); who, or in which session. Unknown is "", or NaT for the time.
VOTES = ("votes_a", "votes_b", "votes_tie")
BOTH_BAD = "both_bad"  # in vote_detail: a tie of two bad answers
EXTRA_COLUMNS = (*VOTES, "vote_detail", "language", "timestamp", "user")

Turns = tuple[str | None, ...]

_TEXT_TYPES = {str, type(None)}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_text(turn: str | None) -> str:
    """Make a turn valid Unicode: None is empty, lone surrogates become U+FFFD."""
    if not turn or turn.isascii():
        return turn or ""
    return _LONE_SURROGATE.sub("\ufffd", turn)


def join_turns(turns: Turns, separator: str = "\n") -> str:
    """Clean the turns of a text and join them."""
    return separator.join(map(clean_text, turns))


def check_pairs(pairs: pd.DataFrame, columns: tuple[str, ...] = PAIR_COLUMNS) -> pd.DataFrame:
    """Check a table with one battle per row, and return it.

    Raises:
        ValueError: a column is missing, a text is not a tuple of turns, or a label, where
            required, is outside 0..2; the message names column, id and what was found.
    """
    missing = [name for name in columns if name not in pairs.columns]
    if missing:
        raise ValueError(
            f"pairs: expected columns {list(columns)}, missing {missing}, got {list(pairs.columns)}"
        )
    for name in TEXTS:
        for battle_id, turns in zip(pairs["id"], pairs[name], strict=True):
            if not _is_turns(turns):
                raise ValueError(
                    f"pairs: id {battle_id}, column {name}: "
                    f"expected a tuple of str or None, got {turns!r:.80}"
                )
    if "label" in columns:
        wrong = ~pairs["label"].isin(range(len(LABELS)))
        if wrong.any():
            row = pairs[wrong].iloc[0]
            raise ValueError(
                f"pairs: id {row['id']}, column label: expected 0, 1 or 2, got {row['label']!r}"
            )
    return pairs


def _is_turns(value: object) -> bool:
    if not isinstance(value, tuple):
        return False
    # The first way takes half the time, the second one knows subclasses.
    return {*map(type, value)} <= _TEXT_TYPES or all(isinstance(t, str | None) for t in value)


def check_probs(
    probs: np.ndarray, n_pairs: int | None = None, tolerance: float = 1e-4, name: str = "probs"
) -> np.ndarray:
    """Check (N, C) probabilities, whose rows sum to 1 within `tolerance`, and return them.

    Raises:
        ValueError: wrong shape, a value outside [0, 1] or not finite, or a row that does
            not sum to 1; the message has `name` and the first such row.
    """
    probs = np.asarray(probs)
    if probs.ndim != 2 or probs.shape[1] != len(LABELS) or n_pairs not in (None, len(probs)):
        expected = ("N" if n_pairs is None else n_pairs, len(LABELS))
        raise ValueError(f"{name}: expected shape {expected}, got {probs.shape}")
    bad = ~(np.isfinite(probs) & (probs >= 0) & (probs <= 1)).all(axis=1)
    bad |= ~(np.abs(probs.sum(axis=1) - 1) <= tolerance)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name}: row {row}: expected values in [0, 1] that sum to 1, got {probs[row].tolist()}"
        )
    return probs


def probs_table(ids: pd.Series | np.ndarray, probs: np.ndarray, **columns: object) -> pd.DataFrame:
    """Make a table: id, more columns (e.g. `fold=folds`), and one float32 column per label."""
    check_probs(probs, n_pairs=len(ids))
    table = pd.DataFrame({"id": np.asarray(ids), **columns})
    table[list(LABELS)] = np.asarray(probs, dtype=np.float32)
    return table


def probs_of(table: pd.DataFrame) -> np.ndarray:
    """Take the probabilities out of a table: (N, C) float64, columns in `LABELS` order."""
    return check_probs(table[list(LABELS)].to_numpy(dtype=np.float64))


def choose_columns(pairs: pd.DataFrame) -> list[str]:
    """List the columns of frozen battles: `FROZEN_COLUMNS`, and the extra ones that are there."""
    return [*FROZEN_COLUMNS, *(name for name in EXTRA_COLUMNS if name in pairs.columns)]


def count_votes(pairs: pd.DataFrame) -> np.ndarray:
    """Count the votes for each class: (N, C) int.

    Without counts of votes (`VOTES`) the label is the only vote; a label outside the classes is
    no vote, its row is zero.
    """
    labels = pairs["label"].to_numpy(dtype=np.int64)
    single = (labels[:, None] == np.arange(len(LABELS))).astype(np.int64)
    if not {*VOTES} <= {*pairs.columns}:
        return single
    counts = pairs[list(VOTES)].to_numpy(dtype=np.float64, na_value=0.0).astype(np.int64)
    return np.where(counts.any(axis=1, keepdims=True), counts, single)


def vote_shares(pairs: pd.DataFrame) -> np.ndarray:
    """Compute each class's share of `count_votes`: (N, C) float64, rows sum to 1 (no vote: 0)."""
    counts = count_votes(pairs)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def spread_votes(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List every vote of (N, C) counts: the row of its battle and its class, both (V,) int."""
    rows, classes = np.indices(counts.shape)
    return np.repeat(rows, counts.ravel()), np.repeat(classes, counts.ravel())


def list_votes(pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """List every vote on N battles, see `count_votes` and `spread_votes`."""
    return spread_votes(count_votes(pairs))


def swap_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Exchange A and B in every battle: answers and, if present, model names and votes."""
    to_b = {"response_a": "response_b", "model_a": "model_b", "votes_a": "votes_b"}
    to_a = {b: a for a, b in to_b.items()}
    swapped = pairs.rename(columns=to_b | to_a)[list(pairs.columns)]
    if "label" in pairs.columns:
        swapped = swapped.assign(label=swap_labels(pairs["label"].to_numpy()))
    return swapped


def swap_labels(labels: np.ndarray) -> np.ndarray:
    """Exchange A wins and B wins: (N,) int in 0..2 -> (N,) int of the same dtype."""
    return np.array(SWAPPED_LABELS, dtype=labels.dtype)[labels]


def swap_probs(probs: np.ndarray) -> np.ndarray:
    """Exchange the columns of A and B: (..., C) -> (..., C), an array or a tensor."""
    return probs[..., SWAPPED_LABELS]


def average_over_swap(probs: np.ndarray, probs_swapped: np.ndarray) -> np.ndarray:
    """Remove position bias: average the predictions of each battle in both orders, (N, C) each.

    `probs_swapped` is for A and B exchanged, its columns as the model returned them. Raises
    ValueError where shapes differ, or a row does not sum to 1 within 1e-4.

    Source: Wang et al. 2023, arXiv:2305.17926, balanced position calibration.
    """
    check_probs(probs)
    check_probs(probs_swapped, n_pairs=len(probs))
    return (probs + swap_probs(probs_swapped)) / 2
