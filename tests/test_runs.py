"""Claims about what a run leaves behind."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.utils import runs
from src.utils.schema import FROZEN_COLUMNS, probs_table


def test_battles_survive_the_disk_exactly(tmp_path: Path, ugly_pairs: pd.DataFrame) -> None:
    pairs = ugly_pairs[list(FROZEN_COLUMNS)]
    runs.write_pairs(tmp_path / "pairs.parquet", pairs)
    again = runs.read_pairs(tmp_path / "pairs.parquet")
    for name in ("prompt", "response_a", "response_b"):
        assert again[name].tolist() == pairs[name].tolist()
    assert runs.hash_pairs(again) == runs.hash_pairs(pairs)


def test_missing_battles_say_which_notebook_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="01_eda"):
        runs.read_pairs(tmp_path / "pairs.parquet")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = runs.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), runs.atomic_path(path) as tmp:
        tmp.write_text("half")
        raise RuntimeError("killed")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_nan_does_not_reach_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(tmp_path / "a.json", {"log_loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "blend.json").write_text('{"half":')
    with pytest.raises(ValueError, match=r"blend\.json: expected JSON"):
        runs.read_json(tmp_path / "blend.json")


def test_the_hash_of_battles_sees_every_part(demo_pairs: pd.DataFrame) -> None:
    whole = runs.hash_pairs(demo_pairs)
    assert runs.hash_pairs(demo_pairs.copy()) == whole
    for name, value in {"label": 2, "fold": 4, "id": 1, "prompt": ("x",)}.items():
        changed = demo_pairs.copy()
        changed.at[0, name] = (
            (0 if changed.at[0, name] == value else value) if name != "prompt" else value
        )
        assert runs.hash_pairs(changed) != whole, name


def test_metrics_are_written_last_and_hold_the_fixed_fields(tmp_path: Path) -> None:
    oof = probs_table([1, 2], np.full((2, 3), 1 / 3), fold=[0, 1])
    config = {"seed": 1}
    metrics = runs.make_metrics(
        {"log_loss": np.float32(1.0), "accuracy": 0.5},
        n_pairs=2,
        seconds=1.234,
        data_hash="d",
        config=config,
    )
    runs.write_run(tmp_path, config=config, oof=oof, metrics=metrics)
    written = runs.read_json(tmp_path / "metrics.json")
    assert {
        "log_loss",
        "accuracy",
        "n_pairs",
        "seconds",
        "peak_mib",
        "versions",
        "data_hash",
        "config_hash",
    } <= set(written)
    assert written["peak_mib"] > 10
    times = [
        (tmp_path / name).stat().st_mtime_ns
        for name in ("config.json", "oof.parquet", "metrics.json")
    ]
    assert times == sorted(times)


def test_a_failed_run_is_not_taken_for_whole(tmp_path: Path) -> None:
    oof = probs_table([1, 2], np.full((2, 3), 1 / 3), fold=[0, 1])
    runs.write_run(tmp_path, config={}, oof=oof, metrics={"log_loss": 1.0})
    with pytest.raises(ValueError):
        runs.write_run(tmp_path, config={}, oof=oof, metrics={"log_loss": float("nan")})
    assert not (tmp_path / "metrics.json").exists()


def test_the_truth_comes_in_the_order_asked_for(tmp_path: Path) -> None:
    assert runs.read_truth(tmp_path, pd.Series([1])) is None
    probs_table([1, 2], np.array([[1, 0, 0], [0, 1, 0]])).to_parquet(tmp_path / "truth.parquet")
    assert runs.read_truth(tmp_path, pd.Series([2, 1])).argmax(axis=1).tolist() == [1, 0]


def test_a_folder_is_compared_with_what_was_written(tmp_path: Path) -> None:
    assert "manifest.json: expected the list of its files" in runs.find_damage(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.bin").write_bytes(b"1234")
    manifest = runs.write_manifest(tmp_path)
    assert runs.find_damage(tmp_path) is None
    (tmp_path / "shards" / "a.bin").write_bytes(b"1235")
    assert "shards/a.bin: expected 4 bytes of hash" in runs.find_damage(tmp_path)
    (tmp_path / "shards" / "a.bin").unlink()
    assert "found no such file" in runs.find_damage(tmp_path)
    manifest.write_text("{")
    assert "manifest.json: expected JSON" in runs.find_damage(tmp_path)
