import dataclasses

import pytest
import torch

from src.utils.config import FinetuneConfig
from src.utils.metrics import swap_consistency
from src.utils.mirror import swap_pairs
from src.utils.models import load_classifier
from src.utils.predict import predict_probs
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


def test_validations_are_spread_evenly_and_the_last_step_has_one():
    assert _validation_steps(ENCODER, 100) == {25, 50, 75, 100}
    assert _validation_steps(ENCODER, 2) == {1, 2}
    assert _validation_steps(dataclasses.replace(ENCODER, n_epochs=0.1, n_evals=1), 7) == {7}


def test_a_gradient_does_not_depend_on_how_rows_fall_into_batches(demo_pairs, tiny_base, tmp_path):
    pairs = demo_pairs[:6].assign(fold=[0, 1, 1, 1, 1, 1]).reset_index(drop=True)

    def gradient(tokens_per_batch, batches_per_step):
        config = dataclasses.replace(
            ENCODER, max_tokens=96, tokens_per_batch=tokens_per_batch, batches_per_step=batches_per_step, n_epochs=1.0
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


@pytest.mark.slow
def test_consistency_brings_the_two_orders_together(demo_pairs, tiny_base, tmp_path):
    pairs = demo_pairs[:60].reset_index(drop=True)
    heldout, options = pairs[pairs["fold"] == 0], {"max_tokens": 96, "tokens_per_batch": 512, "swap": False}

    def inconsistency(weight):
        config = dataclasses.replace(ENCODER, both_orders=True, consistency=weight, n_evals=1, n_epochs=4.0)
        model, tokenizer = load_classifier(config, tiny_base("modernbert"))
        folders = {"model_dir": tmp_path / f"{weight}", "checkpoint_dir": tmp_path / "checkpoints"}
        FoldTrainer(model, tokenizer, pairs[pairs["fold"] != 0], heldout, 0, config, **folders).train()
        given, swapped = (predict_probs(model, tokenizer, p, **options) for p in (heldout, swap_pairs(heldout)))
        return swap_consistency(given, swapped)

    assert inconsistency(10.0) < 0.5 * inconsistency(0.0)
