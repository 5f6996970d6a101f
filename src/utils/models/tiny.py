"""Make tiny checkpoints that stand in for real ones: within a minute, without download or votes.

A real checkpoint can read before it is fine-tuned; ten thousand noisy votes do not teach random
weights to. So a tiny model is pretrained to predict what is measured in the texts: by how much two
answers differ in length, layout, use of the prompt's words, and in the words themselves.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from src.utils.battles.style import measure_style, style_differences
from src.utils.config import TINY
from src.utils.models.batches import collate, make_batches
from src.utils.models.hardware import choose_device
from src.utils.models.heads import Pieces, contrast_weights
from src.utils.models.template import (
    CUT_TEXT,
    ENCODER_HEADINGS,
    INSTRUCTION,
    TURN_TEXT,
    encode_battles,
    make_pieces,
)
from src.utils.schema import TEXTS, clean_text

N_STEPS = {"modernbert": 700, "qwen3": 1500}  # optimiser steps of pretraining
STYLE_TARGETS = (
    "n_chars n_lines n_list_items n_headers n_bold n_code_blocks punctuation_per_char "
    "share_non_ascii lexical_diversity prompt_overlap is_refusal"
).split()  # names of STYLE_FEATURES whose differences are predicted
VERSION = 3  # increase with every change of the task or the models: an up-to-date base is kept
_N_WORD_TARGETS = 8  # directions in which the words of two answers differ most
_N_BATTLES = 4000  # battles that tokenizer and model learn from at most
_MAX_TOKENS = 256  # of one battle
_TOKENS_PER_BATCH = 1024
_LEARNING_RATE = 3e-3
_VOCABULARY = 3072


def find_kind(checkpoint: str) -> str:
    """Find which architecture "tiny:KIND" names; ValueError for one that is not known here."""
    kind = checkpoint.removeprefix(TINY)
    if kind not in _SPECIAL_TOKENS:
        names = " or ".join(TINY + name for name in _SPECIAL_TOKENS)
        raise ValueError(f"checkpoint: expected {names}, got {checkpoint}")
    return kind


def make_tiny(
    kind: str, pairs: pd.DataFrame, seed: int, n_steps: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a tiny model and its tokenizer from the texts of battles, in `n_steps` optimiser steps.

    "modernbert" has local and global attention, "qwen3" grouped queries and a chat template.
    """
    some = pairs[:: math.ceil(len(pairs) / _N_BATTLES)]
    tokenizer = _make_tokenizer(kind, some)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make_model(kind, tokenizer)
        if n_steps:
            pretrain(model, tokenizer, some, seed, n_steps)
    return model, tokenizer


_SPECIAL_TOKENS = {
    "modernbert": {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"},
    "qwen3": {"pad": "<|endoftext|>", "bos": "<|im_start|>", "eos": "<|im_end|>"},
}
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _make_tokenizer(kind: str, pairs: pd.DataFrame) -> PreTrainedTokenizerBase:
    special = {f"{word}_token": token for word, token in _SPECIAL_TOKENS[kind].items()}
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so every script
        show_progress=False,
    )
    texts = (clean_text(turn)[:4000] for name in TEXTS for turns in pairs[name] for turn in turns)
    # Often enough for the words of the templates to become tokens of their own.
    template_texts = [INSTRUCTION, CUT_TEXT, TURN_TEXT, *ENCODER_HEADINGS] * 100
    backend.train_from_iterator(itertools.chain(texts, template_texts), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if kind == "qwen3":
        tokenizer.chat_template = _CHATML
    return tokenizer


def _make_model(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    special = {
        f"{word}_token_id": getattr(tokenizer, f"{word}_token_id")
        for word in ("pad", "bos", "eos", "cls", "sep")
    }
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,  # about 1 / sqrt(hidden_size)
    }
    if kind == "qwen3":
        grouped = {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
        model = Qwen3ForCausalLM(Qwen3Config(**size, **special, **grouped))
    else:
        rope = {"rope_type": "default", "rope_theta": 1000.0}  # for hundreds of tokens
        config = ModernBertConfig(
            **size,
            **special,
            layer_types=["sliding_attention", "full_attention"],  # [CLS] reads every token
            local_attention=128,
            rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)},
            classifier_pooling="cls",
        )
        model = ModernBertForMaskedLM(config)
    # Attention that starts sharp can tell positions apart from the first step; the usual start is
    # nearly uniform and takes thousands of steps to change.
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.data *= 2
        elif name.endswith("Wqkv.weight"):
            parameter.data[: 2 * parameter.shape[1]] *= 2  # queries and keys, not values
    return model


def measure_differences(pairs: pd.DataFrame, seed: int) -> np.ndarray:
    """Measure how the answers of each battle differ, from the texts alone.

    The first columns are differences of style (`STYLE_TARGETS`). The others are the directions in
    which the words of two answers to the same prompt differ most.

    Returns:
        (N, M) float32, A minus B, in standard deviations, within -4 to 4.

    Source: latent semantic analysis, Deerwester et al. 1990, JASIS 41(6):391-407; square roots of
        shares (Hellinger), so that the most frequent words do not hide the others.
    """
    style, names = style_differences(measure_style(pairs))
    hasher = HashingVectorizer(
        n_features=2**14, token_pattern=r"\w+", norm="l1", alternate_sign=False, dtype=np.float64
    )
    a, b = ([" ".join(map(clean_text, turns)) for turns in pairs[name]] for name in TEXTS[1:])
    shares = hasher.transform(a).sqrt() - hasher.transform(b).sqrt()
    words = TruncatedSVD(_N_WORD_TARGETS, random_state=seed).fit_transform(shares)
    columns = [names.index(name) for name in STYLE_TARGETS]
    differences = np.column_stack([style[:, columns], words])
    spread = np.sqrt((differences**2).mean(axis=0))  # around 0, as A and B may be exchanged
    return np.clip(differences / np.maximum(spread, 1e-9), -4, 4).astype(np.float32)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pd.DataFrame,
    seed: int,
    n_steps: int,
) -> np.ndarray:
    """Train a tiny language model in place to predict how the answers of a battle differ.

    Two heads, which are dropped, read what the joint head and the contrast will read.

    Returns:
        (n_steps, 2) float losses: squared errors of the two over the variance; 1 is chance.
    """
    device = choose_device()
    differences = torch.from_numpy(measure_differences(pairs, seed)).to(device)
    targets = torch.cat([differences, -differences])
    encoded = encode_battles(pairs, tokenizer, _MAX_TOKENS)
    pieces = make_pieces(tokenizer)
    shape = (model.config.hidden_size, targets.shape[1])
    joint = nn.Linear(*shape)
    contrast = nn.Linear(*shape, bias=False)
    parameters = [*nn.ModuleList([model, joint, contrast]).to(device).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, n_steps + 1)
    history = []
    model.train()
    for batch in itertools.islice(_draw_batches(encoded.lengths, seed), n_steps):
        drawn = [encoded.row(place % len(pairs), place >= len(pairs)) for place in batch]
        pooled, contrasts = _read(model, drawn, pieces, tokenizer.pad_token_id)
        joint_loss = nn.functional.mse_loss(joint(pooled), targets[batch])
        contrast_loss = nn.functional.mse_loss(contrast(contrasts), targets[batch])
        # At equal weight the noise of the joint head halves what the contrast learns.
        (0.1 * joint_loss + contrast_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append([joint_loss.item(), contrast_loss.item()])
    return np.array(history)


def _read(
    model: PreTrainedModel, rows: list[np.ndarray], pieces: Pieces, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the two heads of a classifier read: pooled states and contrasts."""
    inputs = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_id).items()}
    states = model.base_model(**inputs).last_hidden_state
    if isinstance(model, ModernBertForMaskedLM):
        pooled = model.head(states[:, 0])
    else:
        pooled = states[torch.arange(len(rows)), inputs["attention_mask"].sum(1) - 1]
    weights = pad_sequence([contrast_weights(row, pieces) for row in rows], batch_first=True)
    contrasts = torch.bmm(weights.to(model.device)[:, None], states).squeeze(1)
    return pooled, contrasts


def _draw_batches(lengths: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Endless batches: row i is battle i as given, row N + i with A and B exchanged."""
    orders = np.random.default_rng(seed).integers(0, 2, len(lengths))
    for epoch in itertools.count():
        for batch in make_batches(lengths, _TOKENS_PER_BATCH, seed, epoch):
            yield batch + len(lengths) * ((orders[batch] + epoch) % 2)
