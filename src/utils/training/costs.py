"""What models cost and machines offer: weights, FLOPs and bytes per token, from a model's shape.

`tests/test_costs.py` compares the arithmetic with bytes and FLOPs that are measured.
"""

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import ModernBertConfig, Qwen3Config

from src.utils.config import FinetuneConfig, SuiteError
from src.utils.models.checkpoints import head_names, make_skeleton, read_architecture
from src.utils.models.frozen import N_STATES, choose_layers
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.packing import can_pack

GIB = 2**30
CONTEXT_GIB = 0.7  # CUDA context and workspaces of cuBLAS


@dataclass(frozen=True)
class Machine:
    """One or several equal GPUs; 0 stands for the CPU."""

    name: str
    gib: float  # memory of one GPU that a process finds
    tflops: float  # of one GPU, peak of dense 16-bit products that are summed in 32 bit
    utilisation: float  # share of the peak that training reaches
    has_kernel: bool = True  # flash attention reads packed rows, from capability 8.0 on
    n_gpus: int = 1

    def hours(self, flops: float) -> float:
        """How long so many FLOPs take."""
        return flops / (max(self.n_gpus, 1) * self.tflops * 1e12 * self.utilisation) / 3600


# Peaks: NVIDIA's data sheets (T4, L4, A100, H100 SXM) and white paper of GA102. Utilisation is
# assumed, not yet measured here: 0.45 is usual for models of this size; T4 and L4 are held back by
# power (70, 72 W), an H100 by everything that is not a product.
CARDS = {
    "3090": Machine("24 GB (3090)", 22.0, 71, 0.45),  # the memory of the smallest such card
    "T4": Machine("16 GB (T4)", 14.6, 65, 0.30, has_kernel=False),
    "A100": Machine("80 GB (A100)", 79.2, 312, 0.45),
    "L4": Machine("24 GB (L4)", 22.0, 121, 0.25),
    "H100": Machine("80 GB (H100)", 79.2, 989, 0.40),
}
_SIZES = {"24": "3090", "16": "T4", "80": "A100"}  # what `GPU=24` means


def read_machine(text: str) -> Machine:
    """Read "24", "2x16", "T4" or "2xA100"; SuiteError for anything else."""
    count, _, name = text.upper().rpartition("X")
    name = _SIZES.get(name, name)
    if name not in CARDS or not re.fullmatch(r"[1-9]\d*|", count):
        names = ", ".join([*_SIZES, *CARDS])
        raise SuiteError(f"GPU: expected one of {names}, or several as in 2xA100, got {text!r}")
    card, n_gpus = CARDS[name], int(count or 1)
    label = card.name if n_gpus == 1 else f"{n_gpus} x {card.name}"
    return dataclasses.replace(card, name=label, n_gpus=n_gpus)


def find_machine() -> Machine:
    """Describe the device that training would use here; of an unknown one the speed is measured."""
    device = choose_device()
    if device.type == "cpu":
        gib = psutil.virtual_memory().total / GIB
        # benchmarks/results/training.json reaches half of the speed of a product.
        return Machine("this CPU", gib, measure_flops(device) / 1e12, 0.5, False, 0)
    name, n_gpus = torch.cuda.get_device_name(device), torch.cuda.device_count()
    known = [card for key, card in CARDS.items() if re.search(rf"\b{key}\b", name)]
    has_kernel = torch.cuda.get_device_capability(device) >= (8, 0)
    card = known[0] if known else Machine(name, 0, measure_flops(device) / 1e12, 0.5, has_kernel)
    gib = torch.cuda.mem_get_info(device)[1] / GIB
    return dataclasses.replace(card, name=f"{n_gpus} x {name}", gib=gib, n_gpus=n_gpus)


def measure_flops(device: torch.device, width: int = 1024) -> float:
    """Time a product of two matrices in the precision of training: FLOP/s, the best of three."""
    matrix = torch.ones(width, width, device=device, dtype=choose_dtype(device, width))
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds[1:])


@dataclass(frozen=True)
class Shape:
    """What the arithmetic has to know of a model: numbers of weights, and widths."""

    n_weights: int  # with the new head
    n_head: int
    n_linear: int  # in the linear layers below the head: these are quantised and get LoRA
    linear_in: int  # widths of their inputs, summed over the model
    linear_out: int
    n_layers: int
    n_local: int  # layers whose tokens attend to `window` others
    window: int
    hidden: int
    norms: int  # widths of the norms of one layer, summed
    mlp: int  # values that one MLP keeps for the backward pass, besides inputs of linear layers
    queries: int  # heads x width of a head
    keys: int
    n_scored: int  # heads whose scores attention keeps: none where it is fused
    is_causal: bool
    is_packed: bool

    def n_trained(self, config: FinetuneConfig) -> int:
        """Weights that are trained: all, those of LoRA and the head, or a head's on states."""
        if config.train == "all":
            return self.n_weights
        if config.train == "head":
            return self.n_states(config) * 4 // N_STATES + 2
        return config.lora_rank * (self.linear_in + self.linear_out) + self.n_head

    def n_states(self, config: FinetuneConfig) -> int:
        """States that a head reads of a battle, in one order."""
        return N_STATES * len(choose_layers(config.state_layers, self.n_layers)) * self.hidden


_QWEN = {"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128}
_QWEN |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
# The default checkpoints, so that they can be planned without a network.
_KNOWN: dict[str, Any] = {
    "answerdotai/ModernBERT-base": ModernBertConfig,
    "Qwen/Qwen3-4B-Instruct-2507": lambda: Qwen3Config(**_QWEN, tie_word_embeddings=True),
}


def read_shape(config: FinetuneConfig, base: Path | None = None) -> Shape:
    """Read the shape of a checkpoint, or of the folder `base`; OSError if it cannot be found."""
    if base is None and config.checkpoint in _KNOWN:
        return count_shape(_KNOWN[config.checkpoint](), config)
    return count_shape(read_architecture(config, base), config)


def count_shape(architecture: Any, config: FinetuneConfig) -> Shape:
    """Count the weights of a classifier of an architecture, without memory for them."""
    model = make_skeleton(architecture, config.head)
    text = architecture.get_text_config()
    heads = tuple(f"{name}." for name in head_names(model))
    below = {name: m for name, m in model.named_modules() if not f"{name}.".startswith(heads)}
    linears = [module for module in below.values() if isinstance(module, nn.Linear)]
    hidden, n_heads = text.hidden_size, text.num_attention_heads
    width = getattr(text, "head_dim", None) or hidden // n_heads
    keys = (getattr(text, "num_key_value_heads", None) or n_heads) * width
    names = {name.rpartition(".")[2] for name in below}
    is_gated = "gate_proj" in names or text.model_type == "modernbert"
    is_local = [kind == "sliding_attention" for kind in getattr(text, "layer_types", None) or ()]
    return Shape(
        n_weights=sum(weight.numel() for weight in model.parameters()),
        n_head=sum(w.numel() for name, w in model.named_parameters() if name.startswith(heads)),
        n_linear=sum(module.weight.numel() for module in linears),
        linear_in=sum(module.in_features for module in linears),
        linear_out=sum(module.out_features for module in linears),
        n_layers=text.num_hidden_layers,
        n_local=sum(is_local),
        window=2 * text.sliding_window + 1 if any(is_local) else 0,
        hidden=hidden,
        norms=2 * hidden + (n_heads * width + keys if "q_norm" in names else 0),
        mlp=text.intermediate_size * (3 if is_gated else 1),
        queries=n_heads * width,
        keys=keys,
        n_scored=0 if model._supports_sdpa else n_heads,
        is_causal=bool(getattr(model, "score", None)),
        is_packed=config.packing and can_pack(model),
    )


def count_memory(
    shape: Shape, config: FinetuneConfig, machine: Machine
) -> tuple[dict[str, float], float]:
    """Count the memory of training on one GPU: bytes always there by part, and bytes per token.

    Trained weights are 32-bit, activations 16-bit under autocast, norms and their inputs 32-bit.
    For a head on states they are only read: no layer's activations outlive the next one.
    """
    context = CONTEXT_GIB * GIB * (machine.n_gpus > 0)
    if config.train == "head":
        weights = count_frozen(shape, config.quantization)  # all of them, until they are loaded
        per_token = count_layer(shape, config, machine.has_kernel) + 8.0 * shape.hidden
        return {"weights": weights, "CUDA": context}, per_token
    trained, is_lora = shape.n_trained(config), config.uses_lora
    frozen = count_frozen(shape, config.quantization) if is_lora else 0.0
    # Autocast keeps a 16-bit copy of every trained matrix until the pass is over.
    copies = 2.0 * (trained if is_lora else shape.n_linear)
    fixed = {
        "weights": frozen + 4.0 * trained + copies,
        # With several GPUs one vector of all gradients is summed over the processes.
        "gradients": 4.0 * trained * (2 if machine.n_gpus > 1 else 1),
        "optimizer": 8.0 * trained,
        "CUDA": context,
    }
    per_token = count_kept(shape, config, machine.has_kernel)
    # Backward, gradients of one MLP (its input, product and output) and of the residual stream.
    per_token += 2.0 * shape.mlp + 8.0 * shape.hidden
    if config.gradient_checkpointing:  # one layer at a time is computed again
        per_token += count_layer(shape, config, machine.has_kernel)
    return fixed, per_token


def count_frozen(shape: Shape, quantization: str) -> float:
    """Bytes of the weights below the adapters, in their storage."""
    bytes_per_weight = {"none": 2.0, "8bit": 1.0, "4bit": 0.516}[quantization]  # with scales
    # Embeddings, norms and the untrained head are never quantised.
    return 2.0 * (shape.n_weights - shape.n_linear) + bytes_per_weight * shape.n_linear


def count_kept(shape: Shape, config: FinetuneConfig, has_kernel: bool) -> float:
    """Bytes per token that a forward pass keeps for the backward pass."""
    # What the first and the last norm read.
    outside = 4.0 * shape.hidden * (1 if shape.is_causal else 2)
    if not config.gradient_checkpointing:
        return outside + shape.n_layers * count_layer(shape, config, has_kernel)
    # The state that each layer starts from; in 16 bit where the frozen base is.
    return outside + shape.n_layers * shape.hidden * (2 if config.uses_lora else 4)


def count_layer(shape: Shape, config: FinetuneConfig, has_kernel: bool) -> float:
    """Bytes per token that one layer keeps for the backward pass, the mean of all layers."""
    norms = 4.0 * shape.norms  # read in 32 bit
    # Of each linear layer a 16-bit copy of its input. LoRA reads a copy after dropout, and a byte
    # per number says what was dropped. LLM.int8 keeps an input for two layers of three, about.
    bytes_per_input = 2.0
    if config.uses_lora:
        bytes_per_input += config.lora_dropout > 0
        bytes_per_input += 4 / 3 * (config.quantization == "8bit")
    inputs = bytes_per_input * shape.linear_in / shape.n_layers
    attention = 4.0 * (shape.queries + shape.keys)  # queries, keys, values, output
    if shape.is_packed and not has_kernel:
        # A decoder repeats keys and values for every head. An encoder keeps queries and keys before
        # and after RoPE, and of windows keys and values three times.
        attention = (8.0 if shape.is_causal else 14.0) * shape.queries
    # Scores, probabilities and their dropout, in 32 bit.
    attention += 12.0 * shape.n_scored * config.max_tokens
    return norms + inputs + 2.0 * shape.mlp + attention


def count_attention(shape: Shape, lengths: np.ndarray, has_kernel: bool) -> float:
    """Count the FLOPs of attention in a forward pass, per token of battles of these lengths."""
    keys = float((lengths.astype(float) ** 2).sum() / lengths.sum())  # that a token meets, in all
    near = shape.window if has_kernel else 1.5 * shape.window  # chunks see more than their window
    n_keys = (shape.n_layers - shape.n_local) * keys / (2 if shape.is_causal else 1)
    n_keys += shape.n_local * min(keys, near)
    return 4.0 * shape.queries * n_keys  # scores, then sums of values


def count_flops(
    shape: Shape, config: FinetuneConfig, lengths: np.ndarray, has_kernel: bool
) -> tuple[float, float]:
    """Count the FLOPs per token of training and of prediction, for battles of these lengths.

    A product of a weight and a number is 2 FLOPs; the lookup of embeddings and the head, which
    reads one state of a battle, are left out.
    """
    linear, attention = 2.0 * shape.n_linear, count_attention(shape, lengths, has_kernel)
    rank = config.lora_rank if config.uses_lora else 0
    lora = 2.0 * rank * (shape.linear_in + shape.linear_out)
    forward = linear + lora + attention
    # Backward, each layer needs one product for its input and one for its weights, if they are
    # trained; attention needs four for its inputs, and its scores once more.
    backward = linear * (1 if config.uses_lora else 2) + 2 * lora + 2.5 * attention
    return forward * (2 if config.gradient_checkpointing else 1) + backward, forward
