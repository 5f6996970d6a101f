"""What training asks of a model beside the votes."""

import torch
from torch import nn

from src.utils.schema import A_WINS, B_WINS, TIE


def order_divergence(logits: torch.Tensor) -> torch.Tensor:
    """Measure how far apart the two readings of each battle are.

    Args:
        logits: (2N, C) float, columns in `LABELS` order; row 2i is battle i in one order of
            its answers, row 2i + 1 in the other, as the model gave them.

    Returns:
        (N,) float32, nats, 0 or more: the mean of the two Kullback-Leibler divergences
        between the readings, columns exchanged back; 0 where they agree.

    Raises:
        ValueError: a row has no other order.

    Source: R-Drop, Liang et al. 2021, arXiv:2106.14448, between orders instead of dropout masks.
    """
    if len(logits) % 2:
        raise ValueError(f"logits: expected both orders of each battle, got {len(logits)} rows")
    log_probs = nn.functional.log_softmax(logits.float(), dim=1)
    one, other = log_probs[0::2], log_probs[1::2][:, [B_WINS, A_WINS, TIE]]
    return ((one.exp() - other.exp()) * (one - other)).sum(dim=1) / 2
