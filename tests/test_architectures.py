"""Any checkpoint: other encoders and decoders are trained, saved and loaded by their name alone."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.batches import collate
from src.utils.models.checkpoints import (
    choose_pad_token,
    head_names,
    load_base_tokenizer,
    load_classifier,
    load_finetuned,
    merge,
    read_architecture,
    save_model,
)
from src.utils.models.frozen import find_layers
from src.utils.models.reading import load_state_reader
from src.utils.models.template import encode_pairs, make_template
from src.utils.runs import read_json, write_json
from src.utils.training.fit import fit

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
BERT_MARKS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
}
ROBERTA_MARKS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
GEMMA_MARKS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
}
LLAMA_MARKS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}

GEMMA_CHAT = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_CHAT = (
    "{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y %H:%M:%S.%f') %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ date_string }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEBERTA = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pooler_hidden_size": 32,
}

# name: (class of the checkpoint, settings, special tokens, chat template)
CHECKPOINTS = {
    "deberta-v2": ("DebertaV2ForMaskedLM", {**SIZES, **DEBERTA}, BERT_MARKS, ""),
    "deberta-v3": (
        "DebertaV2ForMaskedLM",
        {**SIZES, **DEBERTA, "position_buckets": 16},
        BERT_MARKS,
        "",
    ),
    "bert": ("BertForMaskedLM", SIZES, BERT_MARKS, ""),
    "roberta": ("RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 514}, ROBERTA_MARKS, ""),
    "ettin": ("ModernBertForMaskedLM", {**SIZES, "classifier_pooling": "mean"}, BERT_MARKS, ""),
    "mmbert": ("ModernBertForMaskedLM", SIZES, GEMMA_MARKS, ""),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**SIZES, **GROUPED},
        {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        CHATML,
    ),
    "qwen3-base": (
        "Qwen3ForCausalLM",
        {**SIZES, **GROUPED},
        {"pad_token": "<|end|>", "eos_token": "<|end|>"},
        "",
    ),
    "llama": ("LlamaForCausalLM", {**SIZES, **GROUPED}, LLAMA_MARKS, LLAMA_CHAT),
    "gemma2": ("Gemma2ForCausalLM", {**SIZES, **GROUPED}, GEMMA_MARKS, GEMMA_CHAT),
    "gemma3": ("Gemma3ForCausalLM", {**SIZES, **GROUPED}, GEMMA_MARKS, GEMMA_CHAT),
    "reward": (
        "Qwen3ForSequenceClassification",
        {**SIZES, **GROUPED, "num_labels": 1},
        {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        CHATML,
    ),
}
ENCODERS = ("deberta-v2", "deberta-v3", "bert", "roberta", "ettin", "mmbert")
MORE_TOKENS = [
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|im_start|>",
]


def make_tokenizer(marks, chat):
    special = [
        *dict.fromkeys(marks.values()),
        *(["<|reserved_special_token_0|>"] if chat == LLAMA_CHAT else []),
    ]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special + MORE_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(["which answer does the user prefer"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    tokenizer.chat_template = chat or None
    return tokenizer


def write_checkpoint(name, folder):
    kind, settings, marks, chat = CHECKPOINTS[name]
    tokenizer = make_tokenizer(marks, chat)
    model_class = getattr(transformers, kind)
    ids = {
        f"{word}_token_id": getattr(tokenizer, f"{word}_token_id") for word in ("pad", "bos", "eos")
    }
    torch.manual_seed(0)
    model = model_class(model_class.config_class(vocab_size=len(tokenizer), **ids, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(name, folder, **changes):
    kind = FinetuneConfig if name in ENCODERS else DecoderConfig
    budget = {"max_tokens": 320, "predict_tokens": 320, "tokens_per_batch": 1280}
    if kind is DecoderConfig:
        budget |= {"quantization": "none", "lora_rank": 4}
    return kind(checkpoint=str(folder), revision="", **budget | changes)


def read(model, tokenizer, rows):
    with torch.no_grad():
        return model.eval()(**collate(rows, tokenizer.pad_token_id)).logits.double()


def take_a_step(model, tokenizer, rows, labels):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first moves LoRA's B alone, since A's gradient passes through B
        optimizer.zero_grad()
        logits = model.train()(**collate(rows, tokenizer.pad_token_id)).logits
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()


CASES = [(name, {"head": head}) for name in CHECKPOINTS for head in ("joint", "contrast")]
CASES += [(name, {"train": "lora"}) for name in ENCODERS]
CASES += [
    (name, {"quantization": kind})
    for name in ("reward", "llama", "gemma3")
    for kind in ("4bit", "8bit")
]
CASES += [
    ("bert", {"quantization": "4bit", "train": "lora"}),
    ("deberta-v3", {"quantization": "8bit", "train": "lora"}),
]


@pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_any_checkpoint_is_trained_saved_and_loaded_by_its_name(
    name, changes, demo_pairs, tmp_path
):
    config = make_config(name, write_checkpoint(name, tmp_path / "base"), **changes)
    model, tokenizer = load_classifier(config)
    rows = encode_pairs(demo_pairs[:4], tokenizer, config.max_tokens)
    labels = torch.tensor(demo_pairs["label"][:4].to_numpy())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    take_a_step(model, tokenizer, rows, labels)
    moved = {
        n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])
    }
    heads = head_names(model.get_base_model() if config.uses_lora else model)
    for head in heads:
        assert any(f"{head}." in n for n in moved), f"{head} did not move"
    assert any(
        ("lora_" in n) if config.uses_lora else not n.startswith(tuple(heads)) for n in moved
    )

    logits = read(model, tokenizer, rows)
    assert logits.shape == (4, 3) and logits.std() > 1e-4
    alone = torch.cat([read(model, tokenizer, [row]) for row in rows])
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-3)
    again, tokenizer = load_finetuned(
        save_model(model, tokenizer, tmp_path / "run" / "model" / "fold_0"), config
    )
    torch.testing.assert_close(read(again, tokenizer, rows), logits, atol=1e-5, rtol=1e-4)


FIRST, ALL, LAST = slice(0, 1), slice(None), slice(-1, None)


@pytest.mark.parametrize(
    ("name", "read"),
    [("ettin", ALL), ("mmbert", FIRST), ("bert", FIRST), ("roberta", FIRST), ("deberta-v3", FIRST)]
    + [(name, LAST) for name in ("qwen3", "llama", "gemma3", "reward")],
)
def test_the_joint_head_reads_the_states_that_its_architecture_pools(
    name, read, demo_pairs, tmp_path
):
    config = make_config(name, write_checkpoint(name, tmp_path / "base"), train="all")
    model, tokenizer = load_classifier(config)
    states = []
    model.base_model.register_forward_hook(lambda module, args, output: states.append(output[0]))
    rows = encode_pairs(demo_pairs[:1], tokenizer, config.max_tokens)
    logits = model.eval()(**collate(rows, tokenizer.pad_token_id)).logits
    [gradient] = torch.autograd.grad(logits[0, 0], states[0])
    expected = torch.zeros(len(rows[0]), dtype=torch.bool)
    expected[read] = True
    assert torch.equal(gradient[0].abs().sum(dim=1) > 0, expected)


@pytest.mark.parametrize("name", ["deberta-v3", "bert", "gemma3", "reward"])
def test_any_checkpoint_can_be_merged(name, demo_pairs, tmp_path):
    config = make_config(name, write_checkpoint(name, tmp_path / "base"), train="lora")
    model, tokenizer = load_classifier(config)
    rows = encode_pairs(demo_pairs[:4], tokenizer, config.max_tokens)
    take_a_step(model, tokenizer, rows, torch.tensor(demo_pairs["label"][:4].to_numpy()))
    folder = save_model(model, tokenizer, tmp_path / "run" / "model" / "fold_0")
    merged, _ = merge(folder, config)
    torch.testing.assert_close(
        read(merged, tokenizer, rows), read(model, tokenizer, rows), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("name", ["llama", "qwen3-base"])
def test_padding_is_a_token_of_the_tokenizer_that_no_battle_ends_with(name, demo_pairs, tmp_path):
    model, tokenizer = load_classifier(make_config(name, write_checkpoint(name, tmp_path / "base")))
    n_tokens = model.get_base_model().config.vocab_size
    assert 0 <= tokenizer.pad_token_id < n_tokens == len(tokenizer)
    assert make_template(tokenizer).pieces[-1][-1] != tokenizer.pad_token_id
    assert model.get_base_model().config.pad_token_id == tokenizer.pad_token_id
    assert {"llama": "<|reserved_special_token_0|>"}.get(
        name, tokenizer.pad_token
    ) == tokenizer.pad_token


def test_padding_that_a_battle_ends_with_is_refused_by_the_template(demo_pairs):
    tokenizer = make_tokenizer({"pad_token": "<|end|>", "eos_token": "<|end|>"}, "")
    with pytest.raises(ValueError, match=r"padding.*<\|end\|>"):
        encode_pairs(demo_pairs[:1], tokenizer, 320)
    tokenizer.pad_token = choose_pad_token(tokenizer)
    assert len(encode_pairs(demo_pairs[:1], tokenizer, 320)) == 1


def test_a_battle_starts_with_bos_exactly_once():
    for chat in (LLAMA_CHAT, LLAMA_CHAT.replace("{{ bos_token }}", "")):
        tokenizer = make_tokenizer(LLAMA_MARKS, chat)
        bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos[0]} $A", special_tokens=[bos]
        )
        first = make_template(tokenizer).pieces[0]
        assert first[0] == tokenizer.bos_token_id and first.count(tokenizer.bos_token_id) == 1


def test_a_template_that_would_write_the_date_reads_the_same_every_day():
    tokenizer = make_tokenizer(LLAMA_MARKS, LLAMA_CHAT)
    assert make_template(tokenizer) == make_template(tokenizer)
    assert "01 Jan 2024" in tokenizer.decode(make_template(tokenizer).pieces[0])


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_budget_beyond_the_positions_of_a_checkpoint_says_what_fits(name, demo_pairs, tmp_path):
    config = make_config(name, write_checkpoint(name, tmp_path / "base"), max_tokens=513)
    with pytest.raises(
        ValueError, match=r"max_tokens: expected at most 512.*set MAX_TOKENS to 512 or less"
    ):
        fit(demo_pairs[:60], config, tmp_path / "run")


def test_relative_positions_read_beyond_their_training_length(demo_pairs, tmp_path):
    config = make_config(
        "deberta-v3", write_checkpoint("deberta-v3", tmp_path / "base"), train="lora"
    )
    model, tokenizer = load_classifier(config)
    assert read(model, tokenizer, [[5] * 700]).isfinite().all()


def test_a_checkpoint_that_lacks_a_weight_of_its_base_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    file = write_checkpoint("llama", tmp_path / "base") / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 are missing or have another shape: model\.layers\.1\.mlp\.up_proj"
    ):
        load_classifier(make_config("llama", tmp_path / "base"))


def test_the_head_of_a_reward_model_is_dropped_silently(tmp_path, capfd, caplog):
    folder = write_checkpoint("reward", tmp_path / "base")
    capfd.readouterr()
    config = dataclasses.replace(make_config("reward", folder), quantization="4bit")
    model, _ = load_classifier(config)
    assert model.get_base_model().score.weight.shape == (3, 32)
    assert "".join(capfd.readouterr()) == "" and caplog.text == ""


@pytest.mark.parametrize("head", ["joint", "contrast"])
def test_a_head_that_an_older_transformers_keeps_is_dropped(
    head, demo_pairs, tmp_path, monkeypatch
):
    config = make_config(
        "reward", write_checkpoint("reward", tmp_path / "base"), quantization="4bit", head=head
    )
    model, tokenizer = load_classifier(config)
    folder = save_model(model, tokenizer, tmp_path / "run" / "model" / "fold_0")
    load_weights = PreTrainedModel.from_pretrained.__func__

    def keep_head(cls, *args, **options):
        loaded, loading = load_weights(cls, *args, **options)
        loaded.score.weight = nn.Parameter(torch.ones(1, SIZES["hidden_size"]))
        return loaded, loading | {"mismatched_keys": set()}

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(keep_head))
    fresh = load_classifier(config)[0].get_base_model().score.weight
    assert fresh.shape == (3, SIZES["hidden_size"]) and not fresh.any()
    again, _ = load_finetuned(folder, config)
    rows = encode_pairs(demo_pairs[:4], tokenizer, config.max_tokens)
    torch.testing.assert_close(
        read(again, tokenizer, rows), read(model, tokenizer, rows), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "ettin", "qwen3"])
def test_no_checkpoint_keeps_dropout_inside_attention(name, tmp_path):
    config = make_config(name, write_checkpoint(name, tmp_path / "base"), lora_dropout=0.0)
    path = tmp_path / "base" / "config.json"
    stored = {"attention_dropout": 0.1, "attention_probs_dropout_prob": 0.1}
    write_json(path, read_json(path) | stored)
    model, _ = load_classifier(config)
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert all(rate == 0 for n, rate in rates.items() if n.endswith("self.dropout"))
    assert [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")] == (
        [0.0] * 2 if name in ("ettin", "qwen3") else []
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_states_of_any_checkpoint_can_be_read(name, demo_pairs, tmp_path):
    folder = write_checkpoint(name, tmp_path / "base")
    config = make_config(name, folder, train="head", quantization="none", state_layers=(0.5,))
    reader = load_state_reader(config, None)
    tokenizer = load_base_tokenizer(config)
    rows = encode_pairs(demo_pairs[:3], tokenizer, config.max_tokens)
    states = reader.read(rows).astype(np.float32)
    n_layers = read_architecture(config).get_text_config().num_hidden_layers
    assert len(find_layers(reader.model.classifier)) == max(1, round(0.5 * n_layers))
    assert np.isfinite(states).all() and states.shape == (3, reader.width)
    np.testing.assert_allclose(reader.read(rows[:1])[0], states[0], atol=5e-3, rtol=5e-3)
