"""Battles to token ids, and token ids to batches under a token budget.

The template's own pieces are ids that are never cut; what people and chatbots wrote
is tokenised with special tokens taken as plain text, cut fairly, and set between
them. An encoder reads [CLS] prompt [SEP] A [SEP] B [SEP], each answer under its name:
to tell one side of a [SEP] from the other by position alone is hard to learn. A
decoder reads the same three as one chat message and is asked for its answer, so
that the last token, which the classification head reads, is always the template's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from src.utils.models.template import CUT_TEXT, ENCODER_NAMES, INSTRUCTION, TURN_TEXT, cut_fields, text_of
from src.utils.schema import TEXTS

# Private-use characters, which no chat template contains.
_SLOTS = {name: chr(0xE000 + place) for place, name in enumerate(TEXTS)}

_TEXTS_PER_CALL = 2048  # a fast tokenizer holds about 100 bytes a token until a call ends
_POOL_BATCHES = 32  # batches whose rows are sorted together: larger pads less and shuffles less


@dataclass(frozen=True)
class Template:
    """What stands around the texts, as token ids.

    `pieces` are the four between and around prompt, A and B; `turn` separates two turns
    of one field; `cut` stands where the middle of a turn was left out.
    """

    pieces: tuple[tuple[int, ...], ...]
    turn: tuple[int, ...]
    cut: tuple[int, ...]

    @property
    def n_fixed(self) -> int:
        """Tokens of the four pieces."""
        return sum(map(len, self.pieces))


def make_template(tokenizer) -> Template:
    """Make the template that suits a tokenizer: a decoder's where it has a chat template, else an encoder's.

    The marks of an encoder's are [CLS] and [SEP], or what its tokenizer has in their place.

    Raises:
        ValueError: it has neither a chat template nor marks, or a battle would end with its padding.
    """
    first, between = _find_marks(tokenizer)
    if tokenizer.chat_template:
        pieces = _decoder_pieces(tokenizer)
    elif between is not None:
        marks = (between if first is None else first, *[between] * len(TEXTS))
        names = _tokenize(ENCODER_NAMES, tokenizer)
        pieces = tuple((mark, *name) for mark, name in zip(marks, names, strict=True))
    else:
        raise ValueError(f"{tokenizer.name_or_path}: expected a chat template, or the tokens [CLS] and [SEP], or EOS")
    if pieces[-1][-1:] == (tokenizer.pad_token_id,):
        raise ValueError(
            f"{tokenizer.name_or_path}: expected padding that no battle ends with, got {tokenizer.pad_token}; "
            "take the tokenizer from load_classifier or load_tokenizer, which choose another"
        )
    turn, cut = (tuple(_tokenize([text], tokenizer)[0]) for text in (TURN_TEXT, CUT_TEXT))
    return Template(pieces, turn, cut)


def _find_marks(tokenizer) -> tuple[int | None, int | None]:
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    return first, tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id


def _decoder_pieces(tokenizer) -> tuple[tuple[int, ...], ...]:
    message = {"role": "user", "content": INSTRUCTION.format(**_SLOTS)}
    chat = tokenizer.apply_chat_template(
        [message],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # hybrid models close their thinking at once; templates without this switch ignore it
        date_string="01 Jan 2024",  # Llama's would write today's, and read another text each day
    )
    for slot in _SLOTS.values():
        chat = chat.replace(slot, "\ue000")
    pieces = chat.split("\ue000")
    if len(pieces) != len(TEXTS) + 1:
        raise ValueError(f"{tokenizer.name_or_path}: its chat template repeats or drops the user's message")
    ids = [tuple(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
    # Some tokenizers add the token of the beginning by themselves, and their chat templates count on it.
    start = tuple(tokenizer("")["input_ids"][:1])
    if start == (tokenizer.bos_token_id,) and ids[0][:1] != start:
        ids[0] = start + ids[0]
    return tuple(ids)


def _tokenize(texts: Sequence[str], tokenizer) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS_PER_CALL]),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        ids.extend(encoded["input_ids"])
    return ids


def _tokenize_turns(column: pd.Series, tokenizer) -> list[list[list[int]]]:
    ids = iter(_tokenize([text_of(turn) for turns in column for turn in turns], tokenizer))
    return [[next(ids) for _ in turns] for turns in column]


def _tokenize_fields(pairs: pd.DataFrame, tokenizer) -> list[tuple[list[list[int]], ...]]:
    return list(zip(*(_tokenize_turns(pairs[name], tokenizer) for name in TEXTS), strict=True))


def _assemble(fields: Sequence[Sequence[list[int]]], template: Template, budget: int) -> list[int]:
    cut = cut_fields(fields, budget, template.cut, len(template.turn))
    row = list(template.pieces[0])
    for turns, piece in zip(cut, template.pieces[1:], strict=True):
        for place, turn in enumerate(turns):
            row += template.turn if place else ()
            row += turn
        row += piece
    return row


def _text_budget(template: Template, max_tokens: int) -> int:
    budget = max_tokens - template.n_fixed
    least = len(TEXTS) * (len(template.cut) + 2)
    if budget < least:
        raise ValueError(
            f"max_tokens: expected at least {template.n_fixed + least} "
            f"({template.n_fixed} of the template and a part of each text), got {max_tokens}"
        )
    return budget


def encode_pairs(pairs: pd.DataFrame, tokenizer, max_tokens: int) -> list[list[int]]:
    """Write each battle as the token ids that a model reads.

    Args:
        pairs: N battles; only the three texts are read.
        tokenizer: a fast tokenizer of transformers.
        max_tokens: most tokens of one battle; longer ones are cut by `text.cut_fields`.

    Returns:
        N lists of token ids, each with the whole template.

    Raises:
        ValueError: `max_tokens` has no room for the template and a part of each text.
    """
    template = make_template(tokenizer)
    budget = _text_budget(template, max_tokens)
    return [_assemble(fields, template, budget) for fields in _tokenize_fields(pairs, tokenizer)]


def encode_both_orders(pairs: pd.DataFrame, tokenizer, max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Write each battle twice, as given and with A and B exchanged, tokenising once.

    Returns:
        `encode_pairs(pairs, ...)` and `encode_pairs(swap_pairs(pairs), ...)`.
    """
    template = make_template(tokenizer)
    budget = _text_budget(template, max_tokens)
    fields = _tokenize_fields(pairs, tokenizer)
    given = [_assemble(field, template, budget) for field in fields]
    swapped = [_assemble((prompt, b, a), template, budget) for prompt, a, b in fields]
    return given, swapped


def count_tokens(pairs: pd.DataFrame, tokenizer) -> np.ndarray:
    """Count the tokens of each battle before anything is cut: (N,) int, template included."""
    template = make_template(tokenizer)
    between = len(template.turn)
    return np.array(
        [
            template.n_fixed + sum(sum(map(len, turns)) + between * max(len(turns) - 1, 0) for turns in fields)
            for fields in _tokenize_fields(pairs, tokenizer)
        ],
        dtype=np.int64,
    )


def is_canonical(pairs: pd.DataFrame) -> np.ndarray:
    """Tell which battles stand in canonical order: (N,) bool, answer A is not the later in code point order."""
    keys = [[tuple(map(text_of, turns)) for turns in pairs[name]] for name in TEXTS[1:]]
    return np.array([a <= b for a, b in zip(*keys, strict=True)], dtype=bool)


def make_batches(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, seed: int | None = None, epoch: int = 0
) -> list[np.ndarray]:
    """Group rows of like length so that rows x longest stays within a token budget.

    Args:
        lengths: (N,) tokens of each row.
        tokens_per_batch: padded tokens of one batch at most; a longer row goes alone.
        seed: None sorts all rows, longest first, which wastes least and meets the largest
            batch at once. A number shuffles for training: rows are dealt into pools that
            are sorted apart, then the batches are shuffled.
        epoch: changes the shuffle.

    Returns:
        Row indices of each batch; every row once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return []
    if seed is None:
        return _fill(np.argsort(-lengths, kind="stable"), lengths, tokens_per_batch)
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(len(lengths))
    n_pools = max(1, round(lengths.sum() / (tokens_per_batch * _POOL_BATCHES)))
    batches: list[np.ndarray] = []
    for pool in np.array_split(rows, n_pools):
        batches += _fill(pool[np.argsort(-lengths[pool], kind="stable")], lengths, tokens_per_batch)
    return [batches[place] for place in rng.permutation(len(batches))]


def make_packs(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, seed: int, epoch: int = 0
) -> list[np.ndarray]:
    """Group rows at random so that their own tokens stay within a budget: for batches without padding.

    Args:
        lengths: (N,) tokens of each row.
        tokens_per_batch: tokens of one batch at most; a longer row goes alone.
        seed: and `epoch`: of the order.

    Returns:
        Row indices of each batch; every row once.
    """
    packs: list[list[int]] = []
    n_tok = 0
    for row in np.random.default_rng((seed, epoch)).permutation(len(lengths)):
        if not packs or n_tok + lengths[row] > tokens_per_batch:
            packs.append([])
            n_tok = 0
        packs[-1].append(row)
        n_tok += lengths[row]
    return [np.array(pack) for pack in packs]


def _fill(rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    batches, start = [], 0
    while start < len(rows):
        # Rows come longest first, so the first of a batch is the width of all.
        n_rows = max(1, tokens_per_batch // max(int(lengths[rows[start]]), 1))
        batches.append(rows[start : start + n_rows])
        start += n_rows
    return batches


def collate(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to their longest.

    Left padding would move the [CLS] that an encoder reads, and a missing mask lets
    both models attend to padding; neither raises.

    Returns:
        `input_ids` and `attention_mask`, both (rows, longest) int64.
    """
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = torch.as_tensor(np.asarray(row), dtype=torch.int64)
        attention_mask[place, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
