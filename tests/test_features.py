"""What the CPU baseline reads of battles: blocks of features, and what an exchange does to them."""

import numpy as np
import pandas as pd
import pytest

from src.utils.config import BaselineConfig
from src.utils.models import features as module
from src.utils.models.features import BEGINNING, ENDING, OPENING, hash_bytes, measure_features
from src.utils.schema import PAIR_COLUMNS, swap_pairs

CONFIG = BaselineConfig(n_hashed=4096, word_vectors="none")


def battles(*answers):
    """Battles of one prompt between pairs of answers."""
    rows = [(row, ("tell me",), (a,), (b,)) for row, (a, b) in enumerate(answers)]
    pairs = pd.DataFrame(rows, columns=["id", "prompt", "response_a", "response_b"])
    return pairs.assign(model_a="x", model_b="y")[list(PAIR_COLUMNS)]


def test_blocks_change_sign_or_stay_the_same_under_the_swap(ugly_pairs, vectors):
    features = measure_features(ugly_pairs, CONFIG, vectors)
    swapped = measure_features(swap_pairs(ugly_pairs), CONFIG, vectors)
    assert {"style", "meaning", "beginning", "relevance"} == {*features.signed}
    assert {"words", "characters", "opening", "ending", "signs"} == {*features.texts}
    for name, block in features.signed.items():
        np.testing.assert_array_equal(swapped.signed[name], -block, err_msg=name)
    for name, block in features.unsigned.items():
        np.testing.assert_array_equal(swapped.unsigned[name], block, err_msg=name)
    for name, block in features.texts.items():
        assert (swapped.texts[name] + block).nnz == 0 and block.nnz > 0


def test_without_word_vectors_only_what_needs_them_is_missing(ugly_pairs, vectors):
    with_them = measure_features(ugly_pairs, CONFIG, vectors)
    without = measure_features(ugly_pairs, CONFIG)
    assert {*without.signed} == {"style"} and {*without.texts} == {*with_them.texts}
    likeness = with_them.unsigned["likeness"]
    np.testing.assert_array_equal(without.unsigned["likeness"], likeness[:, :-1])


def test_a_battle_reads_the_same_whatever_is_measured_beside_it(demo_pairs, vectors, monkeypatch):
    at_once = measure_features(demo_pairs, CONFIG, vectors)
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    in_parts = measure_features(demo_pairs, CONFIG, vectors)
    for one, other in zip(at_once.parts, in_parts.parts, strict=True):
        for name in one:
            assert abs(one[name] - other[name]).max() == 0, name
    rows = np.array([5, 2])
    taken = at_once.take(rows)
    np.testing.assert_array_equal(taken.signed["style"], at_once.signed["style"][rows])


def test_openings_and_endings_see_only_their_part_of_an_answer():
    body = "x" * 500
    same, other = "begin" + body + "end", "begin" + body + "fin"
    found = measure_features(battles((same, other), (same, "Start" + body + "end")), CONFIG).texts
    assert found["opening"][0].nnz == 0 and found["ending"][0].nnz > 0
    assert found["opening"][1].nnz > 0 and found["ending"][1].nnz == 0
    assert len("begin") < OPENING < ENDING < len(body)


def test_the_beginning_means_what_its_words_do_whatever_follows(vectors):
    one, other = (vectors.tokenizer.id_to_token(place) for place in (3, 4))
    start = f"{one} " * (BEGINNING // (len(one) + 1) + 1)
    pairs = battles((start, start + f"{other} " * 100))
    found = measure_features(pairs, CONFIG, vectors).signed
    assert np.abs(found["beginning"]).max() < 1e-6 < np.abs(found["meaning"]).max()


def test_signs_are_told_apart_by_case_and_counted_once():
    found = measure_features(battles(("aab", "aA"), ("ab\n", "ba")), CONFIG).texts["signs"]
    assert sorted(found[0].data) == [-1, 1]  # A there, b here
    assert found[1].nnz == 1


def test_answers_that_have_more_in_common_are_more_alike(vectors):
    alike, unlike, same = "one two three", "**7** 8, 9; 10!", "one two four"
    pairs = battles((same, same), (same, alike), (same, unlike), ("", ""))
    likeness = measure_features(pairs, CONFIG).unsigned["likeness"]
    for column in likeness[:, :4].T:  # shares in common
        assert column[0] == 1 > column[1] > column[2] >= 0
        assert column[3] == 1
    assert (likeness[[0, 3], 4] == 0).all()  # ratio of lengths


def test_the_answer_on_the_prompts_subject_is_the_more_relevant(vectors, demo_pairs):
    prompt = demo_pairs["response_a"][0][:1]
    pairs = battles((prompt[0], "zzz")).assign(prompt=[prompt])
    assert measure_features(pairs, CONFIG, vectors).signed["relevance"][0, 0] > 0.5


def test_byte_sequences_are_counted_once_and_kept_apart():
    found = hash_bytes(["abab", "abab abab", "xyz", ""], 2**20).toarray()
    assert set(np.unique(found)) == {0, 1}
    assert (found[0] * found[1]).sum() >= 4 and (found[0] * found[2]).sum() == 0
    assert found[3].sum() > 0  # two blanks: an empty answer is informative


def test_a_package_that_is_not_known_is_refused(demo_pairs):
    from src.utils.config import SuiteError

    config = BaselineConfig(word_vectors="package:unheard-of")
    with pytest.raises(SuiteError, match="unheard-of"):
        measure_features(demo_pairs, config)
