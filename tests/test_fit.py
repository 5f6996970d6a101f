import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src.utils.models.checkpoints import load_finetuned
from src.utils.models.predict import predict_probs
from src.utils.runs import find_damage, read_json, write_json
from src.utils.schema import TEXTS, probs_of, probs_table
from src.utils.stats.scores import log_loss
from src.utils.training import fit as fitting
from src.utils.training import trainer
from src.utils.training.data import Examples, plan_batches
from src.utils.training.fit import find_checkpoint, fit, plan_members
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


def check_same_weights(one, two):
    (weights,) = (one / "model" / "fold_0").glob("*.safetensors")
    before, after = load_file(weights), load_file(two / "model" / "fold_0" / weights.name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


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
def test_the_best_weights_are_kept_and_give_the_same_held_out_probabilities(fitted):
    pairs, config, result, run_dir, _ = fitted
    for fold in (0, 1):
        model, tokenizer = load_finetuned(run_dir / "model" / f"fold_{fold}", config)
        heldout = pairs[pairs["fold"] == fold]
        probs = predict_probs(model, tokenizer, heldout, max_tokens=96, tokens_per_batch=512)
        oof = probs_of(result.oof[result.oof["fold"] == fold])
        np.testing.assert_allclose(probs, oof, atol=1e-6)
        losses = result.history.loc[result.history["fold"] == fold, "log_loss"]
        assert log_loss(probs, heldout["label"].to_numpy()) == pytest.approx(losses.min(), abs=1e-6)


@pytest.mark.slow
def test_warmup_and_cosine_are_really_applied(fitted):
    rates = [rate for name, _, rate in fitted[-1] if name == "fold_0"]
    np.testing.assert_allclose(rates, cosine_with_warmup(1e-3, len(rates)), atol=1e-9)


@pytest.mark.slow
def test_the_history_has_a_row_per_validation(fitted):
    _, _, result, run_dir, _ = fitted
    history = result.history
    assert tuple(history.columns) == HISTORY_COLUMNS
    assert history.groupby("fold").size().to_dict() == {0: 4, 1: 4}
    assert history["epoch"].max() == 2
    assert history[["train_loss", "log_loss"]].to_numpy().min() > 0
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
    changes = {"n_epochs": 40.0, "n_evals": 1, "weight_decay": 0.0, "batches_per_step": 1}
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
from src.utils.training.data import Examples, plan_batches
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
    with pytest.raises(ValueError, match=r"'packed': True.*'packed': False"):
        fit(pairs, begun[1], tmp_path, tiny_base("modernbert"))
    assert list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_removed(begun, pairs, short, tiny_base, tmp_path):
    shutil.copytree(begun[0], tmp_path / "checkpoints" / "fold_0")
    result = fit(pairs, short, tmp_path, tiny_base("modernbert"))
    assert len(result.history) == 1
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_training_stops_when_validations_get_no_better_and_counts_what_was_read(
    pairs, encoder, tiny_base, tmp_path, monkeypatch
):
    config = dataclasses.replace(encoder, n_epochs=1.0, n_evals=5, patience=2)
    losses = iter([1.0, 0.9, 0.95, 0.92, 0.8])
    monkeypatch.setattr(trainer, "log_loss", lambda probs, labels: next(losses))
    real = FoldTrainer.train

    def train_and_die(*args):
        real(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FoldTrainer, "train", train_and_die)
        fit(pairs, config, tmp_path, tiny_base("modernbert"))
    # Killed after the last checkpoint, before the run was noted as finished: nothing is trained.
    monkeypatch.setattr(FoldTrainer, "take_step", None)
    result = fit(pairs, config, tmp_path, tiny_base("modernbert"))
    assert result.history["log_loss"].tolist() == [1.0, 0.9, 0.95, 0.92]
    assert 0.7 < result.history["epoch"].iloc[-1] < 0.9
    done = read_json(tmp_path / "checkpoints" / "fold_0" / "done.json")
    _, tokenizer = load_finetuned(tmp_path / "model" / "fold_0", config)
    lengths = Examples(pairs[pairs["fold"] != 0], tokenizer, config).lengths
    plan = plan_batches(lengths, config, is_packed=True)
    read = np.concatenate(plan[: config.batches_per_step * done["history"][-1]["step"]]) // 2
    n_tok = result.tokens_per_second * result.seconds
    assert lengths[read].sum() == pytest.approx(n_tok) and n_tok < lengths.sum()


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
    rows = result.history.groupby(["fold", "seed"]).size()
    seeds = (config.seed, config.seed + 1)
    assert rows.to_dict() == {(fold, seed): 3 for fold in (0, 1) for seed in seeds}


@pytest.mark.slow
def test_one_more_model_leaves_the_others_as_they_are(many, monkeypatch, tiny_base):
    pairs, config, run_dir, result, _ = many
    monkeypatch.setattr(fitting, "load_classifier", None)
    again = fit(pairs, config, run_dir, tiny_base("modernbert"))
    pd.testing.assert_frame_equal(again.oof, result.oof)
    before = {member.name: member.key for member in plan_members(pairs, config)}
    more = dataclasses.replace(config, n_seeds=3, folds=(1,))
    after = {member.name: member.key for member in plan_members(pairs, more)}
    assert after.keys() - before.keys() == {"fold_1_seed_2"}
    kept = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    assert kept == {"fold_1", "fold_1_seed_1"}  # the refit would stop elsewhere


@pytest.mark.slow
def test_the_refit_learns_from_every_battle_and_stops_where_the_folds_were_best_on_average(many):
    pairs, config, run_dir, result, steps = many
    done = {
        name: read_json(run_dir / "checkpoints" / name / "done.json")
        for name in ("fold_0", "refit")
    }
    assert done["refit"]["n_train_pairs"] == len(pairs) > done["fold_0"]["n_train_pairs"]
    best = result.history.loc[result.history.groupby(["fold", "seed"])["log_loss"].idxmin()]
    share = best["epoch"].mean()  # of one epoch
    rates = [rate for name, _, rate in steps if name == "refit"]
    n_steps = round(len(rates) / done["refit"]["history"][-1]["epoch"])
    assert len(rates) == round(share * n_steps)
    # The cosine is that of all steps, so that the rate is well above zero where the refit stops.
    np.testing.assert_allclose(rates, cosine_with_warmup(1e-3, n_steps)[: len(rates)], atol=1e-9)
    model, tokenizer = load_finetuned(run_dir / "model" / "refit", config)
    probs = predict_probs(model, tokenizer, pairs[:4], max_tokens=96, tokens_per_batch=512)
    assert np.isfinite(probs).all()
    assert not (run_dir / "model" / "refit" / "oof.parquet").exists()


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
    config = dataclasses.replace(encoder, max_tokens=100_000, tokens_per_batch=100_000)
    with pytest.raises(ValueError, match=r"max_tokens: .*8192.*100000.*MAX_TOKENS"):
        fit(pairs, config, tmp_path, tiny_base("modernbert"))


def test_models_that_do_not_belong_to_the_run_are_removed(pairs, encoder, tmp_path, monkeypatch):
    (member,) = plan_members(pairs, encoder)
    for name, key in (("fold_0", member.key), ("fold_1", member.key), ("fold_2", "another")):
        (tmp_path / "model" / name).mkdir(parents=True)
        write_json(tmp_path / "checkpoints" / name / "key.json", key)
    (tmp_path / "model" / "fold_7").mkdir()
    monkeypatch.setattr(fitting, "load_classifier", None)
    with pytest.raises(TypeError):  # where the fold that is left would be trained
        fit(pairs, encoder, tmp_path)
    for kind in ("model", "checkpoints"):
        assert [path.name for path in (tmp_path / kind).iterdir()] == ["fold_0"]


def soft_file(folder, pairs, probs):
    path = folder / "soft_labels.parquet"
    probs_table(pairs["id"], probs).to_parquet(path, index=False)
    return str(path)


def test_other_soft_labels_or_extra_battles_make_another_model(pairs, encoder, tmp_path):
    soft = soft_file(tmp_path, pairs, np.full((60, 3), 1 / 3))
    (tmp_path / "extra.csv").write_text("one")
    extra = (str(tmp_path / "extra.csv"),)
    keys = {plan_members(pairs, encoder)[0].key}
    config = dataclasses.replace(encoder, soft_labels=soft, extra_battles=extra)
    keys.add(plan_members(pairs, config)[0].key)
    soft_file(tmp_path, pairs, np.tile([0.5, 0.25, 0.25], (60, 1)))
    keys.add(plan_members(pairs, config)[0].key)
    (tmp_path / "extra.csv").write_text("two")
    keys.add(plan_members(pairs, config)[0].key)
    assert len(keys) == 4


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
