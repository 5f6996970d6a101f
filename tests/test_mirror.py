"""Claims about exchanging the two answers."""

import numpy as np
import pandas as pd
import pytest

from src.utils.schema import average_over_swap, swap_labels, swap_pairs, swap_probs


def test_swapping_twice_is_the_identity(demo_pairs: pd.DataFrame, ugly_pairs: pd.DataFrame) -> None:
    for pairs in (demo_pairs, ugly_pairs):
        assert not swap_pairs(pairs).equals(pairs)
        pd.testing.assert_frame_equal(swap_pairs(swap_pairs(pairs)), pairs)


def test_swapping_exchanges_answers_models_and_votes_and_nothing_else(
    demo_pairs: pd.DataFrame,
) -> None:
    swapped = swap_pairs(demo_pairs)
    assert swapped["response_a"].tolist() == demo_pairs["response_b"].tolist()
    assert swapped["model_b"].tolist() == demo_pairs["model_a"].tolist()
    assert swapped["label"].tolist() == [{0: 1, 1: 0, 2: 2}[label] for label in demo_pairs["label"]]
    unchanged = ["id", "prompt", "group", "fold"]
    pd.testing.assert_frame_equal(swapped[unchanged], demo_pairs[unchanged])


def test_test_rows_without_votes_can_be_swapped(demo_pairs: pd.DataFrame) -> None:
    swapped = swap_pairs(demo_pairs[["id", "prompt", "response_a", "response_b"]])
    assert list(swapped.columns) == ["id", "prompt", "response_a", "response_b"]
    assert swapped["response_b"].tolist() == demo_pairs["response_a"].tolist()


def test_labels_and_probabilities_swap_alike() -> None:
    one_hot = np.eye(3)
    np.testing.assert_array_equal(swap_probs(one_hot).argmax(axis=1), swap_labels(np.arange(3)))


def test_the_average_is_that_of_the_worked_example() -> None:
    averaged = average_over_swap(np.array([[0.7, 0.2, 0.1]]), np.array([[0.3, 0.6, 0.1]]))
    np.testing.assert_allclose(averaged, [[0.65, 0.25, 0.1]])


def test_the_average_is_symmetric_whatever_the_model_said() -> None:
    first, second = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 50))
    np.testing.assert_allclose(
        average_over_swap(second, first), swap_probs(average_over_swap(first, second))
    )


def test_averaging_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        average_over_swap(np.array([[0.7, 0.7, 0.1]]), np.array([[0.3, 0.6, 0.1]]))
