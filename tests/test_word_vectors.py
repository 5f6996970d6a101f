"""Static word vectors: means, files, and the package they come from."""

import numpy as np
import pytest

from src.utils.config import BaselineConfig
from src.utils.models.word_vectors import fetch_vectors, load_vectors


def test_a_text_has_the_mean_vector_of_its_words(vectors):
    first, second = (vectors.tokenizer.id_to_token(place) for place in (3, 4))
    one, other, both, none = vectors.embed([first, second, f"{first} {second}", ""])
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    np.testing.assert_allclose(one, vectors.vectors[3].astype(np.float32), atol=1e-6)
    assert (none == 0).all() and one.dtype == np.float32


def test_a_long_text_costs_no_more_than_its_beginning(vectors):
    word = vectors.tokenizer.id_to_token(3)
    beginning = f"{word} " * 1000
    other = vectors.tokenizer.id_to_token(4)
    np.testing.assert_allclose(*vectors.embed([beginning, beginning + f"{other} " * 99]))


def test_vectors_read_the_same_after_saving_and_loading(vectors, tmp_path):
    vectors.save(tmp_path)
    loaded = load_vectors(tmp_path)
    texts = ["word and signs!", vectors.tokenizer.id_to_token(9)]
    np.testing.assert_array_equal(loaded.embed(texts), vectors.embed(texts))


@pytest.mark.parametrize("name", ["vectors.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(vectors, tmp_path, name):
    vectors.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_vectors(tmp_path)


@pytest.mark.slow
def test_the_packages_vectors_know_what_words_mean(word_package):
    vectors = fetch_vectors(BaselineConfig().word_vectors)
    assert vectors.vectors.shape == (32_000, 256) and vectors.vectors.dtype == np.float16
    texts = (
        "How do I bake bread at home?",
        "Knead the dough, let it rise and put the loaf into the oven.",
        "The Supreme Court ruled that the law violates the constitution.",
    )
    question, answer, other = (row / np.linalg.norm(row) for row in vectors.embed([*texts]))
    assert question @ answer > question @ other + 0.2
