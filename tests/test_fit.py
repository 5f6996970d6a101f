import contextlib
import dataclasses
import json
import multiprocessing
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src.utils.models.checkpoints import load_finetuned
from src.utils.models.predict import predict_pairs, predict_probs
from src.utils.models.reading import LocalReader
from src.utils.runs import Stopwatch, find_damage, hash_file, hash_pairs, read_json
from src.utils.schema import TEXTS, probs_of, probs_table
from src.utils.stats.scores import log_loss
from src.utils.training import fit as fitting
from src.utils.training import frozen_heads, trainer
from src.utils.training.earlier import describe_difference, list_finished
from src.utils.training.fit import find_checkpoint, fit, prepare_members
from src.utils.training.frozen_heads import HEAD_COLUMNS
from src.utils.training.trainer import HISTORY_COLUMNS, FoldTrainer, list_checkpoints

LOSSES = ["step", "train_loss", "log_loss", "learning_rate"]


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    """Make training raise before a step, as a killed run stops."""
    real = FoldTrainer.take_step

    def take_step(self):
        if self.step == step:
            raise Killed
        real(self)

    monkeypatch.setattr(FoldTrainer, "take_step", take_step)


def note_steps(monkeypatch):
    """A table that fills with every step taken: the model's name, number and learning rate."""
    noted = []
    real = FoldTrainer.take_step

    def take_step(self):
        step = self.step
        real(self)
        noted.append((self.member.name, step, self.optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(FoldTrainer, "take_step", take_step)
    return noted


def cosine_with_warmup(peak, n_steps):
    n_warm = int(np.ceil(0.1 * n_steps))
    steps = np.arange(n_steps)
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - n_warm) / (n_steps - n_warm)))
    return peak * np.where(steps < n_warm, steps / n_warm, cosine)


def check_same_weights(one, two, tolerance=0.0):
    (weights,) = (one / "model" / "fold_0").glob("*.safetensors")
    before, after = load_file(weights), load_file(two / "model" / "fold_0" / weights.name)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=tolerance, rtol=0)


@pytest.fixture
def encoder(tiny_configs):
    return tiny_configs["modernbert"]


@pytest.fixture
def short(encoder):
    return dataclasses.replace(encoder, n_epochs=1.0, n_evals=1)


@pytest.fixture
def pairs(demo_pairs):
    return demo_pairs[:60].reset_index(drop=True)


# ---- complete runs -----------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(_demo_pairs, tiny_base, tiny_configs, tmp_path_factory):
    """A finished run of two folds, and every step that it took."""
    run_dir = tmp_path_factory.mktemp("fitted")
    pairs = _demo_pairs[:80].reset_index(drop=True)
    config = dataclasses.replace(tiny_configs["modernbert"], folds=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        steps = note_steps(patch)
        result = fit(pairs, config, run_dir, tiny_base("modernbert"))
    return pairs, config, result, run_dir, steps


@pytest.mark.slow
def test_every_held_out_battle_is_predicted_once(fitted):
    pairs, _, result, _, _ = fitted
    heldout = pairs[pairs["fold"].isin([0, 1])]
    assert sorted(result.oof["id"]) == sorted(heldout["id"])
    assert result.oof.set_index("id")["fold"].to_dict() == heldout.set_index("id")["fold"].to_dict()
    probs_of(result.oof)


@pytest.mark.slow
def test_the_last_weights_are_kept_and_give_the_same_held_out_probabilities(fitted):
    pairs, config, result, run_dir, _ = fitted
    for fold in (0, 1):
        model, tokenizer = load_finetuned(run_dir / "model" / f"fold_{fold}", config)
        heldout = pairs[pairs["fold"] == fold]
        options = {"max_tokens": 96, "tokens_per_batch": 512}
        probs = predict_probs(model, tokenizer, heldout, **options)
        oof = probs_of(result.oof[result.oof["fold"] == fold])
        np.testing.assert_allclose(probs, oof, atol=1e-6)
    reader = LocalReader(model, tokenizer.pad_token_id)
    once = predict_pairs(reader, tokenizer, heldout, twice_share=0.0, **options).probs
    last = result.history.loc[result.history["fold"] == 1, "log_loss"].iloc[-1]
    assert log_loss(once, heldout["label"].to_numpy()) == pytest.approx(last, abs=1e-6)
    assert 0 < result.swap_gap < 0.5


@pytest.mark.slow
def test_warmup_and_cosine_are_really_applied(fitted):
    rates = [rate for name, _, rate in fitted[-1] if name == "fold_0"]
    np.testing.assert_allclose(rates, cosine_with_warmup(1e-3, len(rates)), atol=1e-9)


@pytest.mark.slow
def test_the_history_has_rows_between_and_at_validations(fitted):
    _, _, result, run_dir, _ = fitted
    history = result.history
    assert tuple(history.columns) == HISTORY_COLUMNS
    assert history.groupby("fold")["log_loss"].count().to_dict() == {0: 4, 1: 4}
    assert (history.groupby("fold").size() >= 10).all()
    assert history["epoch"].max() == 2 and history["reserved_mib"].isna().all()
    assert (history.groupby("fold")["minutes"].diff().dropna() > 0).all()
    assert history[["train_loss", "log_loss"]].min(axis=None) > 0
    assert history[["train_accuracy", "accuracy"]].stack().dropna().between(0, 1).all()
    assert history["train_accuracy"].mean() > 0 and (history["memory_mib"] > 50).all()
    assert (history["tokens_per_second"] > 0).all() and (history["padding_share"] == 0).all()
    assert result.n_train_pairs == 64
    assert result.seconds > 0 and result.tokens_per_second > 0 and result.n_parameters > 1e5
    assert not list(run_dir.rglob("checkpoint-*"))


@pytest.mark.slow
def test_a_finished_fold_is_not_trained_again(fitted, monkeypatch, tiny_base):
    pairs, config, result, run_dir, _ = fitted
    monkeypatch.setattr(fitting, "load_classifier", None)
    again = fit(pairs, config, run_dir, tiny_base("modernbert"))
    pd.testing.assert_frame_equal(again.oof, result.oof)
    pd.testing.assert_frame_equal(again.history, result.history)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate"), [("modernbert", 2e-3), ("qwen3", 1e-2)])
def test_four_pairs_can_be_overfitted(kind, rate, demo_pairs, tiny_base, tiny_configs, tmp_path):
    pairs = demo_pairs[:8].assign(fold=[0, 0, 0, 0, 1, 1, 1, 1], label=[0, 1, 2, 0] * 2)
    changes = {"n_epochs": 40.0, "n_evals": 1, "weight_decay": 0.0, "tokens_per_step": 512}
    config = dataclasses.replace(tiny_configs[kind], learning_rate=rate, **changes)
    history = fit(pairs, config, tmp_path, tiny_base(kind)).history
    assert history["train_loss"].iloc[0] > 0.3
    assert history["train_loss"].iloc[-1] < 0.05


# ---- killed and resumed ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_a_killed_run_resumes_and_ends_with_the_same_weights(
    kind, pairs, tiny_base, tiny_configs, tmp_path, monkeypatch
):
    config = tiny_configs[kind]
    unbroken = fit(pairs, config, tmp_path / "unbroken", tiny_base(kind))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, int(unbroken.history["step"].iloc[-1]) - 1)
        fit(pairs, config, tmp_path / "killed", tiny_base(kind))
    checkpoints = tmp_path / "killed" / "checkpoints" / "fold_0"
    newest = list_checkpoints(checkpoints)[0]
    ignore = shutil.ignore_patterns("manifest.json")
    shutil.copytree(newest, checkpoints / "checkpoint-999999", ignore=ignore)
    steps = note_steps(monkeypatch)
    with pytest.warns(UserWarning, match=r"checkpoint-999999 is damaged.*manifest\.json"):
        resumed = fit(pairs, config, tmp_path / "killed", tiny_base(kind))
    assert steps[0][1] == int(newest.name.split("-")[1]) > 0
    check_same_weights(tmp_path / "unbroken", tmp_path / "killed")
    pd.testing.assert_frame_equal(resumed.oof, unbroken.oof)
    pd.testing.assert_frame_equal(resumed.history[LOSSES], unbroken.history[LOSSES])


KILLED_FOR_REAL = """
import os, pickle, signal, sys
from pathlib import Path
from src.utils.training import trainer
from src.utils.training.fit import fit

place, run_dir, base = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
pairs, config = pickle.loads(Path(sys.argv[4]).read_bytes())
owner = trainer.FoldTrainer if place == "take_step" else trainer
real, n_calls = getattr(owner, place), [0]

def die_late(*args):
    n_calls[0] += 1
    if n_calls[0] == (5 if place == "take_step" else 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

setattr(owner, place, die_late)
fit(pairs, config, run_dir, base)
"""


@pytest.mark.slow
def test_a_run_killed_by_the_system_in_a_step_and_in_a_save_ends_with_the_same_weights(
    pairs, encoder, tiny_base, tmp_path
):
    base, config = tiny_base("modernbert"), dataclasses.replace(encoder, n_evals=4, n_epochs=1.0)
    given, killed = tmp_path / "given.pkl", tmp_path / "killed"
    given.write_bytes(pickle.dumps((pairs, config)))
    for place in ("take_step", "write_manifest"):
        command = [sys.executable, "-c", KILLED_FOR_REAL, place, killed, base, given]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    folder = killed / "checkpoints" / "fold_0"
    assert list(folder.glob(".checkpoint-*"))  # begun, and not taken for a complete one
    assert [find_damage(checkpoint) for checkpoint in list_checkpoints(folder)] == [None, None]
    resumed = fit(pairs, config, killed, base)
    unbroken = fit(pairs, config, tmp_path / "unbroken", base)
    check_same_weights(tmp_path / "unbroken", killed)
    pd.testing.assert_frame_equal(resumed.oof, unbroken.oof)


@pytest.fixture(scope="module")
def begun(_demo_pairs, tiny_base, tiny_configs, tmp_path_factory):
    """The checkpoints of a run that was killed after its third validation, and its settings."""
    run_dir = tmp_path_factory.mktemp("begun")
    config = dataclasses.replace(tiny_configs["modernbert"], n_epochs=1.0, n_evals=8)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        fit(_demo_pairs[:60].reset_index(drop=True), config, run_dir, tiny_base("modernbert"))
    return run_dir / "checkpoints" / "fold_0", config


@pytest.mark.slow
def test_the_history_is_written_at_every_validation_of_all_models_but_the_refit(begun, many):
    killed = pd.read_csv(begun[0].parents[1] / "history.csv")
    assert killed["step"].tolist() == [1, 2, 3] and tuple(killed.columns) == HISTORY_COLUMNS
    written = pd.read_csv(many[2] / "history.csv")
    pd.testing.assert_frame_equal(written, many[3].history, check_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(begun, tmp_path, damage):
    folder = shutil.copytree(begun[0], tmp_path / "fold_0")
    newest, before = list_checkpoints(folder)
    content = bytearray((newest / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.pt").write_bytes(content if damage == "flipped" else content[:-1])
    message = rf"{newest.name} is damaged.*state\.pt: expected {len(content)} bytes .* found \d+"
    with pytest.warns(UserWarning, match=message):
        assert find_checkpoint(folder) == before
    assert not newest.exists()


@pytest.mark.slow
def test_a_run_that_packed_its_batches_does_not_resume_with_padded_ones(
    begun, pairs, tiny_base, tmp_path, monkeypatch
):
    shutil.copytree(begun[0], tmp_path / "checkpoints" / "fold_0")
    monkeypatch.setattr(trainer, "can_pack", lambda model: False)  # as an older transformers
    with pytest.raises(ValueError, match=r"packed=False.*packed=True"):
        fit(pairs, begun[1], tmp_path, tiny_base("modernbert"))
    assert list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_set_aside_and_come_back(
    begun, pairs, short, tiny_base, tmp_path, monkeypatch
):
    folder = shutil.copytree(begun[0], tmp_path / "checkpoints" / "fold_0")
    before = sorted(path.name for path in folder.glob("checkpoint-*"))
    other = dataclasses.replace(begun[1], learning_rate=2e-3)
    fit(pairs, other, tmp_path, tiny_base("modernbert"))
    (aside,) = (tmp_path / "earlier").glob("*/checkpoints/fold_0")
    assert sorted(path.name for path in aside.glob("checkpoint-*")) == before
    steps = note_steps(monkeypatch)
    fit(pairs, begun[1], tmp_path, tiny_base("modernbert"))
    assert steps[0][1] == 3


@pytest.mark.slow
def test_a_run_killed_in_its_last_prediction_trains_nothing_again(
    pairs, short, tiny_base, tmp_path, monkeypatch
):
    def die(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FoldTrainer, "_write_model", die)
        fit(pairs, short, tmp_path, tiny_base("modernbert"))
    assert list_finished(tmp_path) == []
    monkeypatch.setattr(FoldTrainer, "take_step", None)
    result = fit(pairs, short, tmp_path, tiny_base("modernbert"))
    assert result.history["log_loss"].count() == 1 and list_finished(tmp_path) == ["fold_0"]


def train_and_save_often(pairs, config, run_dir, base):
    trainer._CLOCK_STEPS = 1
    fit(pairs, config, run_dir, base)


@pytest.mark.slow
@pytest.mark.parametrize("n_tok", [512, 96], ids=["the same passes", "other passes"])
def test_ten_runs_killed_by_the_system_at_random_moments_end_with_the_same_weights(
    pairs, encoder, tiny_base, tmp_path, n_tok
):
    base = tiny_base("modernbert")
    config = dataclasses.replace(encoder, n_evals=4, save_minutes=1e-6, learning_rate=1e-4)
    watch = Stopwatch()
    unbroken = fit(pairs, config, tmp_path / "unbroken", base)
    longest_s = watch.seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_fit"])
    rng = np.random.default_rng(7)
    steps = []  # that each run had saved when it was killed
    for number in range(10):
        killed = tmp_path / f"killed_{number}"
        process = context.Process(target=train_and_save_often, args=(pairs, config, killed, base))
        process.start()
        while process.is_alive() and not (killed / "checkpoints" / "fold_0").exists():
            time.sleep(0.01)
        process.join(rng.uniform(0, 1.2 * longest_s))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            found = list_checkpoints(killed / "checkpoints" / "fold_0")
            steps.append(int(found[0].name.split("-")[1]) if found else 0)
        resumed = fit(pairs, dataclasses.replace(config, tokens_per_batch=n_tok), killed, base)
        is_exact = n_tok == config.tokens_per_batch
        check_same_weights(tmp_path / "unbroken", killed, 0 if is_exact else 1e-5)
        atol = 0 if is_exact else 1e-4
        np.testing.assert_allclose(probs_of(resumed.oof), probs_of(unbroken.oof), atol=atol)
    assert len(steps) >= 5 and len(set(steps)) >= 3


# ---- several models ----------------------------------------------------------


@pytest.fixture(scope="module")
def many(_demo_pairs, tiny_base, tiny_configs, tmp_path_factory):
    """A run of two folds with two seeds and the refit, and every step that it took."""
    run_dir = tmp_path_factory.mktemp("many")
    pairs = _demo_pairs[:60].reset_index(drop=True)
    changes = {"n_epochs": 1.0, "n_evals": 3, "folds": (0, 1), "n_seeds": 2, "refit": True}
    config = dataclasses.replace(tiny_configs["modernbert"], **changes)
    with pytest.MonkeyPatch.context() as patch:
        steps = note_steps(patch)
        result = fit(pairs, config, run_dir, tiny_base("modernbert"))
    return pairs, config, run_dir, result, steps


NAMES = ["fold_0", "fold_0_seed_1", "fold_1", "fold_1_seed_1"]


@pytest.mark.slow
def test_seeds_are_different_models_whose_probabilities_are_averaged(many):
    pairs, config, run_dir, result, _ = many
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == [*NAMES, "refit"]
    each = [probs_of(pd.read_parquet(run_dir / "model" / name / "oof.parquet")) for name in NAMES]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    expected = np.concatenate([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])
    np.testing.assert_allclose(probs_of(result.oof), expected, atol=1e-7)
    assert sorted(result.oof["id"]) == sorted(pairs.loc[pairs["fold"].isin([0, 1]), "id"])
    rows = result.history.groupby(["fold", "seed"])["log_loss"].count()
    seeds = (config.seed, config.seed + 1)
    assert rows.to_dict() == {(fold, seed): 3 for fold in (0, 1) for seed in seeds}


@pytest.mark.slow
def test_the_refit_learns_from_every_battle_in_all_steps(many):
    pairs, config, run_dir, _, steps = many
    done = {
        name: read_json(run_dir / "model" / name / "training.json") for name in ("fold_0", "refit")
    }
    assert done["refit"]["n_train_pairs"] == len(pairs) > done["fold_0"]["n_train_pairs"]
    rates = [rate for name, _, rate in steps if name == "refit"]
    np.testing.assert_allclose(rates, cosine_with_warmup(1e-3, len(rates)), atol=1e-9)
    assert done["refit"]["steps"] == [len(rates), len(rates)]
    model, tokenizer = load_finetuned(run_dir / "model" / "refit", config)
    probs = predict_probs(model, tokenizer, pairs[:4], max_tokens=96, tokens_per_batch=512)
    assert np.isfinite(probs).all()
    assert not (run_dir / "model" / "refit" / "oof.parquet").exists()


# ---- nothing that was trained is lost -----------------------------------------


def weights_of(run_dir):
    """Hash of the weights -> folder, of every finished model, in use or set aside."""
    files = run_dir.rglob("*.safetensors")
    return {hash_file(file): file.parent for file in files if "checkpoints" not in file.parts}


@pytest.mark.slow
def test_another_fold_and_another_seed_add_to_what_is_there(
    pairs, short, tiny_base, tmp_path, monkeypatch
):
    base = tiny_base("modernbert")
    first = fit(pairs, short, tmp_path, base)
    before = weights_of(tmp_path)
    second = fit(pairs, dataclasses.replace(short, folds=(1,)), tmp_path, base)
    assert second.config.folds == (0, 1) and sorted(set(second.oof["fold"])) == [0, 1]
    of_first = second.oof[second.oof["fold"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_first, first.oof)
    third = fit(pairs, dataclasses.replace(short, n_seeds=2), tmp_path, base)
    assert list_finished(tmp_path) == ["fold_0", "fold_0_seed_1", "fold_1"]
    assert third.config.folds == (0, 1)
    assert before.items() <= weights_of(tmp_path).items()
    monkeypatch.setattr(fitting, "load_classifier", None)
    again = fit(pairs, short, tmp_path, base)  # one seed, one fold: all that is there counts
    pd.testing.assert_frame_equal(again.oof, third.oof)


@pytest.mark.slow
def test_settings_of_prediction_predict_again_and_train_nothing(
    pairs, short, tiny_base, tmp_path, monkeypatch
):
    base = tiny_base("modernbert")
    first = fit(pairs, short, tmp_path, base)
    before = weights_of(tmp_path)
    monkeypatch.setattr(fitting, "load_classifier", None)
    changes = {"n_evals": 5, "eval_pairs": 7, "tokens_per_batch": 300, "save_minutes": 1.0}
    same = fit(pairs, dataclasses.replace(short, **changes), tmp_path, base)
    pd.testing.assert_frame_equal(same.oof, first.oof)
    longer = fit(pairs, dataclasses.replace(short, predict_tokens=80), tmp_path, base)
    assert np.abs(probs_of(longer.oof) - probs_of(first.oof)).max() > 1e-5
    back = fit(pairs, short, tmp_path, base)
    np.testing.assert_allclose(probs_of(back.oof), probs_of(first.oof), atol=1e-6)
    (tmp_path / "model" / "fold_0" / "oof.parquet").unlink()
    back = fit(pairs, short, tmp_path, base)
    np.testing.assert_allclose(probs_of(back.oof), probs_of(first.oof), atol=1e-6)
    assert weights_of(tmp_path) == before


@pytest.mark.slow
def test_models_of_other_settings_are_set_aside_and_come_back_with_them(
    pairs, short, tiny_base, tmp_path, monkeypatch, capsys
):
    base = tiny_base("modernbert")
    first = fit(pairs, dataclasses.replace(short, folds=(0, 1)), tmp_path, base)
    before = weights_of(tmp_path)
    other = dataclasses.replace(short, learning_rate=2e-3, max_tokens=90)
    fit(pairs, other, tmp_path, base)
    printed = capsys.readouterr().out
    assert "MAX_TOKENS was 96, is 90; LEARNING_RATE was 0.001, is 0.002" in printed
    assert before.keys() <= weights_of(tmp_path).keys()
    assert list_finished(tmp_path) == ["fold_0"]  # fold 1 of the first settings is not used
    monkeypatch.setattr(fitting, "load_classifier", None)
    back = fit(pairs, short, tmp_path, base)
    pd.testing.assert_frame_equal(back.oof, first.oof)
    assert "fold_1 is back from" in capsys.readouterr().out
    assert before.items() <= weights_of(tmp_path).items()


@pytest.mark.slow
def test_a_damaged_model_is_named_and_kept_apart(pairs, short, tiny_base, tmp_path):
    base = tiny_base("modernbert")
    first = fit(pairs, short, tmp_path, base)
    weights = tmp_path / "model" / "fold_0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"fold_0 is damaged .*model\.safetensors: expected"):
        again = fit(pairs, short, tmp_path, base)
    assert (tmp_path / "earlier" / "damaged" / "model" / "fold_0").exists()
    np.testing.assert_allclose(probs_of(again.oof), probs_of(first.oof), atol=1e-6)


def test_a_model_of_an_older_version_without_a_record_is_kept_apart(pairs, encoder, tmp_path):
    (tmp_path / "model" / "fold_3").mkdir(parents=True)
    (tmp_path / "model" / "fold_3" / "model.safetensors").write_text("weights")
    with pytest.warns(UserWarning, match=r"fold_3 is damaged \(no training\.json\)"):
        (member,) = prepare_members(pairs, encoder, tmp_path)
    assert member.name == "fold_0"
    assert [path.read_text() for path in tmp_path.rglob("*.safetensors")] == ["weights"]


CHANGES = [
    {},
    {"folds": (1,)},
    {"folds": (0, 1)},
    {"n_seeds": 2},
    {"refit": True},
    {"predict_tokens": 80},
    {"n_evals": 3},
    {"learning_rate": 2e-3},
    {"max_pairs": 20},
    {"seed": 5},
]


@pytest.mark.slow
def test_models_survive_a_hundred_random_changes_of_settings(
    pairs, short, tiny_base, tmp_path, monkeypatch
):
    """Every finished model stays somewhere, and the folder in use holds only what was asked for."""
    base, rng = tiny_base("modernbert"), np.random.default_rng(3)
    real = FoldTrainer.take_step

    def die_sometimes(self):
        if rng.random() < 0.05:
            raise Killed
        real(self)

    monkeypatch.setattr(FoldTrainer, "take_step", die_sometimes)
    monkeypatch.setattr(fitting, "release_memory", lambda: None)  # more than half of the time
    known = {}
    n_trained = 0
    for number in range(100):
        config = dataclasses.replace(short, tokens_per_step=4096)
        for change in rng.choice(CHANGES, 2):
            config = dataclasses.replace(config, **change)
        battles = pairs if rng.random() < 0.8 else pairs[:55].reset_index(drop=True)
        with contextlib.suppress(Killed):
            result = fit(battles, config, tmp_path, base)
            assert set(config.folds) <= set(result.config.folds)
            heldout = battles[battles["fold"].isin(result.config.folds)]
            assert sorted(result.oof["id"]) == sorted(heldout["id"])
            for name in list_finished(tmp_path):
                record = read_json(tmp_path / "model" / name / "training.json")["identity"]
                assert record["settings"]["learning_rate"] == config.learning_rate
                assert record["settings"]["max_pairs"] == config.max_pairs
                assert record["data"]["battles"] == hash_pairs(battles)
        found = weights_of(tmp_path)
        assert known.keys() <= found.keys(), f"a model was lost in round {number}: {config}"
        n_trained += len(found.keys() - known.keys())
        known = found
    assert n_trained > 15


# ---- battles and settings ----------------------------------------------------


@pytest.mark.slow
def test_max_pairs_limits_the_training_battles_only(pairs, short, tiny_base, tmp_path):
    config = dataclasses.replace(short, max_pairs=16)
    result = fit(pairs, config, tmp_path, tiny_base("modernbert"))
    assert result.n_train_pairs == 16
    assert len(result.oof) == (pairs["fold"] == 0).sum()


def test_a_fold_that_does_not_exist_is_named(pairs, encoder, tmp_path):
    with pytest.raises(ValueError, match=r"fold 9 .* got 0; .*\[0, 1, 2, 3, 4\]"):
        fit(pairs, dataclasses.replace(encoder, folds=(9,)), tmp_path)


def test_a_budget_beyond_what_the_model_can_read_is_refused(pairs, encoder, tiny_base, tmp_path):
    config = dataclasses.replace(encoder, max_tokens=100_000, tokens_per_batch=0)
    with pytest.raises(ValueError, match=r"max_tokens: .*8192.*100000.*MAX_TOKENS"):
        fit(pairs, config, tmp_path, tiny_base("modernbert"))


def soft_file(folder, pairs, probs):
    path = folder / "soft_labels.parquet"
    probs_table(pairs["id"], probs).to_parquet(path, index=False)
    return str(path)


def test_other_soft_labels_or_extra_battles_make_another_model(pairs, encoder, tmp_path):
    def identify(config):
        return prepare_members(pairs, config, tmp_path)[0].identity

    soft = soft_file(tmp_path, pairs, np.full((60, 3), 1 / 3))
    (tmp_path / "extra.csv").write_text("one")
    extra = (str(tmp_path / "extra.csv"),)
    plain = identify(encoder)
    config = dataclasses.replace(encoder, soft_labels=soft, extra_battles=extra)
    first = identify(config)
    assert "SOFT_LABELS was" in describe_difference(plain, first)
    soft_file(tmp_path, pairs, np.tile([0.5, 0.25, 0.25], (60, 1)))
    second = identify(config)
    (tmp_path / "extra.csv").write_text("two")
    third = identify(config)
    assert describe_difference(first, second) == describe_difference(second, third) == "other files"
    assert describe_difference(third, identify(config)) == ""


def test_a_setting_that_is_newer_than_a_model_had_its_default(pairs, encoder, tmp_path):
    (member,) = prepare_members(pairs, encoder, tmp_path)
    settings = dict(member.identity["settings"]) | {"removed_since": 1}
    settings["optimizer"] = "adamw"
    del settings["weight_decay"]
    old = {"settings": settings, "data": member.identity["data"]}
    assert describe_difference(old, member.identity) == ""


@pytest.mark.slow
def test_extra_battles_are_trained_on_and_never_held_out(
    demo_pairs, pairs, short, tiny_base, tmp_path
):
    extra = demo_pairs[60:100]
    texts = {name: [json.dumps(list(turns)) for turns in extra[name]] for name in TEXTS}
    extra[["id"]].assign(**texts).to_csv(tmp_path / "extra.csv", index=False)
    soft = soft_file(tmp_path, extra, np.full((40, 3), 1 / 3))
    files = (str(tmp_path / "extra.csv"),)
    config = dataclasses.replace(short, soft_labels=soft, extra_battles=files)
    result = fit(pairs, config, tmp_path / "run", tiny_base("modernbert"))
    is_heldout = pairs["fold"] == 0
    n_leaks = extra["group"].isin(pairs["group"][is_heldout]).sum()
    assert result.n_train_pairs == (~is_heldout).sum() + 40 - n_leaks
    assert sorted(result.oof["id"]) == sorted(pairs["id"][is_heldout])


# ---- a head on a frozen base -------------------------------------------------


@pytest.fixture
def frozen(encoder, monkeypatch):
    monkeypatch.setattr(frozen_heads, "PENALTIES", (10.0,))
    return dataclasses.replace(encoder, train="head", max_tokens=512, predict_tokens=96)


def test_heads_hold_out_every_fold_and_serve_what_they_predicted(
    pairs, frozen, tiny_base, tmp_path, read_batches
):
    result = fit(pairs, frozen, tmp_path, tiny_base("modernbert"))
    assert result.config.folds == (0, 1, 2, 3, 4) and result.config.refit
    assert sorted(result.oof["id"]) == sorted(pairs["id"])
    assert tuple(result.history) == HEAD_COLUMNS and result.tokens_per_second > 0
    assert sum(read_batches) == 2 * len(pairs)
    assert list_finished(tmp_path) == [*(f"fold_{fold}" for fold in range(5)), "refit"]
    for fold in (0, 3):
        folder = tmp_path / "model" / f"fold_{fold}"
        model, tokenizer = load_finetuned(folder, result.config, tiny_base("modernbert"))
        heldout = pairs[pairs["fold"] == fold]
        probs = predict_probs(model, tokenizer, heldout, max_tokens=96, tokens_per_batch=512)
        table = result.oof[result.oof["fold"] == fold].set_index("id").loc[heldout["id"]]
        np.testing.assert_allclose(probs, probs_of(table), atol=1e-4)


def test_a_finished_base_is_not_read_again_by_other_heads_seeds_or_after_a_kill(
    pairs, frozen, tiny_base, tmp_path, read_batches, monkeypatch
):
    base = tiny_base("modernbert")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        train = fitting.train_head

        def die_at_the_third(states, train_pairs, heldout, member):
            if member.name == "fold_2":
                raise Killed
            return train(states, train_pairs, heldout, member)

        patch.setattr(fitting, "train_head", die_at_the_third)
        fit(pairs, frozen, tmp_path, base)
    read_batches.clear()
    first = fit(pairs, frozen, tmp_path, base)
    few = dataclasses.replace(frozen, max_pairs=30)
    other = fit(pairs, few, tmp_path, base)
    held_out = first.oof[first.oof["fold"] == 0]
    assert not np.allclose(probs_of(held_out), probs_of(other.oof))
    assert len([*(tmp_path / "earlier").rglob("head.safetensors")]) == 6
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "train_head", None)  # what comes back is not trained again
        again = fit(pairs, frozen, tmp_path, base)
    pd.testing.assert_frame_equal(again.oof, first.oof)
    seeds = fit(pairs, dataclasses.replace(frozen, n_seeds=2), tmp_path, base)
    assert "fold_4_seed_1" in list_finished(tmp_path) and len(seeds.oof) == len(pairs)
    assert read_batches == []


def test_a_trial_of_a_head_reads_the_battles_of_its_models_alone(
    pairs, frozen, tiny_base, tmp_path, read_batches
):
    config = dataclasses.replace(frozen, folds=(1,), max_pairs=30, refit=False)
    result = fit(pairs, config, tmp_path, tiny_base("modernbert"))
    assert list_finished(tmp_path) == ["fold_1"] and result.n_train_pairs == 30
    assert sorted(result.oof["id"]) == sorted(pairs.loc[pairs["fold"] == 1, "id"])
    assert sum(read_batches) == 2 * (len(result.oof) + 30)


def test_a_head_reads_no_setting_of_steps_and_those_of_its_states(pairs, frozen, tmp_path):
    def identity(**changes):
        config = dataclasses.replace(frozen, **changes)
        return prepare_members(pairs, config, tmp_path)[0].identity

    for same in (
        {"learning_rate": 1.0},
        {"max_tokens": 100},
        {"soft_temperature": 2.0},
        {"head": "contrast"},
        {"n_epochs": 9},
    ):
        assert identity(**same) == identity(), same
    for other in ({"predict_tokens": 80}, {"state_layers": (1.0,)}, {"seed": 1}):
        assert identity(**other) != identity(), other


def test_a_head_and_a_network_take_turns_in_a_run_folder(
    pairs, frozen, short, tiny_base, tmp_path, read_batches
):
    base = tiny_base("modernbert")
    first = fit(pairs, frozen, tmp_path, base)
    fit(pairs, short, tmp_path, base)
    assert list_finished(tmp_path) == ["fold_0"]
    read_batches.clear()
    pd.testing.assert_frame_equal(fit(pairs, frozen, tmp_path, base).oof, first.oof)
    assert read_batches == []
