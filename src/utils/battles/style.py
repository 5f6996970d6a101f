"""Count what can be counted in an answer: length, punctuation, markdown, refusals, overlap.

Characters are counted by the class of their UTF-8 bytes, which is fast on any text.
"""

import re
import string
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from src.utils.schema import TEXTS, Turns, join_turns

# What is measured in an answer, with captions. Names in n_… are counts, compared as a log ratio;
# all others are shares (0 to 1) or means, compared as a difference.
STYLE_FEATURES = {
    "n_chars": "characters",
    "n_words": "words",
    "n_sentences": "sentences",
    "n_lines": "line breaks",
    "n_turns_empty": "turns left empty",
    "n_punctuation": "punctuation marks",
    "n_commas": "commas",
    "n_question_marks": "question marks",
    "n_exclamation_marks": "exclamation marks",
    "n_list_items": "list items",
    "n_headers": "headers",
    "n_bold": "bold passages",
    "n_code_blocks": "code blocks",
    "n_inline_code": "inline code",
    "n_table_rows": "table rows",
    "n_urls": "links",
    "n_hedges": "hedging words",
    "punctuation_per_char": "punctuation per character",
    "share_digits": "share of digits",
    "share_uppercase": "share of capitals",
    "share_non_ascii": "share of non-ASCII characters",
    "lexical_diversity": "distinct words of the first 100",
    "mean_word_length": "mean word length",
    "is_refusal": "refusal",
    "has_disclaimer": "“as an AI” disclaimer",
    "has_apology": "apology",
    "prompt_overlap": "prompt's words found in the answer",
    "prompt_overlap_first": "first turn's words found in the answer",
    "prompt_overlap_last": "last turn's words found in the last answer",
}
PAIR_FEATURES = ("n_chars_prompt", "n_turns", "has_code_prompt", "word_jaccard", "is_identical")
# Features whose mean over both answers says something of a tie; the other means add noise.
_MEANS = ("n_chars", "is_refusal", "n_list_items")

# Latin text counts as English when enough of its words are common English ones.
SCRIPTS = (
    "English",
    "other Latin",
    "Cyrillic",
    "Chinese or Japanese",
    "other script",
    "no letters",
)

WORDS = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text(encoding="utf-8"))
# An expression runs over several lines of the file; kinds of prompts in the order of the search.
PROMPT_KINDS = {
    kind: re.compile(text.replace("| ", "|"), re.IGNORECASE)
    for kind, text in WORDS["prompts"].items()
}
_KIND_WINDOW_CHARS = 400  # of a prompt; further down it quotes what it asks about
_REFUSAL_WINDOW_CHARS = 300  # of each turn; further down, the same words are a disclaimer
HEDGES = frozenset(WORDS["hedges"].encode().split())
STOPWORDS = frozenset(WORDS["stopwords"].encode().split())
# Bytes of UTF-8 by class; characters outside ASCII are one lead byte and some continuation bytes.
_LEAD_BYTES = {
    "Latin": range(0xC2, 0xCA),
    "Cyrillic": range(0xD0, 0xD4),
    "Chinese or Japanese": range(0xE3, 0xEA),
    "other script": (*range(0xCA, 0xD0), *range(0xD4, 0xE3), *range(0xEA, 0xF8)),
}
_BYTES: dict[str, Iterable[int]] = {
    "other": range(256),  # what no later class takes
    "n_lines": b"\n",
    "lower": string.ascii_lowercase.encode(),
    "upper": string.ascii_uppercase.encode(),
    "digit": string.digits.encode(),
    "other_mark": string.punctuation.encode(),
    "n_commas": b",",
    "n_question_marks": b"?",
    "n_exclamation_marks": b"!",
    "continuation": range(0x80, 0xC0),
    **_LEAD_BYTES,
}
_CLASS_OF_BYTE = bytearray(256)
for _place, _members in enumerate(_BYTES.values()):
    for _byte in _members:
        _CLASS_OF_BYTE[_byte] = _place

# Words in bytes: capitals become small, ASCII punctuation becomes a space.
_WORD_BYTES = bytes.maketrans(
    (string.ascii_uppercase + string.punctuation).encode(),
    (string.ascii_lowercase + " " * len(string.punctuation)).encode(),
)

# Each pattern starts with a literal and repeats within bounds, so that no text makes it slow.
_LIST_ITEM = re.compile(r"\n[ \t]{0,12}(?:[-*+•]|\d{1,3}[.)])[ \t]")
_HEADER = re.compile(r"\n#{1,6}[ \t]")
_BOLD = re.compile(r"\*\*[^*\n]{1,300}\*\*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|[。！？]")
# Chinese and Japanese write no spaces: each character counts as a word.
_CJK_CHAR = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")
# Quotes, dashes and wide punctuation marks.
_UNICODE_MARKS = re.compile(r"[\u2010-\u2027\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]")
_CODE_SIGNS = tuple(
    "```|def |import |#include|</|{\n|();|SELECT |function |public class".split("|")
)
# How Qwen2 splits text before its merges apply (tokenizer.json of the released checkpoints).
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What is counted in an answer alone, and what takes its prompt.
_COUNTS = (
    "n_words n_sentences n_turns_empty n_list_items n_headers n_bold n_code_blocks n_inline_code "
    "n_table_rows n_urls n_hedges lexical_diversity is_refusal has_disclaimer has_apology"
).split()
_SLICES = {
    "length": ("about equal", "up to twice", "more than twice"),
    "turns": ("one", "several"),
    "language": SCRIPTS,
    "code": ("none", "some"),
    "refusal": ("none", "one answer", "both answers"),
}
_OVERLAPS = ["prompt_overlap", "prompt_overlap_first", "prompt_overlap_last"]


class _Answer(NamedTuple):
    n_bytes: list[int]  # in the order of _BYTES
    counts: tuple[float, ...]  # in the order of _COUNTS
    words: frozenset[bytes]  # distinct
    last_words: frozenset[bytes]  # of the last turn


class _Prompt(NamedTuple):
    n_chars: int
    n_turns: int
    has_code: bool
    script: int  # position in SCRIPTS
    words: frozenset[bytes]  # distinct, without stopwords
    first_words: frozenset[bytes]  # of the first turn
    last_words: frozenset[bytes]  # of the last turn


def _split_words(text: str) -> list[bytes]:
    """The words of a text in lower case, as UTF-8, without punctuation."""
    if not text.isascii():
        text = _CJK_CHAR.sub(r" \1 ", _UNICODE_MARKS.sub(" ", text)).lower()
    return text.encode().translate(_WORD_BYTES).split()


def _distinct_words(turns: Turns) -> frozenset[bytes]:
    return frozenset(_split_words(join_turns(turns)))


def _count_bytes(text: str) -> list[int]:
    classes = np.frombuffer(text.encode().translate(_CLASS_OF_BYTE), dtype=np.uint8)
    return np.bincount(classes, minlength=len(_BYTES)).tolist()


def _has_phrase(text: str, phrases: Iterable[str]) -> bool:
    return any(phrase in text for phrase in phrases)


def _is_refusal(turns: Turns) -> bool:
    heads = ((turn or "")[:_REFUSAL_WINDOW_CHARS].lower().replace("’", "'") for turn in turns)
    return any(_has_phrase(head, WORDS["refusals"]) for head in heads)


def _read_answer(turns: Turns) -> _Answer:
    text = join_turns(turns)
    lowered = text.lower()
    lines = "\n" + text  # so that the first line, too, follows a line break
    words = _split_words(text)
    n_fences = text.count("```")
    counts = (
        len(words),
        max(len(_SENTENCE_END.findall(text)), min(len(words), 1)),
        sum(not turn or turn.isspace() for turn in turns),
        len(_LIST_ITEM.findall(lines)),
        len(_HEADER.findall(lines)),
        len(_BOLD.findall(text)) if "**" in text else 0,
        (n_fences + 1) // 2,
        max(text.count("`") - 3 * n_fences, 0) // 2,
        lines.count("\n|"),
        text.count("http://") + text.count("https://"),
        sum(map(HEDGES.__contains__, words)),
        len(set(words[:100])) / max(min(len(words), 100), 1),
        _is_refusal(turns),
        _has_phrase(lowered, WORDS["disclaimers"]),
        _has_phrase(lowered, WORDS["apologies"]),
    )
    distinct = frozenset(words)
    last_words = distinct if len(turns) == 1 else _distinct_words(turns[-1:])
    return _Answer(_count_bytes(text), counts, distinct, last_words)


def _read_prompt(turns: Turns) -> _Prompt:
    text = join_turns(turns)
    words = _split_words(text)
    content = frozenset(words) - STOPWORDS
    first_words = last_words = content
    if len(turns) > 1:
        first_words = _distinct_words(turns[:1]) - STOPWORDS
        last_words = _distinct_words(turns[-1:]) - STOPWORDS
    script = SCRIPTS.index(_find_script(text, words))
    has_code = _has_phrase(text, _CODE_SIGNS)
    return _Prompt(len(text), len(turns), has_code, script, content, first_words, last_words)


def _find_script(text: str, words: list[bytes]) -> str:
    """The one of `SCRIPTS` that most letters belong to."""
    n_bytes = dict(zip(_BYTES, _count_bytes(text), strict=True))
    n_letters = {name: n_bytes[name] for name in _LEAD_BYTES}
    n_letters["Latin"] += n_bytes["lower"] + n_bytes["upper"]
    script = max(n_letters, key=n_letters.__getitem__)
    if n_letters[script] == 0:
        return "no letters"
    if script != "Latin":
        return script
    share_common = sum(map(STOPWORDS.__contains__, words)) / max(len(words), 1)
    # A handful of words ("top 3 laptops") may hold no common one; then accents decide.
    if share_common >= 0.15 or (len(words) < 8 and not n_bytes["Latin"]):
        return "English"
    return "other Latin"


def _overlap(content: frozenset[bytes], words: frozenset[bytes]) -> float:
    return len(content & words) / len(content) if content else 0.0


def _answer_row(prompt: _Prompt, answer: _Answer) -> list[float]:
    overlap = first = last = _overlap(prompt.words, answer.words)
    if prompt.n_turns > 1:
        first = _overlap(prompt.first_words, answer.words)
        last = _overlap(prompt.last_words, answer.last_words)
    return [*answer.n_bytes, *answer.counts, overlap, first, last]


def _answer_columns(rows: list[list[float]], side: str) -> dict[str, np.ndarray]:
    names = [*_BYTES, *_COUNTS, *_OVERLAPS]
    values = np.array(rows, dtype=np.float64).reshape(-1, len(names))
    columns = dict(zip(names, values.T, strict=True))
    n_bytes = values[:, : len(_BYTES)].sum(axis=1)
    n_chars = n_bytes - columns["continuation"]
    n_non_ascii = sum(columns[name] for name in _LEAD_BYTES)
    n_letters = columns["lower"] + columns["upper"]
    n_marks = columns["other_mark"] + columns["n_commas"]
    n_marks += columns["n_question_marks"] + columns["n_exclamation_marks"]
    n_in_words = n_letters + columns["digit"] + n_non_ascii
    columns |= {
        "n_chars": n_chars,
        "n_punctuation": n_marks,
        "punctuation_per_char": n_marks / np.maximum(n_chars, 1),
        "share_digits": columns["digit"] / np.maximum(n_chars, 1),
        "share_uppercase": columns["upper"] / np.maximum(n_letters, 1),
        "share_non_ascii": n_non_ascii / np.maximum(n_chars, 1),
        "mean_word_length": n_in_words / np.maximum(columns["n_words"], 1),
    }
    return {f"{name}_{side}": columns[name].astype(np.float32) for name in STYLE_FEATURES}


def _pair_row(prompt: _Prompt, a: _Answer, b: _Answer, is_identical: bool) -> tuple[float, ...]:
    n_shared = len(a.words & b.words)
    n_distinct = len(a.words) + len(b.words) - n_shared
    jaccard = n_shared / n_distinct if n_distinct else 1.0
    return prompt.n_chars, prompt.n_turns, prompt.has_code, jaccard, is_identical, prompt.script


def measure_style(pairs: pd.DataFrame) -> pd.DataFrame:
    """Measure both answers and the prompt of every battle.

    Punctuation is that of ASCII; capitals are counted among ASCII letters; a Chinese or
    Japanese character counts as a word. Turns are joined by line breaks.

    Returns:
        N rows with the index of `pairs`, no missing value. For each name of
        `STYLE_FEATURES` two float32 columns `<name>_a` and `<name>_b`; for each name of
        `PAIR_FEATURES` one float32 column; and `script_prompt`, a category of `SCRIPTS`.
    """
    # Texts repeat close together (the same prompt, mirrored rows), so a small cache is enough.
    read_answer = lru_cache(4096)(_read_answer)
    read_prompt = lru_cache(4096)(_read_prompt)
    rows: dict[str, list] = {"a": [], "b": [], "pair": []}
    for turns, turns_a, turns_b in zip(*(pairs[name] for name in TEXTS), strict=True):
        prompt = read_prompt(turns)
        a = read_answer(turns_a)
        b = read_answer(turns_b)
        rows["a"].append(_answer_row(prompt, a))
        rows["b"].append(_answer_row(prompt, b))
        rows["pair"].append(_pair_row(prompt, a, b, turns_a == turns_b))
    shared = np.array(rows["pair"], dtype=np.float32).reshape(-1, len(PAIR_FEATURES) + 1).T
    columns = _answer_columns(rows["a"], "a") | _answer_columns(rows["b"], "b")
    columns |= dict(zip(PAIR_FEATURES, shared[:-1], strict=True))
    scripts = pd.Categorical.from_codes(shared[-1].astype(np.int8), pd.Index(SCRIPTS))
    return pd.DataFrame({**columns, "script_prompt": scripts}, index=pairs.index)


def classify_prompts(pairs: pd.DataFrame, style: pd.DataFrame) -> pd.Categorical:
    """Sort prompts into kinds by the first expression of `style.yaml` found in their opening.

    Rules of thumb: of 72 real prompts that were read, four in five were in the right kind.
    `style` is that of `measure_style`; the kinds are `PROMPT_KINDS`, "other" and "not English".
    """
    kinds = []
    for turns, script in zip(pairs["prompt"], style["script_prompt"], strict=True):
        opening = join_turns(turns[:1])[:_KIND_WINDOW_CHARS]
        hits = (kind for kind, rule in PROMPT_KINDS.items() if rule.search(opening))
        kind = next(hits, "other")
        # Code is recognised in any language, and sums need none.
        is_read = script in ("English", "no letters") or kind == "code"
        kinds.append(kind if is_read else "not English")
    return pd.Categorical(kinds, [*PROMPT_KINDS, "other", "not English"])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from `tokenizer.json`, else Qwen2's from `vocab.json` and `merges.txt`."""
    folder = Path(folder).expanduser()
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise FileNotFoundError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    return tokenizer


def count_tokens(pairs: pd.DataFrame, tokenizer: Tokenizer | None = None) -> np.ndarray:
    """Count the tokens of each battle's texts, without template or special tokens: (N,) int64.

    Without a tokenizer, four characters are estimated to be one token.
    """
    counts = np.zeros(len(pairs), dtype=np.int64)
    for name in TEXTS:
        texts = [join_turns(turns) for turns in pairs[name]]
        if tokenizer is None:
            counts += [-(-len(text) // 4) for text in texts]
        else:
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            counts += [len(found.ids) for found in encoded]
    return counts


def _scaled(style: pd.DataFrame, name: str) -> np.ndarray:
    values = style[name].to_numpy(dtype=np.float64)
    return np.log1p(values) if name.startswith("n_") else values


def style_differences(style: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Compare the answers of `measure_style`: features that change sign if A and B are exchanged.

    Returns:
        (N, F) float64 and the F names of `STYLE_FEATURES`: log((1 + a) / (1 + b)) for
        counts, a − b for shares. Exactly the negative for the swapped battles.
    """
    columns = [_scaled(style, f"{name}_a") - _scaled(style, f"{name}_b") for name in STYLE_FEATURES]
    return np.column_stack(columns), list(STYLE_FEATURES)


def density_differences(style: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Compare F counts per character: (N, F) float64, that of A minus that of B."""
    density = {}
    for side in "ab":
        counts = style[[f"{name}_{side}" for name in names]].to_numpy(dtype=np.float64)
        n_chars = style[[f"n_chars_{side}"]].to_numpy(dtype=np.float64)
        density[side] = counts / np.maximum(n_chars, 1)
    return density["a"] - density["b"]


def style_shared(style: pd.DataFrame) -> np.ndarray:
    """Describe the battles of `measure_style`: features that no exchange of A and B changes.

    Returns:
        (N, G) float64: `PAIR_FEATURES` (log(1 + n) for counts), one 0/1 column per script, and
        for each answer feature the absolute difference and, of some, the mean of both answers.
    """
    columns = [_scaled(style, name) for name in PAIR_FEATURES]
    columns += [(style["script_prompt"] == script).to_numpy(np.float64) for script in SCRIPTS]
    for name in STYLE_FEATURES:
        a, b = _scaled(style, f"{name}_a"), _scaled(style, f"{name}_b")
        columns.append(np.abs(a - b))
        if name in _MEANS:
            columns.append((a + b) / 2)
    return np.array(columns).T


def slice_battles(style: pd.DataFrame) -> dict[str, np.ndarray]:
    """Slice the battles of `measure_style` by what is easily seen: length ratio, language, ….

    Returns:
        "kind: value" -> (N,) bool. Each battle is in exactly one slice of each kind, and in
        the same one when A and B are exchanged.
    """
    gap = np.abs(_scaled(style, "n_chars_a") - _scaled(style, "n_chars_b"))
    n_code = style["has_code_prompt"] + style["n_code_blocks_a"] + style["n_code_blocks_b"]
    codes = {
        "length": np.digitize(gap, np.log([1.25, 2])),
        "turns": style["n_turns"] > 1,
        "language": style["script_prompt"].cat.codes,
        "code": n_code > 0,
        "refusal": style["is_refusal_a"] + style["is_refusal_b"],
    }
    slices = {}
    for kind, values in _SLICES.items():
        for code, value in enumerate(values):
            slices[f"{kind}: {value}"] = np.asarray(codes[kind]) == code
    return slices
