import numpy as np
import pytest

from src.utils.battles.style import STYLE_FEATURES
from src.utils.config import BaselineConfig
from src.utils.models import ablation
from src.utils.models.ablation import STYLE_FAMILIES, ablate
from src.utils.models.baseline import cross_fit, measure_features
from src.utils.stats.scores import row_losses

CONFIG = BaselineConfig(n_hashed=4096, n_trees=1, n_bootstrap=50)


def test_every_style_feature_is_of_one_family():
    named = [name for names in STYLE_FAMILIES.values() for name in names]
    assert sorted(named) == sorted(STYLE_FEATURES)


def test_inner_products_give_the_losses_of_the_features(demo_pairs):
    features = measure_features(demo_pairs, CONFIG)
    table = ablate(demo_pairs, features, CONFIG)
    whole = (table["log_loss"] - table["difference"]).to_numpy()
    labels = demo_pairs["label"].to_numpy(dtype=int)
    fitted = row_losses(cross_fit(demo_pairs, CONFIG, features)["text"], labels).mean()
    # The units are taken from all battles here, from the fitted ones there.
    assert whole == pytest.approx(np.full(len(table), fitted), abs=0.01)


def test_a_family_that_decides_is_dear_and_one_of_noise_is_not(demo_pairs):
    features = measure_features(demo_pairs, CONFIG)
    sign = np.where(demo_pairs["label"] == 0, 1.0, np.where(demo_pairs["label"] == 1, -1.0, 0.0))
    features.differences[:, list(STYLE_FEATURES).index("has_apology")] = sign
    table = ablate(demo_pairs, features, CONFIG)
    assert (
        table["family"].iloc[0] in ("apologies", "style as a whole") and table["low"].iloc[0] > 0.02
    )
    assert table["difference"].is_monotonic_decreasing
    assert table.set_index("family").loc["overlap with the prompt", "difference"] < 0.02


def test_whole_groups_are_drawn():
    groups = np.repeat(np.arange(50), 4)
    rows = ablation._draw_groups(groups, 60, seed=0)
    assert len(rows) == 60 and all(np.isin(groups, groups[rows]) == np.isin(np.arange(200), rows))
