"""Text to a token budget: what is cut when a battle is too long, and what never is.

Fields share the budget max-min fairly: short ones stay whole, long ones get equal
parts. Within a field the last turns are kept first, and a turn that does not fit
loses its middle. Nothing here knows whose answer is whose, so exchanging A and B
cuts the same words. Tokens may be of any kind; whoever calls brings a tokenizer. The
words of the templates stand here too, once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd

from src.utils.schema import TEXTS

Token = TypeVar("Token")

# Raise this with every change that gives a battle other ids: it is part of each checkpoint's key.
TEMPLATE_VERSION = 1

TURN_TEXT = "\n\n[next turn]\n\n"
CUT_TEXT = "\n[...]\n"
INSTRUCTION = (
    "Two chatbots answered the same user. Which answer does the user prefer: A, B, or neither (a tie)?\n\n"
    "User:\n{prompt}\n\nAnswer A:\n{response_a}\n\nAnswer B:\n{response_b}\n\nThe user prefers"
)
ENCODER_NAMES = ("", "Answer A:\n", "Answer B:\n", "")

_SURROGATES = re.compile("[\ud800-\udfff]")
# Below this many tokens of its own, an older turn tells less than its separator costs.
MIN_TURN_TOK = 8


def text_of(turn: str | None) -> str:
    """Give a turn as text that any tokenizer takes: None is empty, lone surrogates become U+FFFD.

    Example:
        None -> ""; "hi \\ud83d" -> "hi \\ufffd"
    """
    return "" if turn is None else _SURROGATES.sub("\ufffd", turn)


def share_budget(lengths: Sequence[int], budget: int) -> list[int]:
    """Divide a budget max-min fairly: short fields whole, the long ones an equal part.

    Args:
        lengths: tokens that each field would like, 0 or more.
        budget: tokens that there are.

    Returns:
        Tokens that each field gets, at most its length; they sum to at most the budget.
        What equal parts leave over is not used, so that reordering the fields reorders
        the parts and changes nothing else.

    Example:
        [10, 100, 300], 110 -> [10, 50, 50]

    Source: max-min fairness by progressive filling, Bertsekas and Gallager, Data Networks, 6.5.2.
    """
    shares = list(lengths)
    left = max(budget, 0)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for rank, field in enumerate(order):
        fair = left // (len(order) - rank)
        if lengths[field] > fair:
            for other in order[rank:]:
                shares[other] = fair
            break
        left -= lengths[field]
    return shares


def cut_middle(tokens: Sequence[Token], n_tokens: int, marker: Sequence[Token] = ()) -> list[Token]:
    """Cut a sequence to at most `n_tokens`, keeping its head and tail around a marker.

    Args:
        tokens: the sequence.
        n_tokens: most tokens of the result, marker included.
        marker: stands where something is missing; left out when it would take the room
            of both head and tail.

    Example:
        "abcdefgh", 5, "." -> ["a", "b", ".", "g", "h"]
    """
    if len(tokens) <= n_tokens:
        return list(tokens)
    n_kept = n_tokens - len(marker)
    if n_kept < 2:
        return list(tokens[: max(n_tokens, 0)])
    n_tail = n_kept // 2
    return [*tokens[: n_kept - n_tail], *marker, *tokens[len(tokens) - n_tail :]]


def cut_turns(
    turns: Sequence[Sequence[Token]], budget: int, marker: Sequence[Token] = (), n_between: int = 0
) -> list[list[Token]]:
    """Cut the turns of one field to a budget: the last are kept first, the one at the edge loses its middle.

    Args:
        turns: one sequence of tokens a turn, in order.
        budget: most tokens of the result, separators included.
        marker: stands where the middle of a turn is missing.
        n_between: tokens of the separator between two turns.

    Returns:
        The turns that are kept, in order; older ones are missing. A field that holds
        tokens keeps some whenever the budget is 1 or more.
    """
    kept: list[list[Token]] = []
    left = budget
    for turn in reversed(turns):
        left -= n_between if kept else 0
        if kept and left < min(len(turn), MIN_TURN_TOK):
            break
        kept.append(cut_middle(turn, left, marker))
        left -= len(kept[-1])
    if not any(kept):
        # Empty last turns may have used up the room on separators.
        return [cut_middle(turn, budget, marker) for turn in turns if len(turn)][-1:] or kept[::-1]
    return kept[::-1]


def cut_fields(
    fields: Sequence[Sequence[Sequence[Token]]],
    budget: int,
    marker: Sequence[Token] = (),
    n_between: int = 0,
) -> list[list[list[Token]]]:
    """Cut the fields of one battle (prompt, answer A, answer B) to a common budget.

    Args:
        fields: per field its turns, each a sequence of tokens.
        budget: most tokens of all fields together, separators included.
        marker: stands where the middle of a turn is missing.
        n_between: tokens of the separator between two turns of a field.

    Returns:
        Per field the turns that are kept. Exchanging two fields exchanges the result.

    Raises:
        ValueError: the budget can not give every field one token.
    """
    if budget < len(fields):
        raise ValueError(
            f"budget: expected at least one token for each of {len(fields)} fields, got {budget}"
        )
    lengths = [sum(map(len, turns)) + n_between * max(len(turns) - 1, 0) for turns in fields]
    shares = share_budget(lengths, budget)
    return [
        cut_turns(turns, share, marker, n_between)
        for turns, share in zip(fields, shares, strict=True)
    ]


# Private-use characters, which no chat template contains.
_SLOTS = {name: chr(0xE000 + place) for place, name in enumerate(TEXTS)}
_TEXTS_PER_CALL = 2048  # a fast tokenizer holds about 100 bytes a token until a call ends


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
        raise ValueError(
            f"{tokenizer.name_or_path}: expected a chat template, or the tokens [CLS] and [SEP], or EOS"
        )
    if pieces[-1][-1:] == (tokenizer.pad_token_id,):
        raise ValueError(
            f"{tokenizer.name_or_path}: expected padding that no battle ends with, got {tokenizer.pad_token}; "
            "take the tokenizer from load_classifier or load_tokenizer, which choose another"
        )
    turn, cut = (tuple(_tokenize([text], tokenizer)[0]) for text in (TURN_TEXT, CUT_TEXT))
    return Template(pieces, turn, cut)


def _find_marks(tokenizer) -> tuple[int | None, int | None]:
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    return (
        first,
        tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id,
    )


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
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template repeats or drops the user's message"
        )
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


def encode_both_orders(
    pairs: pd.DataFrame, tokenizer, max_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
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
            template.n_fixed
            + sum(sum(map(len, turns)) + between * max(len(turns) - 1, 0) for turns in fields)
            for fields in _tokenize_fields(pairs, tokenizer)
        ],
        dtype=np.int64,
    )
