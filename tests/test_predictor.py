"""Claims about finding a model, whatever form it has, and about loading it once."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from src.utils.config import FinetuneConfig
from src.utils.delivery.predictor import Predictor, find_model, list_files
from src.utils.delivery.submit import Models, predict_submission
from src.utils.models import checkpoints
from src.utils.runs import read_json
from src.utils.schema import swap_pairs, swap_probs
from src.utils.stats.blend import Blend

MEMBERS = ["02_baseline", "03_modernbert", "04_qwen"]


@pytest.fixture
def pairs(demo_pairs) -> pd.DataFrame:
    return demo_pairs[:12].reset_index(drop=True)


@pytest.fixture
def artifacts(small_artifacts, tmp_path):
    """A copy, to damage."""
    return shutil.copytree(small_artifacts, tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("place", "members"),
    [
        ("", MEMBERS),
        ("05_ensemble", MEMBERS),
        ("02_baseline", MEMBERS[:1]),
        ("04_qwen", MEMBERS[2:]),
    ],
)
def test_a_model_is_found_by_its_folder(small_artifacts, place, members):
    source = find_model(small_artifacts / place)
    assert list(source.runs) == list(source.blend.members) == members


def test_an_artifacts_folder_without_a_blend_gives_the_baseline(artifacts):
    shutil.rmtree(artifacts / "05_ensemble")
    assert list(find_model(artifacts).runs) == MEMBERS[:1]


def test_what_is_no_model_is_named_with_what_is_there(artifacts, tmp_path):
    for name in ("05_ensemble", "02_baseline"):
        shutil.rmtree(artifacts / name)
    with pytest.raises(FileNotFoundError, match="03_modernbert"):
        find_model(artifacts)
    with pytest.raises(FileNotFoundError, match="none/of/these"):
        find_model("none/of/these")


def test_a_hub_id_that_the_hub_lacks_is_named(monkeypatch):
    def fail(name, **options):
        assert options["revision"] == "abc" and not any(
            ".py" in x for x in options["allow_patterns"]
        )
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"owner/name.*offline"):
        find_model("owner/name", "abc")


def test_a_hub_id_is_read_as_a_published_folder(small_artifacts, pairs, tmp_path, monkeypatch):
    merged = publish(small_artifacts, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(merged))
    predictor = Predictor("owner/name")
    predictor.load_networks()
    assert list(predictor.predict(pairs).members) == ["owner/name"]


def publish(artifacts, folder):
    """Merge 04 as notebook 07 does."""
    run = artifacts / "04_qwen"
    config = FinetuneConfig.from_json(read_json(run / "config.json"))
    model = checkpoints.merge(run / "model" / "fold_0", config)
    return checkpoints.save_model(*model, folder / "07_publish" / "model")


def test_a_published_model_predicts_what_its_run_predicts(small_artifacts, pairs, tmp_path):
    merged = publish(small_artifacts, tmp_path)
    probs = []
    for place in (small_artifacts / "04_qwen", merged, merged.parent):
        predictor = Predictor(place)
        predictor.load_networks()
        probs.append(predictor.predict(pairs).probs)
    assert np.abs(probs[1] - probs[0]).max() < 1e-5
    assert (probs[2] == probs[1]).all()


def test_a_predictor_gives_what_the_submission_gives_and_is_symmetric(small_artifacts, pairs):
    predictor = Predictor(small_artifacts)
    source = predictor.source
    alone = predictor.predict(pairs)
    assert list(alone.members) == MEMBERS[:1] and not predictor.is_ready
    predictor.load_networks()
    answer = predictor.predict(pairs)
    outcome = predict_submission(
        pairs, source.runs, source.blend, None, deadline_s=60.0, models=Models(0)
    )
    assert np.abs(answer.probs - outcome.probs).max() < 1e-12
    assert list(answer.members) == MEMBERS and set(answer.swap_gaps) == set(MEMBERS[1:])
    exchanged = swap_probs(predictor.predict(swap_pairs(pairs)).probs)
    assert np.abs(exchanged - answer.probs).max() < 1e-9
    assert np.abs(alone.probs - answer.probs).max() > 1e-3


def test_networks_of_weight_zero_are_loaded_and_asked_only_on_demand(artifacts, pairs):
    path = artifacts / "05_ensemble" / "blend.json"
    blend = dataclasses.replace(Blend.from_json(read_json(path)), weights=(1.0, 0.0, 0.0))
    path.write_text(json.dumps(blend.to_json()))
    predictor = Predictor(artifacts)
    predictor.load_networks()
    assert list(predictor.predict(pairs).members) == MEMBERS[:1]
    predictor.load_networks(ask_all=True)
    asked = predictor.predict(pairs, ask_all=True)
    assert list(asked.members) == MEMBERS
    assert np.abs(asked.probs - predictor.predict(pairs).probs).max() < 1e-6


def test_a_network_that_cannot_be_loaded_is_named_and_the_others_predict(artifacts, pairs):
    (artifacts / "03_modernbert" / "model" / "fold_0" / "model.safetensors").write_bytes(b"no")
    predictor = Predictor(artifacts)
    with pytest.raises(RuntimeError, match="03_modernbert"):
        predictor.load_networks()
    assert list(predictor.predict(pairs).members) == [MEMBERS[0], MEMBERS[2]]


def test_members_are_named_for_what_they_are(small_artifacts):
    predictor = Predictor(small_artifacts)
    names = [predictor.name(member) for member in MEMBERS]
    assert names == ["CPU baseline", "tiny encoder (stand-in)", "tiny decoder (stand-in)"]


def test_without_time_the_baseline_answers_for_every_battle(small_artifacts, pairs):
    predictor = Predictor(small_artifacts)
    baseline = predictor.predict(pairs).probs
    predictor.load_networks()
    answer = predictor.predict(pairs, 1e-6)
    assert np.abs(answer.probs - baseline).max() < 1e-12 and answer.notes


def test_files_of_a_zip_are_listed(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    shutil.make_archive(str(tmp_path / "z"), "zip", tmp_path, "a.csv")
    assert list_files(tmp_path / "z.zip") == [tmp_path / "z.zip" / "a.csv"]
    assert list_files(tmp_path / "a.csv") == [tmp_path / "a.csv"]
