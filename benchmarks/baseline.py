"""Measure the CPU baseline: its scores on real battles, its time and memory at full size.

    python benchmarks/baseline.py

Real battles are read from the folder that ARENA_REAL_DATA names; without it the scores are
skipped and the full size is made of demo battles. Writes `benchmarks/results/baseline.json`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # every fit of the CPU baseline is single-threaded

import argparse
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from src.utils.battles.demo import make_battles
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.battles.style import measure_style, style_differences
from src.utils.config import BaselineConfig
from src.utils.models import baseline
from src.utils.paths import REAL_DATA
from src.utils.runs import measure_peak_mib, measure_versions, read_json, write_json
from src.utils.schema import LABELLED_COLUMNS, TEXTS, Turns, average_over_swap
from src.utils.stats import scores
from src.utils.stats.blend import cross_fit_blend

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "baseline.json"
REAL = [REAL_DATA / f"arena_{name}.csv" for name in ("sample", "extra")]
N_TRAIN, N_TEST = 57_477, 25_000  # the competition's
SEEDS = (11, 12, 13, 14, 15)  # of the splits; none of them chose a setting
THIRTEEN = (
    "n_chars n_words n_sentences n_lines n_list_items n_headers n_bold n_code_blocks "
    "n_question_marks n_exclamation_marks punctuation_per_char lexical_diversity is_refusal"
).split()


def read_real() -> pd.DataFrame | None:
    """Read the real battles; None if they are not there."""
    return load_pairs(REAL)[0] if all(path.exists() for path in REAL) else None


def cross_fit_thirteen(pairs: pd.DataFrame) -> np.ndarray:
    """Predict each fold by a logistic regression on 13 style features, averaged over the swap."""
    differences, names = style_differences(measure_style(pairs))
    chosen = differences[:, [names.index(name) for name in THIRTEEN]]
    labels = pairs["label"].to_numpy(dtype=int)
    probs = np.empty((len(pairs), 3))
    for fold in np.unique(pairs["fold"]):
        held_out = (pairs["fold"] == fold).to_numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        model.fit(chosen[~held_out], labels[~held_out])
        both = [model.predict_proba(sign * chosen[held_out]) for sign in (1, -1)]
        probs[held_out] = average_over_swap(*both)
    return probs


def score_real(pairs: pd.DataFrame, config: BaselineConfig) -> dict:
    """Cross-validate over several splits: mean losses, with intervals that resample prompts."""
    labels = pairs["label"].to_numpy(dtype=int)
    features = baseline.measure_features(pairs, config)
    losses: dict[str, list[np.ndarray]] = {}
    for seed in SEEDS:
        split = add_groups_and_folds(pairs, seed=seed)
        folds = split["fold"].to_numpy()
        members = baseline.cross_fit(split, config, features)
        models = {"class prior": scores.held_out_prior(labels, folds)}
        models |= {"13 style features": cross_fit_thirteen(split), **members}
        models["CPU baseline"] = cross_fit_blend(members, labels, folds, len(set(folds)))
        for name, probs in models.items():
            losses.setdefault(name, []).append(scores.row_losses(probs, labels))
    groups = add_groups_and_folds(pairs)["group"].to_numpy()
    mean = {name: np.mean(values, axis=0) for name, values in losses.items()}
    rows = {}
    for name, values in mean.items():
        low, high = scores.bootstrap_interval(values, groups)
        gap = scores.paired_difference(values, mean["13 style features"], groups)
        rows[name] = {"log_loss": float(values.mean()), "low": low, "high": high}
        rows[name]["minus_13_style_features"] = gap
    return {"n_pairs": len(pairs), "n_folds": 5, "seeds": list(SEEDS), "models": rows}


def enlarge(pairs: pd.DataFrame, n_pairs: int, seed: int) -> pd.DataFrame:
    """Draw battles with replacement, and replace one word in ten by one from another battle."""
    rng = np.random.default_rng(seed)
    drawn = pairs.iloc[rng.integers(len(pairs), size=n_pairs)].reset_index(drop=True)
    words = []
    for turns in pairs["response_a"]:
        for turn in turns:
            words += (turn or "").split(" ")
    for name in TEXTS:
        texts = [_perturb(turns, words, rng) for turns in drawn[name]]
        drawn[name] = pd.Series(texts, dtype=object)
    return drawn.assign(id=np.arange(n_pairs))


def _perturb(turns: Turns, words: list[str], rng: np.random.Generator) -> Turns:
    changed = []
    for turn in turns:
        parts = (turn or "").split(" ")
        places = rng.integers(len(parts), size=(len(parts) + 9) // 10)
        for place, word in zip(places, rng.integers(len(words), size=len(places)), strict=True):
            parts[place] = words[word]
        changed.append(" ".join(parts))
    return tuple(changed)


def _read_clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure_size(
    pairs: pd.DataFrame, config: BaselineConfig, n_train: int, n_test: int, seed: int = 0
) -> dict:
    """Train on all folds and predict at the competition's size: seconds and MiB."""
    train = add_groups_and_folds(enlarge(pairs, n_train, seed))
    test = enlarge(pairs, n_test, seed + 1)
    clocks = [_read_clocks()]
    features = baseline.measure_features(train, config)
    clocks.append(_read_clocks())
    members = baseline.cross_fit(train, config, features)
    clocks.append(_read_clocks())
    model = baseline.fit_baseline(train, config, features, members)
    del features
    clocks.append(_read_clocks())
    model.predict_probs(test)
    clocks.append(_read_clocks())
    steps = ["measure", "cross_fit", "fit", "predict"]
    spent = pd.DataFrame(np.diff(clocks, axis=0), index=steps, columns=["wall_s", "cpu_s"])
    spent.loc["train_all"] = spent.loc[steps[:3]].sum()
    n_characters = 0
    for name in TEXTS:
        for turns in train[name]:
            n_characters += sum(len(turn or "") for turn in turns)
    return {
        "n_train": n_train,
        "n_test": n_test,
        "seed": seed,
        "characters_train": n_characters,
        # One thread works; on a busy machine the wall clock also counts other processes.
        **{name: column.round(1).to_dict() for name, column in spent.items()},
        "peak_mib": round(measure_peak_mib()),
    }


def describe_machine() -> str:
    """Name the processor and count its cores, as far as the system reports them."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    return f"{platform.system()}, {model}, {os.cpu_count()} cores"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-train", type=int, default=N_TRAIN, help="training battles, full size")
    parser.add_argument("--n-test", type=int, default=N_TEST, help="test battles, full size")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    config, real = BaselineConfig(), read_real()
    source = make_battles(2000, seed=0)[0][list(LABELLED_COLUMNS)] if real is None else real
    kind = "demo battles" if real is None else "real battles"
    result = {
        "command": "python benchmarks/baseline.py",
        "machine": describe_machine(),
        "versions": measure_versions(),
        "config": config.to_json(),
        "rows_are": f"{kind}, drawn with replacement and perturbed",
        "real": None if real is None else score_real(real, config),
        "full_size": measure_size(source, config, options.n_train, options.n_test),
    }
    if real is None and options.out.exists():
        result["real"] = read_json(options.out)["real"]  # measured where real battles were present
    write_json(options.out, result)
    print(f"wrote {os.path.relpath(options.out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
