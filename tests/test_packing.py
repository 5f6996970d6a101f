"""Claims about packed rows: equal to padded batches, in linear memory, on known models."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from src.utils.config import DecoderConfig
from src.utils.models import packing
from src.utils.models.batches import collate
from src.utils.models.checkpoints import load_classifier, load_finetuned, save_model
from src.utils.models.packing import can_pack, collate_packed, enable_packing

N_WORDS = 500
WINDOW = 16  # local_attention: 8 tokens to each side
ENDS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {
    "vocab_size": N_WORDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "num_labels": 3,
    "pad_token_id": 0,
}


def make_encoder(**settings):
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=N_WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        local_attention=WINDOW,
        initializer_range=0.1,
        num_labels=3,
        **(ENDS | {"num_hidden_layers": 4} | settings),
    )
    return ModernBertForSequenceClassification._from_config(config, attn_implementation="sdpa")


def make_decoder(cls, config, **settings):
    torch.manual_seed(0)
    return cls._from_config(config(**(DECODER | settings)), attn_implementation="sdpa")


MODELS = {
    "modernbert": make_encoder,
    "modernbert, mean": lambda: make_encoder(classifier_pooling="mean"),
    "modernbert, last layer local": lambda: make_encoder(num_hidden_layers=3),
    "qwen3": lambda: make_decoder(Qwen3ForSequenceClassification, Qwen3Config),
    "llama": lambda: make_decoder(LlamaForSequenceClassification, LlamaConfig),
    "mistral": lambda: make_decoder(
        MistralForSequenceClassification, MistralConfig, sliding_window=10
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make_rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, N_WORDS, length) for length in lengths]


# One to three tokens, around the window and the size of a chunk, and longer than both.
ROWS = make_rows(40, 1, 2, 3, 7, 8, 9, 15, 16, 17, 150, 63, 64, 65, 31)


def read(model, batch, weights=None):
    """Logits, and the gradients of a loss that no document can hide in."""
    model.zero_grad()
    logits = model(**batch).logits.float()
    signs = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits * signs + logits.square()).sum().backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_equal_readings(packed, padded, tolerance=1e-5):
    torch.testing.assert_close(packed[0], padded[0], atol=tolerance, rtol=0)
    assert packed[1].keys() == padded[1].keys() and packed[1]
    for name, gradient in padded[1].items():
        distance = (packed[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert distance < tolerance, f"{name}: {distance:.1e}"


# ---- equal to the padded model -------------------------------------------------


@every_model
def test_packed_logits_and_gradients_equal_the_padded_ones(name):
    model = MODELS[name]().eval()
    padded = read(model, collate(ROWS, 0))
    packed = read(enable_packing(model), collate_packed(ROWS))
    assert padded[0].std(dim=0).min() > 0.1
    assert_equal_readings(packed, padded)


@every_model
def test_a_padded_batch_is_read_as_before(name):
    model = MODELS[name]().eval()
    before = read(model, collate(ROWS, 0))
    after = read(enable_packing(model), collate(ROWS, 0))
    assert_equal_readings(after, before, tolerance=1e-9)


@every_model
def test_a_document_sees_nothing_of_its_neighbours(name):
    model = enable_packing(MODELS[name]()).eval()
    others = [
        row if place % 2 else make_rows(len(row), seed=9)[0] for place, row in enumerate(ROWS)
    ]
    with torch.no_grad():
        one, two = (model(**collate_packed(rows)).logits for rows in (ROWS, others))
    torch.testing.assert_close(one[1::2], two[1::2], atol=1e-6, rtol=0)
    assert (one[0::2] - two[0::2]).abs().max(dim=1).values.min() > 1e-3


@pytest.mark.parametrize("lengths", [(1,), (64,), (200,), (1, 1, 1), (128, 128)])
def test_rows_of_any_number_of_documents_are_read(lengths):
    rows, model = make_rows(*lengths), make_encoder().eval()
    padded = read(model, collate(rows, 0))
    assert_equal_readings(read(enable_packing(model), collate_packed(rows)), padded)


def decoder_of(tiny_base, **settings):
    config = DecoderConfig(checkpoint="tiny:qwen3", revision="", **settings)
    return load_classifier(config, tiny_base("qwen3")), config


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_lora_adapters_get_the_same_gradients_packed(tiny_base, quantization):
    (model, _), _ = decoder_of(tiny_base, quantization=quantization, lora_rank=4, lora_dropout=0.0)
    model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    padded = read(model, collate(ROWS, 0))
    packed = read(enable_packing(model), collate_packed(ROWS))
    assert any("lora_A" in name for name in packed[1]) and any(
        "score" in name for name in packed[1]
    )
    assert_equal_readings(packed, padded)


@every_model
def test_half_precision_stays_close(name):
    model = MODELS[name]().eval()
    exact = model(**collate(ROWS, 0)).logits
    enable_packing(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, padded = model(**collate_packed(ROWS)).logits, model(**collate(ROWS, 0)).logits
    assert packed.dtype == padded.dtype
    assert (packed - exact).abs().max() < 2 * (padded - exact).abs().max()


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_gradient_checkpointing_changes_nothing(name):
    model = enable_packing(MODELS[name]()).train()
    plain = read(model, collate_packed(ROWS))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_equal_readings(read(model, collate_packed(ROWS)), plain, tolerance=1e-6)


# ---- memory --------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.n_elements = max(self.n_elements, part.numel())
        return result


def test_memory_of_local_layers_grows_with_the_tokens_alone():
    model = enable_packing(
        make_encoder(layer_types=["sliding_attention"] * 3, num_hidden_layers=3)
    ).train()

    def largest(*lengths):
        with Largest() as spy:
            read(model, collate_packed(make_rows(*lengths)))
        return spy.n_elements

    embeddings = N_WORDS * 64  # their gradient
    assert largest(4096) < 4096**2 / 10
    assert largest(4096) <= max(embeddings, 2.1 * largest(2048))


def test_no_mask_of_the_whole_row_is_made():
    for name in ("modernbert", "qwen3", "llama"):
        model = enable_packing(MODELS[name]()).eval()
        with Largest() as spy, torch.no_grad():
            model(**collate_packed(make_rows(*[32] * 64)))
        assert spy.n_elements < (32 * 64) ** 2 / 10, name


# ---- models --------------------------------------------------------------------


def test_other_architectures_and_attentions_stay_padded():
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    eager = make_encoder()
    eager.set_attn_implementation("eager")
    assert not can_pack(bert) and not can_pack(eager) and not can_pack(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="BertForSequenceClassification"):
        enable_packing(bert)
    assert all(can_pack(make()) for make in MODELS.values())


def test_packing_is_enabled_once_and_keeps_the_class(tmp_path):
    model = make_encoder().eval()
    expected = model(**collate(ROWS, 0)).logits
    for _ in range(2):
        assert enable_packing(model) is model and can_pack(model)
        assert type(model) is ModernBertForSequenceClassification
        read_again = model(**collate_packed(ROWS)).logits
        torch.testing.assert_close(read_again, expected, atol=1e-5, rtol=0)


def test_a_copy_of_a_packing_model_has_weights_of_its_own():
    model = enable_packing(make_encoder()).eval()
    before = model(**collate_packed(ROWS)).logits
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.classifier.weight)
    assert (twin(**collate_packed(ROWS)).logits - before).abs().max() > 0.01
    torch.testing.assert_close(model(**collate_packed(ROWS)).logits, before, atol=0, rtol=0)


def test_a_saved_model_is_one_of_its_own_class(tmp_path):
    model = enable_packing(make_encoder()).eval()
    model.save_pretrained(tmp_path)
    assert "sdpa_by_document" not in (tmp_path / "config.json").read_text()
    again = ModernBertForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="sdpa"
    ).eval()
    assert type(again) is ModernBertForSequenceClassification and again.config.architectures == [
        type(again).__name__
    ]
    with torch.no_grad():
        expected = model(**collate_packed(ROWS)).logits
        torch.testing.assert_close(again(**collate(ROWS, 0)).logits, expected, atol=1e-5, rtol=0)


def test_saved_adapters_sit_on_a_plain_base(tiny_base, tmp_path):
    (model, tokenizer), config = decoder_of(tiny_base, quantization="none", lora_rank=4)
    enable_packing(model).eval()
    folder = save_model(model, tokenizer, tmp_path / "model" / "fold_0")
    again, _ = load_finetuned(folder, config, tiny_base("qwen3"))
    assert (
        isinstance(again, PeftModel)
        and type(again.get_base_model()) is Qwen3ForSequenceClassification
    )
    with torch.no_grad():
        expected = model(**collate_packed(ROWS)).logits
        torch.testing.assert_close(again(**collate(ROWS, 0)).logits, expected, atol=1e-5, rtol=0)


def test_the_kernel_gets_the_packed_layout(monkeypatch):
    """A stand-in for the kernel of a GPU computes the same by a mask."""

    def varlen(
        query,
        key,
        value,
        *,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale,
        window_size,
        enable_gqa,
        num_splits,
    ):
        assert num_splits is None and torch.is_grad_enabled()
        assert cu_seq_q is cu_seq_k and max_q == max_k == max(map(len, ROWS))
        place = torch.arange(len(query))
        owner = torch.bucketize(place, cu_seq_q[1:], right=True)
        far_left, far_right = (len(query) if far < 0 else far for far in window_size)
        offset = place[None] - place[:, None]
        mask = (owner[:, None] == owner[None]) & (offset >= -far_left) & (offset <= far_right)
        states = (states.transpose(0, 1)[None] for states in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(
            *states, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        return attended[0].transpose(0, 1)

    monkeypatch.setattr(packing, "varlen_attn", varlen)
    for make in MODELS.values():
        model = make().eval()
        padded = read(model, collate(ROWS, 0))
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_has_kernel", lambda query: True)
            assert_equal_readings(read(enable_packing(model), collate_packed(ROWS)), padded)


def test_the_kernel_of_an_older_torch_is_not_used(monkeypatch):
    def of_2_10(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
    ):
        """Without windows and scale."""

    def of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        """Without grouped heads."""

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=None)
    assert packing._has_kernel(query)
    for kernel in (of_2_10, of_2_11):
        monkeypatch.setattr(packing, "varlen_attn", kernel)
        assert not packing._has_kernel(query)


@pytest.mark.parametrize(
    ("capability", "dtype", "has_bias", "expected"),
    [
        ((8, 0), torch.bfloat16, False, True),
        ((7, 5), torch.float16, False, False),  # a T4
        ((8, 0), torch.float16, True, False),  # flash attention takes no bias
        ((9, 0), torch.float32, False, False),  # nor 32 bit, in which overflows are read again
    ],
)
def test_key_heads_stay_grouped_only_where_flash_attention_takes_them(
    monkeypatch, capability, dtype, has_bias, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, device=None)
    bias = torch.zeros(1) if has_bias else None
    assert packing._groups_heads(query, bias) is expected
    assert packing._groups_heads(torch.zeros(1), bias)


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral"])
def test_without_flash_attention_key_heads_are_repeated_and_nothing_else_changes(name, monkeypatch):
    model = MODELS[name]().eval()
    padded = read(model, collate(ROWS, 0))
    shapes = set()
    attend = nn.functional.scaled_dot_product_attention

    def note(query, key, value, *args, enable_gqa=False, **options):
        shapes.add((query.shape[1], key.shape[1], value.shape[1], enable_gqa))
        return attend(query, key, value, *args, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(packing, "_groups_heads", lambda query, bias: False)
    monkeypatch.setattr(packing.F, "scaled_dot_product_attention", note)
    packed = read(enable_packing(model), collate_packed(ROWS))
    assert shapes == {(4, 4, 4, False)}
    assert_equal_readings(packed, padded)


def test_the_kernel_splits_no_keys_in_inference_so_that_neighbours_change_nothing(monkeypatch):
    seen = []

    def varlen(query, key, value, *, num_splits=None, **options):
        seen.append(num_splits)
        return query

    def attend():
        documents = packing.Documents(torch.tensor([0, 3, 5], dtype=torch.int32))
        states = [torch.zeros(1, 2, 5, 8)] * 3
        packing._Attention(*states, documents, True, None, 0.0, None).with_kernel()

    monkeypatch.setattr(packing, "varlen_attn", varlen)
    attend()
    with torch.no_grad():
        attend()
    assert seen == [None, 1]


def test_documents_follow_one_another():
    batch = collate_packed([[5, 6, 7], np.array([8, 9], dtype=np.int32)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5] and batch["cu_seq_lens"].dtype == torch.int32
