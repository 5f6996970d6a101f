"""A classifier whose base stays as it is: a small head reads the states of some of its layers.

The states of a battle are, for each of these layers, the state at the token that a classifier would
read, and the means over the tokens of either answer. Layers above the last of them are not run.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from src.utils.models.heads import Pieces, find_answers

N_STATES = 3  # of a layer: read-out, mean over A, mean over B
HEAD_FILE = "head.safetensors"
_MOST = torch.finfo(torch.float16).max


class FrozenClassifier(nn.Module):
    """A sequence classifier of transformers without its upper layers, and a head on its states.

    Args:
        classifier: its own head is not used; it loses the layers that nothing is read of.
        pieces: of the template that the battles are written in.
        shares: of the depth, above 0 to 1: which layers are read.
    """

    def __init__(self, classifier: Any, pieces: Pieces, shares: Sequence[float]) -> None:
        super().__init__()
        self.classifier, self.pieces, self.config = classifier, pieces, classifier.config
        stack = find_layers(classifier)
        self.layers = choose_layers(shares, len(stack))
        del stack[self.layers[-1] :]
        self.head_shape = len(self.layers), self.config.get_text_config().hidden_size
        self.n_states = N_STATES * math.prod(self.head_shape)
        # As transformers' own heads: a decoder's reads the last token, an encoder's the first or
        # the mean of all.
        self._reads_last = hasattr(classifier, "score")
        self._reads_mean = getattr(self.config, "classifier_pooling", "") == "mean"
        self.head: nn.Module | None = None

    def get_base_model(self) -> Any:
        """Return the classifier below, under the name that peft gives it."""
        return self.classifier

    def forward(self, input_ids: torch.Tensor, **batch: torch.Tensor) -> SequenceClassifierOutput:
        """Return logits, (rows, C) float32, for what `collate` or `collate_packed` made."""
        if self.head is None:
            raise ValueError("expected a frozen classifier with a head, got one without")
        states = self.read_states(input_ids, **batch)
        with torch.autocast(states.device.type, enabled=False):
            # In the precision that the head was trained in.
            return SequenceClassifierOutput(logits=self.head(states.half().float()))

    def read_states(self, input_ids: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        """Read (rows, n_states) float32, by layer: read-out, mean over A, mean over B.

        Within the range of float16; NaN where a state is not finite. An empty answer has zeros.
        """
        read: dict[int, torch.Tensor] = {}
        stack = find_layers(self.classifier)
        hooks = [stack[n - 1].register_forward_hook(partial(_keep, read, n)) for n in self.layers]
        try:
            self.classifier(input_ids=input_ids, **batch)
        finally:
            for hook in hooks:
                hook.remove()
        rows = [*_split(input_ids, batch)]
        device = input_ids.device
        weights = [self._weigh(row.cpu().numpy()).to(device) for row, _ in rows]
        states = []
        with torch.autocast(device.type, enabled=False):  # 16 bits would lose digits of a mean
            for layer in self.layers:
                parts = [read[layer][place] for _, place in rows]
                means = [w @ part.float() for w, part in zip(weights, parts, strict=True)]
                states.append(torch.stack(means).flatten(1))
        joined = torch.cat(states, dim=1)
        return torch.where(joined.isfinite(), joined.clamp(-_MOST, _MOST), torch.nan)

    def _weigh(self, row: np.ndarray) -> torch.Tensor:
        """Weights of the tokens in each of the three states: (3, T) float32."""
        weights = torch.zeros(N_STATES, len(row))
        if self._reads_mean:
            weights[0] = 1 / len(row)
        else:
            weights[0, -1 if self._reads_last else 0] = 1
        for place, (start, end) in enumerate(find_answers(row, self.pieces), start=1):
            if end > start:
                weights[place, start:end] = 1 / (end - start)
        return weights


def _keep(read: dict, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
    read[layer] = output[0] if isinstance(output, tuple) else output  # (rows, T, width)


def _split(input_ids: torch.Tensor, batch: dict) -> Iterator[tuple[torch.Tensor, tuple]]:
    """Token ids of each battle, and where its states are in a batch."""
    if "cu_seq_lens" in batch:
        for start, end in pairwise(batch["cu_seq_lens"].tolist()):
            yield input_ids[0, start:end], (0, slice(start, end))
    else:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield input_ids[row, :length], (row, slice(0, length))


def find_layers(classifier: Any) -> nn.ModuleList:
    """Find the stack of layers of any architecture."""
    for module in classifier.base_model.modules():
        # The first list of modules is the stack; those inside a layer come later.
        if isinstance(module, nn.ModuleList) and len(module):
            return module
    raise ValueError(f"{type(classifier).__name__}: expected a list of layers, found none")


def choose_layers(shares: Sequence[float], n_layers: int) -> list[int]:
    """Turn shares of the depth into numbers of layers, from 1, ascending."""
    return sorted({max(1, round(share * n_layers)) for share in shares})


def split_parts(states: torch.Tensor, hidden: int) -> torch.Tensor:
    """Split (rows, n_states) into what a head reads of each layer: (4, rows, layers, hidden).

    The first answer's mean minus the second's, the read-out, the mean of both answers' means, the
    read-out again: the first two speak for an answer, the others for a tie.
    """
    readout, first, second = states.unflatten(1, (-1, N_STATES, hidden)).unbind(2)
    return torch.stack([first - second, readout, (first + second) / 2, readout])


class DavidsonHead(nn.Module):
    """Bradley-Terry with Davidson's ties on the states of a reading; see `models.baseline`.

    Exchanging the states of the answers exchanges A and B, whatever the weights; what the read-out
    says for an answer changes its sign only with the order that a battle is read in.
    """

    def __init__(self, n_layers: int, hidden: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(4, n_layers, hidden))  # of `split_parts`
        self.biases = nn.Parameter(torch.zeros(2))  # of the log-odds of A, and of a tie

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Turn (rows, n_states) into logits, (rows, C)."""
        parts = split_parts(states, self.weights.shape[2])
        terms = torch.einsum("prlh,plh->pr", parts, self.weights)
        half = (terms[0] + (terms[1] + self.biases[0])) / 2
        return torch.stack([half, -half, terms[2] + terms[3] + self.biases[1]], dim=1)


def save_head(head: DavidsonHead, folder: Path) -> None:
    """Write the weights of a head into a folder."""
    save_file(head.state_dict(), folder / HEAD_FILE)
    (folder / HEAD_FILE).chmod(0o644)  # safetensors writes files that only their owner can read


def load_head(folder: Path, n_layers: int, hidden: int) -> DavidsonHead:
    """Load a head; ValueError if it reads other states than those of so many layers."""
    weights, head = load_file(folder / HEAD_FILE), DavidsonHead(n_layers, hidden)
    found = tuple(weights["weights"].shape[1:]) if "weights" in weights else "another kind of head"
    if found != (n_layers, hidden):
        raise ValueError(
            f"{folder}: expected a head on {n_layers} layers of {hidden} states, as STATE_LAYERS "
            f"and the base ask, found {found}; train it again"
        )
    head.load_state_dict(weights)
    return head
