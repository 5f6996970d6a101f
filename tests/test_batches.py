import numpy as np
import pytest

from src.utils.models.batches import collate, is_canonical, make_batches, make_packs
from src.utils.schema import swap_pairs


def test_exactly_one_order_of_two_different_answers_is_canonical(ugly_pairs):
    straight, mirrored = is_canonical(ugly_pairs), is_canonical(swap_pairs(ugly_pairs))
    same = (ugly_pairs["response_a"] == ugly_pairs["response_b"]).to_numpy()
    assert (straight ^ mirrored)[~same].all()
    assert (straight & mirrored)[same].all() and same.any()


def test_no_rows_give_no_batches():
    assert make_batches([], 100) == []


@pytest.mark.parametrize("seed", [None, 3])
def test_every_row_is_in_exactly_one_batch_within_the_budget(seed):
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    batches = make_batches(lengths, 1024, seed)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert max(padded) <= 1024
    # Grouping by length is the point: rows in file order would waste about half.
    assert 1 - lengths.sum() / sum(padded) < 0.25


def test_a_row_longer_than_the_budget_goes_alone():
    assert [batch.tolist() for batch in make_batches([10, 99, 10], 20)] == [[1], [0, 2]]


def test_the_shuffle_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 500, 300)
    first, again, later, other = (
        np.concatenate(make_batches(lengths, 1024, *key)).tolist()
        for key in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again
    assert first != later and first != other


def test_padding_is_on_the_right_and_masked():
    batch = collate([[5, 6, 7], [8]], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_packs_hold_every_row_once_and_are_filled_with_real_tokens():
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    packs = make_packs(lengths, 1024, seed=3)
    assert sorted(np.concatenate(packs)) == list(range(1000))
    n_tok = np.array([lengths[pack].sum() for pack in packs])
    assert n_tok.max() <= 1024 and n_tok[:-1].min() > 1024 - 200
    # Rows of all lengths meet, which batches of like length prevent.
    assert np.median([np.ptp(lengths[pack]) for pack in packs]) > 100
    assert [pack.tolist() for pack in make_packs([99], 20, seed=0)] == [[0]] and make_packs(
        [], 20, seed=0
    ) == []


def test_packs_depend_on_seed_and_epoch_alone():
    first, again, later = (
        np.concatenate(make_packs(np.full(50, 10), 100, 1, epoch)).tolist() for epoch in (0, 0, 1)
    )
    assert first == again and first != later
