import dataclasses

import pytest
import torch

from src.utils.config import FinetuneConfig
from src.utils.models import load_classifier
from src.utils.trainer import FoldTrainer, _validation_steps

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
    )


@pytest.fixture
def pairs(demo_pairs):
    return demo_pairs[:60].reset_index(drop=True)


# ---- optimizers --------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8bit_optimizer_keeps_its_state_in_bytes_and_learns(pairs, tiny_base, tmp_path, optimizer):
    trainer = make_trainer(pairs, tiny_base("modernbert"), tmp_path, optimizer=optimizer, n_epochs=4.0)
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
    group_of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert group_of[id(model.classifier.weight)] == (1e-3, 0.01)
    assert group_of[id(model.classifier.bias)] == (1e-3, 0.0)
    assert group_of[id(model.model.layers[0].attn.Wo.weight)] == (1e-3 / 8, 0.01)
    assert group_of[id(model.model.layers[1].attn_norm.weight)] == (1e-3 / 4, 0.0)
    assert group_of[id(model.model.final_norm.weight)] == (1e-3 / 2, 0.0)
    assert group_of[id(model.model.embeddings.tok_embeddings.weight)] == (1e-3 / 16, 0.01)


# ---- steps -------------------------------------------------------------------


def test_validations_are_spread_evenly_and_the_last_step_has_one():
    assert _validation_steps(ENCODER, 100) == {25, 50, 75, 100}
    assert _validation_steps(ENCODER, 2) == {1, 2}
    assert _validation_steps(dataclasses.replace(ENCODER, n_epochs=0.1, n_evals=1), 7) == {7}


@pytest.mark.parametrize("packing", [True, False])
def test_a_gradient_does_not_depend_on_how_rows_fall_into_batches(packing, demo_pairs, tiny_base, tmp_path):
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
    monkeypatch.setattr("src.utils.hardware.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("src.utils.hardware.MIN_BF16_HIDDEN_SIZE", 64)
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
