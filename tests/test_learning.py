"""What the tiny networks learn from votes: a score, and two directions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from torch import nn
from transformers import PreTrainedTokenizerBase

from src.utils.battles.demo import PHRASES, make_battles
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.bases import prepare_base
from src.utils.models.checkpoints import load_finetuned
from src.utils.models.predict import predict_probs
from src.utils.schema import A_WINS, B_WINS, LABELLED_COLUMNS, TIE, probs_of
from src.utils.stats.scores import class_prior, log_loss
from src.utils.training.fit import fit

pytestmark = pytest.mark.slow

SETTINGS = {
    "revision": "",
    "head": "contrast",
    "max_tokens": 256,
    "predict_tokens": 256,
    "tokens_per_batch": 2048,
    "tokens_per_step": 2048,
    "both_orders": False,
    "gradient_checkpointing": False,
    "n_epochs": 1.0,
    "n_evals": 1,
    "refit": False,
    "learning_rate": 1e-3,
}
CONFIGS = {
    "modernbert": FinetuneConfig(checkpoint="tiny:modernbert", **SETTINGS),
    "qwen3": DecoderConfig(checkpoint="tiny:qwen3", lora_alpha=64.0, lora_dropout=0.0, **SETTINGS),
}


@dataclass
class Trained:
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: pd.DataFrame
    heldout: pd.DataFrame
    probs: np.ndarray  # of `heldout`

    def predict(self, pairs: pd.DataFrame) -> np.ndarray:
        return predict_probs(
            self.model, self.tokenizer, pairs, max_tokens=256, tokens_per_batch=2048
        )


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request, tmp_path_factory):
    """A tiny network trained on 4,000 demo battles, with 2,000 others held out."""
    pairs, _ = make_battles(6000, seed=11)
    pairs = add_groups_and_folds(pairs[list(LABELLED_COLUMNS)], n_folds=3, seed=11)
    folder, config = tmp_path_factory.mktemp(request.param), CONFIGS[request.param]
    base = prepare_base(config, pairs, folder / "base", n_steps=300)
    result = fit(pairs, config, folder, base)
    model, tokenizer = load_finetuned(folder / "model" / "fold_0", config, base)
    heldout = pairs.set_index("id").loc[result.oof["id"]].reset_index()
    train = pairs[pairs["fold"] != 0]
    return Trained(model, tokenizer, train, heldout, probs_of(result.oof))


def test_it_is_well_below_the_class_prior(trained):
    labels = trained.heldout["label"].to_numpy()
    assert abs(len(labels) - 2000) < 20
    prior = np.tile(class_prior(trained.train["label"].to_numpy()), (len(labels), 1))
    assert log_loss(trained.probs, labels) < log_loss(prior, labels) - 0.05


def test_a_refusal_lowers_the_odds_of_the_answer(trained):
    sample = trained.heldout[:200]
    refusals = PHRASES["refusals"]
    turns = [(refusals[row % len(refusals)],) for row in range(len(sample))]
    refused = sample.assign(response_a=turns)
    probs = trained.predict(refused)
    before = np.log(trained.probs[:200, A_WINS] / trained.probs[:200, B_WINS])
    odds = np.log(probs[:, A_WINS] / probs[:, B_WINS])
    assert odds.mean() < before.mean() - 0.5
    assert (odds < before).mean() > 0.75


def test_identical_answers_raise_the_tie(trained):
    sample = trained.heldout[:200]
    probs = trained.predict(sample.assign(response_b=sample["response_a"]))
    np.testing.assert_allclose(probs[:, A_WINS], probs[:, B_WINS], atol=1e-4)
    assert probs[:, TIE].mean() > trained.probs[:200, TIE].mean() + 0.02
