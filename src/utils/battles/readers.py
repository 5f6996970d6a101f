"""Read files of battles, report damaged texts, and assign groups and folds.

In a file, a text is a JSON list with one string or null per turn. A text that cannot be
decoded is kept as a single turn and reported with its file, row, id and column: no battle
is lost.
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
_TURNS_EXPECTED = "a JSON list of strings and nulls"
_N_SHOWN = 5  # rows that an error message lists
_LONG_CHARS = 20_000  # about 5,000 tokens of English, more than any model here reads
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# The rows of the health table and what each means.
_CHECKS = {
    "text that is not a JSON list": "kept as one turn, listed in problems",
    "null turn": "an answer that was never given",
    "empty answer": "the other side should win",
    "identical answers": "a tie, unless people disagree",
    "more than one turn": "turns are kept apart",
    "unequal turn counts": "a conversation cut short",
    f"over {_LONG_CHARS:,} characters": "cut to a model's budget",
    "not in ASCII": "another script, or typographic signs",
    "lone surrogate": "half of a broken emoji",
    "exact duplicate": "the same battle again",
    "mirrored duplicate": "the same battle, positions exchanged",
    "duplicate with another vote": "people disagree: a limit for any model",
    "prompt seen before": "would leak across a random split",
}


def decode_turns(cell: Any) -> tuple[Turns, str | None]:
    """Decode one text cell: a JSON list of strings and nulls, or already a list or array.

    Returns:
        The turns; and None, or what was expected where the cell was something else and is
        therefore kept as a single turn.
    """
    if isinstance(cell, str):
        try:
            # strict=False: raw line breaks inside a string are text, not damage.
            turns: Any = json.loads(cell, strict=False)
        except ValueError:
            return (cell,), _TURNS_EXPECTED
    else:
        turns = list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else None
    if isinstance(turns, list) and turns:
        kept = tuple(t if isinstance(t, str | None) else json.dumps(t) for t in turns)
        return kept, None if kept == tuple(turns) else _TURNS_EXPECTED
    is_text = isinstance(cell, str) and turns is not None  # neither missing nor JSON's null
    return (cell if is_text else None,), _TURNS_EXPECTED


def read_table(path: Path) -> pd.DataFrame:
    """Read a `.csv`, `.csv.gz` or `.parquet` file without interpreting its cells.

    Nothing counts as missing ("NA" and "null" are possible answers); bytes that are not UTF-8
    become lone surrogates.

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
    """Read battles from one or several files in the competition's layout.

    `paths` are `.csv`, `.csv.gz` or `.parquet` files, `labelled` if they hold votes.

    Returns:
        pairs: one row per battle, in file order: `schema.LABELLED_COLUMNS`, or
            `schema.PAIR_COLUMNS` if not labelled; texts are tuples of turns.
        problems: one row per damaged text: file, row (from 1), id, column, expected, found.

    Raises:
        ValueError: a column is missing, a training id repeats, or a row does not have
            exactly one winner; the message names file, row, id and column.
    """
    paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not paths:
        raise ValueError("load_pairs: expected at least one file, got none")
    parts = []
    problems: list[dict[str, Any]] = []
    for path in paths:
        raw = read_table(path)
        columns = ["id", *TEXTS, *(LABELS if labelled else ())]
        missing = [name for name in columns if name not in raw.columns]
        if missing:
            raise ValueError(
                f"{path}: expected columns {columns}, missing {missing}, got {list(raw.columns)}"
            )
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
    table = pd.DataFrame(problems, columns=list(PROBLEM_COLUMNS))
    return check_pairs(pairs.drop(columns="file")), table


def _decode_column(
    path: Path, raw: pd.DataFrame, column: str, problems: list[dict[str, Any]]
) -> pd.Series:
    """Decode a column of texts and append what is damaged to `problems`."""
    decoded = []
    for row, (battle_id, cell) in enumerate(zip(raw["id"], raw[column], strict=True), start=1):
        turns, expected = decode_turns(cell)
        decoded.append(turns)
        if expected:
            found = ascii(cell)[:80]
            values = (path.name, row, str(battle_id), column, expected, found)
            problems.append(dict(zip(PROBLEM_COLUMNS, values, strict=True)))
    return pd.Series(decoded, index=raw.index, dtype=object)


def _read_labels(path: Path, raw: pd.DataFrame) -> np.ndarray:
    table = raw[list(LABELS)]
    votes = table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    wrong = np.flatnonzero(~(np.isin(votes, (0, 1)).all(axis=1) & (votes.sum(axis=1) == 1)))
    if len(wrong):
        shown = "; ".join(
            f"row {row + 1}, id {raw['id'].iloc[row]}: {table.iloc[row].tolist()}"
            for row in wrong[:_N_SHOWN]
        )
        raise ValueError(
            f"{path}: expected a single 1 in {list(LABELS)}, got {len(wrong)} rows without: {shown}"
        )
    return votes.argmax(axis=1).astype(np.int8)


def _check_unique_ids(pairs: pd.DataFrame) -> None:
    repeated = pairs.loc[pairs["id"].duplicated(keep=False), ["id", "file"]]
    if len(repeated):
        shown = repeated.sort_values("id").head(_N_SHOWN).to_dict("records")
        raise ValueError(
            f"training data: expected unique ids, got {len(repeated)} rows that share one: {shown}"
        )


def _as_integers(ids: pd.Series) -> pd.Series:
    """Convert ids to int64 if that changes none of them ("007" stays text)."""
    if not ids.str.fullmatch(r"-?\d{1,18}").all():
        return ids
    integers = ids.astype("int64")
    return integers if (integers.astype(str) == ids).all() else ids


def add_groups_and_folds(
    pairs: pd.DataFrame, n_folds: int = 5, seed: int = 20240501
) -> pd.DataFrame:
    """Assign every battle to a group and to the fold that holds it out.

    Battles whose prompts begin alike (whatever the case and spacing) share a group: repeated
    prompts, duplicates and mirrored duplicates. Folds hold complete groups and about the same
    shares of the labels; they depend on ids and texts alone, not on row order or machine.

    Returns:
        The same rows with `group` (int64, a hash of the prompt) and `fold` (int8, from 0).

    Raises:
        ValueError: `n_folds` is less than 2.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds: expected 2 or more, got {n_folds}")
    groups = np.array([hash_prompt(turns) for turns in pairs["prompt"]], dtype=np.int64)
    order = np.lexsort((pairs["id"].astype(str).to_numpy(dtype="U"), groups))
    folds = np.empty(len(pairs), dtype=np.int8)
    folds[order] = _split(pairs["label"].to_numpy()[order], groups[order], n_folds, seed)
    return pairs.assign(group=groups, fold=folds)


def hash_prompt(turns: Turns) -> int:
    """Hash a prompt to its group, an int of 63 bits."""
    # The first turn decides: a conversation and its first question alone are one prompt.
    normalised = (re.sub(r"\s+", " ", turn or "").strip().casefold() for turn in turns)
    key = next(filter(None, normalised), "")
    # Exact even for lone surrogates: replacing them would reassign the folds of existing data.
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _split(labels: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    _, codes = np.unique(groups, return_inverse=True)
    folds = codes % n_folds
    # With too few rows to stratify, groups are dealt out in the order of their hashes.
    n_rarest = min(np.unique(labels, return_counts=True)[1], default=0)
    if codes.max(initial=0) + 1 >= n_folds and n_rarest >= n_folds:
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(labels, labels, codes)):
            folds[held_out] = fold
    return folds


def describe_health(pairs: pd.DataFrame, problems: pd.DataFrame) -> pd.DataFrame:
    """Count what is unusual about the battles; `problems` are those of `load_pairs`.

    Returns:
        One row per check: check, count (battles), share, meaning.
    """
    texts = list(zip(*(pairs[name] for name in TEXTS), strict=True))
    ordered = pd.Series(list(map(hash, texts)))
    # The same for a battle and its mirror image, and so is the vote: the answer that won.
    unordered = pd.Series([hash((prompt, frozenset((a, b)))) for prompt, a, b in texts])
    winners = []
    for (_, a, b), label in zip(texts, pairs["label"], strict=True):
        winners.append(hash((a, b, "tie")[label]))
    votes_differ = pd.Series(winners).groupby(unordered).transform("nunique") > 1
    is_mirrored = unordered.duplicated(keep=False) & ~ordered.duplicated(keep=False)
    counts = pd.DataFrame([_find_oddities(*row) for row in texts]).sum().to_dict() | {
        "text that is not a JSON list": problems["id"].nunique(),
        "exact duplicate": ordered.duplicated().sum(),
        "mirrored duplicate": is_mirrored.sum(),
        "duplicate with another vote": votes_differ.sum(),
        "prompt seen before": pairs["group"].duplicated().sum(),
    }
    table = pd.DataFrame({"check": list(_CHECKS)})
    table["count"] = [int(counts.get(check, 0)) for check in _CHECKS]
    table["share"] = table["count"] / max(len(pairs), 1)
    return table.assign(meaning=list(_CHECKS.values()))


def _find_oddities(prompt: Turns, a: Turns, b: Turns) -> dict[str, bool]:
    turns = (*prompt, *a, *b)
    text = "".join(filter(None, turns))
    return {
        "null turn": None in turns,
        "empty answer": not all("".join(filter(None, answer)).strip() for answer in (a, b)),
        "identical answers": a == b,
        "more than one turn": len(prompt) > 1,
        "unequal turn counts": len({len(prompt), len(a), len(b)}) > 1,
        f"over {_LONG_CHARS:,} characters": len(text) > _LONG_CHARS,
        "not in ASCII": not text.isascii(),
        "lone surrogate": _LONE_SURROGATE.search(text) is not None,
    }
