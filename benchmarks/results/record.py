"""Record a finished run of the suite: scores to `benchmarks/results/`, the table to README.

    python benchmarks/results/record.py demo artifacts
    python benchmarks/results/record.py real artifacts/real
    python benchmarks/results/record.py heads artifacts
    python benchmarks/results/record.py eda artifacts/eda

Every number of README's result tables comes from the files that this writes; a test
compares the two. `heads` are the sweeps of `benchmarks/heads_*.yaml`. The last line takes
figures alone, of a run with few battles a chatbot and the real vocabularies:

    make run NB=01 DATA="…" ARTIFACTS=artifacts/eda SET="01.MIN_BATTLES=15 01.TOKENIZERS=[/…/qwen2_5,/…/olmo_bpe]"
"""

import argparse
import json
import shutil
from pathlib import Path

from src.utils.runs import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCORED = ("02_baseline", "03_modernbert", "04_qwen", "05_ensemble")
EDA_FIGURES = (
    "winners models_usage models_win_rate winner_length_diff_count winner_length_prompt_and_diff_length "
    "more_punctuation_winner tokens_length_distribution style_effects models_strength length_curves position_by"
).split()
SWEEPS = {"heads_03": "03_modernbert", "heads_04": "04_qwen"}
FIGURES = {
    "demo": {"05_ensemble/figures/ladder.png": "ladder.png"},
    "real": {},
    "heads": {},
    "eda": {f"01_eda/figures/{name}.png": f"{name}.png" for name in EDA_FIGURES},
}
START, END = "<!-- results: made by benchmarks/results/record.py -->", "<!-- end of results -->"
BASES = {"none": "32-bit", "4bit": "NF4, LoRA", "8bit": "8-bit, LoRA"}
CAPTIONS = {
    "02_baseline": "02 floor, CPU",
    "03_modernbert": "03 ModernBERT",
    "04_qwen": "04 Qwen3",
    "05_ensemble": "05 blend",
}
FIELDS = (
    "log_loss log_loss_low log_loss_high accuracy n_pairs prior_log_loss oracle_log_loss excess_log_loss "
    "seconds peak_mib machine data_hash config_hash versions"
).split()


def collect_results(name: str, artifacts: Path) -> dict:
    """Take what README tells of a run out of its `metrics.json` files and stamps."""
    runs = {notebook: _read_run(artifacts / notebook) for notebook in SCORED}
    summary = read_json(artifacts / "summary.json")
    data = read_json(artifacts / "01_eda" / "bias.json")
    return {
        "name": name,
        "n_pairs": data["n_pairs"],
        "seconds_of_all_notebooks": round(sum(row["seconds"] for row in summary), 1),
        "runs": runs,
    }


def _read_run(folder: Path) -> dict:
    metrics = read_json(folder / "metrics.json")
    parameters = read_json(folder / "run.json")["parameters"]
    return {field: metrics.get(field) for field in FIELDS} | {"parameters": parameters}


def collect_sweeps(artifacts: Path) -> dict:
    """Take the runs of both sweeps over heads out of their folders, the encoder's first."""
    runs = {}
    for sweep, notebook in SWEEPS.items():
        for path in sorted((artifacts / "sweeps" / sweep).glob(f"*/{notebook}/metrics.json")):
            runs[f"{notebook}, {path.parents[1].name}"] = _read_run(path.parent)
    commands = [f"make sweep SWEEP=benchmarks/{sweep}.yaml" for sweep in SWEEPS]
    return {"name": "heads", "commands": commands, "runs": runs}


def format_heads(results: dict) -> str:
    """One line a model and base, one column a head, as Markdown."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, run in results["runs"].items():
        model, chosen = CAPTIONS[name.split(", ")[0]], run["parameters"]
        loss = f"{run['log_loss']:.3f} (+{run['excess_log_loss']:.3f})"
        rows.setdefault((model, BASES[chosen.get("QUANTIZATION", "none")]), {})[chosen["HEAD"]] = (
            loss
        )
    head = ["model", "weights", "joint head", "with contrast"]
    return _join(
        [
            head,
            *([*row, losses["joint"], f"**{losses['contrast']}**"] for row, losses in rows.items()),
        ]
    )


def _join(lines: list[list[str]]) -> str:
    """A table as Markdown; the first line is its head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_table(results: dict) -> str:
    """One line a model, as Markdown."""
    known = results["runs"]["05_ensemble"].get("oracle_log_loss") is not None
    head = [
        "model",
        "log loss",
        "class prior",
        *(["best reachable"] if known else []),
        "accuracy",
        "held-out battles",
    ]
    lines = [head]
    for notebook, run in results["runs"].items():
        best = [f"{run['oracle_log_loss']:.3f}"] if known else []
        score = f"**{run['log_loss']:.3f}**"
        if run.get("log_loss_low") is not None:
            score += f" ({run['log_loss_low']:.3f} to {run['log_loss_high']:.3f})"
        lines.append(
            [
                CAPTIONS[notebook],
                score,
                f"{run['prior_log_loss']:.3f}",
                *best,
                f"{run['accuracy']:.1%}",
                f"{run['n_pairs']:,}",
            ]
        )
    return _join(lines)


def format_results() -> str:
    """The result section of README, from the committed results."""
    parts = []
    for name, title in {
        "demo": "**Demo arena** (`make run`: {n:,} battles, tiny models, best log loss known), {machine}:",
        "heads": "**Both heads on the demo arena** (log loss, and how far it is from the best):",
        "real": "**Real battles** ({n} rows of the competition, the same tiny models, which learn little from so few), "
        "{machine}:",
    }.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        if name == "heads":
            parts += [title, format_heads(results)]
        else:
            machine = results["runs"]["02_baseline"]["machine"]
            parts += [title.format(n=results["n_pairs"], machine=machine), format_table(results)]
    return "\n\n".join(parts)


def write_readme() -> None:
    """Put the result section between its marks in README."""
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(START)
    _, after = rest.split(END)
    write_text(ROOT / "README.md", f"{before}{START}\n{format_results()}\n{END}{after}")


def main() -> None:
    """Record one run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(FIGURES))
    parser.add_argument("artifacts", type=Path)
    options = parser.parse_args()
    if options.name == "heads":
        write_json(RESULTS / "heads.json", collect_sweeps(options.artifacts))
    elif options.name != "eda":
        write_json(
            RESULTS / f"{options.name}.json", collect_results(options.name, options.artifacts)
        )
    for source, target in FIGURES[options.name].items():
        (ROOT / "assets").mkdir(exist_ok=True)
        shutil.copyfile(options.artifacts / source, ROOT / "assets" / target)
    write_readme()


if __name__ == "__main__":
    main()
