import dataclasses
import json
import os
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models import checkpoints
from src.utils.models.bases import prepare_base
from src.utils.models.batches import collate
from src.utils.models.checkpoints import (
    check_base,
    hash_base,
    head_names,
    in_float32,
    load_classifier,
    load_finetuned,
    merge,
    save_model,
)
from src.utils.models.template import encode_pairs

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="", max_tokens=128)
DECODER = DecoderConfig(
    checkpoint="tiny:qwen3", revision="", quantization="none", lora_rank=4, max_tokens=192
)


def logits_of(model, tokenizer, pairs):
    batch = collate(encode_pairs(pairs, tokenizer, 192), tokenizer.pad_token_id)
    with torch.no_grad():
        return model.eval()(**batch).logits.double()


def train_a_little(model, tokenizer, pairs, n_steps=3):
    batch = collate(encode_pairs(pairs, tokenizer, 192), tokenizer.pad_token_id)
    labels = torch.tensor(pairs["label"].to_numpy())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(**batch).logits.float(), labels).backward()
        optimizer.step()


def test_a_tiny_checkpoint_has_the_architecture_of_the_real_one(tiny_base):
    encoder, _ = load_classifier(ENCODER, tiny_base("modernbert"))
    decoder, _ = load_classifier(dataclasses.replace(DECODER, train="all"), tiny_base("qwen3"))
    assert type(encoder).__name__ == "ModernBertForSequenceClassification"
    assert {"full_attention", "sliding_attention"} == set(encoder.config.layer_types)
    assert type(decoder).__name__ == "Qwen3ForSequenceClassification"
    assert decoder.config.num_key_value_heads < decoder.config.num_attention_heads
    for model in (encoder, decoder):
        assert 0.15e6 < sum(p.numel() for p in model.parameters()) < 2e6
        assert model.config.num_labels == 3


@pytest.mark.parametrize("head", ["joint", "contrast"])
def test_a_new_head_on_large_states_starts_at_equal_probabilities_and_a_trained_one_is_kept(
    head, demo_pairs, tmp_path
):
    config = dataclasses.replace(DECODER, head=head)
    base = prepare_base(config, demo_pairs, tmp_path / "run" / "base", n_steps=0)
    assert logits_of(*load_classifier(config, base), demo_pairs[:8]).any()  # random on small states
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 50  # last states as large as those of a real decoder
    save_file(weights, file, metadata={"format": "pt"})
    model, tokenizer = load_classifier(config, base)
    labels = torch.tensor(demo_pairs["label"][:8].to_numpy())
    loss = nn.functional.cross_entropy(logits_of(model, tokenizer, demo_pairs[:8]), labels)
    assert loss == pytest.approx(np.log(3), abs=1e-6)
    train_a_little(model, tokenizer, demo_pairs[:8])
    trained = logits_of(model, tokenizer, demo_pairs[:8])
    folder = save_model(model, tokenizer, tmp_path / "run" / "model" / "fold_0")
    again, _ = load_finetuned(folder, config)
    assert trained.std() > 0.1
    torch.testing.assert_close(
        logits_of(again, tokenizer, demo_pairs[:8]), trained, atol=1e-4, rtol=1e-4
    )


def test_a_missing_tiny_checkpoint_names_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"call prepare_base\(\) first"):
        load_classifier(ENCODER, tmp_path)


def test_an_unreachable_checkpoint_names_the_remedies(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")

    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(
        OSError, match=r"answerdotai/ModernBERT-base.*HF_HOME.*CHECKPOINT.*PROFILE=demo"
    ):
        load_classifier(FinetuneConfig())


def test_every_part_is_loaded_at_the_revision_and_without_remote_code(monkeypatch, tiny_base):
    config, seen = FinetuneConfig(), {}
    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForSequenceClassification"):
        loader = getattr(checkpoints, name)

        def record(source, name=name, load=loader.from_pretrained, **options):
            if source == config.checkpoint:
                seen[name] = options
            return load(tiny_base("modernbert"), **options | {"revision": "main"})

        monkeypatch.setattr(loader, "from_pretrained", record)
    load_classifier(config)
    assert len(seen) == 3
    assert {options["revision"] for options in seen.values()} == {config.revision}
    assert {options["trust_remote_code"] for options in seen.values()} == {False}
    assert seen["AutoModelForSequenceClassification"]["use_safetensors"] is True


def test_a_bf16_checkpoint_is_trained_in_32_bit(tiny_base, tmp_path):
    model, tokenizer = load_classifier(ENCODER, tiny_base("modernbert"))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_classifier(ENCODER, tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_lora_sits_on_every_linear_layer_of_attention_and_mlp_and_the_head_is_trained(tiny_base):
    encoder, _ = load_classifier(
        dataclasses.replace(ENCODER, train="lora"), tiny_base("modernbert")
    )
    decoder, _ = load_classifier(DECODER, tiny_base("qwen3"))
    names = {
        kind: {n for n, p in m.named_parameters() if p.requires_grad}
        for kind, m in (("encoder", encoder), ("decoder", decoder))
    }
    for layer in ("Wqkv", "Wo", "Wi"):
        assert any(f".{layer}.lora_A" in name for name in names["encoder"])
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(f".{layer}.lora_A" in name for name in names["decoder"])
    assert any("classifier.modules_to_save" in name for name in names["encoder"])
    assert any("head.modules_to_save" in name for name in names["encoder"])
    assert any("score.modules_to_save" in name for name in names["decoder"])
    for model in (encoder, decoder):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in n or "modules_to_save" in n for n, _ in trained)
        assert {p.dtype for _, p in trained} == {torch.float32}


@pytest.mark.parametrize(
    ("quantization", "layer"), [("8bit", bnb.nn.Linear8bitLt), ("4bit", bnb.nn.Linear4bit)]
)
def test_the_base_is_quantised_and_the_head_is_not(tiny_base, quantization, layer):
    model, _ = load_classifier(
        dataclasses.replace(DECODER, quantization=quantization), tiny_base("qwen3")
    )
    plain = model.get_base_model()
    assert sum(isinstance(m, layer) for m in plain.model.modules()) == 14
    assert not any(isinstance(m, layer) for m in plain.score.modules())
    assert head_names(plain) == ["score"]
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())


@pytest.mark.parametrize(("config", "kind"), [(ENCODER, "modernbert"), (DECODER, "qwen3")])
def test_gradient_checkpointing_keeps_the_gradients_and_fewer_bytes(
    tiny_base, demo_pairs, config, kind
):
    def gradient(is_on):
        model, tokenizer = load_classifier(
            dataclasses.replace(config, gradient_checkpointing=is_on, lora_dropout=0.0),
            tiny_base(kind),
        )
        batch = collate(encode_pairs(demo_pairs[:4], tokenizer, 192), tokenizer.pad_token_id)
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 1, 2, 0]))
        n_bytes = sum(kept.values())
        loss.backward()
        return n_bytes, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    (few, again), (many, once) = gradient(True), gradient(False)
    torch.testing.assert_close(again, once)
    assert once.abs().max() > 0 and few < many / 2


def test_an_older_transformers_checkpoints_by_another_name(tiny_base, monkeypatch):
    given = []
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(
        PreTrainedModel,
        "gradient_checkpointing_enable",
        lambda self, **options: given.append(options),
    )
    load_classifier(dataclasses.replace(DECODER, gradient_checkpointing=True), tiny_base("qwen3"))
    assert given == [{"gradient_checkpointing_kwargs": {"use_reentrant": False}}]


def test_gradients_of_a_4bit_base_are_right_after_an_evaluation(tiny_base, demo_pairs):
    model, tokenizer = load_classifier(
        dataclasses.replace(DECODER, quantization="4bit"), tiny_base("qwen3")
    )
    batch = collate(encode_pairs(demo_pairs[:4], tokenizer, 192), tokenizer.pad_token_id)
    labels = torch.tensor(demo_pairs["label"][:4].to_numpy())

    def gradient():
        model.zero_grad()
        nn.functional.cross_entropy(model.eval()(**batch).logits, labels).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradient()
    logits_of(model, tokenizer, demo_pairs[:4])
    assert torch.equal(before, gradient())
    assert before.abs().max() > 0


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_saved_adapters_load_to_the_same_probabilities(
    tiny_base, demo_pairs, tmp_path, quantization
):
    config = dataclasses.replace(DECODER, quantization=quantization)
    model, tokenizer = load_classifier(config, tiny_base("qwen3"))
    train_a_little(model, tokenizer, demo_pairs[:4])
    folder = save_model(model, tokenizer, tmp_path / "fold_0")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert any("score" in name for name in file.keys())  # noqa: SIM118
        assert not any("embed_tokens" in name for name in file.keys())  # noqa: SIM118
    again, _ = load_finetuned(folder, config, tiny_base("qwen3"))
    assert not again.training
    torch.testing.assert_close(
        logits_of(again, tokenizer, demo_pairs[:8]),
        logits_of(model, tokenizer, demo_pairs[:8]),
        atol=1e-6,
        rtol=0,
    )


def test_a_saved_encoder_is_complete_and_safe(tiny_base, demo_pairs, tmp_path):
    model, tokenizer = load_classifier(ENCODER, tiny_base("modernbert"))
    train_a_little(model, tokenizer, demo_pairs[:4])
    folder = save_model(model, tokenizer, tmp_path / "fold_0")
    assert not [file for file in os.listdir(folder) if file.endswith((".bin", ".pt", ".pkl"))]
    again, _ = load_finetuned(folder, ENCODER)
    torch.testing.assert_close(
        logits_of(again, tokenizer, demo_pairs[:8]),
        logits_of(model, tokenizer, demo_pairs[:8]),
        atol=1e-6,
        rtol=0,
    )


def test_a_model_of_another_template_is_refused(tiny_base, tmp_path, monkeypatch):
    folder = save_model(*load_classifier(ENCODER, tiny_base("modernbert")), tmp_path / "fold_0")
    monkeypatch.setattr(checkpoints, "TEMPLATE_VERSION", checkpoints.TEMPLATE_VERSION + 1)
    with pytest.raises(ValueError, match="train it again"):
        load_finetuned(folder, ENCODER)


def test_adapters_refuse_another_base(tiny_base, demo_pairs, tmp_path):
    folder = save_model(*load_classifier(DECODER, tiny_base("qwen3")), tmp_path / "fold_0")
    other = prepare_base(dataclasses.replace(DECODER, seed=7), demo_pairs, tmp_path / "other", 0)
    assert check_base(folder, tiny_base("qwen3")) == tiny_base("qwen3")
    with pytest.raises(ValueError, match=rf"other.*{hash_base(tiny_base('qwen3'))}.*fold_0"):
        load_finetuned(folder, DECODER, other)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_merging_gives_a_plain_model_with_the_same_probabilities(
    tiny_base, demo_pairs, tmp_path, quantization
):
    config = dataclasses.replace(DECODER, quantization=quantization)
    model, tokenizer = load_classifier(config, tiny_base("qwen3"))
    train_a_little(model, tokenizer, demo_pairs[:4])
    folder = save_model(model, tokenizer, tmp_path / "fold_0")
    merged, _ = merge(folder, config, tiny_base("qwen3"))
    plain = dataclasses.replace(config, quantization="none")
    unmerged, _ = load_finetuned(folder, plain, tiny_base("qwen3"))
    assert not isinstance(merged, PeftModel)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(
        logits_of(merged, tokenizer, demo_pairs[:8]),
        logits_of(unmerged, tokenizer, demo_pairs[:8]),
        atol=1e-5,
        rtol=0,
    )


def test_an_interrupted_save_keeps_the_model_that_was_there(tiny_base, tmp_path, monkeypatch):
    model, tokenizer = load_classifier(ENCODER, tiny_base("modernbert"))
    folder = save_model(model, tokenizer, tmp_path / "fold_0")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(model.half(), tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["fold_0"]


@pytest.mark.slow
def test_importing_the_trainer_prints_nothing():
    command = [sys.executable, "-c", "import src.utils.training.trainer"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_modernbert_is_not_compiled_where_transformers_would(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("modernbert"), tmp_path / "base")
    plain, _ = load_classifier(ENCODER, folder)
    assert not hasattr(plain.config, "reference_compile")
    config = json.loads((folder / "config.json").read_text())
    # As the configuration of transformers 5.0 has it: None stands for "yes, on a GPU".
    (folder / "config.json").write_text(json.dumps(config | {"reference_compile": None}))
    model, _ = load_classifier(ENCODER, folder)
    assert model.config.reference_compile is False
    assert model.model.config.reference_compile is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_published_decoder_keeps_the_dtype_that_it_was_saved_in(
    tiny_base, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr(checkpoints, "choose_dtype", lambda device: dtype)
    folder = save_model(*load_classifier(DECODER, tiny_base("qwen3")), tmp_path / "fold_0")
    published = save_model(*merge(folder, DECODER, tiny_base("qwen3")), tmp_path / "model")
    monkeypatch.undo()
    model, _ = load_finetuned(published, dataclasses.replace(DECODER, train="all"))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_4bit_model_whose_inputs_overflow_16_bit_is_finite_in_32(tiny_base, demo_pairs):
    model, tokenizer = load_classifier(
        dataclasses.replace(DECODER, quantization="4bit"), tiny_base("qwen3")
    )
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.compute_dtype = torch.float16  # as on a T4
    norm = model.get_base_model().model.layers[0].post_attention_layernorm
    nn.init.constant_(norm.weight, 1e4)  # what the MLP multiplies is beyond 65,504 then
    assert not torch.isfinite(logits_of(model, tokenizer, demo_pairs[:4])).any()
    with pytest.raises(KeyError), in_float32(model):
        assert torch.isfinite(logits_of(model, tokenizer, demo_pairs[:4])).all()
        raise KeyError
    assert layers and {layer.compute_dtype for layer in layers} == {torch.float16}


def test_half_precision_is_restored_exactly():
    model = nn.Linear(3, 3).half()
    weight = model.weight.detach().clone()
    with in_float32(model):
        assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, weight) and model.weight.dtype == torch.float16
