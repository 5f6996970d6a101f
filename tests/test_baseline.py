import numpy as np
import pytest
from scipy import sparse

from src.utils.battles.demo import make_battles
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import BaselineConfig
from src.utils.models import baseline as floor
from src.utils.models.baseline import (
    LINEAR_MEMBERS,
    Blocks,
    blend_folds,
    cross_fit,
    cross_validate,
    fit_baseline,
    fit_davidson,
    load_baseline,
    measure_features,
    save_baseline,
)
from src.utils.schema import (
    LABELLED_COLUMNS,
    LABELS,
    check_probs,
    probs_of,
    swap_labels,
    swap_pairs,
    swap_probs,
)
from src.utils.stats.scores import class_prior, log_loss

CONFIG = BaselineConfig(n_hashed=4096, n_trees=10)
TEXT = LINEAR_MEMBERS["text"]


@pytest.fixture(scope="module")
def arena():
    battles, truth = make_battles(1500, seed=3)
    return add_groups_and_folds(battles[list(LABELLED_COLUMNS)], n_folds=3, seed=3), truth


@pytest.fixture(scope="module")
def model(arena):
    return fit_baseline(arena[0], CONFIG)


def block(*matrices):
    return Blocks(tuple((matrix, np.ones(matrix.shape[1])) for matrix in matrices))


def test_blocks_multiply_like_the_matrices_side_by_side():
    rng = np.random.default_rng(0)
    dense, text = rng.normal(size=(6, 3)), sparse.random(6, 5, density=0.5, format="csr", rng=rng)
    scales = np.array([1.0, 2.0, 3.0])
    blocks, whole = (
        Blocks(((dense, scales), (text, np.float32(0.5)))),
        np.hstack([dense * scales, text.toarray() / 2]),
    )
    right, left = rng.normal(size=8), rng.normal(size=6)
    assert blocks.shape == whole.shape
    np.testing.assert_allclose(blocks.times(right), whole @ right)
    np.testing.assert_allclose(blocks.transposed_times(left), whole.T @ left)


def test_what_ties_read_of_a_text_has_no_signs(ugly_pairs):
    features = measure_features(ugly_pairs, CONFIG)
    scaling = floor.Scaling.of(features)
    shared = [scaling.shared_of(part, TEXT).parts[1][0] for part in (features, features.swap())]
    assert shared[0].nnz > 0 and shared[0].min() == 0 and (shared[0] != shared[1]).nnz == 0


def test_features_change_sign_or_stay_under_the_swap(ugly_pairs):
    features, swapped = (
        measure_features(pairs, CONFIG) for pairs in (ugly_pairs, swap_pairs(ugly_pairs))
    )
    np.testing.assert_array_equal(swapped.differences, features.swap().differences)
    np.testing.assert_array_equal(swapped.shared, features.shared)
    for name, block in features.texts.items():
        assert (swapped.texts[name] + block).nnz == 0 and block.nnz > 0


def test_runs_of_bytes_are_marked_once_and_told_apart():
    found = floor._hash_runs(["abab", "abab abab", "xyz", ""], 2**20).toarray()
    assert set(np.unique(found)) == {0, 1}
    assert (found[0] * found[1]).sum() >= 4 and (found[0] * found[2]).sum() == 0
    assert found[3].sum() > 0  # two blanks: an empty answer is something to know


def test_exchanging_the_answers_exchanges_the_columns(model, ugly_pairs):
    probs = model.predict_probs(ugly_pairs)
    np.testing.assert_allclose(
        model.predict_probs(swap_pairs(ugly_pairs)), swap_probs(probs), atol=1e-12
    )
    assert np.abs(probs[:, 0] - probs[:, 1]).max() > 0.01


def test_every_member_is_symmetric_alone(model, ugly_pairs):
    members = model.ensemble.predict(measure_features(ugly_pairs, CONFIG))
    swapped = model.ensemble.predict(measure_features(swap_pairs(ugly_pairs), CONFIG))
    assert tuple(members) == ("style", "words", "text", "trees")
    for name, probs in members.items():
        np.testing.assert_allclose(swapped[name], swap_probs(probs), atol=1e-12, err_msg=name)


def test_a_prediction_does_not_depend_on_its_neighbours(model, ugly_pairs, monkeypatch):
    probs = model.predict_probs(ugly_pairs)
    monkeypatch.setattr(floor, "_CHUNK", 5)
    np.testing.assert_allclose(model.predict_probs(ugly_pairs[::-1])[::-1], probs, atol=1e-12)
    assert model.predict_probs(ugly_pairs.iloc[:0]).shape == (0, len(LABELS))


def test_the_model_on_disk_predicts_the_same(model, ugly_pairs, tmp_path):
    save_baseline(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "baseline.json",
        "linear.safetensors",
        "trees.txt",
    ]
    loaded = load_baseline(tmp_path)
    np.testing.assert_allclose(
        loaded.predict_probs(ugly_pairs), model.predict_probs(ugly_pairs), atol=1e-12
    )
    assert loaded.config == CONFIG and loaded.blend == model.blend


def test_it_learns_what_voters_value(arena, model):
    pairs, truth = arena
    labels = pairs["label"].to_numpy(dtype=int)
    oof = cross_validate(pairs, CONFIG)
    prior = log_loss(np.tile(class_prior(labels), (len(labels), 1)), labels)
    assert list(oof.columns) == ["id", "fold", *LABELS] and (oof["id"] == pairs["id"]).all()
    assert log_loss(truth, labels) < log_loss(probs_of(oof), labels) < prior - 0.10
    effects = model.style_effects().set_index("name")["effect"]
    assert effects["is_refusal"] < 0 < effects["prompt_overlap"]


def test_a_refusal_lowers_the_odds(model, arena):
    pairs = arena[0].head(50)
    refusing = pairs.assign(
        response_a=[("I'm sorry, but I cannot help with that request.",)] * len(pairs)
    )
    assert (model.predict_probs(refusing)[:, 0] < model.predict_probs(pairs)[:, 0]).mean() > 0.8


def test_held_out_votes_do_not_move_their_own_prediction(arena):
    pairs = arena[0].head(300).reset_index(drop=True)
    held_out = (pairs["fold"] == 0).to_numpy()
    features = measure_features(pairs, CONFIG)
    changed = pairs.assign(label=np.where(held_out, (pairs["label"] + 1) % 3, pairs["label"]))
    before, after = cross_fit(pairs, CONFIG, features), cross_fit(changed, CONFIG, features)
    for name in before:
        np.testing.assert_array_equal(before[name][held_out], after[name][held_out], err_msg=name)
        assert not np.array_equal(before[name][~held_out], after[name][~held_out])
    np.testing.assert_array_equal(
        blend_folds(pairs, before)[held_out], blend_folds(changed, before)[held_out]
    )


def test_fitting_the_mirrored_battles_gives_the_same_linear_model(arena):
    pairs = arena[0].head(400)
    features, labels = measure_features(pairs, CONFIG), pairs["label"].to_numpy(dtype=int)
    scaling = floor.Scaling.of(features)
    one, other = (
        fit_davidson(scaling.differences_of(part, TEXT), scaling.shared_of(part, TEXT), votes, 1.0)
        for part, votes in ((features, labels), (features.swap(), swap_labels(labels)))
    )
    np.testing.assert_allclose(other.differences, one.differences, atol=1e-5)
    assert other.intercept == pytest.approx(one.intercept, abs=1e-4)


def test_davidsons_model_is_recovered_from_many_votes():
    rng = np.random.default_rng(0)
    differences, shared = rng.normal(size=(20_000, 3)), rng.normal(size=(20_000, 1))
    weights, tie, intercept = np.array([1.0, -0.5, 0.0]), np.array([0.4]), -0.2
    probs = floor._davidson(differences @ weights, shared @ tie + intercept)
    labels = (rng.random((20_000, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    found = fit_davidson(block(differences), block(shared), labels, ridge=1e-3)
    assert found.differences == pytest.approx(weights, abs=0.05)
    assert found.shared == pytest.approx(tie, abs=0.05) and found.intercept == pytest.approx(
        intercept, abs=0.05
    )


def test_the_fit_is_the_best_penalised_one():
    rng = np.random.default_rng(0)
    differences, shared, labels = (
        rng.normal(size=(200, 2)),
        rng.normal(size=(200, 1)),
        rng.integers(3, size=200),
    )
    found = fit_davidson(block(differences), block(shared), labels, ridge=20.0)

    def penalised_loss(w, v):
        probs = floor._davidson(differences @ w, shared @ v + found.intercept)
        return log_loss(probs, labels) * 200 + 20.0 / 2 * (w @ w + v @ v)

    best, w, v = penalised_loss(found.differences, found.shared), found.differences, found.shared
    for step in (-0.02, 0.02):
        assert penalised_loss(w + np.array([step, 0]), v) > best
        assert penalised_loss(w + np.array([0, step]), v) > best
        assert penalised_loss(w, v + step) > best


def test_ugly_battles_can_be_learned_and_predicted(ugly_pairs):
    oof = cross_validate(ugly_pairs, CONFIG)
    check_probs(probs_of(oof), n_pairs=len(ugly_pairs))


def test_a_single_fold_is_refused(demo_pairs):
    with pytest.raises(ValueError, match="column fold"):
        cross_fit(demo_pairs.assign(fold=0), CONFIG)


def test_a_missing_column_is_named(demo_pairs):
    with pytest.raises(ValueError, match="group"):
        fit_baseline(demo_pairs.drop(columns="group"), CONFIG)


@pytest.mark.slow
def test_real_votes_are_foretold_better_than_by_their_shares(real_pairs):
    labels = real_pairs["label"].to_numpy(dtype=int)
    probs = probs_of(cross_validate(real_pairs, BaselineConfig()))
    assert (
        log_loss(probs, labels) < 1.04
    )  # class prior 1.097, thirteen style features 1.065 to 1.071


@pytest.mark.slow
def test_most_of_what_the_demo_plants_is_learned_from_4000_battles():
    battles, truth = make_battles(4000, seed=20240501)
    pairs = add_groups_and_folds(battles[list(LABELLED_COLUMNS)])
    labels = pairs["label"].to_numpy(dtype=int)
    probs = probs_of(cross_validate(pairs, BaselineConfig(n_trees=20)))
    assert (
        log_loss(probs, labels) - log_loss(truth, labels) < 0.03
    )  # 12,000 battles: 0.011, see notebook 02
