"""Reading battles, groups and folds, and the health table."""

import json

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.readers import (
    add_groups_and_folds,
    decode_turns,
    describe_health,
    iter_battles,
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


# ---- ids and votes -----------------------------------------------------------


def write_plain(path, rows):
    """Rows of id, answer of A and winner, and whatever more, as CSV."""
    fixed = {"prompt": "q", "response_b": "B", "model_a": "x", "model_b": "y"}
    pd.DataFrame([fixed | each for each in rows]).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("blank", ["", "  ", "nan"])
@pytest.mark.parametrize("labelled", [True, False])
def test_blank_ids_are_named(tmp_path, blank, labelled):
    path = write_rows(tmp_path / "t.csv", [row(1), row(blank), row(3)])
    with pytest.raises(ValueError, match=r"t\.csv: .*1 blank: rows 2"):
        load_pairs(path, labelled=labelled)


@pytest.mark.parametrize("spoilt", ["1.23E+09", "12.0", "1e5", "7."])
def test_ids_that_a_spreadsheet_spoilt_are_refused_in_a_test_file(tmp_path, spoilt):
    path = write_rows(tmp_path / "t.csv", [row("1234567890"), row(spoilt)])
    with pytest.raises(ValueError, match=rf"t\.csv: .*row 2: {spoilt}".replace("+", r"\+")):
        load_pairs(path, labelled=False)
    names = write_rows(tmp_path / "n.csv", [row("12e5"), row("ab12")])
    assert load_pairs(names, labelled=False)[0]["id"].tolist() == ["12e5", "ab12"]


def test_rows_without_ids_get_some_that_depend_on_the_row_alone(tmp_path):
    rows = [{"response_a": text, "winner": "tie"} for text in ("one", "two", "one")]
    pairs, _ = load_pairs(write_plain(tmp_path / "t.csv", rows))
    again, _ = load_pairs(write_plain(tmp_path / "again.csv", rows[::-1]))
    assert pairs["id"].is_unique and set(pairs["id"]) == set(again["id"])
    assert load_pairs([tmp_path / "t.csv", tmp_path / "again.csv"])[0].shape == pairs.shape


def test_rows_that_two_files_share_are_read_once_and_other_rows_under_one_id_are_refused(
    tmp_path, capsys
):
    first = write_rows(tmp_path / "1.csv", [row(1), row(2)])
    second = write_rows(tmp_path / "2.csv", [row(2), row(3)])
    assert load_pairs([first, second, first])[0]["id"].tolist() == [1, 2, 3]
    assert "1 of 2.csv" in capsys.readouterr().out
    other = write_rows(tmp_path / "3.csv", [row(2, label=1)])
    with pytest.raises(ValueError, match=r"2 rows .*'id': '2', 'file': '1\.csv'.*3\.csv"):
        load_pairs([first, other])


def test_votes_of_several_people_become_one_battle_with_counts(tmp_path, capsys):
    rows = [
        {"id": 1, "worker": "u", "response_a": "A", "winner": "model_a"},
        {"id": 1, "worker": "v", "response_a": "A", "winner": "tie"},
        {"id": 2, "worker": "u", "response_a": "C", "winner": "both_bad"},
        {"id": 3, "worker": "w", "response_a": "B", "response_b": "A", "winner": "model_b"},
    ]
    rows[3] |= {"model_a": "y", "model_b": "x"}
    pairs, _ = load_pairs(write_plain(tmp_path / "t.csv", rows))
    assert "4 votes on 2 battles" in capsys.readouterr().out
    assert pairs[["id", "label", "votes_a", "votes_b", "votes_tie"]].values.tolist() == [
        *([1, 0, 2, 0, 1], [2, 2, 0, 0, 1])
    ]
    assert pairs["user"].tolist() == ["", "u"]
    assert pairs["vote_detail"].tolist() == ["", "both_bad"]
    bad = [rows[0], rows[1] | {"response_a": "other"}]
    with pytest.raises(ValueError, match="2 rows"):
        load_pairs(write_plain(tmp_path / "bad.csv", bad))


@pytest.mark.parametrize(
    ("votes", "label"), [("AABB", 2), ("AT", 0), ("BT", 1), ("ABT", 2), ("AABTTT", 2), ("ABB", 1)]
)
def test_the_most_frequent_vote_is_the_label(tmp_path, votes, label):
    names = {"A": "left", "B": "right", "T": "tie"}
    rows = [
        {"id": n, "judge": n, "response_a": "A", "winner": names[v]} for n, v in enumerate(votes)
    ]
    assert load_pairs(write_plain(tmp_path / "t.csv", rows))[0]["label"].tolist() == [label]


@pytest.mark.parametrize("disagree", [True, False])
def test_a_long_table_that_repeats_its_battles_holds_votes_only_where_people_disagree(
    tmp_path, disagree
):
    rows = []
    for number in range(150):
        vote = "left" if disagree and number > 70 else "tie"
        rows.append({"id": number, "response_a": f"A{number % 50}", "winner": vote})
    pairs, _ = load_pairs(write_plain(tmp_path / "t.csv", rows))
    assert len(pairs) == (50 if disagree else 150)


# ---- sessions and folds ------------------------------------------------------


def make_sessions(users, prompts=None):
    """Battles of these users, each with a prompt of its own or of these numbers."""
    numbers = range(len(users)) if prompts is None else prompts
    return pd.DataFrame(
        {
            "id": range(len(users)),
            "prompt": pd.Series([(f"question {number}",) for number in numbers], dtype=object),
            "user": users,
            "label": [number % 3 for number in range(len(users))],
        }
    )


def test_battles_that_share_a_prompt_or_a_session_are_in_one_group():
    prompts = [0, 1, 2, 3, 1, *range(5, 12)]
    pairs = make_sessions(["a", "a", "b", "b", "c", "c", *["", None] * 3], prompts)
    groups = add_groups_and_folds(pairs, n_folds=2)["group"].tolist()
    assert groups[0] == groups[1] == groups[4] == groups[5]  # session a, question 1, session c
    assert groups[2] == groups[3] != groups[0]
    assert len({*groups[6:]}) == 6  # no user is known
    alone = add_groups_and_folds(pairs.drop(columns="user"), n_folds=2)["group"]
    assert alone.nunique() == 11


def test_a_user_with_most_of_the_battles_joins_nothing(capsys):
    pairs = make_sessions(["heavy"] * 300 + [f"u{n // 3}" for n in range(99)])
    split = add_groups_and_folds(pairs, n_folds=5)
    assert split["group"].nunique() == 300 + 33 and split["fold"].nunique() == 5
    assert "1 of 34 users" in capsys.readouterr().out


def test_no_fold_is_empty_where_there_are_as_many_prompts_as_folds(capsys):
    # Votes for A, B and tie of each prompt: scikit-learn's splitter leaves a fold empty.
    votes = [(0, 23, 0), (0, 1, 16), (29, 0, 0), (9, 0, 13), (5, 22, 1), (32, 0, 0), (0, 0, 39)]
    counts = np.array([*votes, (1, 4, 0)])
    prompts, labels = np.nonzero(counts)
    numbers = prompts.repeat(counts[prompts, labels])
    pairs = make_sessions([""] * len(numbers), numbers).drop(columns="user")
    pairs["label"] = labels.repeat(counts[prompts, labels])
    split = add_groups_and_folds(pairs, n_folds=8, seed=0)
    assert split["fold"].nunique() == split["group"].nunique() == 8
    assert "dealt out in turn" in capsys.readouterr().out
    add_groups_and_folds(pairs.head(2), n_folds=4)
    assert "3 folds stay empty" in capsys.readouterr().out


# ---- in pieces ---------------------------------------------------------------


def test_pieces_hold_the_battles_that_one_reading_gives_and_where_they_were_odd(tmp_path):
    path = tmp_path / "test.csv"
    rows = [row(number, a="torn" if number in (3, 8) else '["a"]') for number in range(1, 11)]
    write_rows(path, rows)
    chunks = list(iter_battles(path, 4))
    assert [len(chunk.pairs) for chunk in chunks] == [4, 4, 2]
    whole, problems = load_pairs(path, labelled=False)
    found = pd.concat([chunk.pairs for chunk in chunks], ignore_index=True)
    pd.testing.assert_frame_equal(found.astype({"id": int}), whole)
    odd = [problem for chunk in chunks for problem in chunk.problems]
    assert odd == problems.to_dict("records") and [each["row"] for each in odd] == [3, 8]
    assert chunks[-1].share == 1.0


def test_pieces_without_ids_are_numbered_through_and_a_blank_id_is_named(tmp_path):
    texts = dict.fromkeys(TEXTS, "x")
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(texts)}\n" * 5)
    ids = [name for chunk in iter_battles(path, 2) for name in chunk.pairs["id"]]
    assert ids == ["1", "2", "3", "4", "5"]
    path.write_text("".join(json.dumps(texts | {"id": name}) + "\n" for name in ("a", "b", " ")))
    pieces = iter_battles(path, 2)
    assert next(pieces).pairs["id"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match=r"t\.jsonl: row 3, column id"):
        next(pieces)


def test_of_chosen_and_rejected_answers_a_is_the_chosen_one_in_every_piece(tmp_path):
    path = tmp_path / "t.jsonl"
    texts = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    path.write_text(f"{json.dumps(texts)}\n" * 20)
    chunks = list(iter_battles(path, 6))
    assert {turns for chunk in chunks for turns in chunk.pairs["response_a"]} == {("good",)}
