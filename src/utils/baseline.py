"""The floor: a model for two CPU cores that every neural score stands beside.

Four members see the same battles differently and are blended on held-out rows:

    style       counts of `style.py`: length, markdown, refusals, overlap with the prompt …
    words       style, and the share of each word among an answer's words
    characters  style, and which runs of two to four bytes an answer holds
    trees       gradient boosting on style, for thresholds and interactions

The first three are one model, Bradley-Terry with Davidson's ties: with d the features
that change sign when A and B are exchanged, and s those that do not,

    p_A : p_B : p_tie = exp(w·d / 2) : exp(-w·d / 2) : exp(v·s + b)

so exchanging the answers exchanges the two columns, whatever w and v are. The trees
learn from both orders of every battle and predict the mean of both.

Source: Davidson 1970, JASA 65(329):317-328, doi:10.1080/01621459.1970.10481082.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

from src.utils.artifacts import atomic_path, read_json, write_json
from src.utils.config import BaselineConfig
from src.utils.metrics import Blend, apply_blend, fit_blend
from src.utils.mirror import average_over_swap, swap_labels
from src.utils.schema import A_WINS, B_WINS, FROZEN_COLUMNS, LABELS, TIE, Turns, check_pairs, probs_table
from src.utils.style import STYLE_FEATURES, measure_style, style_differences, style_shared

LINEAR_MEMBERS = {"style": (), "words": ("words",), "characters": ("characters",)}  # member -> its text blocks
MEMBERS = (*LINEAR_MEMBERS, "trees")

_N_GRAMS = (2, 3, 4)  # bytes
_SALT = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: Fibonacci hashing, Knuth volume 3, 6.4
_MEANS = ("mean_n_chars", "mean_is_refusal", "mean_n_list_items")
_CHUNK = 4096  # battles whose predictions are made at once, bounds memory
_MAX_DEVIATION = 4.0  # standardised features are cut here: one odd answer must not decide a fit
# Prior variance, in squared logits, of what style and what each text block may add to
# the log-odds of A against B in a typical battle; chosen by repeated grouped
# cross-validation, see notebooks/LOG.md.
_STYLE_VARIANCE, _TEXT_VARIANCE, _TIE_VARIANCE = 0.4, 1.0, 0.3
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
    texts: dict[str, sparse.csr_matrix]  # block -> (N, n_hashed) float32, changes sign under the swap

    def __len__(self) -> int:
        return len(self.differences)

    def take(self, rows: np.ndarray) -> "Features":
        """Choose rows, by mask or position."""
        return Features(
            self.differences[rows], self.shared[rows], {name: block[rows] for name, block in self.texts.items()}
        )

    def swap(self) -> "Features":
        """The same battles with A and B exchanged."""
        return Features(-self.differences, self.shared, {name: -block for name, block in self.texts.items()})


def measure_features(pairs: pd.DataFrame, config: BaselineConfig) -> Features:
    """Read battles once for all members.

    Args:
        pairs: N battles with `prompt`, `response_a`, `response_b` as tuples of turns.
        config: `n_hashed` is the width of each text block.
    """
    style = measure_style(pairs)
    answers = [[_join(turns) for turns in pairs[name]] for name in ("response_a", "response_b")]
    words = HashingVectorizer(
        n_features=config.n_hashed, token_pattern=r"\w+|[^\w\s]", alternate_sign=False, norm="l1", dtype=np.float32
    )
    word_shares = [words.transform(texts) for texts in answers]
    runs = [_hash_runs(texts, config.n_hashed) for texts in answers]
    texts = {"words": word_shares[0] - word_shares[1], "characters": runs[0] - runs[1]}
    return Features(style_differences(style)[0], _choose_shared(style), {k: v.tocsr() for k, v in texts.items()})


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
    return sparse.csr_matrix((np.ones(ends[-1], dtype=np.float32), indices, ends), shape=(len(texts), n_hashed))


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

    differences: np.ndarray  # (F,) root mean square; no mean is taken off, so that the sign still flips
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
            {
                k: float(_positive(np.sqrt(block.multiply(block).sum() / len(features))))
                for k, block in features.texts.items()
            },
        )

    def differences_of(self, features: Features, blocks: tuple[str, ...]) -> sparse.csr_matrix:
        """Style and the chosen text blocks side by side, a typical row of each of its prior variance."""
        style = np.clip(features.differences / self.differences, -_MAX_DEVIATION, _MAX_DEVIATION)
        parts = [sparse.csr_matrix(style * np.sqrt(_STYLE_VARIANCE / style.shape[1]))]
        parts += [features.texts[name] * np.float32(np.sqrt(_TEXT_VARIANCE) / self.texts[name]) for name in blocks]
        return sparse.hstack(parts, format="csr", dtype=np.float32)

    def shared_of(self, features: Features) -> np.ndarray:
        """The shared features standardised, a typical row of prior variance `_TIE_VARIANCE`."""
        shared = np.clip((features.shared - self.shared_mean) / self.shared_std, -_MAX_DEVIATION, _MAX_DEVIATION)
        return shared * np.sqrt(_TIE_VARIANCE / shared.shape[1])


def _positive(values: np.ndarray) -> np.ndarray:
    """Replace zeros by one: a feature that never varies is left at zero, not divided by it."""
    return np.where(values > 1e-9, values, 1.0)


@dataclass(frozen=True)
class Davidson:
    """Bradley-Terry with ties as a linear model of features; see the top of this file."""

    differences: np.ndarray  # w, (D,) float32
    shared: np.ndarray  # v, (G,) float64
    intercept: float  # b

    def predict(self, differences: sparse.csr_matrix, shared: np.ndarray) -> np.ndarray:
        """Probabilities: (N, D) and (N, G) -> (N, C)."""
        return _davidson(differences @ self.differences, shared @ self.shared + self.intercept)


def _davidson(utility: np.ndarray, tie: np.ndarray) -> np.ndarray:
    logits = np.empty((len(utility), len(LABELS)))
    logits[:, A_WINS], logits[:, B_WINS], logits[:, TIE] = utility / 2, -utility / 2, tie
    return softmax(logits, axis=1)


def fit_davidson(differences: sparse.csr_matrix, shared: np.ndarray, labels: np.ndarray, ridge: float) -> Davidson:
    """Maximise the likelihood under a Gaussian prior of variance 1 / ridge on every weight.

    Args:
        differences: (N, D) float, changes sign under the swap.
        shared: (N, G) float, stays under the swap.
        labels: (N,) int in 0..2.
        ridge: precision of the prior; the intercept is free.

    Returns:
        The model; the problem is convex, so the answer does not depend on where the search began.
    """
    n_differences, transposed = differences.shape[1], differences.T.tocsr()
    votes = np.eye(len(LABELS))[labels]

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        w, v = weights[:n_differences], weights[n_differences:-1]
        probs = _davidson(differences @ w, shared @ v + weights[-1])
        residual = probs - votes
        gradient = np.concatenate(
            [
                transposed @ ((residual[:, A_WINS] - residual[:, B_WINS]) / 2) + ridge * w,
                shared.T @ residual[:, TIE] + ridge * v,
                [residual[:, TIE].sum()],
            ]
        )
        loss = -np.log((probs * votes).sum(axis=1)).sum() + ridge / 2 * (w @ w + v @ v)
        return loss / len(labels), gradient / len(labels)

    start = np.zeros(n_differences + shared.shape[1] + 1)
    options = {"maxiter": 200, "ftol": 1e-8, "gtol": 1e-5}
    with threadpool_limits(1):
        best = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return Davidson(best.x[:n_differences].astype(np.float32), best.x[n_differences:-1], float(best.x[-1]))


def _tree_inputs(features: Features) -> np.ndarray:
    return np.hstack([features.differences, features.shared])


def _fit_trees(features: Features, labels: np.ndarray, config: BaselineConfig) -> lgb.Booster:
    inputs = np.vstack([_tree_inputs(features), _tree_inputs(features.swap())])
    votes = np.concatenate([labels, swap_labels(labels)])
    settings = _TREES | {"learning_rate": config.learning_rate, "seed": config.seed}
    n_rounds = max(min(config.n_trees, len(labels) // _BATTLES_PER_TREE), 1)
    return lgb.train(settings, lgb.Dataset(inputs, votes), num_boost_round=n_rounds)


@dataclass(frozen=True)
class Ensemble:
    """The four members, fitted to the same rows."""

    scaling: Scaling
    linear: dict[str, Davidson]
    trees: lgb.Booster

    def predict(self, features: Features) -> dict[str, np.ndarray]:
        """Probabilities by member: name -> (N, C) float64, each swap-symmetric."""
        shared = self.scaling.shared_of(features)
        probs = {
            name: model.predict(self.scaling.differences_of(features, LINEAR_MEMBERS[name]), shared)
            for name, model in self.linear.items()
        }
        both = [self.trees.predict(_tree_inputs(order), num_threads=1) for order in (features, features.swap())]
        return probs | {"trees": average_over_swap(*both)}


def fit_ensemble(features: Features, labels: np.ndarray, config: BaselineConfig) -> Ensemble:
    """Fit every member to the same battles.

    Args:
        features: of N battles.
        labels: (N,) int in 0..2.
        config: settings.
    """
    scaling = Scaling.of(features)
    shared = scaling.shared_of(features)
    linear = {
        name: fit_davidson(scaling.differences_of(features, blocks), shared, labels, config.ridge)
        for name, blocks in LINEAR_MEMBERS.items()
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
        parts = [pairs.iloc[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
        probs = [
            apply_blend(self.blend, self.ensemble.predict(measure_features(part, self.config)))
            for part in tqdm(parts, desc="baseline", unit="chunk", disable=len(parts) < 2)
        ]
        return np.concatenate([np.empty((0, len(LABELS))), *probs])

    def style_effects(self) -> pd.DataFrame:
        """What each style feature is worth to the style member.

        Returns:
            One row a feature: name, caption, effect in log-odds of A against B when A has one
            standard deviation more of it, all else equal; largest first.
        """
        scale = np.sqrt(_STYLE_VARIANCE / len(STYLE_FEATURES))
        captions = [feature.caption for feature in STYLE_FEATURES.values()]
        effects = self.ensemble.linear["style"].differences * scale
        table = pd.DataFrame({"name": list(STYLE_FEATURES), "caption": captions, "effect": effects})
        return table.sort_values("effect", key=np.abs, ascending=False, ignore_index=True)


def cross_fit(pairs: pd.DataFrame, config: BaselineConfig, features: Features | None = None) -> dict[str, np.ndarray]:
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
    labels, probs = pairs["label"].to_numpy(dtype=int), {name: np.empty((len(pairs), len(LABELS))) for name in MEMBERS}
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
        blend = fit_blend({name: probs[~held_out] for name, probs in members.items()}, labels[~held_out])
        blended[held_out] = apply_blend(blend, {name: probs[held_out] for name, probs in members.items()})
    return blended


def _held_out(pairs: pd.DataFrame) -> Iterator[np.ndarray]:
    folds = np.unique(pairs["fold"])
    if len(folds) < 2:
        raise ValueError(f"pairs: expected at least two values in column fold, got {folds.tolist()}")
    return (pairs["fold"].to_numpy() == fold for fold in folds)


def cross_validate(pairs: pd.DataFrame, config: BaselineConfig, features: Features | None = None) -> pd.DataFrame:
    """Predict every battle by members and a blend that were fitted to the other folds.

    Args:
        pairs: N battles, `schema.FROZEN_COLUMNS`; battles of one `group` share a fold.
        config: settings.
        features: of `pairs`, where already measured.

    Returns:
        A table: id, fold, one float32 column per label.
    """
    return probs_table(
        pairs["id"], blend_folds(pairs, cross_fit(pairs, config, features)), fold=pairs["fold"].to_numpy()
    )


def fit_baseline(
    pairs: pd.DataFrame,
    config: BaselineConfig,
    features: Features | None = None,
    members: dict[str, np.ndarray] | None = None,
) -> Baseline:
    """Fit the floor to all battles; its blend to predictions on held-out folds.

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
    arrays = {f"scaling.{name}": getattr(scaling, name) for name in ("differences", "shared_mean", "shared_std")}
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

    Raises:
        FileNotFoundError: a file is missing; it is named.
    """
    folder = Path(folder)
    content, arrays = read_json(folder / "baseline.json"), load_file(folder / "linear.safetensors")
    scaling = Scaling(
        **{name: arrays[f"scaling.{name}"] for name in ("differences", "shared_mean", "shared_std")},
        texts=content["text_scales"],
    )
    linear = {
        name: Davidson(arrays[f"{name}.differences"], arrays[f"{name}.shared"], intercept)
        for name, intercept in content["intercepts"].items()
    }
    trees = lgb.Booster(model_file=folder / "trees.txt")
    ensemble = Ensemble(scaling, linear, trees)
    return Baseline(BaselineConfig.from_json(content["config"]), ensemble, Blend.from_json(content["blend"]))
