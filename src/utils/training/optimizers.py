"""What the optimizer is told of each weight: its learning rate by depth, and whether it decays."""

import re
from collections import defaultdict
from collections.abc import Collection

from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


def measure_depths(model: nn.Module) -> dict[str, int]:
    """Tell how far below the head each weight of a classifier lies.

    Args:
        model: a classifier of transformers, with or without LoRA.

    Returns:
        Name -> 0 for the head, 1 for the uppermost layer and the norm above it, …, n + 1 for
        embeddings below n layers.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = {
        id(parameter) for parameter in plain.get_submodule(plain.base_model_prefix).parameters()
    }
    layers = {
        name: int(found[1])
        for name, _ in model.named_parameters()
        if (found := _LAYER.search(name))
    }
    n_layers = max(layers.values(), default=-1) + 1
    depths = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in base:
            depths[name] = 0
        elif name in layers:
            depths[name] = n_layers - layers[name]
        else:
            depths[name] = n_layers + 1 if "embed" in name else 1
    return depths


def group_by_depth(
    model: nn.Module,
    decaying: Collection[str],
    *,
    learning_rate: float,
    layer_decay: float,
    weight_decay: float,
) -> list[dict[str, object]]:
    """Give each layer `layer_decay` times the learning rate of the layer above.

    Args:
        model: a classifier of transformers, with or without LoRA.
        decaying: names of the weights that decay; norms and biases are by custom none of them.
        learning_rate: of the head.
        layer_decay: above 0, at most 1.
        weight_decay: of those that decay.

    Returns:
        Groups for a torch optimizer, the head first.

    Source: Howard & Ruder 2018, arXiv:1801.06146, discriminative fine-tuning.
    """
    depths = measure_depths(model)
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[depths[name], name not in decaying].append(parameter)
    return [
        {
            "params": groups[depth, is_spared],
            "lr": learning_rate * layer_decay**depth,
            "weight_decay": 0.0 if is_spared else weight_decay,
        }
        for depth, is_spared in sorted(groups)
    ]
