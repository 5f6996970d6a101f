"""The CPU baseline: its members, and how they are fitted, blended and stored."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from scipy.special import softmax

from src.utils.battles.demo import make_battles
from src.utils.battles.readers import add_groups_and_folds
from src.utils.battles.style import STYLE_FEATURES
from src.utils.battles.time_split import PAST
from src.utils.config import BaselineConfig
from src.utils.models.baseline import (
    LINEAR_MEMBERS,
    Blocks,
    Prior,
    cross_fit,
    fit_baseline,
    fit_davidson,
    linear_inputs,
    load_baseline,
    measure_units,
    save_baseline,
)
from src.utils.models.features import Features, measure_features
from src.utils.models.word_vectors import WordVectors
from src.utils.runs import read_json, write_json
from src.utils.schema import (
    LABELLED_COLUMNS,
    LABELS,
    check_probs,
    swap_labels,
    swap_pairs,
    swap_probs,
)
from src.utils.stats.blend import cross_fit_blend, fit_blend
from src.utils.stats.ranking import davidson_logits
from src.utils.stats.scores import class_prior, log_loss

CONFIG = BaselineConfig(n_hashed=4096, n_trees=10, word_vectors="none")
TEXT = LINEAR_MEMBERS["text"]
REFUSAL = ("I'm sorry, but I cannot help with that request.",)


def predict_held_out(pairs, config=CONFIG):
    """Labels, and the probabilities of members and blend that did not see them."""
    labels = pairs["label"].to_numpy(dtype=int)
    members = cross_fit(pairs, config, measure_features(pairs, config))
    folds = pairs["fold"].to_numpy()
    return labels, cross_fit_blend(members, labels, folds, n_folds=len(set(folds)))


@pytest.fixture(scope="module")
def arena():
    battles, truth = make_battles(1500, seed=3)
    return add_groups_and_folds(battles[list(LABELLED_COLUMNS)], n_folds=3, seed=3), truth


@pytest.fixture(scope="module")
def model(arena):
    return fit_baseline(arena[0], CONFIG)


@pytest.fixture(scope="module")
def read(arena, vectors):
    """The arena's first battles, and a model that reads word vectors, too."""
    pairs = arena[0].head(300)
    features = measure_features(pairs, CONFIG, vectors)
    model = fit_baseline(pairs, CONFIG, features)
    return pairs, replace(model, config=replace(CONFIG, word_vectors="own"), vectors=vectors)


def block(*matrices):
    return Blocks([(matrix, np.ones(matrix.shape[1])) for matrix in matrices])


def test_blocks_multiply_like_the_matrices_side_by_side():
    rng = np.random.default_rng(0)
    dense, text = rng.normal(size=(6, 3)), sparse.random(6, 5, density=0.5, format="csr", rng=rng)
    scales = np.array([1.0, 2.0, 3.0])
    blocks = Blocks([(dense, scales), (text, np.array(0.5))])
    joined = np.hstack([dense * scales, text.toarray() / 2])
    right, left = rng.normal(size=8), rng.normal(size=6)
    assert blocks.width == 8
    np.testing.assert_allclose(blocks.times(right), joined @ right)
    np.testing.assert_allclose(blocks.transposed_times(left), joined.T @ left)


def test_what_a_member_reads_changes_sign_or_stays_the_same_under_the_swap(ugly_pairs, vectors):
    features, swapped = (
        measure_features(pairs, CONFIG, vectors) for pairs in (ugly_pairs, swap_pairs(ugly_pairs))
    )
    units = measure_units(features)
    (signed, unsigned), (signed_swapped, unsigned_swapped) = (
        linear_inputs(part, units, TEXT) for part in (features, swapped)
    )
    weights = np.random.default_rng(0).normal(size=signed.width)
    np.testing.assert_allclose(signed.times(weights), -signed_swapped.times(weights), atol=1e-6)
    weights = weights[: unsigned.width]
    np.testing.assert_allclose(unsigned.times(weights), unsigned_swapped.times(weights), atol=1e-6)
    assert np.ptp(unsigned.times(weights)) > 0


def test_the_prior_variance_is_that_of_the_contribution_to_a_typical_battle(arena, vectors):
    features = measure_features(arena[0], CONFIG, vectors)
    rng = np.random.default_rng(0)
    for name in ("words", "opening", "meaning", "relevance"):
        signed, _ = linear_inputs(features, measure_units(features), Prior({name: 0.3}, {}))
        drawn = [np.mean(signed.times(rng.normal(size=signed.width)) ** 2) for _ in range(300)]
        assert np.mean(drawn) == pytest.approx(0.3, rel=0.2), name
    _, unsigned = linear_inputs(
        features, measure_units(features), Prior({}, {"likeness": 0.2}, {"signs": 0.1})
    )
    drawn = [np.mean(unsigned.times(rng.normal(size=unsigned.width)) ** 2) for _ in range(300)]
    assert np.mean(drawn) == pytest.approx(0.3, rel=0.2)


def test_exchanging_the_answers_exchanges_the_columns(model, ugly_pairs):
    probs = model.predict_probs(ugly_pairs)
    swapped = model.predict_probs(swap_pairs(ugly_pairs))
    np.testing.assert_allclose(swapped, swap_probs(probs), atol=1e-12)
    assert np.abs(probs[:, 0] - probs[:, 1]).max() > 0.01


def test_every_member_is_symmetric_alone(model, ugly_pairs):
    members = model.ensemble.predict(measure_features(ugly_pairs, CONFIG))
    swapped = model.ensemble.predict(measure_features(swap_pairs(ugly_pairs), CONFIG))
    assert tuple(members) == ("style", "words", "text", "trees")
    for name, probs in members.items():
        np.testing.assert_allclose(swapped[name], swap_probs(probs), atol=1e-12, err_msg=name)


def test_a_prediction_does_not_depend_on_other_battles(model, ugly_pairs):
    probs = model.predict_probs(ugly_pairs)
    again = model.predict_probs(ugly_pairs[::-1], n_at_once=5)[::-1]
    np.testing.assert_allclose(again, probs, atol=1e-12)
    assert model.predict_probs(ugly_pairs.iloc[:0]).shape == (0, len(LABELS))


def test_the_model_predicts_the_same_after_saving_and_loading(model, ugly_pairs, tmp_path):
    save_baseline(model, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["baseline.json", "linear.safetensors", "trees.txt"]
    loaded = load_baseline(tmp_path)
    probs = model.predict_probs(ugly_pairs)
    np.testing.assert_allclose(loaded.predict_probs(ugly_pairs), probs, atol=1e-12)
    assert loaded.config == CONFIG and loaded.blend == model.blend


def test_word_vectors_are_saved_with_the_model_and_exchange_with_the_answers(read, tmp_path):
    pairs, model = read
    save_baseline(model, tmp_path)
    loaded = load_baseline(tmp_path)  # needs no package: "own" is none
    probs = model.predict_probs(pairs)
    np.testing.assert_allclose(loaded.predict_probs(pairs), probs, atol=1e-12)
    np.testing.assert_allclose(
        loaded.predict_probs(swap_pairs(pairs)), swap_probs(probs), atol=1e-9
    )
    without = replace(model, vectors=replace_vectors(model.vectors))
    assert np.abs(without.predict_probs(pairs) - probs).max() > 1e-4


@pytest.mark.parametrize("change", ["a block less", "another width"])
def test_a_model_that_reads_other_features_is_refused_with_what_to_do(model, tmp_path, change):
    units = dict(model.ensemble.units)
    if change == "another width":
        units["style"] = units["style"][1:]
    else:
        del units["signs"]
    name = "style" if "width" in change else "signs"
    save_baseline(replace(model, ensemble=replace(model.ensemble, units=units)), tmp_path)
    content = read_json(tmp_path / "baseline.json")
    del content["config"]["word_vectors"]  # as in the first version
    write_json(tmp_path / "baseline.json", content)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*\({name}\).*make run NB=02"):
        load_baseline(tmp_path)


def replace_vectors(vectors):
    return WordVectors(vectors.tokenizer, -vectors.vectors[::-1].copy())


def test_it_learns_what_voters_value(arena, model):
    pairs, truth = arena
    labels, probs = predict_held_out(pairs)
    prior = log_loss(np.tile(class_prior(labels), (len(labels), 1)), labels)
    assert log_loss(truth, labels) < log_loss(probs, labels) < prior - 0.10
    for member in ("words", "text"):
        strong, weak = model.word_weights(["evidence", "vague"], member)
        assert weak < 0 < strong


def test_style_terms_add_up_to_the_log_odds_of_the_style_member_and_change_sign(model, arena):
    pairs = arena[0][:40]
    terms = model.style_terms(pairs)
    assert list(terms.columns) == list(STYLE_FEATURES) and terms.index.equals(pairs.index)
    probs = model.ensemble.predict(measure_features(pairs, model.config))["style"]
    np.testing.assert_allclose(terms.sum(axis=1), np.log(probs[:, 0] / probs[:, 1]), atol=1e-9)
    np.testing.assert_array_equal(model.style_terms(swap_pairs(pairs)), -terms)
    same = pairs.assign(response_b=pairs["response_a"])
    assert (model.style_terms(same) == 0).all(axis=None)
    assert terms.abs().to_numpy().max() > 0.05


def test_a_refusal_lowers_the_odds(model, arena):
    pairs = arena[0].head(50)
    refusing = pairs.assign(response_a=[REFUSAL] * len(pairs))
    assert (model.predict_probs(refusing)[:, 0] < model.predict_probs(pairs)[:, 0]).mean() > 0.8


def test_held_out_votes_do_not_change_their_own_prediction(arena):
    pairs = arena[0].head(300).reset_index(drop=True)
    held_out = (pairs["fold"] == 0).to_numpy()
    features = measure_features(pairs, CONFIG)
    changed = pairs.assign(label=np.where(held_out, (pairs["label"] + 1) % 3, pairs["label"]))
    before = cross_fit(pairs, CONFIG, features)
    after = cross_fit(changed, CONFIG, features)
    for name in before:
        np.testing.assert_array_equal(before[name][held_out], after[name][held_out], err_msg=name)
        assert not np.array_equal(before[name][~held_out], after[name][~held_out])
    blends = []
    for labels in (pairs["label"].to_numpy(), changed["label"].to_numpy()):
        blends.append(cross_fit_blend(before, labels, pairs["fold"].to_numpy(), n_folds=3))
    np.testing.assert_array_equal(blends[0][held_out], blends[1][held_out])
    assert not np.array_equal(blends[0][~held_out], blends[1][~held_out])


def test_fitting_the_mirrored_battles_gives_the_same_linear_model(arena):
    pairs = arena[0].head(400)
    features, labels = measure_features(pairs, CONFIG), pairs["label"].to_numpy(dtype=int)
    signed = {name: -block for name, block in features.signed.items()}
    texts = {name: -block for name, block in features.texts.items()}
    mirrored = Features(signed, features.unsigned, texts)
    units = measure_units(features)
    one = fit_davidson(*linear_inputs(features, units, TEXT), labels, 1.0)
    other = fit_davidson(*linear_inputs(mirrored, units, TEXT), swap_labels(labels), 1.0)
    np.testing.assert_allclose(other.differences, one.differences, atol=1e-5)
    assert other.intercept == pytest.approx(one.intercept, abs=1e-4)


def test_davidsons_model_is_recovered_from_many_votes():
    rng = np.random.default_rng(0)
    differences, shared = rng.normal(size=(20_000, 3)), rng.normal(size=(20_000, 1))
    weights, tie, intercept = np.array([1.0, -0.5, 0.0]), np.array([0.4]), -0.2
    probs = softmax(davidson_logits(differences @ weights, shared @ tie + intercept), axis=1)
    labels = (rng.random((20_000, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    found = fit_davidson(block(differences), block(shared), labels, ridge=1e-3)
    assert found.differences == pytest.approx(weights, abs=0.05)
    assert found.shared == pytest.approx(tie, abs=0.05)
    assert found.intercept == pytest.approx(intercept, abs=0.05)


def test_the_fit_minimises_the_penalised_loss():
    rng = np.random.default_rng(0)
    differences, shared = rng.normal(size=(200, 2)), rng.normal(size=(200, 1))
    labels = rng.integers(3, size=200)
    found = fit_davidson(block(differences), block(shared), labels, ridge=20.0)

    def penalised_loss(w, v):
        probs = softmax(davidson_logits(differences @ w, shared @ v + found.intercept), axis=1)
        return log_loss(probs, labels) * 200 + 20.0 / 2 * (w @ w + v @ v)

    w, v = found.differences, found.shared
    best = penalised_loss(w, v)
    for step in (-0.02, 0.02):
        assert penalised_loss(w + np.array([step, 0]), v) > best
        assert penalised_loss(w + np.array([0, step]), v) > best
        assert penalised_loss(w, v + step) > best


def test_shares_of_votes_count_as_much_as_the_same_votes_one_by_one(arena):
    rng = np.random.default_rng(0)
    differences, shared = rng.normal(size=(300, 2)), rng.normal(size=(300, 1))
    counts = rng.multinomial(4, [0.5, 0.2, 0.3], size=300)
    rows, labels = np.nonzero(counts)
    rows, labels = rows.repeat(counts[rows, labels]), labels.repeat(counts[rows, labels])
    one = fit_davidson(block(differences), block(shared), counts / 4, ridge=1.0)
    other = fit_davidson(block(differences[rows]), block(shared[rows]), labels, ridge=4.0)
    np.testing.assert_allclose(one.differences, other.differences, atol=1e-3)
    assert one.intercept == pytest.approx(other.intercept, abs=1e-3)

    pairs = arena[0].head(400)
    votes = np.eye(3, dtype=int)[pairs["label"]]
    same = pairs.assign(votes_a=votes[:, 0], votes_b=votes[:, 1], votes_tie=votes[:, 2])
    split = same.assign(votes_a=1, votes_b=1, votes_tie=6)
    features = measure_features(pairs, CONFIG)
    before = cross_fit(pairs, CONFIG, features)
    for name, probs in cross_fit(same, CONFIG, features).items():
        np.testing.assert_array_equal(probs, before[name])
    for probs in cross_fit(split, CONFIG, features).values():
        np.testing.assert_allclose(probs.mean(axis=0), [0.125, 0.125, 0.75], atol=0.05)


def test_ugly_battles_can_be_learned_and_predicted(ugly_pairs):
    _, probs = predict_held_out(ugly_pairs)
    check_probs(probs, n_pairs=len(ugly_pairs))


def test_a_single_fold_and_a_missing_column_are_refused(demo_pairs):
    features = measure_features(demo_pairs, CONFIG)
    with pytest.raises(ValueError, match=r"column fold.*\[0\]"):
        cross_fit(demo_pairs.assign(fold=0), CONFIG, features)
    with pytest.raises(ValueError, match="group"):
        fit_baseline(demo_pairs.drop(columns="group"), CONFIG, features)


@pytest.mark.slow
def test_real_votes_are_predicted_better_than_by_the_class_prior(real_pairs, word_package):
    labels, probs = predict_held_out(real_pairs, BaselineConfig())
    # Class prior 1.097, thirteen style features 1.065 to 1.071.
    assert log_loss(probs, labels) < 1.03


@pytest.mark.slow
def test_most_of_what_the_demo_plants_is_learned_from_4000_battles():
    battles, truth = make_battles(4000, seed=20240501)
    pairs = add_groups_and_folds(battles[list(LABELLED_COLUMNS)])
    config = BaselineConfig(n_trees=20, word_vectors="none")
    labels, probs = predict_held_out(pairs, config)
    # From 12,000 battles: within 0.011, see notebook 02.
    assert log_loss(probs, labels) - log_loss(truth, labels) < 0.03


def test_battles_of_the_past_are_learned_from_and_not_scored(arena):
    pairs = arena[0].head(600)
    past = pairs.assign(fold=np.where(pairs["fold"] == 0, 0, PAST))
    features = measure_features(past, CONFIG)
    members = cross_fit(past, CONFIG, features)
    of_all = cross_fit(pairs, CONFIG, features)
    scored = (past["fold"] == 0).to_numpy()
    for name, probs in members.items():
        np.testing.assert_allclose(probs, of_all[name][scored])
    fitted = fit_baseline(past, CONFIG, features, members)
    assert fitted.blend == fit_blend(members, past["label"].to_numpy(dtype=int)[scored])
