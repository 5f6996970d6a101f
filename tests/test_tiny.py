import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from src.utils.config import FinetuneConfig
from src.utils.models.checkpoints import load_classifier
from src.utils.models.template import encode_pairs, make_template
from src.utils.models.tiny import (
    SURFACE,
    compare_answers,
    find_fields,
    make_tiny_checkpoint,
    prepare_base,
    teach_comparing,
)

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="")


def test_answers_are_compared_by_their_texts_alone(demo_pairs):
    differences = compare_answers(demo_pairs, seed=0)
    assert differences.shape == (300, len(SURFACE) + 8)
    assert (
        compare_answers(demo_pairs.drop(columns=["label", "model_a", "model_b"]), seed=0)
        == differences
    ).all()
    is_longer = demo_pairs["response_a"].map(_count_chars) > demo_pairs["response_b"].map(
        _count_chars
    )
    assert (differences[is_longer, SURFACE.index("n_chars")] > 0).all()


def _count_chars(turns):
    return len("\n".join(turn or "" for turn in turns))


def test_ugly_battles_can_be_compared(ugly_pairs):
    assert np.isfinite(compare_answers(ugly_pairs, seed=0)).all()


@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_each_token_is_told_by_its_field(tmp_path, kind):
    folder = make_tiny_checkpoint(kind, ["cat dog bird fish"] * 5, tmp_path / kind, 0)
    _, tokenizer = load_classifier(FinetuneConfig(checkpoint=str(folder), revision=""))
    battle = pd.DataFrame(
        {"prompt": [("cat",)], "response_a": [("dog dog",)], "response_b": [("bird",)]}
    )
    [row] = encode_pairs(battle, tokenizer, 256)
    [field] = find_fields([row], make_template(tokenizer).pieces)
    text = [
        tokenizer.decode([t for t, f in zip(row, field, strict=True) if f == place])
        for place in range(4)
    ]
    assert all(
        part.rstrip().endswith(word)
        for part, word in zip(text, ("cat", "dog dog", "bird"), strict=False)
    )


def test_a_real_checkpoint_needs_no_base(tmp_path, demo_pairs):
    assert prepare_base(FinetuneConfig(), demo_pairs, tmp_path / "base") is None
    assert not (tmp_path / "base").exists()


def test_votes_do_not_reach_the_base(tmp_path, demo_pairs):
    other = demo_pairs.assign(label=(demo_pairs["label"] + 1) % 3)
    bases = [
        prepare_base(ENCODER, pairs, tmp_path / f"{i}", 2)
        for i, pairs in enumerate((demo_pairs, other))
    ]
    one, two = (load_file(base / "model.safetensors") for base in bases)
    assert all((one[name] == two[name]).all() for name in one)


def test_a_base_is_made_again_for_other_texts_alone(tmp_path, demo_pairs):
    def made(pairs):
        return (
            (prepare_base(ENCODER, pairs, tmp_path / "base", 0) / "tokenizer.json")
            .stat()
            .st_mtime_ns
        )

    first = made(demo_pairs)
    assert made(demo_pairs.assign(label=0)) == first
    assert made(demo_pairs[:50]) != first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_comparing_can_be_learned_and_the_weights_load_again(tmp_path, demo_pairs, kind):
    texts = [turn or "" for turns in demo_pairs["response_a"] for turn in turns]
    folder = make_tiny_checkpoint(kind, texts, tmp_path / kind, 0)
    before = load_file(folder / "model.safetensors")
    assert teach_comparing(folder, demo_pairs, seed=0, n_steps=150) < 0.95
    model, _ = load_classifier(FinetuneConfig(checkpoint=str(folder), revision=""))
    name = next(
        name for name in before if name.endswith("embeddings.weight") or "embed_tokens" in name
    )
    assert not (before[name] == model.state_dict()[name].cpu()).all()
