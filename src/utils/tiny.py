"""Tiny stand-ins for real checkpoints: made in a minute, without a download and without a vote.

A real checkpoint can read before it is fine-tuned; random weights can not, and some
ten thousand noisy votes do not teach it. So a tiny one is first set a task whose
answers cost nothing: which of two texts is longer, or are they alike? It learns to
tell answer A from answer B and to compare them. What people prefer it is not told.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from src.utils.artifacts import hash_json, hash_pairs, read_json, write_json
from src.utils.batches import collate, encode_pairs, make_batches
from src.utils.config import FinetuneConfig
from src.utils.models import TINY, atomic_folder, load_classifier, make_tiny_checkpoint, quiet_transformers
from src.utils.schema import A_WINS, B_WINS, TEXTS, TIE
from src.utils.text import TEMPLATE_VERSION, text_of

N_LESSONS = 500  # optimiser steps of the task
_LESSON_TOK = 2048  # padded tokens of one step
_LEARNING_RATE = 2e-3
_LESSON_CHARS = 400  # longest text of the task
_ALIKE = 0.25  # texts whose log lengths differ by less are alike
_N_BATTLES = 4000  # battles that give their texts, at most


def prepare_base(config: FinetuneConfig, pairs: pd.DataFrame, folder: Path, n_lessons: int = N_LESSONS) -> Path | None:
    """Make the tiny checkpoint that a config asks for, unless it is there already, made from the same texts.

    Args:
        config: `checkpoint` "tiny:modernbert" or "tiny:qwen3" asks for one.
        pairs: battles whose texts (not votes) train the tokenizer and make up the task.
        folder: where it lies, by custom `run_dir / "base"`.
        n_lessons: steps of the task; 0 leaves the weights random.

    Returns:
        The folder, or None when `checkpoint` names a real one.
    """
    if not config.checkpoint.startswith(TINY):
        return None
    key = hash_json([config.checkpoint, config.seed, n_lessons, TEMPLATE_VERSION, hash_pairs(pairs[["id", *TEXTS]])])
    if not (folder / "made_from.json").exists() or read_json(folder / "made_from.json") != key:
        with atomic_folder(folder) as tmp:
            _make_base(config, pairs, tmp, n_lessons)
            write_json(tmp / "made_from.json", key)
    return folder


def _make_base(config: FinetuneConfig, pairs: pd.DataFrame, folder: Path, n_lessons: int) -> None:
    some = pairs[:: len(pairs) // _N_BATTLES + 1]
    texts = [text_of(turn)[:4000] for name in TEXTS for turns in some[name] for turn in turns]
    make_tiny_checkpoint(config.checkpoint.removeprefix(TINY), texts, folder, config.seed)
    if n_lessons:
        teach_lengths(folder, texts, config.seed, n_lessons)


def teach_lengths(folder: Path, texts: Sequence[str], seed: int, n_steps: int = N_LESSONS) -> float:
    """Train a tiny checkpoint to say which of two texts is longer; its head is thrown away.

    Args:
        folder: from `make_tiny_checkpoint`; its weights are replaced.
        texts: pieces of them stand for prompt and answers.
        seed: of the pieces and their order.
        n_steps: optimiser steps.

    Returns:
        Mean loss of the last tenth of the steps, nats; 1.1 is chance.
    """
    config = FinetuneConfig(checkpoint=str(folder), revision="", seed=seed)
    model, tokenizer = load_classifier(config, folder)
    lessons = make_lessons(texts, 16 * n_steps, seed)
    rows = encode_pairs(lessons, tokenizer, 512)
    batches = make_batches([len(row) for row in rows], _LESSON_TOK, seed)
    batches = (batches * (n_steps // len(batches) + 1))[:n_steps]
    losses = _train(model, rows, lessons["label"].to_numpy(), batches, tokenizer.pad_token_id)
    _save_without_head(model, folder)
    return float(np.mean(losses[-max(1, n_steps // 10) :]))


def make_lessons(texts: Sequence[str], n_pairs: int, seed: int) -> pd.DataFrame:
    """Make battles out of pieces of texts, labelled by which answer is longer.

    Returns:
        A table: id, prompt, response_a, response_b, label; label 2 where lengths are alike.
    """
    rng = np.random.default_rng(seed)
    texts = [text for text in texts if text] or ["text"]
    n_chars = np.exp(rng.uniform(np.log(20), np.log(_LESSON_CHARS), (n_pairs, len(TEXTS)))).astype(int)
    chosen = rng.integers(0, len(texts), (n_pairs, len(TEXTS)))
    # A short text is repeated, or its length would give away where it comes from.
    pieces = [
        [((texts[i] + " ") * (n // (len(texts[i]) + 1) + 1))[:n] for i, n in zip(*row, strict=True)]
        for row in zip(chosen, n_chars, strict=True)
    ]
    lessons = pd.DataFrame({"id": np.arange(n_pairs)})
    for place, name in enumerate(TEXTS):
        lessons[name] = pd.Series([(row[place],) for row in pieces], dtype=object)
    log_ratio = np.log(n_chars[:, 1] / n_chars[:, 2])
    return lessons.assign(label=np.select([log_ratio > _ALIKE, log_ratio < -_ALIKE], [A_WINS, B_WINS], TIE))


def _train(
    model: nn.Module, rows: list[list[int]], labels: np.ndarray, batches: list[np.ndarray], pad_id: int
) -> list[float]:
    device, losses = next(model.parameters()).device, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, len(batches), pct_start=0.1)
    model.train()
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[row] for row in batch], pad_id).items()}
        loss = nn.functional.cross_entropy(model(**inputs).logits, torch.tensor(labels[batch], device=device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _save_without_head(model: nn.Module, folder: Path) -> None:
    # As language models, which is what real checkpoints are.
    auto = AutoModelForCausalLM if model.config.model_type == "qwen3" else AutoModelForMaskedLM
    with quiet_transformers():
        language_model = auto.from_pretrained(folder, dtype=torch.float32)
        language_model.load_state_dict(model.state_dict(), strict=False)
        language_model.save_pretrained(folder)
