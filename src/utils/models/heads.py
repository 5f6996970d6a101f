"""The contrast head: the mean state of answer A minus that of answer B, beside the joint head.

The joint head, from transformers, reads one pooled state and has to find both answers in it. The
contrast knows which tokens are whose. What it adds to A's logit it subtracts from B's, so
exchanging the answers' states exchanges its output.
"""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from src.utils.schema import A_WINS, B_WINS, LABELS

Row = Sequence[int] | np.ndarray  # (T,) token ids of one battle, without padding
Pieces = Sequence[Sequence[int]]  # of a `template.Template`


class Contrasting(PreTrainedModel):
    """A mixin for sequence classifiers that adds `contrast` to the logits of their own head.

    `pieces` must be set to those of the template that the battles are written in.
    """

    pieces: Pieces

    def __init__(self, config, *args, **kwargs) -> None:
        """Make the classifier and its contrast."""
        super().__init__(config, *args, **kwargs)
        self.contrast = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """Return the classifier's own output, with the contrast added to its logits."""
        outputs: list[torch.Tensor] = []
        hook = self.base_model.register_forward_hook(
            lambda module, args, output: outputs.append(output[0])
        )
        try:
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            hook.remove()
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = is_token.sum(1).tolist()
        rows = [row[:n] for row, n in zip(input_ids.cpu(), lengths, strict=True)]
        states = [state[:n] for state, n in zip(outputs[0], lengths, strict=True)]
        output.logits = output.logits + self.read_contrast(rows, states)
        return output

    def read_contrast(
        self, rows: Iterable[torch.Tensor], states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute what is added to the logits: (rows, C) float; B's column is minus A's.

        Of each battle, `rows` are (T,) token ids on the CPU, `states` (T, width) last states.
        """
        device, dtype = states[0].device, states[0].dtype
        # In 16 bits the difference of two similar means would lose its digits.
        with torch.autocast(device.type, enabled=False):
            weights = [contrast_weights(row.numpy(), self.pieces).to(device) for row in rows]
            differences = [w @ state.float() for w, state in zip(weights, states, strict=True)]
        preference = self.contrast(torch.stack(differences).to(dtype))
        signs = torch.zeros(len(LABELS), device=device, dtype=preference.dtype)
        signs[A_WINS] = 1
        signs[B_WINS] = -1
        return preference * signs


@functools.cache
def add_contrast(classifier: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the subclass of a classifier that has a contrast."""
    # save_pretrained writes the class name into config.json: it must be one that transformers has.
    names = {"__module__": classifier.__module__, "__doc__": classifier.__doc__}
    return type(classifier.__name__, (Contrasting, classifier), names)


def contrast_weights(row: Row, pieces: Pieces) -> torch.Tensor:
    """Weight tokens so that their sum is the mean over A minus the mean over B: (T,) float32.

    An empty answer has no weight.
    """
    weights = torch.zeros(len(row))
    for (start, end), sign in zip(find_answers(row, pieces), (1, -1), strict=True):
        if end > start:
            weights[start:end] = sign / (end - start)
    return weights


def find_answers(row: Row, pieces: Pieces) -> tuple[tuple[int, int], tuple[int, int]]:
    """Find where the tokens of A and of B start and end.

    A text that quotes a piece of a decoder's template word for word can move a border; an
    encoder's pieces have special tokens, which no text has.
    """
    row = np.asarray(row)
    border_a = _find(row, pieces[1], len(pieces[0]))
    start_a = border_a + len(pieces[1])
    border_b = _find(row, pieces[2], start_a)
    return (start_a, border_b), (border_b + len(pieces[2]), len(row) - len(pieces[3]))


def _find(row: np.ndarray, piece: Sequence[int], start: int) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(row[start:], len(piece))
    return start + int((windows == np.array(piece)).all(axis=1).argmax())
