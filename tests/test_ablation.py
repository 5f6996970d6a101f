"""What each family of features contributes."""

import numpy as np
import pytest

from src.utils.battles.style import STYLE_FEATURES
from src.utils.battles.time_split import PAST
from src.utils.config import BaselineConfig
from src.utils.models.ablation import STYLE_FAMILIES, ablate
from src.utils.models.baseline import cross_fit, measure_features
from src.utils.stats.scores import row_losses

CONFIG = BaselineConfig(n_hashed=4096, n_trees=1, n_bootstrap=50)


@pytest.fixture
def features(demo_pairs):
    return measure_features(demo_pairs, CONFIG)


def test_every_style_feature_is_in_one_family():
    names = " ".join(STYLE_FAMILIES.values()).split()
    assert sorted(names) == sorted(STYLE_FEATURES)


def test_inner_products_give_the_losses_of_the_features(demo_pairs, features):
    table = ablate(demo_pairs, features, CONFIG)
    full = (table["log_loss"] - table["difference"]).to_numpy()
    labels = demo_pairs["label"].to_numpy(dtype=int)
    fitted = row_losses(cross_fit(demo_pairs, CONFIG, features)["text"], labels).mean()
    # `ablate` scales features by all battles, `cross_fit` by those of the other folds.
    assert full == pytest.approx(np.full(len(table), fitted), abs=0.01)


def test_a_decisive_family_is_valuable_and_one_of_noise_is_not(demo_pairs, features):
    sign = demo_pairs["label"].map({0: 1.0, 1: -1.0, 2: 0.0})
    features.differences[:, list(STYLE_FEATURES).index("has_apology")] = sign
    table = ablate(demo_pairs, features, CONFIG)
    assert table["family"].iloc[0] in ("apologies", "style as a whole")
    assert table["low"].iloc[0] > 0.02
    assert table["difference"].is_monotonic_decreasing
    assert table.set_index("family").at["overlap with the prompt", "difference"] < 0.02


def test_large_data_are_reduced_to_the_same_battles_each_time(demo_pairs, features):
    small = ablate(demo_pairs, features, CONFIG, max_pairs=150)
    again = ablate(demo_pairs, features, CONFIG, max_pairs=150)
    assert small.equals(again)
    assert not np.allclose(small["log_loss"], ablate(demo_pairs, features, CONFIG)["log_loss"])


def test_battles_of_the_past_are_learned_from_and_not_scored(demo_pairs, features):
    is_scored = demo_pairs["fold"] == 0
    past = demo_pairs.assign(fold=np.where(is_scored, 0, PAST))
    table = ablate(past, features, CONFIG)
    full = (table["log_loss"] - table["difference"]).to_numpy()
    labels = demo_pairs["label"].to_numpy(dtype=int)[is_scored]
    fitted = row_losses(cross_fit(past, CONFIG, features)["text"], labels).mean()
    assert full == pytest.approx(np.full(len(table), fitted), abs=0.01)
