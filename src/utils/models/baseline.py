"""The CPU baseline: a model for two CPU cores that every neural score stands beside.

Members see the same battles differently and are blended on held-out rows:

    style       counts of `style.py`: length, markdown, refusals, overlap with the prompt …
    words       style, and the share of each word among an answer's words
    text        all of these, and which runs of two to four bytes an answer holds; where the
                answers hold different ones also speaks for or against a tie
    trees       gradient boosting on style, for thresholds and interactions
    embeddings  text, and frozen embeddings of prompt and answers; only where a checkpoint is named

All but the trees are one model, Bradley-Terry with Davidson's ties: with d the features
that change sign when A and B are exchanged, and s those that do not,

    p_A : p_B : p_tie = exp(w·d / 2) : exp(-w·d / 2) : exp(v·s + b)

so exchanging the answers exchanges the two columns, whatever w and v are. The trees
learn from both orders of every battle and predict the mean of both.

Source: Davidson 1970, JASA 65(329):317-328, doi:10.1080/01621459.1970.10481082.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.feature_extraction.text import HashingVectorizer
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from src.utils.battles.style import STYLE_FEATURES, measure_style, style_differences, style_shared
from src.utils.config import BaselineConfig
from src.utils.runs import atomic_path, read_json, write_json
from src.utils.schema import (
    A_WINS,
    B_WINS,
    FROZEN_COLUMNS,
    LABELS,
    TIE,
    Turns,
    average_over_swap,
    check_pairs,
    probs_table,
    swap_labels,
)
from src.utils.stats.blend import Blend, apply_blend, fit_blend

Matrix = np.ndarray | sparse.csr_matrix


@dataclass(frozen=True)
class Prior:
    """What a linear member reads, and the prior variance of each part, in squared logits.

    A variance is that of what the part adds to a typical battle: to the log-odds of A
    against B, for `shared` and `tie_texts` to the log-odds of a tie.
    """

    style: float
    shared: float
    texts: dict[str, float] = field(default_factory=dict)  # text block -> variance
    tie_texts: dict[str, float] = field(
        default_factory=dict
    )  # text block, without its signs -> variance


# Chosen by repeated grouped cross-validation, see notebooks/LOG.md.
LINEAR_MEMBERS = {
    "style": Prior(style=0.4, shared=0.3),
    "words": Prior(style=0.4, shared=0.3, texts={"words": 1.0}),
    "text": Prior(
        style=0.05,
        shared=0.15,
        texts={"words": 0.7, "characters": 1.2},
        tie_texts={"characters": 0.8},
    ),
}
EMBEDDER = "embedder"  # folder of the checkpoint of embeddings, where a model carries it
LINEAR_MEMBERS["embeddings"] = Prior(
    style=0.05,
    shared=0.15,
    texts=LINEAR_MEMBERS["text"].texts | {"embeddings": 0.3},
    tie_texts=LINEAR_MEMBERS["text"].tie_texts,
)
# People mind an apology wherever they vote, so it is not held back like the crowd of style features.
_CUE_VARIANCE = {"has_apology": 0.05}

_N_GRAMS = (2, 3, 4)  # bytes
_SALT = np.uint64(
    0x9E3779B97F4A7C15
)  # 2^64 over the golden ratio: Fibonacci hashing, Knuth volume 3, 6.4
_MEANS = ("mean_n_chars", "mean_is_refusal", "mean_n_list_items")
_CHUNK = 4096  # battles whose predictions are made at once, bounds memory
_MAX_DEVIATION = 4.0  # standardised features are cut here: one odd answer must not decide a fit
_BATTLES_PER_TREE = 15  # fewer battles a round are learned by heart
_TREES = {
    "objective": "multiclass",
    "num_class": len(LABELS),
    "num_leaves": 8,
    "min_child_samples": 40,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    # One thread: waiting for each other costs more than it gains on these sizes, and on a
    # busy machine many times more.
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


@dataclass(frozen=True)
class Features:
    """What the members read of N battles, raw."""

    differences: np.ndarray  # (N, F) float64, changes sign under the swap
    shared: np.ndarray  # (N, G) float64, stays under the swap
    texts: dict[str, Matrix]  # block -> (N, its width) float32, changes sign under the swap

    def __len__(self) -> int:
        return len(self.differences)

    @property
    def members(self) -> tuple[str, ...]:
        """The members that find all they read here."""
        linear = [
            name
            for name, prior in LINEAR_MEMBERS.items()
            if prior.texts.keys() <= self.texts.keys()
        ]
        return (*linear, "trees")

    def take(self, rows: np.ndarray) -> "Features":
        """Choose rows, by mask or position."""
        return Features(
            self.differences[rows],
            self.shared[rows],
            {name: block[rows] for name, block in self.texts.items()},
        )

    def swap(self) -> "Features":
        """The same battles with A and B exchanged."""
        return Features(
            -self.differences, self.shared, {name: -block for name, block in self.texts.items()}
        )


def measure_features(
    pairs: pd.DataFrame, config: BaselineConfig, embeddings: np.ndarray | None = None
) -> Features:
    """Read battles once for all members.

    Args:
        pairs: N battles with `prompt`, `response_a`, `response_b` as tuples of turns.
        config: `n_hashed` is the width of each text block.
        embeddings: (N, 3, H) float32 of prompt, answer A and answer B, where there are some.
    """
    style = measure_style(pairs)
    answers = [[_join(turns) for turns in pairs[name]] for name in ("response_a", "response_b")]
    words = HashingVectorizer(
        n_features=config.n_hashed,
        token_pattern=r"\w+|[^\w\s]",
        alternate_sign=False,
        norm="l1",
        dtype=np.float32,
    )
    word_shares = [words.transform(texts) for texts in answers]
    runs = [_hash_runs(texts, config.n_hashed) for texts in answers]
    texts = {
        "words": (word_shares[0] - word_shares[1]).tocsr(),
        "characters": (runs[0] - runs[1]).tocsr(),
    }
    if embeddings is not None:
        texts["embeddings"] = _compare_embeddings(embeddings)
    return Features(style_differences(style)[0], _choose_shared(style), texts)


def _compare_embeddings(embeddings: np.ndarray) -> np.ndarray:
    """The difference of two answers, alone and weighed by the prompt: (N, 2 H) float32."""
    prompt, difference = embeddings[:, 0], embeddings[:, 1] - embeddings[:, 2]
    # The prompt's entries are about one over the root of their number.
    return np.hstack([difference, difference * prompt * np.sqrt(prompt.shape[1])]).astype(
        np.float32
    )


def _choose_shared(style: pd.DataFrame) -> np.ndarray:
    """Leave out most means of the two answers: they add noise to the odds of a tie, no signal."""
    shared, names = style_shared(style)
    return shared[:, [not name.startswith("mean_") or name in _MEANS for name in names]]


def _join(turns: Turns) -> str:
    # Lone surrogates become question marks: the hashing reads UTF-8, which has no room for them.
    return "\n".join(turn or "" for turn in turns).encode("utf-8", "replace").decode("utf-8")


def _hash_runs(texts: list[str], n_hashed: int) -> sparse.csr_matrix:
    """Mark which runs of 2 to 4 bytes each text holds: (N, n_hashed) float32 of 0 and 1."""
    columns = [_hash_text(text, n_hashed) for text in texts]
    ends = np.cumsum([0] + [len(found) for found in columns])
    indices = np.concatenate([*columns, np.empty(0, dtype=np.int32)])
    return sparse.csr_matrix(
        (np.ones(ends[-1], dtype=np.float32), indices, ends), shape=(len(texts), n_hashed)
    )


def _hash_text(text: str, n_hashed: int) -> np.ndarray:
    data = np.frombuffer(f" {text.lower()} ".encode(), dtype=np.uint8).astype(np.uint64)
    hashes = []
    for length in _N_GRAMS:
        codes = np.full(max(len(data) - length + 1, 0), length, dtype=np.uint64)
        for offset in range(length):
            codes = codes << np.uint64(8) | data[offset : offset + len(codes)]
        hashes.append(codes * _SALT >> np.uint64(32))
    return np.unique(np.concatenate(hashes) % np.uint64(n_hashed)).astype(np.int32)


@dataclass(frozen=True)
class Scaling:
    """Units of the features, taken from the training rows: none of them changes under the swap."""

    differences: (
        np.ndarray
    )  # (F,) root mean square; no mean is taken off, so that the sign still flips
    shared_mean: np.ndarray  # (G,)
    shared_std: np.ndarray  # (G,)
    texts: dict[str, float]  # block -> root mean square norm of a row

    @classmethod
    def of(cls, features: Features) -> "Scaling":
        """Measure the units of training rows."""
        return cls(
            _positive(np.sqrt((features.differences**2).mean(axis=0))),
            features.shared.mean(axis=0),
            _positive(features.shared.std(axis=0)),
            {name: _root_mean_square(block) for name, block in features.texts.items()},
        )

    def differences_of(self, features: Features, prior: Prior) -> "Blocks":
        """Style and the text blocks that a member reads, in units of their prior standard deviation."""
        style = np.clip(features.differences / self.differences, -_MAX_DEVIATION, _MAX_DEVIATION)
        parts = [(style, _style_scales(prior))]
        return Blocks((*parts, *self._texts_of(features.texts, prior.texts)))

    def shared_of(self, features: Features, prior: Prior) -> "Blocks":
        """The shared features and the unsigned text blocks that a member reads, in the same units."""
        shared = np.clip(
            (features.shared - self.shared_mean) / self.shared_std, -_MAX_DEVIATION, _MAX_DEVIATION
        )
        unsigned = {name: _drop_signs(features.texts[name]) for name in prior.tie_texts}
        parts = [(shared, np.full(shared.shape[1], np.sqrt(prior.shared / shared.shape[1])))]
        return Blocks((*parts, *self._texts_of(unsigned, prior.tie_texts)))

    def _texts_of(self, texts: dict[str, Matrix], variances: dict[str, float]) -> "list[Block]":
        return [
            (texts[name], np.float32(np.sqrt(v) / self.texts[name]))
            for name, v in variances.items()
        ]


def _style_scales(prior: Prior) -> np.ndarray:
    """The prior standard deviation of each style feature's weight: (F,)."""
    shared_out = prior.style / len(STYLE_FEATURES)
    return np.sqrt([_CUE_VARIANCE.get(name, shared_out) for name in STYLE_FEATURES])


def _drop_signs(block: Matrix) -> Matrix:
    """The absolute values; where sparse, beside the same positions in memory."""
    if not sparse.issparse(block):
        return np.abs(block)
    return sparse.csr_matrix((np.abs(block.data), block.indices, block.indptr), shape=block.shape)


def _root_mean_square(block: Matrix) -> float:
    """Of the length of a row; 1 where there is nothing."""
    entries = (block.data if sparse.issparse(block) else block).ravel()
    return float(_positive(np.sqrt(np.vdot(entries, entries) / max(block.shape[0], 1))))


def _positive(values: np.ndarray) -> np.ndarray:
    """Replace zeros by one: a feature that never varies is left at zero, not divided by it."""
    return np.where(values > 1e-9, values, 1.0)


Block = tuple[Matrix, np.ndarray | np.float32]  # (N, D) and the scale of its columns


@dataclass(frozen=True)
class Blocks:
    """Matrices side by side with the scale of their columns, multiplied without a copy of any."""

    parts: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of all blocks together."""
        return self.parts[0][0].shape[0], sum(block.shape[1] for block, _ in self.parts)

    def times(self, weights: np.ndarray) -> np.ndarray:
        """The blocks times a vector: (D,) -> (N,) float64."""
        total, start = np.zeros(self.shape[0]), 0
        for block, scale in self.parts:
            end = start + block.shape[1]
            # In the block's own precision: scipy would else copy the block to the vector's, each time.
            total += block @ (weights[start:end] * scale).astype(block.dtype)
            start = end
        return total

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """The transposed blocks times a vector: (N,) -> (D,) float64."""
        found = [
            (block.T @ values.astype(block.dtype)).astype(np.float64) * scale
            for block, scale in self.parts
        ]
        return np.concatenate(found)


@dataclass(frozen=True)
class Davidson:
    """Bradley-Terry with ties as a linear model of features; see the top of this file."""

    differences: np.ndarray  # w, (D,) float32
    shared: np.ndarray  # v, (G,) float32
    intercept: float  # b

    def predict(self, differences: Blocks, shared: Blocks) -> np.ndarray:
        """Probabilities: (N, D) and (N, G) -> (N, C)."""
        return _davidson(
            differences.times(self.differences), shared.times(self.shared) + self.intercept
        )


def _davidson(utility: np.ndarray, tie: np.ndarray) -> np.ndarray:
    logits = np.empty((len(utility), len(LABELS)))
    logits[:, A_WINS], logits[:, B_WINS], logits[:, TIE] = utility / 2, -utility / 2, tie
    return softmax(logits, axis=1)


def fit_davidson(differences: Blocks, shared: Blocks, labels: np.ndarray, ridge: float) -> Davidson:
    """Maximise the likelihood under a Gaussian prior of variance 1 / ridge on every weight.

    Args:
        differences: (N, D) float, changes sign under the swap.
        shared: (N, G) float, stays under the swap.
        labels: (N,) int in 0..2.
        ridge: precision of the prior; the intercept is free.

    Returns:
        The model; the problem is convex, so the answer does not depend on where the search began.
    """
    n_differences = differences.shape[1]
    votes = np.eye(len(LABELS))[labels]

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        w, v = weights[:n_differences], weights[n_differences:-1]
        probs = _davidson(differences.times(w), shared.times(v) + weights[-1])
        residual = probs - votes
        gradient = np.concatenate(
            [
                differences.transposed_times((residual[:, A_WINS] - residual[:, B_WINS]) / 2)
                + ridge * w,
                shared.transposed_times(residual[:, TIE]) + ridge * v,
                [residual[:, TIE].sum()],
            ]
        )
        loss = -np.log((probs * votes).sum(axis=1)).sum() + ridge / 2 * (w @ w + v @ v)
        return loss / len(labels), gradient / len(labels)

    start = np.zeros(n_differences + shared.shape[1] + 1)
    options = {"maxiter": 200, "ftol": 1e-6, "gtol": 1e-5}
    with threadpool_limits(1):
        best = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    w, v = best.x[:n_differences].astype(np.float32), best.x[n_differences:-1].astype(np.float32)
    return Davidson(w, v, float(best.x[-1]))


def _tree_inputs(features: Features) -> np.ndarray:
    return np.hstack([features.differences, features.shared])


def _fit_trees(features: Features, labels: np.ndarray, config: BaselineConfig) -> lgb.Booster:
    inputs = np.vstack([_tree_inputs(features), _tree_inputs(features.swap())])
    votes = np.concatenate([labels, swap_labels(labels)])
    settings = _TREES | {"learning_rate": config.learning_rate, "seed": config.seed}
    n_rounds = max(min(config.n_trees, len(labels) // _BATTLES_PER_TREE), 1)
    return lgb.train(settings, lgb.Dataset(inputs, votes), num_boost_round=n_rounds)


def _inputs(scaling: Scaling, features: Features, member: str) -> tuple[Blocks, Blocks]:
    prior = LINEAR_MEMBERS[member]
    return scaling.differences_of(features, prior), scaling.shared_of(features, prior)


@dataclass(frozen=True)
class Ensemble:
    """The members, fitted to the same rows."""

    scaling: Scaling
    linear: dict[str, Davidson]
    trees: lgb.Booster

    def predict(self, features: Features) -> dict[str, np.ndarray]:
        """Probabilities by member: name -> (N, C) float64, each swap-symmetric."""
        probs = {
            name: model.predict(*_inputs(self.scaling, features, name))
            for name, model in self.linear.items()
        }
        both = [
            self.trees.predict(_tree_inputs(order), num_threads=1)
            for order in (features, features.swap())
        ]
        return probs | {"trees": average_over_swap(*both)}


def fit_ensemble(features: Features, labels: np.ndarray, config: BaselineConfig) -> Ensemble:
    """Fit every member to the same battles.

    Args:
        features: of N battles.
        labels: (N,) int in 0..2.
        config: settings.
    """
    scaling = Scaling.of(features)
    linear = {
        name: fit_davidson(*_inputs(scaling, features, name), labels, config.ridge)
        for name in features.members[:-1]
    }
    return Ensemble(scaling, linear, _fit_trees(features, labels, config))


@dataclass(frozen=True)
class Baseline:
    """The fitted floor: members and how they are blended."""

    config: BaselineConfig
    ensemble: Ensemble
    blend: Blend

    def predict_probs(self, pairs: pd.DataFrame) -> np.ndarray:
        """Predict how people vote.

        Args:
            pairs: N battles with `prompt`, `response_a`, `response_b` as tuples of turns.

        Returns:
            (N, C) float64, rows sum to 1, columns in `schema.LABELS` order; exchanging A and
            B exchanges their columns to 1e-12.
        """
        check_pairs(pairs)
        embed = _load_embed(self.config)
        parts = [pairs.iloc[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
        probs = [
            apply_blend(
                self.blend, self.ensemble.predict(measure_features(part, self.config, embed(part)))
            )
            for part in tqdm(parts, desc="baseline", unit="chunk", disable=len(parts) < 2)
        ]
        return np.concatenate([np.empty((0, len(LABELS))), *probs])

    def style_effects(self) -> pd.DataFrame:
        """What each style feature is worth to the style member.

        Returns:
            One row a feature: name, caption, effect in log-odds of A against B when A has one
            standard deviation more of it, all else equal; largest first.
        """
        scale = _style_scales(LINEAR_MEMBERS["style"])
        captions = [feature.caption for feature in STYLE_FEATURES.values()]
        effects = self.ensemble.linear["style"].differences * scale
        table = pd.DataFrame({"name": list(STYLE_FEATURES), "caption": captions, "effect": effects})
        return table.sort_values("effect", key=np.abs, ascending=False, ignore_index=True)


def embed_battles(pairs: pd.DataFrame, config: BaselineConfig, cache: Path) -> np.ndarray | None:
    """Read battles with the frozen checkpoint of the settings; None where they name none.

    Args:
        pairs: N battles.
        config: `embeddings` and `embeddings_tokens` are read.
        cache: folder where embeddings are kept for the next time.

    Returns:
        (N, 3, H) float32 of prompt, answer A and answer B.
    """
    return None


def _load_embed(config: BaselineConfig) -> Callable[[pd.DataFrame], np.ndarray | None]:
    return lambda pairs: None


def cross_fit(
    pairs: pd.DataFrame, config: BaselineConfig, features: Features | None = None
) -> dict[str, np.ndarray]:
    """Predict every battle by members that were fitted to the other folds.

    Args:
        pairs: N battles, `schema.FROZEN_COLUMNS`.
        config: settings.
        features: of `pairs`, where already measured.

    Returns:
        Member -> (N, C) float64; rows sum to 1.

    Raises:
        ValueError: fewer than two folds.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    features = measure_features(pairs, config) if features is None else features
    labels = pairs["label"].to_numpy(dtype=int)
    probs = {name: np.empty((len(pairs), len(LABELS))) for name in features.members}
    for held_out in tqdm(list(_held_out(pairs)), desc="baseline", unit="fold"):
        ensemble = fit_ensemble(features.take(~held_out), labels[~held_out], config)
        for name, predicted in ensemble.predict(features.take(held_out)).items():
            probs[name][held_out] = predicted
    return probs


def blend_folds(pairs: pd.DataFrame, members: dict[str, np.ndarray]) -> np.ndarray:
    """Blend out-of-fold predictions: each fold by a blend that was fitted to the other folds.

    Args:
        pairs: N battles, `schema.FROZEN_COLUMNS`.
        members: from `cross_fit`.

    Returns:
        (N, C) float64, rows sum to 1.
    """
    labels, blended = pairs["label"].to_numpy(dtype=int), np.empty((len(pairs), len(LABELS)))
    for held_out in _held_out(pairs):
        blend = fit_blend(
            {name: probs[~held_out] for name, probs in members.items()}, labels[~held_out]
        )
        blended[held_out] = apply_blend(
            blend, {name: probs[held_out] for name, probs in members.items()}
        )
    return blended


def _held_out(pairs: pd.DataFrame) -> Iterator[np.ndarray]:
    folds = np.unique(pairs["fold"])
    if len(folds) < 2:
        raise ValueError(
            f"pairs: expected at least two values in column fold, got {folds.tolist()}"
        )
    return (pairs["fold"].to_numpy() == fold for fold in folds)


def cross_validate(
    pairs: pd.DataFrame, config: BaselineConfig, features: Features | None = None
) -> pd.DataFrame:
    """Predict every battle by members and a blend that were fitted to the other folds.

    Args:
        pairs: N battles, `schema.FROZEN_COLUMNS`; battles of one `group` share a fold.
        config: settings.
        features: of `pairs`, where already measured.

    Returns:
        A table: id, fold, one float32 column per label.
    """
    return probs_table(
        pairs["id"],
        blend_folds(pairs, cross_fit(pairs, config, features)),
        fold=pairs["fold"].to_numpy(),
    )


def fit_baseline(
    pairs: pd.DataFrame,
    config: BaselineConfig,
    features: Features | None = None,
    members: dict[str, np.ndarray] | None = None,
) -> Baseline:
    """Fit the CPU baseline to all battles; its blend to predictions on held-out folds.

    Args:
        pairs: N battles, `schema.FROZEN_COLUMNS`.
        config: settings.
        features: of `pairs`, where already measured.
        members: from `cross_fit`, where already made.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    features = measure_features(pairs, config) if features is None else features
    members = cross_fit(pairs, config, features) if members is None else members
    labels = pairs["label"].to_numpy(dtype=int)
    return Baseline(config, fit_ensemble(features, labels, config), fit_blend(members, labels))


def save_baseline(baseline: Baseline, folder: Path) -> None:
    """Write `baseline.json`, `linear.safetensors` and `trees.txt`; nothing that runs code when read."""
    folder = Path(folder)
    scaling, linear = baseline.ensemble.scaling, baseline.ensemble.linear
    arrays = {
        f"scaling.{name}": getattr(scaling, name)
        for name in ("differences", "shared_mean", "shared_std")
    }
    for name, model in linear.items():
        arrays |= {f"{name}.differences": model.differences, f"{name}.shared": model.shared}
    with atomic_path(folder / "linear.safetensors") as tmp:
        tmp.write_bytes(save(arrays))  # save_file would leave a file that only its owner can read
    with atomic_path(folder / "trees.txt") as tmp:
        baseline.ensemble.trees.save_model(tmp)
    write_json(
        folder / "baseline.json",
        {
            "config": baseline.config.to_json(),
            "blend": baseline.blend.to_json(),
            "text_scales": scaling.texts,
            "intercepts": {name: model.intercept for name, model in linear.items()},
        },
    )


def load_baseline(folder: Path) -> Baseline:
    """Read what `save_baseline` wrote.

    Where a checkpoint of embeddings lies beside it, in `embedder/`, as in an offline kernel, it is
    used in place of what the settings name.

    Raises:
        FileNotFoundError: a file is missing; it is named.
    """
    folder = Path(folder)
    content, arrays = read_json(folder / "baseline.json"), load_file(folder / "linear.safetensors")
    scaling = Scaling(
        **{
            name: arrays[f"scaling.{name}"] for name in ("differences", "shared_mean", "shared_std")
        },
        texts=content["text_scales"],
    )
    linear = {
        name: Davidson(arrays[f"{name}.differences"], arrays[f"{name}.shared"], intercept)
        for name, intercept in content["intercepts"].items()
    }
    trees = lgb.Booster(model_file=folder / "trees.txt")
    ensemble = Ensemble(scaling, linear, trees)
    config = BaselineConfig.from_json(content["config"])
    return Baseline(config, ensemble, Blend.from_json(content["blend"]))
