import numpy as np

from src.utils.models.template import cut_middle, cut_turns, share_budget


def test_short_fields_stay_whole_and_long_ones_share_equally():
    assert share_budget([10, 100, 300], 110) == [10, 50, 50]
    assert share_budget([10, 20, 30], 60) == [10, 20, 30]
    assert share_budget([10, 20, 30], 1000) == [10, 20, 30]
    assert share_budget([], 5) == []
    assert share_budget([5, 5], 0) == [0, 0]


def test_reordering_fields_reorders_their_parts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, budget = rng.integers(0, 50, 4).tolist(), int(rng.integers(0, 150))
        order = rng.permutation(4)
        shares = share_budget(lengths, budget)
        assert share_budget([lengths[i] for i in order], budget) == [shares[i] for i in order]
        assert sum(shares) <= budget
        assert all(share <= length for share, length in zip(shares, lengths, strict=True))
        # What equal parts leave over is less than one token for each field.
        assert sum(shares) > min(budget, sum(lengths)) - 4


def test_the_middle_is_cut_and_head_and_tail_stay():
    assert cut_middle("abcdefgh", 5, ".") == ["a", "b", ".", "g", "h"]
    assert cut_middle("abcdefgh", 8, ".") == list("abcdefgh")
    assert cut_middle("abcdefgh", 2, ".") == ["a", "b"]
    assert cut_middle("abcdefgh", 3, ".") == ["a", ".", "h"]
    assert cut_middle("abc", 0, ".") == []


def test_last_turns_are_kept_first():
    turns = [list("aaaaaaaaaa"), list("bbbbbbbbbb"), list("cc")]
    assert cut_turns(turns, 12) == turns[1:]
    assert cut_turns(turns, 22) == turns
    assert cut_turns(turns, 2) == [list("cc")]
    assert cut_turns(turns, 13, n_between=1) == turns[1:]
    assert cut_turns(turns, 11, n_between=1) == [list("bbbbbbbb"), list("cc")]


def test_a_field_with_tokens_never_loses_them_all():
    assert cut_turns([list("words"), [], []], 3, n_between=2) == [list("wos")]
    for budget in range(1, 40):
        assert any(cut_turns([list("one" * 20), list("two" * 30), []], budget, "...", 5))


def test_a_text_with_tokens_keeps_some_within_any_budget():
    rng = np.random.default_rng(1)
    for _ in range(300):
        turns = [list("x" * int(n)) for n in rng.integers(0, 60, rng.integers(1, 4))]
        budget = int(rng.integers(1, 100))
        cut = cut_turns(turns, budget, "~", 2)
        assert sum(map(len, cut)) + 2 * (len(cut) - 1) <= budget or not any(cut)
        assert any(turns) == any(cut)
