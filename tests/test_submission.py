"""Claims about what the competition would accept."""

import numpy as np
import pandas as pd
import pytest

from src.utils.delivery.submit import check_submission, make_submission
from src.utils.schema import LABELS

PROBS = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])


def test_rows_follow_the_sample_not_the_test_file() -> None:
    submission = make_submission(np.array([30, 10, 20]), PROBS, sample_ids=np.array([10, 20, 30]))
    assert submission["id"].tolist() == [10, 20, 30]
    np.testing.assert_allclose(submission[list(LABELS)], PROBS[[1, 2, 0]])
    assert check_submission(submission, np.array([10, 20, 30])) is submission


def test_an_id_that_repeats_is_written_once() -> None:
    submission = make_submission(np.array([1, 1, 2]), PROBS[[0, 0, 1]], sample_ids=np.array([1, 2]))
    assert submission["id"].tolist() == [1, 2]


def test_missing_and_unasked_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"1 missing \(first \[4\]\), 1 unasked \(first \[3\]\)"):
        make_submission(np.array([1, 2, 3]), PROBS, sample_ids=np.array([1, 2, 4]))


def test_no_rows_are_a_valid_submission() -> None:
    submission = make_submission(
        np.array([], dtype=int), np.empty((0, 3)), sample_ids=np.array([], dtype=int)
    )
    assert check_submission(submission, np.array([])).empty


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda table: table.rename(columns={"winner_tie": "tie"}), "expected columns"),
        (lambda table: table.iloc[::-1], "in its order"),
        (lambda table: table.assign(winner_tie=0.9), "sum to 1"),
        (lambda table: table.assign(winner_tie=np.nan), "expected values"),
    ],
)
def test_what_the_competition_refuses_is_refused(change: object, found: str) -> None:
    submission = make_submission(np.array([1, 2, 3]), PROBS, sample_ids=np.array([1, 2, 3]))
    with pytest.raises(ValueError, match=found):
        check_submission(change(submission), np.array([1, 2, 3]))


def test_a_written_submission_reads_back_valid(tmp_path: object) -> None:
    submission = make_submission(np.array([1, 2, 3]), PROBS, sample_ids=np.array([1, 2, 3]))
    submission.to_csv(tmp_path / "submission.csv", index=False)
    check_submission(pd.read_csv(tmp_path / "submission.csv"), np.array([1, 2, 3]))
