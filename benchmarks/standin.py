"""A stand-in for the competition's rows whose true probabilities are known.

Each battle is spliced from two of those at hand: both answers are about half one's and half the
other's, cut between lines, and one word in ten is replaced, half of these by a word that the
simulated author likes. Lengths, layouts and what two answers share stay like the real ones'.
Votes follow Bradley-Terry with ties; the log-odds of A against B add three parts, of which no
member of the CPU baseline has the form:

    style    effects of length that level off and depend on the prompt, of lists, refusals …
    words    a small effect of each of some thousand words that an answer holds
    author   the strength of its author, which the text betrays by that author's words alone

and the log-odds of a tie the likeness of the answers and effects of the prompt's words.
"""

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import softmax
from scipy.stats import zscore
from sklearn.feature_extraction.text import CountVectorizer

from src.utils.battles.style import measure_style
from src.utils.schema import MODELS, TEXTS, TIE, Turns, join_turns
from src.utils.stats.ranking import davidson_logits

N_AUTHORS, N_LIKED = 64, 40  # the competition's chatbots; words that each of them likes
MIN_SHARE = 0.01  # a word that a smaller share of the answers holds has no effect
# Standard deviations over battles of each part of the log-odds of A against B, and of a tie:
# the oracle and what is reached from 1,000 battles are then about those of the arena.
GAP_PARTS = {"style": 0.95, "words": 0.65, "author": 0.35}
TIE_PARTS = {"likeness": 0.35, "prompt": 0.2}
TIE_SHARE = 0.3


class _Writer:
    """Rewrites texts, drawing all chance from one generator."""

    def __init__(self, pairs: pd.DataFrame, rng: np.random.Generator) -> None:
        self._rng = rng
        texts = [join_turns(turns) for name in TEXTS[1:] for turns in pairs[name]]
        self._words = " ".join(texts).split(" ")
        self._liked = rng.choice(sorted(set(self._words)), size=(N_AUTHORS, N_LIKED)).tolist()

    def replace_words(self, turn: str, author: int | None = None) -> str:
        """Replace one word in ten, half of them by words that an author likes."""
        words = turn.split(" ")
        places = self._rng.integers(len(words), size=(len(words) + 9) // 10)
        others = self._rng.integers(len(self._words), size=len(places))
        for place, other in zip(places, others, strict=True):
            words[place] = self._words[other]
        if author is not None:
            for place, other in zip(places[::2], others[::2], strict=True):
                words[place] = self._liked[author][other % N_LIKED]
        return " ".join(words)

    def splice(self, first: Turns, second: Turns, cut: float, author: int) -> Turns:
        """Start each turn with the lines of one answer, end it with another's, replace words."""
        turns = []
        for place, turn in enumerate(first):
            other = second[place % len(second)] if second else ""
            lines, others = (turn or "").split("\n"), (other or "").split("\n")
            lines[round(cut * len(lines)) :] = others[round(cut * len(others)) :]
            turns.append(self.replace_words("\n".join(lines), author))
        return tuple(turns)


def make_battles(
    source: pd.DataFrame, n_pairs: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Make battles from others, and let people vote on them.

    Returns:
        battles: the columns of `source`, ids from 0.
        truth: (N, C) float64, the probabilities that votes were drawn from.
        equal: (N, C) float64, the same, were all authors equally strong.
    """
    rng = np.random.default_rng(seed)
    writer = _Writer(source, rng)
    pairs = source.iloc[rng.integers(len(source), size=n_pairs)].reset_index(drop=True)
    seconds = source.iloc[rng.integers(len(source), size=n_pairs)]
    cuts = rng.uniform(0.3, 0.7, size=n_pairs)
    authors = rng.integers(N_AUTHORS, size=(n_pairs, 2))
    prompts: list[Turns] = []
    for turns in pairs["prompt"]:
        prompts.append(tuple(writer.replace_words(turn or "") for turn in turns))
    columns = {"prompt": prompts}
    for side, name in enumerate(TEXTS[1:]):
        columns[name] = []
        for parts in zip(pairs[name], seconds[name], cuts, authors[:, side], strict=True):
            columns[name].append(writer.splice(*parts))
    pairs = pairs.assign(id=np.arange(n_pairs))
    for name, texts in columns.items():
        pairs[name] = pd.Series(texts, dtype=object)
    for side, name in enumerate(MODELS):
        pairs[name] = [f"author-{author}" for author in authors[:, side]]
    truth, equal = _decide(pairs, authors, rng)
    labels = (rng.random((n_pairs, 1)) > truth.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return pairs.assign(label=labels), truth, equal


def _decide(
    pairs: pd.DataFrame, authors: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The true probabilities, and those without the authors' strengths."""
    style = measure_style(pairs)
    texts = {name: [join_turns(turns) for turns in pairs[name]] for name in TEXTS}
    counter = CountVectorizer(binary=True, min_df=MIN_SHARE)
    presence = {"response_a": counter.fit_transform(texts["response_a"])}
    presence |= {name: counter.transform(texts[name]) for name in ("prompt", "response_b")}
    effects = rng.normal(size=(presence["prompt"].shape[1], 2))
    sums = {}
    for name, held in presence.items():
        n_held = np.maximum(np.diff(held.indptr), 1)
        sums[name] = held @ effects / np.sqrt(n_held)[:, None]
    strengths = rng.normal(size=N_AUTHORS)[authors]
    gaps = {
        "style": _value_style(style, "a") - _value_style(style, "b"),
        "words": sums["response_a"][:, 0] - sums["response_b"][:, 0],
        "author": strengths[:, 0] - strengths[:, 1],
    }
    ties = {
        "likeness": np.log(style["word_jaccard"].to_numpy() + 0.02),
        "prompt": sums["prompt"][:, 1],
    }
    gaps = {name: GAP_PARTS[name] * part / np.std(part) for name, part in gaps.items()}
    tie = sum(TIE_PARTS[name] * zscore(part) for name, part in ties.items())
    text_alone = gaps["style"] + gaps["words"]
    return _predict(text_alone + gaps["author"], tie), _predict(text_alone, tie)


def _predict(gap: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """Probabilities with the intended share of ties: (N,), (N,) -> (N, C)."""

    def predict(shift: float) -> np.ndarray:
        return softmax(davidson_logits(gap, tie + shift), axis=1)

    return predict(brentq(lambda shift: predict(shift)[:, TIE].mean() - TIE_SHARE, -5, 5))


def _value_style(style: pd.DataFrame, side: str) -> np.ndarray:
    """What voters make of an answer's style: (N,) log-odds before scaling."""
    own = {name: style[f"{name}_{side}"].to_numpy(dtype=np.float64) for name in _READ}
    length = np.log1p(own["n_chars"])
    # After a short question a long answer counts for less; beyond 2,000 characters for nothing.
    value = np.minimum(length, np.log(2000)) * np.where(style["n_chars_prompt"] < 60, 0.3, 0.6)
    value += 0.3 * np.minimum(own["n_list_items"], 5) / 5 + 0.2 * (own["n_bold"] > 0)
    value += 0.8 * own["prompt_overlap"] - 0.5 * (own["n_exclamation_marks"] > 2)
    return value - 1.2 * own["is_refusal"] - 1.0 * own["has_apology"] * (1 - own["is_refusal"])


_READ = (
    "n_chars n_list_items n_bold prompt_overlap n_exclamation_marks is_refusal has_apology"
).split()
