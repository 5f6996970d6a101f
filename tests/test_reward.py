"""Claims about scores of single answers: their sign, order and direction."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from src.utils.battles.demo import make_battles
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import BaselineConfig
from src.utils.delivery.publish import publish_model
from src.utils.delivery.reward import choose_best, load_predictor, score_answers
from src.utils.models.baseline import fit_baseline
from src.utils.models.checkpoints import load_classifier, save_model
from src.utils.models.predict import predict_probs
from src.utils.schema import join_turns, probs_table

REFUSAL = "I'm sorry, but I can't help with that."


def prefer_longer(pairs: pd.DataFrame) -> np.ndarray:
    """Stands for a model: the longer answer wins twice as often."""
    a, b = (pairs[name].map(lambda turns: len(turns[0])) for name in ("response_a", "response_b"))
    wins = np.where(a > b, 0.6, np.where(a < b, 0.3, 0.45))
    return np.column_stack([wins, 0.9 - wins, np.full(len(pairs), 0.1)])


def test_a_score_is_the_log_odds_against_the_reference_and_changes_sign_with_it():
    assert score_answers(prefer_longer, "?", ["long"], ["s"]) == pytest.approx(np.log(2))
    assert score_answers(prefer_longer, "?", ["s"], ["long"]) == pytest.approx(-np.log(2))
    mean = score_answers(prefer_longer, "?", ["long"], ["s", "longest"])
    assert mean == pytest.approx(0)


def test_the_best_of_several_is_preferred_to_the_others():
    assert choose_best(prefer_longer, "?", ["a", "abc", "ab"]) == 1


def test_a_refusal_scores_lower_than_an_answer():
    pairs = add_groups_and_folds(make_battles(1000, seed=3)[0], n_folds=3)
    predict = fit_baseline(pairs, BaselineConfig(n_trees=20, word_vectors="none")).predict_probs
    unseen = make_battles(30, seed=4)[0]
    answers = unseen["response_a"].map(join_turns)
    is_answer = ~answers.str.contains("sorry|cannot|can't|unable", case=False)
    prompts = unseen["prompt"].map(join_turns)
    pairs_of_scores = [
        score_answers(predict, prompt, [answer, REFUSAL], ["A plain answer to that."])
        for prompt, answer in zip(prompts[is_answer], answers[is_answer], strict=True)
    ]
    is_higher = [answer > refusal for answer, refusal in pairs_of_scores]
    assert len(is_higher) > 15 and np.mean(is_higher) > 0.8


def test_a_published_model_scores_as_it_predicts(tiny_base, tiny_configs, demo_pairs, tmp_path):
    config = dataclasses.replace(tiny_configs["modernbert"], head="contrast")
    pairs = demo_pairs[:4].reset_index(drop=True)
    model, tokenizer = load_classifier(config, tiny_base("modernbert"))
    torch.nn.init.normal_(model.contrast.weight)
    source = save_model(model, tokenizer, tmp_path / "fold_0")
    expected = predict_probs(
        model, tokenizer, pairs, max_tokens=config.predict_tokens, tokens_per_batch=512
    )
    publish_model(source, config, pairs, probs_table(pairs["id"], expected), tmp_path / "model")
    found = load_predictor(tmp_path / "model")(pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
