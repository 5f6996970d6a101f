"""A training that is stopped by the end of its session goes on in the next one, and ends alike."""

import dataclasses
import math
import time

import numpy as np
import pandas as pd
import pytest
from IPython.testing.globalipapp import start_ipython
from safetensors.torch import load_file

from src.utils import paths
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import EdaConfig
from src.utils.runs import find_damage, read_json, read_pairs, read_source, write_json, write_pairs
from src.utils.schema import probs_of
from src.utils.training import launch, session, states, trainer
from src.utils.training.earlier import list_finished
from src.utils.training.fit import fit
from src.utils.training.launch import fit_in_session
from src.utils.training.session import SessionOver, copy_run, prepare_session, take_over
from src.utils.training.trainer import FoldTrainer, list_checkpoints

NAME = "03_modernbert"


@pytest.fixture
def pairs(demo_pairs):
    return demo_pairs[:60].reset_index(drop=True)


@pytest.fixture
def config(tiny_configs):
    changes = {"n_epochs": 1.0, "n_evals": 2, "folds": (0, 1), "tokens_per_step": 512}
    return dataclasses.replace(tiny_configs["modernbert"], **changes)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A function that starts a session: its output so far becomes a read-only input."""
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "input")
    n_sessions = [0]

    def start(output=None, place="notebooks/ada/arena"):
        n_sessions[0] += 1
        root = tmp_path / f"session_{n_sessions[0]}"
        monkeypatch.setattr(paths, "KAGGLE_INPUT", root / "input")
        monkeypatch.setenv("ARENA_ARTIFACTS", str(root / "artifacts"))
        if output:
            (root / "input" / place).parent.mkdir(parents=True)
            output.rename(root / "input" / place)
            for path in (root / "input").rglob("*"):
                path.chmod(0o555 if path.is_dir() else 0o444)
        return root / "artifacts"

    return start


def read_weights(run_dir):
    files = sorted(run_dir.glob("model/*/*.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


def count_seconds_in_steps(monkeypatch):
    """Let each step take a second, by a clock that is looked at after each; returns the clock."""
    monkeypatch.setattr(trainer, "_CLOCK_STEPS", 1)
    n_taken, take_step = [0], FoldTrainer.take_step

    def take_a_second(self):
        take_step(self)
        n_taken[0] += 1

    monkeypatch.setattr(FoldTrainer, "take_step", take_a_second)
    monkeypatch.setattr(time, "monotonic", lambda: float(n_taken[0]))
    return n_taken


def train_in_sessions(pairs, config, base, start, lengths_s, n_taken):
    """Train in sessions of these lengths and a last one; each goes on from the one before."""
    output, stops, layouts = None, [], ("notebooks/ada/arena", "arena")
    for number, length_s in enumerate([*lengths_s, 0.0]):
        artifacts = start(output, layouts[number % 2])
        assert (take_over(NAME) is None) == (output is None)
        try:
            timed = dataclasses.replace(config, train_deadline_s=length_s)
            return fit(pairs, timed, artifacts / NAME, base), artifacts / NAME, stops
        except SessionOver:
            stops.append(n_taken[0])
            output = artifacts
    raise AssertionError("the last session has no end")


@pytest.mark.slow
def test_ten_trainings_stopped_at_random_moments_end_with_the_weights_of_an_unbroken_one(
    pairs, config, tiny_base, tmp_path, kaggle, monkeypatch
):
    n_taken = count_seconds_in_steps(monkeypatch)
    base = tiny_base("modernbert")
    unbroken = fit(pairs, config, tmp_path / "unbroken", base)
    n_steps, expected = n_taken[0], read_weights(tmp_path / "unbroken")
    assert expected.keys() == {"fold_0", "fold_1"} and n_steps > 15
    rng, moments = np.random.default_rng(3), []
    for _ in range(10):
        draws = rng.uniform(0, 0.6 * n_steps, 2).tolist()
        n_taken[0] = 0
        result, run_dir, stops = train_in_sessions(pairs, config, base, kaggle, draws, n_taken)
        moments += stops
        assert n_taken[0] == n_steps  # no step is taken twice
        found = read_weights(run_dir)
        assert found.keys() == expected.keys()
        for name, weights in expected.items():
            for key, weight in weights.items():
                assert (found[name][key] == weight).all(), (name, key)
        pd.testing.assert_frame_equal(result.oof, unbroken.oof)
        losses = ["fold", "step", "train_loss", "log_loss", "learning_rate"]
        pd.testing.assert_frame_equal(result.history[losses], unbroken.history[losses])
    assert len(moments) >= 12 and len(set(moments)) >= 6


@pytest.mark.slow
def test_a_session_that_ends_in_the_last_prediction_trains_nothing_again(
    pairs, config, tiny_base, tmp_path, monkeypatch
):
    one = dataclasses.replace(config, folds=(0,))
    end = time.monotonic() + 3600
    finish = FoldTrainer._finish
    monkeypatch.setattr(FoldTrainer, "_finish", lambda self, bar, _: finish(self, bar, -math.inf))
    monkeypatch.setattr("src.utils.models.predict._KEEP_S", 0.0)
    with pytest.raises(SessionOver):
        fit(pairs, one, tmp_path, tiny_base("modernbert"), end)
    assert list_finished(tmp_path) == []
    monkeypatch.setattr(FoldTrainer, "_finish", finish)
    monkeypatch.setattr(FoldTrainer, "take_step", None)
    fit(pairs, one, tmp_path, tiny_base("modernbert"), end)
    assert list_finished(tmp_path) == ["fold_0"]


@pytest.mark.slow
def test_a_notebook_says_what_is_finished_and_what_remains_and_ends(
    pairs, config, tiny_base, tmp_path, monkeypatch
):
    n_taken = count_seconds_in_steps(monkeypatch)
    shown, skipped = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(launch, "skip_cells", lambda: skipped.append(True))
    base, run_dir = tiny_base("modernbert"), tmp_path / NAME
    fit(pairs, dataclasses.replace(config, folds=(0,)), run_dir, base)
    timed = dataclasses.replace(config, refit=True, train_deadline_s=3.5)
    assert fit_in_session(pairs, timed, run_dir, base) is None and skipped
    text = shown[0].data
    assert text.startswith("# ") and "## Finished: fold_0\n" in text
    assert "## Remaining: fold_1 (step 4 of 9), refit (not begun)" in text
    assert "make kernel NB=03 RESUME=1" in text
    before = n_taken[0]
    with pytest.raises(SessionOver):  # as in a notebook whose processes have stopped
        fit(pairs, timed, run_dir, base, session_end=-1.0)
    assert n_taken[0] == before


@pytest.mark.slow
def test_a_session_that_ends_while_states_are_read_keeps_them_and_the_heads_are_the_same(
    pairs, tiny_configs, tiny_base, tmp_path, kaggle, monkeypatch
):
    config = dataclasses.replace(tiny_configs["qwen3"], train="head")
    unbroken = fit(pairs, config, tmp_path / "unbroken", tiny_base("qwen3"))
    first = kaggle()
    with monkeypatch.context() as patch, pytest.raises(SessionOver, match="of the states"):
        patch.setattr(states, "_PART_S", 0.0)
        fit(pairs, config, first / NAME, tiny_base("qwen3"), session_end=-1.0)
    (part,) = (first / NAME).glob("states/*/part-*.npy")
    run_dir = kaggle(first) / NAME
    take_over(NAME)
    resumed = fit(pairs, config, run_dir, tiny_base("qwen3"))
    assert part.name in {path.name for path in run_dir.glob("states/*/part-*.npy")}
    assert list_finished(run_dir) == list_finished(tmp_path / "unbroken")
    np.testing.assert_allclose(probs_of(resumed.oof), probs_of(unbroken.oof), atol=1e-3)


@pytest.mark.slow
def test_two_processes_end_their_session_together_and_the_notebook_after_them(
    pairs, config, tiny_base, tmp_path, capfd
):
    two = dataclasses.replace(config, n_processes=2, tokens_per_step=1024, n_epochs=400.0)
    two = dataclasses.replace(two, train_deadline_s=4.0)
    assert fit_in_session(pairs, two, tmp_path / NAME, tiny_base("modernbert")) is None
    printed = capfd.readouterr().out
    assert "TRAIN_DEADLINE_S is over" in printed
    (newest, *_) = list_checkpoints(tmp_path / NAME / "checkpoints" / "fold_0")
    assert find_damage(newest) is None and list_finished(tmp_path / NAME) == []


def test_without_a_deadline_a_session_never_ends_and_hours_shorten_the_training_instead():
    assert session.end_of_session(0.0) == math.inf
    assert session.end_of_session(60.0) == pytest.approx(time.monotonic() + 60, abs=1)


def test_cells_after_the_end_of_a_session_do_nothing(capsys):
    shell = start_ipython()
    session.skip_cells()
    try:
        shell.run_cell("undefined_name + 1").raise_error()
        assert "Skipped" in capsys.readouterr().out
    finally:
        shell.input_transformers_post.clear()


# ---- taking over ---------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path, pairs, config, tiny_base, monkeypatch):
    """The output of a session that had finished one fold and begun another."""
    monkeypatch.setattr(trainer, "_CLOCK_STEPS", 1)
    run_dir = tmp_path / "earlier" / "artifacts" / NAME
    base = tiny_base("modernbert")
    fit(pairs, dataclasses.replace(config, folds=(0,)), run_dir, base)
    with monkeypatch.context() as patch, pytest.raises(SessionOver):
        watched = FoldTrainer._watch_clock
        patch.setattr(
            FoldTrainer,
            "_watch_clock",
            lambda self, saved, late, end, pace: watched(
                self, saved, late, 0.0 if self.step == 6 else end, pace
            ),
        )
        fit(pairs, config, run_dir, base)
    write_json(run_dir / "metrics.json", {})
    (run_dir / "model" / ".fold_1.tmp").mkdir()
    (run_dir / "states").mkdir()
    (run_dir / "states" / "fold_0.npy").write_bytes(b"states")
    return run_dir


@pytest.mark.slow
def test_all_that_training_needs_is_taken_over_once_and_can_be_written(earlier, kaggle, capsys):
    newest, before = list_checkpoints(earlier / "checkpoints" / "fold_1")
    newest.with_name("checkpoint-7").mkdir()  # has no manifest: a save that was interrupted
    run_dir = kaggle(earlier.parent) / NAME
    take_over(NAME)
    files = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")}
    assert {"model/fold_0/training.json", "states/fold_0.npy"} <= files
    assert f"checkpoints/fold_1/{newest.name}/state.pt" in files
    assert not {"metrics.json", "model/.fold_1.tmp", "checkpoints/fold_1/checkpoint-7"} & files
    assert f"checkpoints/fold_1/{before.name}" not in files
    assert find_damage(run_dir / "checkpoints" / "fold_1" / newest.name) is None
    write_json(run_dir / "model" / "fold_0" / "training.json", {})
    assert take_over(NAME) is None  # what is here is never replaced
    assert read_json(run_dir / "model" / "fold_0" / "training.json") == {}


@pytest.mark.slow
def test_of_several_outputs_the_one_that_came_furthest_is_taken(earlier, kaggle, tmp_path):
    less = tmp_path / "less" / NAME
    copy_run(earlier, less)
    (less / "checkpoints" / "fold_1" / "checkpoint-6").rename(less / "checkpoint-0")
    artifacts = kaggle(earlier.parent, "z")
    copy_run(less, paths.KAGGLE_INPUT / "a" / NAME)
    assert take_over(NAME) == paths.KAGGLE_INPUT / "z" / NAME
    assert (artifacts / NAME / "checkpoints" / "fold_1" / "checkpoint-6").exists()


def test_battles_are_split_as_notebook_01_splits_them_unless_an_input_has_the_split(
    demo_pairs, kaggle, monkeypatch, capsys
):
    pairs = demo_pairs[:30].reset_index(drop=True)
    source = paths.RawData("kaggle", (), None, None)
    monkeypatch.setattr(paths, "find_raw_data", lambda: source)
    monkeypatch.setattr(session, "load_pairs", lambda train: (pairs, []))
    first = kaggle()
    prepare_session("01_eda", NAME)
    frozen = first / "01_eda" / "pairs.parquet"
    expected = add_groups_and_folds(pairs, EdaConfig().n_folds, EdaConfig().seed)
    pd.testing.assert_frame_equal(read_pairs(frozen)[["id", "fold"]], expected[["id", "fold"]])
    assert "split 30 battles" in capsys.readouterr().out
    assert read_source(first / "01_eda") == "the competition's data"
    monkeypatch.setattr(session, "load_pairs", None)
    second = kaggle(first)
    prepare_session("01_eda", NAME)
    assert read_pairs(second / "01_eda" / "pairs.parquet").equals(
        read_pairs(paths.KAGGLE_INPUT / "notebooks/ada/arena/01_eda/pairs.parquet")
    )


@pytest.mark.slow
def test_a_new_session_says_what_it_goes_on_from(earlier, kaggle, demo_pairs, capsys):
    eda = earlier.parent / "01_eda"
    write_pairs(eda / "pairs.parquet", demo_pairs)
    write_json(eda / "bias.json", {})
    kaggle(earlier.parent)
    prepare_session("01_eda", NAME)
    printed = capsys.readouterr().out
    assert "03_modernbert: goes on from" in printed
    assert "fold_0: finished" in printed and "fold_1 (step 6 of" in printed
