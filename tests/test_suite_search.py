"""Searches on the toy pipeline of test_suite_run; a function stands in for the suite."""

import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from test_suite_run import HEAD, STAGES, WRITE_WORDS, write_count, write_notebook

from src.utils.config import SuiteError
from src.utils.paths import SETTINGS
from src.utils.runs import write_json
from src.utils.suite import search as module
from src.utils.suite.pipeline import Pipeline
from src.utils.suite.search import read_space, search


def fake_suite(pipeline, names, stream):
    """Score (RATE - 2)**2; a bad score takes a minute, unless a file `hurry` is there."""
    if names != ["02_count"]:
        return
    root = pipeline.artifacts.parents[3]
    with (pipeline.artifacts.parent / "calls.txt").open("a") as file:
        file.write(pipeline.artifacts.name + "\n")
    if (root / "break").exists():
        raise SuiteError("it broke")
    loss = (pipeline.all_parameters("02_count")["RATE"] - 2) ** 2
    if loss > 50 and not (root / "hurry").exists():
        time.sleep(60)
    assert os.environ["ARENA_ARTIFACTS"] == str(pipeline.artifacts)
    folder = pipeline.artifacts / "02_count"
    write_json(folder / "metrics.json", {"log_loss": loss, "data_hash": "d"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "artifacts/01_words").mkdir(parents=True)
    for name in STAGES[0].outputs:
        (tmp_path / "artifacts/01_words" / name).touch()
    write_notebook(tmp_path / "notebooks/01_words.ipynb", "SEED: int = 1", HEAD, WRITE_WORDS)
    write_notebook(tmp_path / "notebooks/03_report.ipynb", "SEED: int = 1")
    write_count(tmp_path, "")
    monkeypatch.setenv("ARENA_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(module, "run_suite", fake_suite)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield tmp_path


def make_pipeline(folder, **given):
    return Pipeline(folder / "artifacts", given, folder / "notebooks", STAGES)


def write_space(folder, text):
    (folder / "toy.yaml").write_text(f"notebook: '02'\n{text}")
    return folder / "toy.yaml"


def run(folder, text, n_trials=0, storage="", **given):
    pipeline = make_pipeline(folder, **given)
    return search(read_space(write_space(folder, text), pipeline), pipeline, storage, n_trials)


def complete(study):
    return study.get_trials(states=(TrialState.COMPLETE,))


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


def test_a_failed_trial_is_run_again_in_its_folder(folder):
    (folder / "break").touch()
    assert [trial.state for trial in run(folder, GRID, n_trials=1).trials] == [TrialState.FAIL]
    (folder / "break").unlink()
    assert sorted(trial.value for trial in complete(run(folder, GRID))) == [0, 1, 1]
    assert sorted(calls(folder)).count(calls(folder)[0]) == 2
    assert len(set(calls(folder))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("space", ["['20']", "{low: 19.0, high: 21.0}"])
def test_a_killed_trial_is_run_again_in_its_folder(folder, monkeypatch, space):
    space_text = f"parameters: {{RATE: {space}}}"  # a run takes a minute
    script = f"""import pathlib, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_suite_search as toy
toy.module.run_suite = toy.fake_suite
toy.module.BEAT_S = 1
toy.run(pathlib.Path({str(folder)!r}), {space_text!r}, n_trials=1)"""
    killed = subprocess.Popen([sys.executable, "-c", script])
    while not list(folder.rglob("calls.txt")):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    (folder / "hurry").touch()
    monkeypatch.setattr(module, "BEAT_S", 1)
    time.sleep(4)
    assert len(complete(run(folder, space_text, n_trials=1))) == 1
    first, second = calls(folder)
    assert first == second


def test_other_settings_or_other_data_make_another_study(folder):
    names = {run(folder, f"fixed: {{RATE: {rate}}}\n{GRID}", 1).study_name for rate in (7, 7, 8)}
    assert len(names) == 2
    (folder / "artifacts/01_words/words.txt").write_text("others")
    assert run(folder, f"fixed: {{RATE: 7}}\n{GRID}", 1).study_name not in names


@pytest.mark.parametrize("storage", ["sqlite:///{}/shared.db", "{}/shared.db"])
def test_searches_share_a_storage(folder, storage):
    storage = storage.format(folder)
    run(folder, GRID, n_trials=1, storage=storage)
    others = run(folder, GRID, storage=storage)
    assert len(complete(others)) == 3
    assert len(calls(folder)) == 3


def test_results_are_a_table_and_the_leaderboard(folder, capsys):
    run(folder, RANGE, n_trials=3)
    assert "best of 3 trials" in capsys.readouterr().out
    assert len(pd.read_csv(results(folder) / "trials.csv")) == 3
    board = pd.read_csv(folder / "artifacts/leaderboard.csv")
    assert board["run"].str.match(r"searches/toy-\w+/\w+,RATE=[\d.]+/02_count").sum() == 3


def test_a_trial_has_the_parameters_of_the_pipeline_beside_its_own(folder, monkeypatch):
    seen = []

    def note(pipeline, names, stream):
        seen.append(pipeline.parameters)
        fake_suite(pipeline, names, stream)

    monkeypatch.setattr(module, "run_suite", note)
    given = {"01_words": {"SEED": 5}, "02_count": {"RATE": 7.0}}
    run(folder, "parameters: {RATE: ['3']}", **given)
    assert seen == [given, {**given, "02_count": {"RATE": 3.0}, "03_report": {}}]


def test_the_command_runs_a_search_and_names_what_is_wrong(folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "make_pipeline", lambda _: make_pipeline(folder))
    (folder / "toy.yaml").write_text(GRID)
    options = ["--notebook", "02", "--n-trials", "2", "--profile", "demo"]
    assert module.main([str(folder / "toy.yaml"), *options]) == 0
    assert len(re.findall(r"[01]\.0000  RATE=[123]\n", capsys.readouterr().out)) == 2
    with pytest.raises(SuiteError, match=r"none\.yaml"):
        module.main([str(folder / "none.yaml")])


def test_trials_get_the_remembered_profile_and_data(folder, monkeypatch):
    artifacts, given = folder / "artifacts", []
    (folder / "train.csv").touch()
    named = {"PROFILE": "full", "DATA": str(folder / "train.csv")}
    write_json(artifacts / SETTINGS, named)

    def note(space, pipeline, storage, n_trials):
        given.append(pipeline)
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
