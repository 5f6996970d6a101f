"""Claims about heads on frozen states: what they learn, from which battles, and how they serve."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from src.utils.config import FinetuneConfig
from src.utils.models.frozen import N_STATES
from src.utils.schema import swap_probs
from src.utils.training import frozen_heads
from src.utils.training.frozen_heads import (
    PENALTIES,
    choose_penalties,
    find_columns,
    fit_head,
    predict_columns,
    predict_heldout,
    project,
    train_head,
)
from src.utils.training.heldout import Member
from src.utils.training.states import States, make_keys

CONFIG = FinetuneConfig(train="head")
HIDDEN = 16


def make_states(pairs, folder, seed=0, hidden=HIDDEN, place="answers"):
    """States of which one number, exchanged with the answers, says how a battle is voted."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(len(pairs), 2, N_STATES * hidden)) * rng.uniform(
        0.1, 50, size=N_STATES * hidden
    )
    strength = rng.normal(size=len(pairs))
    if place != "answers":  # the read-out turns round with the order
        states[:, 0, 3], states[:, 1, 3] = 20 * strength, -20 * strength
    if place != "read-out":  # each answer's mean goes where the answer goes
        states[:, 0, hidden + 3] = states[:, 1, 2 * hidden + 3] = 20 * strength
        states[:, 1, hidden + 3] = states[:, 0, 2 * hidden + 3] = -20 * strength
    store = States(folder, N_STATES, hidden)
    store.add(make_keys(pairs).ravel(), states.reshape(-1, N_STATES * hidden).astype(np.float16))
    logits = np.stack([2 * strength, -2 * strength, np.zeros(len(pairs))], axis=1)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(len(pairs))[:, None] > probs.cumsum(axis=1)).sum(axis=1)
    return States(folder, N_STATES, hidden), pairs.assign(label=labels), probs


@pytest.fixture
def made(demo_pairs, tmp_path):
    return make_states(demo_pairs, tmp_path)


def train(states, pairs, config=CONFIG, fold=0):
    is_heldout = (pairs["fold"] == fold).to_numpy()
    member = Member(f"fold_{fold}", fold, config)
    return train_head(states, pairs[~is_heldout], pairs[is_heldout], member), is_heldout


def loss(probs, truth):
    return float(-(truth * np.log(probs)).sum(axis=1).mean())


def test_a_head_finds_what_the_states_say(made):
    states, pairs, truth = made
    (_, probs, record), is_heldout = train(states, pairs)
    best = loss(truth[is_heldout], truth[is_heldout])
    assert loss(probs, truth[is_heldout]) < best + 0.2 < np.log(3) - 0.1
    assert len(record["history"]) == 3 * len(PENALTIES)
    assert record["n_train_pairs"] == (~is_heldout).sum()


def test_wide_states_are_projected_and_serve_all_the_same(demo_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_heads, "_MOST_DIRECTIONS", 8)
    states, pairs, _ = make_states(demo_pairs, tmp_path, place="both")
    rows = states.find(make_keys(pairs))
    directions = find_columns(states, rows, seed=0)
    columns = project(states, rows, directions)
    assert columns.shape == (4, 2, 300, 8)
    penalties = dict.fromkeys(("winner", "tie", "read-out"), 1.0)
    model = fit_head(columns, np.eye(3)[pairs["label"]], penalties)
    probs, _ = predict_heldout(states, pairs, directions.make_head(model, penalties))
    np.testing.assert_allclose(probs, predict_columns(model, columns, penalties), atol=1e-5)
    assert probs.std(axis=0).min() > 0.05


def test_nothing_of_the_held_out_fold_reaches_its_head(made):
    states, pairs, _ = made
    (_, probs, record), is_heldout = train(states, pairs)
    turned = pairs.assign(label=np.where(is_heldout, 2 - pairs["label"], pairs["label"]))
    (_, same, again), _ = train(states, turned)
    np.testing.assert_array_equal(probs, same)
    for one, two in zip(record["history"], again["history"], strict=True):
        assert one["log_loss"] == two["log_loss"]


def test_penalties_are_chosen_on_prompts_that_were_not_seen(monkeypatch):
    groups = np.repeat([f"prompt {n}" for n in range(30)], 4)
    seen = []

    def note(columns, votes, penalties):
        seen.append({*columns[0, 0, :, 0].int().tolist()})
        return fit_head(columns, votes, penalties)

    monkeypatch.setattr(frozen_heads, "fit_head", note)
    columns = torch.arange(30.0).repeat_interleave(4)[:, None].expand(4, 2, 120, 2).contiguous()
    votes = np.eye(3)[np.random.default_rng(0).integers(0, 3, 120)]
    _, rows = choose_penalties(columns, votes, votes, groups, seed=0)
    assert len(seen) == 3 * (len(rows) + 1) and all(len(prompts) == 20 for prompts in seen)


@pytest.mark.parametrize("place", ["answers", "read-out"])
def test_the_read_out_is_read_where_it_helps(place, demo_pairs, tmp_path):
    states, pairs, _ = make_states(demo_pairs, tmp_path, place=place)
    (head, _, record), _ = train(states, pairs)
    assert ("read-out" in record["penalties"]) == bool(head.weights[1].any())
    assert place == "answers" or "read-out" in record["penalties"]


def test_an_exchange_exchanges_the_columns(made):
    states, pairs, _ = made
    (_, probs, _), is_heldout = train(states, pairs)
    exchanged = pairs[is_heldout].rename(
        columns={"response_a": "response_b", "response_b": "response_a"}
    )
    both = pd.concat([pairs[~is_heldout], exchanged[pairs.columns]])
    (_, turned, _), _ = train(states, both)
    np.testing.assert_allclose(turned, swap_probs(probs), atol=1e-6)


def test_shares_of_several_votes_are_learned_as_they_are(made):
    states, pairs, truth = made
    votes = pd.DataFrame(
        np.round(truth * 1000).astype(int),
        columns=["votes_a", "votes_b", "votes_tie"],
        index=pairs.index,
    )
    (_, one, _), is_heldout = train(states, pairs)
    (_, many, _), _ = train(states, pairs.assign(**votes))
    assert loss(many, truth[is_heldout]) < loss(one, truth[is_heldout]) - 0.01


def test_soft_labels_teach(made, tmp_path):
    states, pairs, truth = made
    path = tmp_path / "soft.csv"
    table = pd.DataFrame(truth, columns=["winner_model_a", "winner_model_b", "winner_tie"])
    table.insert(0, "id", pairs["id"].to_numpy())
    table.to_csv(path, index=False)
    config = dataclasses.replace(CONFIG, soft_labels=str(path), soft_temperature=1.0)
    (_, alone, _), is_heldout = train(states, pairs)
    (_, taught, _), _ = train(states, pairs, config)
    assert loss(taught, truth[is_heldout]) < loss(alone, truth[is_heldout]) - 0.01


def test_a_battle_without_states_gets_the_mean_of_the_others(made):
    states, pairs, _ = made
    strange = pairs.copy()
    place = int(np.flatnonzero(pairs["fold"] == 0)[0])
    strange.at[strange.index[place], "prompt"] = ("never read",)
    (_, probs, _), _ = train(states, strange)
    assert np.isfinite(probs).all() and probs[0, 0] == pytest.approx(probs[0, 1])
    np.testing.assert_allclose(probs[0, 2], probs[1:, 2].mean())
