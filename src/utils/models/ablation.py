"""What each family of features is worth: the text member fitted again without it.

A linear member needs no more of its features than the inner products of all battles
with each other, one matrix a family. They add up, so leaving a family out is a
subtraction, and a fit takes a twentieth of a second where the features themselves
would take ten times that.
"""

import numpy as np
import pandas as pd
from scipy import sparse

from src.utils.battles.style import STYLE_FEATURES
from src.utils.config import BaselineConfig
from src.utils.models.baseline import LINEAR_MEMBERS, Blocks, Features, Scaling, fit_davidson
from src.utils.schema import FROZEN_COLUMNS, LABELS, check_pairs
from src.utils.stats.scores import paired_difference, row_losses

STYLE_FAMILIES = {
    "length": ("n_chars", "n_words", "n_sentences", "n_lines", "n_turns_empty"),
    "punctuation and words": (
        *("n_punctuation", "n_commas", "punctuation_per_char", "share_digits", "share_uppercase"),
        *("share_non_ascii", "lexical_diversity", "mean_word_length"),
    ),
    "layout": (
        *(
            "n_list_items",
            "n_headers",
            "n_bold",
            "n_code_blocks",
            "n_inline_code",
            "n_table_rows",
            "n_urls",
        ),
    ),
    "tone": ("n_question_marks", "n_exclamation_marks", "n_hedges", "is_refusal", "has_disclaimer"),
    "apologies": ("has_apology",),
    "overlap with the prompt": ("prompt_overlap", "prompt_overlap_first", "prompt_overlap_last"),
}
_MEMBER = "text"
_RANK_TOLERANCE = 1e-7  # of the largest eigenvalue; smaller ones are rounding


def ablate(
    pairs: pd.DataFrame,
    features: Features,
    config: BaselineConfig,
    max_pairs: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit the text member without each family of features in turn, on held-out folds.

    Args:
        pairs: N battles, `schema.FROZEN_COLUMNS`.
        features: of `pairs`.
        config: `ridge`, `n_bootstrap` and `seed` are read.
        max_pairs: battles at most, whole groups drawn at random; time grows with the cube.
        seed: of that draw.

    Returns:
        One row a family, the dearest first: family, of ("A against B" or "tie"), log_loss
        (nats without it), difference to the whole member with its 95 % bounds low and
        high, paired and grouped by prompt. Above 0 the family is worth having.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    rows = _draw_groups(pairs["group"].to_numpy(), max_pairs, seed)
    pairs, features = pairs.iloc[rows], features.take(rows)
    decide, tie = _family_kernels(features)
    labels, folds, groups = (pairs[name].to_numpy() for name in ("label", "fold", "group"))
    roots = _root(sum(decide.values())), _root(sum(tie.values()))
    whole, table = _losses(*roots, labels, folds, config.ridge), []
    for name, left_out in _left_out(decide, tie).items():
        of_tie = left_out <= set(tie)
        part = _root(
            sum(
                kernel for key, kernel in (tie if of_tie else decide).items() if key not in left_out
            )
        )
        losses = _losses(
            *((roots[0], part) if of_tie else (part, roots[1])), labels, folds, config.ridge
        )
        gap = paired_difference(losses, whole, groups, config.n_bootstrap, config.seed)
        table.append((name, "tie" if of_tie else "A against B", losses.mean(), *gap.values()))
    columns = ["family", "of", "log_loss", "difference", "low", "high"]
    return pd.DataFrame(table, columns=columns).sort_values(
        "difference", ascending=False, ignore_index=True
    )


def _draw_groups(groups: np.ndarray, max_pairs: int, seed: int) -> np.ndarray:
    """Positions of whole groups, at most about `max_pairs` battles."""
    codes, distinct = pd.factorize(groups)
    order = np.random.default_rng(seed).permutation(len(distinct))
    n_before = np.cumsum(np.bincount(codes)[order])
    return np.flatnonzero(np.isin(codes, order[n_before <= max(max_pairs, n_before[0])]))


def _family_kernels(features: Features) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inner products by family: for the odds of A against B, and for those of a tie."""
    scaling, prior = Scaling.of(features), LINEAR_MEMBERS[_MEMBER]
    differences, shared = (
        scaling.differences_of(features, prior),
        scaling.shared_of(features, prior),
    )
    (style, scales), names = differences.parts[0], list(STYLE_FEATURES)
    columns = {
        family: [names.index(name) for name in members]
        for family, members in STYLE_FAMILIES.items()
    }
    decide = {family: _kernel(style[:, c], scales[c]) for family, c in columns.items()}
    decide |= {
        name: _kernel(*part) for name, part in zip(prior.texts, differences.parts[1:], strict=True)
    }
    unsigned = {
        f"{name}, unsigned": part
        for name, part in zip(prior.tie_texts, shared.parts[1:], strict=True)
    }
    tie = {"gaps of style, prompt": shared.parts[0], **unsigned}
    return decide, {name: _kernel(*part) for name, part in tie.items()}


def _kernel(block: np.ndarray | sparse.csr_matrix, scale: np.ndarray | np.float32) -> np.ndarray:
    if sparse.issparse(block):
        return (block @ block.T).toarray().astype(np.float64) * float(scale) ** 2
    return (block * scale) @ (block * scale).T


def _left_out(decide: dict[str, np.ndarray], tie: dict[str, np.ndarray]) -> dict[str, set[str]]:
    """What is left out in turn: each family alone, and style as a whole."""
    return {name: {name} for name in (*decide, *tie)} | {"style as a whole": set(STYLE_FAMILIES)}


def _losses(
    differences: np.ndarray, shared: np.ndarray, labels: np.ndarray, folds: np.ndarray, ridge: float
) -> np.ndarray:
    """Row losses of the model that reads these, each fold held out in turn: (N,)."""
    probs = np.empty((len(labels), len(LABELS)))
    for held_out in (folds == fold for fold in np.unique(folds)):
        fit_inputs, held_inputs = (
            [_block(x[rows]) for x in (differences, shared)] for rows in (~held_out, held_out)
        )
        probs[held_out] = fit_davidson(*fit_inputs, labels[~held_out], ridge).predict(*held_inputs)
    return row_losses(probs, labels)


def _root(kernel: np.ndarray) -> np.ndarray:
    """Features that have these inner products: (N, rank)."""
    values, vectors = np.linalg.eigh(kernel)
    kept = values > _RANK_TOLERANCE * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _block(features: np.ndarray) -> Blocks:
    return Blocks(((features, np.ones(features.shape[1])),))
