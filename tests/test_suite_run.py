"""The runner on three toy notebooks: 01_words -> 02_count -> 03_report."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from src.utils.config import SuiteError
from src.utils.suite import run as runner
from src.utils.suite.pipeline import River, Stage
from src.utils.suite.run import run_suite

STAGES = (
    Stage("01_words", ("words.txt", "bias.json"), "bias.json"),
    Stage(
        "02_count",
        ("model/", "count.txt", "metrics.json"),
        "metrics.json",
        reads={"01_words": ("words.txt",)},
    ),
    Stage("03_report", ("report.txt",), "report.txt", reads={"02_count": ("count.txt",)}),
)
NAMES = [stage.name for stage in STAGES]
HEAD = "import json, os, sys, time\nfrom pathlib import Path\nroot = Path(os.environ['ARENA_ARTIFACTS'])"
WRITE_WORDS = "(root / '01_words/words.txt').write_text('abc' * SEED)\n(root / '01_words/bias.json').write_text('{}')"
WRITE_COUNT = """words = (root / '01_words/words.txt').read_text()
(root / '02_count/model').mkdir(exist_ok=True)
(root / '02_count/model/words.safetensors').write_text(words)
(root / '02_count/count.txt').write_text(str(len(words)))
(root / '02_count/metrics.json').write_text(json.dumps({'log_loss': 1.0, 'seconds': time.time()}))"""
WRITE_REPORT = (
    "(root / '03_report/report.txt').write_text((root / '02_count/count.txt').read_text())"
)


def write_notebook(path, parameters, *cells):
    made = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_code_cell(source) for source in cells]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)


def write_count(folder, *cells):
    write_notebook(folder / "notebooks" / "02_count.ipynb", 'PROFILE: str = "auto"', HEAD, *cells)


def make_river(folder, force=False, **parameters):
    return River(
        folder / "artifacts", {"01_words": parameters}, folder / "notebooks", STAGES, force
    )


def run(folder, names=NAMES, force=False, **parameters):
    told = io.StringIO()
    results = run_suite(make_river(folder, force, **parameters), names, told)
    return {result.notebook: result.status for result in results}, told.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "notebooks").mkdir()
    write_notebook(folder / "notebooks" / "01_words.ipynb", "SEED: int = 1", HEAD, WRITE_WORDS)
    write_count(folder, WRITE_COUNT)
    write_notebook(folder / "notebooks" / "03_report.ipynb", "SEED: int = 1", HEAD, WRITE_REPORT)
    statuses, _ = run(folder)
    assert statuses == dict.fromkeys(NAMES, "ran")
    return folder


@pytest.fixture
def river_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_finished_river_is_skipped(river_folder):
    statuses, told = run(river_folder)
    assert statuses == dict.fromkeys(NAMES, "skipped")
    assert "library changed" not in told


def test_a_run_leaves_an_executed_copy_and_html(finished):
    executed = nbformat.read(finished / "artifacts/notebooks/02_count.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells)
    assert "<html" in (finished / "artifacts/notebooks/02_count.html").read_text()[:500]


def test_deleting_an_artifact_remakes_its_notebook_alone(river_folder):
    (river_folder / "artifacts/02_count/model/words.safetensors").unlink()
    statuses, told = run(river_folder)
    assert statuses == {"01_words": "skipped", "02_count": "ran", "03_report": "skipped"}
    assert "02_count: runs, model/words.safetensors is missing" in told


def test_changed_content_flows_down_only_as_far_as_it_is_read(river_folder):
    # The same number of letters: 03 reads an unchanged count.
    (river_folder / "artifacts/01_words/words.txt").write_text("xyz")
    river = make_river(river_folder)
    reasons = {name: river.why_run(river.by_name[name]) for name in NAMES}
    assert reasons == {
        "01_words": "words.txt is changed",
        "02_count": "01_words/words.txt changed",
        "03_report": "",
    }


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [({"SEED": 2}, "SEED was its default, is 2"), ({"force": True}, "FORCE=1")],
)
def test_parameters_and_force_remake(finished, parameters, reason):
    river = make_river(finished, **parameters)
    assert river.why_run(STAGES[0]) == reason


def test_changed_code_remakes_but_changed_prose_does_not(river_folder):
    path = river_folder / "notebooks" / "03_report.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("More words."))
    nbformat.write(notebook, path)
    assert make_river(river_folder).why_run(STAGES[2]) == ""
    notebook.cells.append(nbformat.v4.new_code_cell("1"))
    nbformat.write(notebook, path)
    assert make_river(river_folder).why_run(STAGES[2]) == "its code changed"


def test_a_folder_with_a_damaged_file_is_made_again_whole(river_folder):
    model = river_folder / "artifacts/02_count/model"
    (model / "words.safetensors").write_text("damaged")
    (model / "finished").touch()
    runner._clear(make_river(river_folder), STAGES[1])
    assert not model.exists()
    assert (river_folder / "artifacts/02_count/count.txt").exists()


def test_force_forgets_checkpoints(river_folder):
    (river_folder / "artifacts/02_count/checkpoints").mkdir()
    runner._clear(make_river(river_folder, force=True), STAGES[1])
    assert not (river_folder / "artifacts/02_count").exists()


def test_a_stranger_file_is_no_damage(river_folder):
    (river_folder / "artifacts/02_count/.DS_Store").touch()
    assert make_river(river_folder).why_run(STAGES[1]) == ""


def test_checkpoints_are_no_artifact(river_folder):
    (river_folder / "artifacts/02_count/checkpoints").mkdir()
    (river_folder / "artifacts/02_count/checkpoints/step.safetensors").touch()
    assert make_river(river_folder).why_run(STAGES[1]) == ""


def test_a_library_that_changed_is_told_on_the_skip_line(river_folder, monkeypatch):
    monkeypatch.setattr(runner, "hash_library", lambda: "other")
    assert "library changed since; FORCE=1 remakes" in run(river_folder)[1]


def test_a_notebook_alone_needs_its_upstream(river_folder):
    (river_folder / "artifacts/01_words/bias.json").unlink()
    with pytest.raises(SuiteError, match=r"02_count reads 01_words/bias.json.*make run NB=01"):
        run(river_folder, ["02_count"])


def test_a_failing_cell_stops_the_suite_and_is_shown(river_folder):
    write_count(river_folder, "wages = {}\nwages['Ada']", WRITE_COUNT)
    with pytest.raises(SuiteError) as error:
        run(river_folder)
    for part in (
        "02_count failed in cell [3]",
        "    wages['Ada']",
        "KeyError: 'Ada'",
        "notebooks/02_count.ipynb",
    ):
        assert part in str(error.value)
    assert not (river_folder / "artifacts/02_count/metrics.json").exists(), (
        "the mark of the old run was left"
    )
    assert make_river(river_folder).why_run(STAGES[1]) == "there is no finished run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("sys.exit()", WRITE_COUNT), r"leaves the notebook by SystemExit.*sys.exit\(\)"),
        ((WRITE_COUNT, "sys.exit(0)"), "leaves the notebook by SystemExit"),
        (("os.kill(os.getpid(), 9)", WRITE_COUNT), r"os.kill.*killed, perhaps for memory"),
        ((WRITE_COUNT, "(root / '02_count/count.txt').unlink()"), "did not leave .*count.txt"),
        ((WRITE_COUNT.replace("1.0", "float('nan')"),), "expected a finite log_loss, got nan"),
        ((WRITE_COUNT.replace("count.txt", "counts.txt"),), "did not write .*count.txt again"),
    ],
)
def test_a_run_that_only_seems_to_end_well_fails(river_folder, cells, message):
    write_count(river_folder, *cells)
    with pytest.raises(SuiteError, match=f"(?s){message}"):
        run(river_folder, ["02_count"])
    assert make_river(river_folder).why_run(STAGES[1])


@pytest.mark.slow
def test_the_kernel_is_this_python_whatever_is_registered(river_folder, tmp_path, monkeypatch):
    other = tmp_path / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {
        "argv": ["/bin/false", "{connection_file}"],
        "display_name": "other",
        "language": "python",
    }
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_count(
        river_folder, WRITE_COUNT + "\n(root / '02_count/count.txt').write_text(sys.executable)"
    )
    run(river_folder, ["02_count"])
    assert (river_folder / "artifacts/02_count/count.txt").read_text() == sys.executable


def start_slow_suite(folder):
    write_count(folder, WRITE_COUNT, "(root / 'sleeping').touch()\ntime.sleep(300)")
    script = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import pathlib, test_suite_run as t\n"
    script += f"t.suite._make_river = lambda _: t.make_river(pathlib.Path({str(folder)!r}))\nsys.exit(t.suite.main([]))"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while not (folder / "artifacts/sleeping").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_killed_run_ends_its_kernel_and_is_not_taken_for_whole(river_folder, number, code):
    process, kernels = start_slow_suite(river_folder)
    process.send_signal(number)
    assert process.wait(30) == code
    assert kernels
    _, alive = psutil.wait_procs(kernels, timeout=15)
    assert not [kernel for kernel in alive if kernel.status() != psutil.STATUS_ZOMBIE]
    assert make_river(river_folder).why_run(STAGES[1]) == "run.json is missing"


def test_the_closing_table_tells_scores_and_places(finished):
    results = run_suite(make_river(finished), NAMES, io.StringIO())
    runner.write_summary(results, finished / "artifacts")
    table = (finished / "artifacts/summary.md").read_text()
    assert "| 02_count  | skipped |" in table
    assert "1.0000" in table
    assert json.loads((finished / "artifacts/summary.json").read_text())[1]["log_loss"] == 1.0


@pytest.fixture
def command(finished, monkeypatch):
    """The command line on the toy river."""
    monkeypatch.setattr(runner, "_make_river", lambda options: make_river(finished, options.force))
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    return runner.main


def test_the_command_lists_what_would_run(command, capsys):
    assert command(["--list", "--only", "02-03"]) == 0
    assert re.fullmatch(r"02_count +is whole\n03_report +is whole\n", capsys.readouterr().out)
    assert command(["--list", "--force", "--only", "01"]) == 0
    assert "01_words             would run: FORCE=1" in capsys.readouterr().out


def test_the_command_fails_on_a_misspelt_notebook(command, capsys):
    assert command(["--only", "02_cuont"]) == 1
    assert "did you mean '02_count'?" in capsys.readouterr().err


def test_the_command_closes_with_the_table(command, finished, capsys):
    assert command([]) == 0
    told = capsys.readouterr().out
    assert (finished / "artifacts/summary.md").exists()
    assert told.index("03_report: skipped") < told.index("| 03_report | skipped |")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_the_kernels_own_bar_without_its_blocks():
    terminal = Terminal()
    with runner.Monitor("02_count", 3, terminal) as monitor:
        monitor.cell_starts(nbformat.v4.new_code_cell("fit()"), 1)
        monitor.write("\r\x1b[32mtraining:  85%|████▌  | 34/40 [00:06<00:01]\x1b[0m\r")
    assert re.search(
        r"02_count .* 1/3 cells  00:0\d, training:  85% 34/40 \[00:06<00:01\]", terminal.getvalue()
    )


def test_a_notebook_that_needs_test_battles_is_left_out_without_them(river_folder, tmp_path):
    train = tmp_path / "train.csv"
    train.touch()
    asks_for_test = Stage("03_report", ("report.txt",), "report.txt", raw=("test",))
    river = make_river(river_folder)
    parameters = {"03_report": {"DATA": str(train)}}
    river = River(river.artifacts, parameters, river.notebooks, (*STAGES[:2], asks_for_test))
    told = io.StringIO()
    assert [result.notebook for result in run_suite(river, NAMES, told)] == NAMES[:2]
    assert "03_report: left out, there is no test file" in told.getvalue()
    (tmp_path / "test.csv").touch()
    assert not river.lacks_test(asks_for_test)


def test_the_ladder_of_a_notebook_is_told_rung_by_rung(tmp_path):
    result = runner.Result("02_baseline", "ran", 1.0, 1.0, 1.0, 0.5, None, str(tmp_path))
    assert runner.format_ladder(result) == ""
    rungs = [{"model": "class prior", "log_loss": 1.1, "low": 1.09, "high": 1.11}]
    (tmp_path / "metrics.json").write_text(json.dumps({"n_pairs": 1234, "ladder": rungs}))
    told = runner.format_ladder(result)
    assert (
        told
        == "02_baseline: log loss on 1,234 held-out battles\n  class prior  1.1000 (1.0900 to 1.1100)"
    )
