"""The mirror: exchange the two answers of a battle, and undo it on a probability.

A vote has no favourite seat: exchanging A and B must exchange P(A) and P(B) and
leave P(tie) alone. Every published probability of the suite is made so by
`average_over_swap`.
"""

import numpy as np
import pandas as pd

from src.utils.schema import A_WINS, B_WINS, TIE, check_probs

_SWAPPED_COLUMNS = {
    "response_a": "response_b",
    "response_b": "response_a",
    "model_a": "model_b",
    "model_b": "model_a",
}
_SWAPPED_LABELS = np.array([B_WINS, A_WINS, TIE])


def swap_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Exchange A and B in every battle: answers, model names and the vote.

    Args:
        pairs: one row a battle; models and label are optional.

    Returns:
        A new table, same rows and column order; swapping twice gives the first back.
    """
    swapped = pairs.rename(columns=_SWAPPED_COLUMNS)[list(pairs.columns)]
    if "label" in pairs.columns:
        swapped = swapped.assign(label=swap_labels(pairs["label"].to_numpy()))
    return swapped


def swap_labels(labels: np.ndarray) -> np.ndarray:
    """Exchange A wins and B wins: (N,) int in 0..2 -> (N,) int of the same dtype.

    Example:
        [0, 1, 2] -> [1, 0, 2]
    """
    return _SWAPPED_LABELS[labels].astype(labels.dtype)


def swap_probs(probs: np.ndarray) -> np.ndarray:
    """Exchange the columns of A and B: (N, C) -> (N, C).

    Example:
        [[.7, .2, .1]] -> [[.2, .7, .1]]
    """
    return probs[:, _SWAPPED_LABELS]


def average_over_swap(probs: np.ndarray, probs_swapped: np.ndarray) -> np.ndarray:
    """Cancel position bias by averaging each battle with its mirror.

    Args:
        probs: (N, C) float, rows sum to 1, columns in `schema.LABELS` order.
        probs_swapped: (N, C) float, the same battles predicted with A and B
            exchanged; columns still as the model gave them.

    Returns:
        (N, C) float, rows sum to 1, columns in `schema.LABELS` order.

    Raises:
        ValueError: shapes differ, or a row does not sum to 1 within 1e-4.

    Example:
        [[.7, .2, .1]] and [[.3, .6, .1]] -> [[.65, .25, .1]]

    Source: Wang et al. 2023, arXiv:2305.17926, balanced position calibration.
    """
    check_probs(probs)
    check_probs(probs_swapped, n_pairs=len(probs))
    return (probs + swap_probs(probs_swapped)) / 2
