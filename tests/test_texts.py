"""Claims about turns: lists as JSON, Python and numpy write them, plain text, conversations."""

import contextlib
import time

import numpy as np
import pytest

from src.utils.battles.texts import decode_columns, parse_literal, read_messages, split_messages


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["a", None, 'it\'s "x"', "\\n\n\t\x00\x7fé\u2028😀\ud83d", "[1]"],
        [{"role": "user", "content": [{"type": "text", "n": -1.5e10}, ("x", True)]}],
    ],
)
def test_what_python_prints_is_read_back(value):
    expected = [{"role": "user", "content": [{"type": "text", "n": -1.5e10}, ["x", True]]}]
    assert parse_literal(repr(value)) == (expected if value and value[0] != "a" else value)


def test_what_numpy_prints_is_read_back_without_joining_neighbours():
    turns = np.array(["first", "it's", None, "a\nb"], dtype=object)
    assert parse_literal(str(turns)) == ["first", "it's", None, "a\nb"]
    parts = np.array([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], dtype=object)
    talk = np.array([{"role": "user", "content": parts}, {"role": "assistant"}], dtype=object)
    read = parse_literal(str(talk))
    assert read == [{"role": "user", "content": parts.tolist()}, {"role": "assistant"}]


@pytest.mark.parametrize(
    "text",
    [
        *("", "['a'", "['a']]", "['a'] ['b']", "[print('x')]", "[__import__('os')]", "['a' + 'b']"),
        *("['a' ... 'b']", "[" * 5000 + "]" * 5000, "{'a'}", "['a\\", "[1.2.3]", "[(]", "x"),
    ],
)
def test_anything_else_is_refused_and_nothing_runs(text):
    with pytest.raises((ValueError, TypeError)):
        parse_literal(text)


@pytest.mark.parametrize("text", ["['" + "\\" * 200_000, "['a" * 50_000, "[" + "1" * 4000 + "]"])
def test_no_cell_takes_long(text):
    start = time.process_time()
    with contextlib.suppress(ValueError, TypeError):
        parse_literal(text)
    assert time.process_time() - start < 2


def test_a_column_of_plain_texts_keeps_what_looks_like_a_list():
    cells = ["[1, 2, 3]", "null", "42", "", '["x"]', "['y']", *(f"text {n}" for n in range(9))]
    decoded, notes = decode_columns({"prompt": cells})
    assert decoded["prompt"] == [(cell,) for cell in cells] and notes == []


@pytest.mark.parametrize(("first", "turns"), [('["a", null]', ("a", None)), ("['a', None]",) * 2])
def test_odd_cells_of_a_column_of_lists_are_noted(first, turns):
    turns = ("a", None)
    odd = ["plain", "42", "", '{"a": 1}']
    decoded, notes = decode_columns({"prompt": [first] * 12 + odd})
    assert decoded["prompt"][:12] == [turns] * 12
    assert [(row, cell) for row, _, _, cell in notes] == list(zip(range(12, 16), odd, strict=True))


def test_columns_of_one_file_may_differ_but_a_handful_of_cells_follows_the_others():
    plain, lists = [f"text {n}" for n in range(12)], ['["a"]'] * 12
    decoded, notes = decode_columns({"prompt": plain, "response_a": lists})
    assert decoded["prompt"][3] == ("text 3",) and decoded["response_a"][3] == ("a",)
    assert notes == []
    _, notes = decode_columns({"prompt": ["torn ["], "response_a": lists[:1]})
    assert [note[:2] for note in notes] == [(0, "prompt")]


def test_values_that_are_no_text_are_kept_as_json_and_noted():
    decoded, notes = decode_columns({"prompt": [42, None, ["a", "b"], *["plain"] * 12]})
    assert decoded["prompt"][:3] == [("42",), (None,), ("a", "b")] and len(notes) == 3


def test_other_names_of_roles_and_parts_without_text_are_understood():
    talk = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": [{"type": "image", "image": "x"}, {"text": "see"}]},
    ]
    prompt, answer, expected = split_messages(read_messages(talk))
    assert (prompt, answer) == (("hi",), ("see",)) and "text" in expected


def test_an_answer_that_was_never_given_is_none_and_turns_stay_side_by_side():
    roles = ("user", "user", "assistant", "user")
    talk = [{"role": role, "content": str(place)} for place, role in enumerate(roles)]
    prompt, answer, expected = split_messages(talk)
    assert (prompt, answer) == (("0", "1", "3"), (None, "2", None))
    assert "ends with an answer" in expected
    assert "every turn" in split_messages(talk[:3])[2]


@pytest.mark.parametrize("cell", ["", "hi", "[]", '["a"]', 5, None, '{"role": "user"}'])
def test_what_is_no_conversation_is_refused(cell):
    with pytest.raises(ValueError):
        read_messages(cell)
