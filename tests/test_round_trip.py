"""Random battles written in each layout and file type are read back the same."""

import csv
import gzip
import json
import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.schema import LABELS, MODELS, TEXTS, VOTES, swap_labels

FILES = (
    *("t.csv", "t.csv.gz", "t.tsv", "semicolons.csv", "utf16.csv", "bom.csv", "pandas.csv"),
    *("t.jsonl", "t.jsonl.gz", "t.parquet", "t.zip"),
)
LAYOUTS = ("competition", "json lists", "python lists", "numpy lists", "plain", "chat", "parts")
MANY = settings(
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"),
        st.sampled_from("[]{}'\",;\t\n\r\\| \x00NaN"),
    ),
    max_size=30,
)
names = st.text(st.characters(categories=["L", "N", "Sc"]), min_size=1, max_size=8).filter(
    lambda name: name.casefold() not in ("none", "nan", "null")
)


@st.composite
def battles(draw, plain):
    """A battle as it is in memory; a plain one has single turns."""
    n_turns = 1 if plain else draw(st.integers(1, 3))
    sides = [draw(st.lists(texts, min_size=n_turns, max_size=n_turns)) for _ in range(3)]
    row = dict(zip(TEXTS, map(tuple, sides), strict=True))
    row |= {name: draw(names) for name in MODELS}
    return row | {"label": draw(st.integers(0, 2)), "language": draw(names)}


def write_turns(turns, layout):
    """A text as a file of the layout has it."""
    if layout == "plain":
        return turns[0]
    if layout == "python lists":
        return repr(list(turns))
    if layout == "numpy lists":
        with np.printoptions(threshold=10**6):
            return str(np.array(turns, dtype=object))
    return list(turns) if layout == "competition" else json.dumps(turns)


def write_chat(prompt, answer, layout):
    """A conversation as the arena has it."""
    talk = []
    for pair in zip(prompt, answer, strict=True):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = [{"type": "text", "text": text}] if layout == "parts" else text
            talk.append({"role": role, "content": content})
    return talk


def write_row(number, battle, layout):
    """A row of a file."""
    row = {"id": f"id {number}", **{name: battle[name] for name in (*MODELS, "language")}}
    if layout in ("chat", "parts"):
        for side in "ab":
            answer = battle[f"response_{side}"]
            row[f"conversation_{side}"] = write_chat(battle["prompt"], answer, layout)
    else:
        row |= {name: write_turns(battle[name], layout) for name in TEXTS}
    if layout in ("competition", "json lists"):
        return row | {name: int(battle["label"] == k) for k, name in enumerate(LABELS)}
    return row | {"winner": ("model_a", "model_b", "tie")[battle["label"]]}


def write_file(folder, name, rows):
    """Write rows to a file of the type that its name says."""
    path = Path(folder) / name
    if name.endswith("parquet"):
        pd.DataFrame(rows).to_parquet(path)
        return path
    if "json" in name:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        table = pd.DataFrame(rows).map(
            lambda cell: json.dumps(cell) if isinstance(cell, list) else cell
        )
        separator = {"t.tsv": "\t", "semicolons.csv": ";"}.get(name, ",")
        # Without an argument pandas leaves returns in bare cells.
        quoting = csv.QUOTE_MINIMAL if name == "pandas.csv" else csv.QUOTE_ALL
        text = table.to_csv(index=False, sep=separator, quoting=quoting)
        data = text.encode({"utf16.csv": "utf-16", "bom.csv": "utf-8-sig"}.get(name, "utf-8"))
    if name == "t.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.csv", data)
        return path / "train.csv"
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("layout", LAYOUTS)
@MANY
@given(data=st.data())
def test_battles_are_read_back_the_same(layout, name, data):
    drawn = data.draw(st.lists(battles(layout == "plain"), min_size=1, max_size=4))
    rows = [write_row(number, battle, layout) for number, battle in enumerate(drawn)]
    if layout == "plain":  # what a column of plain texts looks like must not be a list's
        rows += [write_row(f"more {n}", drawn[0] | PLAIN, layout) for n in range(30)]
    with tempfile.TemporaryDirectory() as folder:
        pairs, problems = load_pairs(write_file(folder, name, rows), quiet=True)
    assert problems.empty
    for row, battle in enumerate(drawn):
        assert pairs.iloc[row][list(battle)].to_dict() == battle
    assert not {*VOTES} & {*pairs.columns}


PLAIN = {name: (f"plain {name}",) for name in TEXTS}


@MANY
@given(
    votes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=30
    )
)
def test_votes_on_one_battle_are_counted_whatever_the_positions(votes):
    rows, counts = [], {}
    for number, (battle, label, is_exchanged) in enumerate(votes):
        sides = [(f"a {battle}", "x"), (f"b {battle}", "y")]
        given_label = swap_labels(np.array([label]))[0] if is_exchanged else label
        (a, model_a), (b, model_b) = sides[::-1] if is_exchanged else sides
        row = {"id": number, "worker": number, "prompt": "q", "response_a": a, "response_b": b}
        row |= {"model_a": model_a, "model_b": model_b}
        rows.append(row | {"winner": ("left", "right", "tie")[given_label]})
        counts.setdefault(battle, np.zeros(3, dtype=int))[label] += 1
    with tempfile.TemporaryDirectory() as folder:
        pairs, _ = load_pairs(write_file(folder, "t.csv", rows), quiet=True)
    assert len(pairs) == len(counts)
    for row, (battle, expected) in zip(pairs.itertuples(), counts.items(), strict=True):
        is_exchanged = row.response_a == (f"b {battle}",)
        expected = expected.tolist()
        expected = [expected[1], expected[0], expected[2]] if is_exchanged else expected
        if len(counts) < len(votes):
            assert [row.votes_a, row.votes_b, row.votes_tie] == expected
        assert expected[row.label] == max(expected) or expected[0] == expected[1]


@MANY
@given(
    battles=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=60
    ),
    n_folds=st.integers(2, 9),
)
def test_folds_are_never_empty_where_there_are_prompts_enough(battles, n_folds):
    pairs = pd.DataFrame(battles, columns=["prompt", "user", "label"])
    pairs["id"] = range(len(pairs))
    pairs["prompt"] = [(f"question {number}",) for number in pairs["prompt"]]
    pairs["user"] = pairs["user"].map(lambda user: f"u{user}" if user else "")
    split = add_groups_and_folds(pairs, n_folds)
    prompts = pairs["prompt"].nunique()
    assert split["fold"].nunique() == min(n_folds, prompts, split["group"].nunique())
    assert split["fold"].nunique() == n_folds or prompts < n_folds
    assert split.groupby("group")["fold"].nunique().max() == 1
    assert split.groupby("prompt")["group"].nunique().max() == 1
    largest = split["group"].value_counts().max()
    bound = max(math.ceil(len(pairs) / n_folds), 20)
    assert largest <= max(bound, pairs["prompt"].value_counts().max())
    again = add_groups_and_folds(pairs.sample(frac=1, random_state=0), n_folds).sort_index()
    assert again["group"].equals(split["group"])
