"""The explorer: what its filters choose, and what a page without a kernel shows instead."""

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest

from src.utils.stats import explorer


@pytest.fixture
def pairs():
    return pd.DataFrame(
        {
            "id": ["1", "2", "3", "4"],
            "prompt": [(f"question {row}",) for row in range(4)],
            "response_a": [("yes",)] * 4,
            "response_b": [("no",)] * 4,
            "model_a": ["ant", "bee", "ant", "cow"],
            "model_b": ["bee", "cow", "cow", "dog"],
            "label": [0, 1, 2, 0],
        }
    )


@pytest.fixture
def shown(monkeypatch):
    displayed = []
    monkeypatch.setattr(explorer, "display", displayed.append)
    return displayed


PROBS = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2]])


def test_filters_choose_by_vote_chatbot_and_kind(pairs):
    kinds = pd.Series(["code", "maths", "code", "maths"])
    assert explorer.choose_battles(pairs).tolist() == [0, 1, 2, 3]
    assert explorer.choose_battles(pairs, vote="A wins").tolist() == [0, 3]
    assert explorer.choose_battles(pairs, chatbot="bee").tolist() == [0, 1]
    assert explorer.choose_battles(pairs, kind="code", kinds=kinds).tolist() == [0, 2]
    assert explorer.choose_battles(pairs, vote="tie", chatbot="dog").tolist() == []


def test_the_largest_error_comes_first(pairs):
    losses = -np.log(PROBS[np.arange(4), pairs["label"]])
    rows = explorer.choose_battles(pairs, losses=losses, order="largest error first")
    assert rows.tolist() == [1, 2, 3, 0]
    rows = explorer.choose_battles(pairs, "A wins", losses=losses, order="smallest error first")
    assert rows.tolist() == [0, 3]


def test_a_headless_run_shows_a_fixed_selection(pairs, shown, monkeypatch):
    monkeypatch.setenv(explorer.STATIC, "1")
    explorer.explore_battles(pairs, PROBS, n_static=2)
    assert ["question 0" in card.data for card in shown] == [True, False]
    assert "question 3" in shown[1].data and "0.69 nats" in shown[1].data
    explorer.try_battle(lambda pairs: PROBS[:1], "why?", "so", "because")
    assert "why?" in shown[2].data and "80%" in shown[2].data


def find_controls(box):
    named = [child for child in box.children if getattr(child, "description", "")]
    return {control.description: control for control in named}


def test_a_choice_in_jupyter_shows_another_battle(pairs, shown, monkeypatch):
    monkeypatch.delenv(explorer.STATIC, raising=False)
    explorer.explore_battles(pairs, PROBS)
    (box,) = [one for one in shown if isinstance(one, widgets.VBox)]
    controls = find_controls(box.children[0])
    assert set(controls) == {"vote", "chatbot", "order", "battle no."}
    controls["vote"].value = "tie"
    assert "question 2" in shown[-1].data
    controls["chatbot"].value = "dog"  # no tie of that one: no card
    assert "question 2" in shown[-1].data


def test_a_battle_that_is_typed_is_predicted_anew(shown, monkeypatch):
    monkeypatch.delenv(explorer.STATIC, raising=False)
    asked = []
    explorer.try_battle(lambda pairs: asked.append(pairs) or PROBS[:1], "why?", "so", "because")
    (box,) = [one for one in shown if isinstance(one, widgets.VBox)]
    find_controls(box)["prompt"].value = "how?"
    assert asked[-1]["prompt"].tolist() == [("how?",)]
