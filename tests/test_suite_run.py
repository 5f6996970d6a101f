"""The runner on three toy notebooks: 01_words -> 02_count -> 03_report."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup

from src.utils.config import SuiteError
from src.utils.runs import read_json, write_json
from src.utils.suite import run as runner
from src.utils.suite.pipeline import Pipeline, Stage
from src.utils.suite.run import run_suite

STAGES = (
    Stage("01_words", ("words.txt", "bias.json")),
    Stage(
        "02_count",
        ("history.csv", "model/", "count.txt", "metrics.json"),
        reads={"01_words": ("words.txt",)},
    ),
    Stage("03_report", ("report.txt",), reads={"02_count": ("count.txt",)}),
)
NAMES = [stage.name for stage in STAGES]
HEAD = """import json, os, sys, time
from pathlib import Path
root = Path(os.environ['ARENA_ARTIFACTS'])"""
WRITE_WORDS = """(root / '01_words/words.txt').write_text('abc' * SEED)
(root / '01_words/bias.json').write_text('{}')"""
WRITE_COUNT = """words = (root / '01_words/words.txt').read_text()
(root / '02_count/model').mkdir(exist_ok=True)
(root / '02_count/model/words.safetensors').write_text(words)
(root / '02_count/count.txt').write_text(str(len(words)))
(root / '02_count/history.csv').write_text('step,log_loss\\n1,1.0\\n')
scores = {'log_loss': 1.0, 'n_pairs': 6, 'seconds': time.time()}
(root / '02_count/metrics.json').write_text(json.dumps(scores))"""
WRITE_REPORT = (
    "(root / '03_report/report.txt').write_text((root / '02_count/count.txt').read_text())"
)


def write_notebook(path, parameters, *cells):
    made = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_code_cell(source) for source in cells]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)


def write_count(folder, *cells):
    write_notebook(folder / "notebooks" / "02_count.ipynb", "RATE: float = 1.0", HEAD, *cells)


def make_pipeline(folder, force=False, **parameters):
    given = {"01_words": parameters}
    return Pipeline(folder / "artifacts", given, folder / "notebooks", STAGES, force)


def run(folder, names=NAMES, force=False, **parameters):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARENA_ARTIFACTS", str(folder / "artifacts"))
        rows = run_suite(make_pipeline(folder, force, **parameters), names, printed)
    return {row["notebook"]: row["status"] for row in rows}, printed.getvalue()


def reasons(folder, **options):
    pipeline = make_pipeline(folder, **options)
    return {stage.name: pipeline.why_run(stage) for stage in STAGES if pipeline.why_run(stage)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a {folder}")  # papermill reads braces as parameters
    (folder / "notebooks").mkdir()
    write_notebook(folder / "notebooks" / "01_words.ipynb", "SEED: int = 1", HEAD, WRITE_WORDS)
    write_count(folder, WRITE_COUNT)
    write_notebook(folder / "notebooks" / "03_report.ipynb", "SEED: int = 1", HEAD, WRITE_REPORT)
    statuses, _ = run(folder)
    assert statuses == dict.fromkeys(NAMES, "ran")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_finished_pipeline_is_up_to_date(folder):
    assert run(folder)[0] == dict.fromkeys(NAMES, "skipped")


def test_a_run_leaves_an_executed_copy_and_html(finished):
    executed = nbformat.read(finished / "artifacts/notebooks/02_count.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells)
    assert "<html" in (finished / "artifacts/notebooks/02_count.html").read_text()[:500]


def test_set_up_is_folded_on_the_page_and_wide_tables_scroll(tmp_path):
    path = tmp_path / "01_words.ipynb"
    write_notebook(path, "SEED: int = 1", "import shown", "import folded")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["hide-input"]
    nbformat.write(notebook, path)
    runner.write_html(path)
    page = BeautifulSoup(path.with_suffix(".html").read_text(), "html.parser")
    (details,) = page.find_all("details")
    assert "folded" in details.get_text() and "shown" not in details.get_text()
    assert "shown" in page.get_text()
    assert re.search(r"table \{[^}]*overflow-x: auto", str(page))


def test_deleting_an_output_rebuilds_its_notebook_alone(folder):
    (folder / "artifacts/02_count/model/words.safetensors").unlink()
    statuses, printed = run(folder)
    assert statuses == {"01_words": "skipped", "02_count": "ran", "03_report": "skipped"}
    assert "02_count: runs, output model/words.safetensors is missing" in printed


def test_changed_content_reruns_only_the_notebooks_that_read_it(folder):
    # The same number of letters: 03 reads an unchanged count.
    (folder / "artifacts/01_words/words.txt").write_text("xyz")
    assert reasons(folder) == {
        "01_words": "output words.txt is changed",
        "02_count": "01_words/words.txt is changed",
    }


@pytest.mark.parametrize(
    ("options", "reason"), [({"SEED": 2}, "SEED was 1, is 2"), ({"force": True}, "FORCE=1")]
)
def test_parameters_and_force_rerun(finished, options, reason):
    assert reasons(finished, **options)["01_words"] == reason


def test_a_parameter_set_to_its_default_reruns_nothing(finished):
    assert reasons(finished, SEED=1) == {}


def test_changed_code_reruns_but_changed_prose_does_not(folder):
    path = folder / "notebooks" / "03_report.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("More words."))
    nbformat.write(notebook, path)
    assert reasons(folder) == {}
    notebook.cells.append(nbformat.v4.new_code_cell("1"))
    nbformat.write(notebook, path)
    assert reasons(folder) == {"03_report": "the notebook's code is changed"}


@pytest.mark.parametrize("text", ['{"log_loss": 0.1}', '{"log_l'])
def test_metrics_edited_by_hand_are_detected(folder, text):
    (folder / "artifacts/02_count/metrics.json").write_text(text)
    assert reasons(folder) == {"02_count": "output metrics.json is changed"}


def test_a_damaged_model_is_left_to_its_notebook_but_a_damaged_base_goes(folder):
    run_folder = folder / "artifacts/02_count"
    (run_folder / "base").mkdir()
    (run_folder / "base/weights").write_text("1")
    (run_folder / "run.json").unlink()
    run(folder)
    (run_folder / "model/words.safetensors").write_text("damaged")
    runner.clear_outputs(make_pipeline(folder), STAGES[1])
    assert (run_folder / "model/words.safetensors").read_text() == "damaged"
    assert (run_folder / "base").exists()
    run(folder)
    (run_folder / "base/weights").write_text("damaged")
    runner.clear_outputs(make_pipeline(folder), STAGES[1])
    assert not (run_folder / "base").exists()
    assert (run_folder / "earlier/base-changed/weights").read_text() == "damaged"


@pytest.mark.parametrize("place", ["checkpoints", "model/fold_1", "count.txt.d"])
@pytest.mark.parametrize("force", [True, False])
def test_only_force_removes_what_training_left(folder, force, place):
    file = folder / "artifacts/02_count" / place / "step.safetensors"
    file.parent.mkdir()
    file.touch()
    assert reasons(folder) == {}
    runner.clear_outputs(make_pipeline(folder, force), STAGES[1])
    assert file.exists() != force


@pytest.mark.parametrize("force", [True, False])
def test_not_even_force_removes_the_models_that_were_set_aside(folder, force):
    file = folder / "artifacts/02_count/earlier/0123/fold_0/model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    run(folder, ["02_count"], force)
    assert file.exists()
    file.write_text("Whatever happens there says nothing about the run.")
    assert reasons(folder) == {}


def test_a_rerun_removes_only_the_marks_of_completeness(folder):
    run_folder = folder / "artifacts/02_count"
    runner.clear_outputs(make_pipeline(folder), STAGES[1])
    left = {path.name for path in run_folder.iterdir()}
    assert left == {"count.txt", "history.csv", "model"}


def test_an_added_file_is_no_damage(folder):
    (folder / "artifacts/02_count/.DS_Store").touch()
    assert reasons(folder) == {}


def test_a_skip_says_that_the_library_changed(folder, monkeypatch):
    record = folder / "artifacts/02_count/run.json"
    assert "library changed" not in run(folder)[1]
    write_json(record, read_json(record) | {"library": "of another version"})
    printed = run(folder)[1].splitlines()
    assert [line.split()[1] for line in printed if "FORCE=1" in line] == ["02_count:"]


def test_a_notebook_alone_needs_complete_earlier_ones(folder):
    (folder / "artifacts/01_words/bias.json").unlink()
    with pytest.raises(SuiteError, match=r"02_count reads .*01_words/bias.json.*make run NB=01"):
        run(folder, ["02_count"])


def test_a_failing_cell_stops_the_suite_and_is_shown(folder):
    write_count(folder, "wages = {}\nwages['Ada']", WRITE_COUNT)
    with pytest.raises(SuiteError) as error:
        run(folder)
    for part in ("02_count", "[3]", "    wages['Ada']", "KeyError: 'Ada'", "02_count.ipynb"):
        assert part in str(error.value)
    assert not (folder / "artifacts/02_count/metrics.json").exists()
    assert reasons(folder)["02_count"] == "no complete run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("sys.exit()", WRITE_COUNT), r"SystemExit.*sys.exit\(\)"),
        ((WRITE_COUNT, "sys.exit(0)"), "SystemExit"),
        (("time.sleep(1)\nos.kill(os.getpid(), 9)", WRITE_COUNT), r"[1-9]\d+ MiB.*os.kill"),
        ((WRITE_COUNT, "(root / '02_count/count.txt').unlink()"), "did not write .*count.txt"),
        ((WRITE_COUNT.replace("count.txt", "counts.txt"),), "did not write .*count.txt"),
        ((WRITE_COUNT.partition("scores")[0],), "did not write .*metrics.json"),
    ],
)
def test_a_run_that_only_seems_to_end_well_fails(folder, cells, message):
    write_count(folder, *cells)
    with pytest.raises(SuiteError, match=f"(?s){message}"):
        run(folder, ["02_count"])
    assert reasons(folder)["02_count"] == "no complete run"


@pytest.mark.slow
def test_the_kernel_is_this_python_whatever_is_registered(folder, tmp_path, monkeypatch):
    other = tmp_path / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_count(folder, WRITE_COUNT, "(root / '02_count/count.txt').write_text(sys.executable)")
    run(folder, ["02_count"])
    assert (folder / "artifacts/02_count/count.txt").read_text() == sys.executable


def start_slow_suite(folder):
    write_count(folder, WRITE_COUNT, "(root / 'sleeping').touch()\ntime.sleep(300)")
    # A background job of a script ignores SIGINT, and its children inherit that.
    script = f"""import pathlib, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_suite_run as toy
signal.signal(signal.SIGINT, signal.default_int_handler)
toy.runner.make_pipeline = lambda _: toy.make_pipeline(pathlib.Path({str(folder)!r}))
sys.exit(toy.runner.report_errors(lambda: toy.runner.main([])))"""
    environment = os.environ | {"ARENA_ARTIFACTS": str(folder / "artifacts")}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (folder / "artifacts/sleeping").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_killed_run_ends_its_kernel_and_is_not_taken_for_complete(folder, number, code):
    process, kernels = start_slow_suite(folder)
    process.send_signal(number)
    assert process.wait(30) == code
    process.stderr.close()
    assert kernels
    _, alive = psutil.wait_procs(kernels, timeout=15)
    assert not [kernel for kernel in alive if kernel.status() != psutil.STATUS_ZOMBIE]
    assert (folder / "artifacts/02_count/metrics.json").exists()
    assert reasons(folder)["02_count"] == "no complete run"


@pytest.fixture
def command(finished, monkeypatch):
    """The command line on the toy pipeline."""
    monkeypatch.setattr(
        runner, "make_pipeline", lambda options: make_pipeline(finished, options.force)
    )
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    return lambda arguments: runner.report_errors(lambda: runner.main(arguments))


def test_the_command_lists_what_would_run(command, capsys):
    assert command(["--list", "--only", "02-03"]) == 0
    assert re.findall(r"(\w+): up to date\n", capsys.readouterr().out) == NAMES[1:]
    assert command(["--list", "--force", "--only", "01"]) == 0
    assert "01_words: would run, FORCE=1" in capsys.readouterr().out


def test_the_command_fails_on_a_misspelt_notebook(command, capsys):
    assert command(["--only", "02_cuont"]) == 1
    assert "02_count" in capsys.readouterr().err


def test_the_command_ends_with_the_table(command, finished, capsys):
    assert command([]) == 0
    printed = capsys.readouterr().out
    row = re.search(r"02_count +skipped +[\d.]+ +\d+\n", printed)
    assert row and printed.index("03_report: up to date") < row.start()
    assert re.search(r"02 CPU baseline +1\.000 +6 *\n", printed)
    assert row.group() in (finished / "artifacts/summary.md").read_text()
    summary = json.loads((finished / "artifacts/summary.json").read_text())
    assert [line["log_loss"] for line in summary] == [None, 1.0, None]


def test_progress_shows_the_last_printed_line_without_its_blocks(monkeypatch):
    assert runner.LINE_S + runner.SAMPLE_S <= 60
    monkeypatch.setattr(runner, "SAMPLE_S", 0.01)
    monkeypatch.setattr(runner, "LINE_S", 0.1)
    stream, ended = io.StringIO(), threading.Event()
    progress = runner.Progress("02_count", 3, stream)
    progress.cell_starts(nbformat.v4.new_code_cell("fit()"), 1)
    progress.write("\r\x1b[32mtraining:  85%|████▌  | 34/40 [00:06<00:01]\x1b[0m\r")
    threading.Timer(0.35, ended.set).start()
    progress.report(ended)
    lines = stream.getvalue().splitlines()
    line = r"02_count: cell 2 of 3, \d+ s, \d+ MiB  training:  85% 34/40 \[00:06<00:01\]"
    assert 2 <= len(lines) <= 3 and all(re.fullmatch(line, one) for one in lines)


def test_a_notebook_that_needs_test_battles_is_left_out_without_them(folder, tmp_path):
    (tmp_path / "train.csv").touch()
    report = Stage("03_report", ("report.txt",), raw=("test",))
    given = {"03_report": {"DATA": str(tmp_path / "train.csv")}}
    stages = (*STAGES[:2], report)
    pipeline = Pipeline(folder / "artifacts", given, folder / "notebooks", stages)
    printed = io.StringIO()
    assert [row["notebook"] for row in run_suite(pipeline, NAMES, printed)] == NAMES[:2]
    assert re.search(r"03_report: .*TEST=", printed.getvalue())


def test_the_closing_table_compares_models_on_the_same_battles_by_what_they_are(tmp_path):
    rows = [
        {"notebook": name, "status": "ran", "output": str(tmp_path / name)}
        for name in ("03_modernbert", "05_ensemble")
    ]
    for row in rows:
        Path(row["output"]).mkdir()
    assert "log loss" not in runner.format_results(rows)
    network, blend = (Path(row["output"]) for row in rows)
    (network / "config.json").write_text(json.dumps({"checkpoint": "tiny:modernbert"}))
    (network / "metrics.json").write_text(json.dumps({"log_loss": 0.9, "n_pairs": 20_000}))
    assert re.search(r"03 tiny encoder \(stand-in\) +0\.900 +20,000", runner.format_results(rows))
    rungs = [{"model": "class prior", "log_loss": 1.1, "low": 1.09, "high": 1.11}]
    label = "03 tiny encoder (stand-in)"
    rungs.append({"model": label, "log_loss": 1.0, "low": 0.99, "high": 1.01})
    blended = {"n_pairs": 1234, "log_loss": 1.0, "ladder": rungs, "oracle_log_loss": 0.95}
    blended["published"] = label
    (blend / "metrics.json").write_text(json.dumps(blended))
    scores = runner.format_results(rows).split("\n\n")[1]
    assert re.search(r"class prior +1\.100 +\(1\.090–1\.110\) +1,234 *\n", scores)
    assert re.search(r"stand-in\) +1\.000 +\(0\.990–1\.010\) +1,234 +published", scores)
    assert re.search(r"oracle .*0\.950", scores) and "0.900" not in scores


def test_a_record_of_an_older_layout_counts_as_no_complete_run(folder):
    path = folder / "artifacts/02_count/run.json"
    path.write_text(json.dumps({"parameters": {}, "left": {}, "read": {}}))
    assert reasons(folder) == {"02_count": "no complete run"}


@pytest.mark.parametrize(("busy", "n_idle"), [(0, 8), (50, 4), (95, 1), (100, 1)])
def test_kernels_get_a_thread_per_idle_core(monkeypatch, busy, n_idle):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: float(busy))
    assert runner.count_idle_cores() == n_idle
