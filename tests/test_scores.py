"""Scores: hand-worked values, agreement with scikit-learn, coverage of the intervals."""

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from src.utils.schema import LABEL_NAMES, list_votes, probs_of, probs_table, swap_pairs, swap_probs
from src.utils.stats.scores import (
    bootstrap_interval,
    bootstrap_means,
    by_fold,
    calibrate_ties,
    class_prior,
    compare_leanings,
    compare_models,
    compare_runs,
    compare_slices,
    describe_folds,
    draw_groups,
    held_out_prior,
    log_loss,
    measure_optimism,
    p_of_mean,
    paired_difference,
    predict_by_length,
    prior_of,
    proportion_interval,
    read_published,
    reliability_curve,
    row_losses,
    score,
    score_classes,
    share_interval,
    summarise,
    swap_gap,
    worst_battles,
)
from tests.votes import blur, make_votes


def test_log_loss_agrees_with_scikit_learn():
    truth, labels = make_votes(500)
    assert log_loss(truth, labels) == pytest.approx(
        sklearn.metrics.log_loss(labels, truth, labels=[0, 1, 2]), abs=1e-12
    )


def test_log_loss_of_a_hand_worked_example():
    assert log_loss(
        np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), np.array([0, 2])
    ) == pytest.approx(-(np.log(0.5) + np.log(0.6)) / 2)


def test_a_vote_called_impossible_scores_as_in_the_competition():
    assert row_losses(np.array([[1.0, 0.0, 0.0]]), np.array([1]))[0] == pytest.approx(
        -np.log(1e-15), abs=1e-9
    )


def test_rows_that_sum_to_another_value_are_renormalised():
    assert log_loss(np.array([[2.0, 1.0, 1.0]]) / 8, np.array([0])) == pytest.approx(np.log(2))


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="labels"):
        row_losses(np.full((2, 3), 1 / 3), np.array([0]))


def test_scores_of_hand_worked_examples():
    probs, labels = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]), np.array([0, 1])
    found = score(probs, labels)
    assert found["accuracy"] == 0.5
    assert found["brier"] == pytest.approx(((0.16 + 0.09 + 0.01) + (0.01 + 0.64 + 0.49)) / 2)
    # One battle per bin: |1 - .6| and |0 - .7|, weighted alike.
    assert found["ece"] == pytest.approx((0.4 + 0.7) / 2)
    assert found["log_loss"] == log_loss(probs, labels)
    assert all(type(value) is float for value in found.values())


def test_the_swap_gap_is_zero_for_a_mirror():
    probs = np.array([[0.7, 0.2, 0.1]])
    assert swap_gap(probs, swap_probs(probs)) == 0
    assert swap_gap(probs, np.array([[0.3, 0.6, 0.1]])) == pytest.approx(0.2 / 3)


def test_the_class_prior_is_above_zero_for_a_class_without_votes():
    assert class_prior(np.array([0, 0, 1])) == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_the_class_prior_of_a_fold_comes_from_the_other_folds():
    prior = held_out_prior(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]))
    assert prior[0] == pytest.approx(class_prior(np.array([1, 2])))
    assert prior[3] == pytest.approx(class_prior(np.array([0, 0])))


def test_the_interval_of_a_mean_agrees_with_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, np.arange(400), n_boot=2000)
    assert [low, high] == pytest.approx(
        values.mean() + 1.96 * np.array([-1, 1]) * values.std() / 20, abs=0.02
    )


def test_repeating_every_row_in_its_group_adds_no_certainty():
    values = np.random.default_rng(0).normal(size=100)
    once = bootstrap_interval(values, np.arange(100), seed=3)
    assert bootstrap_interval(
        np.repeat(values, 5), np.repeat(np.arange(100), 5), seed=3
    ) == pytest.approx(once)


def test_a_paired_difference_sees_what_single_intervals_cannot():
    losses = np.random.default_rng(0).normal(1, 0.5, size=300)
    gap = paired_difference(losses - 0.01, losses, np.arange(300))
    assert gap == pytest.approx({"mean": -0.01, "low": -0.01, "high": -0.01})


def test_models_are_compared_with_the_reference():
    truth, labels = make_votes(400)
    table = compare_models(
        {"truth": truth, "blurred": blur(truth, 1.0)}, labels, np.arange(400), "truth", n_boot=200
    )
    table = table.set_index("model")
    assert table.loc["truth", "difference"] == 0
    assert table.loc["blurred", "difference_low"] > 0
    assert (table["low"] < table["log_loss"]).all() and (table["log_loss"] < table["high"]).all()


def test_a_calibrated_model_lies_on_the_diagonal():
    truth, labels = make_votes(5000)
    curve = reliability_curve(truth, labels, np.arange(5000))
    assert len(curve) == 30 and curve.groupby("label")["n_rows"].sum().eq(5000).all()
    inside = (curve["low"] <= curve["predicted"]) & (curve["predicted"] <= curve["high"])
    assert inside.mean() > 0.85


def test_a_constant_model_has_one_bin_per_class():
    curve = reliability_curve(np.full((200, 3), 1 / 3), np.arange(200) % 3, np.arange(200))
    assert curve["n_rows"].tolist() == [200, 200, 200]


def test_battles_of_one_prompt_widen_the_intervals_of_a_curve():
    truth, labels = make_votes(400)
    many = np.repeat(np.arange(400), 4)
    single, repeated = (
        reliability_curve(truth[many], labels[many], groups) for groups in (np.arange(1600), many)
    )
    widths = [curve["high"] - curve["low"] for curve in (single, repeated)]
    assert (widths[1] / widths[0]).mean() == pytest.approx(2, abs=0.2)


def test_leanings_of_hand_worked_examples():
    probs, labels = (
        np.array([[0.6, 0.2, 0.2], [0.5, 0.5, 0.0], [0.1, 0.8, 0.1]]),
        np.array([0, 2, 0]),
    )
    sides = {"first": [1, 0, 0], "both": [2.5, 0, -1], "nobody": [0, 0, 0]}
    table = compare_leanings(probs, labels, sides, np.arange(3)).set_index(["leaning", "voter"])
    assert table.loc[("first", "model"), "share"] == pytest.approx(0.75)
    both = table.loc[("both", "model")]
    assert both["share"] == pytest.approx((0.6 + 0.8) / (0.8 + 0.9)) and both["n"] == 2
    assert both["low"] <= both["share"] <= both["high"]
    assert table.loc[("both", "people"), "share"] == 0.5
    assert np.isnan(table.loc[("nobody", "model"), "share"])


def test_intervals_of_a_proportion_match_the_textbook():
    hits, trials = np.array([5, 0]), np.array([10, 0])
    wilson, exact = (np.array(proportion_interval(hits, trials, e)) for e in (False, True))
    assert wilson[:, 0] == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert exact[:, 0] == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert np.isnan(wilson[:, 1]).all() and np.isnan(exact[:, 1]).all()


def test_groups_are_drawn_whole_up_to_the_number_of_battles():
    groups = np.repeat(np.arange(30), 5)
    drawn = draw_groups(groups, 24, seed=1)
    assert len(drawn) == 20 and (np.diff(drawn) > 0).all()
    assert set(np.bincount(groups[drawn])) == {0, 5}
    assert not np.array_equal(drawn, draw_groups(groups, 24, seed=2))
    assert len(draw_groups(groups, 1, seed=1)) == 5 and len(draw_groups([], 9, seed=1)) == 0


def test_the_worst_battles_come_first():
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.05, 0.9, 0.05], [0.4, 0.3, 0.3]])
    assert worst_battles(probs, np.array([0, 0, 0, 0]), n_shown=2).tolist() == [2, 1]


def test_each_class_is_scored_by_its_own_votes():
    sure, labels = np.eye(3) * 0.7 + 0.1, np.array([0, 0, 1, 2])
    table = score_classes(sure[[0, 0, 1, 0]], labels, np.arange(4), n_boot=20)
    assert table["vote"].tolist() == list(LABEL_NAMES) and table["n"].tolist() == [2, 1, 1]
    assert table["share"].tolist() == [0.5, 0.25, 0.25]
    assert table["predicted"].tolist() == pytest.approx([2.5 / 4, 1.1 / 4, 0.1])
    assert table["log_loss"].tolist() == pytest.approx(-np.log([0.8, 0.8, 0.1]))
    assert table["recall"].tolist() == [1, 1, 0]
    assert table["precision"].tolist() == pytest.approx([2 / 3, 1, np.nan], nan_ok=True)
    for name in ("log_loss", "recall"):
        assert table[name].between(table[f"{name}_low"] - 1e-9, table[f"{name}_high"] + 1e-9).all()
    assert (table["share"] * table["log_loss"]).sum() == pytest.approx(
        log_loss(sure[[0, 0, 1, 0]], labels)
    )


def test_a_class_that_nobody_voted_is_left_open():
    table = score_classes(np.full((6, 3), 1 / 3), np.arange(6) % 2, np.arange(6), n_boot=20)
    assert table["n"].tolist() == [3, 3, 0] and table["share"].iloc[2] == 0
    assert table.loc[2, ["log_loss", "log_loss_low", "recall", "recall_high"]].isna().all()


def test_a_share_is_as_uncertain_as_its_groups_are_few():
    hits = np.repeat([1, 0, 0, 1, 0], 20)
    alone = share_interval(hits, np.arange(100))
    assert alone == pytest.approx([float(end) for end in proportion_interval(40, 100)])
    together = share_interval(hits, np.repeat(np.arange(5), 20))
    assert together == pytest.approx([float(end) for end in proportion_interval(2, 5)])
    mixed = share_interval(np.tile([1, 0], 50), np.repeat(np.arange(50), 2))
    assert mixed == pytest.approx([float(end) for end in proportion_interval(50, 100)])
    never = share_interval(np.zeros(40), np.repeat(np.arange(4), 10))
    assert never == pytest.approx([float(end) for end in proportion_interval(0, 4)], abs=1e-9)


def test_a_slope_finds_ties_that_are_spread_too_far_or_too_little():
    truth, labels = make_votes(4000)
    flat = blur(truth, 0, power=0.5)
    models = {"truth": truth, "sharp": blur(truth, 0, power=2.0), "flat": flat}
    models["high"] = np.column_stack([truth[:, :2], 2 * truth[:, 2]]) / (1 + truth[:, 2:])
    table = calibrate_ties(models, labels, np.arange(4000) // 2).set_index("model")
    assert (table["observed"] == (labels == 2).mean()).all() and (table["n"] == 4000).all()
    assert table.loc["truth", "slope_low"] < 1 < table.loc["truth", "slope_high"]
    assert table.loc["truth", "p_value"] > 0.05 > table.loc["high", "p_value"]
    assert table.loc["sharp", "slope_high"] < 1 < table.loc["flat", "slope_low"]
    assert table.loc["high", "predicted"] > table.loc["high", "high"]


@pytest.mark.parametrize(
    ("n_ties", "p_tie"), [(0, None), (20, None), (100, 0.3), (100, "the vote")]
)
def test_without_ties_or_a_spread_no_slope_is_claimed(n_ties, p_tie):
    labels = np.repeat([2, 0], [n_ties, 200 - n_ties])
    tie = np.random.default_rng(0).uniform(0.1, 0.9, 200) if p_tie is None else np.full(200, 0.3)
    tie = (labels == 2).astype(float) if p_tie == "the vote" else tie
    probs = np.column_stack([1 - tie, np.zeros(200), tie])
    found = calibrate_ties({"model": probs}, labels, np.arange(200)).iloc[0]
    assert found[["slope", "slope_low", "slope_high", "p_value"]].isna().all()
    assert found["low"] <= found["observed"] == n_ties / 200 <= found["high"]


def test_folds_are_scored_one_by_one_and_each_vote_counts():
    pairs = pd.DataFrame({"id": [1, 2, 3], "label": [0, 2, 1], "fold": [0, 0, 1], "group": 0})
    pairs = pairs.assign(votes_a=[2, 0, 0], votes_b=[0, 0, 1], votes_tie=[1, 1, 0])
    probs = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    folds = by_fold(probs_table(pairs["id"], probs)[::-1], pairs)
    assert " ".join(folds) == "fold n_pairs log_loss accuracy" and folds["n_pairs"].tolist() == [
        2,
        1,
    ]
    first = -np.log([0.5, 0.5, 0.25, 0.6]).mean()
    assert folds["log_loss"].tolist() == pytest.approx([first, -np.log(0.8)])
    assert folds["accuracy"].tolist() == [0.75, 1]
    told = describe_folds(folds)
    mean, spread = folds["log_loss"].mean(), folds["log_loss"].std()
    assert f"{mean:.4f} ± {spread:.4f}" in told and "87.5 ± 17.7" in told
    assert "2 battles" in describe_folds(folds[:1]) and "nan" not in describe_folds(folds[:1])


def test_a_length_model_is_symmetric_and_learns_from_the_other_folds():
    rng = np.random.default_rng(0)
    n_chars = rng.integers(1, 200, (600, 2))
    gaps = np.log(n_chars[:, 0] / n_chars[:, 1])
    labels = np.where(rng.random(600) < 1 / (1 + np.exp(-2 * gaps)), 0, 1)
    labels[::7] = 2
    pairs = pd.DataFrame({"id": np.arange(600), "label": labels, "fold": np.arange(600) % 3})
    pairs["response_a"] = [("x" * n, None) for n in n_chars[:, 0]]
    pairs["response_b"] = [("x" * n,) for n in n_chars[:, 1]]
    probs = predict_by_length(pairs)
    np.testing.assert_allclose(predict_by_length(swap_pairs(pairs)), swap_probs(probs), atol=1e-4)
    prior = held_out_prior(labels, pairs["fold"].to_numpy())
    assert log_loss(probs, labels) < log_loss(prior, labels) - 0.1
    flipped = pairs.assign(label=np.where(pairs["fold"] == 0, 2, pairs["label"]))
    first = (pairs["fold"] == 0).to_numpy()
    np.testing.assert_allclose(predict_by_length(flipped)[first], probs[first])
    assert predict_by_length(pairs.assign(fold=0)).shape == (600, 3)
    assert (predict_by_length(pairs[labels != 2])[:, 2] == 0).all()


def test_runs_are_compared_on_shared_battles_with_the_prior_of_all():
    truth, labels = make_votes(300)
    pairs = pd.DataFrame({"id": np.arange(300), "label": labels, "fold": np.arange(300) % 2})
    pairs["group"] = pairs["id"]
    shared = pairs[pairs["fold"] == 0].reset_index(drop=True)
    kept = shared["id"].to_numpy()
    table = compare_runs({"blurred": blur(truth, 0.5)[kept]}, shared, pairs, truth[kept], "blurred")
    assert table["model"].tolist() == ["the class prior", "blurred", "the best reachable"]
    assert table["log_loss"].iloc[0] == log_loss(prior_of(pairs)[kept], labels[kept])
    assert table["difference"].iloc[1] == 0
    alone = compare_runs(
        {"blurred": truth[kept]}, shared, pairs, None, "the class prior", n_boot=50
    )
    assert alone["model"].tolist() == ["the class prior", "blurred"]


def test_slices_name_where_the_model_is_worse():
    rng = np.random.default_rng(0)
    losses, groups = rng.normal(1, 0.1, 400), np.arange(400)
    first = groups < 200
    reference = losses + np.where(first, -0.2, 0.2) + rng.normal(0, 0.1, 400)
    table = compare_slices(
        losses,
        {"length only": reference, "prior": reference + 1},
        {"first": first, "last": ~first, "one": groups == 0},
        groups,
        200,
    )
    assert table["slice"].tolist() == ["first", "last"] and table["n_pairs"].tolist() == [200, 200]
    assert table["verdict"].tolist() == ["worse", "better"]
    assert table["difference"].to_numpy() == pytest.approx([0.2, -0.2], abs=0.03)
    assert (table["log_loss"] - table["length only"]).to_numpy() == pytest.approx(
        table["difference"].to_numpy()
    )
    assert (table["prior"] - table["length only"]).to_numpy() == pytest.approx([1, 1])
    same = compare_slices(losses, {"itself": losses}, {"all": first | ~first}, groups, 50)
    assert same["verdict"].tolist() == ["no different"]


def test_published_scores_are_plausible_and_have_a_source():
    table = read_published()
    assert table["log_loss"].between(0.8, 1.1).all() and table["name"].is_unique
    assert (table["source"].str.len() > 10).all() and len(table) >= 8


def test_a_summary_scores_held_out_battles_in_any_order():
    truth, labels = make_votes(400)
    pairs = pd.DataFrame({"id": np.arange(400) + 7, "label": labels})
    pairs = pairs.assign(group=pairs["id"] // 2, fold=pairs["id"] % 4)
    held = np.random.default_rng(0).permutation(np.flatnonzero(pairs["fold"] == 1))
    probs = blur(truth, 0.5).astype(np.float32)
    oof = probs_table(pairs["id"][held], probs[held])
    summary = summarise(oof, pairs, truth[held])
    assert score(probs_of(oof), labels[held]).items() <= summary.items()
    assert summary["log_loss_low"] < summary["log_loss"] < summary["log_loss_high"]
    others = class_prior(labels[pairs["fold"] != 1])
    assert summary["prior_log_loss"] == log_loss(np.tile(others, (100, 1)), labels[held])
    assert summary["oracle_log_loss"] == log_loss(truth[held], labels[held])
    assert summary["excess_log_loss"] == summary["log_loss"] - summary["oracle_log_loss"]
    assert [row["n"] for row in summary["by_class"]] == np.bincount(labels[held]).tolist()
    unknown = probs_table(np.array([1]), probs[:1])
    assert "oracle_log_loss" not in summarise(probs_table(pairs["id"], probs), pairs)
    with pytest.raises(KeyError):
        summarise(unknown, pairs)


def test_each_of_several_votes_on_a_battle_counts_once():
    pairs = pd.DataFrame({"id": [1, 2, 3], "label": [0, 2, 1], "fold": 0, "group": ["a", "b", "c"]})
    pairs = pairs.assign(votes_a=[2, 0, None], votes_b=[0, 0, None], votes_tie=[1, 1, None])
    rows, labels = list_votes(pairs)
    assert rows.tolist() == [0, 0, 0, 1, 2] and labels.tolist() == [0, 0, 2, 2, 1]
    probs = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    summary = summarise(probs_table(pairs["id"], probs)[::-1], pairs)
    each = [0.5, 0.5, 0.25, 0.6, 0.8]
    assert summary["log_loss"] == pytest.approx(-np.log(each).mean())
    plain = pairs.drop(columns=["votes_a", "votes_b", "votes_tie"])
    assert [part.tolist() for part in list_votes(plain)] == [[0, 1, 2], [0, 2, 1]]


def test_means_of_several_columns_are_resampled_together():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(300, 2)), np.arange(300) // 3
    means = bootstrap_means(values, groups, 500)
    assert means.shape == (500, 2)
    low, high = np.quantile(means[:, 1], [0.025, 0.975])
    np.testing.assert_allclose((low, high), bootstrap_interval(values[:, 1], groups, 500))
    twice = bootstrap_means(np.stack([values[:, 0], 2 * values[:, 0]], axis=1), groups, 50)
    np.testing.assert_allclose(twice[:, 1], 2 * twice[:, 0])


@pytest.mark.parametrize(("step", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_optimism_is_what_the_best_of_equals_gains_and_nothing_for_a_clear_winner(step, share):
    """K models on 400 battles in 200 groups; their true losses are 0, step, 2 step, …"""
    rng = np.random.default_rng(1)
    gained, told = [], []
    for _ in range(40):
        noise = rng.normal(size=(200, 8)).repeat(2, axis=0)
        losses = noise + step * np.arange(8)
        best = losses.mean(axis=0).argmin()
        gained.append(step * best - losses[:, best].mean())
        told.append(measure_optimism(losses, np.arange(400) // 2, 100))
    assert np.mean(told) == pytest.approx(share * np.mean(gained), abs=0.015)


def test_p_values_are_uniform_where_nothing_differs_in_spite_of_clusters():
    rng, groups = np.random.default_rng(2), np.arange(400) // 4
    p = [p_of_mean(rng.normal(size=100).repeat(4), groups) for _ in range(400)]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.04)
    shifted = rng.normal(0.5, 1, size=100).repeat(4)
    assert p_of_mean(shifted, groups) < 0.001
    assert p_of_mean(np.zeros(400), groups) == 1.0
    assert np.isnan(p_of_mean(shifted, np.zeros(400)))
