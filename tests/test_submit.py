"""Claims about a submission that is always valid, about what is given up first, and about its processes."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from src.utils import paths
from src.utils.config import DecoderConfig, read_parameters
from src.utils.delivery import submit
from src.utils.delivery.submit import (
    Ask,
    Means,
    Submission,
    check_submission,
    describe_timing,
    open_reader,
    order_networks,
    predict_submission,
)
from src.utils.models import checkpoints, tiny
from src.utils.models.predict import LocalReader, Prediction, predict_pairs
from src.utils.schema import LABELS
from src.utils.stats.blend import Blend

BASELINE, NETWORK = "02_baseline", "03_modernbert"
BLEND = Blend((BASELINE, NETWORK), (0.5, 0.5))
BASELINE_PROBS, NETWORK_PROBS = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])


def make_run(folder: Path, config: dict, n_folds: int = 0, n_bytes: int = 1000) -> Path:
    """A run folder that holds no model, but is as large as if it did."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for fold in range(n_folds):
        (folder / "model" / f"fold_{fold}").mkdir(parents=True)
        (folder / "model" / f"fold_{fold}" / "model.safetensors").write_bytes(bytes(n_bytes))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two run folders: a floor and a network, told apart by their config.json."""
    network = make_run(tmp_path / NETWORK, {"checkpoint": "tiny:modernbert"}, n_folds=1)
    return {BASELINE: make_run(tmp_path / BASELINE, {}), NETWORK: network}


@pytest.fixture
def submission(tmp_path: Path, demo_pairs: pd.DataFrame) -> Submission:
    """The submission of 300 demo battles, expected in reverse order."""
    ids = demo_pairs["id"].astype(str).to_numpy()
    return Submission(tmp_path / "submission.csv", ids, ids[::-1])


def say(probs: np.ndarray, n_readings: int = 2) -> Prediction:
    """A prediction of a network that was never in a hurry."""
    reached = np.isfinite(probs).all(axis=1)
    return Prediction(probs, n_readings * reached, np.zeros(len(probs), dtype=bool))


def answer(folder: Path, pairs: pd.DataFrame, *_: object) -> Prediction:
    """Answer the same for every battle."""
    return say(np.tile(NETWORK_PROBS, (len(pairs), 1)))


@pytest.fixture(autouse=True)
def members(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that answer the same for every battle, in place of trained ones."""
    if "trained" in request.fixturenames:
        return
    monkeypatch.setattr(
        submit, "_predict_baseline", lambda run, pairs: np.tile(BASELINE_PROBS, (len(pairs), 1))
    )
    monkeypatch.setattr(submit, "_predict_network", answer)


def read(submission: Submission, pairs: pd.DataFrame) -> np.ndarray:
    """What lies on disk, checked, in the order of the battles."""
    table = pd.read_csv(submission.path, dtype={"id": str})
    check_submission(table, pairs["id"].astype(str).to_numpy()[::-1])
    return table[list(LABELS)].to_numpy()[::-1]


def test_the_blend_of_both_is_what_is_written(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame
) -> None:
    outcome = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    expected = np.sqrt(BASELINE_PROBS * NETWORK_PROBS)
    np.testing.assert_allclose(outcome.probs[0], expected / expected.sum(), atol=1e-9)
    np.testing.assert_allclose(read(submission, demo_pairs), outcome.probs, atol=1e-9)
    assert [timing.status for timing in outcome.timings] == ["whole", "whole"]


@pytest.mark.parametrize("order", [(BASELINE, NETWORK), (NETWORK, BASELINE)])
def test_the_baseline_answers_first_and_is_on_disk_before_any_network(
    runs: dict,
    submission: Submission,
    demo_pairs: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple,
) -> None:
    seen = []

    def look_at_the_disk(folder: Path, pairs: pd.DataFrame, *_: object) -> Prediction:
        seen.append(read(submission, demo_pairs))
        return answer(folder, pairs)

    monkeypatch.setattr(submit, "_predict_network", look_at_the_disk)
    predict_submission(demo_pairs, runs, Blend(order, (0.5, 0.5)), submission, deadline_s=60)
    np.testing.assert_allclose(seen[0], np.tile(BASELINE_PROBS, (300, 1)), atol=1e-9)


def test_a_member_that_fails_costs_no_row(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Prediction:
        raise RuntimeError("damaged weights")

    monkeypatch.setattr(submit, "_predict_network", fail)
    outcome = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    np.testing.assert_allclose(outcome.probs, np.tile(BASELINE_PROBS, (300, 1)), atol=1e-9)
    assert (outcome.timings[1].status, outcome.timings[1].note) == (
        "failed",
        "RuntimeError: damaged weights",
    )
    read(submission, demo_pairs)


@pytest.mark.parametrize("damage", ["{", '{"checkpoint": "tiny:modernbert", "n_epoch": 1}'])
def test_damaged_settings_cost_no_row(
    runs: dict,
    submission: Submission,
    demo_pairs: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    real = submit.read_json
    monkeypatch.undo()
    monkeypatch.setattr(
        submit,
        "_predict_baseline",
        lambda run, pairs: real(run / "config.json") or np.tile(BASELINE_PROBS, (len(pairs), 1)),
    )
    (runs[NETWORK] / "config.json").write_text(damage)
    outcome = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    np.testing.assert_allclose(outcome.probs, np.tile(BASELINE_PROBS, (300, 1)), atol=1e-9)
    assert outcome.timings[1].status == "failed" and outcome.timings[1].note


def test_battles_that_a_network_did_not_reach_keep_the_baseline(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reach_half(folder: Path, pairs: pd.DataFrame, *_: object) -> Prediction:
        return say(np.where(np.arange(len(pairs))[:, None] < 150, NETWORK_PROBS, np.nan))

    monkeypatch.setattr(submit, "_predict_network", reach_half)
    outcome = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    np.testing.assert_allclose(outcome.probs[150:], np.tile(BASELINE_PROBS, (150, 1)), atol=1e-9)
    assert outcome.probs[0, 2] > BASELINE_PROBS[2] + 0.1
    assert (outcome.timings[1].status, outcome.timings[1].n_reached) == ("partly", 150)
    assert outcome.n_pairs_by_members == {BASELINE: 150, f"{BASELINE} + {NETWORK}": 150}


def test_battles_that_nobody_reached_for_want_of_a_baseline_get_the_mean_of_the_others(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reach_half(folder: Path, pairs: pd.DataFrame, *_: object) -> Prediction:
        return say(np.where(np.arange(len(pairs))[:, None] < 150, BASELINE_PROBS, np.nan))

    monkeypatch.setattr(submit, "_predict_network", reach_half)
    outcome = predict_submission(
        demo_pairs, runs | {BASELINE: None}, BLEND, submission, deadline_s=60
    )
    np.testing.assert_allclose(outcome.probs[150:], np.tile([0.4, 0.4, 0.2], (150, 1)), atol=1e-9)
    assert outcome.n_pairs_by_members["mean of the others"] == 150
    read(submission, demo_pairs)


def test_an_absent_member_is_told_and_left_out(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame
) -> None:
    outcome = predict_submission(
        demo_pairs, runs | {NETWORK: None}, BLEND, submission, deadline_s=60
    )
    np.testing.assert_allclose(outcome.probs, np.tile(BASELINE_PROBS, (300, 1)), atol=1e-9)
    assert {timing.member: timing.status for timing in outcome.timings} == {
        BASELINE: "whole",
        NETWORK: "absent",
    }


def test_without_any_member_the_error_says_why(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame
) -> None:
    with pytest.raises(RuntimeError, match="03_modernbert: no finished run"):
        predict_submission(demo_pairs, dict.fromkeys(runs), BLEND, submission, deadline_s=60)


def test_a_network_without_weight_is_not_run(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame
) -> None:
    blend = Blend((BASELINE, NETWORK), (1.0, 0.0))
    outcome = predict_submission(demo_pairs, runs, blend, submission, deadline_s=60)
    assert outcome.timings[1].status == "without weight"
    without_baseline = predict_submission(
        demo_pairs, runs | {BASELINE: None}, blend, submission, deadline_s=60
    )
    np.testing.assert_allclose(without_baseline.probs, np.tile(NETWORK_PROBS, (300, 1)), atol=1e-9)


def test_the_deadline_reaches_the_networks_as_a_moment(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def note_deadline(
        folder: Path, pairs: pd.DataFrame, ask: Ask, means: Means, *_: object
    ) -> Prediction:
        given.append(means.deadline - time.monotonic())
        return answer(folder, pairs)

    monkeypatch.setattr(submit, "_predict_network", note_deadline)
    predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=50)
    assert 45 < given[0] <= 50


def test_networks_run_in_the_order_of_worth_per_second(tmp_path: Path) -> None:
    config = {"checkpoint": "tiny:modernbert"}
    runs = {
        "03": make_run(tmp_path / "03", config, n_folds=2, n_bytes=1000),
        "04": make_run(tmp_path / "04", config, n_folds=1, n_bytes=3000),
        "08": make_run(tmp_path / "08", config, n_folds=1, n_bytes=9000),
    }
    order = order_networks(runs, Blend(("03", "04", "08"), (0.2, 0.5, 0.3)))
    assert [(name, folder.name) for name, folder in order] == [
        ("03", "fold_0"),  # 0.2 a kB
        ("04", "fold_0"),  # 0.17
        ("03", "fold_1"),  # 0.1
        ("08", "fold_0"),  # 0.03
    ]


def test_the_refit_is_one_more_model_and_comes_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "03", {"checkpoint": "tiny:modernbert"}, n_folds=2, n_bytes=1000)
    shutil.copytree(run / "model" / "fold_0", run / "model" / "refit")
    order = order_networks({"03": run}, Blend(("03",), (1.0,)))
    assert [folder.name for _, folder in order] == ["refit", "fold_0", "fold_1"]


def test_the_network_worth_least_per_second_is_given_up_first(
    runs: dict,
    tmp_path: Path,
    submission: Submission,
    demo_pairs: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs["04_qwen"] = make_run(
        tmp_path / "04_qwen", {"checkpoint": "tiny:qwen3"}, n_folds=1, n_bytes=8000
    )
    now = [0.0]
    monkeypatch.setattr(submit.time, "monotonic", lambda: now[0])

    def take_an_hour(folder: Path, pairs: pd.DataFrame, *_: object) -> Prediction:
        now[0] += 3600
        return answer(folder, pairs)

    monkeypatch.setattr(submit, "_predict_network", take_an_hour)
    blend = Blend((BASELINE, "04_qwen", NETWORK), (0.2, 0.4, 0.4))
    outcome = predict_submission(demo_pairs, runs, blend, submission, deadline_s=3000)
    told = {timing.member: timing.status for timing in outcome.timings}
    assert told == {BASELINE: "whole", NETWORK: "whole", "04_qwen": "given up"}
    assert outcome.n_pairs_by_members == {f"{BASELINE} + {NETWORK}": 300}


@pytest.fixture
def asked(
    monkeypatch: pytest.MonkeyPatch, demo_pairs: pd.DataFrame
) -> dict[str, tuple[set, float]]:
    """Ids that each network is asked to read, and the share of them to be read twice; battle 0 is surest, 299 least."""
    sureness = np.linspace(0.95, 0.34, 300)
    floor = np.column_stack([sureness, (1 - sureness) / 2, (1 - sureness) / 2])
    monkeypatch.setattr(submit, "_predict_baseline", lambda run, pairs: floor)
    asked = {}

    def note(folder: Path, pairs: pd.DataFrame, ask: Ask, *_: object) -> Prediction:
        asked[folder.parents[1].name] = (set(pairs["id"]), ask.twice_share)
        return say(np.full((len(pairs), 3), 1 / 3))  # which leaves the floor's order of certainty

    monkeypatch.setattr(submit, "_predict_network", note)
    return asked


def test_in_a_cascade_the_only_network_reads_the_battles_that_the_baseline_is_least_sure_of(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, asked: dict
) -> None:
    outcome = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60, cascade=0.25)
    assert asked == {NETWORK: (set(demo_pairs["id"][225:]), 1.0)}
    timing = outcome.timings[1]
    assert (timing.status, timing.n_asked, timing.n_reached) == ("whole", 75, 75)
    assert outcome.n_pairs_by_members == {BASELINE: 225, f"{BASELINE} + {NETWORK}": 75}
    read(submission, demo_pairs)


def test_in_a_cascade_of_two_networks_the_cheap_one_reads_all_once_and_the_costly_one_a_share_twice(
    runs: dict, tmp_path: Path, submission: Submission, demo_pairs: pd.DataFrame, asked: dict
) -> None:
    runs["04_qwen"] = make_run(
        tmp_path / "04_qwen", {"checkpoint": "tiny:qwen3"}, n_folds=2, n_bytes=9000
    )
    blend = Blend((BASELINE, NETWORK, "04_qwen"), (0.4, 0.3, 0.3))
    outcome = predict_submission(demo_pairs, runs, blend, submission, deadline_s=60, cascade=0.25)
    ids, twice_share = asked[NETWORK]
    assert (len(ids), twice_share) == (300, 0.25)
    ids, twice_share = asked["04_qwen"]
    assert (ids, twice_share) == (set(demo_pairs["id"][225:]), 1.0)
    assert [timing.status for timing in outcome.timings] == ["whole"] * 3


def test_without_a_cascade_and_without_a_baseline_every_battle_is_read(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, asked: dict
) -> None:
    predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    assert len(asked[NETWORK][0]) == 300
    predict_submission(
        demo_pairs, runs | {BASELINE: None}, BLEND, submission, deadline_s=60, cascade=0.25
    )
    assert len(asked[NETWORK][0]) == 300


@pytest.mark.parametrize("cascade", [0.0, 1.1])
def test_a_cascade_is_a_share(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame, cascade: float
) -> None:
    with pytest.raises(ValueError, match="cascade: expected a share"):
        predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60, cascade=cascade)


@pytest.mark.parametrize("n_pairs", [0, 1])
def test_no_battle_and_one_battle_are_submissions_too(
    runs: dict, tmp_path: Path, demo_pairs: pd.DataFrame, n_pairs: int
) -> None:
    pairs = demo_pairs.head(n_pairs)
    ids = pairs["id"].astype(str).to_numpy()
    submission = Submission(tmp_path / "s.csv", ids, ids)
    outcome = predict_submission(pairs, runs, BLEND, submission, deadline_s=60)
    assert outcome.probs.shape == (n_pairs, 3)
    assert len(pd.read_csv(submission.path)) == n_pairs


def test_the_timing_is_json_and_says_what_the_battles_got(
    runs: dict, submission: Submission, demo_pairs: pd.DataFrame
) -> None:
    outcome = predict_submission(demo_pairs, runs, BLEND, submission, deadline_s=60)
    timing = json.loads(
        json.dumps(describe_timing(outcome, n_pairs=300, seconds=1.0, deadline_s=60))
    )
    assert [member["n_reached"] for member in timing["members"]] == [300, 300]
    assert [member["n_twice"] for member in timing["members"]] == [300, 300]
    assert timing["n_pairs_by_members"] == {f"{BASELINE} + {NETWORK}": 300}


# ── with real models and real processes ───────────────────────────────────────────────

BUDGET = {"max_tokens": 192, "predict_tokens": 192, "tokens_per_batch": 1024}
TINY = {
    NETWORK: DecoderConfig("tiny:modernbert", "", quantization="none", lora_rank=0, **BUDGET),
    "04_qwen": DecoderConfig("tiny:qwen3", "", quantization="none", lora_rank=4, **BUDGET),
}


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two run folders with untrained networks of real architectures, the second an adapter."""
    runs = {}
    for name, config in TINY.items():
        run = tmp_path_factory.mktemp("trained") / name
        base = shutil.copytree(tiny_base(config.checkpoint.removeprefix("tiny:")), run / "base")
        checkpoints.save_model(*checkpoints.load_classifier(config, base), run / "model" / "fold_0")
        (run / "config.json").write_text(json.dumps(config.to_json()))
        runs[name] = run
    return runs


def later() -> float:
    """A moment that no test reaches."""
    return time.monotonic() + 300


@pytest.mark.slow
def test_two_processes_say_what_this_one_says(trained: dict, demo_pairs: pd.DataFrame) -> None:
    for name, config in TINY.items():
        folder, pairs = trained[name] / "model" / "fold_0", demo_pairs[:60]
        options = {"max_tokens": config.predict_tokens, "tokens_per_batch": config.tokens_per_batch}
        model, tokenizer = checkpoints.load_finetuned(folder, config)
        local = predict_pairs(
            LocalReader(model, tokenizer.pad_token_id), tokenizer, pairs, **options
        )
        with open_reader(folder, config, None, n_workers=2, deadline=later()) as reader:
            assert isinstance(reader, submit.Pool) and reader.capacity == 4
            far = predict_pairs(reader, checkpoints.load_tokenizer(folder), pairs, **options)
        np.testing.assert_allclose(far.probs, local.probs, atol=1e-5)
        assert (far.n_readings == 2).all()


@pytest.mark.slow
def test_the_batches_of_a_process_that_is_killed_are_read_by_the_other(
    trained: dict, demo_pairs: pd.DataFrame
) -> None:
    config, folder = TINY[NETWORK], trained[NETWORK] / "model" / "fold_0"
    with open_reader(folder, config, None, n_workers=2, deadline=later()) as reader:
        victim, send, sent = reader._workers[0].process, reader.send, []

        def kill_at_the_fifth(key: int, rows: list) -> None:
            sent.append(key)
            if len(sent) == 5:
                victim.kill()
            send(key, rows)

        reader.send = kill_at_the_fifth
        tokenizer = checkpoints.load_tokenizer(folder)
        far = predict_pairs(
            reader, tokenizer, demo_pairs[:60], max_tokens=192, tokens_per_batch=1024
        )
    assert np.isfinite(far.probs).all() and far.note == ""
    assert victim.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_where_all_processes_are_killed_what_was_read_is_kept(
    trained: dict, demo_pairs: pd.DataFrame
) -> None:
    config, folder = TINY[NETWORK], trained[NETWORK] / "model" / "fold_0"
    with open_reader(folder, config, None, n_workers=1, deadline=later()) as reader:
        receive, heard = reader.receive, []

        def kill_at_the_fifth(deadline: float):
            heard.append(1)
            if len(heard) == 5:
                reader._workers[0].process.kill()
            return receive(deadline)

        reader.receive = kill_at_the_fifth
        tokenizer = checkpoints.load_tokenizer(folder)
        far = predict_pairs(
            reader, tokenizer, demo_pairs[:60], max_tokens=192, tokens_per_batch=1024
        )
    assert "ended with code -9" in far.note
    assert 0 < np.isfinite(far.probs).all(axis=1).sum() < 60


def test_where_no_process_can_be_started_this_one_reads(
    trained: dict, demo_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
    folder = trained[NETWORK] / "model" / "fold_0"
    with (
        pytest.warns(UserWarning, match="read in this process"),
        open_reader(folder, TINY[NETWORK], None, deadline=later()) as reader,
    ):
        tokenizer = checkpoints.load_tokenizer(folder)
        near = predict_pairs(
            reader, tokenizer, demo_pairs[:5], max_tokens=192, tokens_per_batch=1024
        )
    assert isinstance(reader, LocalReader) and np.isfinite(near.probs).all()


@pytest.mark.slow
def test_truncated_weights_are_reported_and_the_blend_is_that_of_the_others(
    trained: dict, tmp_path: Path, submission: Submission, demo_pairs: pd.DataFrame
) -> None:
    runs = {name: shutil.copytree(run, tmp_path / name) for name, run in trained.items()}
    weights = runs[NETWORK] / "model" / "fold_0" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    blend = Blend(tuple(runs), (0.5, 0.5))
    outcome = predict_submission(demo_pairs, runs, blend, submission, deadline_s=300)
    damaged, sound = outcome.timings
    assert damaged.status == "failed" and "SafetensorError" in damaged.note
    assert sound.status == "whole" and outcome.n_pairs_by_members == {"04_qwen": 300}
    read(submission, demo_pairs)


@pytest.mark.parametrize("layout", ["", "models/wowfattie"])
def test_an_attached_base_is_found_in_both_layouts_and_checked(
    trained: dict,
    demo_pairs: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(paths, "KAGGLE_WORKING", tmp_path)
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "input")
    folder = trained["04_qwen"] / "model" / "fold_0"
    config = dataclasses.replace(TINY["04_qwen"], checkpoint="Qwen/Qwen3-4B-Instruct-2507")
    assert submit.find_base(folder, config, paths.find_checkpoints) is None
    place = (
        tmp_path / "input" / layout / "qwen3-4b-instruct-2507" / "transformers" / "default" / "1"
    )
    shutil.copytree(trained["04_qwen"] / "base", place)
    assert submit.find_base(folder, config, paths.find_checkpoints) == place
    tiny.prepare_base(dataclasses.replace(TINY["04_qwen"], seed=7), demo_pairs, place, 0)
    with pytest.raises(ValueError, match=r"expected the weights of base .* got others"):
        submit.find_base(folder, config, paths.find_checkpoints)
    with pytest.raises(ValueError, match="got others"):
        checkpoints.load_finetuned(folder, config, place)


def test_a_gpu_that_torch_has_no_kernels_for_falls_back_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert submit._plan_workers(None) == [None]
    assert "no kernels in this torch" in caplog.text


def test_each_gpu_gets_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert submit._plan_workers(None) == [0, 1]


def test_the_deadline_of_the_notebook_holds_a_margin_of_15_percent() -> None:
    deadline_s = read_parameters(paths.ROOT / "notebooks" / "06_kaggle_inference.ipynb")[
        "DEADLINE_S"
    ]
    assert 0.8 <= deadline_s / (9 * 3600) <= 0.85 + 1e-9


@pytest.mark.slow
def test_a_model_that_loads_too_slowly_leaves_no_process_and_no_warning(trained: dict) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", HURRIED, trained[NETWORK]],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.split() == ["late"] * 3 + ["0"], ran.stderr
    assert "leaked" not in ran.stderr


HURRIED = """
import multiprocessing, sys, time
from pathlib import Path
from src.utils.runs import read_json
from src.utils.config import DecoderConfig
from src.utils.delivery.submit import Pool

if __name__ == "__main__":
    run = Path(sys.argv[1])
    config = DecoderConfig.from_json(read_json(run / "config.json"))
    for seconds in (0.1, 0.8, 1.4):
        try:
            Pool(run / "model" / "fold_0", config, None, [None], time.monotonic() + seconds).close()
        except RuntimeError as error:
            print("late" if "time ran out" in str(error) else error)
    print(len(multiprocessing.active_children()))
"""

KILLED = """
import sys, time
import numpy as np
import pandas as pd
from pathlib import Path
from src.utils.delivery import submit
from src.utils.delivery.submit import Submission, predict_submission
from src.utils.stats.blend import Blend
from src.utils.models.predict import Prediction

folder = Path(sys.argv[1])
ids = np.array([str(i) for i in range(20_000)])
pairs = pd.DataFrame({"id": ids})
rng = np.random.default_rng(0)
submit._predict_baseline = lambda run, pairs: np.tile([0.5, 0.3, 0.2], (len(pairs), 1))

def improve(folder, pairs, ask, means, keep):
    while True:
        keep(Prediction(rng.dirichlet([1, 1, 1], len(pairs)), np.ones(len(pairs), int), np.zeros(len(pairs), bool)))

submit._predict_network = improve
runs = {"02_baseline": folder / "02_baseline", "03_modernbert": folder / "03_modernbert"}
submission = Submission(folder / "submission.csv", ids, ids)
predict_submission(pairs, runs, Blend(tuple(runs), (0.5, 0.5)), submission, deadline_s=600)
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_after_the_baseline_leaves_a_valid_submission(
    runs: dict, tmp_path: Path
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    moments = random.Random(0)
    for _ in range(4):
        (tmp_path / "submission.csv").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, tmp_path / "killed.py", tmp_path], cwd=paths.ROOT
        )
        while not (tmp_path / "submission.csv").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.8))
        process.kill()
        process.wait()
        table = pd.read_csv(tmp_path / "submission.csv", dtype={"id": str})
        check_submission(table, np.array([str(i) for i in range(20_000)]))
