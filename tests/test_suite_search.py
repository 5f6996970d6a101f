import subprocess

import pytest

from src.utils.config import SuiteError
from src.utils.runs import write_json
from src.utils.suite import search as module
from src.utils.suite.search import Sweep, format_scores, main, name_point, read_sweep, run_sweep


def write_sweep(folder, text):
    path = folder / "trial.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination(tmp_path):
    path = write_sweep(tmp_path, "notebook: '02'\ngrid: {RIDGE: [0.5, 1], N_TREES: [10, 20]}")
    sweep = read_sweep(path)
    assert (sweep.name, sweep.notebook, len(sweep.points)) == ("trial", "02_baseline", 4)
    assert sweep.points[1] == {"RIDGE": 0.5, "N_TREES": 20}


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("grid: {RIDGE: [1.0]}", ValueError, "notebook"),
        ("notebook: '01'\ngrid: {N_FOLDS: [3]}", ValueError, "02_baseline"),
        ("notebook: '02'\ngrid: {RIDGE: 1.0}", ValueError, "lists"),
        ("notebook: '02'\ngrid: {RIGDE: [1.0]}", SuiteError, "RIDGE"),
        ("notebook: '02'\ngrid: {N_TREES: [many]}", SuiteError, "int"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path, capsys, text, error, said):
    path = write_sweep(tmp_path, text)
    with pytest.raises(error, match=said):
        read_sweep(path)
    assert main([str(path), "--artifacts", str(tmp_path)]) == 1 and said in capsys.readouterr().err


def test_folder_names_tell_the_parameters_and_never_meet():
    assert name_point({"RIDGE": 0.5, "SEED": 1}) == "RIDGE=0.5,SEED=1"
    names = {
        name_point({"CHECKPOINT": value}) for value in ("a/b", "a_b", "a b", "x" * 300, "x" * 301)
    }
    assert len(names) == 5 and all("/" not in name and len(name) < 100 for name in names)


def test_every_point_is_a_run_of_the_suite_in_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "01_eda").mkdir()
    write_json(tmp_path / "01_eda" / "run.json", {})
    commands = []

    def run(command, **options):
        commands.append(command)
        folder = (
            tmp_path
            / "sweeps"
            / "t"
            / name_point({"RIDGE": 2.0 if "02.RIDGE=2.0" in command else 1.0})
        )
        assert (folder / "01_eda" / "run.json").exists() and command[
            command.index("--artifacts") + 1
        ] == str(folder)
        if "02.RIDGE=1.0" in command:
            return subprocess.CompletedProcess(command, 1, "", "it broke")
        scores = {"log_loss": 1.03, "accuracy": 0.5, "data_hash": "d"}
        write_json(folder / "02_baseline" / "metrics.json", scores)
        return subprocess.CompletedProcess(command, 0, "done", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    sweep = Sweep("t", "02_baseline", [{"RIDGE": 1.0}, {"RIDGE": 2.0}])
    (failed,) = run_sweep(sweep, tmp_path, ["--profile", "demo"], n_jobs=2)
    assert "RIDGE=1.0" in failed and "it broke" in failed
    assert len(commands) == 2 and all(command[-2:] == ["--profile", "demo"] for command in commands)
    assert format_scores(sweep, tmp_path) == "1.0300  RIDGE=2.0"
    assert "sweeps/t/RIDGE=2.0/02_baseline" in (tmp_path / "leaderboard.csv").read_text()
