import numpy as np
import pytest

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_classifier
from src.utils.models.predict import BUDGET_COLUMNS, measure_budgets, predict_probs
from src.utils.stats.scores import log_loss

CONFIG = FinetuneConfig(checkpoint="tiny:modernbert", revision="")


@pytest.fixture
def measured(demo_pairs, tiny_base):
    model, tokenizer = load_classifier(CONFIG, tiny_base("modernbert"))
    pairs = demo_pairs[:40].reset_index(drop=True)
    options = {"tokens_per_batch": 2048}
    table = measure_budgets(
        model, tokenizer, pairs, max_tokens=512, budgets=(48, 96, 1024), n_pairs=40, **options
    )

    def loss_at(budget):
        probs = predict_probs(model, tokenizer, pairs, max_tokens=budget, **options)
        return log_loss(probs, pairs["label"].to_numpy())

    return table.set_index("budget", drop=False), loss_at


def test_a_budget_is_scored_as_if_every_battle_had_been_read_at_it(measured):
    table, loss_at = measured
    assert tuple(table.columns) == BUDGET_COLUMNS and table.index.tolist() == [48, 96, 512, 1024]
    for budget in (48, 96, 512):
        assert table.loc[budget, "log_loss"] == pytest.approx(loss_at(budget), abs=1e-6)
        assert table.loc[budget, "cost"] == pytest.approx(loss_at(budget) - loss_at(512), abs=1e-6)
        assert table.loc[budget, "low"] <= table.loc[budget, "cost"] <= table.loc[budget, "high"]
    assert abs(table.loc[48, "cost"]) > 1e-4 and table.loc[512, "cost"] == 0


def test_smaller_budgets_cut_more_and_longer_ones_are_not_read(measured):
    table, _ = measured
    assert table["cut_share"].is_monotonic_decreasing and table["cut_share"].iloc[0] > 0.5
    assert np.isnan(table.loc[1024, ["log_loss", "cost", "low", "high"]].astype(float)).all()
