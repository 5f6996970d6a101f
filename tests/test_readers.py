"""Claims about reading battles and freezing folds."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.readers import (
    add_groups_and_folds,
    decode_turns,
    describe_health,
    load_pairs,
)
from src.utils.schema import LABELS, TEXTS, swap_pairs
from tests.conftest import REAL_DATA

WINNERS = list(LABELS)
# Written down once: other values mean that frozen folds no longer mean the same.
FIRST_GROUP = 8439179984319139980
FIRST_FOLDS = [1, 0, 2, 3, 2, 0, 4, 2, 3, 0, 1, 2, 3, 3, 1, 1, 2, 2, 3, 2]


def write_rows(path: Path, rows: list[dict], **columns: object) -> Path:
    """A training file in the competition's layout."""
    table = pd.DataFrame(rows).assign(model_a="x", model_b="y", **columns)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)
    return path


def row(
    number: int, prompt: str = '["p"]', a: str = '["a"]', b: str = '["b"]', label: int = 0
) -> dict:
    """One training row, texts as they stand in the file."""
    votes = {name: int(index == label) for index, name in enumerate(WINNERS)}
    return {"id": number, "prompt": prompt, "response_a": a, "response_b": b, **votes}


@pytest.mark.parametrize(
    ("cell", "turns"),
    [
        ('["hi"]', ("hi",)),
        ('["hi", null, "there"]', ("hi", None, "there")),
        (r'["a\/b \u00e9 \"q\""]', ('a/b é "q"',)),
        (r'["\ud83d\ude00"]', ("😀",)),
        (r'["half \ud83d"]', ("half \ud83d",)),
        ('["raw\nline"]', ("raw\nline",)),
        ('["one\\",\\"two"]', ('one","two',)),
        (["list", None], ("list", None)),
        (np.array(["array"], dtype=object), ("array",)),
    ],
)
def test_turns_decode_exactly(cell: object, turns: tuple) -> None:
    assert decode_turns(cell) == (turns, None)


@pytest.mark.parametrize(
    ("cell", "kept"),
    [("not json", ("not json",)), ('"text"', ('"text"',)), ("", ("",)), ("[]", ("[]",)), ("['a']", ("['a']",)),
     ('["a", 5]', ("a", "5")), ("null", (None,)), (None, (None,)), (float("nan"), (None,))],
)  # fmt: skip
def test_what_does_not_decode_is_kept_and_reported(cell: str, kept: tuple) -> None:
    turns, expected = decode_turns(cell)
    assert turns == kept
    assert expected == "a JSON list of strings and nulls"


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "train.parquet"])
def test_every_format_gives_the_same_battles(tmp_path: Path, name: str) -> None:
    rows = [
        row(5, prompt='["NA"]', a='["null"]', label=2),
        row(3, a='["é", null]', b='["x,y\\n"]', label=1),
    ]
    pairs, problems = load_pairs(write_rows(tmp_path / name, rows))
    assert problems.empty
    assert pairs["id"].tolist() == [5, 3]
    assert pairs["prompt"].tolist() == [("NA",), ("p",)]
    assert pairs["response_a"].tolist() == [("null",), ("é", None)]
    assert pairs["response_b"].tolist() == [("b",), ("x,y\n",)]
    assert pairs["label"].tolist() == [2, 1]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{number}.csv", [row(number)]) for number in (2, 1)]
    assert load_pairs(files)[0]["id"].tolist() == [2, 1]


def test_a_broken_text_is_kept_and_named_with_file_row_id_and_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.csv", [row(1), row(77, b="oops [not json")])
    pairs, problems = load_pairs(path)
    assert pairs["response_b"].tolist() == [("b",), ("oops [not json",)]
    assert problems[["file", "row", "id", "column"]].values.tolist() == [
        ["bad.csv", 2, "77", "response_b"]
    ]


@pytest.mark.parametrize("votes", [(0, 0, 0), (1, 1, 0), (2, 0, 0), ("", 0, 0), ("yes", 0, 0)])
def test_a_row_without_exactly_one_winner_is_an_error_that_names_it(
    tmp_path: Path, votes: tuple
) -> None:
    path = write_rows(
        tmp_path / "bad.csv", [row(1), row(77) | dict(zip(WINNERS, votes, strict=True))]
    )
    with pytest.raises(
        ValueError, match=r"bad\.csv: 1 rows without exactly one winner.*row 2, id 77"
    ):
        load_pairs(path)


def test_a_missing_column_and_a_repeated_id_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    pd.DataFrame([row(1)]).drop(columns="response_a").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"t\.csv: expected columns .* missing \['response_a'\]"):
        load_pairs(path)
    with pytest.raises(ValueError, match=r"every id once, got 2 rows.*again\.csv"):
        load_pairs(write_rows(tmp_path / "again.csv", [row(1), row(1)]))


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet: expected a readable table"):
        load_pairs(path)


def test_bytes_that_are_no_text_do_not_stop_the_reading(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.csv", [row(1, a='["caf@"]')])
    path.write_bytes(path.read_bytes().replace(b"@", b"\xe9"))
    assert load_pairs(path)[0]["response_a"].tolist() == [("caf\udce9",)]


def test_ids_become_numbers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    assert load_pairs(write_rows(tmp_path / "n.csv", [row(12)]))[0]["id"].dtype == np.int64
    assert load_pairs(write_rows(tmp_path / "z.csv", [row("007"), row("8")]))[0]["id"].tolist() == [
        "007",
        "8",
    ]


def test_test_rows_need_no_votes_and_may_be_none(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    pd.DataFrame([row(1)])[["id", *TEXTS]].iloc[:0].to_csv(path, index=False)
    pairs, _ = load_pairs(path, labelled=False)
    assert list(pairs.columns) == ["id", *TEXTS]
    assert len(pairs) == 0


def test_no_group_is_in_two_folds_and_folds_are_even(demo_pairs: pd.DataFrame) -> None:
    assert demo_pairs.groupby("group")["fold"].nunique().max() == 1
    shares = pd.crosstab(demo_pairs["fold"], demo_pairs["label"], normalize="index")
    assert (shares.max() - shares.min()).max() < 0.12
    assert demo_pairs["fold"].value_counts().min() > 40


def test_repeated_and_mirrored_battles_share_a_group() -> None:
    pairs = pd.DataFrame(
        {
            "id": [1, 2, 3, 4],
            "prompt": [
                ("What is  love?",),
                ("what is love? ",),
                ("What is love?", "And hate?"),
                ("Other",),
            ],
            "response_a": [("a",), ("b",), ("a", "c"), ("a",)],
            "response_b": [("b",), ("a",), ("b", "d"), ("b",)],
            "label": [0, 1, 2, 0],
        }
    )
    groups = add_groups_and_folds(pairs, n_folds=2)["group"].tolist()
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_folds_do_not_depend_on_row_order_or_position(demo_pairs: pd.DataFrame) -> None:
    again = add_groups_and_folds(
        demo_pairs.sample(frac=1, random_state=0), n_folds=5, seed=7
    ).sort_index()
    pd.testing.assert_frame_equal(again, demo_pairs)
    assert (
        add_groups_and_folds(swap_pairs(demo_pairs), n_folds=5, seed=7)["group"]
        == demo_pairs["group"]
    ).all()
    assert (add_groups_and_folds(demo_pairs, n_folds=5, seed=8)["fold"] != demo_pairs["fold"]).any()


def test_folds_are_frozen_across_machines(demo_pairs: pd.DataFrame) -> None:
    assert demo_pairs["group"].iloc[0] == FIRST_GROUP
    assert demo_pairs["fold"].head(20).tolist() == FIRST_FOLDS


@pytest.mark.parametrize("n_pairs", [1, 2, 4, 7])
def test_a_handful_of_battles_still_gets_folds(demo_pairs: pd.DataFrame, n_pairs: int) -> None:
    folds = add_groups_and_folds(demo_pairs.head(n_pairs), n_folds=5)["fold"]
    assert folds.between(0, 4).all()


def test_the_health_table_counts_what_was_planted(ugly_pairs: pd.DataFrame, tmp_path: Path) -> None:
    battle = ugly_pairs.iloc[[9]]
    again = pd.concat(
        [ugly_pairs, battle.assign(id=98), swap_pairs(battle).assign(id=99)], ignore_index=True
    )
    _, problems = load_pairs(write_rows(tmp_path / "p.csv", [row(1, a="broken")]))
    counts = describe_health(again, problems).set_index("check")["count"]
    assert counts["text that is no JSON list"] == 1
    assert counts["null turn"] == 2
    assert counts["empty answer"] == 3
    assert counts["identical answers"] == 2
    assert counts["lone surrogate"] == 1
    assert counts["over 20,000 characters"] == 1
    assert counts["not in ASCII"] == 3
    assert counts["exact duplicate"] == 1
    assert counts["mirrored duplicate"] == 1
    assert counts["duplicate with another vote"] == 0
    assert counts["unequal turn counts"] == 3
    assert counts["prompt seen before"] == 2


def test_a_duplicate_with_another_vote_is_counted(ugly_pairs: pd.DataFrame) -> None:
    battle = ugly_pairs.iloc[[9]]
    other = battle.assign(id=98, label=(battle["label"] + 1) % 3)
    health = describe_health(
        pd.concat([ugly_pairs, other], ignore_index=True), pd.DataFrame({"id": []})
    )
    assert health.set_index("check").at["duplicate with another vote", "count"] == 2


def test_real_rows_are_read_whole(real_pairs: pd.DataFrame) -> None:
    raw = pd.concat(
        [pd.read_csv(REAL_DATA / name) for name in ("arena_sample.csv", "arena_extra.csv")]
    )
    assert real_pairs["id"].tolist() == raw["id"].tolist()
    assert (
        np.bincount(real_pairs["label"]).tolist() == raw[WINNERS].sum().tolist() == [313, 311, 274]
    )
    for name in TEXTS:
        assert [list(turns) for turns in real_pairs[name]] == [
            json.loads(cell) for cell in raw[name]
        ]
