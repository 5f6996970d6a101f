"""Record a finished run: its scores in `benchmarks/results/`, its table in README.

    python benchmarks/results/record.py demo artifacts
    python benchmarks/results/record.py real artifacts/pocket
    python benchmarks/results/record.py heads artifacts
    python benchmarks/results/record.py eda artifacts/eda

`heads` reads the searches of `benchmarks/heads_*.yaml`. `eda` copies figures only, from a run
with few battles per chatbot and the real vocabularies:

    make run NB=01 DATA=… ARTIFACTS=artifacts/eda SET="01.MIN_BATTLES=15 01.TOKENIZERS=[/…,/…]"

A test compares README's tables with these files.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from src.utils.config import name_model
from src.utils.runs import hash_pairs, read_json, read_pairs, write_json, write_text
from src.utils.stats.blend import cross_fit_blend, read_members
from src.utils.stats.scores import compare_models

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
START = "<!-- results: made by benchmarks/results/record.py -->"
END = "<!-- end of results -->"
MODELS = {
    "02_baseline": "02 CPU baseline",
    "03_modernbert": "03 encoder",
    "04_qwen": "04 decoder",
    "05_ensemble": "05 blend",
}
BASELINE, BLEND = "02_baseline", "05_ensemble"
SEARCHES = {"heads_03": "03_modernbert", "heads_04": "04_qwen"}
WEIGHTS = {"none": "32-bit", "4bit": "NF4, LoRA", "8bit": "8-bit, LoRA"}
TITLES = {
    "real": "**Real battles** ({n_pairs:,} rows of the competition, models that fit a CPU), "
    "{machine}:",
    "demo": "**Demo arena** (`make run`: {n_pairs:,} simulated battles, tiny stand-ins), "
    "{machine}:",
    "heads": "**Both heads on the demo arena** (log loss, and its distance from the oracle):",
}
FIELDS = (
    "log_loss log_loss_low log_loss_high accuracy n_pairs prior_log_loss oracle_log_loss "
    "excess_log_loss seconds peak_mib machine data_hash config_hash versions"
).split()
EDA_FIGURES = (
    "winners models_usage winner_length_diff_count winner_length_prompt_and_diff_length "
    "more_punctuation_winner tokens_length_distribution style_effects models_strength "
    "length_curves position_by prompt_kinds"
).split()


def read_run(folder: Path) -> dict[str, Any]:
    """Read the scores and the parameters of one run folder."""
    metrics = read_json(folder / "metrics.json")
    run = {name: metrics.get(name) for name in FIELDS}
    return run | {"parameters": read_json(folder / "run.json")["parameters"]}


def collect_suite(name: str, artifacts: Path) -> dict[str, Any]:
    """Collect the runs of all models, and their differences to the CPU baseline."""
    summary = read_json(artifacts / "summary.json")
    runs = {notebook: read_run(artifacts / notebook) for notebook in MODELS}
    for notebook, difference in compare_runs(artifacts, runs[BLEND]["parameters"]).items():
        runs[notebook]["difference"] = difference
    for notebook, run in runs.items():
        file = "blend.json" if notebook == BLEND else "config.json"
        run["what_it_is"] = describe_model(notebook, read_json(artifacts / notebook / file))
    return {
        "name": name,
        "n_pairs": read_json(artifacts / "01_eda" / "bias.json")["n_pairs"],
        "seconds_of_all_notebooks": round(sum(row["seconds"] for row in summary), 1),
        "runs": runs,
    }


def compare_runs(artifacts: Path, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Compare networks and blend with the CPU baseline, on the battles that all of them held out.

    The blend is the one that notebook 05 fits with `settings`, whether or not it is published.

    Returns:
        Notebook -> mean, low, high (95 %): its log loss minus the baseline's, paired.
    """
    battles = read_pairs(artifacts / "01_eda" / "pairs.parquet")
    folders: dict[str, Path | None] = {name: artifacts / name for name in MODELS if name != BLEND}
    members, pairs, _ = read_members(folders, battles, hash_pairs(battles))
    labels, groups = pairs["label"].to_numpy(), pairs["group"].to_numpy()
    n_folds, seed, n_bootstrap = (settings[name] for name in ("N_FOLDS", "SEED", "N_BOOTSTRAP"))
    blended = cross_fit_blend(members, labels, groups, n_folds, seed)
    models = {**members, BLEND: blended}
    table = compare_models(models, labels, groups, BASELINE, n_bootstrap, seed).set_index("model")
    columns = {"mean": "difference", "low": "difference_low", "high": "difference_high"}
    return {
        name: {key: float(table.loc[name, column]) for key, column in columns.items()}
        for name in models
        if name != BASELINE
    }


def describe_model(notebook: str, config: dict[str, Any]) -> str:
    """Say in a few words what a notebook's model really is; `config` is what it wrote of itself."""
    if notebook == BASELINE:
        return "kernels and trees on words, characters and style"
    if notebook == BLEND:
        weights = dict(zip(config["members"], config["weights"], strict=True))
        used = [f"{name[:2]} {weight:.0%}" for name, weight in weights.items() if weight >= 0.005]
        return "weighted mean: " + ", ".join(used) if len(used) > 1 else f"{used[0][:2]} alone"
    words = {"all": "all weights trained", "lora": "LoRA", "head": "frozen, a head trained"}
    return f"{name_model(config['checkpoint'])}, {words[config['train']]}"


def collect_heads(artifacts: Path) -> dict[str, Any]:
    """Collect the runs of both searches over heads, the encoder's first."""
    runs = {}
    for search, notebook in SEARCHES.items():
        for path in sorted((artifacts / "searches" / search).glob(f"*/{notebook}/metrics.json")):
            values = path.parents[1].name.partition(",")[2]  # after the trial's number
            runs[f"{notebook}, {values}"] = read_run(path.parent)
    commands = [f"make search SPACE=benchmarks/{search}.yaml" for search in SEARCHES]
    return {"name": "heads", "commands": commands, "runs": runs}


def format_markdown(rows: list[dict[str, str]]) -> str:
    """Format a Markdown table; the keys of the rows are its header."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *[list(row.values()) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_suite(results: dict[str, Any]) -> str:
    """Format one row per model; the oracle is known for the demo arena only."""
    rows = []
    for notebook, run in results["runs"].items():
        score = f"**{run['log_loss']:.3f}**"
        if run["log_loss_low"] is not None:
            score += f" ({run['log_loss_low']:.3f} to {run['log_loss_high']:.3f})"
        row = {"model": MODELS[notebook], "what it is": run["what_it_is"], "log loss": score}
        row["minus CPU baseline"] = format_difference(run.get("difference"))
        row["class prior"] = f"{run['prior_log_loss']:.3f}"
        if run["oracle_log_loss"] is not None:
            row["oracle"] = f"{run['oracle_log_loss']:.3f}"
        row["accuracy"] = f"{run['accuracy']:.1%}"
        row["held-out battles"] = f"{run['n_pairs']:,}"
        rows.append(row)
    return format_markdown(rows)


def format_difference(difference: dict[str, float] | None) -> str:
    """Format a paired difference of log losses with its interval."""
    if difference is None:
        return "–"
    return "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference).replace("-", "−")


def describe_gain(difference: dict[str, float]) -> str:
    """Say in a sentence whether the blend is worth its cost."""
    gains = difference["high"] < 0
    verdict = "a gain by more than chance" if gains else "no measurable gain"
    return f"Blend minus CPU baseline, paired: {format_difference(difference)} nats, {verdict}."


def format_heads(results: dict[str, Any]) -> str:
    """Format one row per model and kind of weights, one column per head."""
    scores: dict[tuple[str, str], dict[str, str]] = {}
    for name, run in results["runs"].items():
        parameters = run["parameters"]
        weights = WEIGHTS[parameters.get("QUANTIZATION", "none")]
        by_head = scores.setdefault((MODELS[name.split(", ")[0]], weights), {})
        by_head[parameters["HEAD"]] = f"{run['log_loss']:.3f} (+{run['excess_log_loss']:.3f})"
    rows = []
    for (model, weights), by_head in scores.items():
        row = {"model": model, "weights": weights, "joint head": by_head["joint"]}
        rows.append(row | {"with contrast": f"**{by_head['contrast']}**"})
    return format_markdown(rows)


def format_results() -> str:
    """Format the results section of README from the recorded files."""
    parts = []
    for name, title in TITLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            results = read_json(path)
            machine = next(iter(results["runs"].values()))["machine"]
            parts.append(title.format(n_pairs=results.get("n_pairs", 0), machine=machine))
            if name == "heads":
                parts.append(format_heads(results))
            else:
                parts.append(format_suite(results))
                if difference := results["runs"][BLEND].get("difference"):
                    parts.append(describe_gain(difference))
    return "\n\n".join(parts)


def write_readme() -> None:
    """Replace the results section of README."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(START)
    after = rest.split(END)[1]
    write_text(path, f"{before}{START}\n{format_results()}\n{END}{after}")


def main() -> None:
    """Record one run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=["demo", "real", "heads", "eda"])
    parser.add_argument("artifacts", type=Path)
    options = parser.parse_args()
    name, artifacts = options.name, options.artifacts
    (ROOT / "assets").mkdir(exist_ok=True)
    if name == "heads":
        write_json(RESULTS / "heads.json", collect_heads(artifacts))
    elif name == "eda":
        for figure in EDA_FIGURES:
            source = artifacts / "01_eda" / "figures" / f"{figure}.png"
            shutil.copyfile(source, ROOT / "assets" / source.name)
    else:
        write_json(RESULTS / f"{name}.json", collect_suite(name, artifacts))
    if name == "demo":
        source = artifacts / "05_ensemble" / "figures" / "ladder.png"
        shutil.copyfile(source, ROOT / "assets" / source.name)
    write_readme()


if __name__ == "__main__":
    main()
