"""Turn a battle into token ids: the template around its texts, and fair cuts to a token budget.

An encoder reads [CLS] prompt [SEP] A [SEP] B [SEP], each answer under a heading: position
alone is hard to learn. A decoder reads the texts in one chat message that asks for a verdict.
The template itself, and with it the last token, which a decoder's head reads, is never cut. The
texts share the rest of the budget max-min fairly; within a text the last turns are kept first,
and a turn that does not fit loses its middle. Exchanging A and B exchanges what is cut.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from src.utils.schema import TEXTS, clean_text

Token = TypeVar("Token")
Turns = list[list[int]]  # token ids of each turn of one text

# Increase with every change that gives a battle other ids: it is part of each checkpoint's key.
TEMPLATE_VERSION = 1

TURN_TEXT = "\n\n[next turn]\n\n"
CUT_TEXT = "\n[...]\n"
INSTRUCTION = (
    "Two chatbots answered the same user. Which answer does the user prefer: A, B, or neither "
    "(a tie)?\n\nUser:\n{prompt}\n\nAnswer A:\n{response_a}\n\nAnswer B:\n{response_b}\n\n"
    "The user prefers"
)
ENCODER_HEADINGS = ("", "Answer A:\n", "Answer B:\n", "")
MIN_TURN_TOK = 8  # an older turn cut to fewer tokens is not worth its separator

_SLOT = "\ue000"  # a private-use character, which no chat template contains
_BATTLES_PER_CALL = 256  # a fast tokenizer holds about 100 bytes per token until a call returns


def share_budget(lengths: Sequence[int], budget: int) -> list[int]:
    """Divide a budget of tokens max-min fairly: short texts are complete, long ones share equally.

    The remainder of the division is not used, so that reordering texts reorders their shares.

    Example:
        [10, 100, 300], 110 -> [10, 50, 50]

    Source: max-min fairness by progressive filling, Bertsekas and Gallager, Data Networks, 6.5.2.
    """
    remaining = max(budget, 0)
    for n_served, length in enumerate(sorted(lengths)):
        fair = remaining // (len(lengths) - n_served)
        if length > fair:
            return [min(length, fair) for length in lengths]
        remaining -= length
    return list(lengths)


def cut_middle(tokens: Sequence[Token], n_tokens: int, marker: Sequence[Token] = ()) -> list[Token]:
    """Cut a sequence to at most `n_tokens`, marker included, keeping its start and end around it.

    Example:
        "abcdefgh", 5, "." -> ["a", "b", ".", "g", "h"]; without room for both ends: the start
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
    """Cut the turns of one text to a budget: the last are kept first, and one loses its middle.

    The budget includes `marker`, which replaces that middle, and `n_between` tokens between two
    turns. A text with tokens keeps some if the budget is 1 or more.
    """
    kept: list[list[Token]] = []
    remaining = budget
    for turn in reversed(turns):
        remaining -= n_between if kept else 0
        if kept and remaining < min(len(turn), MIN_TURN_TOK):
            break
        kept.append(cut_middle(turn, remaining, marker))
        remaining -= len(kept[-1])
    kept.reverse()
    if not any(kept) and any(map(len, turns)):
        # Empty last turns have used up the budget on separators: keep the last turn with tokens.
        last = [turn for turn in turns if len(turn)][-1]
        return [cut_middle(last, budget, marker)]
    return kept


def _count(turns: Sequence[Sequence[Token]], n_between: int) -> int:
    return sum(map(len, turns)) + n_between * max(len(turns) - 1, 0)


@dataclass(frozen=True)
class Template:
    """Token ids around the texts."""

    pieces: tuple[tuple[int, ...], ...]  # the four before, between and after prompt, A and B
    turn: tuple[int, ...]  # between two turns of one text
    cut: tuple[int, ...]  # in place of the middle of a turn

    @property
    def n_fixed(self) -> int:
        """Tokens of the four pieces."""
        return sum(map(len, self.pieces))


def make_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Make a tokenizer's template: a decoder's if it has a chat template, else an encoder's."""
    pieces = make_pieces(tokenizer)
    if pieces[-1][-1:] == (tokenizer.pad_token_id,):
        raise ValueError(
            f"{tokenizer.name_or_path}: expected a padding token that no battle ends with, got "
            f"{tokenizer.pad_token}; load_classifier and load_tokenizer choose another"
        )
    turn, cut = _tokenize([TURN_TEXT, CUT_TEXT], tokenizer)
    return Template(pieces, tuple(turn), tuple(cut))


def make_pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Make the pieces of `make_template`, whatever the padding token is."""
    return _decoder_pieces(tokenizer) if tokenizer.chat_template else _encoder_pieces(tokenizer)


def _encoder_pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    sep = tokenizer.eos_token_id if sep is None else sep
    cls = tokenizer.bos_token_id if cls is None else cls
    if sep is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: expected a chat template, or the token [SEP] or EOS"
        )
    special = (sep if cls is None else cls, sep, sep, sep)
    headings = _tokenize(ENCODER_HEADINGS, tokenizer)
    return tuple((token, *heading) for token, heading in zip(special, headings, strict=True))


def _decoder_pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    message = {"role": "user", "content": INSTRUCTION.format(**dict.fromkeys(TEXTS, _SLOT))}
    chat = tokenizer.apply_chat_template(
        [message],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # hybrid models close their thinking at once; others ignore it
        date_string="01 Jan 2024",  # Llama's would otherwise write today's date
    )
    pieces = str(chat).split(_SLOT)
    if len(pieces) != len(TEXTS) + 1:
        raise ValueError(
            f"{tokenizer.name_or_path}: expected a chat template that writes the user's message "
            f"once, got {len(pieces) - 1} of {len(TEXTS)} texts"
        )
    ids = [tuple(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
    # Some tokenizers add BOS themselves, and their chat templates rely on it.
    start = tuple(tokenizer("")["input_ids"][:1])
    if start == (tokenizer.bos_token_id,) and ids[0][:1] != start:
        ids[0] = start + ids[0]
    return tuple(ids)


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    if not tokenizer.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tokenizer(list(texts), **options)["input_ids"]
    # By its own call the tokenizer uses every core, and half as many seconds of each as by
    # transformers', which sets these three again with every call.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # as plain text
    return (found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False))


def _tokenize_battles(
    pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Turns, ...]]:
    """Yield prompt, A and B of each battle, some battles at a time: lists of ids take memory."""
    for start in range(0, len(pairs), _BATTLES_PER_CALL):
        some = pairs.iloc[start : start + _BATTLES_PER_CALL]
        battles = list(zip(*(some[name] for name in TEXTS), strict=True))
        texts = [clean_text(turn) for battle in battles for turns in battle for turn in turns]
        ids = iter(_tokenize(texts, tokenizer))
        for battle in battles:
            yield tuple(list(islice(ids, len(turns))) for turns in battle)


@dataclass(frozen=True)
class Encoded:
    """The token ids of N battles in both orders, which keep the same tokens of each text."""

    lengths: np.ndarray  # (N,) int64, tokens of each battle, in either order
    _pieces: list[np.ndarray]  # the four of the template
    _texts: np.ndarray  # int32, what is kept of prompt, A and B, battle by battle
    _starts: np.ndarray  # (3 N + 1,) int64, of each text, and the end of the last

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, battle: int, is_swapped: bool) -> np.ndarray:
        """Put together what a model reads, A and B exchanged if `is_swapped`: (tokens,) int32."""
        start_prompt, start_a, start_b, end = self._starts[3 * battle : 3 * battle + 4]
        first, second = self._texts[start_a:start_b], self._texts[start_b:end]
        if is_swapped:
            first, second = second, first
        before, before_first, before_second, after = self._pieces
        prompt = self._texts[start_prompt:start_a]
        parts = (before, prompt, before_first, first, before_second, second, after)
        return np.concatenate(parts)


def encode_battles(
    pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Encoded:
    """Write battles as the token ids that a model reads, at most `max_tokens` of each.

    All cores tokenise, unless TOKENIZERS_PARALLELISM=false; 4 bytes per token are kept. ValueError
    if `max_tokens` has no room for the template and a part of each text.
    """
    template = make_template(tokenizer)
    least = template.n_fixed + len(TEXTS) * (len(template.cut) + 2)
    if max_tokens < least:
        raise ValueError(
            f"max_tokens: expected at least {least} ({template.n_fixed} of the template and a part "
            f"of each text), got {max_tokens}"
        )
    n_between = len(template.turn)
    ids, starts = array("i"), array("q", [0])
    for texts in _tokenize_battles(pairs, tokenizer):
        lengths = [_count(turns, n_between) for turns in texts]
        shares = share_budget(lengths, max_tokens - template.n_fixed)
        for turns, share in zip(texts, shares, strict=True):
            for place, turn in enumerate(cut_turns(turns, share, template.cut, n_between)):
                if place:
                    ids.extend(template.turn)
                ids.extend(turn)
            starts.append(len(ids))
    ends = np.array(starts, dtype=np.int64)
    n_tok = template.n_fixed + np.diff(ends[:: len(TEXTS)])
    pieces = [np.array(piece, dtype=np.int32) for piece in template.pieces]
    return Encoded(n_tok, pieces, np.asarray(ids, dtype=np.int32), ends)


def encode_pairs(
    pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[list[int]]:
    """List the token ids of each battle as given: `encode_battles` for a few battles."""
    encoded = encode_battles(pairs, tokenizer, max_tokens)
    return [encoded.row(battle, False).tolist() for battle in range(len(encoded))]


def count_tokens(pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Count the tokens of each battle before anything is cut: (N,) int64, template included."""
    template = make_template(tokenizer)
    n_between = len(template.turn)
    counts = [
        template.n_fixed + sum(_count(turns, n_between) for turns in texts)
        for texts in _tokenize_battles(pairs, tokenizer)
    ]
    return np.array(counts, dtype=np.int64)
