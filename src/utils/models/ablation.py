"""Measure what each family of features contributes: refit the text member without it.

A linear model needs only the inner products of all battles, one matrix per family. They
add up, so leaving a family out is a subtraction, and a fit takes a twentieth of a second.
"""

import numpy as np
import pandas as pd
from scipy import sparse

from src.utils.battles.style import STYLE_FEATURES
from src.utils.config import BaselineConfig
from src.utils.models import baseline
from src.utils.schema import FROZEN_COLUMNS, LABELS, check_pairs
from src.utils.stats.scores import draw_groups, paired_difference, row_losses

STYLE_FAMILIES = {
    "length": "n_chars n_words n_sentences n_lines n_turns_empty",
    "punctuation and words": "n_punctuation n_commas punctuation_per_char share_digits "
    "share_uppercase share_non_ascii lexical_diversity mean_word_length",
    "layout": "n_list_items n_headers n_bold n_code_blocks n_inline_code n_table_rows n_urls",
    "tone": "n_question_marks n_exclamation_marks n_hedges is_refusal has_disclaimer",
    "apologies": "has_apology",
    "overlap with the prompt": "prompt_overlap prompt_overlap_first prompt_overlap_last",
}
_MEMBER = "text"
_RANK_TOLERANCE = 1e-7  # of the largest eigenvalue; smaller ones are rounding errors

Kernels = dict[str, np.ndarray]


def ablate(
    pairs: pd.DataFrame, features: baseline.Features, config: BaselineConfig, max_pairs: int = 1000
) -> pd.DataFrame:
    """Fit the text member without each family of features in turn, on held-out folds.

    At most `max_pairs` battles are used, in complete groups: time grows with their cube.

    Returns:
        One row per family, the most valuable first: family, of ("A against B" or "tie"),
        log_loss (nats per battle without it), difference to the full member with its 95 %
        interval low and high, paired and grouped by prompt; above 0 the family helps.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    drawn = draw_groups(pairs["group"].to_numpy(), max_pairs, seed=0)
    pairs = pairs.iloc[drawn]
    kernels = _family_kernels(features.take(drawn))
    all_roots = {of: _root(list(families.values())) for of, families in kernels.items()}
    all_losses = _row_losses(all_roots, pairs, config.ridge)
    groups = pairs.loc[pairs["fold"] >= 0, "group"].to_numpy()
    rows = []
    for of, families in kernels.items():
        candidates = {name: {name} for name in families}
        if of == "A against B":
            candidates["style as a whole"] = set(STYLE_FAMILIES)
        for family, left_out in candidates.items():
            root = _root([kernel for name, kernel in families.items() if name not in left_out])
            losses = _row_losses(all_roots | {of: root}, pairs, config.ridge)
            gap = paired_difference(losses, all_losses, groups, config.n_bootstrap, config.seed)
            rows.append((family, of, losses.mean(), gap["mean"], gap["low"], gap["high"]))
    table = pd.DataFrame(rows, columns=["family", "of", "log_loss", "difference", "low", "high"])
    return table.sort_values("difference", ascending=False, ignore_index=True)


def _family_kernels(features: baseline.Features) -> dict[str, Kernels]:
    """Inner products by family: of what decides between A and B, and of what makes a tie."""
    prior = baseline.LINEAR_MEMBERS[_MEMBER]
    units = baseline.measure_units(features)
    signed, unsigned = baseline.linear_inputs(features, units, prior)
    style, scales = signed.parts[0]
    decide = {}
    for family, names in STYLE_FAMILIES.items():
        columns = [list(STYLE_FEATURES).index(name) for name in names.split()]
        decide[family] = _kernel(style[:, columns], scales[columns])
    for name, part in zip(prior.texts, signed.parts[1:], strict=True):
        decide[name] = _kernel(*part)
    tie = {"gaps of style, prompt": _kernel(*unsigned.parts[0])}
    for name, part in zip(prior.tie_texts, unsigned.parts[1:], strict=True):
        tie[f"{name}, unsigned"] = _kernel(*part)
    return {"A against B": decide, "tie": tie}


def _kernel(block: np.ndarray | sparse.csr_matrix, scale: np.ndarray) -> np.ndarray:
    if sparse.issparse(block):
        return (block @ block.T).toarray().astype(np.float64) * float(scale) ** 2
    return (block * scale) @ (block * scale).T


def _root(kernels: list[np.ndarray]) -> np.ndarray:
    """Features with the sum of these inner products: (N, rank)."""
    values, vectors = np.linalg.eigh(sum(kernels))
    kept = values > _RANK_TOLERANCE * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _row_losses(roots: Kernels, pairs: pd.DataFrame, ridge: float) -> np.ndarray:
    """Losses of the model that reads these features, each fold from 0 up held out in turn: nats."""
    labels = pairs["label"].to_numpy(dtype=int)
    probs = np.empty((len(labels), len(LABELS)))
    scored = (pairs["fold"] >= 0).to_numpy()
    for fold in np.unique(pairs["fold"][scored]):
        held_out = (pairs["fold"] == fold).to_numpy()
        signed, unsigned = (_block(root[~held_out]) for root in roots.values())
        model = baseline.fit_davidson(signed, unsigned, labels[~held_out], ridge)
        signed, unsigned = (_block(root[held_out]) for root in roots.values())
        probs[held_out] = model.predict(signed, unsigned)
    return row_losses(probs[scored], labels[scored])


def _block(features: np.ndarray) -> baseline.Blocks:
    return baseline.Blocks([(features, np.array(1.0))])
