"""Words that move a vote, and the learning curve of the CPU baseline."""

import numpy as np
import pandas as pd
import pytest

from src.utils.battles import demo
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import BaselineConfig
from src.utils.models import baseline, insight

CONFIG = BaselineConfig(n_hashed=4096, n_trees=5, word_vectors="none")


@pytest.fixture(scope="module")
def fitted():
    pairs = add_groups_and_folds(demo.make_battles(1200, seed=2)[0])
    features = baseline.measure_features(pairs, CONFIG)
    members = baseline.cross_fit(pairs, CONFIG, features)
    return pairs, features, members, baseline.fit_baseline(pairs, CONFIG, features, members)


def test_the_planted_words_move_the_vote_and_the_model_follows(fitted):
    pairs, _, _, model = fitted
    words = insight.word_effects(model, pairs).set_index("word")
    strong = words.loc[words.index.intersection(demo.PHRASES["strong"].split())]
    weak = words.loc[words.index.intersection(demo.PHRASES["weak"].split())]
    assert len(strong) > 10 and len(weak) > 10
    assert (strong["log_odds"] > 0).mean() > 0.9 and (weak["log_odds"] < 0).mean() > 0.9
    assert words["log_odds"].corr(words["weight"]) > 0.5
    clear = words.index[words["p_holm"] < 0.05]
    assert len(clear) and set(clear) <= {*strong.index, *weak.index, *"!,.'"}


def test_words_are_chosen_without_a_look_at_the_votes(fitted):
    pairs, _, _, model = fitted
    shuffled = pairs.assign(label=np.random.default_rng(0).permutation(pairs["label"]))
    words = insight.word_effects(model, shuffled)
    assert words["word"].tolist() == insight.word_effects(model, pairs)["word"].tolist()
    assert (words["p_value"] < 0.05).mean() < 0.12  # chance


def test_the_curve_falls_with_the_battles_and_ends_at_the_baseline(fitted):
    pairs, features, members, _ = fitted
    curve, losses, groups = insight.learning_curve(pairs, CONFIG, features, members, n_sizes=3)
    assert curve["battles"].between(100, 1000).all() and curve["battles"].is_monotonic_increasing
    assert losses.shape == (4, 1200) and len(groups) == 1200
    assert curve["log_loss"].iloc[-1] < curve["log_loss"].iloc[0] - 0.01
    assert ((curve["low"] < curve["log_loss"]) & (curve["log_loss"] < curve["high"])).all()


def test_a_held_out_vote_does_not_change_its_own_loss(fitted):
    pairs, features, members, _ = fitted
    first = insight._score_sizes(pairs, CONFIG, features, members, 0, 1)[0]
    held_out = (pairs["fold"] == 0).to_numpy()
    changed = pairs.assign(label=np.where(held_out, 2, pairs["label"]))
    second = insight._score_sizes(changed, CONFIG, features, members, 0, 1)[0]
    same = pairs["label"].to_numpy()[held_out] == 2
    np.testing.assert_array_equal(first[:, same], second[:, same])


def make_curve(n, level, slope, power, noise=0.02):
    n = np.array(n)
    means = level + slope * n ** -float(power)
    spread = np.random.default_rng(0).normal(scale=noise, size=500)
    losses = means[:, None] + spread - spread.mean()
    return pd.DataFrame({"battles": n, "log_loss": means}), losses, np.arange(500)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_a_power_law_is_extended_to_where_it_goes(power):
    curve, losses, groups = make_curve([100, 200, 400, 800], 0.9, 0.5, power)
    end = insight.extrapolate(curve, losses, groups, target=10_000).iloc[-1]
    truth = 0.9 + 0.5 * 10_000**-power
    assert end["low"] - 0.002 < truth < end["high"] + 0.002
    assert end["gain"] == pytest.approx(curve["log_loss"].iloc[-1] - truth, abs=0.005)


def test_too_few_sizes_are_not_extended_and_the_target_has_a_default():
    curve, losses, groups = make_curve([100, 200, 400], 0.9, 0.5, 0.5)
    assert insight.extrapolate(curve[:2], losses[:2], groups).empty
    end = insight.extrapolate(curve, losses, groups).iloc[-1]
    assert end["battles"] == pytest.approx(insight.COMPETITION_SIZE)
    curve = curve.assign(battles=[10_000, 20_000, 40_000])
    assert insight.extrapolate(curve, losses, groups)["battles"].iloc[-1] == pytest.approx(160_000)
