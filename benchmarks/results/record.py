"""Record finished runs of the suite in `benchmarks/results/`, and their table in README.

`make gallery` does it: the demo arena in `demo.json`, real battles in `real.json`. A test compares
README's tables with these files.
"""

from pathlib import Path
from typing import Any

from src.utils.runs import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
START = "<!-- results: made by make gallery -->"
END = "<!-- end of results -->"
MODELS = ("02_baseline", "03_modernbert", "04_qwen", "05_ensemble")
BLEND = "05 blend"
TITLES = {
    "real": "**Real battles** ({n_pairs:,} rows of the competition, models that fit a CPU), "
    "{machine}; every model on the same {n_shared:,} of them, held out:",
    "demo": "**Demo arena** (`make run`: {n_pairs:,} simulated battles, tiny stand-ins), "
    "{machine}; every model on the same {n_shared:,} of them, held out:",
}
FIELDS = (
    "log_loss log_loss_low log_loss_high accuracy n_pairs prior_log_loss oracle_log_loss "
    "excess_log_loss seconds peak_mib machine data_hash config_hash versions"
).split()
COMPARED = ("ladder", "ladder_minus", "published", "oracle_log_loss", "n_pairs", "machine")


def read_run(folder: Path) -> dict[str, Any]:
    """Read the scores and the parameters of one run folder."""
    metrics = read_json(folder / "metrics.json")
    run = {name: metrics.get(name) for name in FIELDS}
    return run | {"parameters": read_json(folder / "run.json")["parameters"]}


def record_suite(name: str, artifacts: Path) -> None:
    """Record the runs of all models as `name`, and the comparison that notebook 05 made of them."""
    metrics = read_json(artifacts / MODELS[-1] / "metrics.json")
    results = {
        "name": name,
        "n_pairs": read_json(artifacts / "01_eda" / "bias.json")["n_pairs"],
        "compared": {field: metrics.get(field) for field in COMPARED},
        "runs": {notebook: read_run(artifacts / notebook) for notebook in MODELS},
    }
    write_json(RESULTS / f"{name}.json", results)


def format_markdown(rows: list[dict[str, str]]) -> str:
    """Format a Markdown table; the keys of the rows are its header."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *[list(row.values()) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_suite(compared: dict[str, Any]) -> str:
    """Format one row per model, all on the same battles; the oracle is known for the demo alone."""
    minus, rows = compared["ladder_minus"], []
    for rung in compared["ladder"]:
        score, difference = f"{rung['log_loss']:.3f}", format_difference(rung)
        if rung["model"] == compared["published"]:
            score = f"**{score}**"
        row = {"model": rung["model"]}
        row["log loss"] = f"{score} ({rung['low']:.3f} to {rung['high']:.3f})"
        row[f"minus {minus}"] = "–" if rung["model"] == minus else difference
        rows.append(row | {"accuracy": f"{rung['accuracy']:.1%}"})
    if oracle := compared["oracle_log_loss"]:
        cells = ("oracle (true probabilities)", f"{oracle:.3f}", "", "")
        rows.append(dict(zip(rows[0], cells, strict=True)))
    return format_markdown(rows)


def format_difference(rung: dict[str, Any]) -> str:
    """Format a paired difference of log losses with its interval."""
    bounds = rung["difference_low"], rung["difference_high"]
    numbers = f"{rung['difference']:+.3f} ({bounds[0]:+.3f} to {bounds[1]:+.3f})"
    return numbers.replace("-", "−")


def describe_gain(compared: dict[str, Any]) -> str:
    """Say in a sentence what the blend adds, and what is published."""
    (rung,) = [rung for rung in compared["ladder"] if rung["model"] == BLEND]
    verdict = "no measurable gain"
    if rung["difference_high"] < 0:
        verdict = "a measurable gain"
    elif rung["difference_low"] > 0:
        verdict = "measurably worse"
    return (
        f"The blend minus {compared['ladder_minus']}, paired: {format_difference(rung)} nats, "
        f"{verdict}. In bold: what is published."
    )


def format_results() -> str:
    """Format the results section of README from the recorded files."""
    parts = []
    for name, title in TITLES.items():
        results = read_json(RESULTS / f"{name}.json")
        compared = results["compared"]
        counts = {"n_pairs": results["n_pairs"], "n_shared": compared["n_pairs"]}
        parts.append(title.format(**counts, machine=compared["machine"]))
        parts += [format_suite(compared), describe_gain(compared)]
    return "\n\n".join(parts)


def write_readme() -> None:
    """Replace the results section of README."""
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    write_text(path, f"{before}{START}\n{format_results()}\n{END}{after}")
