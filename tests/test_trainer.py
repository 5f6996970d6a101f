import dataclasses
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_classifier
from src.utils.models.predict import predict_probs
from src.utils.schema import swap_pairs
from src.utils.stats.scores import swap_gap
from src.utils.training.trainer import FoldTrainer, _validation_steps

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


def make_trainer(pairs, base, folder, **changes):
    options = {name: changes.pop(name) for name in ("log_dir", "stop_share") if name in changes}
    config = dataclasses.replace(ENCODER, **changes)
    model, tokenizer = load_classifier(config, base)
    heldout = pairs["fold"] == 0
    return FoldTrainer(
        model,
        tokenizer,
        pairs[~heldout].reset_index(drop=True),
        pairs[heldout].reset_index(drop=True),
        0,
        config,
        model_dir=folder / "model" / "fold_0",
        checkpoint_dir=folder / "checkpoints" / "fold_0",
        **options,
    )


@pytest.fixture
def pairs(demo_pairs):
    return demo_pairs[:60].reset_index(drop=True)


# ---- optimizers --------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8bit_optimizer_keeps_its_state_in_bytes_and_learns(
    pairs, tiny_base, tmp_path, optimizer
):
    trainer = make_trainer(
        pairs, tiny_base("modernbert"), tmp_path, optimizer=optimizer, n_epochs=4.0
    )
    trainer.train()
    layer = trainer.model.model.layers[0].mlp.Wi.weight
    state = trainer.optimizer.optimizer.state[layer]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert trainer.optimizer.optimizer.is_paged == (optimizer == "paged_adamw_8bit")
    history = trainer.describe()["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.2


def test_layers_learn_at_rates_of_their_own_and_only_matrices_decay(pairs, tiny_base, tmp_path):
    trainer = make_trainer(pairs, tiny_base("modernbert"), tmp_path, layer_decay=0.5)
    groups, model = trainer.create_optimizer().param_groups, trainer.model
    group_of = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert group_of[id(model.classifier.weight)] == (1e-3, 0.01)
    assert group_of[id(model.classifier.bias)] == (1e-3, 0.0)
    assert group_of[id(model.model.layers[0].attn.Wo.weight)] == (1e-3 / 8, 0.01)
    assert group_of[id(model.model.layers[1].attn_norm.weight)] == (1e-3 / 4, 0.0)
    assert group_of[id(model.model.final_norm.weight)] == (1e-3 / 2, 0.0)
    assert group_of[id(model.model.embeddings.tok_embeddings.weight)] == (1e-3 / 16, 0.01)


# ---- logs --------------------------------------------------------------------


def test_tensorboard_reads_what_was_logged_and_nothing_that_a_killed_run_logged_too_late(
    pairs, tiny_base, tmp_path
):
    def curve(name):
        events = EventAccumulator(str(tmp_path / "logs"))
        events.Reload()
        return [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)]

    options = {"log_dir": tmp_path / "logs", "n_epochs": 1.0, "n_evals": 3}
    trainer = make_trainer(pairs, tiny_base("modernbert"), tmp_path, **options)
    trainer.go_on(None)
    history = trainer.describe()["history"]
    assert len(history) == 3
    for shown, name in (
        ("held_out", "log_loss"),
        ("train_loss", "train_loss"),
        ("padding_share", "padding_share"),
    ):
        assert curve(shown) == [(row["step"], row[name]) for row in history]
    oldest = min(
        (tmp_path / "checkpoints" / "fold_0").iterdir(),
        key=lambda path: int(path.name.split("-")[1]),
    )
    again = make_trainer(pairs, tiny_base("modernbert"), tmp_path, **options)
    again.go_on(oldest)
    assert curve("held_out") == [(row["step"], row["log_loss"]) for row in history]


def test_swap_gap_is_that_of_the_two_readings(pairs, tiny_base, tmp_path):
    trainer = make_trainer(pairs, tiny_base("modernbert"), tmp_path, n_epochs=1.0, n_evals=1)
    trainer.train()
    reader = {"max_tokens": 96, "tokens_per_batch": 512, "swap": False}
    given, swapped = (
        predict_probs(trainer.model, trainer.processing_class, battles, **reader)
        for battles in (trainer.heldout, swap_pairs(trainer.heldout))
    )
    (row,) = trainer.describe()["history"]
    assert row["swap_gap"] == pytest.approx(swap_gap(given, swapped), abs=1e-6) and given.std() > 0
    assert row["peak_mib"] > 50


def test_the_bar_tells_throughput_memory_losses_and_time_left(pairs, tiny_base, tmp_path, capsys):
    make_trainer(pairs, tiny_base("modernbert"), tmp_path, n_epochs=1.0, n_evals=1).train()
    line = capsys.readouterr().out.split("\r")[-1]
    found = r"fold 0: 100%.*\[\d+:\d+<\d+:\d+, .*train \d\.\d{4}, held out \d\.\d{4}, [\d.]+k tok/s, \d+ % padding, \d+ MiB"
    assert re.search(found, line)


# ---- steps -------------------------------------------------------------------


def test_validations_are_spread_evenly_and_the_last_step_has_one():
    assert _validation_steps(ENCODER, 100) == {25, 50, 75, 100}
    assert _validation_steps(ENCODER, 2) == {1, 2}
    assert _validation_steps(dataclasses.replace(ENCODER, n_epochs=0.1, n_evals=1), 7) == {7}


@pytest.mark.parametrize("packing", [True, False])
def test_a_gradient_does_not_depend_on_how_rows_fall_into_batches(
    packing, demo_pairs, tiny_base, tmp_path
):
    pairs = demo_pairs[:6].assign(fold=[0, 1, 1, 1, 1, 1]).reset_index(drop=True)

    def gradient(tokens_per_batch, batches_per_step):
        config = dataclasses.replace(
            ENCODER,
            tokens_per_batch=tokens_per_batch,
            batches_per_step=batches_per_step,
            n_epochs=1.0,
            packing=packing,
        )
        model, tokenizer = load_classifier(config, tiny_base("modernbert"))
        folders = {"model_dir": tmp_path / "model", "checkpoint_dir": tmp_path / "checkpoints"}
        trainer = FoldTrainer(model, tokenizer, pairs[1:], pairs[:1], 0, config, **folders)
        batches = list(trainer.get_train_dataloader())
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.model_wrapped = model
        for batch in batches:
            trainer.training_step(model, batch)
        return len(batches), torch.cat([p.grad.flatten() for p in model.parameters()])

    n_whole, whole = gradient(96 * 5, 1)
    n_parts, parts = gradient(96 * 2, 3)
    assert n_whole == 1 and n_parts > 2
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_packed_where_the_settings_ask_for_it(packing, demo_pairs, tiny_base, tmp_path):
    config = dataclasses.replace(ENCODER, packing=packing)
    model, tokenizer = load_classifier(config, tiny_base("modernbert"))
    folders = {"model_dir": tmp_path / "model", "checkpoint_dir": tmp_path / "checkpoints"}
    trainer = FoldTrainer(model, tokenizer, demo_pairs[:20], demo_pairs[20:], 0, config, **folders)
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("cu_seq_lens" in batch) is packing and ("attention_mask" in batch) is not packing
    assert trainer.is_packed is packing and trainer._make_reader().is_packed is packing
    assert (trainer.n_padded[-1] == trainer.n_tok[-1]) == packing


def test_a_wide_model_computes_in_bf16_on_a_cpu_that_has_it_and_says_so(
    demo_pairs, tiny_base, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("src.utils.models.hardware.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("src.utils.models.hardware.MIN_BF16_HIDDEN_SIZE", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(ENCODER, n_epochs=1.0, n_evals=1)
    pairs = demo_pairs[:8].assign(fold=[0, 0] + [1] * 6).reset_index(drop=True)
    model, tokenizer = load_classifier(config, tiny_base("modernbert"))
    seen = set()
    model.classifier.register_forward_hook(lambda _, inputs, outputs: seen.add(outputs.dtype))
    folders = {"model_dir": tmp_path / "model", "checkpoint_dir": tmp_path / "checkpoints"}
    FoldTrainer(model, tokenizer, pairs[2:], pairs[:2], 0, config, **folders).train()
    assert seen == {torch.bfloat16}  # in training and in validation
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "fold 0: cpu, bfloat16 (this CPU has bf16 instructions)" in capsys.readouterr().out


@pytest.mark.slow
def test_consistency_brings_the_two_orders_together(demo_pairs, tiny_base, tmp_path):
    pairs = demo_pairs[:60].reset_index(drop=True)
    heldout, options = (
        pairs[pairs["fold"] == 0],
        {"max_tokens": 96, "tokens_per_batch": 512, "swap": False},
    )

    def inconsistency(weight):
        config = dataclasses.replace(
            ENCODER, both_orders=True, consistency=weight, n_evals=1, n_epochs=4.0
        )
        model, tokenizer = load_classifier(config, tiny_base("modernbert"))
        folders = {"model_dir": tmp_path / f"{weight}", "checkpoint_dir": tmp_path / "checkpoints"}
        FoldTrainer(
            model, tokenizer, pairs[pairs["fold"] != 0], heldout, 0, config, **folders
        ).train()
        given, swapped = (
            predict_probs(model, tokenizer, p, **options) for p in (heldout, swap_pairs(heldout))
        )
        return swap_gap(given, swapped)

    assert inconsistency(10.0) < 0.5 * inconsistency(0.0)
