"""Time notebook 01 on 57,477 battles, and counting the same features row by row with pandas.

    python benchmarks/eda.py

Makes the battles (real rows resampled and perturbed where `ARENA_REAL_DATA` names some, else demo
answers stretched to the same lengths), then runs, in one process each: all of notebook 01,
`style.measure_style`, and the row-wise counts, which must agree with the latter. Writes
`benchmarks/results/eda.json`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from src.utils.battles import demo, readers, style
from src.utils.paths import REAL_DATA
from src.utils.runs import Stopwatch, measure_peak_mib, measure_versions, read_json, write_json
from src.utils.schema import LABELS, TEXTS, Turns

ROOT = Path(__file__).resolve().parents[1]
REAL = [REAL_DATA / name for name in ("arena_sample.csv", "arena_extra.csv")]
N_BATTLES, N_MODELS, SEED = 57_477, 64, 20240501  # the competition's training rows and chatbots
TARGET_S, TARGET_MIB = 60, 2048
# Characters of a prompt and an answer in the competition: median and spread of their logarithm.
DEMO_LENGTHS = {"prompt": (110, 1.2), "response_a": (1000, 0.9), "response_b": (1000, 0.9)}


def perturb(turn: str | None, rng: np.random.Generator) -> str | None:
    """Rotate a turn's words and change its length a little, so that no two rows are equal."""
    if not turn:
        return turn
    words = turn.split(" ")
    start, length = rng.integers(len(words)), max(1, int(len(words) * rng.lognormal(-0.03, 0.3)))
    return " ".join(((words[start:] + words[:start]) * (length // len(words) + 1))[:length])


def stretch(turns: Turns, n_chars: float) -> Turns:
    """Repeat a demo text until it has as many characters as a real one."""
    text = " ".join(turn for turn in turns if turn) or "nothing"
    return ((text + "\n") * int(n_chars / (len(text) + 1) + 1),)


def make_battles(n_battles: int, rng: np.random.Generator) -> tuple[pd.DataFrame, str]:
    """Make battles of realistic length, and name their origin."""
    if all(path.exists() for path in REAL):
        source, origin = readers.load_pairs(REAL)[0], "real rows, resampled and perturbed"
        battles = source.iloc[rng.integers(len(source), size=n_battles)].reset_index(drop=True)
        for name in TEXTS:
            battles[name] = [tuple(perturb(turn, rng) for turn in turns) for turns in battles[name]]
    else:
        source, origin = demo.make_battles(4000, SEED)[0], "demo battles, stretched to real lengths"
        battles = source.iloc[rng.integers(len(source), size=n_battles)].reset_index(drop=True)
        for name, (median, spread) in DEMO_LENGTHS.items():
            lengths = median * rng.lognormal(0, spread, size=n_battles)
            battles[name] = [stretch(*pair) for pair in zip(battles[name], lengths, strict=True)]
    battles["id"] = np.arange(1, n_battles + 1)
    for position in ("model_a", "model_b"):
        battles[position] = [f"chatbot-{model}" for model in rng.integers(N_MODELS, size=n_battles)]
    return battles, origin


def write_battles(path: Path, battles: pd.DataFrame) -> None:
    """Write battles in the competition's layout."""
    votes = {name: (battles["label"] == label).astype(int) for label, name in enumerate(LABELS)}
    encoded = {name: battles[name].map(json.dumps) for name in TEXTS}
    battles[["id", "model_a", "model_b"]].assign(**encoded, **votes).to_csv(path, index=False)


# ── the row-wise way: one function per row, one pattern per feature ───────────────────

PATTERNS = {
    "n_words": r"\w+",
    "n_sentences": r"[.!?](?=\s|\Z)|[。！？]",
    "n_lines": r"\n",
    "n_punctuation": f"[{re.escape(string.punctuation)}]",
    "n_commas": r",",
    "n_question_marks": r"\?",
    "n_exclamation_marks": r"!",
    "n_list_items": r"(?m)^[ \t]{0,12}(?:[-*+•]|\d{1,3}[.)])[ \t]",
    "n_headers": r"(?m)^#{1,6}[ \t]",
    "n_bold": r"\*\*[^*\n]{1,300}\*\*",
    "n_code_blocks": r"```",
    "n_inline_code": r"`",
    "n_table_rows": r"(?m)^\|",
    "n_urls": r"https?://",
    "share_digits": r"[0-9]",
    "share_uppercase": r"[A-Z]",
    "share_non_ascii": r"[^\x00-\x7f]",
}
SAME = (
    "n_chars",
    "n_lines",
    "n_punctuation",
    "n_commas",
    "n_question_marks",
    "n_exclamation_marks",
    "n_list_items",
)
STOPWORDS = {word.decode() for word in style.STOPWORDS}
CODE = r"```|def |import |#include|</|\{\n|\(\);|SELECT |function |public class"
SCRIPTS = {
    "Latin": r"[A-Za-z\u00c0-\u024f]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "CJK": r"[\u3040-\u30ff\u3400-\u9fff]",
}
HEDGES = re.compile("|".join(rf"\b{word.decode()}\b" for word in sorted(style.HEDGES)))


def find_words(turns: Turns) -> list[str]:
    """Words of a text in lower case."""
    return re.findall(r"\w+", "\n".join(turn or "" for turn in turns).lower())


def measure_answer(turns: Turns, prompt: Turns) -> dict[str, float]:
    """Count one answer, each feature by its own pattern."""
    text, words = "\n".join(turn or "" for turn in turns), find_words(turns)
    lower, n_chars = text.lower(), max(len(text), 1)
    found = {name: len(re.findall(pattern, text)) for name, pattern in PATTERNS.items()}
    for name, part, of in (
        ("prompt_overlap", prompt, words),
        ("prompt_overlap_first", prompt[:1], words),
        ("prompt_overlap_last", prompt[-1:], find_words(turns[-1:])),
    ):
        asked = set(find_words(part)) - STOPWORDS
        found[name] = len(asked & set(of)) / max(len(asked), 1)
    return found | {
        "n_chars": len(text),
        "n_turns_empty": sum(not (turn or "").strip() for turn in turns),
        "n_hedges": len(HEDGES.findall(lower)),
        "punctuation_per_char": found["n_punctuation"] / n_chars,
        "share_digits": found["share_digits"] / n_chars,
        "share_non_ascii": found["share_non_ascii"] / n_chars,
        "share_uppercase": found["share_uppercase"] / max(len(re.findall(r"[A-Za-z]", text)), 1),
        "lexical_diversity": len(set(words[:100])) / max(len(words[:100]), 1),
        "mean_word_length": sum(map(len, words)) / max(len(words), 1),
        "is_refusal": any(phrase in lower[:300] for phrase in style.WORDS["refusals"]),
        "has_disclaimer": any(phrase in lower for phrase in style.WORDS["disclaimers"]),
        "has_apology": any(phrase in lower for phrase in style.WORDS["apologies"]),
    }


def measure_row(row: pd.Series) -> pd.Series:
    """Count in one battle what `measure_style` counts."""
    prompt, words = row["prompt"], {side: set(find_words(row[f"response_{side}"])) for side in "ab"}
    text = "\n".join(turn or "" for turn in prompt)
    found = {
        f"{name}_{side}": value
        for side in "ab"
        for name, value in measure_answer(row[f"response_{side}"], prompt).items()
    }
    return pd.Series(
        found
        | {
            "n_chars_prompt": len(text),
            "n_turns": len(prompt),
            "has_code_prompt": bool(re.search(CODE, text)),
            "word_jaccard": len(words["a"] & words["b"]) / max(len(words["a"] | words["b"]), 1),
            "is_identical": row["response_a"] == row["response_b"],
            "script_prompt": max(SCRIPTS, key=lambda name: len(re.findall(SCRIPTS[name], text))),
        }
    )


# ── one process for each way ──────────────────────────────────────────────────────────


def run_library(path: Path, out: Path) -> None:
    """Time `style.measure_style` alone."""
    battles = readers.load_pairs(path)[0]
    watch = Stopwatch()
    table = style.measure_style(battles)
    finish(out, watch.seconds, table)


def run_rows(path: Path, out: Path) -> None:
    """Time the row-wise way alone."""
    battles = readers.load_pairs(path)[0]
    watch = Stopwatch()
    table = battles.apply(measure_row, axis=1)
    finish(out, watch.seconds, table)


def finish(out: Path, seconds: float, table: pd.DataFrame) -> None:
    """Write time, memory, and the sums on which both ways must agree."""
    sums = {
        f"{name}_{side}": float(table[f"{name}_{side}"].astype(float).sum())
        for name in SAME
        for side in "ab"
    }
    write_json(
        out, {"seconds": round(seconds, 2), "peak_mib": round(measure_peak_mib()), "sums": sums}
    )


def in_own_process(act: Callable[[Path, Path], None], path: Path, out: Path) -> dict:
    """Run one way in its own process, so that memory and warm caches are not shared."""
    before_s = used_cpu_s()
    process = multiprocessing.get_context("spawn").Process(target=act, args=(path, out))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{act.__name__}: expected exit code 0, got {process.exitcode}")
    # All of the process, reading the file and importing included, the same for both ways.
    return read_json(out) | {"cpu_seconds_of_process": round(used_cpu_s() - before_s, 2)}


def used_cpu_s() -> float:
    """Processor seconds of all ended child processes, which a busy machine does not stretch."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_notebook(path: Path, artifacts: Path) -> dict:
    """Run notebook 01 through the runner: kernel, figures and files included."""
    watch, before_s = Stopwatch(), used_cpu_s()
    command = [sys.executable, "-m", "src.utils.suite.run", "--only", "01", "--profile", "full"]
    command += ["--force", "--data", str(path), "--artifacts", str(artifacts)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = read_json(artifacts / "01_eda" / "bias.json")
    assert written["n_pairs"] == len(pd.read_csv(path, usecols=["id"])), "01 lost rows"
    return {
        "seconds": round(watch.seconds, 2),
        "seconds_inside": written["seconds"],
        "cpu_seconds": round(used_cpu_s() - before_s, 2),
        "peak_mib": written["peak_mib"],
        "n_bootstrap": written["config"]["n_bootstrap"],
    }


def main() -> None:
    """Measure, print, and record where all battles were used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--battles", type=int, default=N_BATTLES, help="fewer make a trial that is not recorded"
    )
    n_battles, load = parser.parse_args().battles, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        battles, origin = make_battles(n_battles, np.random.default_rng(SEED))
        n_chars = int(
            sum(len(turn or "") for name in TEXTS for turns in battles[name] for turn in turns)
        )
        write_battles(path, battles)
        del battles
        notebook = run_notebook(path, Path(folder) / "artifacts")
        library = in_own_process(run_library, path, Path(folder) / "library.json")
        rows = in_own_process(run_rows, path, Path(folder) / "rows.json")
        n_bytes = path.stat().st_size
    sums, others = library.pop("sums"), rows.pop("sums")
    wrong = {
        name: (sums[name], others[name])
        for name in sums
        if not np.isclose(sums[name], others[name], rtol=1e-4)
    }
    assert not wrong, f"the two ways count differently: {wrong}"
    results = {
        "command": "python benchmarks/eda.py",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load_before": round(load, 2),
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "versions": measure_versions(),
        "seed": SEED,
        "battles": {
            "n": n_battles,
            "from": origin,
            "characters": n_chars,
            "megabytes": round(n_bytes / 1e6, 1),
        },
        "notebook_01": notebook,
        "text_features": {"measure_style": library, "pandas_apply": rows},
        "ratio_of_text_features": round(rows["seconds"] / library["seconds"], 2),
        "ratio_to_notebook_01": round(rows["seconds"] / notebook["seconds"], 2),
        "target": {"seconds": TARGET_S, "peak_mib": TARGET_MIB},
        "target_met": notebook["seconds"] < TARGET_S and notebook["peak_mib"] < TARGET_MIB,
    }
    print(json.dumps(results, indent=2))
    if n_battles == N_BATTLES:
        write_json(ROOT / "benchmarks" / "results" / "eda.json", results)


if __name__ == "__main__":
    main()
