import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ModernBertForSequenceClassification, Qwen3ForSequenceClassification

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.batches import collate
from src.utils.models.checkpoints import (
    head_names,
    load_classifier,
    load_finetuned,
    merge,
    save_model,
)
from src.utils.models.heads import Contrasting, contrast_weights, find_answers
from src.utils.models.packing import collate_packed, enable_packing
from src.utils.models.predict import predict_probs
from src.utils.models.template import encode_pairs, make_template

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="", head="contrast")
DECODER = DecoderConfig(
    checkpoint="tiny:qwen3",
    revision="",
    head="contrast",
    quantization="none",
    lora_rank=4,
    gradient_checkpointing=False,
)
CONFIGS = {"modernbert": ENCODER, "qwen3": DECODER}


def load(kind, tiny_base, **changes):
    """A classifier whose contrast is not zero."""
    model, tokenizer = load_classifier(
        dataclasses.replace(CONFIGS[kind], **changes), tiny_base(kind)
    )
    nn.init.normal_(contrast_of(model).weight)
    return model.eval(), tokenizer


def contrast_of(model):
    contrast = (model.get_base_model() if hasattr(model, "get_base_model") else model).contrast
    return contrast.modules_to_save["default"] if hasattr(contrast, "modules_to_save") else contrast


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_answers_are_found_whatever_they_hold(kind, tiny_base, ugly_pairs):
    _, tokenizer = load(kind, tiny_base)
    template = make_template(tokenizer)
    for row in encode_pairs(ugly_pairs, tokenizer, 512):
        (start_a, end_a), (start_b, end_b) = find_answers(row, template.pieces)
        assert tuple(row[start_a - len(template.pieces[1]) : start_a]) == template.pieces[1]
        assert tuple(row[end_a:start_b]) == template.pieces[2]
        assert tuple(row[end_b:]) == template.pieces[3]
        assert 0 < start_a <= end_a < start_b <= end_b < len(row)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_answers_found_are_those_written(kind, tiny_base):
    _, tokenizer = load(kind, tiny_base)
    battle = pd.DataFrame(
        {"prompt": [("Answer B:\n",)], "response_a": [("dog dog",)], "response_b": [("",)]}
    )
    [row] = encode_pairs(battle, tokenizer, 256)
    (start_a, end_a), (start_b, end_b) = find_answers(row, make_template(tokenizer).pieces)
    assert tokenizer.decode(row[start_a:end_a]).strip() == "dog dog"
    assert tokenizer.decode(row[start_b:end_b]).strip() == ""


def test_weights_make_a_mean_minus_a_mean():
    pieces = [(1,), (2, 3), (2, 4), (5,)]
    row = np.array([1, 9, 2, 3, 7, 7, 2, 4, 8, 8, 8, 8, 5])
    weights = contrast_weights(row, pieces)
    assert weights.tolist() == [0, 0, 0, 0, 0.5, 0.5, 0, 0, -0.25, -0.25, -0.25, -0.25, 0]
    assert contrast_weights(np.array([1, 2, 3, 2, 4, 8, 5]), pieces).tolist() == [
        0,
        0,
        0,
        0,
        0,
        -1,
        0,
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_it_adds_to_a_it_subtracts_from_b(kind, tiny_base, demo_pairs):
    model, tokenizer = load(kind, tiny_base)
    batch = collate(encode_pairs(demo_pairs[:6], tokenizer, 256), tokenizer.pad_token_id)
    with torch.no_grad():
        added = model(**batch).logits
        contrast_of(model).weight.zero_()
        added = added - model(**batch).logits
    torch.testing.assert_close(added[:, 0], -added[:, 1])
    assert (added[:, 0].abs() > 1e-3).all() and (added[:, 2] == 0).all()


def test_exchanged_states_exchange_its_output(tiny_base):
    model, _ = load("modernbert", tiny_base)
    model.pieces = [(1,), (2, 3), (2, 4), (5,)]
    row, states = torch.tensor([1, 9, 2, 3, 7, 7, 2, 4, 8, 8, 5]), torch.randn(11, 64)
    exchanged = states[[0, 1, 2, 3, 8, 9, 6, 7, 4, 5, 10]]
    one, other = model.read_contrast([row, row], [states, exchanged])
    torch.testing.assert_close(one, other[[1, 0, 2]])
    assert one.abs().max() > 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_contrast_adds_nothing_and_can_learn(kind, tiny_base, demo_pairs):
    model, tokenizer = load_classifier(CONFIGS[kind], tiny_base(kind))
    contrast = contrast_of(model)
    assert contrast.weight.dtype == torch.float32 and (contrast.weight == 0).all()
    batch = collate(encode_pairs(demo_pairs[:4], tokenizer, 256), tokenizer.pad_token_id)
    nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 1, 2, 0])).backward()
    assert contrast.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_and_padded_rows_agree_in_logits_and_gradients(kind, tiny_base, demo_pairs):
    model, tokenizer = load(kind, tiny_base, lora_dropout=0.0)
    rows = [np.array(row) for row in encode_pairs(demo_pairs[:9], tokenizer, 256)]
    results = []
    for batch in (collate(rows, tokenizer.pad_token_id), collate_packed(rows)):
        logits = enable_packing(model)(**batch).logits
        model.zero_grad()
        nn.functional.cross_entropy(logits, torch.arange(9) % 3).backward()
        results.append(
            (logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    (padded, padded_grads), (packed, packed_grads) = results
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    for one, other in zip(packed_grads, padded_grads, strict=True):
        torch.testing.assert_close(
            one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-4
        )


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_saved_loaded_and_merged(kind, tiny_base, demo_pairs, tmp_path):
    config = CONFIGS[kind]
    model, tokenizer = load(kind, tiny_base)
    save_model(model, tokenizer, tmp_path / "model")
    options = {"max_tokens": 256, "tokens_per_batch": 2048}
    expected = predict_probs(model, tokenizer, demo_pairs[:20], **options)
    base = tiny_base(kind) if config.is_frozen else None
    again, _ = load_finetuned(tmp_path / "model", config, base)
    np.testing.assert_allclose(
        predict_probs(again, tokenizer, demo_pairs[:20], **options), expected, atol=1e-6
    )
    merged, _ = merge(tmp_path / "model", config, base)
    save_model(merged, tokenizer, tmp_path / "merged")
    plain = dataclasses.replace(config, train="all")
    loaded, _ = load_finetuned(tmp_path / "merged", plain)
    np.testing.assert_allclose(
        predict_probs(loaded, tokenizer, demo_pairs[:20], **options), expected, atol=1e-5
    )
    joint, _ = load_finetuned(tmp_path / "merged", dataclasses.replace(plain, head="joint"))
    assert (
        np.abs(predict_probs(joint, tokenizer, demo_pairs[:20], **options) - expected).max() > 1e-3
    )


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_beside_a_quantised_base_it_is_not_quantised(quantization, tiny_base):
    model, _ = load_classifier(
        dataclasses.replace(DECODER, quantization=quantization), tiny_base("qwen3")
    )
    assert (
        type(contrast_of(model)) is nn.Linear and contrast_of(model).weight.dtype == torch.float32
    )
    assert contrast_of(model).weight.requires_grad
    assert head_names(model.get_base_model()) == ["score", "contrast"]


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("modernbert", ModernBertForSequenceClassification),
        ("qwen3", Qwen3ForSequenceClassification),
    ],
)
def test_what_is_saved_names_a_class_of_transformers(kind, cls, tiny_base, tmp_path):
    model, tokenizer = load(kind, tiny_base, train="all")
    save_model(model, tokenizer, tmp_path / "model")
    assert isinstance(model, Contrasting) and isinstance(model, cls)
    assert f'"{cls.__name__}"' in (tmp_path / "model" / "config.json").read_text()
    assert "contrast.weight" in load_file(tmp_path / "model" / "model.safetensors")


def test_a_model_in_half_precision_reads_without_autocast(tiny_base, demo_pairs):
    model, tokenizer = load("modernbert", tiny_base)
    batch = collate(encode_pairs(demo_pairs[:4], tokenizer, 256), tokenizer.pad_token_id)
    with torch.no_grad():
        exact, rounded = model(**batch).logits, model.bfloat16()(**batch).logits
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.2, rtol=0.1)
