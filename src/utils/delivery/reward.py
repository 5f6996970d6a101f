"""Use a preference model as a reward model: score an answer, or choose the best of several.

A score is a prediction of votes and no measure of truth or safety. People favour long,
well-formatted answers, so a chatbot that is trained on it learns to write them: hold length
fixed, or measure it, before you believe a gain (Gao et al. 2022, arXiv:2210.10760).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from src.utils.config import FinetuneConfig
from src.utils.delivery.submit import read_settings
from src.utils.models.checkpoints import load_finetuned
from src.utils.models.predict import predict_probs
from src.utils.schema import A_WINS, B_WINS, TEXTS
from src.utils.stats.scores import MIN_PROB

Predict = Callable[[pd.DataFrame], np.ndarray]  # battles -> (N, C) float, as in `schema.LABELS`


def load_predictor(folder: Path, config: FinetuneConfig | None = None) -> Predict:
    """Load a model to predict battles with.

    Without `config`, `folder` is the `model/` that 07 wrote; with it, a fold of 03 or 04.
    """
    config = config or read_settings(Path(folder))
    model, tokenizer = load_finetuned(Path(folder), config)
    return functools.partial(
        predict_probs,
        model,
        tokenizer,
        max_tokens=config.predict_tokens,
        tokens_per_batch=config.tokens_per_batch,
    )


def score_answers(
    predict: Predict, prompt: str, answers: Sequence[str], references: Sequence[str] = ("",)
) -> np.ndarray:
    """Score answers to one prompt by how much they are preferred to reference answers.

    A reference should be an answer that could have been given, e.g. of the model before training.
    The default, an empty answer, ranks answers to one prompt well enough to sort them.

    Returns:
        (n,) float, nats: mean of log P(answer wins) − log P(reference wins). Exchanging answer
        and reference changes the sign.

    Example:
        >>> score_answers(load_predictor("artifacts/07_publish/model"), "2 + 2?", ["4", "5"])
    """
    rows = [(prompt, answer, other) for answer in answers for other in references]
    texts = [tuple((text,) for text in row) for row in rows]
    pairs = pd.DataFrame(texts, columns=list(TEXTS), dtype=object)
    probs = np.maximum(predict(pairs.assign(id=range(len(pairs)))), MIN_PROB)
    gaps = np.log(probs[:, A_WINS]) - np.log(probs[:, B_WINS])
    return gaps.reshape(len(answers), len(references)).mean(axis=1)


def choose_best(predict: Predict, prompt: str, answers: Sequence[str]) -> int:
    """Choose the best of n answers, each compared with all: its place, n × n predictions."""
    return int(score_answers(predict, prompt, answers, answers).argmax())
