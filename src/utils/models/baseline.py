"""The CPU baseline: linear models and boosted trees on style, words and characters, blended.

Members see the same battles differently and are blended on held-out rows:

    style   counts of `style.py`: length, markdown, refusals, overlap with the prompt …
    words   style, and the share of each word among an answer's words
    text    all of these, characters, how the answers open and end, and what they mean; how
            unlike the answers are in this speaks for or against a tie
    trees   gradient boosting on style and likeness, for thresholds and interactions

`features.py` says what is read. All but the trees are one model, Bradley-Terry with Davidson's
ties: with d the features that change sign when A and B are exchanged, and s those that do not,

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
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from src.utils.battles.style import STYLE_FEATURES, measure_style, style_differences
from src.utils.config import BaselineConfig
from src.utils.models.features import Features, hash_words, measure_features
from src.utils.models.word_vectors import WordVectors, fetch_vectors, load_vectors
from src.utils.runs import atomic_path, read_json, write_json
from src.utils.schema import (
    A_WINS,
    B_WINS,
    FROZEN_COLUMNS,
    LABELS,
    TIE,
    average_over_swap,
    check_pairs,
    list_votes,
    swap_labels,
    vote_shares,
)
from src.utils.stats.blend import Blend, apply_blend, fit_blend
from src.utils.stats.ranking import davidson_logits


@dataclass(frozen=True)
class Prior:
    """Which blocks of features a linear member reads, and the prior variance of each.

    A variance is that of the block's contribution to a typical battle, in squared logits: to the
    log-odds of A against B, or to the log-odds of a tie. Blocks that nobody measured are left out.
    """

    signed: dict[str, float]  # for A against B
    unsigned: dict[str, float]  # for a tie
    unlike: dict[str, float] = field(default_factory=dict)  # for a tie: absolute values of signed
    own: dict[str, float] = field(default_factory=dict)  # of single style features


# People mind an apology wherever they vote, so its weight is not shrunk with the others.
_APOLOGY = {"has_apology": 0.05}
# Chosen by repeated grouped cross-validation, see notebooks/LOG.md.
LINEAR_MEMBERS = {
    "style": Prior({"style": 0.4}, {"shared": 0.3}, own=_APOLOGY),
    "words": Prior({"style": 0.4, "words": 1.0}, {"shared": 0.3}, own=_APOLOGY),
    "text": Prior(
        signed={
            "style": 0.04,
            "words": 0.5,
            "characters": 1.0,
            "opening": 0.4,
            "ending": 0.4,
            "meaning": 0.3,
            "beginning": 0.25,
            "relevance": 0.02,
        },
        unsigned={"shared": 0.1, "likeness": 0.12},
        unlike={"signs": 0.2, "opening": 0.3, "ending": 0.25},
    ),
}
_MAX_DEVIATION = 4.0  # standardised features are cut here: one odd answer must not decide a fit
_BATTLES_PER_TREE = 15  # with fewer battles per round, the trees overfit
_TREE_BLOCKS = ("style", "relevance")
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


Units = dict[str, np.ndarray]


def measure_units(features: Features) -> Units:
    """Measure the scale of training features; none of it changes under the swap.

    Returns:
        For each block, by name: of each signed column the root mean square, (width,); of each
        unsigned one mean and standard deviation, (2, width); the root mean square length of a
        text's rows, (). A scale is 1 where a feature never varies.
    """
    units = {}
    for name, block in features.signed.items():
        units[name] = _or_one(np.sqrt((block**2).mean(axis=0, dtype=np.float64)))
    for name, block in features.unsigned.items():
        units[name] = np.stack([block.mean(axis=0), _or_one(block.std(axis=0))])
    for name, text in features.texts.items():
        units[name] = _or_one(np.sqrt(np.vdot(text.data, text.data) / max(text.shape[0], 1)))
    return units


def _or_one(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 1e-9, scale, 1.0)


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
    signed: list = []
    for name, variance in prior.signed.items():
        if name in features.texts:
            scale = np.float32(np.sqrt(variance) / units[name])
            signed.append((features.texts[name], scale))
        elif name in features.signed:
            scales = _share(variance, features.signed[name].shape[1])
            if name == "style":
                own = np.array([prior.own.get(feature, 0.0) for feature in STYLE_FEATURES])
                scales = np.where(own, np.sqrt(own), scales)
            signed.append((_standardise(features.signed[name], 0, units[name]), scales))
    unsigned: list = []
    for name, variance in prior.unsigned.items():
        if name in features.unsigned:
            mean, std = units[name]
            scales = _share(variance, len(mean))
            unsigned.append((_standardise(features.unsigned[name], mean, std), scales))
    for name, variance in prior.unlike.items():
        text = features.texts[name]
        # abs(text) would copy the positions of the entries as well.
        positive = (np.abs(text.data), text.indices, text.indptr)
        scale = np.float32(np.sqrt(variance) / units[name])
        unsigned.append((sparse.csr_matrix(positive, shape=text.shape), scale))
    return Blocks(signed), Blocks(unsigned)


def _share(variance: float, width: int) -> np.ndarray:
    return np.full(width, np.sqrt(variance / width))


def _standardise(block: np.ndarray, mean: np.ndarray | int, scale: np.ndarray) -> np.ndarray:
    """Cut off what is odd; in the block's own precision, since some are large."""
    standardised = ((block - mean) / scale).astype(block.dtype)
    return np.clip(standardised, -_MAX_DEVIATION, _MAX_DEVIATION, out=standardised)


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
    """What the trees read of the battles and of their mirror images."""
    signed = np.hstack([features.signed[n] for n in _TREE_BLOCKS if n in features.signed])
    unsigned = np.hstack([*features.unsigned.values()])
    return np.hstack([signed, unsigned]), np.hstack([-signed, unsigned])


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
    vectors: WordVectors | None = None  # those that it was fitted with, if any

    def predict_probs(self, pairs: pd.DataFrame, n_at_once: int = 4096) -> np.ndarray:
        """Predict how people vote on N battles, `n_at_once` at a time to limit memory: (N, C).

        Exchanging A and B exchanges their columns to 1e-12.
        """
        check_pairs(pairs)
        probs = [np.empty((0, len(LABELS)))]
        starts = range(0, len(pairs), n_at_once)
        for start in tqdm(starts, desc="baseline", unit="chunk", disable=len(starts) < 2):
            features = measure_features(
                pairs.iloc[start : start + n_at_once], self.config, self.vectors
            )
            probs.append(apply_blend(self.blend, self.ensemble.predict(features)))
        return np.concatenate(probs)

    def word_weights(self, words: list[str], member: str = "words") -> np.ndarray:
        """Look up in a member the log-odds of A per share of each word: (N,) float64.

        `member` is "words" or "text", which read words.
        """
        columns = hash_words(self.config.n_hashed).transform(words).tocoo()
        signed = LINEAR_MEMBERS[member].signed
        scale = np.sqrt(signed["words"]) / self.ensemble.units["words"]
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
        features = Features({"style": style_differences(measure_style(pairs))[0]}, {}, {})
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
    ensemble = fit_ensemble(features, vote_shares(pairs), config)
    return Baseline(config, ensemble, blend, fetch_vectors(config.word_vectors))


def save_baseline(baseline: Baseline, folder: Path) -> None:
    """Write `baseline.json`, `linear.safetensors`, `trees.txt`; reading them runs no code.

    With word vectors, `vectors.safetensors` and `tokenizer.json` as well.
    """
    folder = Path(folder)
    if baseline.vectors is not None:
        baseline.vectors.save(folder)
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
    """Read what `save_baseline` wrote; a missing file is named in a FileNotFoundError.

    Raises ValueError for a model of another version, whose members read other features.
    """
    folder = Path(folder)
    content = read_json(folder / "baseline.json")
    members: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_file(folder / "linear.safetensors").items():
        member, part = name.split(".")
        members.setdefault(member, {})[part] = array
    # The first version of all had no word vectors.
    config = BaselineConfig.from_json({"word_vectors": "none"} | content["config"])
    vectors = None if config.word_vectors == "none" else load_vectors(folder)
    units = members.pop("units")
    _check_version(folder, units, config, vectors)
    linear = {}
    for name in LINEAR_MEMBERS:  # in this order, which the file does not keep
        parts = members[name]
        linear[name] = Davidson(parts["differences"], parts["shared"], float(parts["intercept"]))
    trees = lgb.Booster(model_file=folder / "trees.txt")
    ensemble = Ensemble(units, linear, trees)
    return Baseline(config, ensemble, Blend.from_json(content["blend"]), vectors)


def _check_version(
    folder: Path, units: Units, config: BaselineConfig, vectors: WordVectors | None
) -> None:
    """Raise ValueError unless the features that are measured now are those of the model."""
    battle = pd.DataFrame({"prompt": [("",)], "response_a": [("",)], "response_b": [("",)]})
    now = measure_units(measure_features(battle, config, vectors))
    shapes = [{(name, unit.shape) for name, unit in each.items()} for each in (now, units)]
    if odd := shapes[0] ^ shapes[1]:
        names = ", ".join(sorted({name for name, _ in odd}))
        raise ValueError(
            f"{folder}: expected a CPU baseline of this version, found one that reads other "
            f"features ({names}). Train it again: `make run NB=02`."
        )
