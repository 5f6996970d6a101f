"""Tables of battles, probabilities, text, and exchanging the two answers."""

import numpy as np
import pandas as pd
import pytest

from src.utils.schema import (
    FROZEN_COLUMNS,
    LABELLED_COLUMNS,
    LABELS,
    average_over_swap,
    check_pairs,
    check_probs,
    choose_columns,
    clean_text,
    join_turns,
    probs_of,
    probs_table,
    swap_labels,
    swap_pairs,
    swap_probs,
    vote_shares,
)


def test_turns_become_valid_unicode_and_are_joined():
    assert [clean_text(turn) for turn in (None, "", "é \U0001f600")] == ["", "", "é \U0001f600"]
    assert clean_text("half \ud83d emoji \udc00") == "half \ufffd emoji \ufffd"
    assert join_turns(("a", None, "\ud83d")) == "a\n\n\ufffd"
    assert join_turns(("a", "b"), separator=" | ") == "a | b"
    join_turns(tuple(map(chr, range(0xD7F0, 0xE010)))).encode()


def test_valid_tables_pass_unchanged(demo_pairs, ugly_pairs):
    for pairs in (demo_pairs, ugly_pairs):
        assert check_pairs(pairs, LABELLED_COLUMNS) is pairs


@pytest.mark.parametrize("value", ["plain text", ("turn", 5), ["list"], None])
def test_a_text_that_is_not_a_tuple_of_turns_is_named_with_its_id(demo_pairs, value):
    demo_pairs.at[3, "prompt"] = value
    with pytest.raises(ValueError, match=rf"id {demo_pairs.at[3, 'id']}, column prompt"):
        check_pairs(demo_pairs)


def test_a_missing_column_and_a_label_outside_the_classes_are_named(demo_pairs):
    with pytest.raises(ValueError, match=r"missing \['response_b'\]"):
        check_pairs(demo_pairs.drop(columns="response_b"))
    demo_pairs.at[5, "label"] = 3
    with pytest.raises(ValueError, match=rf"id {demo_pairs.at[5, 'id']}, column label"):
        check_pairs(demo_pairs, LABELLED_COLUMNS)


@pytest.mark.parametrize("row", [[0.5, 0.5, 0.5], [np.nan, 0.5, 0.5], [-0.1, 0.6, 0.5]])
def test_a_row_that_is_not_a_distribution_is_named(row):
    with pytest.raises(ValueError, match="row 1"):
        check_probs(np.array([[0.2, 0.3, 0.5], row]))


def test_a_wrong_number_of_rows_or_classes_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\), got \(2, 3\)"):
        check_probs(np.full((2, 3), 1 / 3), n_pairs=3)
    with pytest.raises(ValueError, match=r"3\), got \(2, 2\)"):
        check_probs(np.full((2, 2), 0.5))


def test_probabilities_are_the_same_after_a_table():
    probs = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    table = probs_table([7, 8], probs, fold=[0, 1])
    assert list(table.columns) == ["id", "fold", *LABELS]
    assert table[LABELS[0]].dtype == np.float32
    np.testing.assert_allclose(probs_of(table), probs, atol=1e-7)


def test_swapping_twice_is_the_identity(demo_pairs, ugly_pairs):
    for pairs in (demo_pairs, ugly_pairs):
        assert not swap_pairs(pairs).equals(pairs)
        pd.testing.assert_frame_equal(swap_pairs(swap_pairs(pairs)), pairs)


def test_swapping_exchanges_answers_models_and_votes_and_nothing_else(demo_pairs):
    swapped = swap_pairs(demo_pairs)
    assert swapped["response_a"].tolist() == demo_pairs["response_b"].tolist()
    assert swapped["model_b"].tolist() == demo_pairs["model_a"].tolist()
    assert swapped["label"].tolist() == [{0: 1, 1: 0, 2: 2}[label] for label in demo_pairs["label"]]
    unchanged = ["id", "prompt", "group", "fold"]
    pd.testing.assert_frame_equal(swapped[unchanged], demo_pairs[unchanged])


def test_test_rows_without_votes_can_be_swapped(demo_pairs):
    swapped = swap_pairs(demo_pairs[["id", "prompt", "response_a", "response_b"]])
    assert list(swapped.columns) == ["id", "prompt", "response_a", "response_b"]
    assert swapped["response_b"].tolist() == demo_pairs["response_a"].tolist()


def test_labels_and_probabilities_swap_alike():
    labels = np.arange(3, dtype=np.int8)
    np.testing.assert_array_equal(swap_probs(np.eye(3)).argmax(axis=1), swap_labels(labels))
    assert swap_labels(labels).tolist() == [1, 0, 2] and swap_labels(labels).dtype == np.int8


def test_the_average_over_the_swap_is_symmetric():
    averaged = average_over_swap(np.array([[0.7, 0.2, 0.1]]), np.array([[0.3, 0.6, 0.1]]))
    np.testing.assert_allclose(averaged, [[0.65, 0.25, 0.1]])
    first, second = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 50))
    swapped = swap_probs(average_over_swap(first, second))
    np.testing.assert_allclose(average_over_swap(second, first), swapped)


def test_averaging_refuses_what_is_not_a_distribution():
    good, bad = np.array([[0.3, 0.6, 0.1]]), np.array([[0.7, 0.7, 0.1]])
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="row 0"):
            average_over_swap(*pair)


def test_votes_become_shares_and_without_counts_the_label_is_the_only_vote():
    pairs = pd.DataFrame({"label": [0, 2, -1, 1]})
    one_vote = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(vote_shares(pairs), one_vote)
    counts = {"votes_a": [3, None, None, 0], "votes_b": [1, None, None, 0], "votes_tie": [0.0] * 4}
    shares = vote_shares(pairs.assign(**counts))
    np.testing.assert_array_equal(shares, [[0.75, 0.25, 0], *one_vote[1:]])


def test_votes_are_exchanged_with_the_answers_and_extra_columns_are_kept(demo_pairs):
    pairs = demo_pairs.assign(votes_a=2, votes_b=1, votes_tie=0, user="u", other=1)
    swapped = swap_pairs(pairs)
    assert swapped["votes_a"].eq(1).all() and swapped["votes_b"].eq(2).all()
    np.testing.assert_array_equal(vote_shares(swapped), swap_probs(vote_shares(pairs)))
    columns = [*FROZEN_COLUMNS, "votes_a", "votes_b", "votes_tie", "user"]
    assert choose_columns(pairs) == columns
