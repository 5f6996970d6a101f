"""Searches on the toy pipeline of test_suite_run; a script stands in for the suite where it can."""

import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import optuna
import pandas as pd
import psutil
import pytest
from optuna.trial import TrialState, create_trial
from test_suite_run import HEAD, STAGES, WRITE_WORDS, write_count, write_notebook

from src.utils.config import SuiteError
from src.utils.paths import SETTINGS
from src.utils.runs import write_json, write_pairs
from src.utils.suite import search as module
from src.utils.suite.pipeline import Pipeline
from src.utils.suite.run import make_pipeline as make_pipeline_of_suite
from src.utils.suite.run import parse_arguments
from src.utils.suite.search import COMPLETE, PRUNED, Space, read_space, run_trial, search

# Scores (RATE - 2)**2; a run with a bad score takes a minute.
FAKE_SUITE = """import json, sys, time
from pathlib import Path
artifacts = Path(sys.argv[sys.argv.index("--artifacts") + 1])
values = dict(text.split(".", 1)[1].split("=") for text in sys.argv[sys.argv.index("--set") + 1:])
with (artifacts.parent / "calls.txt").open("a") as file:
    file.write(artifacts.name + "\\n")
if (artifacts.parents[3] / "break").exists():
    sys.exit("it broke")
folder = artifacts / "02_count"
folder.mkdir(exist_ok=True)
loss = (float(values["RATE"]) - 2) ** 2
if loss > 50:
    (folder / "checkpoints").mkdir()
    time.sleep(60)
(folder / "metrics.json").write_text(json.dumps({"log_loss": loss, "data_hash": "d"}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "artifacts/01_words").mkdir(parents=True)
    for name in STAGES[0].outputs:
        (tmp_path / "artifacts/01_words" / name).touch()
    write_notebook(tmp_path / "notebooks/01_words.ipynb", "SEED: int = 1", HEAD, WRITE_WORDS)
    write_notebook(tmp_path / "notebooks/03_report.ipynb", "SEED: int = 1")
    write_count(tmp_path, "")
    (tmp_path / "fake.py").write_text(FAKE_SUITE)
    monkeypatch.setattr(module, "SUITE", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(module, "POLL_S", 0.05)
    monkeypatch.setattr(module, "run_suite", lambda *_: None)  # 01 is not needed here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield tmp_path


def make_pipeline(folder):
    return Pipeline(folder / "artifacts", {}, folder / "notebooks", STAGES)


def run(folder, text, n_trials=0, storage=""):
    (folder / "toy.yaml").write_text(f"notebook: '02'\n{text}")
    pipeline = make_pipeline(folder)
    space = read_space(folder / "toy.yaml", pipeline)
    return search(space, pipeline, storage, n_trials, [])


def results(folder):
    """The folder of the only search that is named toy."""
    (found,) = (folder / "artifacts/searches").glob("toy-*")
    return found


def calls(folder):
    return (results(folder) / "calls.txt").read_text().split()


GRID = "parameters: {RATE: ['1', '2', '3']}"
RANGE = "parameters: {RATE: {low: 1.0, high: 3.0}}"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("parameters: {RTAE: ['1.0']}", "RATE"),
        ("parameters: {RATE: [many]}", "many"),
        ("parameters: {RATE: {low: 1.0, high: much}}", "much"),
        ("parameters: {RATE: {low: 2.0, high: 1.0}}", "1.0"),
        ("parameters: {RATE: {low: 1e-3}}", "high"),
        ("parameters: {RATE: 1.0}", "toy.yaml"),
        ("grid: {RATE: [1.0]}", "grid"),
        ("fixed: {RAET: 1}\nparameters: {RATE: ['1.0']}", "RATE"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_runs(folder, text, named):
    with pytest.raises(SuiteError, match=named):
        run(folder, text)


def test_a_notebook_without_a_log_loss_cannot_be_searched(folder):
    (folder / "toy.yaml").write_text("notebook: '03'\nparameters: {SEED: ['1']}")
    with pytest.raises(SuiteError, match="03_report"):
        read_space(folder / "toy.yaml", make_pipeline(folder))


@pytest.mark.parametrize("name", ["heads_03", "heads_04"])
def test_the_committed_spaces_are_valid_grids(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.yaml"
    space = read_space(path, Pipeline(Path(), {}))
    assert set(map(type, space.parameters.values())) == {list}


def test_a_grid_tries_each_combination_once_and_a_finished_one_never_again(folder):
    for _ in range(2):
        study = run(folder, GRID)
        assert sorted(trial.value for trial in study.trials) == [0, 1, 1]
    assert sorted(call.split("RATE=")[1] for call in calls(folder)) == ["1", "2", "3"]


def test_a_search_resumes_up_to_its_number_of_trials_and_is_the_same_with_the_same_seed(folder):
    run(folder, RANGE, n_trials=2)
    rates = [trial.params["RATE"] for trial in run(folder, RANGE, n_trials=4).trials]
    assert len(rates) == len(calls(folder)) == len(set(rates)) == 4
    assert all(1 <= rate <= 3 for rate in rates)
    again = run(folder, f"name: again\n{RANGE}", n_trials=4)
    assert [trial.params["RATE"] for trial in again.trials] == rates
    other = run(folder, f"name: other\nseed: 1\n{RANGE}", n_trials=1)
    assert other.trials[0].params["RATE"] != rates[0]


def test_a_range_of_whole_numbers_gives_whole_numbers(folder):
    study = run(folder, "parameters: {RATE: {low: 2, high: 4, step: 2}}", n_trials=3)
    assert {str(trial.params["RATE"]) for trial in study.trials} <= {"2", "4"}


def test_a_failed_trial_is_named_and_run_again_in_its_folder(folder):
    (folder / "break").touch()
    assert [trial.state for trial in run(folder, GRID, n_trials=1).trials] == [TrialState.FAIL]
    assert "it broke" in next(folder.rglob("suite.log")).read_text()
    (folder / "break").unlink()
    study = run(folder, GRID)
    assert len(study.get_trials(states=(COMPLETE, PRUNED))) == 3
    assert sorted(calls(folder)).count(calls(folder)[0]) == 2
    assert len(set(calls(folder))) == 3


@pytest.mark.slow
def test_an_interrupted_trial_is_run_again_in_its_folder(folder):
    space_text = "parameters: {RATE: ['20']}"  # its run takes a minute
    script = f"""import pathlib, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_suite_search as toy
toy.module.SUITE = [sys.executable, {str(folder / "fake.py")!r}]
toy.module.run_suite = lambda *_: None
toy.run(pathlib.Path({str(folder)!r}), {space_text!r})"""
    killed = subprocess.Popen([sys.executable, "-c", script])
    while not list(folder.rglob("checkpoints")):
        assert killed.poll() is None
        time.sleep(0.1)
    children = psutil.Process(killed.pid).children()
    killed.kill()
    killed.wait()
    for child in children:
        child.kill()
    fake = FAKE_SUITE.replace("mkdir()", "mkdir(exist_ok=True)").replace("> 50", "> 999")
    (folder / "fake.py").write_text(fake)
    study = run(folder, space_text)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, COMPLETE]
    first, second = calls(folder)
    assert first == second


@pytest.mark.slow
def test_a_training_worse_than_the_median_is_pruned_at_a_validation_and_its_kernel_stopped(
    tmp_path, demo_pairs, tiny_base
):
    pipeline = Pipeline(tmp_path / "artifacts", {})
    write_pairs(tmp_path / "artifacts/01_eda/pairs.parquet", demo_pairs)
    (tmp_path / "artifacts/01_eda/bias.json").write_text("{}")
    study = optuna.create_study()
    better = {"value": 0.1, "intermediate_values": dict.fromkeys(range(40), 0.1)}
    study.add_trials([create_trial(**better) for _ in range(5)])  # the pruner wants five of them
    fixed = {"CHECKPOINT": str(tiny_base("modernbert")), "N_EPOCHS": "40"}
    space = Space("real", "03_modernbert", {"SEED": ["1"]}, fixed)
    folder, options = tmp_path / "artifacts/searches/real", ["--profile", "demo"]
    study.optimize(lambda trial: run_trial(trial, space, pipeline, folder, options), n_trials=1)
    run_folder = folder / study.trials[-1].user_attrs["folder"] / "03_modernbert"
    losses = pd.read_csv(run_folder / "history.csv")["log_loss"]
    assert (study.trials[-1].state, len(losses) < 40) == (PRUNED, True)
    assert study.trials[-1].value in losses.tolist()
    assert not (run_folder / "checkpoints").exists()
    alive = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [command for command in alive if "ipykernel_launcher" in command]


def test_other_settings_or_other_data_make_another_study(folder):
    names = {run(folder, f"fixed: {{RATE: {rate}}}\n{GRID}", 1).study_name for rate in (7, 7, 8)}
    assert len(names) == 2
    (folder / "artifacts/01_words/words.txt").write_text("others")
    assert run(folder, f"fixed: {{RATE: 7}}\n{GRID}", 1).study_name not in names


@pytest.mark.parametrize("storage", ["sqlite:///{}/shared.db", "{}/shared.log"])
def test_searches_share_a_storage(folder, storage):
    storage = storage.format(folder)
    run(folder, GRID, n_trials=1, storage=storage)
    others = run(folder, GRID, storage=storage)
    assert len(others.get_trials(states=(COMPLETE, PRUNED))) == 3
    assert len(calls(folder)) == 3


def test_results_are_a_table_pictures_and_the_leaderboard(folder):
    run(folder, RANGE, n_trials=6)
    assert len(pd.read_csv(results(folder) / "trials.csv")) == 6
    for name in ("optimization_history", "slice", "param_importances"):
        assert (results(folder) / f"{name}.png").stat().st_size > 5000
    board = pd.read_csv(folder / "artifacts/leaderboard.csv")
    assert board["run"].str.match(r"searches/toy-\w+/\d+,RATE=[\d.]+/02_count").sum() == 6


def test_the_command_runs_a_search_and_names_what_is_wrong(folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "make_pipeline", lambda _: make_pipeline(folder))
    (folder / "toy.yaml").write_text(GRID)
    options = ["--notebook", "02", "--n-trials", "2", "--profile", "demo"]
    assert module.main([str(folder / "toy.yaml"), *options]) == 0
    assert len(re.findall(r"[01]\.0000  00\d,RATE=[123]\n", capsys.readouterr().out)) == 2
    with pytest.raises(SuiteError, match=r"none\.yaml"):
        module.main([str(folder / "none.yaml")])


def test_trials_get_the_remembered_profile_and_data(folder, monkeypatch):
    artifacts, given = folder / "artifacts", []
    (folder / "train.csv").touch()
    named = {"PROFILE": "full", "DATA": str(folder / "train.csv")}
    write_json(artifacts / SETTINGS, named)
    monkeypatch.setenv("ARENA_ARTIFACTS", str(artifacts))

    def note(space, pipeline, storage, n_trials, options):
        options = [*options, "--artifacts", str(folder / "trial")]
        given.append(make_pipeline_of_suite(parse_arguments(options)))
        monkeypatch.setenv("ARENA_ARTIFACTS", str(artifacts))
        return optuna.create_study()

    monkeypatch.setattr(module, "search", note)
    (folder / "space.yaml").write_text("notebook: '03'\nparameters: {SEED: ['1']}")
    module.main([str(folder / "space.yaml"), "--set", "N_SEEDS=2"])
    (artifacts / SETTINGS).unlink()
    module.main([str(folder / "space.yaml"), "--profile", "demo"])
    checkpoints = [run.all_parameters("03_modernbert")["CHECKPOINT"] for run in given]
    assert checkpoints == ["answerdotai/ModernBERT-base", "tiny:modernbert"]
    assert given[0].parameters["01_eda"]["DATA"] == named["DATA"]
    assert not (artifacts / SETTINGS).exists(), "a search is no `make run`"
