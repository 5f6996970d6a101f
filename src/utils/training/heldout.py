"""Predict the battles that a model has not seen: a sample in between, the whole fold at the end."""

import math
import time
import warnings
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from src.utils.config import FinetuneConfig
from src.utils.models.predict import Prediction, predict_pairs
from src.utils.models.reading import LocalReader
from src.utils.training import processes
from src.utils.training.earlier import Identity
from src.utils.training.processes import rank, world_size
from src.utils.training.session import SessionOver

_MAX_LOST_SHARE = 0.01  # of the held-out battles, with logits that are not finite


@dataclass(frozen=True)
class Member:
    """One model to train."""

    name: str  # of its folders, e.g. "fold_0"
    fold: int | None  # held out; None for the refit
    config: FinetuneConfig  # with a seed of its own
    identity: Identity = field(default_factory=dict)  # what determines the model


@dataclass(frozen=True)
class HeldOut:
    """Predictions of N held-out battles."""

    probs: np.ndarray  # (N, C) float64, the mean of the orders that were read
    first_probs: np.ndarray  # (N, C) float64, of the canonical order alone
    swap_gap: float  # mean change of a probability when the answers are exchanged; NaN: not read


def sample_groups(pairs: pd.DataFrame, n_pairs: int) -> pd.DataFrame:
    """Draw whole prompts, always the same, until there are `n_pairs` battles or all, in order."""
    sizes = pairs.groupby("group").size().sample(frac=1, random_state=0)
    n_groups = int(np.searchsorted(sizes.cumsum(), n_pairs)) + 1
    return pairs[pairs["group"].isin(sizes.index[:n_groups])].reset_index(drop=True)


def predict_heldout(
    reader: LocalReader,
    tokenizer: PreTrainedTokenizerBase,
    heldout: pd.DataFrame,
    member: Member,
    twice_share: float = 1.0,
    session_end: float = math.inf,
) -> HeldOut:
    """Predict held-out battles, each process its share; `twice_share` as for `predict_pairs`.

    A battle whose logits are not finite even in 32 bit gets the mean of the others, A and B alike.

    FloatingPointError if these are more than one in a hundred, SessionOver at `session_end` (a
    `time.monotonic()` value, s).
    """
    config = member.config

    def watch_clock(_: Prediction) -> None:
        if time.monotonic() > session_end:
            raise SessionOver

    try:
        prediction = predict_pairs(
            reader,
            tokenizer,
            heldout[rank() :: world_size()],
            max_tokens=config.predict_tokens,
            tokens_per_batch=config.tokens_per_batch,
            twice_share=twice_share,
            keep=watch_clock,
        )
        is_late = False
    except SessionOver:
        is_late = True
    # All processes stop where one does: else it would wait for the others' rows.
    if processes.gather_rows(np.array([is_late])).any():
        raise SessionOver
    probs = processes.gather_rows(prediction.probs)
    first_probs = processes.gather_rows(np.asarray(prediction.first_probs))
    gaps = processes.gather_rows(np.asarray(prediction.swap_gap))
    is_lost = np.isnan(probs).any(axis=1)
    if is_lost.mean() > _MAX_LOST_SHARE:
        raise FloatingPointError(
            f"{member.name}: logits of {is_lost.sum()} of {len(probs)} held-out battles are not "
            f"finite; lower learning_rate ({config.learning_rate})"
        )
    if is_lost.any():
        warnings.warn(f"{member.name}: {is_lost.sum()} battles have no finite logits", stacklevel=2)
        a, b, tie = probs[~is_lost].mean(axis=0)
        probs[is_lost] = first_probs[is_lost] = ((a + b) / 2, (a + b) / 2, tie)
    known = gaps[np.isfinite(gaps)]
    return HeldOut(probs, first_probs, float(known.mean()) if len(known) else math.nan)
