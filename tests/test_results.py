"""README's scores are those of the committed results, and say what each model is."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.results import pictures, record
from src.utils.config import name_model
from src.utils.paths import ROOT
from src.utils.runs import read_json, write_json, write_table


def test_the_result_table_of_readme_is_made_from_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(record.START)[1].split(record.END)[0].strip()
    assert shown == record.format_results()
    assert shown.index("Real battles") < shown.index("Demo arena")


def test_every_committed_result_says_what_its_models_are():
    for name in ("demo", "real"):
        results = read_json(record.RESULTS / f"{name}.json")
        named = {rung["run"]: rung["model"] for rung in results["compared"]["ladder"]}
        for notebook, run in results["runs"].items():
            parameters = run["parameters"]
            if checkpoint := parameters.get("CHECKPOINT"):
                assert named[notebook][3:] == name_model(checkpoint, parameters.get("TRAIN", ""))


def make_rung(model, difference=0.0, spread=0.0, **fields):
    bounds = {"difference_low": difference - spread, "difference_high": difference + spread}
    rung = {"run": "", "model": model, "log_loss": 1.0, "low": 0.98, "high": 1.02, "accuracy": 0.5}
    return rung | bounds | {"difference": difference} | fields


def compare(*rungs, published="02 CPU baseline", oracle=None):
    baseline = make_rung("02 CPU baseline", run="02_baseline")
    compared = {"ladder": [baseline, *rungs], "ladder_minus": "02 CPU baseline"}
    return compared | {"published": published, "oracle_log_loss": oracle}


def test_the_table_compares_all_models_on_the_same_battles():
    decoder = make_rung("04 tiny", 0.05, 0.01, log_loss=1.05)
    text = record.format_suite(compare(decoder, oracle=0.9))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["model", "log loss", "minus 02 CPU baseline", "accuracy"]
    assert lines[2] == ["02 CPU baseline", "**1.000** (0.980 to 1.020)", "–", "50.0%"]
    assert lines[3][1:3] == ["1.050 (0.980 to 1.020)", "+0.050 (+0.040 to +0.060)"]
    assert lines[4][:2] == ["oracle (true probabilities)", "0.900"]


@pytest.mark.parametrize(
    ("difference", "spread", "verdict"),
    [
        (-0.004, 0.003, "a measurable gain"),
        (-0.004, 0.005, "no measurable gain"),
        (0.002, 0.001, "measurably worse"),
    ],
)
def test_what_the_blend_adds_is_said_by_its_interval(difference, spread, verdict):
    text = record.describe_gain(compare(make_rung(record.BLEND, difference, spread)))
    assert verdict in text
    others = {"a measurable gain", "no measurable gain", "measurably worse"} - {verdict}
    assert not [other for other in others if other in text]


def test_a_recorded_suite_is_that_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    compared = compare(make_rung(record.BLEND, 0.002, 0.001)) | {"n_pairs": 9, "machine": "here"}
    for notebook in record.MODELS:
        metrics = {"log_loss": 1.0} | (compared if notebook == "05_ensemble" else {})
        write_json(tmp_path / "runs" / notebook / "metrics.json", metrics)
        write_json(tmp_path / "runs" / notebook / "run.json", {"parameters": {"SEED": 1}})
    write_json(tmp_path / "runs" / "01_eda" / "bias.json", {"n_pairs": 12})
    for name in ("real", "demo"):
        record.record_suite(name, tmp_path / "runs")
    recorded = read_json(tmp_path / "demo.json")
    assert recorded["compared"] == compared and recorded["n_pairs"] == 12
    assert recorded["runs"]["04_qwen"]["parameters"] == {"SEED": 1}
    text = record.format_results()
    assert "12 simulated battles" in text and "the same 9 of them" in text


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
    (tmp_path / "assets").mkdir()
    figures = [tmp_path / "real/01_eda/figures" / f"{name}.png" for name in pictures.EDA_FIGURES]
    for figure in [*figures, tmp_path / "05_ensemble/figures/ladder.png"]:
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_bytes(b"a figure")
    pictures.draw_assets(tmp_path, tmp_path / "assets")
    drawn = {path.stem for path in (tmp_path / "assets").glob("*.png")}
    names = {"gpu_usage", "llm_report", "train_accuracy", "validation_accuracy", "ladder"}
    assert drawn == {*names, *pictures.EDA_FIGURES, "baseline_by_size"}
    plt.close("all")


def test_the_curves_of_the_baseline_are_those_of_the_committed_result():
    result = read_json(record.RESULTS / "baseline.json")
    real, stand_in = result["real_curve"], result["stand_in"]
    fig = pictures.draw_sizes(result)
    left, right = ({line.get_label(): line for line in ax.lines} for ax in fig.axes)
    for name in stand_in["sizes"][0]["models"]:
        losses = [row["log_loss"] for row in real["models"][name]]
        assert left[name].get_xydata().tolist() == np.transpose([real["n_train"], losses]).tolist()
        excess = [size["models"][name]["excess"] for size in stand_in["sizes"]]
        assert right[name].get_ydata().tolist() == excess
    assert {"class prior", "authors\nof equal strength"} <= right.keys()
    plt.close(fig)
