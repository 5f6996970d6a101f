"""Claims about the states of a frozen base, and a head on them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.batches import collate
from src.utils.models.checkpoints import (
    find_base_folder,
    load_classifier,
    load_finetuned,
    load_frozen,
    write_head,
)
from src.utils.models.frozen import DavidsonHead, choose_layers, find_layers, load_head
from src.utils.models.heads import find_answers
from src.utils.models.template import encode_pairs

KINDS = {"modernbert": FinetuneConfig, "qwen3": DecoderConfig}


def make_config(kind, **changes):
    options = {"quantization": "none", "state_layers": (0.5, 1.0)} | changes
    return KINDS[kind](f"tiny:{kind}", "", train="head", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_layers_at_the_places_that_are_named(kind, tiny_base, demo_pairs):
    config = make_config(kind)
    frozen, tokenizer = load_frozen(config, tiny_base(kind))
    model, _ = load_classifier(config, tiny_base(kind))
    rows = encode_pairs(demo_pairs[:5], tokenizer, 160)
    batch = collate(rows, tokenizer.pad_token_id)
    outputs = {}
    for number, layer in enumerate(find_layers(model)):
        layer.register_forward_hook(
            lambda module, args, output, number=number: outputs.update({number: output})
        )
    with torch.no_grad():
        states = frozen.read_states(**batch).unflatten(1, (2, 3, 64))
        model.eval()(**batch)
    for row, tokens in enumerate(rows):
        (start_a, end_a), (start_b, end_b) = find_answers(tokens, frozen.pieces)
        for layer in (0, 1):
            found = outputs[layer][row]
            readout = found[len(tokens) - 1 if kind == "qwen3" else 0]
            torch.testing.assert_close(states[row, layer, 0], readout)
            torch.testing.assert_close(states[row, layer, 1], found[start_a:end_a].mean(0))
            torch.testing.assert_close(states[row, layer, 2], found[start_b:end_b].mean(0))


def test_an_empty_answer_has_zeros_and_a_state_that_overflows_is_nan(tiny_base, ugly_pairs):
    frozen, tokenizer = load_frozen(make_config("qwen3"), tiny_base("qwen3"))
    rows = encode_pairs(ugly_pairs, tokenizer, 160)
    with torch.no_grad():
        states = frozen.read_states(**collate(rows, tokenizer.pad_token_id))
    states = states.unflatten(1, (2, 3, 64))
    assert states.isfinite().all()
    is_empty = ugly_pairs["response_a"].map(lambda turns: not "".join(map(str, turns)))
    assert is_empty.any() and (states[np.flatnonzero(is_empty)][:, :, 1] == 0).all()
    find_layers(frozen.classifier)[0].register_forward_hook(lambda *call: call[2] * torch.inf)
    assert frozen.read_states(**collate(rows[:1], tokenizer.pad_token_id)).isnan().any()


def test_layers_above_the_last_that_is_read_are_not_run(tiny_base):
    frozen, _ = load_frozen(make_config("qwen3", state_layers=(0.5,)), tiny_base("qwen3"))
    assert len(find_layers(frozen.classifier)) == 1 and frozen.n_states == 3 * 64
    assert choose_layers((0.01, 0.5, 0.52, 1.0), 12) == [1, 6, 12]


def test_a_head_is_symmetric_whatever_its_weights():
    torch.manual_seed(0)
    head, states = DavidsonHead(2, 8), torch.randn(50, 2, 3, 8)
    exchanged = states[:, :, [0, 2, 1]]
    for weight in head.parameters():
        nn.init.normal_(weight)
    with torch.no_grad():
        head.weights[1], head.biases[0] = 0, 0  # the say of the read-out for an answer
        given, turned = head(states.flatten(1)), head(exchanged.flatten(1))
    torch.testing.assert_close(turned, given[:, [1, 0, 2]], atol=1e-6, rtol=0)
    assert given.std(dim=0).min() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_gives_its_logits_again(kind, tiny_base, demo_pairs, tmp_path):
    config = make_config(kind)
    frozen, tokenizer = load_frozen(config, tiny_base(kind))
    frozen.head = DavidsonHead(*frozen.head_shape)
    for weight in frozen.head.parameters():
        nn.init.normal_(weight, std=0.1)
    folder = tmp_path / "model" / "fold_0"
    folder.mkdir(parents=True)
    source = find_base_folder(config, tiny_base(kind))
    write_head(frozen.head, config, source, tokenizer, folder)
    again, _ = load_finetuned(folder, config, tiny_base(kind))
    batch = collate(encode_pairs(demo_pairs[:5], tokenizer, 160), tokenizer.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, frozen(**batch).logits)
    with pytest.raises(ValueError, match=r"on 1 layers of 64 states.*found \(2, 64\)"):
        load_head(folder, 1, 64)
    save_file({"0.weight": torch.zeros(3, 384)}, folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"found another kind of head; train it again"):
        load_head(folder, 2, 64)


def test_a_head_does_not_go_onto_another_base(tiny_base, demo_pairs, tmp_path):
    config = make_config("qwen3")
    frozen, tokenizer = load_frozen(config, tiny_base("qwen3"))
    write_head(DavidsonHead(*frozen.head_shape), config, tiny_base("qwen3"), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"expected the weights of .*hash"):
        load_finetuned(tmp_path, config, tiny_base("modernbert"))
