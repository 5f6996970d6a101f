"""Style: what can be counted in an answer without reading it.

Length, punctuation, markdown, code, script, refusals, overlap with the prompt.
Every battle is measured once: `measure_style` gives raw columns for both answers,
`style_differences` turns them into features that change sign when A and B are
exchanged, `style_shared` into features that do not change.

Characters are counted by byte class: a text's UTF-8 bytes are mapped to a dozen
classes and tallied in C, so that a megabyte takes milliseconds whatever it holds.
"""

import hashlib
import os
import re
import string
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from src.utils.schema import TEXTS, Turns


class Feature(NamedTuple):
    """One thing measured in an answer."""

    kind: (
        str  # "count" is compared as a log ratio, "share" (0 to 1, or a mean) as a plain difference
    )
    caption: str


STYLE_FEATURES = {
    "n_chars": Feature("count", "characters"),
    "n_words": Feature("count", "words"),
    "n_sentences": Feature("count", "sentences"),
    "n_lines": Feature("count", "line breaks"),
    "n_turns_empty": Feature("count", "turns left empty"),
    "n_punctuation": Feature("count", "punctuation marks"),
    "n_commas": Feature("count", "commas"),
    "n_question_marks": Feature("count", "question marks"),
    "n_exclamation_marks": Feature("count", "exclamation marks"),
    "n_list_items": Feature("count", "list items"),
    "n_headers": Feature("count", "headers"),
    "n_bold": Feature("count", "bold passages"),
    "n_code_blocks": Feature("count", "code blocks"),
    "n_inline_code": Feature("count", "inline code"),
    "n_table_rows": Feature("count", "table rows"),
    "n_urls": Feature("count", "links"),
    "n_hedges": Feature("count", "hedging words"),
    "punctuation_per_char": Feature("share", "punctuation per character"),
    "share_digits": Feature("share", "share of digits"),
    "share_uppercase": Feature("share", "share of capitals"),
    "share_non_ascii": Feature("share", "share of non-ASCII characters"),
    "lexical_diversity": Feature("share", "distinct words of the first 100"),
    "mean_word_length": Feature("share", "mean word length"),
    "is_refusal": Feature("share", "refusal"),
    "has_disclaimer": Feature("share", "“as an AI” disclaimer"),
    "has_apology": Feature("share", "apology"),
    "prompt_overlap": Feature("share", "prompt's words found in the answer"),
    "prompt_overlap_first": Feature("share", "first turn's words found in the answer"),
    "prompt_overlap_last": Feature("share", "last turn's words found in the last answer"),
}

# Latin text counts as English when enough of its words are common English ones.
SCRIPTS = (
    "English",
    "other Latin",
    "Cyrillic",
    "Chinese or Japanese",
    "other script",
    "no letters",
)
_ENGLISH, _LATIN, _CYRILLIC, _CJK, _OTHER_SCRIPT, _NO_LETTERS = range(len(SCRIPTS))

PAIR_FEATURES = {
    "n_chars_prompt": Feature("count", "characters of the prompt"),
    "n_turns": Feature("count", "turns"),
    "has_code_prompt": Feature("share", "prompt holds code"),
    "word_jaccard": Feature("share", "distinct words that the answers share"),
    "is_identical": Feature("share", "answers are identical"),
}

# A refusal comes first; the same words further down are a disclaimer.
_REFUSAL_WINDOW_CHARS = 300
REFUSAL_PHRASES = (
    "i can't assist", "i can't help", "i can't provide", "i can't fulfill", "i can't create", "i can't answer",
    "i can't comply", "i can't engage", "i can't generate", "i can't write", "i can not", "i cannot",
    "i am unable", "i'm unable", "i am not able", "i'm not able", "i won't be able", "i will not",
    "i must decline", "i decline to", "i have to decline", "unable to assist", "unable to help",
    "unable to fulfill", "unable to provide", "unable to answer", "can't assist with", "can't help with",
    "cannot assist", "cannot fulfill", "cannot help with", "not comfortable", "i'm sorry, but", "i am sorry, but",
    "sorry, i can", "sorry, but i", "i apologize, but", "my apologies, but", "i do not feel comfortable",
    "not appropriate for me", "against my programming", "against my guidelines", "goes against my",
    "violates my", "not programmed to",
)  # fmt: skip
DISCLAIMERS = (
    "as an ai", "as a language model", "as a large language model", "i am an ai", "i'm an ai", "i'm just an ai",
)  # fmt: skip
APOLOGIES = ("sorry", "apologize", "apologise")
HEDGES = frozenset(
    b"may might could perhaps maybe possibly probably likely unlikely generally usually typically often sometimes "
    b"seems seem appears appear suggests somewhat relatively approximately potentially presumably arguably".split()
)
STOPWORDS = frozenset(
    b"a about after all also am an and any are as at be because been before but by can could did do does for from get "
    b"give had has have he her him his how i if in into is it its just like make me more most my no not now of on one "
    b"only or other our out please she should so some tell than that the their them then there these they this those "
    b"to up us was we were what when where which who whom whose why will with would write you your s t".split()
)

(
    _OTHER,
    _SPACE,
    _NEWLINE,
    _LOWER,
    _UPPER,
    _DIGIT,
    _MARK,
    _COMMA,
    _QUESTION,
    _EXCLAMATION,
    _CONTINUATION,
) = range(11)
(_LEAD_LATIN, _LEAD_CYRILLIC, _LEAD_CJK, _LEAD_OTHER) = range(11, 15)
_N_CLASSES = 15


def _make_byte_classes() -> bytes:
    """The class of each of the 256 bytes of UTF-8."""
    members = {
        _SPACE: b" \t\r\f\v", _NEWLINE: b"\n", _LOWER: string.ascii_lowercase.encode(),
        _UPPER: string.ascii_uppercase.encode(), _DIGIT: string.digits.encode(), _MARK: string.punctuation.encode(),
        _COMMA: b",", _QUESTION: b"?", _EXCLAMATION: b"!", _CONTINUATION: range(0x80, 0xC0),
        _LEAD_LATIN: range(0xC2, 0xCA), _LEAD_CYRILLIC: range(0xD0, 0xD4), _LEAD_CJK: range(0xE3, 0xEA),
        _LEAD_OTHER: [*range(0xCA, 0xD0), *range(0xD4, 0xE3), *range(0xEA, 0xF8)],
    }  # fmt: skip
    table = bytearray(256)
    for byte_class, values in members.items():
        for value in values:
            table[value] = byte_class
    return bytes(table)


_BYTE_CLASSES = _make_byte_classes()
# Words in bytes: capitals lowered, ASCII punctuation and the apostrophe to a space.
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
_UNICODE_MARKS = re.compile(
    r"[\u2010-\u2027\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]"
)  # quotes, dashes, wide marks
_CODE_SIGNS = (
    "```",
    "def ",
    "import ",
    "#include",
    "</",
    "{\n",
    "();",
    "SELECT ",
    "function ",
    "public class",
)


_CACHE_KEY = b"style_key"
# How Qwen2 cuts text before its merges apply (tokenizer.json of the released checkpoints).
_QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Text(NamedTuple):
    """What one answer or prompt turned out to hold: raw counts and its distinct words."""

    counts: tuple[float, ...]  # in _COUNTS order
    words: frozenset[bytes]
    last_words: frozenset[bytes]  # of the last turn


_COUNTS = (
    "n_words", "n_sentences", "n_turns_empty", "n_list_items", "n_headers", "n_bold", "n_code_blocks", "n_inline_code",
    "n_table_rows", "n_urls", "n_hedges", "lexical_diversity", "is_refusal", "has_disclaimer", "has_apology",
)  # fmt: skip


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _join(turns: Turns) -> str:
    return "\n".join(turn or "" for turn in turns)


def _split_words(text: str) -> list[bytes]:
    """The words of a text in lower case, as UTF-8, without punctuation."""
    if not text.isascii():
        text = _CJK_CHAR.sub(r" \1 ", _UNICODE_MARKS.sub(" ", text)).lower()
    return _encode(text).translate(_WORD_BYTES).split()


def _tally_bytes(data: bytes) -> np.ndarray:
    """Count the bytes of each class: (15,) int64."""
    return np.bincount(
        np.frombuffer(data.translate(_BYTE_CLASSES), dtype=np.uint8), minlength=_N_CLASSES
    )


def _has_phrase(text: str, phrases: Iterable[str]) -> bool:
    return any(map(text.__contains__, phrases))


def _is_refusal(turns: Turns) -> bool:
    heads = ((turn or "")[:_REFUSAL_WINDOW_CHARS].lower().replace("’", "'") for turn in turns)
    return any(_has_phrase(head, REFUSAL_PHRASES) for head in heads)


def _count_markdown(text: str) -> tuple[float, ...]:
    lines = "\n" + text  # so that a pattern that opens a line can start with a literal
    n_fences = text.count("```")
    return (
        len(_LIST_ITEM.findall(lines)),
        len(_HEADER.findall(lines)),
        len(_BOLD.findall(text)) if "**" in text else 0,
        (n_fences + 1) // 2,
        max(text.count("`") - 3 * n_fences, 0) // 2,
        lines.count("\n|"),
        text.count("http://") + text.count("https://"),
    )


def _measure_answer(turns: Turns) -> tuple[np.ndarray, _Text]:
    """Measure one answer: its byte classes, (15,) int64, and what takes words to see."""
    text = _join(turns)
    tally, words, lowered = _tally_bytes(_encode(text)), _split_words(text), text.lower()
    distinct = frozenset(words)
    counts = (
        len(words),
        max(len(_SENTENCE_END.findall(text)), min(len(words), 1)),
        sum(not turn or turn.isspace() for turn in turns),
        *_count_markdown(text),
        sum(map(HEDGES.__contains__, words)),
        len(set(words[:100])) / max(min(len(words), 100), 1),
        _is_refusal(turns),
        _has_phrase(lowered, DISCLAIMERS),
        _has_phrase(lowered, APOLOGIES),
    )
    return tally, _Text(
        counts, distinct, distinct if len(turns) == 1 else _distinct_words(turns[-1:])
    )


def _distinct_words(turns: Turns) -> frozenset[bytes]:
    return frozenset(_split_words(_join(turns)))


class _Prompt(NamedTuple):
    n_chars: int
    n_turns: int
    has_code: bool
    script: int  # position in SCRIPTS
    content: frozenset[bytes]  # distinct words that are no stopwords
    content_first: frozenset[bytes]  # of the first turn
    content_last: frozenset[bytes]  # of the last turn


def _measure_prompt(turns: Turns) -> _Prompt:
    text = _join(turns)
    tally, words = _tally_bytes(_encode(text)), _split_words(text)
    content = frozenset(words) - STOPWORDS
    ends = (content, content)
    if len(turns) > 1:
        ends = (_distinct_words(turns[:1]) - STOPWORDS, _distinct_words(turns[-1:]) - STOPWORDS)
    has_code = _has_phrase(text, _CODE_SIGNS)
    return _Prompt(len(text), len(turns), has_code, _find_script(tally, words), content, *ends)


def _find_script(tally: np.ndarray, words: list[bytes]) -> int:
    """The script that most letters belong to, as a position in `SCRIPTS`."""
    latin = tally[_LOWER] + tally[_UPPER] + tally[_LEAD_LATIN]
    letters = np.array([latin, tally[_LEAD_CYRILLIC], tally[_LEAD_CJK], tally[_LEAD_OTHER]])
    if not letters.any():
        return _NO_LETTERS
    script = (_LATIN, _CYRILLIC, _CJK, _OTHER_SCRIPT)[int(letters.argmax())]
    if script != _LATIN:
        return script
    share_common = sum(map(STOPWORDS.__contains__, words)) / max(len(words), 1)
    # A handful of words ("top 3 laptops") may hold no common one; then accents decide.
    is_english = share_common >= 0.15 or (len(words) < 8 and not tally[_LEAD_LATIN])
    return _ENGLISH if is_english else _LATIN


def _overlap(content: frozenset[bytes], words: frozenset[bytes]) -> float:
    return len(content & words) / len(content) if content else 0.0


def _answer_row(prompt: _Prompt, answer: _Text) -> tuple[float, ...]:
    overlap = _overlap(prompt.content, answer.words)
    if prompt.n_turns == 1:
        return (*answer.counts, overlap, overlap, overlap)
    first = _overlap(prompt.content_first, answer.words)
    return (*answer.counts, overlap, first, _overlap(prompt.content_last, answer.last_words))


def _pair_row(
    prompt: _Prompt, turns_a: Turns, turns_b: Turns, a: _Text, b: _Text
) -> tuple[float, ...]:
    n_shared = len(a.words & b.words)
    n_distinct = len(a.words) + len(b.words) - n_shared
    jaccard = n_shared / n_distinct if n_distinct else 1.0
    return (
        prompt.n_chars,
        prompt.n_turns,
        prompt.has_code,
        jaccard,
        turns_a == turns_b,
        prompt.script,
    )


def _answer_columns(
    tallies: list[np.ndarray], rows: list[tuple[float, ...]], side: str
) -> dict[str, np.ndarray]:
    tally = np.array(tallies, dtype=np.float64).reshape(-1, _N_CLASSES)
    names = (*_COUNTS, "prompt_overlap", "prompt_overlap_first", "prompt_overlap_last")
    counts = np.array(rows, dtype=np.float64).reshape(-1, len(names))
    columns = dict(zip(names, counts.T, strict=True))
    n_chars = tally.sum(axis=1) - tally[:, _CONTINUATION]
    n_non_ascii = tally[:, _LEAD_LATIN:].sum(axis=1)
    n_letters = tally[:, _LOWER] + tally[:, _UPPER]
    n_marks = tally[:, [_MARK, _COMMA, _QUESTION, _EXCLAMATION]].sum(axis=1)
    n_in_words = n_letters + tally[:, _DIGIT] + n_non_ascii
    columns |= {
        "n_chars": n_chars,
        "n_lines": tally[:, _NEWLINE],
        "n_punctuation": n_marks,
        "n_commas": tally[:, _COMMA],
        "n_question_marks": tally[:, _QUESTION],
        "n_exclamation_marks": tally[:, _EXCLAMATION],
        "punctuation_per_char": n_marks / np.maximum(n_chars, 1),
        "share_digits": tally[:, _DIGIT] / np.maximum(n_chars, 1),
        "share_uppercase": tally[:, _UPPER] / np.maximum(n_letters, 1),
        "share_non_ascii": n_non_ascii / np.maximum(n_chars, 1),
        "mean_word_length": n_in_words / np.maximum(columns["n_words"], 1),
    }
    return {f"{name}_{side}": columns[name].astype(np.float32) for name in STYLE_FEATURES}


def measure_style(pairs: pd.DataFrame) -> pd.DataFrame:
    """Measure both answers and the prompt of every battle.

    Punctuation is ASCII's; capitals are counted among ASCII letters; a Chinese or
    Japanese character counts as a word. Turns are read as one text joined by line
    breaks, a null turn as an empty one.

    Args:
        pairs: N battles with `prompt`, `response_a`, `response_b` as tuples of turns.

    Returns:
        N rows with the index of `pairs`, no missing value. For each name of
        `STYLE_FEATURES` two float32 columns `<name>_a` and `<name>_b`; for each name of
        `PAIR_FEATURES` one float32 column; and `script_prompt`, a category of `SCRIPTS`.

    Example:
        prompt ("Hi",), answers ("Hello!",) and ("I cannot.",): n_words_a is 1, is_refusal_b is 1.
    """
    # Texts repeat close together (the same prompt, mirrored rows), so a short memory is enough.
    measure_answer, measure_prompt = (
        lru_cache(4096)(_measure_answer),
        lru_cache(4096)(_measure_prompt),
    )
    tallies_a, tallies_b, rows_a, rows_b, rows = [], [], [], [], []
    for turns, turns_a, turns_b in zip(
        pairs["prompt"], pairs["response_a"], pairs["response_b"], strict=True
    ):
        prompt = measure_prompt(turns)
        (tally_a, a), (tally_b, b) = measure_answer(turns_a), measure_answer(turns_b)
        tallies_a.append(tally_a)
        tallies_b.append(tally_b)
        rows_a.append(_answer_row(prompt, a))
        rows_b.append(_answer_row(prompt, b))
        rows.append(_pair_row(prompt, turns_a, turns_b, a, b))
    shared = np.array(rows, dtype=np.float32).reshape(-1, len(PAIR_FEATURES) + 1).T
    columns = _answer_columns(tallies_a, rows_a, "a") | _answer_columns(tallies_b, rows_b, "b")
    columns |= dict(zip(PAIR_FEATURES, shared[:-1], strict=True))
    columns["script_prompt"] = pd.Categorical.from_codes(shared[-1].astype(np.int8), list(SCRIPTS))
    return pd.DataFrame(columns, index=pairs.index)


def load_or_measure_style(pairs: pd.DataFrame, path: Path, data_hash: str) -> pd.DataFrame:
    """Measure every battle once: read `measure_style` back while battles and this module are unchanged.

    Args:
        pairs: N battles.
        path: a `.parquet` file, written where it is missing or out of date.
        data_hash: names the battles' content and order, e.g. `artifacts.hash_pairs`.

    Returns:
        As `measure_style`.
    """
    key = f"{data_hash} {hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()}"
    if path.exists() and (pq.read_schema(path).metadata or {}).get(_CACHE_KEY) == key.encode():
        return pd.read_parquet(path).set_index(pairs.index)
    style = measure_style(pairs)
    table = pa.Table.from_pandas(style, preserve_index=False)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, _CACHE_KEY: key.encode()}), tmp
    )
    tmp.replace(path)
    return style


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from `tokenizer.json`, else a byte-level BPE from `vocab.json` and `merges.txt`.

    The second layout cuts words as Qwen2 does, the only one of the suite's checkpoints that has it.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    folder = Path(folder).expanduser()
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = [folder / "vocab.json", folder / "merges.txt"]
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def count_tokens(pairs: pd.DataFrame, tokenizer: Tokenizer | None = None) -> np.ndarray:
    """Count the tokens of every battle, prompt and both answers, without template or special tokens.

    Args:
        pairs: N battles with texts as tuples of turns.
        tokenizer: None estimates one token for every four characters.

    Returns:
        (N,) int64.
    """
    counts = np.zeros(len(pairs), dtype=np.int64)
    for name in TEXTS:
        texts = [_join(turns).encode("utf-8", "replace").decode() for turns in pairs[name]]
        if tokenizer is None:
            counts += [-(-len(text) // 4) for text in texts]
        else:
            counts += [
                len(found.ids)
                for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ]
    return counts


def _scaled(values: pd.Series, kind: str) -> np.ndarray:
    values = values.to_numpy(dtype=np.float64)
    return np.log1p(values) if kind == "count" else values


def style_differences(style: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Compare the two answers: features that change sign when A and B are exchanged.

    Args:
        style: from `measure_style`, N rows.

    Returns:
        (N, F) float64 and the F names of `STYLE_FEATURES`: log((1 + a) / (1 + b)) for
        counts, a − b for shares. Exactly the negative for the swapped battles.
    """
    columns = [
        _scaled(style[f"{name}_a"], feature.kind) - _scaled(style[f"{name}_b"], feature.kind)
        for name, feature in STYLE_FEATURES.items()
    ]
    return np.column_stack(columns), list(STYLE_FEATURES)


def density_differences(style: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Compare counts per character, which length does not move.

    Args:
        style: from `measure_style`, N rows.
        names: F names of `STYLE_FEATURES` that are counts.

    Returns:
        (N, F) float64, a / characters of a − b / characters of b.
    """
    a, b = (style[[f"{name}_{side}" for name in names]].to_numpy(dtype=np.float64) for side in "ab")
    n_chars = np.maximum(style[["n_chars_a", "n_chars_b"]].to_numpy(dtype=np.float64), 1)
    return a / n_chars[:, [0]] - b / n_chars[:, [1]]


def style_shared(style: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Describe the battle: features that stay when A and B are exchanged.

    Args:
        style: from `measure_style`, N rows.

    Returns:
        (N, G) float64 and G names: those of `PAIR_FEATURES` (log(1 + n) for counts), one
        0/1 column per script, and for each answer feature `gap_<name>`, the absolute
        difference, and `mean_<name>`, the average of the two. The same for the swapped battles.
    """
    columns = {name: _scaled(style[name], feature.kind) for name, feature in PAIR_FEATURES.items()}
    columns |= {
        f"script_{script}": (style["script_prompt"] == script).to_numpy(dtype=np.float64)
        for script in SCRIPTS
    }
    for name, feature in STYLE_FEATURES.items():
        a, b = _scaled(style[f"{name}_a"], feature.kind), _scaled(style[f"{name}_b"], feature.kind)
        columns[f"gap_{name}"] = np.abs(a - b)
        columns[f"mean_{name}"] = (a + b) / 2
    return np.column_stack(list(columns.values())), list(columns)


def slice_battles(style: pd.DataFrame) -> dict[str, np.ndarray]:
    """Part the battles by what one sees at a glance: length ratio, turns, language, code, refusal.

    Args:
        style: from `measure_style`, N rows.

    Returns:
        Name -> (N,) bool. The slices of one kind, named "kind: value", share no battle and
        leave none out; both are the same for the swapped battles.
    """
    gap = np.abs(_scaled(style["n_chars_a"], "count") - _scaled(style["n_chars_b"], "count"))
    length = np.digitize(gap, np.log([1.25, 2]))
    refusals = (style["is_refusal_a"] + style["is_refusal_b"]).to_numpy().astype(int)
    code = (
        style["has_code_prompt"] + style["n_code_blocks_a"] + style["n_code_blocks_b"]
    ).to_numpy() > 0
    several = (style["n_turns"] > 1).to_numpy()
    kinds = {
        "length": (length, ("about equal", "up to twice", "more than twice")),
        "turns": (several, ("one", "several")),
        "language": (style["script_prompt"].cat.codes.to_numpy(), SCRIPTS),
        "code": (code, ("none", "some")),
        "refusal": (refusals, ("none", "one answer", "both answers")),
    }
    return {
        f"{kind}: {name}": codes == code
        for kind, (codes, names) in kinds.items()
        for code, name in enumerate(names)
    }
