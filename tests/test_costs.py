import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, ModernBertConfig, Qwen3Config

from src.utils.config import DecoderConfig, FinetuneConfig, SuiteError
from src.utils.models import checkpoints, packing
from src.utils.models.checkpoints import load_classifier
from src.utils.models.packing import collate_packed, enable_packing
from src.utils.training import costs
from src.utils.training.costs import (
    CARDS,
    count_attention,
    count_flops,
    count_frozen,
    count_kept,
    count_layer,
    count_memory,
    count_shape,
    read_machine,
    read_shape,
)

KIB = 1024
LENGTHS = [300, 212, 512]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 384, "num_labels": 3}
KINDS = {"modernbert": FinetuneConfig, "qwen3": DecoderConfig}


def make_architecture(kind, n_layers=4, **changes):
    size = SIZE | SPECIAL | {"num_hidden_layers": n_layers} | changes
    if kind == "modernbert":
        both = {"full_attention": dict(ROPE), "sliding_attention": dict(ROPE)}
        special = {"cls_token_id": 1, "sep_token_id": 2, "rope_parameters": both}
        return ModernBertConfig(num_attention_heads=3, **size, **special)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    return Qwen3Config(**size, **heads, tie_word_embeddings=True)


@pytest.fixture
def make_folder(tiny_base, tmp_path):
    """A function: kind -> folder of a checkpoint with random weights."""
    from transformers import AutoTokenizer

    def make(kind, **changes):
        tokenizer = AutoTokenizer.from_pretrained(tiny_base(kind))
        architecture = make_architecture(kind, vocab_size=len(tokenizer), **changes)
        model = AutoModelForSequenceClassification.from_config(architecture)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def make_config(kind, **changes):
    # Dropout keeps one byte per number on a GPU, which is what is planned, and four on a CPU.
    changes = {"checkpoint": kind, "quantization": "none", "lora_dropout": 0.0} | changes
    return dataclasses.replace(KINDS[kind](), **changes)


def make_model(folder, config):
    """The classifier in the dtypes that it has on a GPU: a frozen base in 16 bit."""
    model, _ = load_classifier(config, folder)
    if config.uses_lora:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return enable_packing(model).train()


def read_packed(model, lengths=LENGTHS):
    rows = [np.random.default_rng(0).integers(3, 500, length) for length in lengths]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**collate_packed(rows)).logits


def measure_kept(model):
    """Bytes kept for the backward pass: each storage once, without the model's own."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # alive, so no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read_packed(model)
    return sum(n_bytes for _, n_bytes in kept.values())


@pytest.fixture
def fused(monkeypatch):
    """On a CPU attention is computed by plain products where these are quicker: not here."""
    monkeypatch.setattr(packing, "_LONGEST_PLAIN", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_layers", [2, 4])
def test_bytes_kept_for_the_backward_pass_are_those_measured(kind, n_layers, make_folder, fused):
    config = make_config(kind, gradient_checkpointing=False)
    architecture = make_architecture(kind, n_layers)
    measured = measure_kept(make_model(make_folder(kind, n_layers=n_layers), config))
    # A CPU has grouped heads in its fused attention, as the kernel of newer GPUs.
    shape = count_shape(architecture, config)
    planned = count_kept(shape, config, has_kernel=kind == "qwen3") * sum(LENGTHS)
    # Autocast's copies of the trained matrices are kept, too.
    planned += 2 * (shape.n_trained(config) if config.uses_lora else shape.n_linear)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_kept_with_gradient_checkpointing_are_those_measured(kind, make_folder, fused):
    config = make_config(kind, gradient_checkpointing=True)
    measured = measure_kept(make_model(make_folder(kind), config))
    shape = count_shape(make_architecture(kind), config)
    planned = count_kept(shape, config, has_kernel=False)
    assert planned * sum(LENGTHS) == pytest.approx(measured, rel=0.05)
    # One layer at a time is computed again, and keeps what it keeps without checkpointing.
    _, per_token = count_memory(shape, config, CARDS["T4"])
    backward = 2 * shape.mlp + 8 * shape.hidden
    assert per_token == planned + count_layer(shape, config, has_kernel=False) + backward


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_exactly(kind, make_folder):
    for train in ("all", "lora"):
        for head in ("joint", "contrast"):
            config = make_config(kind, train=train, head=head)
            folder = make_folder(kind)
            model, _ = load_classifier(config, folder)
            shape = read_shape(config, folder)
            trained = [weight.numel() for weight in model.parameters() if weight.requires_grad]
            assert shape.n_trained(config) == sum(trained), (train, head)
            if train == "all":
                assert shape.n_weights == sum(trained)


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_frozen_weights_take_the_bytes_of_a_quantised_model(quantization, make_folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "choose_dtype", lambda *_: torch.bfloat16)
    config = make_config("qwen3", quantization=quantization)
    folder = make_folder("qwen3", hidden_size=512, intermediate_size=1024)
    model = load_classifier(config, folder)[0]
    n_bytes = 0
    for name, weight in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            n_bytes += weight.nbytes
            if (scales := getattr(weight, "quant_state", None)) is not None:
                n_bytes += scales.absmax.nbytes + scales.state2.absmax.nbytes
            if (scales := getattr(weight, "SCB", None)) is not None:
                n_bytes += scales.nbytes
    planned = count_frozen(read_shape(config, folder), quantization)
    assert planned == pytest.approx(n_bytes, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_flops_of_training_are_those_counted(kind, is_recomputed, make_folder):
    config = make_config(kind, gradient_checkpointing=is_recomputed)
    model = make_model(make_folder(kind), config)
    with FlopCounterMode(display=False) as counter:
        read_packed(model).sum().backward()
    shape = count_shape(make_architecture(kind), config)
    planned, _ = count_flops(shape, config, np.array(LENGTHS), has_kernel=False)
    if kind == "qwen3":  # the counter does not know the fused attention of CPUs
        passes = 2 + 2.5 if is_recomputed else 1 + 2.5
        planned -= passes * count_attention(shape, np.array(LENGTHS), has_kernel=False)
    assert planned * sum(LENGTHS) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_attention_are_those_of_its_products(kind):
    config, lengths = make_config(kind), np.array([500])
    architecture = make_architecture(kind)
    architecture.layer_types = ["full_attention"] * 4
    architecture._attn_implementation = "eager"  # computes every score, also those behind the mask
    model = AutoModelForSequenceClassification.from_config(architecture)
    options = {"use_cache": False} if kind == "qwen3" else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, 500), 5), **options)
    shape = count_shape(architecture, config)
    attention = count_attention(shape, lengths, has_kernel=False)
    products = counter.get_total_flops() / 500 - 2 * shape.n_linear
    assert attention * (2 if kind == "qwen3" else 1) == pytest.approx(products, rel=0.05)


def test_the_default_checkpoints_are_known_without_a_network():
    encoder, decoder = FinetuneConfig(), DecoderConfig()
    shape = read_shape(encoder)
    assert shape.n_weights == 149_607_171
    # Kept for a token where there is no kernel, measured: 652 KiB without the weights' copies.
    layers = shape.n_layers * count_layer(shape, encoder, has_kernel=False)
    assert layers / KIB == pytest.approx(652, rel=0.02)
    shape = read_shape(decoder)
    assert shape.n_trained(decoder) == 66_060_288 + 3 * 2560
    # Of one layer, measured with dropout that keeps two bytes per number: 229 KiB.
    dropout = shape.linear_in / shape.n_layers
    layer = count_layer(shape, decoder, has_kernel=True) + dropout
    assert layer / KIB == pytest.approx(229, rel=0.05)
    assert count_frozen(shape, "4bit") / 2**30 == pytest.approx(2.47, abs=0.02)


def test_a_checkpoint_that_cannot_be_read_is_named(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", fail)
    with pytest.raises(OSError, match=r"owner/unknown.*no network"):
        read_shape(FinetuneConfig(checkpoint="owner/unknown"))


def test_other_architectures_are_counted_from_their_config(tmp_path):
    from transformers import BertConfig

    folder = tmp_path / "bert"
    BertConfig(**SIZE, num_hidden_layers=2, num_attention_heads=4).save_pretrained(folder)
    config = FinetuneConfig(checkpoint=str(folder))
    model = AutoModelForSequenceClassification.from_config(BertConfig.from_pretrained(folder))
    shape = read_shape(config)
    assert shape.n_weights >= sum(weight.numel() for weight in model.parameters())
    assert not shape.is_packed and not shape.is_causal


def test_a_machine_is_named_by_memory_or_by_card():
    assert read_machine("2x16") == read_machine("2xT4")
    assert (read_machine("4xA100").n_gpus, read_machine("4xA100").gib) == (4, CARDS["A100"].gib)
    assert read_machine("t4") == read_machine("16") == CARDS["T4"]
    assert read_machine("2xT4").hours(1e18) == read_machine("T4").hours(1e18) / 2
    for wrong in ("", "0xT4", "2x17", "V100"):
        with pytest.raises(SuiteError, match="2xA100"):
            read_machine(wrong)


def test_a_cpu_is_measured():
    machine = costs.find_machine()
    assert machine.n_gpus in (0, torch.cuda.device_count())
    assert 1e-3 < machine.tflops < 2000
