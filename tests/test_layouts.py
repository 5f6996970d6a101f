"""Claims about the layouts of battle files: the table, each entry, votes, names and extras."""

import json
import zipfile

import pandas as pd
import pytest

from src.utils import paths
from src.utils.battles.layouts import LAYOUTS, describe_file, find_layout
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.paths import REAL_DATA
from src.utils.schema import LABELS, TEXTS, UNKNOWN_MODEL, VOTES
from tests.conftest import NO_REAL_DATA

REAL = REAL_DATA / "layouts"


def write(path, rows):
    """A table of rows, as CSV, JSON lines or parquet by its name."""
    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_csv(path, index=False)
    return path


def plain(number, winner="model_a", **more):
    """A row of WSDM's layout."""
    texts = {"prompt": f"question {number}", "response_a": "first", "response_b": "second"}
    return {"id": f"p{number}", **texts, "winner": winner, "model_a": "x", "model_b": "y", **more}


def chat(*texts):
    """A conversation, user first."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(texts)
    ]


def test_a_layout_is_recognised_by_its_columns_and_by_no_other_entry(tmp_path):
    for layout in LAYOUTS:
        assert find_layout(tmp_path, layout.columns(labelled=True), True) is layout
    path = write(tmp_path / "a.csv", [plain(1)])
    assert describe_file(path).startswith(f"{path}: read as texts with one column")
    odd = {name: cell for name, cell in plain(1).items() if name != "winner"} | {"who": 1}
    with pytest.raises(ValueError, match=r"x\.csv: .*missing \['winner'\], got .*'who'"):
        load_pairs(write(tmp_path / "x.csv", [odd]))


@pytest.mark.parametrize(
    ("winners", "label"),
    [
        (("model_a", "MODEL_A ", "Model A", "left", "response_a", "1", "1.0", "a"), 0),
        (("model_b", "Right", "response_b", 2, "2.0", "B"), 1),
        (("tie", "Tie", 0, "tie (bothbad)", "both_bad", "bothbad", "Both Bad"), 2),
    ],
)
def test_one_column_winner_is_read_whatever_it_is_called(tmp_path, winners, label):
    rows = [plain(number, winner) for number, winner in enumerate(winners)]
    pairs, _ = load_pairs(write(tmp_path / "w.csv", rows))
    assert pairs["label"].tolist() == [label] * len(winners)
    if label == 2:
        assert pairs["vote_detail"].tolist() == [""] * 3 + ["both_bad"] * 4
    else:
        assert "vote_detail" not in pairs


@pytest.mark.parametrize("winner", ["", "yes", "model_c", "3", "True"])
def test_a_winner_that_cannot_be_read_is_named(tmp_path, winner):
    path = write(tmp_path / "w.csv", [plain(1), plain(2, winner)])
    with pytest.raises(ValueError, match=rf"w\.csv: .*row 2, id p2: \['{winner}'\]"):
        load_pairs(path)


@pytest.mark.parametrize("votes", [(True, False, False), ("1.0", "", ""), ("TRUE", "0", None)])
@pytest.mark.parametrize("name", ["v.csv", "v.jsonl", "v.parquet"])
def test_three_votes_may_be_booleans_fractions_or_blanks(tmp_path, votes, name):
    row = plain(1) | dict(zip(LABELS, votes, strict=True))
    assert load_pairs(write(tmp_path / name, [row]))[0]["label"].tolist() == [0]


@pytest.mark.parametrize("name", ["n.csv", "n.parquet", "n.jsonl"])
@pytest.mark.parametrize("blank", [None, "", "NaN", " null ", float("nan")])
def test_blank_names_are_unknown_and_others_are_stripped(tmp_path, name, blank):
    rows = [plain(1, model_a=blank), plain(2) | {"model_a": " gpt $4 "}]
    pairs, _ = load_pairs(write(tmp_path / name, [plain(1) | {"model_a": blank}, rows[1]]))
    assert pairs["model_a"].tolist() == [UNKNOWN_MODEL, "gpt $4"]


def test_conversations_become_turns_and_odd_ones_are_kept_and_flagged(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    sides = [
        (chat("hi", "hello", "more", "yes"), chat("hi", "hey", "more", "no")),
        (chat("hi", parts), chat("hi", "hey")),
        (chat("hi", "hello", "more"), chat("hi", "hey", "more")),
        (chat("hi", "hello"), chat("hi", "hello") + chat("x", "y")[1:]),
        (chat("hi", "hello"), chat("ho", "hey")),
        ([{"role": "system", "content": "be brief"}, *chat("hi", "a")], "torn {"),
    ]
    rows = []
    for number, (a, b) in enumerate(sides):
        rows.append({"id": number, "conversation_a": a, "conversation_b": b, "winner": "tie"})
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, problems = load_pairs(path)
    assert pairs["prompt"].tolist() == [
        *(("hi", "more"), ("hi",), ("hi", "more"), ("hi",), ("hi",), ("be brief\n\nhi",))
    ]
    assert pairs["response_a"].tolist()[:3] == [("hello", "yes"), ("one\ntwo",), ("hello", None)]
    assert pairs["response_b"].tolist()[3:] == [("hello", "y"), ("hey",), ("torn {",)]
    named = problems[["row", "column", "expected"]].values.tolist()
    assert [(row, column) for row, column, _ in named] == [
        *((3, "conversation_a"), (3, "conversation_b"), (4, "conversation_b")),
        *((5, "conversation_b"), (6, "conversation_b")),
    ]
    assert "ends with an answer" in named[0][2] and "as many answers" in named[2][2]


@pytest.mark.parametrize("style", ["json", "python", "numpy"])
def test_conversations_in_csv_are_read_as_json_python_and_numpy_write_them(tmp_path, style):
    talk = chat('it\'s "fine"\n', "né\\n \t😀", "[1, 2]", "None")
    write_cell = {
        "json": json.dumps,
        "python": repr,
        "numpy": lambda cell: repr(cell).replace("}, {", "}\n {"),
    }[style]
    row = {"id": 1, "winner": "model_b", "conversation_b": write_cell(talk)}
    row["conversation_a"] = write_cell(talk)
    pairs, problems = load_pairs(write(tmp_path / "c.csv", [row]))
    assert problems.empty
    assert pairs["prompt"][0] == ('it\'s "fine"\n', "[1, 2]")
    assert pairs["response_b"][0] == ("né\\n \t😀", "None")


def test_mt_benchs_first_turn_is_cut_and_judges_of_one_pair_are_merged(tmp_path):
    a, b = chat("q", "A", "more", "AA"), chat("q", "B", "more", "BB")
    rows = []
    for judge, winner, turn in (("x", "model_a", 1), ("y", "tie", 1), ("x", "model_b", 2)):
        models = {"model_a": "m", "model_b": "n", "winner": winner, "judge": judge, "turn": turn}
        rows.append({"question_id": 81, "conversation_a": a, "conversation_b": b, **models})
    exchanged = {"model_a": "n", "model_b": "m", "conversation_a": b, "conversation_b": a}
    rows.append(rows[0] | exchanged | {"judge": "z", "winner": "model_b"})
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, _ = load_pairs(path)
    assert pairs["response_a"].tolist() == [("A",), ("A", "AA")]
    assert pairs[list(VOTES)].values.tolist() == [[2, 0, 1], [0, 1, 0]]
    assert pairs["label"].tolist() == [0, 1] and pairs["user"].tolist() == ["", "x"]
    assert pairs["id"].is_unique


@pytest.mark.parametrize("kind", ["plain", "messages", "transcript"])
def test_chosen_answers_stand_in_a_position_drawn_from_the_seed(tmp_path, kind):
    rows = []
    for number in range(40):
        prompt, good, bad = f"q {number}", f"good {number}", f"bad {number}"
        row = {"prompt": prompt, "chosen": good, "rejected": bad, "chosen_model": "top"}
        if kind == "messages":
            row |= {"chosen": chat(prompt, good), "rejected": chat(prompt, bad)}
        elif kind == "transcript":
            start = f"\n\nHuman: {prompt}\n\nAssistant: "
            row = {"chosen": start + good, "rejected": start + bad, "chosen_model": "top"}
        rows.append(row)
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, problems = load_pairs(path)
    assert problems.empty and pairs["id"].is_unique
    assert 8 < pairs["label"].sum() < 32
    for row in pairs.itertuples():
        answers, names = (row.response_a, row.response_b), (row.model_a, row.model_b)
        number = row.prompt[0].removeprefix("q ")
        assert answers[row.label] == (f"good {number}",) and names[row.label] == "top"
        assert answers[1 - row.label] == (f"bad {number}",) and names[1 - row.label] == "unknown"
    assert load_pairs(path, seed=1)[0]["label"].tolist() != pairs["label"].tolist()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    assert load_pairs(path)[0]["label"].tolist() == pairs["label"].tolist()[::-1]


def test_language_time_and_user_are_kept_and_odd_times_flagged(tmp_path):
    zoned, since = "2024-05-01 14:00:00+02:00", ("1714564800.0", "1714564800000")
    times = ["2024-05-01T12:00:00", zoned, *since, "soon", ""]
    rows = []
    for number, time in enumerate(times):
        rows.append(plain(number, language="en", tstamp=time, session_id=f"s{number}"))
    pairs, problems = load_pairs(write(tmp_path / "e.csv", rows))
    assert pairs["timestamp"].isna().tolist() == [False] * 4 + [True] * 2
    assert set(pairs["timestamp"].dropna()) == {pd.Timestamp("2024-05-01 12:00", tz="UTC")}
    assert pairs["language"].tolist() == ["en"] * 6
    assert pairs["user"].tolist() == [f"s{number}" for number in range(6)]
    assert problems[["row", "column"]].values.tolist() == [[5, "tstamp"]]
    other, _ = load_pairs([tmp_path / "e.csv", write(tmp_path / "f.csv", [plain(9)])])
    assert other["language"].tolist() == ["en"] * 6 + [""]
    assert {"language", "timestamp", "user"} <= {*add_groups_and_folds(pairs, 2).columns}


@pytest.mark.parametrize("data", ["k.zip", "", "k.zip/train.csv"])
def test_the_competitions_zip_is_read_as_it_was_downloaded(tmp_path, data):
    row = {name: int(name == LABELS[1]) for name in LABELS} | plain(1)
    write(tmp_path / "train.txt", [row])
    test = {name: row[name] for name in ("id", *TEXTS)}
    write(tmp_path / "test.txt", [test])
    (tmp_path / "given").mkdir()
    with zipfile.ZipFile(tmp_path / "given" / "k.zip", "w") as archive:
        archive.write(tmp_path / "train.txt", "train.csv")
        archive.write(tmp_path / "test.txt", "test.csv")
        archive.writestr("sample_submission.csv", "id," + ",".join(LABELS) + "\n")
    source = paths.find_raw_data(str(tmp_path / "given" / data))
    assert [path.name for path in source.train] == ["train.csv"]
    assert load_pairs(source.train)[0]["label"].tolist() == [1]
    assert load_pairs(source.test, labelled=False)[0]["id"].tolist() == ["p1"]
    assert source.sample_submission.name == "sample_submission.csv"
    assert paths.on_disk(source.train[0]) == tmp_path / "given" / "k.zip"


# ---- the files of other people -----------------------------------------------

N_BATTLES = {
    "arena_140k_sample.csv": 100,
    "winner_column.csv": 80,
    "plain_texts_wsdm.csv": 60,
    "python_lists.csv": 40,
    "boolean_votes.csv": 60,
    "blank_for_zero_votes.csv": 60,
    "blank_names.csv": 120,
    "markup_names.csv": 400,
    "odd_header.csv": 40,
    "tabs.tsv": 40,
    "lines.jsonl": 40,
    "several_votes.csv.gz": 500,
}
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{NO_REAL_DATA} (layouts)")


@needs_real
@pytest.mark.parametrize("name", N_BATTLES)
def test_each_real_layout_is_read_whole(name):
    pairs, problems = load_pairs(REAL / name)
    assert len(pairs) == N_BATTLES[name] and problems.empty
    assert sorted(add_groups_and_folds(pairs)["fold"].unique()) == [0, 1, 2, 3, 4]


@needs_real
def test_the_real_files_hold_what_their_list_says(tmp_path):
    arena, _ = load_pairs(REAL / "arena_140k_sample.csv")
    assert arena["label"].value_counts().to_dict() == {0: 38, 1: 33, 2: 29}
    assert (arena["vote_detail"] == "both_bad").sum() == 10 and arena["user"].is_unique
    raw = pd.read_csv(REAL / "plain_texts_wsdm.csv", dtype=str, keep_default_na=False)
    wsdm, _ = load_pairs(REAL / "plain_texts_wsdm.csv")
    for name in TEXTS:
        assert wsdm[name].tolist() == [(text,) for text in raw[name]]
    lists, _ = load_pairs(REAL / "python_lists.csv")
    assert lists["response_a"].map(lambda turns: turns[1]).tolist() == [None] * 40
    names, _ = load_pairs(REAL / "blank_names.csv")
    pd.read_csv(REAL / "blank_names.csv").to_parquet(tmp_path / "blank_names.parquet")
    pd.testing.assert_frame_equal(load_pairs(tmp_path / "blank_names.parquet")[0], names)
    assert (names["model_a"] == UNKNOWN_MODEL).sum() == 40
    votes, _ = load_pairs(REAL / "several_votes.csv.gz")
    assert votes[list(VOTES)].to_numpy().sum() == 2100


@needs_real
def test_a_torn_row_is_read_as_it_was_meant_and_shared_rows_are_read_once(capsys):
    torn, problems = load_pairs(REAL / "torn_row_test.csv", labelled=False)
    assert torn["id"].tolist() == [*range(9000, 9300)]
    assert torn["prompt"][149] == ("plain words with a return\r inside",)
    assert problems[["row", "column"]].values.tolist() == [[150, "prompt"]]
    files = [REAL / "shared_rows_1.csv", REAL / "shared_rows_2.csv"]
    assert len(load_pairs(files)[0]) == 80
    assert "10 of shared_rows_2.csv" in capsys.readouterr().out
