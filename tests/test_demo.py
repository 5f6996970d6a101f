"""The simulated arena, whose true probabilities are known."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from src.utils.battles.demo import (
    EFFECTS,
    MEASURES,
    make_arena,
    make_battles,
    measure_answer,
    measure_differences,
    true_probs,
)
from src.utils.battles.readers import load_pairs
from src.utils.schema import LABELS, TEXTS, TIE, check_probs, probs_of, swap_probs

NO_POSITION = type(EFFECTS)(position=0.0)


@pytest.fixture(scope="module")
def arena():
    return make_battles(6000, seed=11)


def rows_of(pairs):
    """Prompt, answer A and answer B of every battle."""
    return list(pairs[list(TEXTS)].itertuples(index=False, name=None))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = make_arena(tmp_path / "first", n_battles=40, n_test=5, seed=3)
    again = make_arena(tmp_path / "again", n_battles=40, n_test=5, seed=3)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    other = make_arena(tmp_path / "other", n_battles=40, n_test=5, seed=4)
    assert (other / "train.csv").read_bytes() != (first / "train.csv").read_bytes()


def test_the_truth_depends_on_the_files_text_alone(tmp_path):
    folder = make_arena(tmp_path, n_battles=60, n_test=5, seed=3)
    pairs, problems = load_pairs(folder / "train.csv")
    table = pd.read_parquet(folder / "truth.parquet").set_index("id").loc[pairs["id"]]
    truth = [true_probs(*row) for row in rows_of(pairs)]
    np.testing.assert_allclose(probs_of(table), truth, atol=1e-12)
    assert problems.empty and len(pairs) == 60


def test_without_the_position_bonus_the_truth_is_symmetric(ugly_pairs, demo_pairs):
    for prompt, a, b in rows_of(ugly_pairs) + rows_of(demo_pairs.head(50)):
        probs = true_probs(prompt, a, b, NO_POSITION)
        mirrored = true_probs(prompt, b, a, NO_POSITION)
        np.testing.assert_allclose(swap_probs(mirrored[None])[0], probs)


def test_identical_answers_tie_with_davidsons_probability():
    probs = true_probs(("hi",), ("hello there",), ("hello there",), NO_POSITION)
    np.testing.assert_allclose(probs[TIE], EFFECTS.nu / (2 + EFFECTS.nu))


def test_the_planted_effects_are_recovered_from_the_votes(arena):
    pairs = arena[0][arena[0]["label"] != TIE]
    rows = [measure_answer(p, a) - measure_answer(p, b) for p, a, b in rows_of(pairs)]
    wins = (pairs["label"] == 0).to_numpy(dtype=float)
    fit = sm.Logit(wins, sm.add_constant(np.array(rows))).fit(disp=0)
    planted = np.array([EFFECTS.position, *(getattr(EFFECTS, name) for name in MEASURES)])
    assert np.abs((fit.params - planted) / fit.bse).max() < 3.5
    assert (np.abs(fit.params / fit.bse)[1:] > 3).all(), "an effect is too small to be found"


def test_the_oracle_log_loss_is_the_entropy_of_the_true_probabilities(arena):
    pairs, probs = arena
    check_probs(probs)
    realised = -np.log(probs[np.arange(len(pairs)), pairs["label"]]).mean()
    expected = -(probs * np.log(probs)).sum(axis=1).mean()
    assert abs(realised - expected) < 0.03
    prior = np.bincount(pairs["label"]) / len(pairs)
    assert -(prior * np.log(prior)).sum() - expected > 0.1, "there is nothing to learn"


def test_the_arena_has_what_real_ones_have(arena):
    pairs, _ = arena
    answers = [turn for turns in pairs["response_a"] for turn in turns]
    text = "\n".join(filter(None, answers))
    assert None in answers and "" in answers
    for piece in ("- ", "## ", "**", "```python", "cannot", "книга", "天气", "كتاب", "\ud83d"):
        assert piece in text, piece
    assert set(pairs["prompt"].map(len)) == {1, 2, 3}
    assert pairs["prompt"].duplicated().any()
    assert pairs[["model_a", "model_b"]].nunique().min() >= 10
    assert (pairs["model_a"] != pairs["model_b"]).all()
    battles = [(prompt, frozenset((a, b))) for prompt, a, b in rows_of(pairs)]
    assert 0 < pd.Series(battles).duplicated().sum() < 60
    assert pairs["id"].is_unique


def test_an_arena_may_have_no_test_rows(tmp_path):
    folder = make_arena(tmp_path, n_battles=10, n_test=0, seed=3)
    assert len(load_pairs(folder / "test.csv", labelled=False)[0]) == 0
    assert list(pd.read_csv(folder / "sample_submission.csv").columns) == ["id", *LABELS]


def test_the_differences_of_measures_are_those_of_the_answers():
    pairs, _ = make_battles(5, seed=1)
    table = measure_differences(pairs)
    row = pairs.iloc[3]
    expected = measure_answer(row["prompt"], row["response_a"])
    expected -= measure_answer(row["prompt"], row["response_b"])
    assert list(table) == list(MEASURES) and table.iloc[3].tolist() == expected.tolist()
