"""What the CPU baseline reads of a battle: style, words, characters, openings, endings, meaning.

Every block of features either changes its sign when A and B are exchanged, or stays as it is:

    style       differences of the counts of `style.py`
    words       differences of each word's share among an answer's words
    characters  which sequences of two to four bytes one answer holds and the other does not
    opening     the same, of the first characters alone; ending: of the last ones
    signs       which single characters one answer holds and the other does not
    meaning     difference of the answers' mean word vectors
    beginning   the same, of their first few sentences
    relevance   whose word vectors are closer to the prompt's
    shared      features of the battle as a whole, as `style.py` has them
    likeness    how much the answers have in common, by the blocks above

The absolute values of a difference say how unlike the answers are, whoever wrote which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from src.utils.battles.style import measure_style, style_differences, style_shared
from src.utils.config import BaselineConfig
from src.utils.models.word_vectors import WordVectors, fetch_vectors
from src.utils.schema import join_turns

WORD_PATTERN = r"\w+|[^\w\s]"  # words and signs
OPENING, ENDING, BEGINNING = 40, 100, 300  # characters of an answer
_N_GRAMS = (2, 3, 4)  # bytes
_AT_ONCE = 4096  # battles
# 2^64 over the golden ratio: Fibonacci hashing, Knuth volume 3, section 6.4.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

_Sides = tuple[list[str], list[str]]  # texts of the answers A, and B
_Reader = Callable[[list[str]], sparse.csr_matrix]  # which columns each text has


@dataclass(frozen=True)
class Features:
    """What the members read of N battles, not yet scaled: block -> (N, width)."""

    signed: dict[str, np.ndarray]  # changes sign under the swap
    unsigned: dict[str, np.ndarray]  # unchanged under the swap
    texts: dict[str, sparse.csr_matrix]  # sparse, changes sign under the swap

    def take(self, rows: np.ndarray) -> "Features":
        """Select rows by mask or position."""
        return Features(*({k: block[rows] for k, block in part.items()} for part in self.parts))

    @property
    def parts(self) -> tuple[dict, dict, dict]:
        """The three kinds of blocks, in the order of the fields."""
        return self.signed, self.unsigned, self.texts


def measure_features(
    pairs: pd.DataFrame, config: BaselineConfig, vectors: WordVectors | None = None
) -> Features:
    """Measure battles for all members.

    `config.n_hashed` is the width of words and characters, a quarter of it that of openings,
    endings and signs. Without `vectors`, those that `config.word_vectors` names are fetched.
    """
    vectors = vectors or fetch_vectors(config.word_vectors)
    # Some battles at a time: all blocks of both answers would take four times the room.
    starts = range(0, len(pairs), _AT_ONCE)
    measured = [_measure(pairs.iloc[n : n + _AT_ONCE], config.n_hashed, vectors) for n in starts]
    signed, unsigned, texts = zip(*(part.parts for part in measured), strict=True)
    joined = {name: sparse.vstack([p.pop(name) for p in texts], "csr") for name in [*texts[0]]}
    return Features(_stack(signed), _stack(unsigned), joined)


def _stack(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.vstack([part[name] for part in parts]) for name in parts[0]}


def _measure(pairs: pd.DataFrame, n_hashed: int, vectors: WordVectors | None) -> Features:
    style = measure_style(pairs)
    sides = [*pairs["response_a"].map(join_turns)], [*pairs["response_b"].map(join_turns)]
    words = hash_words(n_hashed)
    texts = {"words": words.transform(sides[0]) - words.transform(sides[1])}
    narrow = max(n_hashed // 4, 1)
    readers: dict[str, _Reader] = {
        "characters": lambda side: hash_bytes(side, n_hashed),
        "opening": lambda side: hash_bytes([text[:OPENING] for text in side], narrow),
        "ending": lambda side: hash_bytes([text[-ENDING:] for text in side], narrow),
        "signs": lambda side: _find_signs(side, narrow),
    }
    likeness = []
    for name, read in readers.items():
        texts[name], in_common = _compare(sides, read)
        likeness.append(in_common)
    n_chars = np.log1p([[*map(len, side)] for side in sides])
    likeness.append(np.abs(n_chars[0] - n_chars[1]))
    signed = {"style": style_differences(style)[0]}
    if vectors is not None:
        meanings, closeness = _read_meaning([*pairs["prompt"].map(join_turns)], sides, vectors)
        signed |= meanings
        likeness.append(closeness)
    unsigned = {"shared": style_shared(style), "likeness": np.column_stack(likeness)}
    return Features(signed, unsigned, texts)


def _read_meaning(
    prompts: list[str], sides: _Sides, vectors: WordVectors
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The blocks that word vectors give, and how close the answers are: cosines, (N,)."""
    prompt = vectors.embed(prompts)
    a, b = (vectors.embed(side) for side in sides)
    a_first, b_first = (vectors.embed([text[:BEGINNING] for text in side]) for side in sides)
    relevance = _cosine(prompt, a) - _cosine(prompt, b)
    signed = {"meaning": a - b, "beginning": a_first - b_first, "relevance": relevance[:, None]}
    return signed, _cosine(a, b)


def _compare(sides: _Sides, read: _Reader) -> tuple[sparse.csr_matrix, np.ndarray]:
    """What one answer holds and the other does not; the share in common, (N,) in 0..1."""
    a, b = (read(texts) for texts in sides)
    difference = a - b
    n_each = np.diff(a.indptr) + np.diff(b.indptr)
    n_apart = difference.getnnz(axis=1)
    n_distinct = (n_each + n_apart) / 2
    return difference, np.where(n_distinct > 0, 1 - n_apart / np.maximum(n_distinct, 1), 1.0)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.einsum("nd,nd->n", x, y) / np.maximum(lengths, 1e-9)


def hash_words(n_hashed: int) -> HashingVectorizer:
    """Make what counts each word's share among a text's words."""
    look = {"token_pattern": WORD_PATTERN, "alternate_sign": False, "norm": "l1"}
    return HashingVectorizer(n_features=n_hashed, dtype=np.float32, **look)


def hash_bytes(texts: list[str], n_hashed: int) -> sparse.csr_matrix:
    """Find which sequences of 2 to 4 bytes each text holds: (N, n_hashed) float32 of 0 and 1."""
    found = np.zeros(n_hashed, dtype=bool)  # used in turn: several times as fast as np.unique
    return _mark([_hash_text(text, found) for text in texts], n_hashed)


def _find_signs(texts: list[str], n_hashed: int) -> sparse.csr_matrix:
    """Find which single characters each text holds, capitals apart: (N, n_hashed) float32."""
    columns = [sorted({ord(sign) % n_hashed for sign in set(text)}) for text in texts]
    return _mark([np.array(found, dtype=np.int32) for found in columns], n_hashed)


def _mark(columns: list[np.ndarray], width: int) -> sparse.csr_matrix:
    ends = np.cumsum([0] + [len(found) for found in columns])
    indices = np.concatenate([*columns, np.empty(0, dtype=np.int32)])
    ones = np.ones(len(indices), dtype=np.float32)
    return sparse.csr_matrix((ones, indices, ends), shape=(len(columns), width))


def _hash_text(text: str, found: np.ndarray) -> np.ndarray:
    data = np.frombuffer(f" {text.lower()} ".encode(), dtype=np.uint8).astype(np.uint64)
    for length in _N_GRAMS:
        codes = np.full(max(len(data) - length + 1, 0), length, dtype=np.uint64)
        for offset in range(length):
            codes = codes << np.uint64(8) | data[offset : offset + len(codes)]
        found[(codes * _MULTIPLIER >> np.uint64(32)) % np.uint64(len(found))] = True
    columns = np.flatnonzero(found).astype(np.int32)
    found[columns] = False
    return columns
