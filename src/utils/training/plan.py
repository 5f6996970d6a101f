"""Plan a run before it starts: hours, memory, disk, what will be cut, and what to change.

    python -m src.utils.training.plan --profile full --gpu 24

Arithmetic (`costs`) from the settings, the lengths of the battles and the shapes of the models; no
GPU and no weights are needed. Hours are a card's peak speed times an assumed utilisation.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.utils import paths
from src.utils.battles.readers import load_pairs
from src.utils.battles.style import count_tokens
from src.utils.config import (
    NOTEBOOKS,
    EdaConfig,
    FinetuneConfig,
    SuiteError,
    choose_names,
    name_model,
    read_finetuning,
)
from src.utils.models.frozen import choose_layers
from src.utils.models.hardware import choose_device
from src.utils.runs import read_pairs
from src.utils.training import costs
from src.utils.training.costs import CARDS, CONTEXT_GIB, GIB, Machine, Shape

MACHINES = ("24", "16", "2x16", "80")  # that are listed where none is named
N_BATTLES, N_TEST = 57_477, 25_000  # of the competition, and its hidden rows
# Kaggle: hours of a session, GB that it may leave, hours to submit.
SESSION_H, OUTPUT_GB, SUBMISSION_H = 12.0, 20.0, 9.0
MARGIN = 0.9  # share of a limit in hours that an estimate may fill
USABLE = 0.95  # of a GPU's memory: the rest is lost between the allocator's blocks
N_CHECKPOINTS = 3  # two are kept while the next one is written
HEAD_MINUTES = 4.0  # to train one head for `N_BATTLES` on two cores, an estimate
MAX_CPU_H = 0.5  # training on a CPU up to which nobody is asked
# Tokens of the texts of 1,384 battles of the competition, by percent of the battles: the mean of
# Qwen's and ModernBERT's tokenizers, which are within 3 % of it.
PERCENT = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 100)
TEXT_TOK = (7, 31, 81, 127, 220, 328, 440, 552, 684, 812, 979, 1342, 1721, 2412, 3406, 4191, 6525)
TEMPLATE_TOK = {False: 12, True: 68}  # of an encoder, of a decoder
PADDING = 1.04  # tokens read for each of a battle, where rows sorted by length are padded
SMALL_TEXT = "small enough to train on a CPU"
# For `N_BATTLES`: benchmarks/results/eda.json and baseline.json.
ON_CPU = {
    "01_eda": "45 s and 1.1 GiB on two cores, no GPU",
    "02_baseline": "276 s and 3.8 GiB on two cores, no GPU",
    "05_ensemble": "seconds, no GPU",
}


def measure_texts(pairs: pd.DataFrame | None) -> np.ndarray:
    """Estimate the tokens of each battle's texts, uncut: (N,) float; None: the competition's."""
    if pairs is None:
        percent = (np.arange(N_BATTLES) + 0.5) / N_BATTLES * 100
        return np.interp(percent, PERCENT, TEXT_TOK)
    return count_tokens(pairs).astype(float)  # four characters a token; these two have 4.1 and 4.2


@dataclass(frozen=True)
class Work:
    """What all models of a notebook have to read and learn."""

    n_train: int  # battles that one model learns from
    n_models: int
    hours: float
    output_gb: float
    submission_h: float  # hours to predict the hidden rows, in both orders, by all models
    steps_share: float = 1.0  # of all steps, for which TRAIN_HOURS leaves time
    valid_share: float = 0.0  # of the hours


@dataclass(frozen=True)
class Need:
    """What training all models of a notebook needs on a machine."""

    config: FinetuneConfig
    machine: Machine
    shape: Shape
    text_tok: np.ndarray  # (N,) of the battles
    work: Work
    memory: dict[str, float]  # GiB of each part, in passes of one battle of `longest` tokens
    most_tokens: int  # of a pass for which there is memory; training finds it by trial

    @property
    def longest(self) -> int:
        """Tokens of the longest battle that a pass must hold."""
        is_head = self.config.train == "head"
        return self.config.predict_tokens if is_head else self.config.max_tokens

    @property
    def download_gb(self) -> float:
        """Size of the checkpoint, GB."""
        return self.shape.n_weights * (2 if self.config.is_frozen else 4) / 1e9

    def cut_share(self, budget: int) -> float:
        """Compute the share of the battles that are longer than a budget of tokens."""
        return float((self.text_tok + TEMPLATE_TOK[self.shape.is_causal] > budget).mean())


def plan_training(
    config: FinetuneConfig, text_tok: np.ndarray, machine: Machine, shape: Shape
) -> Need:
    """Plan the training of all models of a notebook; `text_tok` is from `measure_texts`."""
    plan_work = _plan_head if config.train == "head" else _plan_steps
    work = plan_work(config, text_tok + TEMPLATE_TOK[shape.is_causal], machine, shape)
    fixed, per_token = costs.count_memory(shape, config, machine)
    room = machine.gib * USABLE * GIB - sum(fixed.values())
    need = Need(config, machine, shape, text_tok, work, {}, max(0, int(room / per_token)))
    parts = fixed | {"activations": need.longest * per_token}
    memory = {name: n_bytes / GIB for name, n_bytes in parts.items()}
    return dataclasses.replace(need, memory=memory)


def _count_reading(
    config: FinetuneConfig, given: np.ndarray, machine: Machine, shape: Shape
) -> float:
    """Count the FLOPs to predict one battle in one order, a mean of those with `given` tokens."""
    read = np.minimum(given, config.predict_tokens)
    padding = 1.0 if shape.is_packed else PADDING
    return (
        float(read.mean()) * padding * costs.count_flops(shape, config, read, machine.has_kernel)[1]
    )


def _plan_steps(config: FinetuneConfig, given: np.ndarray, machine: Machine, shape: Shape) -> Work:
    """Plan to train a model per fold and seed, and a refit, on battles with `given` tokens."""
    trained = np.minimum(given, config.max_tokens)
    n_heldout = round(len(given) / EdaConfig().n_folds)
    most = config.max_pairs or len(given)
    n_train = min(len(given) - n_heldout, most)
    n_folds = len(config.folds) * config.n_seeds
    n_models = n_folds + config.refit
    n_read = n_folds * n_train + config.refit * min(len(given), most)  # battles, in one epoch
    n_read *= 2 if config.both_orders else 1
    train_tok = n_read * config.n_epochs * float(trained.mean())
    train_tok *= 1.0 if shape.is_packed else PADDING
    # In between some battles in one order, at the end the fold in both.
    n_between = max(1, round(config.n_evals * config.n_epochs))
    n_valid = n_folds * (n_between * min(config.eval_pairs, n_heldout) + 2 * n_heldout)
    reading_flops = _count_reading(config, given, machine, shape)
    flops = train_tok * costs.count_flops(shape, config, trained, machine.has_kernel)[0]
    flops += n_valid * reading_flops
    all_hours = machine.hours(flops)
    hours = min(all_hours, config.train_hours or math.inf)
    n_trained = shape.n_trained(config)
    checkpoint_gb = (4 + 8) * n_trained / 1e9  # the weights, and AdamW's moments
    return Work(
        n_train,
        n_models,
        hours,
        output_gb=N_CHECKPOINTS * checkpoint_gb + n_models * 4 * n_trained / 1e9,
        submission_h=machine.hours(2 * N_TEST * n_models * reading_flops),
        steps_share=hours / all_hours,
        valid_share=n_valid * reading_flops / flops,
    )


def _plan_head(config: FinetuneConfig, given: np.ndarray, machine: Machine, shape: Shape) -> Work:
    """Plan to read every battle once in each order, and to train the heads of all folds."""
    # Layers above the last one that is read are not run.
    depth = max(choose_layers(config.state_layers, shape.n_layers)) / shape.n_layers
    reading_flops = depth * _count_reading(config, given, machine, shape)
    n_folds, n_given = EdaConfig().n_folds, len(given)
    n_models = n_folds * config.n_seeds + 1
    head_hours = n_models * HEAD_MINUTES / 60 * n_given / N_BATTLES
    states_gb = 2 * 2 * n_given * shape.n_states(config) / 1e9
    return Work(
        n_given - round(n_given / n_folds),
        n_models,
        machine.hours(2 * n_given * reading_flops) + head_hours,
        output_gb=states_gb + n_models * 4 * shape.n_trained(config) / 1e9,
        submission_h=machine.hours(2 * N_TEST * reading_flops),  # one head serves
    )


def find_problem(need: Need) -> str:
    """Name what a training lacks on its machine; empty if it fits. T4s are taken for Kaggle's."""
    on_kaggle = need.machine.tflops == CARDS["T4"].tflops
    if need.most_tokens < need.longest:
        return "Too little memory"
    if not need.machine.n_gpus and need.work.hours > MAX_CPU_H:
        return "Too long without a GPU"
    if on_kaggle and need.work.hours > SESSION_H * MARGIN:
        return f"Too long for Kaggle's {SESSION_H:.0f} h a session"
    if on_kaggle and need.work.output_gb > OUTPUT_GB:
        return f"Too much for Kaggle's {OUTPUT_GB:.0f} GB of output"
    return ""


def advise(need: Need) -> str:
    """Say in one sentence whether a training fits and, if not, each change that makes it fit."""
    problem = find_problem(need)
    if not problem:
        return "It fits."
    config = need.config
    lora = {"train": "lora"}
    one_model: dict[str, Any] = {"folds": config.folds[:1], "n_seeds": 1, "refit": False}
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        lora,
        lora | {"quantization": "4bit"},
        lora | {"quantization": "4bit", "gradient_checkpointing": True},
        one_model,
        one_model | {"max_tokens": max(config.max_tokens // 2, 256)},
    ]
    changes.append({"train": "head"})
    if problem.startswith("Too long"):  # a schedule that ends in time: fewer steps
        changes.append(one_model | {"train_hours": float(int(SESSION_H * MARGIN))})
    ways = []
    for change in changes:
        changed = dataclasses.replace(config, **change)
        then = plan_training(changed, need.text_tok, need.machine, need.shape)
        if not find_problem(then):
            old, new = config.to_json(), changed.to_json()
            words = [f"{name.upper()}={new[name]}" for name in change if new[name] != old[name]]
            words += (
                [f"(some {then.work.steps_share:.0%} of the steps)"]
                if then.work.steps_share < 1
                else []
            )
            ways.append(" ".join(words))
    return f"{problem}: set {' or '.join(ways) or 'a smaller CHECKPOINT'}."


def describe(need: Need, notebook: str) -> str:
    """Write a plan as a table for people, with the advice if it does not fit."""
    config, work, shape = need.config, need.work, need.shape
    memory = ", ".join(f"{name} {gib:.1f}" for name, gib in need.memory.items())
    least = f"at least {sum(need.memory.values()):.1f} of {need.machine.gib:.1f} GiB"
    cut, cut_later = (f"{need.cut_share(n):.1%}" for n in (need.longest, config.predict_tokens))
    rows = {
        "models": f"{work.n_models}, each learns from {work.n_train:,} battles or more; "
        f"{shape.n_trained(config) / 1e6:,.1f} of {shape.n_weights / 1e6:,.1f} million weights are "
        "trained",
        "hours": f"{work.hours:,.1f}, for {work.steps_share:.0%} of the steps; "
        f"{work.valid_share:.0%} of them validation",
        "battles": f"{cut} are cut to {need.longest:,} tokens in training, {cut_later} to "
        f"{config.predict_tokens:,} in prediction",
        "memory": f"{least}: {memory}",
        "passes": f"of {need.longest:,} tokens or more; memory holds {need.most_tokens:,}",
        "disk": f"{need.download_gb:.1f} GB download, {work.output_gb:.1f} GB output",
    }
    lines = [f"{notebook}: {config.checkpoint} on {need.machine.name}"]
    lines += [f"  {name:12} {text}" for name, text in rows.items()]
    return "\n".join([*lines, f"  {advise(need)}"])


def summarise(need: Need, notebook: str) -> str:
    """Write a plan in one line, with the advice if it does not fit."""
    memory = f"at least {sum(need.memory.values()):3.1f} of {need.machine.gib:4.1f} GiB"
    return (
        f"{notebook:20} {need.machine.name:16} {need.work.hours:5.1f} h  {memory}  {advise(need)}"
    )


def describe_others(needs: Sequence[Need], on_kaggle: Sequence[Need]) -> dict[str, str]:
    """Say in one line each what the notebooks need that do not train on a GPU: name -> line."""
    hours = sum(need.work.submission_h for need in on_kaggle)
    verdict = "It fits." if hours < SUBMISSION_H * MARGIN else "Too long: lower PREDICT_TOKENS."
    rows = f"{N_TEST:,} hidden rows take {hours:.1f} of {SUBMISSION_H:.0f} h on Kaggle's two T4s"
    largest = max((need.download_gb * 1e9 / GIB for need in needs), default=0.0) + CONTEXT_GIB
    return ON_CPU | {
        "06_kaggle_inference": f"{rows}. {verdict}",
        "07_publish": f"{largest:.1f} GiB, for one copy of the weights at a time",
    }


def plan_here(config: FinetuneConfig, pairs: pd.DataFrame) -> str:
    """Describe what a notebook's training needs on the device that it finds, before it starts."""
    if config.has_own_base:
        return f"{config.checkpoint}, {name_model(config.checkpoint)}: {SMALL_TEXT}"
    return describe(_plan_here(config, pairs, None), "this notebook")


def _plan_here(config: FinetuneConfig, pairs: pd.DataFrame, base: Path | None) -> Need:
    shape, machine = costs.read_shape(config, base), costs.find_machine()
    return plan_training(config, measure_texts(pairs), machine, shape)


def check_device(config: FinetuneConfig, pairs: pd.DataFrame, base: Path | None = None) -> None:
    """Refuse to train a real checkpoint for hours without a GPU, unless ALLOW_CPU is set.

    Raises:
        SuiteError: there is no usable GPU; the text has the projected hours.
    """
    if config.has_own_base or config.allow_cpu or choose_device().type != "cpu":
        return
    hours = _plan_here(config, pairs, base).work.hours
    if hours > MAX_CPU_H:
        built = torch.version.cuda
        reason = f"needs a driver for CUDA {built}" if built else "has no CUDA"
        raise SuiteError(
            f"{config.checkpoint}: expected a GPU, found none that torch can use (this torch "
            f"{reason}). On this CPU the training would take about {hours:,.0f} hours. Use a "
            "machine with a GPU (make plan lists what each needs), PROFILE=small for tiny models, "
            "or ALLOW_CPU=True."
        )


def read_texts(data: Sequence[str], artifacts: Path) -> tuple[np.ndarray, str]:
    """Measure the battles of `data`, of 01's run, or else of the competition; and say which."""
    raw = paths.find_raw_data(" | ".join(data))
    frozen = artifacts / "01_eda" / "pairs.parquet"
    if not data and frozen.exists() and not (frozen.parent / "truth.parquet").exists():
        return measure_texts(read_pairs(frozen)), str(frozen)
    if raw.train and raw.kind != "demo":
        return measure_texts(load_pairs(raw.train)[0]), str(raw.train[0])
    return measure_texts(None), "those of the competition"


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
    except (SuiteError, OSError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def make_plan(options: argparse.Namespace) -> str:
    """Write the details for one machine, or one line for each of several, and what to do next."""
    names = [options.gpu] if options.gpu else MACHINES
    machines = [costs.read_machine(name) for name in names]
    if not options.gpu and choose_device().type == "cuda":
        machines = [costs.find_machine()]
    chosen = choose_names(options.only, sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    configs = read_finetuning(options.profile, options.set)
    texts, source = read_texts(options.data, Path(options.artifacts or paths.artifacts_dir()))
    shapes = {name: costs.read_shape(c) for name, c in configs.items() if not c.has_own_base}

    def plan_on(machine: Machine) -> dict[str, Need]:
        return {name: plan_training(configs[name], texts, machine, shapes[name]) for name in shapes}

    needs = [plan_on(machine) for machine in machines]
    on_kaggle = plan_on(costs.read_machine("2xT4"))
    others = describe_others([*needs[0].values()], [*on_kaggle.values()])
    lines = [f"PROFILE={options.profile}, {len(texts):,} battles: {source}", ""]
    for name in chosen:
        if name not in configs:
            lines.append(f"{name:20} {others[name]}")
        elif name not in shapes:
            lines.append(f"{name:20} {configs[name].checkpoint}, {SMALL_TEXT}")
        elif len(machines) == 1:
            lines.append(f"\n{describe(needs[0][name], name)}\n")
        else:
            lines += [summarise(each[name], name) for each in needs]
    lines.append('\nTry a change with `make plan SET="04.REFIT=False"`; make run takes it, too.')
    if len(machines) > 1:
        lines.append("For the details of one machine: `make plan GPU=2xT4 NB=04`")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
