import numpy as np
import pytest
from safetensors.torch import load_file

from src.utils.config import FinetuneConfig
from src.utils.models import load_classifier, make_tiny_checkpoint
from src.utils.tiny import make_lessons, prepare_base, teach_lengths

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="")


def test_lessons_are_labelled_by_length_and_by_nothing_else():
    lessons = make_lessons(["one two three", "many words " * 50, ""], 300, seed=0)
    a, b = (lessons[name].map(lambda turns: len(turns[0])).to_numpy() for name in ("response_a", "response_b"))
    ratio, label = np.log(a / b), lessons["label"].to_numpy()
    assert (ratio[label == 0] > 0.25).all() and (ratio[label == 1] < -0.25).all()
    assert (np.abs(ratio[label == 2]) <= 0.25).all()
    assert np.bincount(label, minlength=3).min() > 30


def test_a_real_checkpoint_needs_no_base(tmp_path, demo_pairs):
    assert prepare_base(FinetuneConfig(), demo_pairs, tmp_path / "base") is None
    assert not (tmp_path / "base").exists()


def test_votes_do_not_reach_the_base(tmp_path, demo_pairs):
    other = demo_pairs.assign(label=(demo_pairs["label"] + 1) % 3)
    bases = [prepare_base(ENCODER, pairs, tmp_path / f"{i}", 2) for i, pairs in enumerate((demo_pairs, other))]
    one, two = (load_file(base / "model.safetensors") for base in bases)
    assert all((one[name] == two[name]).all() for name in one)


def test_a_base_is_made_again_for_other_texts_alone(tmp_path, demo_pairs):
    def made(pairs):
        return (prepare_base(ENCODER, pairs, tmp_path / "base", 0) / "tokenizer.json").stat().st_mtime_ns

    first = made(demo_pairs)
    assert made(demo_pairs.assign(label=0)) == first
    assert made(demo_pairs[:50]) != first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_lengths_can_be_learned_and_the_weights_load_again(tmp_path, kind):
    texts = ["the quick brown fox jumps over the lazy dog"] * 5
    folder = make_tiny_checkpoint(kind, texts, tmp_path / kind, 0)
    before = load_file(folder / "model.safetensors")
    assert teach_lengths(folder, texts, seed=0, n_steps=120) < 1.0
    model, _ = load_classifier(FinetuneConfig(checkpoint=str(folder), revision=""))
    name = next(name for name in before if name.endswith("embeddings.weight") or "embed_tokens" in name)
    assert not (before[name] == model.state_dict()[name].cpu()).all()
