"""Probabilities to `submission.csv`, checked as the competition would check it."""

import numpy as np
import pandas as pd

from src.utils.schema import LABELS, check_probs

COLUMNS = ("id", *LABELS)


def make_submission(ids: np.ndarray, probs: np.ndarray, sample_ids: np.ndarray) -> pd.DataFrame:
    """Order predictions as the sample submission does, every id once.

    Args:
        ids: (N,) ids of the test rows; an id that repeats must repeat its probabilities,
            the first is taken.
        probs: (N, C) float, rows sum to 1, columns in `LABELS` order.
        sample_ids: (M,) ids that the competition expects, in its order.

    Returns:
        A table of M rows: id and one float64 column per label.

    Raises:
        ValueError: an expected id has no prediction, or a prediction is not asked for.
    """
    check_probs(probs, n_pairs=len(ids))
    table = pd.DataFrame({"id": ids}).drop_duplicates("id")
    table[list(LABELS)] = np.asarray(probs, dtype=np.float64)[table.index]
    expected = pd.Index(sample_ids)
    missing, extra = expected.difference(table["id"]), pd.Index(table["id"]).difference(expected)
    if len(missing) or len(extra):
        raise ValueError(
            f"submission: expected the sample's {len(expected)} ids; "
            f"{len(missing)} missing (first {missing[:3].tolist()}), {len(extra)} unasked (first {extra[:3].tolist()})"
        )
    return table.set_index("id").loc[expected].rename_axis("id").reset_index()


def check_submission(submission: pd.DataFrame, sample_ids: np.ndarray) -> pd.DataFrame:
    """Assert what the competition asserts, and hand the table back.

    Args:
        submission: as read back from `submission.csv`.
        sample_ids: (M,) ids of `sample_submission.csv`, in order.

    Raises:
        ValueError: other columns, other ids or order, or a row that is no probability.
    """
    if tuple(submission.columns) != COLUMNS:
        raise ValueError(f"submission: expected columns {list(COLUMNS)}, got {list(submission.columns)}")
    if submission["id"].astype(str).tolist() != [str(value) for value in sample_ids]:
        raise ValueError("submission: expected the ids of sample_submission in its order, got others")
    if len(submission):
        check_probs(submission[list(LABELS)].to_numpy(dtype=np.float64), tolerance=1e-6)
    return submission
