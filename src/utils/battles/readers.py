"""Read battles as the competition encodes them, lose none, and freeze the folds.

A text is a JSON list, one string or null a turn. It is decoded exactly and the
turns are kept apart. What does not decode is kept as it stands and reported with
its file, row, id and column.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from src.utils.schema import LABELS, MODELS, TEXTS, UNKNOWN_MODEL, Turns, check_pairs

PROBLEM_COLUMNS = ("file", "row", "id", "column", "expected", "found")
_N_SHOWN = 5  # rows that an error message lists
_LONG_CHARS = 20_000  # some 5,000 tokens of English, more than any model of the suite reads


def decode_turns(cell: Any) -> tuple[Turns, str | None]:
    """Decode one text cell.

    Args:
        cell: a JSON list of strings and nulls; a Python list or array is taken as it is.

    Returns:
        The turns, and what was expected where the cell was something else (then it is
        kept whole as a single turn), or None.

    Example:
        '["hi", null]' -> (("hi", None), None)
        'hi'           -> (("hi",), "a JSON list of strings and nulls")
    """
    expected = "a JSON list of strings and nulls"
    if isinstance(cell, str):
        try:
            # strict=False: raw line breaks inside a string are text, not damage.
            turns = json.loads(cell, strict=False)
        except ValueError:
            return (cell,), expected
    else:
        turns = list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else cell
    if isinstance(turns, list) and turns:
        kept = tuple(
            turn if turn is None or isinstance(turn, str) else json.dumps(turn) for turn in turns
        )
        return kept, None if kept == tuple(turns) else expected
    return (cell if isinstance(cell, str) and turns is not None else None,), expected


def read_table(path: Path) -> pd.DataFrame:
    """Read a `.csv`, `.csv.gz` or `.parquet` file with every cell as it stands.

    Nothing is taken for missing ("NA" and "null" are answers people got), and bytes that
    are no UTF-8 become lone surrogates instead of an error.

    Raises:
        ValueError: the file cannot be read as a table; it is named.
    """
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(
            path, dtype=object, keep_default_na=False, encoding_errors="surrogateescape"
        )
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise ValueError(
            f"{path}: expected a readable table, got {type(error).__name__}: {error}"
        ) from error


def load_pairs(
    paths: Sequence[Path] | Path, labelled: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read battles from one or several files.

    Args:
        paths: `.csv`, `.csv.gz` or `.parquet` files in the competition's layout.
        labelled: training rows, which carry votes and (mostly) model names; False for test rows.

    Returns:
        pairs: one row a battle, in file order: `schema.LABELLED_COLUMNS`, or
            `schema.PAIR_COLUMNS` where not labelled; texts are tuples of turns.
        problems: one row a damaged text: file, row (1 is the first), id, column, expected, found.

    Raises:
        ValueError: a column is missing, a training id repeats, or a row does not have
            exactly one winner; the message names file, row, id and column.
    """
    paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not paths:
        raise ValueError("load_pairs: expected at least one file, got none")
    parts, problems = [], []
    for path in paths:
        raw = read_table(path)
        _check_columns(path, raw, ("id", *TEXTS, *(LABELS if labelled else ())))
        part = pd.DataFrame({"id": raw["id"].astype(str)})
        for column in TEXTS:
            part[column] = _decode_column(path, raw, column, problems)
        if labelled:
            for column in MODELS:
                part[column] = raw[column].astype(str) if column in raw.columns else UNKNOWN_MODEL
            part["label"] = _read_labels(path, raw)
        parts.append(part.assign(file=path.name))
    pairs = pd.concat(parts, ignore_index=True)
    if labelled:
        _check_unique_ids(pairs)
    pairs["id"] = _as_integers(pairs["id"])
    return check_pairs(pairs.drop(columns="file")), pd.DataFrame(
        problems, columns=list(PROBLEM_COLUMNS)
    )


def _check_columns(path: Path, raw: pd.DataFrame, expected: Sequence[str]) -> None:
    missing = [name for name in expected if name not in raw.columns]
    if missing:
        raise ValueError(
            f"{path}: expected columns {list(expected)}, missing {missing}, got {list(raw.columns)}"
        )


def _decode_column(
    path: Path, raw: pd.DataFrame, column: str, problems: list[dict[str, Any]]
) -> pd.Series:
    decoded = [decode_turns(cell) for cell in raw[column]]
    for position, (_, expected) in enumerate(decoded):
        if expected:
            problems.append(
                {
                    "file": path.name,
                    "row": position + 1,
                    "id": str(raw["id"].iloc[position]),
                    "column": column,
                    "expected": expected,
                    "found": ascii(raw[column].iloc[position])[:80],
                }
            )
    return pd.Series([turns for turns, _ in decoded], index=raw.index, dtype=object)


def _read_labels(path: Path, raw: pd.DataFrame) -> np.ndarray:
    votes = raw[list(LABELS)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    wrong = np.flatnonzero(~((np.isin(votes, (0, 1)).all(axis=1)) & (votes.sum(axis=1) == 1)))
    if len(wrong):
        shown = "; ".join(
            f"row {row + 1}, id {raw['id'].iloc[row]}: {raw[list(LABELS)].iloc[row].tolist()}"
            for row in wrong[:_N_SHOWN]
        )
        raise ValueError(
            f"{path}: {len(wrong)} rows without exactly one winner. Expected a single 1 in {list(LABELS)}, got {shown}"
        )
    return votes.argmax(axis=1).astype(np.int8)


def _check_unique_ids(pairs: pd.DataFrame) -> None:
    again = pairs["id"].duplicated(keep=False)
    if again.any():
        shown = pairs.loc[again, ["id", "file"]].sort_values("id").head(_N_SHOWN).to_dict("records")
        raise ValueError(
            f"training data: expected every id once, got {int(again.sum())} rows that share one: {shown}"
        )


def _as_integers(ids: pd.Series) -> pd.Series:
    """Ids as int64 where that changes none of them ("007" stays text)."""
    numbers = pd.to_numeric(ids, errors="coerce")
    if numbers.isna().any() or not ids.str.fullmatch(r"-?\d{1,18}").all():
        return ids
    integers = ids.astype("int64")
    return integers if (integers.astype(str) == ids).all() else ids


def add_groups_and_folds(
    pairs: pd.DataFrame, n_folds: int = 5, seed: int = 20240501
) -> pd.DataFrame:
    """Freeze which battles stay together and which fold holds each out.

    Battles whose prompts begin alike (case and spacing aside) share a group: repeated
    prompts, duplicates and mirrored duplicates. Folds keep groups whole and the shares
    of the labels even; they depend on ids and texts alone, not on row order or machine.

    Args:
        pairs: `schema.LABELLED_COLUMNS`.
        n_folds: folds, 2 or more.
        seed: of the shuffle.

    Returns:
        The same rows with `group` (int64, from a hash of the prompt) and `fold` (int8, 0..n_folds-1).
    """
    if n_folds < 2:
        raise ValueError(f"n_folds: expected 2 or more, got {n_folds}")
    groups = np.array([hash_prompt(turns) for turns in pairs["prompt"]], dtype=np.int64)
    order = np.lexsort((pairs["id"].astype(str).to_numpy(dtype="U"), groups))
    folds = np.empty(len(pairs), dtype=np.int8)
    folds[order] = _split(pairs["label"].to_numpy()[order], groups[order], n_folds, seed)
    return pairs.assign(group=groups, fold=folds)


def normalise(text: str | None) -> str:
    """Text with case and spacing aside; None is empty."""
    return re.sub(r"\s+", " ", text or "").strip().casefold()


def hash_prompt(turns: Turns) -> int:
    """The group of a prompt: equal where prompts begin alike, case and spacing aside."""
    # The first turn decides: a conversation and its first question alone are one prompt.
    key = next((text for text in map(normalise, turns) if text), "")
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _split(labels: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    _, codes = np.unique(groups, return_inverse=True)
    folds = codes % n_folds
    # Too few rows to stratify: the hash order of the groups is split evenly instead.
    n_rarest = min(np.unique(labels, return_counts=True)[1], default=0)
    if codes.max(initial=0) + 1 >= n_folds and n_rarest >= n_folds:
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(labels, labels, codes)):
            folds[held_out] = fold
    return folds


def describe_health(pairs: pd.DataFrame, problems: pd.DataFrame) -> pd.DataFrame:
    """Count what is odd about the battles.

    Args:
        pairs: `schema.FROZEN_COLUMNS`.
        problems: from `load_pairs`.

    Returns:
        One row a check: check, count (battles), share, meaning.
    """
    answers = list(zip(pairs["response_a"], pairs["response_b"], strict=True))
    full = [(prompt, *pair) for prompt, pair in zip(pairs["prompt"], answers, strict=True)]
    unordered = pd.Series(
        [
            hash((prompt, frozenset(pair)))
            for prompt, pair in zip(pairs["prompt"], answers, strict=True)
        ]
    )
    ordered = pd.Series([hash(row) for row in full])
    # A battle as its first-named answer sees it, so that mirrored votes compare equal.
    vote = pd.Series(
        [
            _vote_by_content(a, b, label)
            for (a, b), label in zip(answers, pairs["label"], strict=True)
        ]
    )
    same = unordered.duplicated(keep=False)
    conflicting = same & (vote.groupby(unordered).transform("nunique") > 1)
    checks = {
        "text that is no JSON list": (
            problems["id"].nunique(),
            "kept as one turn, listed in problems",
        ),
        "null turn": (
            sum(_any_turn(row, lambda turn: turn is None) for row in full),
            "an answer that was never given",
        ),
        "empty answer": (
            sum(_is_empty(a) or _is_empty(b) for a, b in answers),
            "the other side should win",
        ),
        "identical answers": (sum(a == b for a, b in answers), "a tie, unless people disagree"),
        "more than one turn": (
            sum(len(prompt) > 1 for prompt in pairs["prompt"]),
            "turns are kept apart",
        ),
        "unequal turn counts": (
            sum(len({len(text) for text in row}) > 1 for row in full),
            "a conversation cut short",
        ),
        f"over {_LONG_CHARS:,} characters": (sum(map(_is_long, full)), "cut to a model's budget"),
        "not in ASCII": (
            sum(_any_turn(row, _is_not_ascii) for row in full),
            "another script, or typographic signs",
        ),
        "lone surrogate": (
            sum(_any_turn(row, _has_surrogate) for row in full),
            "half of a broken emoji",
        ),
        "exact duplicate": (int(ordered.duplicated().sum()), "the same battle again"),
        "mirrored duplicate": (
            int((same & ~ordered.duplicated(keep=False)).sum()),
            "the same battle, positions exchanged",
        ),
        "duplicate with another vote": (
            int(conflicting.sum()),
            "people disagree: a limit for any model",
        ),
        "prompt seen before": (
            int(pairs["group"].duplicated().sum()),
            "would leak across a random split",
        ),
    }
    table = pd.DataFrame([(check, count, meaning) for check, (count, meaning) in checks.items()])
    table.columns = ["check", "count", "meaning"]
    table.insert(2, "share", table["count"] / max(len(pairs), 1))
    return table


def _vote_by_content(a: Turns, b: Turns, label: int) -> object:
    return "tie" if label == 2 else hash((a, b)[label])


def _is_empty(turns: Turns) -> bool:
    return not any((turn or "").strip() for turn in turns)


def _has_surrogate(turn: str | None) -> bool:
    return turn is not None and re.search("[\ud800-\udfff]", turn) is not None


def _is_not_ascii(turn: str | None) -> bool:
    return turn is not None and not turn.isascii()


def _is_long(texts: Sequence[Turns]) -> bool:
    return sum(len(turn or "") for turns in texts for turn in turns) > _LONG_CHARS


def _any_turn(texts: Sequence[Turns], test: Any) -> bool:
    return any(test(turn) for turns in texts for turn in turns)
