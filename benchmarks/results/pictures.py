"""Draw `assets/` from the runs of `make gallery`: `python -m benchmarks.results.pictures`.

Of real battles the figures of 01; of the demo arena the ladder of 05 and pictures of training:
`train_accuracy.png`, `validation_accuracy.png` and `gpu_usage.png` show both models over the
minutes of training, `llm_report.png` the scalars that TensorBoard shows of 04. Each says which
model and whose battles they are, and whether a GPU was there. `baseline_by_size.png` shows what
`benchmarks/baseline.py` measured.
"""

import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.utils.paths import artifacts_dir
from src.utils.runs import label_member, read_json, read_source, write_figure
from src.utils.stats import model_plots, plots

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ("03_modernbert", "04_qwen")
CURVES = {"train_accuracy": "train_accuracy", "validation_accuracy": "accuracy"}
SCALARS = (
    *("loss/train", "loss/held_out", "accuracy/train", "accuracy/held_out"),
    *("cost/learning_rate", "cost/tokens_per_second", "cost/memory_mib", "cost/reserved_mib"),
)
EDA_FIGURES = (
    "winners models_usage winner_length_diff_count winner_length_prompt_and_diff_length "
    "more_punctuation_winner tokens_length_distribution style_effects models_strength "
    "length_curves position_by prompt_kinds"
).split()
ORANGE = "#E8710A"  # as TensorBoard draws a single run
BASELINE = "CPU baseline"
SIZE_GUIDES = {"class prior": "--", "authors of equal strength": ":"}


def read_scalars(folder: Path) -> dict[str, list[Any]]:
    """Read the scalars of the first model below a `tensorboard/` folder: tag -> its points."""
    first = min(path.parent for path in folder.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(first))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def draw_scalars(scalars: dict[str, list[Any]], title: str) -> plt.Figure:
    """Draw the scalars of one model as TensorBoard lays them out: a card per tag, by step."""
    shown = [tag for tag in SCALARS if tag in scalars]
    n_rows = -(-len(shown) // 4)
    fig, axes = plt.subplots(n_rows, 4, figsize=(12, 2.6 * n_rows), layout="constrained")
    for ax, tag in zip(axes.flat, shown, strict=False):
        ax.plot([p.step for p in scalars[tag]], [p.value for p in scalars[tag]], color=ORANGE)
        ax.set_title(tag, loc="left", fontsize=11)
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=8)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    return fig


def draw_pictures(artifacts: Path, folder: Path) -> None:
    """Draw all four pictures of the runs below `artifacts` into `folder`."""
    plots.use_style()
    source = read_source(artifacts / "01_eda")
    histories = {name: pd.read_csv(artifacts / name / "history.csv") for name in NETWORKS}
    metrics = {name: read_json(artifacts / name / "metrics.json") for name in NETWORKS}
    n_pairs = max(metrics[name]["n_train_pairs"] for name in NETWORKS)
    labels = {name: label_member(artifacts, name) for name in NETWORKS}
    for picture, column in CURVES.items():
        fig, axes = plots.make_figure(len(NETWORKS))
        for ax, (name, history) in zip(axes, histories.items(), strict=True):
            what = picture.replace("_", " ")
            model_plots.plot_history(
                ax, history, {what: column}, what, labels[name], percent_on="y"
            )
        plots.note_source(fig, source, n_pairs)
        write_figure(folder / f"{picture}.png", fig)
    fig, axes = plots.make_figure(len(NETWORKS))
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        model_plots.plot_memory(ax, history)
        title = f"{labels[name]}: {ax.get_title('left').replace('Memory', 'memory')}"
        plots.label_axes(ax, title, ax.get_xlabel(), "MiB")
    plots.note_source(fig, source, n_pairs)
    write_figure(folder / "gpu_usage.png", fig)
    scalars = read_scalars(artifacts / "04_qwen" / "tensorboard")
    device = "GPU" if "cost/reserved_mib" in scalars else "CPU, memory of the process"
    fig = draw_scalars(scalars, labels["04_qwen"])
    what = f"TensorBoard scalars · {device} · {source}"
    plots.note_source(fig, what, metrics["04_qwen"]["n_train_pairs"])
    write_figure(folder / "llm_report.png", fig)


def draw_sizes(result: dict[str, Any]) -> plt.Figure:
    """Draw what members and blend of the CPU baseline lose, by the battles learned from.

    `result` is `baseline.json`: on the left real battles, on the right the stand-in.
    """
    real, stand_in = result["real_curve"], result["stand_in"]
    fig, (left, right) = plots.make_figure(2, tall=True)
    losses = {name: pd.DataFrame(rows) for name, rows in real["models"].items()}
    guides = {"class prior": losses.pop("class prior")["log_loss"].mean()}
    _draw_sizes(left, real["n_train"], losses, "log_loss", guides)
    blend = losses[BASELINE].iloc[-1]
    title = plots.with_interval(blend["log_loss"], blend["low"], blend["high"])
    title = f"Real: {title} nats after {real['n_train'][-1]:,}"
    plots.label_axes(left, title, "battles learned from", "log loss, held out")
    sizes = [size["n_train"] for size in stand_in["sizes"]]
    excess = {}
    for name in stand_in["sizes"][0]["models"]:
        excess[name] = pd.DataFrame([size["models"][name] for size in stand_in["sizes"]])
    guides = {name: stand_in["known"][name]["excess"] for name in SIZE_GUIDES}
    _draw_sizes(right, sizes, excess, "excess", guides)
    best = plots.number(excess[BASELINE]["excess"].iloc[-1])
    title = f"Stand-in: {best} nats above the oracle after {sizes[-1]:,}"
    plots.label_axes(right, title, "battles learned from", "nats above the oracle")
    plots.place_legend(right, fontsize=9)
    source = f"{real['n_pairs']:,} real battles · stand-in made of {stand_in['made_of']}"
    plots.note_source(fig, source, sizes[-1])
    return fig


def _draw_sizes(
    ax: Axes, sizes: list[int], models: dict[str, pd.DataFrame], value: str, guides: dict
) -> None:
    colors = sns.color_palette("colorblind", len(models))
    for color, (name, rows) in zip(colors, models.items(), strict=True):
        is_blend = name == BASELINE
        look = plots.BLACK | {"linewidth": 2, "zorder": 3} if is_blend else {"color": color}
        ax.plot(sizes, rows[value], "o-", markersize=4, label=name, **look)
        if is_blend:
            plots.draw_intervals(ax, rows, value, sizes, vertical=True, color="black")
    for name, level in guides.items():
        ax.axhline(
            level, linestyle=SIZE_GUIDES[name], label=name.replace(" of", "\nof"), color="gray"
        )
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    ax.minorticks_off()


def draw_assets(artifacts: Path, folder: Path) -> None:
    """Copy the figures of 01 and 05, draw the pictures of training and of the baseline's sizes."""
    copied = [artifacts / "real" / "01_eda" / "figures" / f"{name}.png" for name in EDA_FIGURES]
    for source in [*copied, artifacts / "05_ensemble" / "figures" / "ladder.png"]:
        shutil.copyfile(source, folder / source.name)
    draw_pictures(artifacts, folder)
    result = read_json(ROOT / "benchmarks" / "results" / "baseline.json")
    write_figure(folder / "baseline_by_size.png", draw_sizes(result))


if __name__ == "__main__":
    draw_assets(artifacts_dir(), ROOT / "assets")
