"""Battle cards: what is shown, and that no text of a battle becomes markup."""

import numpy as np
import pandas as pd

from src.utils.battles.style import measure_style
from src.utils.stats.cards import choose_example, show_battle


def make_battle(**changes) -> pd.Series:
    battle = {
        "prompt": ("Name a colour.",),
        "response_a": ("Blue.",),
        "response_b": ("Red.",),
        "model_a": "alpha",
        "model_b": "beta",
        "label": 1,
    }
    return pd.Series(battle | changes)


def test_a_card_shows_texts_names_vote_and_probabilities():
    page = show_battle(make_battle(), [0.2, 0.5, 0.3], title="First").data
    for expected in ("First", "Name a colour.", "Blue.", "beta", "vote", "50%", "30%"):
        assert expected in page


def test_no_text_of_a_battle_becomes_markup():
    hostile = "</div><script>alert(1)</script>\ud83d & <img src=x onerror=alert(1)>"
    battle = make_battle(prompt=(hostile,), response_a=(None, hostile), model_b=hostile)
    page = show_battle(battle, title=hostile).data
    assert "<script" not in page and "<img" not in page
    page.encode("utf-8")  # lone surrogates are replaced


def test_a_long_text_is_folded_and_still_whole():
    page = show_battle(make_battle(response_b=("x" * 100_000,))).data
    assert page.count("<details>") == 1 and page.count("x") >= 100_000


def test_a_battle_without_vote_or_names_can_be_shown():
    battle = make_battle(label=np.nan).drop(["model_a", "model_b"])
    page = show_battle(battle).data
    assert "vote" not in page and "unknown" in page


def test_the_example_is_short_english_and_decided_whatever_the_order(demo_pairs):
    style = measure_style(demo_pairs)
    example = choose_example(demo_pairs, style)
    place = demo_pairs.index[demo_pairs["id"] == example["id"]][0]
    assert style["script_prompt"][place] == "English" and example["label"] != 2
    assert style["n_chars_a"][place] + style["n_chars_b"][place] < 700
    mixed = demo_pairs.sample(frac=1, random_state=0)
    assert choose_example(mixed, style.loc[mixed.index])["id"] == example["id"]


def test_an_example_is_found_among_battles_of_any_kind(ugly_pairs):
    assert choose_example(ugly_pairs, measure_style(ugly_pairs))["id"] in set(ugly_pairs["id"])
