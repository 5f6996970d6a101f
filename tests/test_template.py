import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from src.utils.models import template
from src.utils.models.heads import find_answers
from src.utils.models.template import (
    count_tokens,
    cut_middle,
    cut_turns,
    encode_battles,
    encode_pairs,
    make_template,
    share_budget,
)
from src.utils.schema import TEXTS, clean_text, swap_pairs

KINDS = ("modernbert", "qwen3")


@pytest.fixture(params=KINDS)
def tokenizer(request, tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base(request.param))


@pytest.fixture
def encoder(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base("modernbert"))


@pytest.fixture
def decoder(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base("qwen3"))


def battle(prompt=("p",), a=("a",), b=("b",)):
    return pd.DataFrame({"id": [1], "prompt": [prompt], "response_a": [a], "response_b": [b]})


def test_an_encoder_reads_prompt_a_b_between_its_own_special_tokens(encoder):
    (row,) = encode_pairs(battle(("who?",), ("me",), ("you",)), encoder, 64)
    assert encoder.decode(row) == "[CLS]who?[SEP]Answer A:\nme[SEP]Answer B:\nyou[SEP]"


def test_a_decoder_reads_one_chat_message_and_is_asked_to_answer(decoder):
    (row,) = encode_pairs(battle(("who?",), ("me",), ("you",)), decoder, 256)
    text = decoder.decode(row)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "User:\nwho?\n\nAnswer A:\nme\n\nAnswer B:\nyou\n\n" in text


def test_the_closing_tokens_are_never_cut(tokenizer, ugly_pairs):
    end = list(make_template(tokenizer).pieces[-1])
    for max_tokens in (160, 300):
        for row in encode_pairs(ugly_pairs, tokenizer, max_tokens):
            assert row[-len(end) :] == end
            assert len(row) <= max_tokens


def test_special_tokens_in_user_text_stay_plain_text(tokenizer):
    texts = "".join(tokenizer.all_special_tokens) + "[SEP]<|im_end|>"
    plain, forged = (
        encode_pairs(battle(a=(text,)), tokenizer, 400)[0] for text in ("nothing special", texts)
    )
    specials = set(tokenizer.all_special_ids)
    assert [i for i in forged if i in specials] == [i for i in plain if i in specials]
    assert texts in tokenizer.decode(forged)


def test_turns_are_kept_apart(tokenizer):
    apart, joined = (
        encode_pairs(battle(a=turns), tokenizer, 300)[0] for turns in (("x", "y"), ("xy",))
    )
    assert apart != joined
    assert "x\n\n[next turn]\n\ny" in tokenizer.decode(apart)


def test_long_battles_keep_a_part_of_every_text(tokenizer):
    words = {name: f"{name} " * 3000 for name in ("question", "first", "second")}
    (row,) = encode_pairs(battle(*((text,) for text in words.values())), tokenizer, 256)
    text = tokenizer.decode(row)
    assert 250 <= len(row) <= 256
    assert min(text.count(name) for name in words) >= 5


def test_the_same_words_are_cut_when_the_answers_are_exchanged(tokenizer, ugly_pairs, demo_pairs):
    pairs = pd.concat([ugly_pairs, demo_pairs[:20]])
    pieces = make_template(tokenizer).pieces
    encoded = encode_battles(pairs, tokenizer, 170)
    for battle in range(len(pairs)):
        one, other = (encoded.row(battle, is_swapped) for is_swapped in (False, True))
        (a, b), (c, d) = find_answers(one, pieces), find_answers(other, pieces)
        assert one[slice(*a)].tolist() == other[slice(*d)].tolist()
        assert one[slice(*b)].tolist() == other[slice(*c)].tolist()


def encode_plainly(pairs, tokenizer, max_tokens):
    """One text at a time by transformers' own call, each order by itself."""
    made = make_template(tokenizer)
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    rows = []
    for texts in zip(*(pairs[name] for name in TEXTS), strict=True):
        ids = []
        for turns in texts:
            ids.append([tokenizer(clean_text(turn), **options)["input_ids"] for turn in turns])
        n_between = len(made.turn)
        lengths = [sum(map(len, turns)) + n_between * (len(turns) - 1) for turns in ids]
        row = list(made.pieces[0])
        shares = share_budget(lengths, max_tokens - made.n_fixed)
        for turns, share, piece in zip(ids, shares, made.pieces[1:], strict=True):
            for place, turn in enumerate(cut_turns(turns, share, made.cut, n_between)):
                row += [*(made.turn if place else ()), *turn]
            row += piece
        rows.append(row)
    return rows


def check_both_orders(pairs, tokenizer, max_tokens):
    encoded = encode_battles(pairs, tokenizer, max_tokens)
    given = encode_plainly(pairs, tokenizer, max_tokens)
    swapped = encode_plainly(swap_pairs(pairs), tokenizer, max_tokens)
    assert len(encoded) == len(pairs)
    assert encoded.lengths.tolist() == [len(row) for row in given]
    for battle, rows in enumerate(zip(given, swapped, strict=True)):
        found = [encoded.row(battle, is_swapped) for is_swapped in (False, True)]
        assert [row.tolist() for row in found] == list(rows)
        assert {row.dtype for row in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize("max_tokens", [170, 1000, 10**9])
def test_both_orders_are_those_of_a_plain_encoding(tokenizer, ugly_pairs, demo_pairs, max_tokens):
    check_both_orders(pd.concat([ugly_pairs, demo_pairs[:30]]), tokenizer, max_tokens)


def test_real_battles_are_encoded_as_plainly(tokenizer, real_pairs):
    check_both_orders(real_pairs[:100], tokenizer, 700)


def test_calls_of_the_tokenizer_do_not_show_in_the_rows(tokenizer, demo_pairs, monkeypatch):
    expected = encode_pairs(demo_pairs[:20], tokenizer, 300)
    monkeypatch.setattr(template, "_BATTLES_PER_CALL", 7)
    assert encode_pairs(demo_pairs[:20], tokenizer, 300) == expected


def test_a_tokenizer_in_python_gives_the_same_rows(tokenizer, ugly_pairs, monkeypatch):
    expected = encode_pairs(ugly_pairs, tokenizer, 300)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    monkeypatch.delattr(type(tokenizer), "backend_tokenizer")
    assert encode_pairs(ugly_pairs, tokenizer, 300) == expected


def test_what_a_tokenizer_was_used_for_before_changes_nothing(tokenizer, ugly_pairs):
    expected = encode_pairs(ugly_pairs, tokenizer, 300)
    specials = [tokenizer(token)["input_ids"] for token in tokenizer.all_special_tokens]
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding="max_length")
    assert encode_pairs(ugly_pairs, tokenizer, 300) == expected
    # Nor does encoding change what the tokenizer does for others.
    assert [tokenizer(token)["input_ids"] for token in tokenizer.all_special_tokens] == specials


def test_counted_tokens_are_those_of_the_uncut_row(tokenizer, ugly_pairs):
    rows = encode_pairs(ugly_pairs, tokenizer, 10**9)
    assert count_tokens(ugly_pairs, tokenizer).tolist() == [len(row) for row in rows]


def test_a_budget_smaller_than_the_template_is_refused_by_name(decoder):
    with pytest.raises(ValueError, match="max_tokens: expected at least"):
        encode_pairs(battle(), decoder, 32)


def test_no_battles_give_no_rows(tokenizer, ugly_pairs):
    assert encode_pairs(ugly_pairs[:0], tokenizer, 200) == []
    assert len(encode_battles(ugly_pairs[:0], tokenizer, 200)) == 0


def test_short_texts_are_complete_and_long_ones_share_equally():
    assert share_budget([10, 100, 300], 110) == [10, 50, 50]
    assert share_budget([10, 20, 30], 60) == [10, 20, 30]
    assert share_budget([10, 20, 30], 1000) == [10, 20, 30]
    assert share_budget([], 5) == []
    assert share_budget([5, 5], 0) == [0, 0]


def test_reordering_texts_reorders_their_shares():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, budget = rng.integers(0, 50, 4).tolist(), int(rng.integers(0, 150))
        order = rng.permutation(4)
        shares = share_budget(lengths, budget)
        assert share_budget([lengths[i] for i in order], budget) == [shares[i] for i in order]
        assert sum(shares) <= budget
        assert all(share <= length for share, length in zip(shares, lengths, strict=True))
        # The remainder of the division is less than one token for each field.
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


def test_a_text_with_tokens_never_loses_them_all():
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
