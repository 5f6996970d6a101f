"""Blends: what fitting recovers, symmetry, cross-fitting, missing members, what is published."""

import json

import numpy as np
import pandas as pd
import pytest

from src.utils.schema import probs_of, probs_table, swap_labels, swap_probs
from src.utils.stats.blend import (
    Blend,
    apply_blend,
    choose_blend,
    cross_fit_blend,
    fit_blend,
    make_soft_labels,
    read_members,
)
from src.utils.stats.scores import log_loss
from tests.votes import blur, make_votes


def test_a_blend_survives_json():
    blend = Blend(("a", "b"), (0.25, 0.75), 1.2, -0.1, "linear")
    assert Blend.from_json(blend.to_json()) == blend


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": (0.5, 0.6)}, "weights"),
        ({"weights": (-0.5, 1.5)}, "weights"),
        ({"weights": (1.0,)}, "weights"),
        ({"temperature": 0.0}, "temperature"),
        ({"pool": "cubic"}, "pool"),
    ],
)
def test_an_impossible_blend_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        Blend(**{"members": ("a", "b"), "weights": (0.5, 0.5)} | change)


def test_a_blend_undoes_overconfidence():
    truth, labels = make_votes(4000)
    bold = blur(truth, 0.0, power=2.0)
    blend = fit_blend({"bold": bold}, labels)
    assert blend.temperature == pytest.approx(2.0, rel=0.1)
    assert log_loss(apply_blend(blend, {"bold": bold}), labels) < log_loss(bold, labels) - 0.05


def test_a_blend_trusts_the_better_member_more():
    truth, labels = make_votes(3000)
    members = {
        "good": blur(truth, 0.3),
        "poor": blur(truth, 1.5, seed=2),
        "prior": np.full((3000, 3), 1 / 3),
    }
    weights = dict(zip(members, fit_blend(members, labels).weights, strict=True))
    assert weights["good"] > 0.6 and weights["good"] > weights["poor"]


def test_two_members_of_independent_errors_beat_each_alone():
    truth, labels = make_votes(4000)
    members = {"one": blur(truth, 0.8, seed=1), "two": blur(truth, 0.8, seed=2)}
    blended = cross_fit_blend(members, labels, np.arange(4000))
    assert (
        log_loss(blended, labels)
        < min(log_loss(probs, labels) for probs in members.values()) - 0.02
    )


def test_a_blend_is_symmetric_whatever_it_was_fitted_to():
    truth, labels = make_votes(300)
    members = {"one": blur(truth, 0.5), "two": blur(truth, 1.0, seed=2)}
    blend = fit_blend(members, labels)
    swapped = apply_blend(blend, {name: swap_probs(probs) for name, probs in members.items()})
    np.testing.assert_allclose(swap_probs(swapped), apply_blend(blend, members), atol=1e-14)
    mirrored = fit_blend(
        {name: swap_probs(probs) for name, probs in members.items()}, swap_labels(labels)
    )
    assert mirrored.weights == pytest.approx(blend.weights, abs=1e-3)


def test_a_missing_member_hands_its_weight_to_the_others():
    blend = Blend(("a", "b", "c"), (0.5, 0.25, 0.25), pool="linear")
    a, b = np.array([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]]), np.array([[0.2, 0.6, 0.2], [np.nan] * 3])
    blended = apply_blend(blend, {"a": a, "b": b})
    assert blended[0] == pytest.approx((2 * a[0] + b[0]) / 3)
    assert blended[1] == pytest.approx(a[1])


def test_a_member_of_weight_zero_counts_where_it_is_alone():
    blend, probs = Blend(("a", "b"), (1.0, 0.0)), np.array([[0.5, 0.3, 0.2]])
    assert apply_blend(blend, {"b": probs}) == pytest.approx(probs)


def test_a_row_without_any_prediction_is_named():
    probs = np.array([[0.5, 0.3, 0.2], [np.nan] * 3])
    with pytest.raises(ValueError, match="row 1"):
        apply_blend(Blend(("a",), (1.0,)), {"a": probs})


def test_an_unknown_member_is_named():
    with pytest.raises(ValueError, match="stranger"):
        apply_blend(Blend(("a",), (1.0,)), {"stranger": np.full((1, 3), 1 / 3)})


def test_a_bad_member_is_named_when_fitting():
    with pytest.raises(ValueError, match=r"'bad'.*row 0"):
        fit_blend({"bad": np.array([[np.nan] * 3])}, np.array([0]))


def test_cross_fitting_never_sees_the_votes_that_it_predicts():
    truth, labels = make_votes(60)
    groups = np.arange(60) // 2
    members = {"one": blur(truth, 0.5), "two": blur(truth, 1.0, seed=2)}
    before = cross_fit_blend(members, labels, groups, n_folds=5)
    changed = labels.copy()
    changed[:2] = (labels[:2] + 1) % 3  # all of one group
    after = cross_fit_blend(members, changed, groups, n_folds=5)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert not np.array_equal(before, after)


def test_a_useless_blend_falls_back_to_the_best_member():
    truth, labels = make_votes(200)
    members = {"truth": truth, "noise": blur(np.full((200, 3), 1 / 3), 1.5)}
    blended = cross_fit_blend(members, labels, np.arange(200))
    blend, probs, verdict = choose_blend(members, labels, blended)
    assert blend.weights == (1.0, 0.0) and probs is truth
    for loss in (log_loss(blended, labels), log_loss(truth, labels)):
        assert f"{loss:.4f}" in verdict


def test_a_blend_that_helps_is_published():
    truth, labels = make_votes(2000)
    members = {"one": blur(truth, 0.8, seed=1), "two": blur(truth, 0.8, seed=2)}
    blended = cross_fit_blend(members, labels, np.arange(2000))
    blend, probs, _ = choose_blend(members, labels, blended)
    assert blend == fit_blend(members, labels) and min(blend.weights) > 0.2
    assert probs is blended


def write_run(folder, ids, probs, data_hash="this"):
    folder.mkdir()
    probs_table(np.array(ids), probs).to_parquet(folder / "oof.parquet")
    (folder / "metrics.json").write_text(json.dumps({"data_hash": data_hash}))
    return folder


def test_members_are_read_on_the_battles_that_all_held_out(tmp_path):
    truth, _ = make_votes(4)
    battles = pd.DataFrame({"id": [5, 6, 7, 8]})
    runs = {
        "all": write_run(tmp_path / "all", [8, 7, 6, 5], truth),
        "some": write_run(tmp_path / "some", [6, 8], truth[:2]),
        "other": write_run(tmp_path / "other", [5], truth[:1], data_hash="that"),
        "none": None,
    }
    members, pairs, notes = read_members(runs, battles, "this")
    assert list(members) == ["all", "some"] and pairs["id"].tolist() == [6, 8]
    np.testing.assert_allclose(members["all"], truth[[2, 0]], atol=1e-6)
    np.testing.assert_allclose(members["some"], truth[:2], atol=1e-6)
    assert [note.split(":")[0] for note in notes] == list(runs)
    own = {"mine": probs_table(np.array([5, 6]), truth[:2])}
    members, pairs, notes = read_members(runs, battles, "this", own)
    assert list(members) == ["all", "mine"] and pairs["id"].tolist() == [5, 6]
    assert "some: skipped" in notes[1]
    with pytest.raises(ValueError, match=r"other.*none"):
        read_members({name: runs[name] for name in ("other", "none")}, battles, "this")
    apart = {"some": runs["some"], "apart": write_run(tmp_path / "apart", [5], truth[:1])}
    with pytest.raises(ValueError, match=r"some.*apart"):
        read_members(apart, battles, "this")


def test_every_battle_that_a_member_held_out_gets_a_soft_label_that_names_its_members(tmp_path):
    truth, _ = make_votes(4)
    battles = pd.DataFrame({"id": [5, 6, 7, 8]})
    runs = {
        "wide": write_run(tmp_path / "wide", [7, 5, 6], truth[:3]),
        "narrow": write_run(tmp_path / "narrow", [6], truth[3:]),
        "unused": write_run(tmp_path / "unused", [6, 5], truth[:2]),
    }
    chosen = Blend(tuple(runs), (0.4, 0.6, 0.0), temperature=1.5)
    published = np.array([[0.2, 0.3, 0.5]])  # of the one battle that all held out
    soft = make_soft_labels(chosen, runs, battles, battles[1:2], published)
    assert soft["id"].tolist() == [5, 6, 7]  # nobody held 8 out
    assert soft["members"].tolist() == ["wide", "wide + narrow", "wide"]
    alone = apply_blend(chosen, {"wide": truth[[1, 0]]})
    np.testing.assert_allclose(probs_of(soft)[[0, 2]], alone, atol=1e-6)
    np.testing.assert_allclose(probs_of(soft)[1], published[0], atol=1e-6)
    # One of weight 0 counts, and is named, only where no other held the battle out.
    last = Blend(tuple(runs), (0.0, 1.0, 0.0))
    names = make_soft_labels(last, runs, battles, battles[1:2], published)["members"]
    assert names.tolist() == ["wide + unused", "narrow", "wide"]
