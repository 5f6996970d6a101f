"""Claims about a submission that is always valid."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.utils import inference
from src.utils.inference import Submission, describe_timing, predict_submission
from src.utils.metrics import Blend
from src.utils.schema import LABELS
from src.utils.submission import check_submission

FLOOR, NETWORK = "02_baseline", "03_modernbert"
BLEND = Blend((FLOOR, NETWORK), (0.5, 0.5))
FLOOR_PROBS, NETWORK_PROBS = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two run folders: a floor and a network, told apart by their config.json."""
    for name, config in {FLOOR: {}, NETWORK: {"checkpoint": "tiny:modernbert"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return {name: tmp_path / name for name in (FLOOR, NETWORK)}


@pytest.fixture
def submission(tmp_path: Path, demo_pairs: pd.DataFrame) -> Submission:
    """The submission of 300 demo battles, expected in reverse order."""
    ids = demo_pairs["id"].astype(str).to_numpy()
    return Submission(tmp_path / "submission.csv", ids, ids[::-1])


@pytest.fixture(autouse=True)
def members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that answer the same for every battle, in place of trained ones."""
    monkeypatch.setattr(inference, "_predict_floor", lambda run, pairs, deadline: np.tile(FLOOR_PROBS, (len(pairs), 1)))
    monkeypatch.setattr(
        inference, "_predict_network", lambda run, pairs, deadline: np.tile(NETWORK_PROBS, (len(pairs), 1))
    )


def read(submission: Submission, pairs: pd.DataFrame) -> np.ndarray:
    """What lies on disk, checked, in the order of the battles."""
    table = pd.read_csv(submission.path, dtype={"id": str})
    check_submission(table, pairs["id"].astype(str).to_numpy()[::-1])
    return table[list(LABELS)].to_numpy()[::-1]


def test_the_blend_of_both_is_what_is_written(runs: dict, submission: Submission, demo_pairs: pd.DataFrame) -> None:
    probs, timings = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    expected = np.sqrt(FLOOR_PROBS * NETWORK_PROBS)
    np.testing.assert_allclose(probs[0], expected / expected.sum(), atol=1e-9)
    np.testing.assert_allclose(read(submission, demo_pairs), probs, atol=1e-9)
    assert [timing.status for timing in timings] == ["whole", "whole"]


def test_the_floor_answers_first_and_is_on_disk_before_any_network(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look_at_the_disk(run: Path, pairs: pd.DataFrame, deadline: float) -> np.ndarray:
        seen.append(read(submission, demo_pairs))
        return np.tile(NETWORK_PROBS, (len(pairs), 1))

    monkeypatch.setattr(inference, "_predict_network", look_at_the_disk)
    predict_submission(demo_pairs, runs, Blend((NETWORK, FLOOR), (0.5, 0.5)), submission, deadline_s=60)
    np.testing.assert_allclose(seen[0], np.tile(FLOOR_PROBS, (300, 1)), atol=1e-9)


def test_a_member_that_fails_costs_no_row(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> np.ndarray:
        raise RuntimeError("damaged weights")

    monkeypatch.setattr(inference, "_predict_network", fail)
    probs, timings = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    np.testing.assert_allclose(probs, np.tile(FLOOR_PROBS, (300, 1)), atol=1e-9)
    assert (timings[1].status, timings[1].note) == ("failed", "RuntimeError: damaged weights")
    read(submission, demo_pairs)


def test_battles_that_a_network_did_not_reach_keep_the_floor(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reach_half(run: Path, pairs: pd.DataFrame, deadline: float) -> np.ndarray:
        return np.where(np.arange(len(pairs))[:, None] < 150, NETWORK_PROBS, np.nan)

    monkeypatch.setattr(inference, "_predict_network", reach_half)
    probs, timings = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    np.testing.assert_allclose(probs[150:], np.tile(FLOOR_PROBS, (150, 1)), atol=1e-9)
    assert probs[0, 2] > FLOOR_PROBS[2] + 0.1
    assert (timings[1].status, timings[1].n_reached) == ("partly", 150)


def test_an_absent_member_is_told_and_left_out(runs: dict, submission: Submission, demo_pairs: pd.DataFrame) -> None:
    probs, timings = predict_submission(demo_pairs, runs | {NETWORK: None}, BLEND, submission, deadline_s=60)
    np.testing.assert_allclose(probs, np.tile(FLOOR_PROBS, (300, 1)), atol=1e-9)
    assert {timing.member: timing.status for timing in timings} == {FLOOR: "whole", NETWORK: "absent"}


def test_without_any_member_the_error_says_why(runs: dict, submission: Submission, demo_pairs: pd.DataFrame) -> None:
    with pytest.raises(RuntimeError, match="03_modernbert: no finished run"):
        predict_submission(demo_pairs, dict.fromkeys(runs), BLEND, submission, deadline_s=60)


def test_the_deadline_reaches_the_networks_as_a_moment(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def note_deadline(run: Path, pairs: pd.DataFrame, deadline: float) -> np.ndarray:
        given.append(deadline - time.monotonic())
        return np.tile(NETWORK_PROBS, (len(pairs), 1))

    monkeypatch.setattr(inference, "_predict_network", note_deadline)
    predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=50)
    assert 45 < given[0] <= 50


@pytest.mark.parametrize("n_pairs", [0, 1])
def test_no_battle_and_one_battle_are_submissions_too(
    runs: dict, tmp_path: Path, demo_pairs: pd.DataFrame, n_pairs: int
) -> None:
    pairs = demo_pairs.head(n_pairs)
    ids = pairs["id"].astype(str).to_numpy()
    submission = Submission(tmp_path / "s.csv", ids, ids)
    predict_submission(pairs, runs, BLEND, submission, deadline_s=60)
    assert len(pd.read_csv(submission.path)) == n_pairs


def test_the_timing_is_json(runs: dict, submission: Submission, demo_pairs: pd.DataFrame) -> None:
    _, timings = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    timing = json.loads(json.dumps(describe_timing(timings, n_pairs=300, seconds=1.0, deadline_s=60)))
    assert [member["n_reached"] for member in timing["members"]] == [300, 300]
