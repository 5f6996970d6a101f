import dataclasses

import pytest
import torch

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_classifier
from src.utils.training import splitting
from src.utils.training.trainer import FoldTrainer

CONFIG = FinetuneConfig(
    checkpoint="tiny:modernbert",
    revision="",
    max_tokens=96,
    predict_tokens=96,
    tokens_per_batch=512,
    batches_per_step=3,
    n_epochs=1.0,
    n_evals=1,
    learning_rate=1e-4,  # Adam makes much of the last bit of a small gradient
)


@pytest.fixture
def make_trainer(demo_pairs, tiny_base, tmp_path):
    """A function: changes of the settings -> the Trainer of a fold."""

    def make(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        folders = {"model_dir": tmp_path / "model", "checkpoint_dir": tmp_path / "checkpoints"}
        model_and_tokenizer = load_classifier(config, tiny_base("modernbert"))
        train_pairs, heldout = (
            demo_pairs[:48].reset_index(drop=True),
            demo_pairs[48:60].reset_index(drop=True),
        )
        return FoldTrainer(*model_and_tokenizer, train_pairs, heldout, 0, config, **folders)

    return make


def limit_memory(model, n_tok, place="forward", n_spared=0):
    """Make training fail above so many places in a batch, as torch does; the first few passes are spared."""
    passes = []

    def is_over():
        return model.training and len(passes) > n_spared and passes[-1] > n_tok

    def refuse(gradient):
        raise torch.OutOfMemoryError(f"CUDA out of memory, {place}")

    def note(module, args, inputs):
        passes.append(inputs["input_ids"].numel())
        if place == "forward" and is_over():
            refuse(None)

    def trap(module, args, output):
        # The head has its gradients by then: a step that goes on from here would count them twice.
        if place == "backward" and is_over():
            (output[0] if isinstance(output, tuple) else output).register_hook(refuse)

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.model.layers[0].register_forward_hook(trap)
    return passes


@pytest.mark.parametrize("both_orders", [True, False])
@pytest.mark.parametrize(("place", "n_spared"), [("forward", 0), ("backward", 0), ("backward", 2)])
def test_a_batch_that_memory_does_not_hold_is_split_and_the_weights_are_the_same(
    make_trainer, both_orders, place, n_spared
):
    def train(n_tok):
        trainer = make_trainer(both_orders=both_orders)
        passes = limit_memory(trainer.model, n_tok, place, n_spared)
        trainer.train()
        return (
            trainer,
            torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
            passes,
        )

    whole, expected, _ = train(10_000)
    with pytest.warns(
        UserWarning,
        match="memory does not hold a batch of 512 tokens; from here on each is read in 2 ",
    ):
        parts, found, passes = train(n_tok=300)
    assert parts.n_parts >= 2 and max(passes) > 300
    # A twentieth of a step of Adam, which the last bit of a small gradient can be worth.
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)
    assert (found - expected).abs().mean() < 1e-9
    history, again = (trainer.describe()["history"][0]["train_loss"] for trainer in (whole, parts))
    assert again == pytest.approx(history, abs=1e-6)


def test_both_orders_of_a_battle_stay_side_by_side_in_the_parts_of_a_batch(make_trainer):
    trainer = make_trainer(n_epochs=0.5)
    seen, real = [], trainer._collate
    trainer._collate = lambda items: seen.append(len(items)) or real(items)
    trainer.n_parts = 3
    trainer.train()
    split = [n_rows for n_rows in seen if n_rows < max(map(len, trainer.plan))]
    assert split and all(n_rows % 2 == 0 for n_rows in seen)


def test_a_battle_that_memory_does_not_hold_says_what_to_do(make_trainer):
    trainer = make_trainer()
    limit_memory(trainer.model, 10)
    with (
        pytest.warns(UserWarning, match="does not hold a batch"),
        pytest.raises(torch.OutOfMemoryError, match=r"a single battle; lower max_tokens \(96\)"),
    ):
        trainer.train()


def test_several_processes_are_told_what_to_do_when_memory_runs_out(make_trainer, monkeypatch):
    trainer = make_trainer()
    limit_memory(trainer.model, 10)
    monkeypatch.setattr(splitting, "world_size", lambda: 2)
    with pytest.raises(
        RuntimeError, match=r"2 processes can not split .* lower tokens_per_batch \(512\)"
    ):
        trainer.train()
