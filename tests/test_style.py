"""What is counted in an answer, and the features made of it."""

import json
import time

import numpy as np
import pandas as pd
import pytest

from src.utils.battles.style import (
    PAIR_FEATURES,
    SCRIPTS,
    STYLE_FEATURES,
    classify_prompts,
    count_tokens,
    density_differences,
    load_tokenizer,
    measure_style,
    slice_battles,
    style_differences,
    style_shared,
)
from src.utils.paths import REAL_DATA
from src.utils.schema import TEXTS, swap_pairs


def make_pairs(*battles):
    """Battles of prompt, answer A and answer B; a single turn may be given as a str."""
    table = pd.DataFrame(battles, columns=list(TEXTS), dtype=object)
    return table.map(lambda text: text if isinstance(text, tuple) else (text,))


def measure_one(prompt, answer):
    return measure_style(make_pairs((prompt, answer, "other"))).iloc[0]


UGLY = make_pairs(
    ("hi", (None,), ""),
    (("one", "two"), ("a",), ("b", None)),
    ("broken \ud83d", "half an emoji \ud83d", "\ud83d\ud83d"),
    ("", "*" * 50_000, " " * 50_000),
    ("<|im_end|> [SEP] <b>", "<script>alert(1)</script>", "\n\n\n"),
    ("为什么天空是蓝色的？", "因为瑞利散射。", "Потому что."),
    ("a" * 50_000, "!" * 50_000 + "x", "1" * 50_000),
    ("same", "same", "same"),
)


def test_every_feature_has_two_columns_and_no_value_is_missing():
    style = measure_style(UGLY)
    sides = [f"{name}_{side}" for name in STYLE_FEATURES for side in "ab"]
    assert set(style.columns) == {*sides, *PAIR_FEATURES, "script_prompt"}
    assert (style.drop(columns="script_prompt").dtypes == np.float32).all()
    assert np.isfinite(style.drop(columns="script_prompt").to_numpy()).all()


def test_rows_stay_with_the_index_of_the_battles():
    pairs = UGLY.set_index(pd.Index([3, 1, 4, 15, 9, 2, 6, 5]))
    assert list(measure_style(pairs).index) == list(pairs.index)


def test_no_battles_give_no_rows():
    style = measure_style(UGLY[:0])
    assert len(style) == 0 and style_differences(style)[0].shape == (0, len(STYLE_FEATURES))


@pytest.mark.parametrize("battles", ["demo_pairs", "ugly_pairs", "real_pairs", None])
def test_swapping_the_answers_negates_differences_and_keeps_the_rest(battles, request):
    pairs = UGLY if battles is None else request.getfixturevalue(battles)
    style = measure_style(pairs)
    swapped = measure_style(swap_pairs(pairs))
    assert np.abs(style_differences(style)[0]).max() > 1
    np.testing.assert_array_equal(style_differences(style)[0], -style_differences(swapped)[0])
    np.testing.assert_array_equal(style_shared(style), style_shared(swapped))


def test_density_does_not_depend_on_length():
    style = measure_style(make_pairs(("hi", "a, b, " * 10, "a, b, "), ("hi", "a,,,", "a,bc")))
    assert density_differences(style, ["n_commas"])[:, 0] == pytest.approx([0, 0.5])


def test_names_match_the_columns():
    style = measure_style(UGLY)
    features, names = style_differences(style)
    assert features.shape == (len(UGLY), len(names)) and len(set(names)) == len(names)


def test_a_count_is_compared_as_a_log_ratio_and_a_share_as_a_difference():
    style = measure_style(make_pairs(("hi", "one two three", "ONE")))
    features, names = style_differences(style)
    row = dict(zip(names, features[0], strict=True))
    assert row["n_words"] == pytest.approx(np.log(4 / 2))
    assert row["share_uppercase"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("n_chars", "añb漢", 4),
        ("n_words", "One, two-three; it's.", 5),
        ("n_words", "天空蓝色", 4),
        ("n_sentences", "Pi is 3.14. Really? Yes!", 3),
        ("n_lines", "a\nb\n", 2),
        ("n_turns_empty", ("a", None, " "), 2),
        ("n_punctuation", "a, b! (c)?", 5),
        ("n_commas", "a, b, c", 2),
        ("n_question_marks", "a? b??", 3),
        ("n_exclamation_marks", "a! b", 1),
        ("n_list_items", "List:\n- a\n  * b\n1. c\n2) d\n-not\n1999 was", 4),
        ("n_headers", "# A\ntext # no\n### B\n#no", 2),
        ("n_bold", "**a** and **b c** not ** d", 2),
        ("n_code_blocks", "```python\nx\n``` and ```\ny", 2),
        ("n_inline_code", "use `a` and `b`", 2),
        ("n_table_rows", "| a | b |\n|---|---|\ntext | no", 2),
        ("n_urls", "see http://a.b and https://c.d", 2),
        ("n_hedges", "Perhaps it might work, but mighty well.", 2),
        ("share_digits", "12ab", 0.5),
        ("share_uppercase", "ABcd 12", 0.5),
        ("share_non_ascii", "aé", 0.5),
        ("lexical_diversity", "go go go stop", 0.5),
        ("mean_word_length", "ab, abcd", 3),
        ("punctuation_per_char", "a,b.", 0.5),
    ],
)
def test_counts_are_what_a_reader_would_count(name, answer, expected):
    assert measure_one("hi", answer)[f"{name}_a"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("I’m unable to do so.", 1),
        ("As an AI language model, I am not able to answer this.", 1),
        ("I apologize, but that is not something I do.", 1),
        (("Sure.", "I must decline."), 1),
        ("Sure! " + "Here it is. " * 40 + "I cannot say more.", 0),
        ("You can pour the oil when the pan is hot.", 0),
    ],
)
def test_a_refusal_is_found_at_the_beginning_of_an_answer(answer, expected):
    assert measure_one("hi", answer)["is_refusal_a"] == expected


def test_overlap_counts_the_prompts_content_words():
    row = measure_one("What is the Eiffel Tower?", "The tower was built by Eiffel.")
    assert row["prompt_overlap_a"] == 1 and row["prompt_overlap_b"] == 0


def test_the_last_turn_is_matched_with_the_last_answer():
    row = measure_one(("bread recipe", "moon phases"), ("moon phases", "bread recipe"))
    names = ["prompt_overlap_a", "prompt_overlap_first_a", "prompt_overlap_last_a"]
    assert row[names].tolist() == [1, 1, 0]


def test_word_overlap_of_the_answers_is_their_jaccard_index():
    pairs = make_pairs(("x", "red green", "green blue"), ("x", "a", "a"), ("x", "", (None,)))
    style = measure_style(pairs)
    assert style["word_jaccard"].tolist() == pytest.approx([1 / 3, 1, 1])
    assert style["is_identical"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("prompt", "script"),
    [
        ("What is the capital of France and why is it so?", "English"),
        ("Was ist die Hauptstadt von Frankreich und warum liegt sie dort", "other Latin"),
        ("Какая столица?", "Cyrillic"),
        ("为什么天空是蓝色的？", "Chinese or Japanese"),
        ("كتاب مدرسة", "other script"),
        ("12 + 3 =", "no letters"),
    ],
)
def test_the_script_of_a_prompt_is_recognised(prompt, script):
    assert measure_one(prompt, "x")["script_prompt"] == script
    assert script in SCRIPTS


@pytest.mark.parametrize(
    "text", ["*", " ", "\n", "!", "**a", "\n- ", "`", "#", "\n ", "1.", "\ud83d", "天"]
)
def test_no_text_makes_measuring_slow(text):
    pairs = make_pairs(("hi", text * (50_000 // len(text)) + "x", "ok"))
    start = time.process_time()
    measure_style(pairs)
    assert time.process_time() - start < 5, "a pattern backtracks"


def test_lone_surrogates_count_as_one_unknown_character():
    style = measure_style(make_pairs(("hi", "a\ud83d", "a\ufffd")))
    assert style["n_chars_a"].item() == 2
    assert (style_differences(style)[0] == 0).all() and style["word_jaccard"].item() == 1


def test_without_a_tokenizer_four_characters_are_a_token():
    assert count_tokens(make_pairs(("12345", "1234", ""), ("", "", ""))).tolist() == [3, 0]


def test_a_tokenizer_of_two_files_merges_as_they_say(tmp_path, ugly_pairs):
    vocab = {letter: place for place, letter in enumerate([*"abcĠ", "ab", "abc"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    tokenizer = load_tokenizer(tmp_path)
    assert count_tokens(make_pairs(("abc", "ab", "abc cab")), tokenizer).tolist() == [1 + 1 + 4]
    assert (count_tokens(ugly_pairs, tokenizer) >= 0).all()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path / "nowhere")


# Mean and longest battle of the 898 real rows, as measured with the models' own tokenizers.
@pytest.mark.parametrize(
    ("name", "mean", "longest"), [("qwen2_5", 670, 6371), ("olmo_bpe", 714, 6412)]
)
def test_real_vocabularies_give_the_known_lengths(name, mean, longest, real_pairs):
    folder = REAL_DATA / "tokenizers" / name
    if not folder.exists():
        pytest.skip(f"{folder} is missing")
    counts = count_tokens(real_pairs, load_tokenizer(folder))
    assert counts.mean() == pytest.approx(mean, rel=0.005)
    assert counts.max() == pytest.approx(longest, abs=5)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("I'm sorry to hear that.", 1), ("We APOLOGIZE.", 1), ("A sorrowful song", 0), ("", 0)],
)
def test_an_apology_is_found_anywhere(answer, expected):
    assert measure_one("hi", answer)["has_apology_a"] == expected


def test_every_battle_is_in_one_slice_of_each_kind_whatever_the_positions(ugly_pairs):
    slices = slice_battles(measure_style(ugly_pairs))
    swapped = slice_battles(measure_style(swap_pairs(ugly_pairs)))
    kinds = {name.split(":")[0] for name in slices}
    assert kinds == {"length", "turns", "language", "code", "refusal"}
    for kind in kinds:
        masks = [mask for name, mask in slices.items() if name.startswith(kind)]
        np.testing.assert_array_equal(np.sum(masks, axis=0), 1)
    for name, mask in slices.items():
        np.testing.assert_array_equal(swapped[name], mask, err_msg=name)
    assert slices["refusal: one answer"].sum() == 1 and slices["turns: several"].sum() == 2


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Write a python function that sorts a list", "code"),
        ("напиши на python", "code"),
        ("How many apples do I have left?", "maths and puzzles"),
        ("What is 12 * 13?", "maths and puzzles"),
        ("Translate this into French: hello", "editing and translation"),
        ("Write me a poem about the sea", "writing"),
        ("How do I boil the eggs?", "advice"),
        ("Who was the first man on the moon?", "question"),
        ("the moon and the sun are up", "other"),
        ("Что такое счастье?", "not English"),
        (None, "other"),
        ("12 * 13 = ?", "maths and puzzles"),
    ],
)
def test_prompts_are_sorted_by_their_opening(prompt, kind):
    row = {"prompt": [(prompt,)], "response_a": [("a",)], "response_b": [("b",)]}
    pairs = pd.DataFrame(row, dtype=object)
    assert classify_prompts(pairs, measure_style(pairs)).tolist() == [kind]


def test_what_a_prompt_quotes_further_down_does_not_matter(ugly_pairs):
    pairs = ugly_pairs[:1].assign(prompt=[("the sun and the moon are up " * 20 + "python",)])
    assert classify_prompts(pairs, measure_style(pairs)).tolist() == ["other"]
    assert len(classify_prompts(ugly_pairs, measure_style(ugly_pairs))) == len(ugly_pairs)
