"""Tiny stand-ins for real checkpoints: made in minutes, without a download and without a vote.

A real checkpoint can read before it is fine-tuned; random weights can not, and some
ten thousand noisy votes do not teach it. So a tiny one is first set a task whose
answers cost nothing and are measured in the texts: to say by how much the two
answers differ in length, layout, use of the prompt's words, and in the words they are
made of, and of every token whether it is the prompt's, A's or B's. Both heads of
`heads` learn to read the differences, each for itself. What people prefer it is not told.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from src.utils.battles.style import measure_style, style_differences
from src.utils.config import FinetuneConfig
from src.utils.models.batches import collate, make_batches
from src.utils.models.checkpoints import TINY, head_names, load_classifier, quiet_transformers
from src.utils.models.heads import find_answers, weigh_answers
from src.utils.models.template import (
    CUT_TEXT,
    ENCODER_NAMES,
    INSTRUCTION,
    TEMPLATE_VERSION,
    TURN_TEXT,
    encode_both_orders,
    make_template,
    text_of,
)
from src.utils.runs import atomic_folder, hash_json, hash_pairs, read_json, write_json
from src.utils.schema import TEXTS

N_LESSONS = 1500  # optimiser steps of the task
_TASK_VERSION = (
    2  # raise it with every change of the task: a base is kept as long as it is the same
)
_LESSON_TOK = 2048  # padded tokens of one step
_MAX_TOKENS = 256  # of one battle
_LEARNING_RATE = 3e-3
_N_BATTLES = 12_000  # battles of the task, at most
_N_TOKENIZED = 4000  # battles that the tokenizer learns from, at most
SURFACE = (
    "n_chars",
    "n_lines",
    "n_list_items",
    "n_headers",
    "n_bold",
    "n_code_blocks",
    "punctuation_per_char",
    "share_non_ascii",
    "lexical_diversity",
    "prompt_overlap",
    "is_refusal",
)  # what is measured of the answers, names of STYLE_FEATURES
_N_DIRECTIONS = 8  # directions in which the words of two answers differ most
_N_HASHED = 2**14  # width of the hashed words
_LARGEST = 4.0  # standard deviations
_N_FIELDS = 4  # pieces of the template, each with the text behind it
_UNREAD = -100  # a label that cross entropy passes over


def prepare_base(
    config: FinetuneConfig, pairs: pd.DataFrame, folder: Path, n_lessons: int = N_LESSONS
) -> Path | None:
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
    made_of = [config.checkpoint, config.seed, n_lessons, _TASK_VERSION, TEMPLATE_VERSION]
    key = hash_json([*made_of, hash_pairs(pairs[["id", *TEXTS]])])
    if not (folder / "made_from.json").exists() or read_json(folder / "made_from.json") != key:
        with atomic_folder(folder) as tmp:
            _make_base(config, pairs, tmp, n_lessons)
            write_json(tmp / "made_from.json", key)
    return folder


def _make_base(config: FinetuneConfig, pairs: pd.DataFrame, folder: Path, n_lessons: int) -> None:
    some = pairs[:: len(pairs) // _N_TOKENIZED + 1]
    texts = [text_of(turn)[:4000] for name in TEXTS for turns in some[name] for turn in turns]
    make_tiny_checkpoint(config.checkpoint.removeprefix(TINY), texts, folder, config.seed)
    if n_lessons:
        teach_comparing(
            folder, pairs[:: len(pairs) // (_N_BATTLES + 1) + 1], config.seed, n_lessons
        )


def teach_comparing(
    folder: Path, pairs: pd.DataFrame, seed: int, n_steps: int = N_LESSONS
) -> float:
    """Train a tiny checkpoint to say how the two answers of a battle differ; its head is thrown away.

    Args:
        folder: from `make_tiny_checkpoint`; its weights are replaced.
        pairs: battles whose texts are read, each epoch in the other order.
        seed: of the order and the new head.
        n_steps: optimiser steps.

    Returns:
        Mean squared error of the last tenth of the steps, over the variance; 1 is chance.
    """
    model, tokenizer = load_classifier(
        FinetuneConfig(checkpoint=str(folder), revision="", seed=seed), folder
    )
    differences = compare_answers(pairs, seed)
    as_given, swapped = encode_both_orders(pairs, tokenizer, _MAX_TOKENS)
    rows, targets = [*as_given, *swapped], np.concatenate([differences, -differences])
    setattr(
        model,
        head_names(model)[-1],
        nn.Linear(model.config.hidden_size, targets.shape[1]).to(model.device),
    )
    pieces = make_template(tokenizer).pieces
    fields, weights = find_fields(rows, pieces), [weigh_answers(row, pieces) for row in rows]
    batches = itertools.islice(_deal([len(row) for row in as_given], seed), n_steps)
    losses = _train(model, rows, targets, fields, weights, list(batches), tokenizer.pad_token_id)
    _save_without_head(model, folder)
    return float(np.mean(losses[-max(1, n_steps // 10) :]))


def compare_answers(pairs: pd.DataFrame, seed: int) -> np.ndarray:
    """Measure how the answers of each battle differ, from the texts alone.

    The first columns are differences of style (`SURFACE`). The others are latent: the
    directions in which the words of two answers to the same prompt differ most.

    Args:
        pairs: N battles; labels, if any, are not looked at.
        seed: of the search for directions.

    Returns:
        (N, M) float32, A less B, in standard deviations, at most 4.

    Source: latent semantic analysis, Deerwester et al. 1990, JASIS 41(6):391-407; square
        roots of shares (Hellinger), so that the most frequent words do not drown the others.
    """
    style, names = style_differences(measure_style(pairs))
    hasher = HashingVectorizer(
        n_features=_N_HASHED,
        token_pattern=r"\w+",
        norm="l1",
        alternate_sign=False,
        dtype=np.float64,
    )
    answers = ([" ".join(map(text_of, turns)) for turns in pairs[name]] for name in TEXTS[1:])
    shares_a, shares_b = (hasher.transform(texts).sqrt() for texts in answers)
    words = TruncatedSVD(_N_DIRECTIONS, random_state=seed).fit_transform(shares_a - shares_b)
    measured = np.column_stack([style[:, [names.index(name) for name in SURFACE]], words])
    spread = np.sqrt((measured**2).mean(axis=0))  # about 0, for A and B may be exchanged
    return np.clip(measured / np.maximum(spread, 1e-9), -_LARGEST, _LARGEST).astype(np.float32)


def find_fields(rows: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Say of each token behind which piece of the template it stands: 0 prompt, 1 A, 2 B, 3 the end.

    Args:
        rows: token ids of each battle.
        pieces: of the battle's `Template`.
    """
    fields = []
    for row in rows:
        (start_a, end_a), (_, end_b) = find_answers(row, pieces)
        places = np.searchsorted(
            [start_a - len(pieces[1]), end_a, end_b], np.arange(len(row)), side="right"
        )
        fields.append(places.astype(np.int64))
    return fields


def _deal(lengths: Sequence[int], seed: int) -> Iterator[np.ndarray]:
    """Batches without end: row i is battle i as given, row N + i is its mirror."""
    orders = np.random.default_rng(seed).integers(0, 2, len(lengths))
    for epoch in itertools.count():
        for batch in make_batches(lengths, _LESSON_TOK, seed, epoch):
            yield batch + len(lengths) * (orders[batch] ^ (epoch % 2))


def _train(
    model: nn.Module,
    rows: list[list[int]],
    targets: np.ndarray,
    fields: list[np.ndarray],
    weights: list[torch.Tensor],
    batches: list[np.ndarray],
    pad_id: int,
) -> list[float]:
    device, losses = model.device, []
    probe = nn.Linear(model.config.hidden_size, _N_FIELDS).to(device)
    contrast = nn.Linear(model.config.hidden_size, targets.shape[1], bias=False).to(device)
    parameters = [*model.parameters(), *probe.parameters(), *contrast.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=len(batches) + 1
    )
    model.train()
    for batch in batches:
        inputs = collate([rows[row] for row in batch], pad_id)
        field = pad_sequence([torch.from_numpy(fields[row]) for row in batch], True, _UNREAD).to(
            device
        )
        weight = pad_sequence([weights[row] for row in batch], True).to(device)
        target = torch.from_numpy(targets[batch]).to(device)
        outputs = model(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            output_hidden_states=True,
        )
        loss = nn.functional.mse_loss(outputs.logits, target)
        losses.append(loss.item())
        # Both heads that a classifier may have learn to read, each from the state that it will get.
        difference = torch.bmm(weight[:, None], outputs.hidden_states[-1]).squeeze(1)
        loss = loss + nn.functional.mse_loss(contrast(difference), target)
        # Before the last layer, which can then read A and B apart.
        named = probe(outputs.hidden_states[-2])
        (loss + nn.functional.cross_entropy(named.flatten(0, 1), field.flatten())).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def _save_without_head(model: nn.Module, folder: Path) -> None:
    # As language models, which is what real checkpoints are.
    auto = AutoModelForCausalLM if model.config.model_type == "qwen3" else AutoModelForMaskedLM
    with quiet_transformers():
        language_model = auto.from_pretrained(folder, dtype=torch.float32)
        language_model.load_state_dict(model.state_dict(), strict=False)
        language_model.save_pretrained(folder)


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TINY_TOKENS = {
    "modernbert": {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    },
    "qwen3": {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
}
_TINY_VOCABULARY = 3072


def make_tiny_checkpoint(kind: str, texts: Iterable[str], folder: Path, seed: int) -> Path:
    """Make a small checkpoint of a real architecture, with a tokenizer trained on the texts.

    Weights are random; nothing about votes is in it.

    Args:
        kind: "modernbert" (local and global layers in turn) or "qwen3" (grouped-query
            attention, chat template).
        texts: what the tokenizer learns its vocabulary from.
        folder: gets config, weights (safetensors) and tokenizer; replaced when there.
        seed: of the weights.

    Returns:
        The folder.
    """
    if kind not in _TINY_TOKENS:
        raise ValueError(f"checkpoint: expected tiny:modernbert or tiny:qwen3, got {TINY}{kind}")
    tokenizer = _make_tiny_tokenizer(kind, texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make_tiny_model(kind, tokenizer)
    with atomic_folder(folder) as tmp, quiet_transformers():
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
    return folder


def _make_tiny_tokenizer(kind: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    special = _TINY_TOKENS[kind]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so every script
        show_progress=False,
    )
    # Often enough for the words of the templates to become tokens of their own.
    template_texts = [INSTRUCTION, CUT_TEXT, TURN_TEXT, *ENCODER_NAMES] * 100
    backend.train_from_iterator(itertools.chain(map(text_of, texts), template_texts), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if kind == "qwen3":
        tokenizer.chat_template = _CHATML
    return tokenizer


def _make_tiny_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    model = _make_tiny_encoder(tokenizer) if kind == "modernbert" else _make_tiny_decoder(tokenizer)
    # Attention that starts sharp can tell positions apart from the first step; the usual
    # start is nearly uniform and takes thousands of steps to leave that.
    for name, parameter in model.named_parameters():
        if name.endswith("Wqkv.weight"):
            parameter.data[: 2 * parameter.shape[1]] *= 2  # queries and keys, not values
        elif name.endswith("q_norm.weight"):
            parameter.data *= 2
    return model


def _make_tiny_encoder(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    rope = {
        "rope_type": "default",
        "rope_theta": 1000.0,
    }  # for texts of hundreds of tokens, not thousands
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        global_attn_every_n_layers=2,
        local_attention=128,
        rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)},
        initializer_range=0.1,  # about 1 / sqrt(hidden_size)
        classifier_pooling="cls",
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    return ModernBertForMaskedLM(config)


def _make_tiny_decoder(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)
