"""README's numbers are those of the committed result files."""

import importlib.util
import json
import re

import pytest

from src.utils.paths import ROOT

SPEC = importlib.util.spec_from_file_location(
    "record", ROOT / "benchmarks" / "results" / "record.py"
)
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)


def test_the_result_table_of_readme_is_made_from_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(record.START)[1].split(record.END)[0].strip()
    assert shown == record.format_results()


@pytest.mark.parametrize("name", ["demo", "real"])
def test_committed_results_say_how_they_were_made(name):
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    for notebook, run in results["runs"].items():
        assert run["n_pairs"] > 0
        assert run["versions"]["python"], notebook
        assert run["machine"] and run["data_hash"] and run["config_hash"]
        assert run["log_loss"] < run["prior_log_loss"], (
            f"{notebook} is worse than the class prior; README must say so"
        )


def test_the_baseline_and_the_blend_come_within_two_hundredths_of_the_best_on_the_demo():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    for notebook in ("02_baseline", "05_ensemble"):
        run = results["runs"][notebook]
        assert run["n_pairs"] >= 2000
        assert 0 <= run["excess_log_loss"] < 0.02, notebook


def test_tiny_models_with_a_contrast_come_within_three_hundredths_of_the_best_on_the_demo():
    results = json.loads((ROOT / "benchmarks" / "results" / "heads.json").read_text())
    contrasts = {name: run for name, run in results["runs"].items() if "HEAD=contrast" in name}
    assert len(contrasts) == 3  # the encoder, and the decoder on a 4-bit and on an 8-bit base
    for name, run in contrasts.items():
        assert run["n_pairs"] >= 2000 and 0 <= run["excess_log_loss"] < 0.03, name


def test_every_figure_of_readme_is_committed():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path
