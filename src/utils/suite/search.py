"""Search over the parameters of one notebook with Optuna; each trial is a run of the suite.

    python -m src.utils.suite.search space.yaml --n-trials 20

    notebook: "03"
    fixed: {N_EPOCHS: 1}
    parameters:
      HEAD: [joint, contrast]
      LEARNING_RATE: {low: 1e-5, high: 1e-3, log: true}

Values are written as after SET=; a range from a whole number gives whole numbers. If every
parameter is a list, each combination is tried once. `name` (else that of the file) and `seed` may
be added. The same command resumes (with other settings or data it starts another search); it can
run several times at once, on several machines with the URL of one database.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import BaseTrial, FixedTrial, Trial, TrialState

from src.utils import runs
from src.utils.config import SuiteError, find_name, make_parameters, with_options
from src.utils.stats.leaderboard import SAME_BATTLES, format_leaderboard, write_leaderboard
from src.utils.suite.pipeline import CODE, Pipeline, measure_states
from src.utils.suite.run import make_pipeline, parse_arguments, report_errors, run_suite

BEAT_S = 10  # between two signs of life of a trial; without two of them it counts as killed


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

    def make_sampler(self, n_trials: int) -> optuna.samplers.BaseSampler:
        """Make what draws the values of the next trial, after `n_trials` of them."""
        if self.n_combinations:
            return optuna.samplers.GridSampler(self.parameters, int(self.seed))
        # Processes that share a storage must not draw the same values.
        return optuna.samplers.TPESampler(seed=int(self.seed) + n_trials)


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


def open_study(name: str, storage: str) -> optuna.Study:
    """Create a study, or load it and queue the values of its failed and killed trials again."""
    database = RDBStorage(storage, heartbeat_interval=BEAT_S)
    study = optuna.create_study(storage=database, study_name=name, load_if_exists=True)
    fail_stale_trials(study)
    latest = {str(trial.params): trial for trial in study.trials}
    for trial in latest.values():
        if trial.state == TrialState.FAIL and trial.params:
            study.enqueue_trial(trial.params)
    return study


def run_trial(trial: Trial, space: Space, pipeline: Pipeline, folder: Path) -> float:
    """Run one trial and return its log loss, nats per battle; SuiteError if the notebook fails."""
    values = {name: suggest(trial, name, domain) for name, domain in space.parameters.items()}
    texts = [runs.hash_json(values)[:6], *[f"{name}={value}" for name, value in values.items()]]
    # Named by the values: where they are tried again, the run resumes in its folder.
    artifacts = folder / re.sub(r"[^\w.=,+-]", "_", ",".join(texts))[:80]
    artifacts.mkdir(parents=True, exist_ok=True)
    for upstream in pipeline.needs(pipeline.by_name[space.notebook]):
        if not (artifacts / upstream).exists():
            (artifacts / upstream).symlink_to(Path("../../..", upstream))
    os.environ["ARENA_ARTIFACTS"] = str(artifacts.resolve())  # where the notebook writes
    parameters = make_parameters(
        pipeline.defaults, profile=pipeline.parameters, settings=space.settings(values)
    )
    own = dataclasses.replace(pipeline, artifacts=artifacts, parameters=parameters)
    run_suite(own, [space.notebook], sys.stdout)
    return runs.read_json(artifacts / space.notebook / "metrics.json")["log_loss"]


def search(space: Space, pipeline: Pipeline, storage: str, n_trials: int) -> optuna.Study:
    """Run trials until `n_trials` (0: 20, or all of a grid) are complete, and write the results.

    `storage` is the URL of a database, or a file that gets one; empty: in the search's folder.
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
    storage = storage or str(folder / "trials.db")
    study = open_study(space.name, storage if "://" in storage else f"sqlite:///{storage}")
    n_wanted = n_trials or space.n_combinations or 20
    n_wanted = min(n_wanted, space.n_combinations or n_wanted)
    for _ in range(n_wanted):
        complete = study.get_trials(states=(TrialState.COMPLETE,))
        if len({str(trial.params) for trial in complete}) >= n_wanted:
            break
        study.sampler = space.make_sampler(len(study.trials))
        study.optimize(
            lambda trial: run_trial(trial, space, pipeline, folder), n_trials=1, catch=(SuiteError,)
        )
    runs.write_table(folder / "trials.csv", study.trials_dataframe())
    board = write_leaderboard(pipeline.artifacts)
    same = board.groupby(SAME_BATTLES, dropna=False).ngroup()
    own = board["run"].astype(str).str.startswith(f"searches/{space.name}/")
    print(f"\n{format_leaderboard(board[same.isin(same[own])])}\n")
    return study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a search from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m src.utils.suite.search",
        description="Search over the parameters of a notebook; further options are the suite's.",
    )
    parser.add_argument("space", type=Path, help="YAML file")
    parser.add_argument("--notebook", default="", metavar="NB", help="in place of the file's")
    parser.add_argument("--n-trials", type=int, default=0, help="in all (20, or all of a grid)")
    parser.add_argument("--storage", default="", help="URL of a database, or a file for one")
    given, rest = parser.parse_known_args(arguments)
    pipeline = make_pipeline(parse_arguments(rest))
    space = read_space(given.space, pipeline, given.notebook)
    study = search(space, pipeline, given.storage, given.n_trials)
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    for trial in sorted(trials, key=lambda trial: trial.value or 0.0):
        values = " ".join(f"{name}={value}" for name, value in trial.params.items())
        print(f"{trial.value:.4f}  {values}")
    print(f"\nAll trials: {pipeline.artifacts / 'searches' / space.name}/trials.csv")
    return 0 if trials else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sys.exit(report_errors(main))
