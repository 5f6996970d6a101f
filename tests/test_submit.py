"""Claims about a submission that is always valid, what is given up first, and its processes."""

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from src.utils import paths
from src.utils.config import FinetuneConfig, read_parameters
from src.utils.delivery import submit
from src.utils.delivery.submit import (
    Models,
    Submission,
    check_submission,
    describe_left_out,
    describe_timing,
    make_submission,
    order_networks,
    predict_submission,
)
from src.utils.models import bases, checkpoints, predict
from src.utils.models.baseline import save_baseline
from src.utils.models.predict import predict_pairs
from src.utils.models.reading import LocalReader, load_reader, open_reader
from src.utils.schema import LABELS
from src.utils.stats.blend import Blend, apply_blend

BASELINE, ENCODER, DECODER = "02_baseline", "03_modernbert", "04_qwen"
BLEND = Blend((BASELINE, ENCODER), (0.5, 0.5))
ALL = Blend((BASELINE, ENCODER, DECODER), (0.4, 0.3, 0.3))
BUDGET = {"max_tokens": 192, "predict_tokens": 192, "tokens_per_batch": 1024}
CONFIGS = {
    ENCODER: FinetuneConfig(checkpoint="tiny:modernbert", revision="", **BUDGET),
    DECODER: FinetuneConfig(checkpoint="tiny:qwen3", revision="", train="lora", **BUDGET),
}


@pytest.fixture(scope="module")
def trained(tiny_base, small_baseline, tmp_path_factory) -> dict[str, Path]:
    """Run folders of a small CPU baseline and two untrained networks, the second an adapter."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {name: folder / name for name in (BASELINE, *CONFIGS)}
    save_baseline(small_baseline, runs[BASELINE] / "model")
    (runs[BASELINE] / "config.json").write_text(json.dumps(small_baseline.config.to_json()))
    for name, config in CONFIGS.items():
        kind = config.checkpoint.removeprefix("tiny:")
        base = shutil.copytree(tiny_base(kind), runs[name] / "base")
        model = checkpoints.load_classifier(config, base)
        checkpoints.save_model(*model, runs[name] / "model" / "fold_0")
        (runs[name] / "config.json").write_text(json.dumps(config.to_json()))
    return runs


@pytest.fixture
def runs(trained, tmp_path) -> dict[str, Path]:
    """Copies of them, to damage."""
    return {name: shutil.copytree(run, tmp_path / name) for name, run in trained.items()}


class Recorder(Submission):
    """A submission that keeps what was written, and may do something after each write."""

    def __init__(self, folder: Path, pairs: pd.DataFrame) -> None:
        self.expected = pairs["id"].astype(str).to_numpy()[::-1]
        super().__init__(folder / "submission.csv", self.expected[::-1], self.expected)
        self.written: list[np.ndarray] = []
        self.after = lambda: None

    def write(self, probs: np.ndarray) -> Path:
        self.written.append(probs)
        path = super().write(probs)
        self.after()
        return path

    def read(self) -> np.ndarray:
        """What is on disk, checked, in the order of the battles."""
        table = check_submission(pd.read_csv(self.path, dtype={"id": str}), self.expected)
        return table[list(LABELS)].to_numpy()[::-1]


@pytest.fixture
def pairs(demo_pairs) -> pd.DataFrame:
    return demo_pairs[:60].reset_index(drop=True)


@pytest.fixture
def submission(tmp_path, pairs) -> Recorder:
    """The submission of 60 battles, expected in reverse order."""
    return Recorder(tmp_path, pairs)


def run(pairs, runs, blend, submission, deadline_s=300.0, n_workers=0, **options):
    """Predict in this process."""
    options = {"deadline_s": deadline_s, "models": Models(n_workers)} | options
    return predict_submission(pairs, runs, blend, submission, **options)


@pytest.fixture(scope="module")
def answers(trained, _demo_pairs, tmp_path_factory) -> dict[str, np.ndarray]:
    """What each member predicts when it is alone."""
    pairs = _demo_pairs[:60].reset_index(drop=True)
    recorder = Recorder(tmp_path_factory.mktemp("answers"), pairs)
    return {name: run(pairs, trained, Blend((name,), (1.0,)), recorder).probs for name in trained}


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by `tick` whenever it is read."""
    clock = SimpleNamespace(now=0.0, tick=0.0)

    def monotonic() -> float:
        clock.now += clock.tick
        return clock.now

    fake = SimpleNamespace(monotonic=monotonic)
    monkeypatch.setattr(submit, "time", fake)
    monkeypatch.setattr(predict, "time", fake)
    return clock


def statuses(outcome) -> dict[str, str]:
    return {timing.member: timing.status for timing in outcome.timings}


# ---- the file ----------------------------------------------------------------

PROBS = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])


def test_rows_follow_the_sample_not_the_test_file():
    table = make_submission(np.array([30, 10, 20]), PROBS, sample_ids=np.array([10, 20, 30]))
    assert table["id"].tolist() == [10, 20, 30]
    np.testing.assert_allclose(table[list(LABELS)], PROBS[[1, 2, 0]])
    assert check_submission(table, np.array([10, 20, 30])) is table


def test_an_id_that_repeats_is_written_once():
    table = make_submission(np.array([1, 1, 2]), PROBS[[0, 0, 1]], sample_ids=np.array([1, 2]))
    assert table["id"].tolist() == [1, 2]


def test_missing_and_unexpected_ids_are_named():
    with pytest.raises(ValueError, match=r"1 missing .*\[4\].* 1 unexpected .*\[3\]"):
        make_submission(np.array([1, 2, 3]), PROBS, sample_ids=np.array([1, 2, 4]))


def test_no_rows_are_a_valid_submission():
    nothing = np.array([], dtype=int)
    assert check_submission(make_submission(nothing, np.empty((0, 3)), nothing), nothing).empty


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda table: table.rename(columns={"winner_tie": "tie"}), "winner_tie.*'tie'"),
        (lambda table: table.iloc[::-1], "ids"),
        (lambda table: table.assign(winner_tie=0.9), "row 0.*0.9"),
        (lambda table: table.assign(winner_tie=np.nan), "row 0.*nan"),
    ],
)
def test_what_the_competition_refuses_is_refused(change, found):
    table = make_submission(np.array([1, 2, 3]), PROBS, sample_ids=np.array([1, 2, 3]))
    with pytest.raises(ValueError, match=found):
        check_submission(change(table), np.array([1, 2, 3]))


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_a_valid_submission(tmp_path):
    (tmp_path / "killed.py").write_text(WRITES)
    command = [sys.executable, tmp_path / "killed.py", tmp_path]
    ran = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == ["valid"] * 8, ran.stderr


WRITES = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
from src.utils.delivery.submit import Submission, check_submission

ids = np.array([str(i) for i in range(20_000)])
submission = Submission(Path(sys.argv[1]) / "submission.csv", ids, ids)
rng = np.random.default_rng(0)
moments = random.Random(0)
for _ in range(8):
    submission.path.unlink(missing_ok=True)
    child = os.fork()
    while not child:
        submission.write(rng.dirichlet([1, 1, 1], len(ids)))
    while not submission.path.exists():
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 0.8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check_submission(pd.read_csv(submission.path, dtype={"id": str}), ids)
    print("valid")
"""


# ---- the plan ----------------------------------------------------------------


def test_the_blend_of_all_is_what_is_written(pairs, trained, submission, answers):
    outcome = run(pairs, trained, ALL, submission)
    np.testing.assert_allclose(outcome.probs, apply_blend(ALL, answers), atol=1e-9)
    np.testing.assert_allclose(submission.read(), outcome.probs, atol=1e-9)
    assert set(statuses(outcome).values()) == {"complete"}
    assert np.abs(outcome.probs - answers[BASELINE]).max() > 0.01


@pytest.mark.parametrize("order", [(BASELINE, ENCODER), (ENCODER, BASELINE)])
def test_the_baseline_is_on_disk_before_any_network(pairs, trained, submission, answers, order):
    run(pairs, trained, Blend(order, (0.5, 0.5)), submission)
    np.testing.assert_allclose(submission.written[0], answers[BASELINE], atol=1e-9)
    assert len(submission.written) == 2


@pytest.mark.parametrize("n_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_truncated_weights_are_reported_and_cost_no_row(
    pairs, runs, submission, answers, n_workers, capsys
):
    weights = runs[ENCODER] / "model" / "fold_0" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    outcome = run(pairs, runs, BLEND, submission, n_workers=n_workers)
    np.testing.assert_allclose(submission.read(), answers[BASELINE], atol=1e-9)
    assert statuses(outcome) == {BASELINE: "complete", ENCODER: "failed"}
    assert "SafetensorError" in outcome.timings[1].note
    assert "SafetensorError" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", '{"checkpoint": "tiny:modernbert", "n_epoch": 1}'])
def test_damaged_settings_cost_no_row(pairs, runs, submission, answers, damage):
    (runs[ENCODER] / "config.json").write_text(damage)
    outcome = run(pairs, runs, BLEND, submission)
    np.testing.assert_allclose(submission.read(), answers[BASELINE], atol=1e-9)
    assert outcome.timings[1].status == "failed" and outcome.timings[1].note


def test_battles_that_a_network_did_not_reach_keep_the_baseline(
    pairs, trained, submission, answers, clock
):
    clock.tick = 1.0
    run(pairs, trained, BLEND, submission, 1e9)
    outcome = run(pairs, trained, BLEND, submission, 0.35 * clock.now)
    is_kept = np.isclose(outcome.probs, answers[BASELINE], atol=1e-9).all(axis=1)
    assert 5 < is_kept.sum() < 55
    assert statuses(outcome) == {BASELINE: "complete", ENCODER: "partial"}
    assert outcome.timings[1].n_reached == 60 - is_kept.sum()
    both = f"{BASELINE} + {ENCODER}"
    assert outcome.n_pairs_by_members == {BASELINE: is_kept.sum(), both: 60 - is_kept.sum()}


def test_without_a_baseline_battles_that_nobody_reached_get_the_mean_of_the_others(
    pairs, trained, submission, answers, clock
):
    clock.tick = 1.0
    run(pairs, trained | {BASELINE: None}, BLEND, submission, 1e9)
    outcome = run(pairs, trained | {BASELINE: None}, BLEND, submission, 0.35 * clock.now)
    n_filled = outcome.n_pairs_by_members["mean of the others"]
    rows, counts = np.unique(submission.read().round(12), axis=0, return_counts=True)
    assert 5 < n_filled < 55 and counts.max() == n_filled
    filled = rows[counts.argmax()]
    read = outcome.probs[~np.isclose(outcome.probs, filled).all(axis=1)]
    a, b, tie = read.mean(axis=0)
    np.testing.assert_allclose(filled, [(a + b) / 2, (a + b) / 2, tie], atol=1e-9)


def test_what_is_known_is_written_each_minute(pairs, trained, submission, clock):
    clock.tick = 10.0
    run(pairs, trained, BLEND, submission, 1e9)
    assert len(submission.written) > 4
    changed = np.abs(np.diff(submission.written, axis=0)).max(axis=(1, 2))
    assert (changed > 0).sum() > 2


def test_an_absent_member_is_reported_and_left_out(pairs, trained, submission, answers):
    outcome = run(pairs, trained | {ENCODER: None}, BLEND, submission)
    np.testing.assert_allclose(outcome.probs, answers[BASELINE], atol=1e-9)
    assert statuses(outcome) == {BASELINE: "complete", ENCODER: "absent"}


def test_without_any_member_the_error_names_them(pairs, trained, submission):
    with pytest.raises(RuntimeError, match=f"{BASELINE}.*{ENCODER}"):
        run(pairs, dict.fromkeys(trained), BLEND, submission)


def test_a_network_of_zero_weight_is_read_only_where_nothing_else_is(
    pairs, trained, submission, answers
):
    blend = Blend((BASELINE, ENCODER), (1.0, 0.0))
    outcome = run(pairs, trained, blend, submission)
    assert statuses(outcome)[ENCODER] == "zero weight"
    alone = run(pairs, trained | {BASELINE: None}, blend, submission)
    np.testing.assert_allclose(alone.probs, answers[ENCODER], atol=1e-9)


def make_run(folder: Path, n_folds: int, n_bytes: int) -> Path:
    """A run folder that holds no model, but is as large as if it did."""
    for fold in range(n_folds):
        (folder / "model" / f"fold_{fold}").mkdir(parents=True)
        (folder / "model" / f"fold_{fold}" / "model.safetensors").write_bytes(bytes(n_bytes))
    (folder / "config.json").write_text('{"checkpoint": "tiny:modernbert"}')
    return folder


def test_networks_run_in_the_order_of_worth_per_second(tmp_path):
    sizes = {"03": (2, 1000), "04": (1, 3000), "08": (1, 9000)}
    runs = {name: make_run(tmp_path / name, *size) for name, size in sizes.items()}
    order = order_networks(runs, Blend(("03", "04", "08"), (0.2, 0.5, 0.3)))
    assert [(name, folder.name) for name, folder in order] == [
        ("03", "fold_0"),  # 0.2 per kB
        ("04", "fold_0"),  # 0.17
        ("03", "fold_1"),  # 0.1
        ("08", "fold_0"),  # 0.03
    ]


def test_the_refit_is_one_more_model_and_comes_first(tmp_path):
    run_dir = make_run(tmp_path / "03", 2, 1000)
    shutil.copytree(run_dir / "model" / "fold_0", run_dir / "model" / "refit")
    order = order_networks({"03": run_dir}, Blend(("03",), (1.0,)))
    assert [folder.name for _, folder in order] == ["refit", "fold_0", "fold_1"]


def test_of_the_heads_on_a_frozen_base_that_of_the_refit_alone_reads(tmp_path):
    run_dir = make_run(tmp_path / "03", 2, 1000)
    shutil.copytree(run_dir / "model" / "fold_0", run_dir / "model" / "refit")
    config = FinetuneConfig(checkpoint="tiny:modernbert", train="head")
    (run_dir / "config.json").write_text(json.dumps(config.to_json()))
    order = order_networks({"03": run_dir}, Blend(("03",), (1.0,)))
    assert [folder.name for _, folder in order] == ["refit"]


def test_the_folds_of_a_network_are_averaged(pairs, runs, submission):
    blend = Blend((DECODER,), (1.0,))
    alone = [run(pairs, runs, blend, submission).probs]
    fold_0, fold_1 = runs[DECODER] / "model" / "fold_0", runs[DECODER] / "model" / "fold_1"
    model = checkpoints.load_classifier(
        dataclasses.replace(CONFIGS[DECODER], seed=5), runs[DECODER] / "base"
    )
    torch.nn.init.normal_(model[0].get_base_model().score.modules_to_save["default"].weight)
    checkpoints.save_model(*model, fold_1)
    both = run(pairs, runs, blend, submission).probs
    shutil.rmtree(fold_0)
    alone.append(run(pairs, runs, blend, submission).probs)
    np.testing.assert_allclose(both, np.mean(alone, axis=0), atol=1e-9)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


def test_the_network_worth_least_per_second_is_given_up_first(pairs, trained, submission, clock):
    def take_an_hour():
        clock.now += 3600 * (len(submission.written) > 1)

    submission.after = take_an_hour
    blend = Blend((BASELINE, DECODER, ENCODER), (0.2, 0.3, 0.5))
    outcome = run(pairs, trained, blend, submission, 3000)
    expected = {BASELINE: "complete", DECODER: "given up", ENCODER: "complete"}
    assert statuses(outcome) == expected
    assert outcome.n_pairs_by_members == {f"{BASELINE} + {ENCODER}": 60}


def least_certain(probs: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool."""
    entropy = predict.measure_entropy(probs)
    return entropy >= np.sort(entropy)[-int(np.ceil(share * len(probs)))]


def test_in_a_cascade_the_only_network_reads_the_battles_the_baseline_is_least_sure_of(
    pairs, trained, submission, answers
):
    outcome = run(pairs, trained, BLEND, submission, cascade=0.25)
    is_read = ~np.isclose(outcome.probs, answers[BASELINE], atol=1e-9).all(axis=1)
    np.testing.assert_array_equal(is_read, least_certain(answers[BASELINE], 0.25))
    timing = outcome.timings[1]
    assert (timing.status, timing.n_asked, timing.n_reached) == ("complete", 15, 15)
    assert timing.n_twice == 15


def test_in_a_cascade_the_cheapest_network_reads_all_once_and_the_others_a_share_twice(
    pairs, trained, submission
):
    blend = Blend((BASELINE, DECODER, ENCODER), (0.4, 0.1, 0.5))
    outcome = run(pairs, trained, blend, submission, cascade=0.25)
    _, costly, cheap = outcome.timings
    assert (cheap.n_asked, cheap.n_reached) == (60, 60) and 15 <= cheap.n_twice < 30
    assert (costly.n_asked, costly.n_reached, costly.n_twice) == (15, 15, 15)
    is_read = ~np.isclose(*submission.written[-2:], atol=1e-9).all(axis=1)
    np.testing.assert_array_equal(is_read, least_certain(submission.written[1], 0.25))
    assert set(statuses(outcome).values()) == {"complete"}


def test_in_a_cascade_without_a_baseline_every_battle_is_read(pairs, trained, submission):
    outcome = run(pairs, trained | {BASELINE: None}, BLEND, submission, cascade=0.25)
    assert outcome.timings[1].n_reached == 60


@pytest.mark.parametrize("cascade", [0.0, 1.1])
def test_a_cascade_is_a_share(pairs, trained, submission, cascade):
    with pytest.raises(ValueError, match=f"cascade.*{cascade}"):
        run(pairs, trained, BLEND, submission, cascade=cascade)


@pytest.mark.parametrize("n_pairs", [0, 1])
def test_no_battle_and_one_battle_are_submissions_too(pairs, trained, tmp_path, n_pairs):
    submission = Recorder(tmp_path, pairs[:n_pairs])
    outcome = run(pairs[:n_pairs], trained, BLEND, submission)
    assert outcome.probs.shape == (n_pairs, 3) == submission.read().shape


def test_the_timing_is_json_and_says_what_the_battles_got(pairs, trained, submission):
    outcome = run(pairs, trained, BLEND, submission)
    timing = describe_timing(outcome, n_pairs=60, seconds=1.0, deadline_s=60)
    timing = json.loads(json.dumps(timing))
    assert [member["n_reached"] for member in timing["members"]] == [60, 60]
    assert [member["n_twice"] for member in timing["members"]] == [60, 60]
    assert timing["n_pairs_by_members"] == {f"{BASELINE} + {ENCODER}": 60}


def test_a_member_that_was_left_out_is_said_in_large_letters_and_in_the_timing(
    pairs, trained, submission
):
    runs = trained | {ENCODER: None}
    outcome = run(pairs, runs, BLEND, submission)
    timing = describe_timing(outcome, n_pairs=60, seconds=1.0, deadline_s=60)
    (left,) = timing["left_out"]
    assert (left["member"], left["status"]) == (ENCODER, "absent") and "notebook" in left["note"]
    assert describe_left_out(outcome).startswith(f"# Left out: {ENCODER} (absent)\n\n")
    outcome.timings[1].note = "<script>`x`"
    assert "&lt;script&gt;'x'" in describe_left_out(outcome)
    for change in ({"n_reached": 1}, {"status": "zero weight"}, {"n_asked": 0}):
        timings = [outcome.timings[0], dataclasses.replace(outcome.timings[1], **change)]
        assert describe_left_out(dataclasses.replace(outcome, timings=timings)) == ""


@pytest.mark.parametrize("layout", ["", "models/wowfattie"])
def test_an_attached_base_is_found_in_both_layouts_and_checked(
    pairs, trained, tmp_path, monkeypatch, layout
):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(paths, "KAGGLE_WORKING", tmp_path)
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "input")
    folder = trained[DECODER] / "model" / "fold_0"
    config = dataclasses.replace(CONFIGS[DECODER], checkpoint="Qwen/Qwen3-4B-Instruct-2507")
    assert checkpoints.find_base(folder, config) is None
    name = "qwen3-4b-instruct-2507/transformers/default"
    right = tmp_path / "input" / layout / name / "2"
    shutil.copytree(trained[DECODER] / "base", right)
    assert checkpoints.find_base(folder, config) == right
    wrong = tmp_path / "input" / layout / name / "1"
    bases.prepare_base(dataclasses.replace(CONFIGS[DECODER], seed=7), pairs, wrong, n_steps=0)
    assert checkpoints.find_base(folder, config) == right
    shutil.rmtree(right)
    with pytest.raises(ValueError, match=f"{wrong}.*hash"):
        checkpoints.find_base(folder, config)
    with pytest.raises(ValueError, match=f"{wrong}.*hash"):
        checkpoints.load_finetuned(folder, config, wrong)


def test_the_deadline_of_the_notebook_holds_a_margin_of_15_percent():
    parameters = read_parameters(paths.ROOT / "notebooks" / "06_kaggle_inference.ipynb")
    assert 0.8 <= parameters["DEADLINE_S"] / (9 * 3600) <= 0.85 + 1e-9


# ---- processes ---------------------------------------------------------------


def loading(trained, name):
    return functools.partial(load_reader, trained[name] / "model" / "fold_0", CONFIGS[name], None)


def read_all(reader, trained, name, pairs):
    tokenizer = checkpoints.load_tokenizer(trained[name] / "model" / "fold_0")
    return predict_pairs(reader, tokenizer, pairs, max_tokens=192, tokens_per_batch=1024)


def later() -> float:
    """A moment that no test reaches."""
    return time.monotonic() + 300


@pytest.mark.slow
def test_two_processes_predict_what_this_one_predicts(trained, pairs, answers):
    with closing(open_reader(loading(trained, DECODER), later(), 2)) as reader:
        assert len(multiprocessing.active_children()) == 2 and reader.capacity == 4
        prediction = read_all(reader, trained, DECODER, pairs)
    assert not multiprocessing.active_children()
    np.testing.assert_allclose(prediction.probs, answers[DECODER], atol=1e-5)
    assert (prediction.n_readings == 2).all() and prediction.note == ""


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, 2])
def test_the_batches_of_a_killed_process_are_read_by_the_other_or_given_up(
    trained, pairs, n_workers, monkeypatch
):
    with closing(open_reader(loading(trained, ENCODER), later(), n_workers)) as reader:
        victim, receive, keys = multiprocessing.active_children()[0], reader.receive, []

        def kill_at_the_fifth(deadline):
            keys.append(1)
            if len(keys) == 5:
                victim.kill()
            return receive(deadline)

        monkeypatch.setattr(reader, "receive", kill_at_the_fifth)
        prediction = read_all(reader, trained, ENCODER, pairs)
    assert victim.exitcode == -signal.SIGKILL
    n_reached = np.isfinite(prediction.probs).all(axis=1).sum()
    if n_workers == 2:
        assert n_reached == 60 and prediction.note == ""
    else:
        assert 0 < n_reached < 60 and "BrokenProcessPool" in prediction.note


def test_where_no_process_can_be_started_this_one_reads(trained, pairs, answers, monkeypatch):
    def refuse(*_):
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
    with pytest.warns(UserWarning, match="Resource temporarily unavailable"):
        reader = open_reader(loading(trained, ENCODER), later(), 1)
    prediction = read_all(reader, trained, ENCODER, pairs)
    assert isinstance(reader, LocalReader)
    np.testing.assert_allclose(prediction.probs, answers[ENCODER], atol=1e-9)


HURRIED = """
import functools, multiprocessing, sys, time
from pathlib import Path
from src.utils.config import FinetuneConfig
from src.utils.models.reading import load_reader, open_reader
from src.utils.runs import read_json

if __name__ == "__main__":
    run = Path(sys.argv[1])
    config = FinetuneConfig.from_json(read_json(run / "config.json"))
    load = functools.partial(load_reader, run / "model" / "fold_0", config, None)
    for seconds in map(float, sys.argv[2:]):
        try:
            reader = open_reader(load, time.monotonic() + seconds, 1)
            print(multiprocessing.active_children()[0].pid, flush=True)
            time.sleep(600)
        except RuntimeError as error:
            print("late" if "time" in str(error) else error)
    print(len(multiprocessing.active_children()))
"""


@pytest.mark.slow
def test_a_model_that_loads_too_slowly_leaves_no_process_and_no_warning(trained):
    command = [sys.executable, "-c", HURRIED, trained[ENCODER], "0.1", "1.4"]
    ran = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=300)
    assert ran.stdout.split() == ["late"] * 2 + ["0"], ran.stderr
    assert "leaked" not in ran.stderr


@pytest.mark.slow
def test_a_process_ends_when_its_parent_is_killed(trained):
    command = [sys.executable, "-c", HURRIED, trained[ENCODER], "300"]
    parent = subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail(f"process {worker} outlived its parent by 30 s")
