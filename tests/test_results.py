"""README's numbers and figures are those of the committed results."""

import importlib.util
import re

import matplotlib.pyplot as plt
import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from src.utils.paths import ROOT
from src.utils.runs import write_json, write_table


def load(name):
    path = ROOT / "benchmarks" / "results" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record, pictures = load("record"), load("pictures")


def test_the_result_table_of_readme_is_made_from_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(record.START)[1].split(record.END)[0].strip()
    assert shown == record.format_results()


def test_every_figure_of_readme_is_committed():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


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
