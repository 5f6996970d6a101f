import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from src.utils.models.checkpoints import load_classifier
from src.utils.models.predict import predict_probs
from src.utils.runs import read_json
from src.utils.schema import swap_pairs
from src.utils.stats.scores import swap_gap
from src.utils.training import heldout
from src.utils.training.heldout import Member
from src.utils.training.trainer import (
    HISTORY_COLUMNS,
    FoldTrainer,
    list_checkpoints,
    make_optimizer,
)


def flat(weights):
    return torch.cat([weight.detach().flatten() for weight in weights])


def test_matrices_decay_norms_and_biases_do_not(make_trainer):
    trainer = make_trainer(weight_decay=0.1)
    groups = make_optimizer(trainer.model, trainer.config).param_groups
    decay_of = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert len(decay_of) == len(list(trainer.model.parameters()))
    model = trainer.model.model
    assert decay_of[id(trainer.model.classifier.weight)] == 0.1
    assert decay_of[id(trainer.model.classifier.bias)] == 0
    assert decay_of[id(model.layers[0].attn.Wo.weight)] == 0.1
    assert decay_of[id(model.embeddings.tok_embeddings.weight)] == 0.1
    assert (
        decay_of[id(model.final_norm.weight)] == decay_of[id(model.layers[1].mlp_norm.weight)] == 0
    )


# ---- logs --------------------------------------------------------------------


def test_tensorboard_shows_the_history_without_what_a_killed_run_logged_too_late(
    make_trainer, tmp_path
):
    def curve(name):
        (folder,) = (tmp_path / "tensorboard" / "fold_0").iterdir()
        assert "stand-in" in folder.name
        events = EventAccumulator(str(folder))
        events.Reload()
        return [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)]

    trainer = make_trainer(n_epochs=1.0, n_evals=3)
    trainer.train()
    scored = [row for row in trainer.history if "log_loss" in row]
    assert len(scored) == 3 and set(HISTORY_COLUMNS) - {"reserved_mib"} <= scored[0].keys()
    assert len(trainer.history) > 3
    shown = {"loss/held_out": "log_loss", "accuracy/held_out": "accuracy"}
    for tag, name in shown.items():
        assert curve(tag) == [(row["step"], row[name]) for row in scored]
    for tag, name in {"loss/train": "train_loss", "accuracy/train": "train_accuracy"}.items():
        assert curve(tag) == [(row["step"], row[name]) for row in trainer.history]
    resumed = make_trainer(n_epochs=1.0, n_evals=3)
    resumed.train(list_checkpoints(tmp_path / "checkpoints" / "fold_0")[-1])
    assert curve("loss/train") == [(row["step"], row["train_loss"]) for row in resumed.history]


def test_the_swap_gap_compares_the_readings_in_both_orders(make_trainer, tmp_path):
    trainer = make_trainer(n_epochs=1.0, n_evals=1)
    trainer.train()
    options = {"max_tokens": 96, "tokens_per_batch": 512, "swap": False}
    given = predict_probs(trainer.model, trainer.tokenizer, trainer.heldout, **options)
    swapped = predict_probs(
        trainer.model, trainer.tokenizer, swap_pairs(trainer.heldout), **options
    )
    record = read_json(tmp_path / "model" / "fold_0" / "training.json")
    assert record["swap_gap"] == pytest.approx(swap_gap(given, swapped), abs=1e-6)
    assert given.std() > 0 and trainer.history[0]["peak_mib"] > 50


# ---- steps -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_epochs", "n_evals", "expected"), [(1.0, 4, [0.25, 0.5, 0.75, 1]), (0.5, 1, [1])]
)
def test_validations_are_spread_evenly_and_the_whole_fold_comes_after_the_last_step(
    make_trainer, n_epochs, n_evals, expected
):
    trainer = make_trainer(n_epochs=n_epochs, n_evals=n_evals, tokens_per_step=512)
    n_steps = len(trainer.steps)
    assert n_steps > 4 and trainer.schedule.last_step == n_steps
    planned = [round(share * n_steps) for share in expected]
    assert sorted(trainer.validation_steps) == planned[:-1]
    trainer.train()
    assert [row["step"] for row in trainer.history if "log_loss" in row] == planned
    few = make_trainer(n_epochs=1.0, n_evals=100, tokens_per_step=5120)
    assert few.validation_steps == set(range(1, len(few.steps)))


def test_a_validation_reads_a_fixed_sample_in_one_order_and_the_end_the_whole_fold_in_both(
    make_trainer, monkeypatch
):
    read = []
    real = heldout.predict_pairs

    def note(reader, tokenizer, pairs, **options):
        prediction = real(reader, tokenizer, pairs, **options)
        read.append((pairs["id"].tolist(), set(prediction.n_readings.tolist())))
        return prediction

    monkeypatch.setattr(heldout, "predict_pairs", note)
    trainer = make_trainer(n_epochs=1.0, n_evals=3, eval_pairs=5)
    trainer.train()
    sample = trainer.sample["id"].tolist()
    assert 5 <= len(sample) < len(trainer.heldout)
    assert read == [(sample, {1}), (sample, {1}), (trainer.heldout["id"].tolist(), {2})]
    groups = trainer.sample["group"]
    assert trainer.heldout["group"].isin(groups).sum() == len(sample)  # whole prompts
    losses = [row["log_loss"] for row in trainer.history if "log_loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_does_not_depend_on_how_rows_fall_into_batches(
    packing, demo_pairs, make_trainer, monkeypatch
):
    monkeypatch.setattr("src.utils.training.trainer.MAX_GRAD_NORM", float("inf"))
    pairs = demo_pairs[:6].assign(fold=[0, 1, 1, 1, 1, 1])

    def gradient(tokens_per_batch):
        options = {"tokens_per_batch": tokens_per_batch, "tokens_per_step": 96 * 5}
        options |= {"packing": packing, "n_epochs": 1.0, "warmup_share": 0.0, "learning_rate": 1.0}
        trainer = make_trainer(pairs, **options)
        trainer.optimizer = torch.optim.SGD(trainer.weights)
        before = flat(trainer.weights)
        n_passes = len(trainer._split(trainer.steps[0]))
        trainer.take_step()
        assert trainer.step == trainer.schedule.last_step == 1
        return n_passes, before - flat(trainer.weights)

    n_one, expected = gradient(96 * 5)
    n_several, found = gradient(96 * 2)
    assert n_one == 1 and n_several > 2 and expected.norm() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_packed_where_the_settings_ask_for_it(packing, make_trainer):
    trainer = make_trainer(packing=packing, n_epochs=1.0, n_evals=1)
    seen = []
    note = lambda module, args, inputs: seen.append((module.training, set(inputs)))  # noqa: E731
    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert {is_training for is_training, _ in seen} == {True, False}
    for _, names in seen:
        assert ("cu_seq_lens" in names) is packing and ("attention_mask" in names) is not packing
    rows = trainer.history
    n_tok, n_padded = (sum(row[name] for row in rows) for name in ("n_tok", "n_padded"))
    assert (n_padded == n_tok) is all(row["padding_share"] == 0 for row in rows) is packing


@pytest.fixture
def trainer_in_bf16(make_trainer, demo_pairs, monkeypatch):
    monkeypatch.setattr("src.utils.models.hardware.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("src.utils.models.hardware.MIN_BF16_HIDDEN_SIZE", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pairs = demo_pairs[:8].assign(fold=[0, 0] + [1] * 6)
    return make_trainer(pairs, n_epochs=1.0, n_evals=1)


def test_a_wide_model_computes_in_bf16_on_a_cpu_that_has_it_and_prints_so(trainer_in_bf16, capsys):
    seen = set()
    trainer_in_bf16.model.classifier.register_forward_hook(
        lambda module, inputs, outputs: seen.add((module.training, outputs.dtype))
    )
    trainer_in_bf16.train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {weight.dtype for weight in trainer_in_bf16.model.parameters()} == {torch.float32}
    assert "(stand-in): cpu, bfloat16 (this CPU has bf16 instructions)" in capsys.readouterr().out


def test_a_validation_reads_again_in_32_bit_what_overflows_in_16(trainer_in_bf16):
    def overflow(module, inputs, outputs):
        is_lost = not module.training and outputs.dtype == torch.bfloat16
        return outputs * torch.inf if is_lost else outputs

    trainer_in_bf16.model.classifier.register_forward_hook(overflow)
    trainer_in_bf16.train()
    assert np.isfinite(trainer_in_bf16.history[-1]["log_loss"])


@pytest.fixture
def overflowing_base(tiny_base, tmp_path):
    """The tiny decoder, and a letter with which a battle overflows 16 bit inside the first MLP."""
    base = shutil.copytree(tiny_base("qwen3"), tmp_path / "overflowing_base")
    letter = "\N{SNOWMAN}"
    tokenizer = AutoTokenizer.from_pretrained(base)
    weights = load_file(base / "model.safetensors")
    marked = tokenizer(letter, add_special_tokens=False)["input_ids"]
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, 0] = 0  # only that letter has something in the first place, and a lot of it
    embeddings[marked[-1], 0] = 100
    weights["model.layers.0.self_attn.o_proj.weight"][0] = 0
    weights["model.layers.0.post_attention_layernorm.weight"][0] = 5e3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base, letter


def test_a_validation_of_a_4bit_model_survives_a_battle_that_overflows_16_bit(
    overflowing_base, demo_pairs, tiny_configs, tmp_path, monkeypatch
):
    fp16 = (torch.float16, "as on a T4")
    monkeypatch.setattr("src.utils.models.hardware.choose_precision", lambda *_: fp16)
    monkeypatch.setattr("src.utils.training.trainer.choose_precision", lambda *_: fp16)
    base, letter = overflowing_base
    config = dataclasses.replace(tiny_configs["qwen3"], quantization="4bit", n_evals=1)
    pairs = demo_pairs[:16].assign(fold=[0] * 8 + [1] * 8).reset_index(drop=True)
    pairs.at[3, "response_a"] = (letter,)
    model, tokenizer = load_classifier(config, base)
    trainer = FoldTrainer(
        model, tokenizer, pairs[8:], pairs[:8], Member("fold_0", 0, config), tmp_path
    )
    finite, layers = [], model.get_base_model().model.layers
    layers[0].mlp.register_forward_hook(
        lambda mlp, inputs, outputs: finite.append(bool(torch.isfinite(outputs).all()))
    )
    trainer.train()
    assert finite.count(False) == 2  # the battle in both orders
    assert np.isfinite(trainer.history[-1]["log_loss"])
    assert layers[0].mlp.down_proj.base_layer.compute_dtype == torch.float16


# ---- memory ------------------------------------------------------------------


def limit_memory(model, n_tok, place="forward", n_spared=0):
    """Make training fail above so many tokens per pass, but not in the first `n_spared` passes."""
    passes = []

    def is_over():
        return model.training and len(passes) > n_spared and passes[-1] > n_tok

    def refuse(gradient):
        raise torch.OutOfMemoryError(f"CUDA out of memory, {place}")

    def note(module, args, inputs):
        if module.training:
            passes.append(inputs["input_ids"].numel())
        if place == "forward" and is_over():
            refuse(None)

    def trap(module, args, output):
        # The head has its gradients by then: a step that continued here would count them twice.
        if place == "backward" and is_over():
            (output[0] if isinstance(output, tuple) else output).register_hook(refuse)

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.model.layers[0].register_forward_hook(trap)
    return passes


# Adam makes much of the last bit of a small gradient, so steps are small here.
SMALL_STEPS = {"tokens_per_step": 1536, "n_epochs": 1.0, "n_evals": 1, "learning_rate": 1e-4}


@pytest.mark.parametrize("both_orders", [True, False])
@pytest.mark.parametrize(("place", "n_spared"), [("forward", 0), ("backward", 0), ("backward", 2)])
def test_a_pass_that_memory_does_not_hold_is_split_and_the_weights_are_the_same(
    make_trainer, both_orders, place, n_spared
):
    unlimited = make_trainer(both_orders=both_orders, **SMALL_STEPS)
    unlimited.train()
    limited = make_trainer(both_orders=both_orders, **SMALL_STEPS)
    passes = limit_memory(limited.model, 300, place, n_spared)
    with pytest.warns(UserWarning, match=r"pass of \d+ tokens; .* at most \d+"):
        limited.train()
    assert 90 < limited.tokens_per_batch < 300 < max(passes)
    too_large = [n_tok for n_tok in passes[n_spared + 1 :] if n_tok > 300]
    assert len(too_large) <= 1  # what failed once is not tried again
    # A twentieth of a step of Adam, which the last bit of a small gradient can be worth.
    expected, found = flat(unlimited.weights), flat(limited.weights)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)
    assert (found - expected).abs().mean() < 1e-9
    losses = [trainer.history[0]["train_loss"] for trainer in (unlimited, limited)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_battle_that_memory_does_not_hold_names_the_setting_to_lower(make_trainer):
    trainer = make_trainer(**SMALL_STEPS)
    limit_memory(trainer.model, 10)
    with (
        pytest.warns(UserWarning, match=r"pass of \d+ tokens"),
        pytest.raises(torch.OutOfMemoryError, match=r"max_tokens \(96\)"),
    ):
        trainer.train()


@pytest.mark.parametrize(("holds", "expected"), [(10_000, 1536), (800, 768), (1, 0)])
def test_on_a_gpu_a_pass_is_as_large_as_a_trial_shows_that_memory_holds(
    make_trainer, monkeypatch, holds, expected
):
    trainer = make_trainer(**SMALL_STEPS | {"tokens_per_batch": 0})
    trainer._choose_tokens_per_batch()
    assert trainer.tokens_per_batch == 1536  # below what suits a CPU
    longest = int(trainer.examples.lengths.max())
    trainer.device, trainer.tokens_per_batch = torch.device("meta"), 0
    monkeypatch.setattr(trainer, "_fits", lambda n_tok: n_tok <= holds)
    trainer._choose_tokens_per_batch()
    assert trainer.tokens_per_batch == max(expected, longest)


# ---- time ----------------------------------------------------------------------


class Clock:
    """A clock that each training step moves on by a second."""

    def __init__(self, monkeypatch, trainer):
        self.now = 1000.0
        monkeypatch.setattr("src.utils.training.trainer.time", self)
        real = trainer.take_step

        def take_step():
            real()
            self.now += 1

        monkeypatch.setattr(trainer, "take_step", take_step)

    def monotonic(self):
        return self.now

    perf_counter = monotonic


def test_a_deadline_shortens_the_schedule_and_the_rate_still_ends_at_zero(
    make_trainer, monkeypatch, capsys
):
    options = {"n_epochs": 12.0, "n_evals": 1, "tokens_per_step": 512, "eval_pairs": 4}
    trainer = make_trainer(**options)
    n_steps = len(trainer.steps)
    assert n_steps > 80
    clock = Clock(monkeypatch, trainer)
    trainer.train(deadline=clock.now + n_steps / 2)
    last = trainer.schedule.last_step
    assert n_steps / 3 < last < n_steps / 2
    assert trainer.history[-1]["step"] == last and trainer.history[-1]["learning_rate"] < 1e-6
    assert f"ends at step {last}" in capsys.readouterr().out
    unlimited = make_trainer(**options)
    clock = Clock(monkeypatch, unlimited)
    unlimited.train(deadline=clock.now + 10 * n_steps)
    assert unlimited.history[-1]["step"] == n_steps


def test_checkpoints_are_also_written_between_validations(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(n_epochs=6.0, n_evals=1, tokens_per_step=512, save_minutes=0.05)
    Clock(monkeypatch, trainer)
    saved = []
    real = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda: (saved.append(trainer.step), real()))
    trainer.train()
    gaps = np.diff([0, *saved])
    assert len(saved) > 6 and gaps.max() <= 10
