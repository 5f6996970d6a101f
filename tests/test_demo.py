"""Claims about the arena whose truth is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm

from src.utils.battles.demo import (
    EFFECTS,
    MEASURES,
    make_arena,
    make_battles,
    measure_answer,
    true_probs,
)
from src.utils.battles.readers import load_pairs
from src.utils.schema import LABELS, TIE, check_probs, swap_probs

NO_POSITION = type(EFFECTS)(position=0.0)


def measure_differences(pairs: pd.DataFrame) -> np.ndarray:
    """(N, len(MEASURES)): A less B."""
    rows = zip(pairs["prompt"], pairs["response_a"], pairs["response_b"], strict=True)
    return np.array([measure_answer(p, a) - measure_answer(p, b) for p, a, b in rows])


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = (
        make_arena(tmp_path / name, n_battles=40, n_test=5, seed=3) for name in ("first", "again")
    )
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    other = make_arena(tmp_path / "other", n_battles=40, n_test=5, seed=4)
    assert (other / "train.csv").read_bytes() != (first / "train.csv").read_bytes()


def test_the_truth_is_a_function_of_the_files_text_alone(tmp_path: Path) -> None:
    folder = make_arena(tmp_path, n_battles=60, n_test=5, seed=3)
    pairs, problems = load_pairs(folder / "train.csv")
    truth = (
        pd.read_parquet(folder / "truth.parquet")
        .set_index("id")
        .loc[pairs["id"], list(LABELS)]
        .to_numpy()
    )
    again = [
        true_probs(*row)
        for row in zip(pairs["prompt"], pairs["response_a"], pairs["response_b"], strict=True)
    ]
    np.testing.assert_allclose(truth, again, atol=1e-12)
    check_probs(truth)
    assert problems.empty


def test_without_the_position_bonus_the_truth_is_symmetric(
    ugly_pairs: pd.DataFrame, demo_pairs: pd.DataFrame
) -> None:
    for pairs in (ugly_pairs, demo_pairs.head(50)):
        for prompt, a, b in zip(
            pairs["prompt"], pairs["response_a"], pairs["response_b"], strict=True
        ):
            probs, mirrored = (
                true_probs(prompt, a, b, NO_POSITION),
                true_probs(prompt, b, a, NO_POSITION),
            )
            np.testing.assert_allclose(swap_probs(mirrored[None])[0], probs)


def test_equal_answers_meet_at_davidsons_tie_share() -> None:
    probs = true_probs(("hi",), ("hello there",), ("hello there",), NO_POSITION)
    np.testing.assert_allclose(probs[TIE], EFFECTS.nu / (2 + EFFECTS.nu))


def test_the_planted_effects_are_recovered_from_the_votes() -> None:
    pairs, _ = make_battles(6000, seed=11)
    decided = (pairs["label"] != TIE).to_numpy()
    design = sm.add_constant(measure_differences(pairs)[decided])
    fit = sm.Logit((pairs["label"].to_numpy()[decided] == 0).astype(float), design).fit(disp=0)
    planted = np.array([EFFECTS.position, *(getattr(EFFECTS, name) for name in MEASURES)])
    assert np.abs((fit.params - planted) / fit.bse).max() < 3.5
    assert (np.abs(fit.params / fit.bse)[1:] > 3).all(), "every effect is large enough to be found"


def test_the_oracle_log_loss_is_that_of_the_true_probabilities() -> None:
    pairs, probs = make_battles(6000, seed=11)
    realised = -np.log(probs[np.arange(len(pairs)), pairs["label"]]).mean()
    expected = -(probs * np.log(probs)).sum(axis=1).mean()
    assert abs(realised - expected) < 0.03
    prior = np.bincount(pairs["label"]) / len(pairs)
    assert -(prior * np.log(prior)).sum() - expected > 0.1, "there is something to learn"


def test_the_arena_holds_what_real_ones_hold() -> None:
    pairs, _ = make_battles(3000, seed=5)
    answers = [turn for turns in pairs["response_a"] for turn in turns]
    text = "\n".join(turn for turn in answers if turn)
    assert None in answers
    assert "" in answers
    for piece in ("- ", "## ", "**", "```python", "cannot", "книга", "天气", "كتاب", "\ud83d"):
        assert piece in text, piece
    assert {len(turns) for turns in pairs["prompt"]} == {1, 2, 3}
    assert pairs["prompt"].duplicated().any()
    assert pairs[["model_a", "model_b"]].nunique().min() >= 10
    assert (pairs["model_a"] != pairs["model_b"]).all()


def test_an_empty_test_set_is_written_as_such(tmp_path: Path) -> None:
    folder = make_arena(tmp_path, n_battles=10, n_test=0, seed=3)
    assert len(load_pairs(folder / "test.csv", labelled=False)[0]) == 0
