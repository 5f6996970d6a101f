import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from src.utils.models.batches import collate, is_canonical, make_batches, make_packs
from src.utils.models.heads import find_answers
from src.utils.models.template import count_tokens, encode_both_orders, encode_pairs, make_template
from src.utils.schema import swap_pairs

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
    given, swapped = encode_both_orders(pairs, tokenizer, 170)
    for one, other in zip(given, swapped, strict=True):
        (a, b), (c, d) = find_answers(one, pieces), find_answers(other, pieces)
        assert one[slice(*a)] == other[slice(*d)] and one[slice(*b)] == other[slice(*c)]


def test_both_orders_are_the_battle_and_its_mirror(tokenizer, ugly_pairs):
    given, swapped = encode_both_orders(ugly_pairs, tokenizer, 200)
    assert given == encode_pairs(ugly_pairs, tokenizer, 200)
    assert swapped == encode_pairs(swap_pairs(ugly_pairs), tokenizer, 200)


def test_counted_tokens_are_those_of_the_uncut_row(tokenizer, ugly_pairs):
    rows = encode_pairs(ugly_pairs, tokenizer, 10**9)
    assert count_tokens(ugly_pairs, tokenizer).tolist() == [len(row) for row in rows]


def test_exactly_one_order_of_two_different_answers_is_canonical(ugly_pairs):
    straight, mirrored = is_canonical(ugly_pairs), is_canonical(swap_pairs(ugly_pairs))
    same = (ugly_pairs["response_a"] == ugly_pairs["response_b"]).to_numpy()
    assert (straight ^ mirrored)[~same].all()
    assert (straight & mirrored)[same].all() and same.any()


def test_a_budget_smaller_than_the_template_is_refused_by_name(decoder):
    with pytest.raises(ValueError, match="max_tokens: expected at least"):
        encode_pairs(battle(), decoder, 32)


def test_no_battles_give_no_rows(tokenizer, ugly_pairs):
    assert encode_pairs(ugly_pairs[:0], tokenizer, 200) == []
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


def test_packs_are_dealt_anew_each_epoch_and_alike_for_a_seed():
    first, again, later = (
        np.concatenate(make_packs(np.full(50, 10), 100, 1, epoch)).tolist() for epoch in (0, 0, 1)
    )
    assert first == again and first != later
