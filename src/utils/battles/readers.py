"""Read files of battles of any layout, merge votes, and assign groups and folds.

`files.py` reads cells, `texts.py` makes turns of them, `layouts.py` knows where each file has what.
What is odd in a file is reported with file, row, id and column: no battle is lost.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from src.utils.battles import layouts
from src.utils.battles.files import iter_table, read_table
from src.utils.battles.texts import JSON_EXPECTED, Note
from src.utils.battles.texts import decode_turns as decode_turns
from src.utils.schema import (
    A_WINS,
    B_WINS,
    BOTH_BAD,
    MODELS,
    TEXTS,
    TIE,
    VOTES,
    Turns,
    check_pairs,
    swap_labels,
)

PROBLEM_COLUMNS = ("file", "row", "id", "column", "expected", "found")
SEED = 20240501
_BLANK_IDS = ("", "nan", "none")
_N_SHOWN = 5  # rows that an error message lists
_LONG_CHARS = 20_000  # about 5,000 tokens of English, more than any model here reads
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# A table without a column for the voter holds several votes per battle where it is this long and
# repeats its battles so often, with other votes for such a share of them; the competition repeats
# less than 1 % of its battles, and copies of rows agree.
_MIN_REPEATED, _MIN_VOTES, _MIN_DISAGREEING = 100, 1.25, 0.1
_MAX_SESSION = 20  # battles that users may chain together, where a fold is smaller
_NUMBER = re.compile(r"[+-]?\d+")
_SPOILT_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
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


def load_pairs(
    paths: Sequence[Path] | Path, labelled: bool = True, seed: int = SEED, quiet: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read battles from one or several files of any layout in `layouts.LAYOUTS`.

    Several votes on one battle become one battle with counts (`schema.VOTES`). The label is the
    most frequent vote; where two are equally frequent, a tie if these are A and B, else the
    answer that is one of them; of all three, a tie. A row that two files share is read once.

    Args:
        paths: files, see `files.read_table`.
        labelled: whether they hold votes.
        seed: draws the positions of chosen and rejected answers.
        quiet: print nothing of what each file was taken for.

    Returns:
        pairs: one row per battle, in file order: `schema.LABELLED_COLUMNS`, or
            `schema.PAIR_COLUMNS` if not labelled; and those of `schema.EXTRA_COLUMNS` that a
            file has. Texts are tuples of turns.
        problems: one row per odd cell: file, row (from 1), id, column, expected, found.

    Raises:
        ValueError: a column is missing, an id is blank, a training id has two different rows, a
            test id was spoilt by a spreadsheet, or a row does not have exactly one winner; the
            message names file, row, id and column.
    """
    paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not paths:
        raise ValueError("load_pairs: expected at least one file, got none")
    parts = []
    problems: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        part, notes = _load_file(path, labelled, seed, quiet)
        problems += _describe_notes(path, part["id"].tolist(), notes)
        parts.append(part.assign(file=path.name, file_number=number))
    pairs = pd.concat(parts, ignore_index=True)
    for name in {"language", "user", "vote_detail"} & {*pairs.columns}:
        pairs[name] = pairs[name].fillna("").astype(object)
    if labelled:
        pairs = _drop_shared_rows(pairs, quiet)
        pairs = _merge_votes(pairs, quiet)
    pairs["id"] = _as_integers(pairs["id"])
    table = pd.DataFrame(problems, columns=list(PROBLEM_COLUMNS))
    return check_pairs(pairs.drop(columns=["file", "file_number", "is_voted"])), table


class Chunk(NamedTuple):
    """Some rows of a file of battles to predict."""

    pairs: pd.DataFrame  # `schema.PAIR_COLUMNS`
    problems: list[dict[str, Any]]  # a row of `load_pairs`' problems each
    share: float  # of the file that has been read with them, 0 to 1


def iter_battles(path: Path, n_rows: int) -> Iterator[Chunk]:
    """Read battles to predict, `n_rows` at a time, from a file of any layout, votes or none.

    Without ids a battle has the number of its row, from 1. Of chosen and rejected answers A is
    the chosen one. Whether texts are lists or plain is decided for each chunk.

    Raises:
        ValueError: a column is missing, an id is blank, or the file is damaged; the message
            names file, row and column.
    """
    n_before = 0
    for raw, share in iter_table(path, layouts.KNOWN_COLUMNS, n_rows):
        pairs, problems = decode_battles(raw, path, n_before)
        yield Chunk(pairs, problems, share)
        n_before += len(raw)


def decode_battles(
    raw: pd.DataFrame, path: Path, n_before: int = 0
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Decode a table of cells as `iter_battles` does; `n_before` rows of its file came before."""
    # An id is not needed here, so it never counts as missing.
    layout = layouts.find_layout(path, [*raw.columns, "id"], labelled=False)
    texts, notes = layout.read_texts(raw, None)
    column = next((name for name in ("id", "question_id") if name in raw.columns), None)
    ids = [str(n_before + row + 1) for row in range(len(raw))]
    if column:
        ids = [str(cell).strip() for cell in raw[column]]
        for row, name in enumerate(ids, start=n_before + 1):
            if name.casefold() in _BLANK_IDS:
                place = f"{path}: row {row}, column {column}"
                raise ValueError(f"{place}: expected an id, got {name!r}")
    table: dict[str, Any] = {"id": ids} | texts
    columns = {name: pd.Series(cells, dtype=object) for name, cells in table.items()}
    return pd.DataFrame(columns), _describe_notes(path, ids, notes, n_before)


def _describe_notes(
    path: Path, ids: Sequence[str], notes: Sequence[Note], n_before: int = 0
) -> list[dict[str, Any]]:
    problems = []
    for row, column, expected, cell in notes:
        place = (path.name, n_before + int(row) + 1, ids[row])
        values = (*place, column, expected, ascii(cell)[:80])
        problems.append(dict(zip(PROBLEM_COLUMNS, values, strict=True)))
    return problems


def _load_file(
    path: Path, labelled: bool, seed: int, quiet: bool
) -> tuple[pd.DataFrame, list[Note]]:
    raw = read_table(path, layouts.KNOWN_COLUMNS)
    layout = layouts.find_layout(path, list(raw.columns), labelled)
    texts, notes = layout.read_texts(raw, seed)
    columns: dict[str, Any] = dict.fromkeys(("id", *TEXTS)) | texts
    columns["id"] = _read_ids(path, raw, labelled)
    if labelled:
        columns |= layouts.read_names(raw, layout, seed)
        columns |= layouts.read_labels(path, raw, layout, seed)
    extras, more = layouts.read_extras(raw)
    part = pd.DataFrame({name: pd.Series(cells) for name, cells in (columns | extras).items()})
    part = part.astype(dict.fromkeys((set(part) & {"id", *MODELS, *TEXTS}), object))
    part["is_voted"] = labelled and (layouts.has_voters(raw.columns) or _repeats_battles(part))
    if not quiet:
        print(f"{path.name}: {len(part):,} rows, read as {layout.name}")
    return part, notes + more


def _read_ids(path: Path, raw: pd.DataFrame, labelled: bool) -> list[str]:
    """Ids as texts; a training file without a column of ids gets ids made of its rows."""
    column = "id"
    if "id" not in raw.columns and "question_id" in raw.columns:
        column = "question_id"  # in the arena's files of every battle, in MT-bench's of a prompt
    if column not in raw.columns or (column != "id" and raw[column].duplicated().any()):
        rows = raw.astype(str).agg("\x1f".join, axis=1)
        made = [hashlib.blake2b(ascii(row).encode(), digest_size=8).hexdigest() for row in rows]
        again = pd.Series(made, dtype=object).groupby(made).cumcount()
        return [f"{name}-{n}" if n else name for name, n in zip(made, again, strict=True)]
    ids = [str(cell).strip() for cell in raw[column]]
    blank = [row for row, name in enumerate(ids) if name.casefold() in _BLANK_IDS]
    if blank:
        shown = ", ".join(str(row + 1) for row in blank[:_N_SHOWN])
        raise ValueError(
            f"{path}: expected an id in column {column} of every row, got {len(blank)} blank: "
            f"rows {shown}"
        )
    if not labelled and all(map(_SPOILT_NUMBER.fullmatch, ids)):
        spoilt = [row for row, name in enumerate(ids) if not _NUMBER.fullmatch(name)]
        if spoilt:
            raise ValueError(
                f"{path}: expected ids as the competition has them, got numbers with a decimal "
                f"point or exponent in {len(spoilt)} rows, such as row {spoilt[0] + 1}: "
                f"{ids[spoilt[0]]}; a spreadsheet may have changed them: take the original file"
            )
    return ids


def _drop_shared_rows(pairs: pd.DataFrame, quiet: bool) -> pd.DataFrame:
    """Drop rows that an earlier file has, too; ValueError for different rows under one id."""
    is_shared = pairs["id"].duplicated(keep=False)
    if not is_shared.any():
        return pairs
    same = pairs[is_shared].copy()
    whole = ["id", *TEXTS, *MODELS, "label", *({"user"} & {*pairs.columns})]
    same["first"] = same.groupby(whole, sort=False, dropna=False)["file_number"].transform("min")
    is_repeated = same["file_number"] > same["first"]
    # Rows under one id may be votes of several people on one battle.
    same["battle"] = _key_battles(same)
    same["is_clash"] = (same.groupby("id")["battle"].transform("nunique") > 1) | ~same["is_voted"]
    clashes = same[~is_repeated & same["is_clash"]]
    clashes = clashes[clashes["id"].duplicated(keep=False)]
    if len(clashes):
        shown = clashes.sort_values("id")[["id", "file"]].head(_N_SHOWN).to_dict("records")
        raise ValueError(
            f"training data: expected unique ids, got {len(clashes)} rows that share one: {shown}"
        )
    if not quiet and is_repeated.any():
        counts = same.loc[is_repeated, "file"].value_counts().to_dict()
        each = ", ".join(f"{n:,} of {name}" for name, n in counts.items())
        print(f"rows that an earlier file has, too, read once: {each}")
    return pairs.drop(index=same.index[is_repeated]).reset_index(drop=True)


def _key_battles(pairs: pd.DataFrame) -> list[int]:
    """Hash prompt, answers and chatbots, the same for a battle and its mirror image."""
    return [hash((prompt, frozenset(sides))) for prompt, *sides in _sides_of(pairs)]


def _sides_of(pairs: pd.DataFrame) -> list[tuple[Turns, tuple, tuple]]:
    """Prompts, and each side's answer and chatbot."""
    sides = (zip(pairs[f"response_{x}"], pairs[f"model_{x}"], strict=True) for x in "ab")
    return list(zip(pairs["prompt"], *sides, strict=True))


def _repeats_battles(part: pd.DataFrame) -> bool:
    if len(part) < _MIN_REPEATED:
        return False
    # Lengths tell most battles apart, and are quicker to compare than texts.
    lengths = [(len(p[0] or ""), len(a[0] or ""), len(b[0] or "")) for p, a, b in _texts_of(part)]
    return all(_has_votes(rows, part["label"]) for rows in (lengths, _sides_of(part)))


def _has_votes(battles: list, labels: pd.Series) -> bool:
    keys, winners = _hash_votes(battles, labels)
    n_winners = winners.groupby(keys).nunique()
    # The same battles with the same votes are copies of rows, not votes of several people.
    is_repeated = len(n_winners) * _MIN_VOTES <= len(battles)
    return is_repeated and bool((n_winners > 1).mean() >= _MIN_DISAGREEING)


def _hash_votes(battles: list, labels: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Hash battles (prompt and two sides) and the sides that won, the same for a mirror image."""
    keys, winners = [], []
    for (prompt, a, b), label in zip(battles, labels, strict=True):
        keys.append(hash((prompt, frozenset((a, b)))))
        winners.append(hash((a, b, "tie")[label]))
    return pd.Series(keys, dtype="int64"), pd.Series(winners, dtype="int64")


def _texts_of(pairs: pd.DataFrame) -> list[tuple[Turns, Turns, Turns]]:
    return list(zip(*(pairs[name] for name in TEXTS), strict=True))


def _merge_votes(pairs: pd.DataFrame, quiet: bool) -> pd.DataFrame:
    """Make one battle of several votes on it; A and B are those of its first vote."""
    voted = pairs[pairs["is_voted"]]
    keys = pd.Series(_key_battles(voted), index=voted.index)
    if not keys.duplicated().any():
        return pairs
    # Row by row, the first vote on the same battle.
    first = np.arange(len(pairs))
    places = voted.index.to_numpy()
    first[places] = pd.Series(places).groupby(keys.to_numpy()).transform("min")
    labels = pairs["label"].to_numpy()
    sides = list(zip(pairs["response_a"], pairs["model_a"], strict=True))
    is_mirrored = np.array([sides[row] != sides[top] for row, top in enumerate(first)])
    labels = np.where(is_mirrored, swap_labels(labels), labels)
    counts = pd.crosstab(first, labels).reindex(columns=range(len(VOTES)), fill_value=0)
    merged = pairs.loc[counts.index].copy()
    merged[list(VOTES)] = counts.to_numpy().astype(np.int32)
    merged["label"] = _most_frequent(counts.to_numpy())
    if "user" in merged.columns:
        merged.loc[counts.sum(axis=1) > 1, "user"] = ""  # several people
        merged = merged if merged["user"].any() else merged.drop(columns="user")
    if "vote_detail" in merged.columns:
        is_bad = pairs["vote_detail"].eq(BOTH_BAD).groupby(first).sum()
        is_mostly_bad = (is_bad * 2 >= counts[TIE]) & (merged["label"] == TIE)
        merged["vote_detail"] = np.where(is_mostly_bad, BOTH_BAD, "").astype(object)
    if not quiet:
        print(f"{len(pairs):,} votes on {len(merged):,} battles: several votes count as shares")
    return merged.reset_index(drop=True)


def _most_frequent(counts: np.ndarray) -> np.ndarray:
    """(N, C) votes -> (N,) int8 labels."""
    n_a, n_b, n_tie = counts.T
    winner = np.where(n_a > n_b, A_WINS, B_WINS)
    return np.where((n_a == n_b) | (n_tie > np.maximum(n_a, n_b)), TIE, winner).astype(np.int8)


def _as_integers(ids: pd.Series) -> pd.Series:
    """Convert ids to int64 if that changes none of them ("007" stays text)."""
    if not ids.str.fullmatch(r"-?\d{1,18}").all():
        return ids
    integers = ids.astype("int64")
    return integers if (integers.astype(str) == ids).all() else ids


def add_groups_and_folds(pairs: pd.DataFrame, n_folds: int = 5, seed: int = SEED) -> pd.DataFrame:
    """Assign every battle to a group and to the fold that holds it out.

    Battles whose prompts begin alike (whatever the case and spacing) share a group: repeated
    prompts, duplicates and mirrored duplicates. Folds hold complete groups and about the same
    shares of the labels; they depend on ids and texts alone, not on row order or machine.

    Where battles have a `user` (a person or a session), these join the groups of a user's
    battles, those with the fewest battles first, as long as no group outgrows a fold (or 20
    battles) and there are as many groups as folds: a user with thousands of battles, or chains
    of users by way of common prompts, would make a group of nearly all. Who is left out is printed.

    Returns:
        The same rows with `group` (int64, the hash of a prompt in it) and `fold` (int8, from 0).

    Raises:
        ValueError: `n_folds` is less than 2.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds: expected 2 or more, got {n_folds}")
    groups = np.array([hash_prompt(turns) for turns in pairs["prompt"]], dtype=np.int64)
    if "user" in pairs.columns:
        users = pairs["user"].fillna("").astype(str).to_numpy(dtype=object)
        groups = _join_users(groups, users, n_folds)
    order = np.lexsort((pairs["id"].astype(str).to_numpy(dtype="U"), groups))
    folds = np.empty(len(pairs), dtype=np.int8)
    folds[order] = _split(pairs["label"].to_numpy()[order], groups[order], n_folds, seed)
    return pairs.assign(group=groups, fold=folds)


def _join_users(groups: np.ndarray, users: np.ndarray, n_folds: int) -> np.ndarray:
    """Join the groups of each user's battles, within bounds; a group is named by its least hash."""
    limit = max(-(-len(groups) // n_folds), _MAX_SESSION)
    names, sizes = np.unique(groups, return_counts=True)
    leader = {int(name): int(name) for name in names}
    n_battles = dict(zip(leader, sizes.tolist(), strict=True))

    def find(name: int) -> int:
        while leader[name] != name:
            leader[name] = leader[leader[name]]  # halve the way for the next search
            name = leader[name]
        return name

    rows = pd.Series(groups[users != ""]).groupby(users[users != ""], sort=True)
    n_groups, left_out = len(names), 0
    for _, own in sorted(rows, key=lambda item: len(item[1])):
        joined = sorted({find(int(name)) for name in own})
        size = sum(n_battles[name] for name in joined)
        if len(joined) > 1 and (size > limit or n_groups - len(joined) + 1 < n_folds):
            left_out += 1
            continue
        n_groups -= len(joined) - 1
        n_battles[joined[0]] = size
        leader |= dict.fromkeys(joined, joined[0])
    if left_out:
        print(
            f"groups: {left_out:,} of {rows.ngroups:,} users or sessions share no group, which "
            f"would hold more than {limit:,} battles or leave fewer groups than folds"
        )
    return np.array([find(int(name)) for name in groups], dtype=np.int64)


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
    n_groups = codes.max(initial=-1) + 1
    n_rarest = min(np.unique(labels, return_counts=True)[1], default=0)
    if n_groups >= n_folds and n_rarest >= n_folds:
        folds = np.empty(len(codes), dtype=np.int64)
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(labels, labels, codes)):
            folds[held_out] = fold
        # With few groups the splitter may leave a fold empty: scikit-learn issue 34828.
        if len(np.unique(folds)) == n_folds:
            return folds
    if len(labels):
        lacking = f"; {n_folds - n_groups} folds stay empty" if n_groups < n_folds else ""
        print(
            f"folds: {n_groups:,} groups are too few to give {n_folds} folds like shares of the "
            f"votes, so they are dealt out in turn{lacking}"
        )
    return codes % n_folds


def describe_health(pairs: pd.DataFrame, problems: pd.DataFrame) -> pd.DataFrame:
    """Count what is unusual about the battles; `problems` are those of `load_pairs`.

    Returns:
        One row per check: check, count (battles), share, meaning.
    """
    texts = _texts_of(pairs)
    ordered = pd.Series(list(map(hash, texts)), dtype="int64")
    unordered, winners = _hash_votes(texts, pairs["label"])
    odd = problems[problems["expected"] == JSON_EXPECTED] if "expected" in problems else problems
    votes_differ = winners.groupby(unordered).transform("nunique") > 1
    is_mirrored = unordered.duplicated(keep=False) & ~ordered.duplicated(keep=False)
    counts = pd.DataFrame([_find_oddities(*row) for row in texts]).sum().to_dict() | {
        "text that is not a JSON list": odd["id"].nunique(),
        "exact duplicate": ordered.duplicated().sum(),
        "mirrored duplicate": is_mirrored.sum(),
        "duplicate with another vote": votes_differ.sum(),
        "prompt seen before": pairs["prompt"].map(hash_prompt).duplicated().sum(),
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
