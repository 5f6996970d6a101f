"""Search over the parameters of one notebook with Optuna; each trial is a run of the suite.

    python -m src.utils.suite.search space.yaml --n-trials 20

    notebook: "03"
    fixed: {N_EPOCHS: 1}
    parameters:
      HEAD: [joint, contrast]
      LEARNING_RATE: {low: 1e-5, high: 1e-3, log: true}

Values are written as after SET=; a range from a whole number gives whole numbers. If every
parameter is a list, each combination is tried once, else a trial whose validations are worse
than the median is stopped. `name` (else that of the file) and `seed` may be added. The same
command resumes (with other settings or data it starts another search); it can run several times
at once, on several machines, with one storage.
"""

import argparse
import math
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import psutil
import yaml
from matplotlib import pyplot as plt
from optuna.storages import JournalStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import BaseTrial, FixedTrial, Trial, TrialState
from optuna.visualization import matplotlib

from src.utils import runs
from src.utils.config import SuiteError, find_name, make_parameters, with_options
from src.utils.suite.pipeline import CHECKPOINTS, CODE, Pipeline, measure_states
from src.utils.suite.run import make_pipeline, parse_arguments, report_errors, run_suite

SUITE = [sys.executable, "-m", "src.utils.suite.run"]
POLL_S = 1.0  # between two looks at history.csv
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED


@dataclass
class Space:
    """What a space file asks for; all values are text."""

    name: str
    notebook: str
    parameters: dict[str, Any]  # a list of choices, or a mapping of low, high and step or log
    fixed: dict[str, str] = field(default_factory=dict)
    seed: str = "20240501"

    def settings(self, values: dict[str, Any]) -> list[str]:
        """Format the fixed and the given values as settings of the suite."""
        has_refit = "REFIT" in with_options(self.notebook, {"OPTIONS": {}})
        # A refit is scored on nothing.
        chosen = ({"REFIT": "False"} if has_refit else {}) | self.fixed | values
        return [f"{self.notebook}.{name}={value}" for name, value in chosen.items()]

    @property
    def n_combinations(self) -> int:
        """Number of combinations if every parameter is a list, else 0."""
        domains = self.parameters.values()
        is_grid = all(isinstance(domain, list) for domain in domains)
        return math.prod(map(len, domains)) if is_grid else 0


def read_space(path: Path, pipeline: Pipeline, notebook: str = "") -> Space:
    """Read a space file, SuiteError if anything in it is wrong; `notebook` replaces the file's."""
    try:
        # This loader leaves every value as text, for the reader of settings.
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
        space = Space(**{"name": path.stem, "notebook": notebook} | content)
        space.notebook = find_name(notebook or space.notebook, list(pipeline.by_name))
        for name, domain in space.parameters.items():
            for value in domain if isinstance(domain, list) else (domain["low"], domain["high"]):
                suggest(FixedTrial({name: value}), name, domain)
                settings = space.settings({name: value})
                make_parameters(pipeline.defaults, profile={}, settings=settings)
    except (TypeError, KeyError, ValueError, AttributeError, OSError) as error:
        raise SuiteError(f"{path}: expected a space file, got {error!r}") from error
    if "metrics.json" not in pipeline.by_name[space.notebook].outputs:
        raise SuiteError(f"{path}: notebook: {space.notebook} has no log loss in metrics.json")
    return space


def suggest(trial: BaseTrial, name: str, domain: Any) -> Any:
    """Ask a trial for a value from a list of choices or from a range."""
    if isinstance(domain, list):
        return trial.suggest_categorical(name, domain)
    is_whole = re.fullmatch(r"[+-]?\d+", domain["low"])
    number: type = int if is_whole else float
    limits = {key: number(domain[key]) for key in ("low", "high", "step") if key in domain}
    method: Any = trial.suggest_int if is_whole else trial.suggest_float
    return method(name, **limits, log=domain.get("log") == "true")


def open_study(space: Space, storage: str) -> optuna.Study:
    """Create a study, or load it and queue its failed and interrupted trials again."""
    study = optuna.create_study(
        storage=storage if "://" in storage else JournalStorage(JournalFileBackend(storage)),
        pruner=optuna.pruners.NopPruner() if space.n_combinations else None,  # None: the median
        study_name=space.name,
        load_if_exists=True,
    )
    alive = [_identify(process) for process in psutil.process_iter()]
    latest = {trial.user_attrs.get("folder"): trial for trial in study.trials}
    for trial in latest.values():
        process = trial.user_attrs.get("process", "")
        is_dead = process.startswith(f"{platform.node()} ") and process not in alive
        if trial.state == TrialState.RUNNING and is_dead:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL:
            continue
        RetryHeartbeatStaleTrialCallback()(study, trial)
    return study


def _identify(process: psutil.Process) -> str:
    return f"{platform.node()} {process.pid} {process.create_time()}"


def run_trial(
    trial: Trial, space: Space, pipeline: Pipeline, folder: Path, options: Sequence[str]
) -> float:
    """Run one trial in a folder of its own and return its log loss, nats per battle.

    TrialPruned if its validations are worse than the median, SuiteError if the notebook fails.
    """
    values = {name: suggest(trial, name, domain) for name, domain in space.parameters.items()}
    texts = [f"{trial.number:03d}", *[f"{name}={value}" for name, value in values.items()]]
    name = re.sub(r"[^\w.=,+-]", "_", ",".join(texts))[:80]
    artifacts = folder / trial.user_attrs.get("folder", name)  # a retry resumes in its folder
    trial.set_user_attr("folder", artifacts.name)
    trial.set_user_attr("process", _identify(psutil.Process()))
    artifacts.mkdir(parents=True, exist_ok=True)
    for upstream in pipeline.needs(pipeline.by_name[space.notebook]):
        if not (artifacts / upstream).exists():
            (artifacts / upstream).symlink_to(Path("../../..", upstream))
    command = [*SUITE, *options, "--only", space.notebook, "--artifacts", str(artifacts)]
    command += ["--set", *space.settings(values)]
    log, history = artifacts / "suite.log", artifacts / space.notebook / "history.csv"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    n_reported, is_pruned = 0, False
    try:
        while process.poll() is None and not is_pruned:
            time.sleep(POLL_S)
            losses = list(pd.read_csv(history)["log_loss"].dropna()) if history.exists() else []
            for step in range(n_reported, len(losses)):
                trial.report(losses[step], step)
            n_reported = max(n_reported, len(losses))  # a run that starts again has fewer
            is_pruned = process.poll() is None and trial.should_prune()
    finally:
        process.terminate()  # its kernel ends with it
        process.wait()
    if is_pruned:
        shutil.rmtree(history.parent / CHECKPOINTS, ignore_errors=True)
        raise optuna.TrialPruned
    if process.returncode:
        raise SuiteError(f"{log}: {log.read_text()[-2000:]}")
    return runs.read_json(history.with_name("metrics.json"))["log_loss"]


def search(
    space: Space, pipeline: Pipeline, storage: str, n_trials: int, options: Sequence[str]
) -> optuna.Study:
    """Run trials until `n_trials` (0: 20, or all of a grid) are finished, and write the results.

    `storage` is a journal file or a database URL, `options` are the suite's, for every trial.
    """
    stage = pipeline.by_name[space.notebook]
    run_suite(pipeline, list(pipeline.needs(stage)), sys.stdout)
    inputs = {name: path for name, path in pipeline.inputs(stage).items() if name != CODE}
    hashes = {name: state[2] for name, state in measure_states(inputs).items()}
    made_with = {**pipeline.all_parameters(stage.name), **space.fixed, **hashes}
    # Scores can be compared only with equal settings and data; others make another study.
    space.name += f"-{runs.hash_json(made_with)[:6]}"
    folder = pipeline.artifacts / "searches" / space.name
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(space, storage or str(folder / "journal.log"))
    n_wanted = n_trials or space.n_combinations or 20
    if space.n_combinations:
        n_wanted = min(n_wanted, space.n_combinations)
    for _ in range(n_wanted):
        if len(study.get_trials(states=(COMPLETE, PRUNED))) >= n_wanted:
            break
        if space.n_combinations:
            study.sampler = optuna.samplers.GridSampler(space.parameters, int(space.seed))
        else:
            # Processes that share a storage must not draw the same values.
            seed = int(space.seed) + len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed)
        study.optimize(
            lambda trial: run_trial(trial, space, pipeline, folder, options),
            n_trials=1,
            catch=(SuiteError,),
        )
    runs.write_table(folder / "trials.csv", study.trials_dataframe())
    write_pictures(study, folder)
    runs.write_leaderboard(pipeline.artifacts)
    return study


def write_pictures(study: optuna.Study, folder: Path) -> None:
    """Write pictures of the search, as far as there are different values to show."""
    # Optuna's default evaluator looks only at the best trials, where the best choice is constant.
    fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)
    for name in ("optimization_history", "slice", "param_importances"):
        more = {"evaluator": fanova} if name == "param_importances" else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values that are all alike
                axes = getattr(matplotlib, f"plot_{name}")(study, target_name="log loss", **more)
        except (ValueError, RuntimeError) as error:  # too few different values
            print(f"No picture of {name}: {error}")
        else:
            runs.write_figure(folder / f"{name}.png", np.ravel(axes)[0].figure)
    plt.close("all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a search from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m src.utils.suite.search",
        description="Search over the parameters of a notebook; further options are the suite's.",
    )
    parser.add_argument("space", type=Path, help="YAML file")
    parser.add_argument("--notebook", default="", metavar="NB", help="in place of the file's")
    parser.add_argument("--n-trials", type=int, default=0, help="in all (20, or all of a grid)")
    parser.add_argument("--storage", default="", help="journal file or database URL")
    given, rest = parser.parse_known_args(arguments)
    options = parse_arguments(rest)
    pipeline = make_pipeline(options)
    for name, value in options.named.items():  # a trial's folder remembers nothing
        rest += [f"--{name.lower()}", value]
    space = read_space(given.space, pipeline, given.notebook)
    study = search(space, pipeline, given.storage, given.n_trials, rest)
    trials = study.get_trials(states=(COMPLETE,))
    for loss, name in sorted((trial.value or 0.0, trial.user_attrs["folder"]) for trial in trials):
        print(f"{loss:.4f}  {name}")
    print(f"\nTrials and pictures: {pipeline.artifacts / 'searches' / space.name}")
    return 0 if trials else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sys.exit(report_errors(main))
