"""Plan a run before it starts: tokens, hours, memory, disk, and what will be cut.

    python -m src.utils.training.plan --profile full --gpu 24

Arithmetic (`costs`) from the settings, the lengths of the battles and the shapes of the models; no
GPU and no weights are needed. Hours are a card's peak speed times an assumed utilisation.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.utils import config as settings
from src.utils import paths
from src.utils.battles.readers import load_pairs
from src.utils.config import FinetuneConfig, SuiteError
from src.utils.models.checkpoints import TINY
from src.utils.models.hardware import choose_device
from src.utils.runs import read_pairs
from src.utils.schema import TEXTS
from src.utils.training import costs
from src.utils.training.costs import CARDS, CONTEXT_GIB, GIB, MACHINES, Machine, Shape

N_BATTLES, N_TEST = 57_477, 25_000  # of the competition, and its hidden rows
# Kaggle: hours of a session and of GPUs a week, GB that a session may leave, hours to submit.
SESSION_H, WEEK_H, OUTPUT_GB, SUBMISSION_H = 12.0, 30.0, 20.0, 9.0
MARGIN = 0.9  # share of a limit in hours that an estimate may fill
USABLE = 0.95  # of a GPU's memory: the rest is lost between the allocator's blocks
N_CHECKPOINTS = 3  # two are kept while the next one is written
MAX_CPU_H = 0.5  # training on a CPU up to which nobody is asked
# Tokens of the texts of 1,384 battles of the competition, by percent of the battles: the mean of
# Qwen's and ModernBERT's tokenizers, which are within 3 % of it.
PERCENT = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 100)
TEXT_TOK = "7 31 81 127 220 328 440 552 684 812 979 1342 1721 2412 3406 4191 6525"
CHARS_PER_TOK = 4  # as in notebook 01; those tokenizers have 4.1 and 4.2
TEMPLATE_TOK = {False: 12, True: 68}  # of an encoder, of a decoder
# Seconds and GiB on two cores for `N_BATTLES`: benchmarks/results/eda.json and baseline.json.
TINY_TEXT = "a stand-in of 0.25 million weights, which trains within minutes on a CPU"
ON_CPU = {"01_eda": (45, 1.1), "02_baseline": (256, 3.6)}


def measure_texts(pairs: pd.DataFrame | None) -> np.ndarray:
    """Estimate the tokens of each battle's texts, uncut: (N,) float.

    None stands for the battles of the competition.
    """
    if pairs is None:
        percent = (np.arange(N_BATTLES) + 0.5) / N_BATTLES * 100
        return np.interp(percent, PERCENT, [float(number) for number in TEXT_TOK.split()])
    n_chars = np.zeros(len(pairs))
    for name in TEXTS:
        n_chars += [sum(len(turn or "") for turn in turns) for turns in pairs[name]]
    return n_chars / CHARS_PER_TOK


@dataclass(frozen=True)
class Need:
    """What training all models of a notebook needs on a machine."""

    config: FinetuneConfig
    machine: Machine
    shape: Shape
    text_tok: np.ndarray  # (N,) of the battles
    n_train: int  # battles that one model learns from
    n_models: int
    train_tok: float
    valid_tok: float
    flops: float
    hours: float
    valid_share: float  # of the hours
    train_cut: float  # share of the battles over MAX_TOKENS
    predict_cut: float  # share over PREDICT_TOKENS
    memory: dict[str, float]  # GiB of each part, with micro-batches of `micro_batch`
    most_tokens: int  # of a micro-batch for which there is memory
    micro_batch: int  # tokens of one forward pass
    disk: dict[str, float]  # GB
    predict_h: float  # hours for 1,000 battles in both orders, by all models


def plan_training(
    config: FinetuneConfig, text_tok: np.ndarray, machine: Machine, shape: Shape
) -> Need:
    """Plan the training of all models of a notebook; `text_tok` is from `measure_texts`."""
    given = text_tok + TEMPLATE_TOK[shape.is_causal]
    trained, predicted = (np.minimum(given, n) for n in (config.max_tokens, config.predict_tokens))
    n_heldout = round(len(given) / settings.EdaConfig().n_folds)
    most = config.max_pairs or len(given)
    n_train = min(len(given) - n_heldout, most)
    n_folds = len(config.folds) * config.n_seeds
    n_read = n_folds * n_train + config.refit * min(len(given), most)  # battles, in one epoch
    padding = 1.0 if shape.is_packed else 1.04  # sorted by length
    orders = 2 if config.both_orders else 1
    train_tok = n_read * config.n_epochs * orders * float(trained.mean()) * padding
    # In between some battles in one order, at the end the fold in both.
    n_between = max(1, round(config.n_evals * config.n_epochs))
    n_valid = n_between * min(config.eval_pairs, n_heldout) + 2 * n_heldout
    valid_tok = n_folds * n_valid * float(predicted.mean()) * padding
    train_flops, _ = costs.count_training_flops(shape, config, trained, machine.has_kernel)
    _, predict_flops = costs.count_training_flops(shape, config, predicted, machine.has_kernel)
    flops = train_tok * train_flops + valid_tok * predict_flops

    fixed, per_token = costs.count_memory(shape, config, machine)
    room = machine.gib * USABLE * GIB - sum(fixed.values())
    most_tokens = max(0, int(room / sum(per_token.values())))
    share = config.tokens_per_step // max(machine.n_gpus, 1)
    micro_batch = max(min(most_tokens, share, config.tokens_per_batch or share), config.max_tokens)
    parts = fixed | {name: micro_batch * n_bytes for name, n_bytes in per_token.items()}
    n_trained, n_models = shape.n_trained(config), n_folds + config.refit
    return Need(
        config,
        machine,
        shape,
        text_tok,
        n_train,
        n_models,
        train_tok,
        valid_tok,
        flops,
        hours=min(machine.hours(flops), config.train_hours or math.inf),
        valid_share=valid_tok * predict_flops / flops,
        train_cut=float((given > config.max_tokens).mean()),
        predict_cut=float((given > config.predict_tokens).mean()),
        memory={name: n_bytes / GIB for name, n_bytes in parts.items() if n_bytes},
        most_tokens=most_tokens,
        micro_batch=micro_batch,
        disk={
            "download": shape.n_weights * (2 if config.lora_rank else 4) / 1e9,
            "checkpoints": N_CHECKPOINTS * (4 * n_trained + fixed["AdamW's two moments"]) / 1e9,
            "models": n_models * 4 * n_trained / 1e9,
        },
        predict_h=machine.hours(
            2000 * float(predicted.mean()) * padding * predict_flops * n_models
        ),
    )


def find_problem(need: Need) -> str:
    """Name what a training lacks on its machine; empty if it fits. T4s are taken for Kaggle's."""
    on_kaggle = need.machine.tflops == CARDS["T4"].tflops
    if need.most_tokens < need.config.max_tokens:
        return "Too little memory"
    if not need.machine.n_gpus and need.hours > MAX_CPU_H:
        return "Too long without a GPU"
    if on_kaggle and need.hours > SESSION_H * MARGIN:
        return f"Too long for Kaggle's {SESSION_H:.0f} h a session"
    if on_kaggle and need.disk["checkpoints"] + need.disk["models"] > OUTPUT_GB:
        return f"Too much for Kaggle's {OUTPUT_GB:.0f} GB of output"
    return ""


def _solve(need: Need, change: dict[str, Any]) -> str:
    """The settings to type if they make a training fit, else nothing."""
    changed = dataclasses.replace(need.config, **change)
    if find_problem(plan_training(changed, need.text_tok, need.machine, need.shape)):
        return ""
    old, new = need.config.to_json(), changed.to_json()
    return " ".join(f"{name.upper()}={new[name]}" for name in change if new[name] != old[name])


def advise(need: Need) -> str:
    """Say in one sentence whether a training fits and, if not, each change that makes it fit."""
    problem = find_problem(need)
    if not problem:
        return "It fits."
    config = need.config
    lora = {"lora_rank": config.lora_rank or 32}
    one_model: dict[str, Any] = {"folds": config.folds[:1], "n_seeds": 1, "refit": False}
    changed = dataclasses.replace(config, **one_model)
    alone = plan_training(changed, need.text_tok, need.machine, need.shape)
    hours, valid_h = SESSION_H * MARGIN, alone.hours * alone.valid_share
    share = max(hours - valid_h, 0) / (alone.hours - valid_h)
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        lora,
        lora | {"quantization": "4bit"},
        lora | {"quantization": "4bit", "gradient_checkpointing": True},
        one_model,
        one_model | {"max_tokens": max(config.max_tokens // 2, 256)},
        one_model | {"max_pairs": max(int(need.n_train * share) // 1000, 1) * 1000},
    ]
    ways = [text for change in changes if (text := _solve(need, change))]
    if problem.startswith("Too long"):
        cut = _solve(need, one_model | {"train_hours": float(int(hours))})
        ways += [f"{cut} (some {share:.0%} of the steps)"] if cut and share < 1 else []
    return f"{problem}: set {' or '.join(ways) or 'a smaller CHECKPOINT'}."


def describe(need: Need, notebook: str) -> str:
    """Write a plan as a table for people, with the advice if it does not fit."""
    config, machine, disk = need.config, need.machine, need.disk
    others = [dataclasses.replace(card, n_gpus=max(machine.n_gpus, 1)) for card in CARDS.values()]
    hours = ", ".join(f"{card.name} {card.hours(need.flops):.1f}" for card in others)
    stays = disk["checkpoints"] + disk["models"]
    rows = {
        "battles": f"{need.n_train:,} to learn from, {need.n_models} model(s) of "
        f"{need.shape.n_weights:,} weights, {need.shape.n_trained(config):,} trained",
        "cut": f"{need.train_cut:.1%} of the battles to {config.max_tokens:,} tokens in training, "
        f"{need.predict_cut:.1%} to {config.predict_tokens:,} in prediction",
        "tokens": f"{need.train_tok / 1e6:,.1f} M in training, {need.valid_tok / 1e6:,.1f} M in "
        f"validation; {need.flops:.2e} FLOPs",
        "hours": f"{need.hours:,.1f}, {need.valid_share:.0%} of it validation ({hours})",
        "micro-batch": f"{need.micro_batch:,} tokens; memory holds {need.most_tokens:,}",
        "memory": f"{sum(need.memory.values()):.1f} of {machine.gib:.1f} GiB",
    }
    rows |= {f"  {part}": f"{gib:.2f} GiB" for part, gib in need.memory.items()}
    rows["disk"] = f"{disk['download']:.1f} GB download; {stays:.1f} GB output, of it "
    rows["disk"] += f"{disk['checkpoints']:.1f} only while training (Kaggle: {OUTPUT_GB:.0f} GB)"
    lines = [f"{notebook}: {config.checkpoint} on {machine.name}"]
    lines += [f"  {name:33} {text}" for name, text in rows.items()]
    return "\n".join([*lines, f"  {advise(need)}"])


def summarise(need: Need, notebook: str) -> str:
    """Write a plan in one line, with the advice if it does not fit."""
    return (
        f"{need.machine.name:15} {notebook:14} {need.hours:6.1f} h  "
        f"{sum(need.memory.values()):5.1f} of {need.machine.gib:4.1f} GiB  "
        f"{need.micro_batch:6,} tokens  {advise(need)}"
    )


def describe_others(needs: Mapping[str, Need], on_kaggle: Sequence[Need], n_battles: int) -> dict:
    """Say in one line each what the notebooks need that do not train on a GPU: name -> line."""
    share = n_battles / N_BATTLES
    lines = {
        name: f"{seconds * share:,.0f} s and {gib * share:.1f} GiB on two cores, without a GPU"
        for name, (seconds, gib) in ON_CPU.items()
    }
    lines["05_ensemble"] = "seconds, without a GPU"
    hours = sum(need.predict_h for need in on_kaggle) * N_TEST / 1000
    verdict = "fits" if hours < SUBMISSION_H * MARGIN else "does not fit: lower PREDICT_TOKENS"
    lines["06_kaggle_inference"] = (
        f"{N_TEST:,} rows in both orders take {hours:.1f} of {SUBMISSION_H:.0f} h on Kaggle's T4s: "
        f"{verdict}"
    )
    published = []
    for name, need in needs.items():
        n_bytes = 2 if need.config.lora_rank else 4
        gib = need.shape.n_weights * n_bytes / GIB + CONTEXT_GIB
        verdict = "fits" if gib < need.machine.gib * MARGIN else "does not fit"
        published.append(f"{name} {gib:.1f} GiB in {8 * n_bytes} bit: {verdict}")
    lines["07_publish"] = f"one copy of the weights at a time; {', '.join(published)}"
    return lines


def plan_here(config: FinetuneConfig, pairs: pd.DataFrame, base: Path | None = None) -> str:
    """Describe what a notebook's training needs on the device that it finds, before it starts."""
    if config.checkpoint.startswith(TINY):
        return f"{config.checkpoint}: {TINY_TEXT}"
    shape, machine = costs.read_shape(config, base), costs.find_machine()
    return describe(plan_training(config, measure_texts(pairs), machine, shape), "this notebook")


def check_device(config: FinetuneConfig, pairs: pd.DataFrame, base: Path | None = None) -> None:
    """Refuse to train a real checkpoint for hours without a GPU, unless ALLOW_CPU is set.

    Raises:
        SuiteError: there is no usable GPU; the text has the projected hours.
    """
    is_tiny = config.checkpoint.startswith(TINY)
    if is_tiny or config.allow_cpu or choose_device().type != "cpu":
        return
    shape, machine = costs.read_shape(config, base), costs.find_machine()
    hours = plan_training(config, measure_texts(pairs), machine, shape).hours
    if hours > MAX_CPU_H:
        built = torch.version.cuda
        reason = (
            f"this torch needs a driver for CUDA {built}" if built else "this torch has no CUDA"
        )
        raise SuiteError(
            f"{config.checkpoint}: expected a GPU, found none that torch can use ({reason}). On "
            f"this CPU the training would take about {hours:,.0f} hours. Use a machine with a GPU "
            "(make plan lists what each needs), PROFILE=small for tiny models, or ALLOW_CPU=True."
        )


def read_texts(data: Sequence[str], artifacts: Path) -> tuple[np.ndarray, str]:
    """Measure the battles of `data`, of 01's run, or else of the competition; and say which."""
    raw = paths.find_raw_data(" | ".join(data))
    frozen = artifacts / "01_eda" / "pairs.parquet"
    if not data and frozen.exists() and not (frozen.parent / "truth.parquet").exists():
        return measure_texts(read_pairs(frozen)), f"{frozen}, {CHARS_PER_TOK} characters a token"
    if raw.train and raw.kind != "demo":
        pairs, _ = load_pairs(raw.train)
        return measure_texts(pairs), f"{raw.train[0]}, {CHARS_PER_TOK} characters a token"
    return measure_texts(None), "the competition, by the measured lengths of 1,384 of its battles"


def read_configs(profile: str, changes: Sequence[str]) -> dict[str, FinetuneConfig]:
    """Read the settings of 03 and 04 as `make run` would pass them."""
    notebooks = sorted((paths.ROOT / "notebooks").glob("*.ipynb"))
    defaults = {path.stem: settings.read_parameters(path) for path in notebooks}
    asked = [setting for text in changes for setting in settings.split_settings(text)]
    section = settings.read_profile(profile)
    chosen = settings.make_parameters(defaults, profile=section, settings=asked)
    found = {}
    for name, kind in settings.CONFIGS.items():
        if issubclass(kind, FinetuneConfig):
            found[name] = kind.from_parameters(defaults[name] | chosen[name], name)
    return found


def choose_notebooks(only: str) -> list[str]:
    """Turn "03" or "02,04-06" into names; nothing into all of them."""
    names = sorted(path.stem for path in (paths.ROOT / "notebooks").glob("*.ipynb"))
    chosen = []
    for part in only.replace(",", " ").split():
        first, _, last = part.partition("-")
        start = names.index(settings.find_name(first, names))
        chosen += names[start : names.index(settings.find_name(last or first, names)) + 1]
    return chosen or names


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m src.utils.training.plan", description=__doc__)
    add = parser.add_argument
    add("--profile", default="full", help="of notebooks/profiles, or a file")
    add("--gpu", default="", help="24, 16, 2x16, 80, T4, 2xA100, …; default: what is here, or all")
    add("--data", nargs="+", default=[], metavar="PATH", help="folder or files of battles")
    add("--set", nargs="+", action="extend", default=[], metavar="NB.NAME=VALUE", help="parameters")
    add("--only", default="", metavar="NB", help="02, or 02,05, or 03-05")
    add("--artifacts", default="", metavar="DIR", help="where the run folders are")
    options = parser.parse_args(arguments)
    try:
        print(make_plan(options))
    except (SuiteError, FileNotFoundError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def make_plan(options: argparse.Namespace) -> str:
    """Write one line for each machine and notebook, then the details for the first machine."""
    if options.gpu:
        machines = [costs.read_machine(options.gpu)]
    else:
        has_gpu = choose_device().type == "cuda"
        machines = [costs.find_machine()] if has_gpu else list(MACHINES.values())
    chosen = choose_notebooks(options.only)
    configs = read_configs(options.profile, options.set)
    tiny = [name for name, config in configs.items() if config.checkpoint.startswith(TINY)]
    shapes = {name: costs.read_shape(configs[name]) for name in configs if name not in tiny}
    texts, source = read_texts(options.data, Path(options.artifacts or paths.artifacts_dir()))

    def plan_on(machine: Machine) -> dict[str, Need]:
        return {name: plan_training(configs[name], texts, machine, shapes[name]) for name in shapes}

    needs = [plan_on(machine) for machine in machines]
    lines = [f"PROFILE={options.profile}, {len(texts):,} battles: {source}", ""]
    for name in filter(chosen.__contains__, shapes):
        lines += [summarise(each[name], name) for each in needs]
    lines += [f"\n{describe(needs[0][name], name)}" for name in shapes if name in chosen]
    lines += [f"{name}: {configs[name].checkpoint}, {TINY_TEXT}" for name in tiny if name in chosen]
    others = describe_others(needs[0], list(plan_on(MACHINES["2x16"]).values()), len(texts))
    lines += ["", *(f"{name:20} {others[name]}" for name in others if name in chosen)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
