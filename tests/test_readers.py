"""Reading battles, groups and folds, and the health table."""

import json

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.readers import (
    add_groups_and_folds,
    decode_turns,
    describe_health,
    load_pairs,
)
from src.utils.paths import REAL_DATA
from src.utils.schema import LABELS, TEXTS, swap_pairs

# Frozen: other values would mean that existing folds have changed.
FIRST_GROUP = 8439179984319139980
FIRST_FOLDS = [1, 0, 2, 3, 2, 0, 4, 2, 3, 0, 1, 2, 3, 3, 1, 1, 2, 2, 3, 2]
SURROGATE_GROUP = 5016154770004619557


def write_rows(path, rows):
    """Write a training file in the competition's layout."""
    table = pd.DataFrame(rows).assign(model_a="x", model_b="y")
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)
    return path


def row(number, prompt='["p"]', a='["a"]', b='["b"]', label=0):
    """One training row, texts as a file has them."""
    votes = {name: int(index == label) for index, name in enumerate(LABELS)}
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
def test_turns_are_decoded_exactly(cell, turns):
    assert decode_turns(cell) == (turns, None)


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        *((text, text) for text in ("not json", '"text"', "", "[]", "['a']")),
        *((cell, None) for cell in ("null", None, float("nan"), [])),
    ],
)
def test_a_damaged_text_is_kept_as_one_turn_and_reported(cell, kept):
    turns, expected = decode_turns(cell)
    assert turns == (kept,)
    assert "JSON list" in expected


def test_a_turn_that_is_not_text_is_kept_as_json():
    turns, expected = decode_turns('["a", 5]')
    assert turns == ("a", "5") and "JSON list" in expected


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "train.parquet"])
def test_every_format_gives_the_same_battles(tmp_path, name):
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


def test_several_files_are_read_in_order_and_none_is_an_error(tmp_path):
    files = [write_rows(tmp_path / f"{number}.csv", [row(number)]) for number in (2, 1)]
    assert load_pairs(files)[0]["id"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="at least one file"):
        load_pairs([])


def test_a_damaged_text_is_named_with_file_row_id_and_column(tmp_path):
    path = write_rows(tmp_path / "bad.csv", [row(1), row(77, b="oops [not json")])
    pairs, problems = load_pairs(path)
    assert pairs["response_b"].tolist() == [("b",), ("oops [not json",)]
    named = problems[["file", "row", "id", "column", "found"]].values.tolist()
    assert named == [["bad.csv", 2, "77", "response_b", "'oops [not json'"]]


@pytest.mark.parametrize("votes", [(0, 0, 0), (1, 1, 0), (2, 0, 0), ("", 0, 0), ("yes", 0, 0)])
def test_a_row_without_exactly_one_winner_is_named(tmp_path, votes):
    bad = row(77) | dict(zip(LABELS, votes, strict=True))
    path = write_rows(tmp_path / "bad.csv", [row(1), bad])
    with pytest.raises(ValueError, match=r"bad\.csv: .*got 1 rows.*row 2, id 77"):
        load_pairs(path)


def test_a_missing_column_and_a_repeated_id_are_named(tmp_path):
    path = tmp_path / "t.csv"
    pd.DataFrame([row(1)]).drop(columns="response_a").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"t\.csv: .*missing \['response_a'\]"):
        load_pairs(path)
    with pytest.raises(ValueError, match=r"2 rows .*again\.csv"):
        load_pairs(write_rows(tmp_path / "again.csv", [row(1), row(1)]))


def test_a_file_that_is_not_a_table_is_named(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet: expected a readable table"):
        load_pairs(path)


def test_bytes_that_are_not_utf8_become_surrogates(tmp_path):
    path = write_rows(tmp_path / "t.csv", [row(1, a='["caf@"]')])
    path.write_bytes(path.read_bytes().replace(b"@", b"\xe9"))
    assert load_pairs(path)[0]["response_a"].tolist() == [("caf\udce9",)]


@pytest.mark.parametrize(
    ("ids", "read"), [(["12", "-3"], [12, -3]), (["007", "8"], ["007", "8"]), (["x"], ["x"])]
)
def test_ids_become_numbers_only_if_nothing_is_lost(tmp_path, ids, read):
    path = write_rows(tmp_path / "t.csv", [row(name) for name in ids])
    assert load_pairs(path)[0]["id"].tolist() == read


def test_test_rows_need_no_votes_and_may_be_none(tmp_path):
    path = tmp_path / "test.csv"
    pd.DataFrame([row(1)])[["id", *TEXTS]].iloc[:0].to_csv(path, index=False)
    pairs, _ = load_pairs(path, labelled=False)
    assert list(pairs.columns) == ["id", *TEXTS]
    assert len(pairs) == 0


def test_no_group_is_in_two_folds_and_folds_are_even(demo_pairs):
    assert demo_pairs.groupby("group")["fold"].nunique().max() == 1
    shares = pd.crosstab(demo_pairs["fold"], demo_pairs["label"], normalize="index")
    assert (shares.max() - shares.min()).max() < 0.12
    assert demo_pairs["fold"].value_counts().min() > 40


def test_repeated_and_mirrored_battles_share_a_group(demo_pairs):
    prompts = [
        ("What is  love?",),
        ("what is love? ",),
        (None, "What is love?", "And hate?"),
        ("Other",),
    ]
    pairs = demo_pairs.head(4).assign(prompt=pd.Series(prompts, dtype=object))
    groups = add_groups_and_folds(pairs, n_folds=2)["group"].tolist()
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_folds_do_not_depend_on_row_order_or_position(demo_pairs):
    def split(pairs, seed=7):
        return add_groups_and_folds(pairs, n_folds=5, seed=seed)

    shuffled = demo_pairs.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(split(shuffled).sort_index(), demo_pairs)
    assert split(swap_pairs(demo_pairs))["group"].equals(demo_pairs["group"])
    assert not split(demo_pairs, seed=8)["fold"].equals(demo_pairs["fold"])
    with pytest.raises(ValueError, match="n_folds"):
        add_groups_and_folds(demo_pairs, n_folds=1)


def test_groups_and_folds_are_frozen(demo_pairs, ugly_pairs):
    assert demo_pairs["group"].iloc[0] == FIRST_GROUP
    assert demo_pairs["fold"].head(20).tolist() == FIRST_FOLDS
    assert ugly_pairs["group"].iloc[3] == SURROGATE_GROUP


@pytest.mark.parametrize("n_pairs", [1, 2, 4, 7])
def test_a_handful_of_battles_still_gets_folds(demo_pairs, n_pairs):
    folds = add_groups_and_folds(demo_pairs.head(n_pairs), n_folds=5)["fold"]
    assert folds.between(0, 4).all()


def test_the_health_table_counts_what_was_planted(ugly_pairs, tmp_path):
    battle = ugly_pairs.iloc[[9]]
    repeated = [ugly_pairs, battle.assign(id=98), swap_pairs(battle).assign(id=99)]
    _, problems = load_pairs(write_rows(tmp_path / "p.csv", [row(1, a="broken")]))
    health = describe_health(pd.concat(repeated, ignore_index=True), problems)
    counts = health.set_index("check")["count"].to_dict()
    assert counts == {
        "text that is not a JSON list": 1,
        "null turn": 2,
        "empty answer": 3,
        "identical answers": 2,
        "more than one turn": 4,
        "unequal turn counts": 3,
        "over 20,000 characters": 1,
        "not in ASCII": 3,
        "lone surrogate": 1,
        "exact duplicate": 1,
        "mirrored duplicate": 1,
        "duplicate with another vote": 0,
        "prompt seen before": 2,
    }
    assert health["share"].tolist() == pytest.approx([count / 14 for count in counts.values()])


def test_a_duplicate_with_another_vote_is_counted(ugly_pairs):
    battle = ugly_pairs.iloc[[9]]
    other = battle.assign(id=98, label=(battle["label"] + 1) % 3)
    pairs = pd.concat([ugly_pairs, other], ignore_index=True)
    health = describe_health(pairs, pd.DataFrame({"id": []}))
    assert health.set_index("check").at["duplicate with another vote", "count"] == 2


def test_real_rows_are_read_completely(real_pairs):
    files = [REAL_DATA / name for name in ("arena_sample.csv", "arena_extra.csv")]
    raw = pd.concat([pd.read_csv(file) for file in files])
    assert real_pairs["id"].tolist() == raw["id"].tolist()
    assert np.bincount(real_pairs["label"]).tolist() == [313, 311, 274]
    assert raw[list(LABELS)].sum().tolist() == [313, 311, 274]
    for name in TEXTS:
        assert real_pairs[name].map(list).tolist() == raw[name].map(json.loads).tolist()
