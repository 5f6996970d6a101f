import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from src.utils.models.tiny import STYLE_TARGETS, measure_differences, pretrain


def test_answers_are_compared_by_their_texts_alone(demo_pairs):
    differences = measure_differences(demo_pairs, seed=0)
    assert differences.shape == (300, len(STYLE_TARGETS) + 8)
    texts = demo_pairs.drop(columns=["label", "model_a", "model_b"])
    assert (measure_differences(texts, seed=0) == differences).all()
    n_chars = [
        demo_pairs[name].map(lambda turns: len("\n".join(turn or "" for turn in turns)))
        for name in ("response_a", "response_b")
    ]
    is_longer = (n_chars[0] > n_chars[1]).to_numpy()
    assert (differences[is_longer, STYLE_TARGETS.index("n_chars")] > 0).all()


def test_ugly_battles_can_be_compared(ugly_pairs):
    assert np.isfinite(measure_differences(ugly_pairs, seed=0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_a_tiny_model_learns_to_compare(tiny_base, demo_pairs, kind):
    auto = AutoModelForCausalLM if kind == "qwen3" else AutoModelForMaskedLM
    model = auto.from_pretrained(tiny_base(kind))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base(kind))
    before = model.get_input_embeddings().weight.detach().clone()
    losses = pretrain(model, tokenizer, demo_pairs, seed=0, n_steps=300)
    assert losses[:30, 1].mean() > 0.8 and losses[-30:, 1].mean() < 0.5
    assert not torch.equal(before, model.get_input_embeddings().weight)
