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
from transformers import TrainerCallback

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.checkpoints import load_finetuned, load_tokenizer
from src.utils.models.predict import predict_probs
from src.utils.runs import find_damage, read_json
from src.utils.schema import TEXTS, probs_of, probs_table
from src.utils.stats.scores import log_loss
from src.utils.training import data, trainer
from src.utils.training import fit as fitting
from src.utils.training.fit import HISTORY_COLUMNS, fit

ENCODER = FinetuneConfig(
    checkpoint="tiny:modernbert",
    revision="",
    max_tokens=96,
    predict_tokens=96,
    tokens_per_batch=512,
    batches_per_step=2,
    n_epochs=2.0,
    both_orders=False,
    learning_rate=1e-3,
    n_evals=2,
)
DECODER = DecoderConfig(
    checkpoint="tiny:qwen3",
    revision="",
    quantization="4bit",
    lora_rank=8,
    lora_alpha=8.0,
    max_tokens=160,
    predict_tokens=160,
    tokens_per_batch=640,
    batches_per_step=2,
    n_epochs=1.0,
    both_orders=False,
    learning_rate=5e-3,
    n_evals=2,
)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def kill_at(monkeypatch, step):
    """Make every fold's training raise at a step, as a killed run stops."""
    real = fitting.FoldTrainer.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(KillAt(step))

    monkeypatch.setattr(fitting.FoldTrainer, "__init__", init)


def check_same_weights(one, two, fold="fold_0"):
    (weights,) = (one / "model" / fold).glob("*.safetensors")
    before, after = load_file(weights), load_file(two / "model" / fold / weights.name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- whole runs ---------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(_demo_pairs, tiny_base, tmp_path_factory):
    """One finished run of two folds of the tiny encoder, with the learning rate of every step."""
    run_dir = tmp_path_factory.mktemp("fitted")
    pairs = _demo_pairs[:80].reset_index(drop=True)
    rates = []
    real = fitting.FoldTrainer.training_step

    def step(self, *args, **kwargs):
        rates.append((self.fold, self.state.global_step, self.optimizer.param_groups[0]["lr"]))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.FoldTrainer, "training_step", step)
        result = fit(
            pairs, dataclasses.replace(ENCODER, folds=(0, 1)), run_dir, tiny_base("modernbert")
        )
    return pairs, result, run_dir, pd.DataFrame(rates, columns=["fold", "step", "rate"])


@pytest.mark.slow
def test_every_held_out_battle_is_predicted_once(fitted):
    pairs, result, _, _ = fitted
    heldout = pairs[pairs["fold"].isin([0, 1])]
    assert sorted(result.oof["id"]) == sorted(heldout["id"])
    assert result.oof.set_index("id")["fold"].to_dict() == heldout.set_index("id")["fold"].to_dict()
    probs_of(result.oof)


@pytest.mark.slow
def test_the_best_weights_are_kept_and_give_the_oof_again(fitted):
    pairs, result, run_dir, _ = fitted
    for fold in (0, 1):
        model, tokenizer = load_finetuned(run_dir / "model" / f"fold_{fold}", ENCODER)
        heldout = pairs[pairs["fold"] == fold]
        probs = predict_probs(model, tokenizer, heldout, max_tokens=96, tokens_per_batch=512)
        oof = probs_of(result.oof[result.oof["fold"] == fold])
        np.testing.assert_allclose(probs, oof, atol=1e-6)
        losses = result.history.loc[result.history["fold"] == fold, "log_loss"]
        assert log_loss(probs, heldout["label"].to_numpy()) == pytest.approx(losses.min(), abs=1e-6)


@pytest.mark.slow
def test_warmup_and_cosine_are_really_applied(fitted):
    _, _, _, rates = fitted
    rate = rates[rates["fold"] == 0].groupby("step")["rate"].first().to_numpy()
    n_steps = len(rate)
    n_warm = int(np.ceil(0.1 * n_steps))
    steps = np.arange(n_steps)
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - n_warm) / (n_steps - n_warm)))
    np.testing.assert_allclose(
        rate, 1e-3 * np.where(steps < n_warm, steps / n_warm, cosine), atol=1e-9
    )


@pytest.mark.slow
def test_history_has_a_row_a_validation(fitted):
    _, result, run_dir, _ = fitted
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
    pairs, result, run_dir, _ = fitted
    monkeypatch.setattr(fitting, "load_classifier", None)
    again = fit(pairs, dataclasses.replace(ENCODER, folds=(0, 1)), run_dir, tiny_base("modernbert"))
    pd.testing.assert_frame_equal(again.oof, result.oof)
    pd.testing.assert_frame_equal(again.history, result.history)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "kind"), [(ENCODER, "modernbert"), (DECODER, "qwen3")])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    config, kind, demo_pairs, tiny_base, tmp_path, monkeypatch
):
    pairs = demo_pairs[:60].reset_index(drop=True)
    unbroken = fit(pairs, config, tmp_path / "unbroken", tiny_base(kind))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, int(unbroken.history["step"].iloc[-1]) - 1)
        fit(pairs, config, tmp_path / "killed", tiny_base(kind))
    checkpoints = tmp_path / "killed" / "checkpoints" / "fold_0"
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    # A second kill, in the middle of writing the next checkpoint.
    shutil.copytree(
        newest, checkpoints / "checkpoint-999999", ignore=shutil.ignore_patterns("manifest.json")
    )
    first_steps = []
    real = fitting.FoldTrainer.training_step

    def step(self, *args, **kwargs):
        first_steps.append(self.state.global_step)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(fitting.FoldTrainer, "training_step", step)
    with pytest.warns(
        UserWarning, match=r"checkpoint-999999 is damaged and will not be used: manifest\.json"
    ):
        resumed = fit(pairs, config, tmp_path / "killed", tiny_base(kind))
    assert first_steps[0] == int(newest.name.split("-")[1]) > 0
    check_same_weights(tmp_path / "unbroken", tmp_path / "killed")
    pd.testing.assert_frame_equal(resumed.oof, unbroken.oof)
    losses = ["step", "train_loss", "log_loss", "learning_rate"]
    pd.testing.assert_frame_equal(resumed.history[losses], unbroken.history[losses])


KILLED_FOR_REAL = """
import os, pickle, signal, sys
from pathlib import Path
from src.utils.training import data, trainer
from src.utils.training import fit as fitting
from src.utils.runs import find_damage, read_json

place, run_dir, base = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
pairs, config = pickle.loads(Path(sys.argv[4]).read_bytes())
real = getattr(fitting.FoldTrainer, place)

def die_late(self, *args, **kwargs):
    if self.state.global_step > self.n_steps // 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

setattr(fitting.FoldTrainer, place, die_late)
fitting.fit(pairs, config, run_dir, base)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is damaged and will not be used")
def test_a_run_killed_by_the_system_in_a_step_and_in_a_save_ends_with_the_same_weights(
    demo_pairs, tiny_base, tmp_path
):
    pairs, base = demo_pairs[:60].reset_index(drop=True), tiny_base("modernbert")
    config = dataclasses.replace(ENCODER, n_evals=4, n_epochs=1.0)
    (tmp_path / "what.pkl").write_bytes(pickle.dumps((pairs, config)))
    for place in ("training_step", "_save_rng_state"):
        command = [
            sys.executable,
            "-c",
            KILLED_FOR_REAL,
            place,
            tmp_path / "killed",
            base,
            tmp_path / "what.pkl",
        ]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    folders = sorted((tmp_path / "killed" / "checkpoints" / "fold_0").glob("checkpoint-*"))
    assert [find_damage(folder) is None for folder in folders].count(False) == 1 < len(folders)
    resumed = fit(pairs, config, tmp_path / "killed", base)
    unbroken = fit(pairs, config, tmp_path / "unbroken", base)
    check_same_weights(tmp_path / "unbroken", tmp_path / "killed")
    pd.testing.assert_frame_equal(resumed.oof, unbroken.oof)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(begun, tmp_path, name, damage):
    folder = shutil.copytree(begun, tmp_path / "fold_0")
    before, newest = sorted(folder.glob("checkpoint-*"), key=fitting._step_of)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content if damage == "flipped" else content[:-1])
    said = rf"{newest.name} is damaged and will not be used: {name}: expected {len(content)} bytes .* found \d+ bytes"
    with pytest.warns(UserWarning, match=said):
        assert fitting._last_whole_checkpoint(folder) == before
    assert not newest.exists()


@pytest.fixture(scope="module")
def begun(_demo_pairs, tiny_base, tmp_path_factory):
    """The checkpoints of a run that was killed after its third."""
    run_dir = tmp_path_factory.mktemp("begun")
    config = dataclasses.replace(ENCODER, n_epochs=1.0, n_evals=8)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        fit(_demo_pairs[:60].reset_index(drop=True), config, run_dir, tiny_base("modernbert"))
    return run_dir / "checkpoints" / "fold_0"


@pytest.mark.slow
def test_a_run_that_packed_its_batches_does_not_go_on_with_padded_ones(
    begun, demo_pairs, tiny_base, tmp_path, monkeypatch
):
    config = dataclasses.replace(ENCODER, n_epochs=1.0, n_evals=8)
    shutil.copytree(begun, tmp_path / "checkpoints" / "fold_0")
    monkeypatch.setattr(
        "src.utils.training.trainer.can_pack", lambda model: False
    )  # as under an older transformers
    with pytest.raises(
        ValueError, match=r"packed=True, got .* packed=False; go on with the former, or remove"
    ):
        fit(demo_pairs[:60].reset_index(drop=True), config, tmp_path, tiny_base("modernbert"))
    assert list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_removed(demo_pairs, tiny_base, tmp_path, monkeypatch):
    pairs = demo_pairs[:40].reset_index(drop=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        fit(pairs, dataclasses.replace(ENCODER, n_evals=4), tmp_path, tiny_base("modernbert"))
    assert list(tmp_path.rglob("checkpoint-*"))
    result = fit(
        pairs,
        dataclasses.replace(ENCODER, n_epochs=0.5, n_evals=1),
        tmp_path,
        tiny_base("modernbert"),
    )
    assert result.history["step"].tolist() == [result.history["step"].iloc[-1]]
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "kind"), [(ENCODER, "modernbert"), (DECODER, "qwen3")])
def test_four_pairs_can_be_overfitted(config, kind, demo_pairs, tiny_base, tmp_path):
    pairs = demo_pairs[:8].assign(fold=[0, 0, 0, 0, 1, 1, 1, 1]).reset_index(drop=True)
    pairs["label"] = [0, 1, 2, 0] * 2
    config = dataclasses.replace(
        config, n_epochs=40.0, n_evals=1, weight_decay=0.0, batches_per_step=1
    )
    config = dataclasses.replace(config, learning_rate=2e-3 if kind == "modernbert" else 1e-2)
    history = fit(pairs, config, tmp_path, tiny_base(kind)).history
    assert history["train_loss"].iloc[0] > 0.3
    assert history["train_loss"].iloc[-1] < 0.05


@pytest.mark.slow
def test_max_pairs_limits_the_training_battles_alone(demo_pairs, tiny_base, tmp_path):
    pairs = demo_pairs[:60].reset_index(drop=True)
    config = dataclasses.replace(ENCODER, max_pairs=16, n_epochs=1.0, n_evals=1)
    result = fit(pairs, config, tmp_path, tiny_base("modernbert"))
    assert result.n_train_pairs == 16
    assert len(result.oof) == (pairs["fold"] == 0).sum()


# ---- several models ------------------------------------------------------------


@pytest.fixture(scope="module")
def many(_demo_pairs, tiny_base, tmp_path_factory):
    """A run of two folds with two seeds and the refit, and the learning rates of the refit."""
    run_dir = tmp_path_factory.mktemp("many")
    pairs = _demo_pairs[:60].reset_index(drop=True)
    config = dataclasses.replace(
        ENCODER, n_epochs=1.0, n_evals=3, folds=(0, 1), n_seeds=2, refit=True
    )
    rates = {}
    real = fitting.FoldTrainer.training_step

    def step(self, *args, **kwargs):
        if self.fold is None:
            rates[self.state.global_step] = self.optimizer.param_groups[0]["lr"]
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.FoldTrainer, "training_step", step)
        result = fit(pairs, config, run_dir, tiny_base("modernbert"))
    return pairs, config, run_dir, result, list(rates.values())


NAMES = ["fold_0", "fold_0_seed_1", "fold_1", "fold_1_seed_1"]


@pytest.mark.slow
def test_seeds_are_models_of_their_own_whose_probabilities_are_averaged(many):
    pairs, config, run_dir, result, _ = many
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == [*NAMES, "refit"]
    each = [probs_of(pd.read_parquet(run_dir / "model" / name / "oof.parquet")) for name in NAMES]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(
        probs_of(result.oof),
        np.concatenate([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2]),
        atol=1e-7,
    )
    assert sorted(result.oof["id"]) == sorted(pairs.loc[pairs["fold"].isin([0, 1]), "id"])
    rows = result.history.groupby(["fold", "seed"]).size()
    assert rows.to_dict() == {(fold, config.seed + place): 3 for fold in (0, 1) for place in (0, 1)}


@pytest.mark.slow
def test_a_model_more_leaves_the_others_as_they_are(many, monkeypatch, tiny_base):
    pairs, config, run_dir, result, _ = many
    monkeypatch.setattr(fitting, "load_classifier", None)
    again = fit(pairs, config, run_dir, tiny_base("modernbert"))
    pd.testing.assert_frame_equal(again.oof, result.oof)
    members, (refit,) = fitting._plan_members(
        pairs, dataclasses.replace(config, n_seeds=3, folds=(1,))
    )
    before, (refit_before,) = fitting._plan_members(pairs, config)
    keys = {member.name: member.key for member in before}
    assert [keys.get(member.name) == member.key for member in members] == [True, True, False]
    assert refit.key != refit_before.key  # it would stop elsewhere
    assert not fitting._plan_members(pairs, ENCODER)[1]


@pytest.mark.slow
def test_the_refit_learns_from_every_battle_and_stops_where_the_folds_were_best_on_average(many):
    pairs, config, run_dir, result, rates = many
    done = {
        name: read_json(run_dir / "checkpoints" / name / "done.json") for name in [*NAMES, "refit"]
    }
    last = result.history.groupby(["fold", "seed"])["step"].max()
    best = result.history.loc[result.history.groupby(["fold", "seed"])["log_loss"].idxmin()]
    share = np.mean(best["step"].to_numpy() / last.to_numpy())
    assert done["refit"]["n_train_pairs"] == len(pairs) > done["fold_0"]["n_train_pairs"]
    n_steps = round(done["refit"]["n_steps"] / share)
    assert done["refit"]["n_steps"] == len(rates) == round(share * n_steps)
    # The cosine is that of the whole run, so that the rate is still well above zero at the end of a short one.
    n_warm = int(np.ceil(0.1 * n_steps))
    steps = np.arange(len(rates))
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - n_warm) / (n_steps - n_warm)))
    np.testing.assert_allclose(
        rates, 1e-3 * np.where(steps < n_warm, steps / n_warm, cosine), atol=1e-4
    )
    model, tokenizer = load_finetuned(run_dir / "model" / "refit", config)
    assert np.isfinite(
        predict_probs(model, tokenizer, pairs[:4], max_tokens=96, tokens_per_batch=512)
    ).all()
    assert not (run_dir / "model" / "refit" / "oof.parquet").exists()


# ---- patience ------------------------------------------------------------------


@pytest.mark.slow
def test_training_stops_when_it_grows_no_better_and_counts_what_was_read(
    demo_pairs, tiny_base, tmp_path, monkeypatch
):
    pairs = demo_pairs[:60].reset_index(drop=True)
    config = dataclasses.replace(ENCODER, n_epochs=1.0, n_evals=5, patience=2)
    losses = iter([np.nan, 1.0, 0.9, 0.95, 0.92, 0.8])  # the first is that of the class shares
    monkeypatch.setattr(trainer, "log_loss", lambda probs, labels: next(losses))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fitting, "_finish", lambda folder, done: (_ for _ in ()).throw(Killed))
        fit(pairs, config, tmp_path, tiny_base("modernbert"))
    # Killed between the last checkpoint and done.json: nothing more is trained.
    losses = iter([np.nan])
    monkeypatch.setattr(fitting.FoldTrainer, "train", None)
    result = fit(pairs, config, tmp_path, tiny_base("modernbert"))
    assert result.history["log_loss"].tolist() == [1.0, 0.9, 0.95, 0.92]
    done = read_json(tmp_path / "checkpoints" / "fold_0" / "done.json")
    share = result.history["epoch"].iloc[-1]
    assert 0.7 < share < 0.9 and done["n_steps"] == result.history["step"].iloc[-1]
    tokenizer = load_tokenizer(tmp_path / "model" / "fold_0")
    lengths = data.Examples(pairs[pairs["fold"] != 0], tokenizer, config).lengths
    plan = data.plan_batches(lengths, config, is_packed=True)
    read = np.concatenate(plan[: config.batches_per_step * done["n_steps"]]) // 2
    assert done["n_tok"] == lengths[read].sum() < lengths.sum()


def test_a_fold_that_does_not_exist_is_named(demo_pairs, tmp_path):
    with pytest.raises(ValueError, match="expected fold 9 to hold some"):
        fit(demo_pairs, dataclasses.replace(ENCODER, folds=(9,)), tmp_path)


def test_a_budget_that_the_model_can_not_read_is_refused(demo_pairs, tiny_base, tmp_path):
    config = dataclasses.replace(ENCODER, max_tokens=100_000, tokens_per_batch=100_000)
    with pytest.raises(ValueError, match="max_tokens: expected at most 8192"):
        fit(demo_pairs, config, tmp_path, tiny_base("modernbert"))


def test_models_that_do_not_belong_to_the_run_are_removed(demo_pairs, tmp_path):
    key = fitting._make_key(demo_pairs, ENCODER)
    for fold, saved in ((0, key), (1, key), (2, "another")):
        for kind in ("model", "checkpoints"):
            (tmp_path / kind / f"fold_{fold}").mkdir(parents=True)
        fitting.write_json(tmp_path / "checkpoints" / f"fold_{fold}" / "key.json", saved)
    (tmp_path / "model" / "fold_7").mkdir()
    fitting._remove_stale(tmp_path, {"fold_0": key, "fold_2": key})
    for kind in ("model", "checkpoints"):
        assert [path.name for path in (tmp_path / kind).iterdir()] == ["fold_0"]


def soft_file(folder, pairs, probs):
    path = folder / "soft_labels.parquet"
    probs_table(pairs["id"], probs).to_parquet(path, index=False)
    return path


def test_other_soft_labels_are_another_run(demo_pairs, tmp_path):
    config = FinetuneConfig(
        soft_labels=str(soft_file(tmp_path, demo_pairs, np.full((300, 3), 1 / 3)))
    )
    before = fitting._make_key(demo_pairs, config)
    soft_file(tmp_path, demo_pairs, np.tile([0.5, 0.25, 0.25], (300, 1)))
    assert fitting._make_key(demo_pairs, config) != before


def test_other_extra_battles_are_another_run(demo_pairs, tmp_path):
    config = FinetuneConfig(extra_battles=(str(tmp_path / "extra.csv"),))
    keys = set()
    for content in ("one", "two"):
        (tmp_path / "extra.csv").write_text(content)
        keys.add(fitting._make_key(demo_pairs, config))
    assert len(keys) == 2


@pytest.mark.slow
def test_extra_battles_are_trained_on_and_never_held_out(demo_pairs, tiny_base, tmp_path):
    pairs, extra = demo_pairs[:60].reset_index(drop=True), demo_pairs[60:100]
    table = extra[["id"]].assign(
        **{name: [json.dumps(list(turns)) for turns in extra[name]] for name in TEXTS}
    )
    table.to_csv(tmp_path / "extra.csv", index=False)
    soft = soft_file(tmp_path, extra, np.full((40, 3), 1 / 3))
    config = dataclasses.replace(ENCODER, n_epochs=1.0, n_evals=1, soft_labels=str(soft))
    config = dataclasses.replace(config, extra_battles=(str(tmp_path / "extra.csv"),))
    result = fit(pairs, config, tmp_path / "run", tiny_base("modernbert"))
    is_heldout = pairs["fold"] == 0
    n_leaks = extra["group"].isin(pairs["group"][is_heldout]).sum()
    assert result.n_train_pairs == (~is_heldout).sum() + 40 - n_leaks
    assert sorted(result.oof["id"]) == sorted(pairs["id"][is_heldout])
