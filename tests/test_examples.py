import dataclasses

import numpy as np
import pytest

from src.utils.config import FinetuneConfig
from src.utils.examples import make_targets, plan_batches
from src.utils.schema import probs_table

BY_TURNS = FinetuneConfig(max_tokens=96, predict_tokens=96, tokens_per_batch=512, n_epochs=2.0, both_orders=False)


def test_every_epoch_has_every_battle_once_and_the_next_has_it_mirrored():
    lengths = np.random.default_rng(0).integers(5, 90, 101)
    plan = plan_batches(lengths, BY_TURNS)
    items = np.concatenate(plan)
    assert len(items) == 202
    first, second = items[:101], items[101:]
    assert sorted(first // 2) == sorted(second // 2) == list(range(101))
    order = {item // 2: item % 2 for item in first}
    assert all(item % 2 == 1 - order[item // 2] for item in second)
    assert 30 < sum(order.values()) < 70


def test_both_orders_of_a_battle_stand_side_by_side_within_the_budget():
    lengths = np.random.default_rng(0).integers(5, 97, 101)
    plan = plan_batches(lengths, dataclasses.replace(BY_TURNS, both_orders=True, n_epochs=1.0))
    assert sorted(np.concatenate(plan)) == list(range(202))
    for batch in plan:
        items = np.array(batch)
        assert (items[0::2] ^ 1 == items[1::2]).all()
        assert len(items) * lengths[items // 2].max() <= 512


def test_a_packed_plan_spends_its_budget_on_real_tokens():
    lengths = np.random.default_rng(0).integers(5, 97, 101)
    config = dataclasses.replace(BY_TURNS, both_orders=True, n_epochs=1.0)
    packed, padded = plan_batches(lengths, config, is_packed=True), plan_batches(lengths, config)
    assert sorted(np.concatenate(packed)) == list(range(202))
    for batch in packed:
        items = np.array(batch)
        assert (items[0::2] ^ 1 == items[1::2]).all()
        assert lengths[items // 2].sum() <= 512
    assert len(packed) < len(padded)


def test_a_fraction_of_an_epoch_takes_that_share_of_its_batches():
    lengths = np.random.default_rng(0).integers(5, 90, 400)
    whole = plan_batches(lengths, dataclasses.replace(BY_TURNS, n_epochs=1.0))
    half = plan_batches(lengths, dataclasses.replace(BY_TURNS, n_epochs=0.5))
    assert half == whole[: len(half)]
    assert abs(len(half) - len(whole) / 2) <= 1


def soft_file(folder, pairs, probs):
    path = folder / "soft_labels.parquet"
    probs_table(pairs["id"], probs).to_parquet(path, index=False)
    return path


def test_targets_are_the_votes_mixed_with_soft_labels_where_there_are_some(demo_pairs, tmp_path):
    pairs, soft = demo_pairs.head(6), np.tile([0.2, 0.3, 0.5], (4, 1))
    votes = np.eye(3)[pairs["label"]]
    config = FinetuneConfig(soft_labels=str(soft_file(tmp_path, pairs.iloc[[3, 2, 1, 0]], soft)), soft_weight=0.25)
    targets = make_targets(pairs, config)
    np.testing.assert_allclose(targets[:4], 0.75 * votes[:4] + 0.25 * soft, atol=1e-6)
    np.testing.assert_array_equal(targets[4:], votes[4:])
    np.testing.assert_array_equal(make_targets(pairs, FinetuneConfig()), votes)


def test_soft_labels_of_other_battles_or_of_no_file_are_refused(demo_pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="WRITE_SOFT_LABELS"):
        make_targets(demo_pairs, FinetuneConfig(soft_labels=str(tmp_path / "none.parquet")))
    path = soft_file(tmp_path, demo_pairs.head(2), np.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="found none"):
        make_targets(demo_pairs.tail(5), FinetuneConfig(soft_labels=str(path)))
