"""Text to a token budget: what is cut when a battle is too long, and what never is.

Fields share the budget max-min fairly: short ones stay whole, long ones get equal
parts. Within a field the last turns are kept first, and a turn that does not fit
loses its middle. Nothing here knows whose answer is whose, so exchanging A and B
cuts the same words. Tokens may be of any kind; whoever calls brings a tokenizer. The
words of the templates stand here too, once.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

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
    fields: Sequence[Sequence[Sequence[Token]]], budget: int, marker: Sequence[Token] = (), n_between: int = 0
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
        raise ValueError(f"budget: expected at least one token for each of {len(fields)} fields, got {budget}")
    lengths = [sum(map(len, turns)) + n_between * max(len(turns) - 1, 0) for turns in fields]
    shares = share_budget(lengths, budget)
    return [cut_turns(turns, share, marker, n_between) for turns, share in zip(fields, shares, strict=True)]
