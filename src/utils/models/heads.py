"""Heads of a classifier: the joint one that transformers gives it, and a contrast of the two answers beside it.

The joint head reads one state, that of [CLS] or of the last token, and has to find in
it which answer was which. The contrast reads the mean state of A's tokens less that
of B's, so that it is told: what it adds for A it takes from B, and exchanging two
states exchanges its answer.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from src.utils.schema import A_WINS, B_WINS, LABELS

Pieces = Sequence[Sequence[int]]  # of a `batches.Template`


class Contrasting:
    """Mixed into a sequence classifier: adds `contrast` to what its own head says.

    Whoever makes one sets `pieces`, those of the template that its battles are written in.
    """

    pieces: Pieces

    def __init__(self, config, *args, **kwargs) -> None:
        """Make the classifier, and the contrast beside it."""
        super().__init__(config, *args, **kwargs)
        self.contrast = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """The classifier's own output, with the contrast added to its logits."""
        kept = []
        hook = self.base_model.register_forward_hook(
            lambda module, args, output: kept.append(output[0])
        )
        try:
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            hook.remove()
        lengths = (
            [input_ids.shape[1]] * len(input_ids)
            if attention_mask is None
            else attention_mask.sum(1).tolist()
        )
        rows = [row[:length] for row, length in zip(input_ids.cpu(), lengths, strict=True)]
        states = [row[:length] for row, length in zip(kept[0].unbind(), lengths, strict=True)]
        output.logits = output.logits + self.read_contrast(rows, states)
        return output

    def read_contrast(
        self, rows: Sequence[torch.Tensor], states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """What is added to the logits.

        Args:
            rows: (T,) token ids of each battle, padding aside, on the CPU.
            states: (T, width) of each, the last ones of the base.

        Returns:
            (rows, C) float; A's column is B's with the other sign, a tie's is 0.
        """
        device = states[0].device
        # Where the two means are alike, 16 bits would lose what sets them apart.
        with torch.autocast(device.type, enabled=False):
            weights = [weigh_answers(row.numpy(), self.pieces).to(device) for row in rows]
            differences = [
                weight @ state.float() for weight, state in zip(weights, states, strict=True)
            ]
        preference = self.contrast(torch.stack(differences).to(states[0].dtype))
        columns = torch.zeros(len(LABELS), device=device, dtype=preference.dtype)
        columns[A_WINS], columns[B_WINS] = 1, -1
        return preference * columns


@functools.cache
def contrasting(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a classifier with a contrast; it keeps its name, so that what is saved names a class there is."""
    return type(
        cls.__name__, (Contrasting, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def weigh_answers(row: np.ndarray, pieces: Pieces) -> torch.Tensor:
    """Weights that make of token states the mean over A's tokens less the mean over B's.

    Args:
        row: (T,) token ids of one battle.
        pieces: of the template it is written in.

    Returns:
        (T,) float32; an empty answer has no weight.
    """
    weights = torch.zeros(len(row))
    for (start, end), sign in zip(find_answers(row, pieces), (1, -1), strict=True):
        if end > start:
            weights[start:end] = sign / (end - start)
    return weights


def find_answers(row: np.ndarray, pieces: Pieces) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the tokens of A and of B begin and end.

    A text that quotes a piece of a decoder's template word for word can move a border;
    those of an encoder hold special tokens, which no text does.
    """
    row = np.asarray(row)
    before_a = _find(row, pieces[1], len(pieces[0]))
    start_a = before_a + len(pieces[1])
    before_b = _find(row, pieces[2], start_a)
    return (start_a, before_b), (before_b + len(pieces[2]), len(row) - len(pieces[3]))


def _find(row: np.ndarray, piece: Sequence[int], start: int) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(row[start:], len(piece))
    return start + int((windows == np.array(piece)).all(axis=1).argmax())
