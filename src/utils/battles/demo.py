"""Simulate an arena whose true probabilities are known, to check every estimate against.

Chatbots of different strength answer prompts on several topics. A vote follows
Davidson's extension of Bradley-Terry to ties, with utilities that are functions of
the text alone:

    p_A : p_B : p_tie = exp(u_A + position) : exp(u_B) : nu exp((u_A + position + u_B) / 2)

A stronger chatbot writes measurably better text, so its name is not needed, and the mean
entropy of the true probabilities is the oracle log loss.

Source: Davidson 1970, JASA 65(329):317-328, doi:10.1080/01621459.1970.10481082.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from src.utils.runs import write_json, write_table
from src.utils.schema import LABELS, MODELS, TEXTS, Turns, join_turns

PHRASES = yaml.safe_load(Path(__file__).with_name("demo.yaml").read_text(encoding="utf-8"))
_TOPIC_WORDS = {topic: words.split() for topic, words in PHRASES["topics"].items()}
_CONTENT_WORDS = frozenset(" ".join(PHRASES["topics"].values()).split())
_STRONG_WORDS = frozenset(PHRASES["strong"].split())
_WEAK_WORDS = frozenset(PHRASES["weak"].split())
_COMMON_WORDS = PHRASES["common"].split()
_PUNCTUATION = re.compile(r"[,;:!?]")
_LIST_ITEM = re.compile(r"^- ", re.MULTILINE)
_WORD = re.compile(r"\w+")
_REFUSAL = re.compile("|".join(map(re.escape, PHRASES["refusals"])))


@dataclass(frozen=True)
class Effects:
    """What a voter values, in log-odds per unit of each measure of `measure_answer`."""

    log_words: float = 0.5  # per natural log of 1 + words
    quality: float = 6.0  # per share of strong words minus share of weak words
    relevance: float = 1.5  # from none to all of the prompt's content words
    lists: float = 0.35  # an answer with list items against one without
    punctuation: float = 0.10  # per , ; : ! ? in 100 characters
    refusal: float = -1.5  # a refusal against an answer
    position: float = 0.10  # bonus of position A
    nu: float = 1.1  # weight of a tie


EFFECTS = Effects()
MEASURES = ("log_words", "quality", "relevance", "lists", "punctuation", "refusal")
_REPEATED_SHARE = 0.004  # battles that repeat an earlier one, half of them mirrored


@dataclass(frozen=True)
class Chatbot:
    """Habits of one chatbot; all shares in [0, 1]."""

    name: str
    skill: float  # how strongly it prefers strong words to weak ones
    n_words: float  # median length of an answer
    listing: float  # share of answers with list items
    refusing: float  # share of answers that refuse
    focus: float  # probability of taking up a content word of the prompt


CHATBOTS = tuple(Chatbot(**habits) for habits in PHRASES["chatbots"])


def measure_answer(prompt: Turns, answer: Turns) -> np.ndarray:
    """Measure in an answer what the demo's voters value: (len(MEASURES),) float64."""
    text = join_turns(tuple(filter(None, answer)))
    words = _WORD.findall(text.lower())
    n_words = max(len(words), 1)
    asked = _CONTENT_WORDS.intersection(_WORD.findall(join_turns(prompt).lower()))
    n_strong = sum(word in _STRONG_WORDS for word in words)
    n_weak = sum(word in _WEAK_WORDS for word in words)
    return np.array(
        [
            np.log1p(len(words)),
            (n_strong - n_weak) / n_words,
            len(asked.intersection(words)) / max(len(asked), 1),
            float(_LIST_ITEM.search(text) is not None),
            100 * len(_PUNCTUATION.findall(text)) / max(len(text), 1),
            float(_REFUSAL.search(text) is not None),
        ]
    )


def measure_differences(pairs: pd.DataFrame) -> pd.DataFrame:
    """Measure what the voters value in both answers of N battles: A − B, a column per measure."""
    sides = []
    for answer in ("response_a", "response_b"):
        measured = map(measure_answer, pairs["prompt"], pairs[answer])
        sides.append(np.array(list(measured)).reshape(-1, len(MEASURES)))
    return pd.DataFrame(sides[0] - sides[1], columns=list(MEASURES))


def true_probs(prompt: Turns, a: Turns, b: Turns, effects: Effects = EFFECTS) -> np.ndarray:
    """Compute the probabilities by which votes are drawn: (C,) float64 in `LABELS` order."""
    weights = np.array([getattr(effects, name) for name in MEASURES])
    utility_a = weights @ measure_answer(prompt, a) + effects.position
    gap = utility_a - weights @ measure_answer(prompt, b)
    odds = np.array([np.exp(gap / 2), np.exp(-gap / 2), effects.nu])
    return odds / odds.sum()


class _Writer:
    """Writes prompts and answers, drawing all chance from one generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def _pick(self, words: list[str], count: int) -> list[str]:
        return [words[i] for i in self._rng.integers(len(words), size=count)]

    def write_prompt(self) -> tuple[str, Turns]:
        """Write a prompt of one to three turns; returns its topic and the turns."""
        rng = self._rng
        topic = str(rng.choice(list(_TOPIC_WORDS)))
        n_turns = int(rng.choice([1, 2, 3], p=[0.86, 0.11, 0.03]))
        templates = self._pick(PHRASES["prompts"], 1) + self._pick(
            PHRASES["follow_ups"], n_turns - 1
        )
        words = _TOPIC_WORDS[topic]
        return topic, tuple(text.format(*rng.choice(words, 3, replace=False)) for text in templates)

    def write_answer(self, chatbot: Chatbot, topic: str, prompt: Turns) -> Turns:
        """Write one turn per turn of the prompt, occasionally a null."""
        rng = self._rng
        length = chatbot.n_words * np.exp(rng.normal(0, 0.45)) / len(prompt) ** 0.7
        n_words = int(np.clip(length, 6, 110))
        turns: list[str | None] = []
        for question in prompt:
            turns.append(self._write_turn(chatbot, topic, question or "", n_words))
        if rng.random() < 0.006:
            turns[-1] = None if rng.random() < 0.7 else ""
        return tuple(turns)

    def _write_turn(self, chatbot: Chatbot, topic: str, question: str, n_words: int) -> str:
        rng = self._rng
        if rng.random() < chatbot.refusing:
            return self._pick(PHRASES["refusals"], 1)[0]
        asked = [word for word in _WORD.findall(question.lower()) if word in _CONTENT_WORDS]
        words = [word for word in asked if rng.random() < chatbot.focus]
        skill = np.clip(chatbot.skill + rng.normal(0, 0.18), 0, 1)
        n_strong = rng.binomial(n_words, 0.20 * skill)
        n_weak = rng.binomial(n_words, 0.20 * (1 - skill))
        words += self._pick(sorted(_STRONG_WORDS), n_strong)
        words += self._pick(sorted(_WEAK_WORDS), n_weak)
        n_others = n_words // 6
        n_common = max(n_words - len(words) - n_others, 2)
        others = [word for word in _TOPIC_WORDS[topic] if word not in asked]
        words += self._pick(others, n_others) + self._pick(_COMMON_WORDS, n_common)
        return self._lay_out(chatbot, topic, [words[i] for i in rng.permutation(len(words))])

    def _lay_out(self, chatbot: Chatbot, topic: str, words: list[str]) -> str:
        rng = self._rng
        cuts = np.cumsum(rng.integers(5, 12, size=len(words) // 5 + 1))
        parts = np.split(np.array(words, dtype=object), cuts)
        comma_rate = rng.random() * 0.3
        ending = "!" if rng.random() < 0.15 else "."
        chunks = [list(part) for part in parts if len(part)]
        sentences = [self._punctuate(chunk, comma_rate, ending) for chunk in chunks]
        if rng.random() < chatbot.listing:
            head = "## Summary\n\n" if rng.random() < 0.3 else ""
            return head + "\n- ".join([sentences[0], *(sentences[1:] or sentences)])
        text = " ".join(sentences)
        if topic == "python" and rng.random() < 0.5:
            text += f"\n```python\nprint({words[0]!r})  # a/b\n```"
        return text

    def _punctuate(self, words: list[str], comma_rate: float, ending: str) -> str:
        has_comma = self._rng.random(len(words)) < comma_rate
        is_bold = self._rng.random() < 0.1
        for i in np.flatnonzero(has_comma[:-1]):
            words[i] += ","
        if is_bold:
            words[0] = f"**{words[0]}**"
        sentence = " ".join(words)
        return sentence[0].upper() + sentence[1:] + ending


def make_battles(n_battles: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Let chatbots answer and people vote; the same seed gives the same battles.

    Returns:
        battles: id, model_a, model_b, prompt, response_a, response_b (tuples of turns), label.
        probs: (N, C) float64, the true probabilities of each vote.
    """
    rng = np.random.default_rng(seed)
    writer = _Writer(rng)
    asked: list[tuple[str, Turns]] = []
    rows: list[tuple] = []
    for _ in range(n_battles):
        if rows and rng.random() < _REPEATED_SHARE:
            model_a, model_b, prompt, a, b = rows[rng.integers(len(rows))]
            is_mirrored = rng.random() < 0.5
            mirrored = (model_b, model_a, prompt, b, a)
            rows.append(mirrored if is_mirrored else (model_a, model_b, prompt, a, b))
            continue
        if asked and rng.random() < 0.07:
            asked.append(asked[rng.integers(len(asked))])
        else:
            asked.append(writer.write_prompt())
        rows.append(_make_battle(writer, rng, *asked[-1]))
    probs = np.array([true_probs(*row[2:]) for row in rows]).reshape(-1, len(LABELS))
    battles = pd.DataFrame(rows, columns=[*MODELS, *TEXTS])
    battles["label"] = (rng.random((n_battles, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    battles.insert(0, "id", rng.permutation(np.arange(10**5, 10**5 + 10 * n_battles))[:n_battles])
    return battles, probs


def _make_battle(writer: _Writer, rng: np.random.Generator, topic: str, prompt: Turns) -> tuple:
    first, second = (CHATBOTS[i] for i in rng.choice(len(CHATBOTS), 2, replace=False))
    a = writer.write_answer(first, topic, prompt)
    b = writer.write_answer(second, topic, prompt)
    if rng.random() < 0.003:
        a = (*a[:-1], (a[-1] or "") + " \ud83d")  # half an emoji, which real data hold, too
    return first.name, second.name, prompt, a, b


def make_arena(folder: Path, n_battles: int, n_test: int, seed: int) -> Path:
    """Write an arena in the competition's layout, and its truth, into a folder; returns it.

    The files are `train.csv`, `test.csv`, `sample_submission.csv`, `truth.parquet` (id and true
    probabilities of train and test rows), `votes_test.parquet` (labels of the test rows) and
    `effects.json`. The same seed gives the same bytes.
    """
    battles, probs = make_battles(n_battles + n_test, seed)
    # As the competition does: slashes are escaped.
    texts = {name: battles[name].map(json.dumps).str.replace("/", "\\/") for name in TEXTS}
    encoded = battles.assign(**texts)
    for index, name in enumerate(LABELS):
        encoded[name] = (battles["label"] == index).astype(int)
    test = encoded[n_battles:]
    third = dict.fromkeys(LABELS, 1 / len(LABELS))
    write_table(folder / "test.csv", test[["id", *TEXTS]])
    write_table(folder / "sample_submission.csv", test[["id"]].assign(**third))
    truth = pd.DataFrame({"id": battles["id"], **dict(zip(LABELS, probs.T, strict=True))})
    write_table(folder / "truth.parquet", truth)
    write_table(folder / "votes_test.parquet", battles[n_battles:][["id", "label"]])
    entropy = float(-(probs * np.log(probs)).sum(axis=1).mean())
    planted = {"effects": asdict(EFFECTS), "expected_oracle_log_loss": entropy, "seed": seed}
    write_json(folder / "effects.json", planted)
    # Last: its existence means that the arena is complete.
    columns = ["id", *MODELS, *TEXTS, *LABELS]
    write_table(folder / "train.csv", encoded.loc[: n_battles - 1, columns])
    return folder
