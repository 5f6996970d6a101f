"""Claims about what a valid table is."""

import numpy as np
import pandas as pd
import pytest

from src.utils.schema import (
    LABELLED_COLUMNS,
    LABELS,
    check_pairs,
    check_probs,
    probs_of,
    probs_table,
)


def test_whole_tables_pass_unchanged(demo_pairs: pd.DataFrame, ugly_pairs: pd.DataFrame) -> None:
    for pairs in (demo_pairs, ugly_pairs):
        assert check_pairs(pairs, LABELLED_COLUMNS) is pairs


def test_a_missing_column_is_named(demo_pairs: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"missing \['response_b'\]"):
        check_pairs(demo_pairs.drop(columns="response_b"))


def test_a_text_that_is_no_tuple_is_named_with_its_id(demo_pairs: pd.DataFrame) -> None:
    demo_pairs.at[3, "prompt"] = "plain text"
    with pytest.raises(
        ValueError, match=rf"id {demo_pairs.at[3, 'id']}, column prompt: expected a tuple"
    ):
        check_pairs(demo_pairs)


def test_a_label_outside_the_classes_is_named(demo_pairs: pd.DataFrame) -> None:
    demo_pairs.at[5, "label"] = 3
    with pytest.raises(ValueError, match=rf"id {demo_pairs.at[5, 'id']}, column label"):
        check_pairs(demo_pairs, LABELLED_COLUMNS)


@pytest.mark.parametrize(
    ("row", "found"),
    [([0.5, 0.5, 0.5], "sum to 1"), ([np.nan, 0.5, 0.5], "row 1"), ([-0.1, 0.6, 0.5], "row 1")],
)
def test_a_row_that_is_no_probability_is_named(row: list[float], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        check_probs(np.array([[0.2, 0.3, 0.5], row]))


def test_a_wrong_number_of_rows_or_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(3, 3\), got \(2, 3\)"):
        check_probs(np.full((2, 3), 1 / 3), n_pairs=3)
    with pytest.raises(ValueError, match="expected shape"):
        check_probs(np.full((2, 2), 0.5))


def test_probabilities_survive_the_way_into_a_table_and_back() -> None:
    probs = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    table = probs_table([7, 8], probs, fold=[0, 1])
    assert list(table.columns) == ["id", "fold", *LABELS]
    assert table[LABELS[0]].dtype == np.float32
    np.testing.assert_allclose(probs_of(table), probs, atol=1e-7)
