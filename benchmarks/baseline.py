"""Measure the CPU baseline: its scores on real battles, and all it does at full size.

    python -m benchmarks.baseline

takes some 25 minutes on two idle cores; `--parts` measures some parts, `--keep VERSION` keeps
the row losses of this version, with which later ones are compared.

Parts, each a key of `benchmarks/results/baseline.json`, of which a run replaces those it measured:

    real        repeated cross-validation, compared with simpler models and an earlier version
    real_curve  what more real battles bring
    stand_in    the same on a stand-in of the competition's size (`standin.py`), above the oracle,
                with seconds and memory; each size in a process of its own

Real battles are read from the folder that ARENA_REAL_DATA names; without it the stand-in is made
of demo battles, and the other parts are skipped.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no fit of the CPU baseline uses OpenMP's threads

import argparse
import hashlib
import multiprocessing
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import rel_entr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import standin
from src.utils import runs
from src.utils.battles import demo
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.battles.style import measure_style, style_differences
from src.utils.config import BaselineConfig
from src.utils.models import baseline
from src.utils.paths import REAL_DATA
from src.utils.schema import LABELLED_COLUMNS, TEXTS, average_over_swap, join_turns
from src.utils.stats import scores
from src.utils.stats.blend import apply_blend, cross_fit_blend

RESULTS = Path(__file__).resolve().parent / "results"
RESULT = RESULTS / "baseline.json"
EARLIER = RESULTS / "baseline_before.csv"  # row losses of an earlier version, which names a column
REAL = [REAL_DATA / f"arena_{name}.csv" for name in ("sample", "extra", "more")]
PARTS = ("real", "real_curve", "stand_in")
SPLITS = range(10)  # seeds
CURVE_SPLITS = range(2)
CURVE_FOLDS = 8  # so that 1,200 of the 1,384 real battles are left to learn from
REAL_SIZES = (300, 600, 900, 1200)
SIZES = (1000, 3000, 10_000, 30_000, 57_477)
N_TEST = 25_000
N_AT_ONCE = 4096  # battles whose features are in memory at a time, as in `predict_probs`
PRIOR, THIRTEEN, BLEND = "class prior", "13 style features", "CPU baseline"
THIRTEEN_FEATURES = (
    "n_chars n_words n_sentences n_lines n_list_items n_headers n_bold n_code_blocks "
    "n_question_marks n_exclamation_marks punctuation_per_char lexical_diversity is_refusal"
).split()
Losses = dict[str, np.ndarray]


def cross_fit_thirteen(pairs: pd.DataFrame) -> np.ndarray:
    """Predict each fold by a logistic regression on 13 style features, averaged over the swap."""
    differences, names = style_differences(measure_style(pairs))
    chosen = differences[:, [names.index(name) for name in THIRTEEN_FEATURES]]
    labels = pairs["label"].to_numpy(dtype=int)
    probs = np.empty((len(pairs), 3))
    for fold in np.unique(pairs["fold"]):
        held_out = (pairs["fold"] == fold).to_numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        model.fit(chosen[~held_out], labels[~held_out])
        both = [model.predict_proba(sign * chosen[held_out]) for sign in (1, -1)]
        probs[held_out] = average_over_swap(*both)
    return probs


def measure_losses(pairs: pd.DataFrame, config: BaselineConfig, splits: range = SPLITS) -> Losses:
    """Cross-validate over several splits: model -> (N,) losses of the rows, mean over the splits.

    The blend of a fold is fitted to the members' predictions of the other folds.
    """
    labels = pairs["label"].to_numpy(dtype=int)
    features = baseline.measure_features(pairs, config)
    losses: dict[str, list[np.ndarray]] = {}
    for seed in splits:
        split = add_groups_and_folds(pairs, seed=seed)
        folds = split["fold"].to_numpy()
        members = baseline.cross_fit(split, config, features)
        models = {PRIOR: scores.held_out_prior(labels, folds), THIRTEEN: cross_fit_thirteen(split)}
        models |= members
        models[BLEND] = cross_fit_blend(members, labels, folds, len(set(folds)))
        for name, probs in models.items():
            losses.setdefault(name, []).append(scores.row_losses(probs, labels))
    return {name: np.mean(rows, axis=0) for name, rows in losses.items()}


def score_real(
    pairs: pd.DataFrame, losses: Losses, earlier: Losses, n_splits: int
) -> dict[str, Any]:
    """Score models by their row losses: means and paired differences; intervals resample prompts.

    Differences are to the class prior, the 13 style features and the `earlier` versions.
    """
    groups = add_groups_and_folds(pairs)["group"].to_numpy()
    references = {PRIOR: losses[PRIOR], THIRTEEN: losses[THIRTEEN], **earlier}
    models = {}
    for name, rows in (losses | earlier).items():
        low, high = scores.bootstrap_interval(rows, groups)
        row: dict[str, Any] = {"log_loss": float(rows.mean()), "low": low, "high": high}
        for reference, others in references.items():
            row[f"minus {reference}"] = scores.paired_difference(rows, others, groups)
        models[name] = row
    return {"n_pairs": len(pairs), "n_folds": 5, "n_splits": n_splits, "models": models}


def name_rows(pairs: pd.DataFrame) -> list[str]:
    """Name battles by a hash of their ids."""
    return [hashlib.sha256(str(key).encode()).hexdigest()[:12] for key in pairs["id"]]


def keep_losses(path: Path, version: str, pairs: pd.DataFrame, rows: np.ndarray) -> None:
    """Write the losses of a version's rows, for `read_earlier`."""
    table = pd.DataFrame({"battle": name_rows(pairs), version: rows.astype(np.float32)})
    runs.write_table(path, table)


def read_earlier(path: Path, pairs: pd.DataFrame) -> Losses:
    """Read what `keep_losses` wrote about these battles; nothing where there is no file."""
    if not path.exists():
        return {}
    table = pd.read_csv(path).set_index("battle").loc[name_rows(pairs)]
    return {f"{BLEND} {name}": table[name].to_numpy(dtype=float) for name in table}


def fit(pairs: pd.DataFrame, config: BaselineConfig, features: Any) -> baseline.Baseline:
    """Fit the CPU baseline to battles, its blend by five folds of them."""
    return baseline.fit_baseline(add_groups_and_folds(pairs), config, features)


def predict(model: baseline.Baseline, features: Any) -> dict[str, np.ndarray]:
    """Predict by each member and by their blend."""
    members = model.ensemble.predict(features)
    return members | {BLEND: apply_blend(model.blend, members)}


def curve_real(
    pairs: pd.DataFrame,
    config: BaselineConfig,
    sizes: tuple[int, ...] = REAL_SIZES,
    splits: range = CURVE_SPLITS,
) -> dict[str, Any]:
    """Score members and blend by the number of battles learned from, nested, on held-out folds."""
    labels = pairs["label"].to_numpy(dtype=int)
    features = baseline.measure_features(pairs, config)
    losses: Losses = {}
    shape = len(sizes), len(splits), len(pairs)
    for at, seed in enumerate(splits):
        split = add_groups_and_folds(pairs, CURVE_FOLDS, seed)
        groups, folds = split["group"].to_numpy(), split["fold"].to_numpy()
        for fold in range(CURVE_FOLDS):
            held_out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            for step, n_train in enumerate(sizes):
                drawn = rest[scores.draw_groups(groups[rest], n_train, seed)]
                model = fit(pairs.iloc[drawn], config, features.take(drawn))
                prior = np.tile(scores.class_prior(labels[drawn]), (len(held_out), 1))
                found = {PRIOR: prior, **predict(model, features.take(held_out))}
                for name, probs in found.items():
                    rows = losses.setdefault(name, np.full(shape, np.nan))
                    rows[step, at, held_out] = scores.row_losses(probs, labels[held_out])
    models: dict[str, list] = {name: [] for name in losses}
    for name, rows in losses.items():
        for each in rows.mean(axis=1):
            low, high = scores.bootstrap_interval(each, groups)
            models[name].append({"log_loss": float(each.mean()), "low": low, "high": high})
    result = {"n_pairs": len(pairs), "n_folds": CURVE_FOLDS, "n_splits": len(splits)}
    return result | {"n_train": list(sizes), "models": models}


def run_alone(function: Any, *args: Any) -> Any:
    """Call a function in a process of its own, so that its peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def measure_size(folder: Path, config: BaselineConfig, n_cores: int, test: bool) -> dict[str, Any]:
    """Train on the `train.parquet` of a folder, and predict its `test.parquet` where wanted."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_cores])
    train = add_groups_and_folds(runs.read_pairs(folder / "train.parquet"))
    clock = _Clock()
    features = baseline.measure_features(train, config)
    clock.stop("measure")
    members = baseline.cross_fit(train, config, features)
    clock.stop("cross_fit")
    result = {"n_train": len(train), "n_cores": n_cores}
    if not test:
        return result | clock.read()
    model = baseline.fit_baseline(train, config, features, members)
    clock.stop("fit")
    del train, features, members
    rows = runs.read_pairs(folder / "test.parquet")
    clock.start()
    model.predict_probs(rows)
    clock.stop("predict")
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), N_AT_ONCE):
        part = baseline.measure_features(rows.iloc[start : start + N_AT_ONCE], config)
        for name, probs in predict(model, part).items():
            found.setdefault(name, []).append(probs)
    truth = np.load(folder / "truth.npy")
    models = {name: score_excess(rows, np.concatenate(p), truth) for name, p in found.items()}
    return result | {"models": models} | clock.read()


class _Clock:
    """Sums wall-clock and CPU seconds of named steps."""

    def __init__(self) -> None:
        self._steps: dict[str, np.ndarray] = {}
        self.start()

    def start(self) -> None:
        used = os.times()
        self._last = np.array([used.elapsed, used.user + used.system])

    def stop(self, name: str) -> None:
        last = self._last
        self.start()
        self._steps[name] = self._last - last

    def read(self) -> dict[str, Any]:
        """Seconds of each step, and the process's peak memory."""
        table = pd.DataFrame(self._steps, index=["wall_s", "cpu_s"]).round(1)
        return {**table.to_dict("index"), "peak_mib": round(runs.measure_peak_mib())}


def score_excess(pairs: pd.DataFrame, probs: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Score probabilities by votes, and by the nats that they are expected to lose to the truth."""
    groups = add_groups_and_folds(pairs)["group"].to_numpy()
    excess = rel_entr(truth, probs).sum(axis=1)
    low, high = scores.bootstrap_interval(excess, groups)
    loss = scores.log_loss(probs, pairs["label"].to_numpy(dtype=int))
    return {"log_loss": loss, "excess": float(excess.mean()), "low": low, "high": high}


def measure_stand_in(
    source: pd.DataFrame, config: BaselineConfig, sizes: tuple[int, ...], n_test: int, seed: int = 0
) -> dict[str, Any]:
    """Measure all sizes on the stand-in, with two cores; the five folds of the last with one, too.

    Sizes are nested, and all are scored on the same `n_test` battles.
    """
    battles, truth, equal = standin.make_battles(source, sizes[-1] + n_test, seed)
    train, test = battles[: sizes[-1]], battles[sizes[-1] :].reset_index(drop=True)
    prior = np.tile(scores.class_prior(train["label"].to_numpy(dtype=int)), (n_test, 1))
    known = {"oracle": truth[-n_test:], "authors of equal strength": equal[-n_test:], PRIOR: prior}
    n_characters = [train[name].map(join_turns).str.len().sum() for name in TEXTS]
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "truth.npy", truth[-n_test:])
        runs.write_pairs(folder / "test.parquet", test)
        for n_train in sizes:
            runs.write_pairs(folder / "train.parquet", train[:n_train])
            measured.append(run_alone(measure_size, folder, config, 2, True))
            print(f"stand-in of {n_train:,} battles: {measured[-1]}")
        one_core = run_alone(measure_size, folder, config, 1, False)
    shares = np.bincount(battles["label"], minlength=3) / len(battles)
    return {
        "n_test": n_test,
        "seed": seed,
        "characters": int(sum(n_characters)),
        "parts_of_the_truth": {"gap": standin.GAP_PARTS, "tie": standin.TIE_PARTS},
        "shares": shares.round(4).tolist(),
        "known": {key: score_excess(test, probs, known["oracle"]) for key, probs in known.items()},
        "sizes": measured,
        "one_core": one_core,
    }


def describe_machine() -> str:
    """Name the processor and count its cores, as far as the system reports them."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    return f"{platform.system()}, {model}, {os.cpu_count()} cores"


def measure_part(part: str, real: pd.DataFrame | None, options: argparse.Namespace) -> Any:
    """Measure one of `PARTS`."""
    config = BaselineConfig()
    if part == "stand_in":
        source = demo.make_battles(2000, seed=0)[0] if real is None else real
        result = measure_stand_in(
            source[list(LABELLED_COLUMNS)], config, tuple(options.sizes), options.n_test
        )
        result["made_of"] = "demo battles" if real is None else "real battles"
    elif part == "real_curve":
        result = curve_real(real, config)
    else:
        losses = measure_losses(real, config)
        result = score_real(real, losses, read_earlier(EARLIER, real), len(SPLITS))
        if options.keep:
            keep_losses(EARLIER, options.keep, real, losses[BLEND])
    about = {"machine": describe_machine(), "versions": runs.measure_versions()}
    return result | about | {"config": config.to_json()}


def main() -> None:
    """Measure, and replace what was measured in the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of the stand-in")
    parser.add_argument("--n-test", type=int, default=N_TEST, help="test battles of the stand-in")
    parser.add_argument("--keep", metavar="VERSION", help="keep the row losses of part real")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    real = load_pairs(REAL)[0] if all(path.exists() for path in REAL) else None
    for part in options.parts:
        if real is None and part != "stand_in":
            print(f"{part}: skipped, ARENA_REAL_DATA names no real battles")
            continue
        measured = measure_part(part, real, options)
        result = runs.read_json(options.out) if options.out.exists() else {}
        runs.write_json(options.out, {**result, part: measured})
        print(f"{part}: written to {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
