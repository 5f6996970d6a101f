import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from src.utils.config import FinetuneConfig
from src.utils.models.tiny import STYLE_TARGETS, measure_differences, prepare_base, pretrain

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="")


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_answers_are_compared_by_their_texts_alone(demo_pairs):
    differences = measure_differences(demo_pairs, seed=0)
    assert differences.shape == (300, len(STYLE_TARGETS) + 8)
    texts = demo_pairs.drop(columns=["label", "model_a", "model_b"])
    assert (measure_differences(texts, seed=0) == differences).all()
    n_chars = [
        demo_pairs[name].map(lambda turns: len("\n".join(turn or "" for turn in turns)))
        for name in ("response_a", "response_b")
    ]
    is_longer = (n_chars[0] > n_chars[1]).to_numpy()
    assert (differences[is_longer, STYLE_TARGETS.index("n_chars")] > 0).all()


def test_ugly_battles_can_be_compared(ugly_pairs):
    assert np.isfinite(measure_differences(ugly_pairs, seed=0)).all()


def test_an_unknown_tiny_checkpoint_is_named(tmp_path, demo_pairs):
    with pytest.raises(ValueError, match="tiny:bert"):
        prepare_base(dataclasses.replace(ENCODER, checkpoint="tiny:bert"), demo_pairs, tmp_path)


def test_a_real_checkpoint_needs_no_base(tmp_path, demo_pairs):
    assert prepare_base(FinetuneConfig(), demo_pairs, tmp_path / "base") is None
    assert not (tmp_path / "base").exists()


def test_votes_do_not_reach_the_base_and_the_same_seed_makes_the_same(tmp_path, demo_pairs):
    other = demo_pairs.assign(label=(demo_pairs["label"] + 1) % 3)
    one = read(prepare_base(ENCODER, demo_pairs, tmp_path / "one", 2))
    assert one == read(prepare_base(ENCODER, other, tmp_path / "two", 2))
    seeded = dataclasses.replace(ENCODER, seed=1)
    three = read(prepare_base(seeded, demo_pairs, tmp_path / "three", 2))
    assert three["model.safetensors"] != one["model.safetensors"]


def test_a_base_is_made_again_only_for_other_texts(tmp_path, demo_pairs):
    def made(pairs):
        return prepare_base(ENCODER, pairs, tmp_path / "base", 0).stat().st_mtime_ns

    first = made(demo_pairs)
    assert made(demo_pairs.assign(label=0)) == first
    assert made(demo_pairs[:50]) != first
    assert made(demo_pairs) == first  # kept, because adapters were trained on it
    assert len(list((tmp_path / "earlier").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_a_tiny_model_learns_to_compare(tiny_base, demo_pairs, kind):
    auto = AutoModelForCausalLM if kind == "qwen3" else AutoModelForMaskedLM
    model = auto.from_pretrained(tiny_base(kind))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base(kind))
    before = model.get_input_embeddings().weight.detach().clone()
    losses = pretrain(model, tokenizer, demo_pairs, seed=0, n_steps=300)
    assert losses[:30, 1].mean() > 0.8 and losses[-30:, 1].mean() < 0.5
    assert not torch.equal(before, model.get_input_embeddings().weight)


def test_a_base_without_a_record_is_kept_and_no_kept_one_is_replaced(tmp_path, demo_pairs):
    folder = tmp_path / "base"
    for number in range(2):
        prepare_base(ENCODER, demo_pairs, folder, 0)
        (folder / "made_from.json").unlink()
        (folder / "mark").write_text(str(number))
    prepare_base(ENCODER, demo_pairs, folder, 0)
    kept = {path.parent.name: path.read_text() for path in tmp_path.rglob("mark")}
    assert kept == {"base-damaged": "0", "base-damaged-2": "1"}
    assert (folder / "made_from.json").exists()
