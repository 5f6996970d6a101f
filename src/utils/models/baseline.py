"""The CPU baseline: linear models and boosted trees on style, words and characters, blended.

Members see the same battles differently and are blended on held-out rows:

    style   counts of `style.py`: length, markdown, refusals, overlap with the prompt …
    words   style, and the share of each word among an answer's words
    text    all of these, and which sequences of two to four bytes an answer holds; where the
            answers hold different ones also speaks for or against a tie
    trees   gradient boosting on style, for thresholds and interactions

All but the trees are one model, Bradley-Terry with Davidson's ties: with d the features
that change sign when A and B are exchanged, and s those that do not,

    p_A : p_B : p_tie = exp(w·d / 2) : exp(-w·d / 2) : exp(v·s + b)

so exchanging the answers exchanges the two columns, whatever w and v are. The trees
learn from both orders of every battle and predict the mean of both.

Source: Davidson 1970, JASA 65(329):317-328, doi:10.1080/01621459.1970.10481082.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.feature_extraction.text import HashingVectorizer
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from src.utils.battles.style import STYLE_FEATURES, measure_style, style_differences, style_shared
from src.utils.config import BaselineConfig
from src.utils.runs import atomic_path, read_json, write_json
from src.utils.schema import (
    A_WINS,
    B_WINS,
    FROZEN_COLUMNS,
    LABELS,
    TIE,
    average_over_swap,
    check_pairs,
    join_turns,
    list_votes,
    swap_labels,
    vote_shares,
)
from src.utils.stats.blend import Blend, apply_blend, fit_blend
from src.utils.stats.ranking import davidson_logits


@dataclass(frozen=True)
class Prior:
    """What a linear member reads, and the prior variance of each part, in squared logits.

    A variance is that of the part's contribution to a typical battle: to the log-odds of A
    against B, or to the log-odds of a tie for `shared` and `tie_texts`.
    """

    style: float
    shared: float
    texts: dict[str, float] = field(default_factory=dict)  # text block -> variance
    tie_texts: dict[str, float] = field(default_factory=dict)  # the same, of absolute values


# Chosen by repeated grouped cross-validation, see notebooks/LOG.md.
LINEAR_MEMBERS = {
    "style": Prior(style=0.4, shared=0.3),
    "words": Prior(style=0.4, shared=0.3, texts={"words": 1.0}),
    "text": Prior(0.05, 0.15, {"words": 0.7, "characters": 1.2}, {"characters": 0.8}),
}
# People mind an apology wherever they vote, so its weight is not shrunk with the others.
_OWN_VARIANCE = {"has_apology": 0.05}

WORD_PATTERN = r"\w+|[^\w\s]"  # words and signs
_N_GRAMS = (2, 3, 4)  # bytes
_AT_ONCE = 4096  # battles
# 2^64 over the golden ratio: Fibonacci hashing, Knuth volume 3, section 6.4.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MAX_DEVIATION = 4.0  # standardised features are cut here: one odd answer must not decide a fit
_BATTLES_PER_TREE = 15  # with fewer battles per round, the trees overfit
_TREES = {
    "objective": "multiclass",
    "num_class": len(LABELS),
    "num_leaves": 8,
    "min_child_samples": 40,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    # One thread: at these sizes, synchronising costs more than a second thread gains.
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


@dataclass(frozen=True)
class Features:
    """What the members read of N battles, not yet scaled."""

    differences: np.ndarray  # (N, F) float64, changes sign under the swap
    shared: np.ndarray  # (N, G) float64, unchanged under the swap
    texts: dict[str, sparse.csr_matrix]  # block -> (N, width) float32, changes sign

    def take(self, rows: np.ndarray) -> "Features":
        """Select rows by mask or position."""
        texts = {name: block[rows] for name, block in self.texts.items()}
        return Features(self.differences[rows], self.shared[rows], texts)


def measure_features(pairs: pd.DataFrame, config: BaselineConfig) -> Features:
    """Measure battles for all members; `n_hashed` of the settings is the width of a text block."""
    style = measure_style(pairs)
    words = _hash_words(config.n_hashed)
    parts: dict[str, list[sparse.csr_matrix]] = {"words": [], "characters": []}
    # Some battles at a time: all blocks of both answers would take four times the room.
    for start in range(0, len(pairs), _AT_ONCE) or [0]:
        part = pairs.iloc[start : start + _AT_ONCE]
        texts_a, texts_b = ([*part[name].map(join_turns)] for name in ("response_a", "response_b"))
        parts["words"].append(words.transform(texts_a) - words.transform(texts_b))
        characters = [hash_bytes(texts, config.n_hashed) for texts in (texts_a, texts_b)]
        parts["characters"].append(characters[0] - characters[1])
    texts = {name: sparse.vstack(parts.pop(name), format="csr") for name in [*parts]}
    return Features(style_differences(style)[0], style_shared(style), texts)


def _hash_words(n_hashed: int) -> HashingVectorizer:
    look = {"token_pattern": WORD_PATTERN, "alternate_sign": False, "norm": "l1"}
    return HashingVectorizer(n_features=n_hashed, dtype=np.float32, **look)


def hash_bytes(texts: list[str], n_hashed: int) -> sparse.csr_matrix:
    """Find which sequences of 2 to 4 bytes each text holds: (N, n_hashed) float32 of 0 and 1."""
    found = np.zeros(n_hashed, dtype=bool)  # used in turn: several times as fast as np.unique
    columns = [_hash_text(text, found) for text in texts]
    ends = np.cumsum([0] + [len(found) for found in columns])
    indices = np.concatenate([*columns, np.empty(0, dtype=np.int32)])
    ones = np.ones(len(indices), dtype=np.float32)
    return sparse.csr_matrix((ones, indices, ends), shape=(len(texts), n_hashed))


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


Units = dict[str, np.ndarray]


def measure_units(features: Features) -> Units:
    """Measure the scale of training features; none of it changes under the swap.

    Returns:
        "differences" (F,), root mean square about zero; "shared_mean" and "shared_std" (G,);
        for each text block, the root mean square length of its rows, ().
    """
    units = {
        "differences": np.sqrt((features.differences**2).mean(axis=0)),
        "shared_mean": features.shared.mean(axis=0),
        "shared_std": features.shared.std(axis=0),
    }
    for name, block in features.texts.items():
        units[name] = np.sqrt(np.vdot(block.data, block.data) / max(block.shape[0], 1))
    # A feature that never varies is left at zero, not divided by it.
    varying = {name: np.where(unit > 1e-9, unit, 1.0) for name, unit in units.items()}
    return varying | {"shared_mean": units["shared_mean"]}


@dataclass(frozen=True)
class Blocks:
    """Matrices side by side and the scale of their columns, multiplied without copying any."""

    parts: list[tuple[np.ndarray | sparse.csr_matrix, np.ndarray]]  # (N, D), and (D,) or ()

    @property
    def width(self) -> int:
        """Columns of all blocks together."""
        return sum(block.shape[1] for block, _ in self.parts)

    def times(self, weights: np.ndarray) -> np.ndarray:
        """Multiply by a vector: (D,) -> (N,) float64."""
        total = np.zeros(self.parts[0][0].shape[0])
        start = 0
        for block, scale in self.parts:
            end = start + block.shape[1]
            # In the block's own precision: scipy would otherwise convert the block each time.
            total += block @ (weights[start:end] * scale).astype(block.dtype)
            start = end
        return total

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """Multiply the transpose by a vector: (N,) -> (D,) float64."""
        products = []
        for block, scale in self.parts:
            products.append((block.T @ values.astype(block.dtype)).astype(np.float64) * scale)
        return np.concatenate(products)


def linear_inputs(features: Features, units: Units, prior: Prior) -> tuple[Blocks, Blocks]:
    """Scale what a linear member reads: what changes sign under the swap, and what does not."""
    style = features.differences / units["differences"]
    style = np.clip(style, -_MAX_DEVIATION, _MAX_DEVIATION)
    shared = (features.shared - units["shared_mean"]) / units["shared_std"]
    shared = np.clip(shared, -_MAX_DEVIATION, _MAX_DEVIATION)
    signed: list = [(style, style_scales(prior))]
    unsigned: list = [(shared, np.full(shared.shape[1], np.sqrt(prior.shared / shared.shape[1])))]
    for name, variance in prior.texts.items():
        signed.append((features.texts[name], np.float32(np.sqrt(variance) / units[name])))
    for name, variance in prior.tie_texts.items():
        block = features.texts[name]
        # abs(block) would copy the positions of the entries as well.
        positive = (np.abs(block.data), block.indices, block.indptr)
        scale = np.float32(np.sqrt(variance) / units[name])
        unsigned.append((sparse.csr_matrix(positive, shape=block.shape), scale))
    return Blocks(signed), Blocks(unsigned)


def style_scales(prior: Prior) -> np.ndarray:
    """The prior standard deviation of each style feature's weight: (F,)."""
    each = prior.style / len(STYLE_FEATURES)
    return np.sqrt([_OWN_VARIANCE.get(name, each) for name in STYLE_FEATURES])


@dataclass(frozen=True)
class Davidson:
    """Bradley-Terry with ties as a linear model of features; see the top of this file."""

    differences: np.ndarray  # w, (D,) float32
    shared: np.ndarray  # v, (G,) float32
    intercept: float  # b

    def predict(self, differences: Blocks, shared: Blocks) -> np.ndarray:
        """Probabilities: (N, D) and (N, G) -> (N, C)."""
        tie = shared.times(self.shared) + self.intercept
        return softmax(davidson_logits(differences.times(self.differences), tie), axis=1)


def fit_davidson(differences: Blocks, shared: Blocks, votes: np.ndarray, ridge: float) -> Davidson:
    """Maximise the likelihood under a Gaussian prior of variance 1 / ridge on every weight.

    `differences`, (N, D), change sign under the swap, `shared`, (N, G), do not; `votes` are (N,)
    int in 0..2, or (N, C) shares of several votes, rows sum to 1. The intercept is free.
    """
    n_differences = differences.width
    votes = np.eye(len(LABELS))[votes] if votes.ndim == 1 else votes

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        w, v, intercept = np.split(weights, [n_differences, len(weights) - 1])
        tie = thread.submit(shared.times, v)
        logits = davidson_logits(differences.times(w), tie.result() + intercept)
        log_probs = log_softmax(logits, axis=1)
        residual = np.exp(log_probs) - votes
        tied = thread.submit(shared.transposed_times, residual[:, TIE])
        gradient_w = differences.transposed_times((residual[:, A_WINS] - residual[:, B_WINS]) / 2)
        gradient = np.concatenate(
            [gradient_w + ridge * w, tied.result() + ridge * v, [residual[:, TIE].sum()]]
        )
        loss = -(log_probs * votes).sum() + ridge / 2 * (w @ w + v @ v)
        return loss / len(votes), gradient / len(votes)

    start = np.zeros(n_differences + shared.width + 1)
    # scipy multiplies sparse matrices without the interpreter's lock, so that both sides of a
    # battle's odds are computed at once.
    with threadpool_limits(1), ThreadPoolExecutor(1) as thread:
        limits: Any = {"maxiter": 200, "ftol": 1e-6, "gtol": 1e-5}
        best = minimize(objective, start, jac=True, method="L-BFGS-B", options=limits)
    w, v, intercept = np.split(best.x, [n_differences, len(best.x) - 1])
    return Davidson(w.astype(np.float32), v.astype(np.float32), float(intercept[0]))


def _tree_inputs(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Style features of the battles and of their mirror images."""
    forward = np.hstack([features.differences, features.shared])
    return forward, np.hstack([-features.differences, features.shared])


def _fit_trees(features: Features, votes: np.ndarray, config: BaselineConfig) -> lgb.Booster:
    # A battle with votes for several classes is a row for each, weighted by its share.
    rows, labels = np.nonzero(votes)
    weights = votes[rows, labels]
    inputs = np.vstack([side[rows] for side in _tree_inputs(features)])
    data = lgb.Dataset(
        inputs,
        np.concatenate([labels, swap_labels(labels)]),
        weight=None if (weights == 1).all() else np.concatenate([weights, weights]),
    )
    settings = _TREES | {"learning_rate": config.learning_rate, "seed": config.seed}
    n_rounds = max(min(config.n_trees, len(votes) // _BATTLES_PER_TREE), 1)
    return lgb.train(settings, data, num_boost_round=n_rounds)


@dataclass(frozen=True)
class Ensemble:
    """The members, fitted to the same battles."""

    units: Units
    linear: dict[str, Davidson]
    trees: lgb.Booster

    def predict(self, features: Features) -> dict[str, np.ndarray]:
        """Predict with each member: name -> (N, C) float64, symmetric under the swap."""
        probs = {}
        for name, model in self.linear.items():
            probs[name] = model.predict(*linear_inputs(features, self.units, LINEAR_MEMBERS[name]))
        both = [self.trees.predict(inputs, num_threads=1) for inputs in _tree_inputs(features)]
        return probs | {"trees": average_over_swap(*both)}


def fit_ensemble(features: Features, votes: np.ndarray, config: BaselineConfig) -> Ensemble:
    """Fit every member to N battles with (N, C) votes or shares of votes, rows sum to 1."""
    units = measure_units(features)
    linear = {}
    for name, prior in LINEAR_MEMBERS.items():
        inputs = linear_inputs(features, units, prior)
        linear[name] = fit_davidson(*inputs, votes, config.ridge)
    return Ensemble(units, linear, _fit_trees(features, votes, config))


@dataclass(frozen=True)
class Baseline:
    """The fitted CPU baseline: its members and their blend."""

    config: BaselineConfig
    ensemble: Ensemble
    blend: Blend

    def predict_probs(self, pairs: pd.DataFrame, n_at_once: int = 4096) -> np.ndarray:
        """Predict how people vote on N battles, `n_at_once` at a time to limit memory: (N, C).

        Exchanging A and B exchanges their columns to 1e-12.
        """
        check_pairs(pairs)
        probs = [np.empty((0, len(LABELS)))]
        starts = range(0, len(pairs), n_at_once)
        for start in tqdm(starts, desc="baseline", unit="chunk", disable=len(starts) < 2):
            features = measure_features(pairs.iloc[start : start + n_at_once], self.config)
            probs.append(apply_blend(self.blend, self.ensemble.predict(features)))
        return np.concatenate(probs)

    def word_weights(self, words: list[str], member: str = "words") -> np.ndarray:
        """Look up in a member the log-odds of A per share of each word: (N,) float64.

        `member` is "words" or "text", which read words.
        """
        columns = _hash_words(self.config.n_hashed).transform(words).tocoo()
        variance = LINEAR_MEMBERS[member].texts["words"]
        scale = np.sqrt(variance) / self.ensemble.units["words"]
        # The columns of words follow those of style.
        weights = self.ensemble.linear[member].differences[len(STYLE_FEATURES) :]
        found = np.zeros(len(words))
        found[columns.row] = weights[columns.col] * scale
        return found

    def style_terms(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """Split what the style member says of N battles into one term per style feature.

        Returns:
            N rows with the index of `pairs`, a float64 column per name of `STYLE_FEATURES`: what
            the difference of the answers adds to the log-odds of A against B. Terms change sign
            when A and B are exchanged. Words and characters have their say in other members.
        """
        style = measure_style(pairs)
        features = Features(style_differences(style)[0], style_shared(style), {})
        inputs, _ = linear_inputs(features, self.ensemble.units, LINEAR_MEMBERS["style"])
        differences, scales = inputs.parts[0]
        weights = self.ensemble.linear["style"].differences * scales
        return pd.DataFrame(differences * weights, pairs.index, list(STYLE_FEATURES))


def cross_fit(
    pairs: pd.DataFrame, config: BaselineConfig, features: Features
) -> dict[str, np.ndarray]:
    """Predict battles (`schema.FROZEN_COLUMNS`), each with members fitted to the other folds.

    Returns member -> (N, C) float64, of the N battles in folds from 0 up: those of a fold below 0
    are only learned from. Raises ValueError for a missing column or a single fold.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    folds = pairs["fold"].to_numpy()
    distinct = np.unique(folds)
    if len(distinct) < 2:
        raise ValueError(f"pairs: expected two folds or more in column fold, got {distinct}")
    votes = vote_shares(pairs)
    probs = {name: np.empty((len(pairs), len(LABELS))) for name in (*LINEAR_MEMBERS, "trees")}
    for fold in tqdm(distinct[distinct >= 0], desc="baseline", unit="fold"):
        held_out = folds == fold
        ensemble = fit_ensemble(features.take(~held_out), votes[~held_out], config)
        for name, predicted in ensemble.predict(features.take(held_out)).items():
            probs[name][held_out] = predicted
    return {name: predicted[folds >= 0] for name, predicted in probs.items()}


def fit_baseline(
    pairs: pd.DataFrame,
    config: BaselineConfig,
    features: Features | None = None,
    members: dict[str, np.ndarray] | None = None,
) -> Baseline:
    """Fit the members to all battles, and their blend to `members` of `cross_fit`."""
    features = measure_features(pairs, config) if features is None else features
    members = cross_fit(pairs, config, features) if members is None else members
    rows, labels = list_votes(pairs[pairs["fold"] >= 0])
    blend = fit_blend({name: probs[rows] for name, probs in members.items()}, labels)
    return Baseline(config, fit_ensemble(features, vote_shares(pairs), config), blend)


def save_baseline(baseline: Baseline, folder: Path) -> None:
    """Write `baseline.json`, `linear.safetensors` and `trees.txt`; reading them runs no code."""
    folder = Path(folder)
    arrays = {f"units.{name}": unit for name, unit in baseline.ensemble.units.items()}
    for name, model in baseline.ensemble.linear.items():
        arrays |= {f"{name}.{part}": np.asarray(value) for part, value in vars(model).items()}
    with atomic_path(folder / "linear.safetensors") as tmp:
        tmp.write_bytes(save(arrays))  # save_file would make it readable by its owner alone
    with atomic_path(folder / "trees.txt") as tmp:
        baseline.ensemble.trees.save_model(tmp)
    content = {"config": baseline.config.to_json(), "blend": baseline.blend.to_json()}
    write_json(folder / "baseline.json", content)


def load_baseline(folder: Path) -> Baseline:
    """Read what `save_baseline` wrote; a missing file is named in a FileNotFoundError."""
    folder = Path(folder)
    content = read_json(folder / "baseline.json")
    members: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_file(folder / "linear.safetensors").items():
        member, part = name.split(".")
        members.setdefault(member, {})[part] = array
    units = members.pop("units")
    linear = {}
    for name in LINEAR_MEMBERS:  # in this order, which the file does not keep
        parts = members[name]
        linear[name] = Davidson(parts["differences"], parts["shared"], float(parts["intercept"]))
    trees = lgb.Booster(model_file=folder / "trees.txt")
    config = BaselineConfig.from_json(content["config"])
    return Baseline(config, Ensemble(units, linear, trees), Blend.from_json(content["blend"]))
