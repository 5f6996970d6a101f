"""Run the notebooks in order with papermill, report progress and check the outputs.

Notebooks that are up to date are skipped; `pipeline` says when.

    python -m src.utils.suite.run --only 02-05 --profile small --data ../arena/train.csv
"""

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import nbformat
import pandas as pd
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from src.utils import config, paths
from src.utils.battles.layouts import describe_file
from src.utils.config import SuiteError
from src.utils.runs import (
    Stopwatch,
    hash_file,
    hash_json,
    label_member,
    move_aside,
    read_json,
    write_json,
    write_text,
)
from src.utils.stats.explorer import STATIC
from src.utils.stats.tables import to_text
from src.utils.suite.pipeline import EARLIER, RECORD, Pipeline, Stage, files_under, measure_states

SAMPLE_S = 0.5  # between two measurements of memory
LINE_S = 30.0  # between two lines of progress
# Kernels print warnings about the first two although nothing is wrong; a page has no widgets.
QUIET = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "TOKENIZERS_PARALLELISM": "true", STATIC: "1"}
_SUMMARY = ("seconds", "peak_mib", "log_loss", "accuracy")
_NOISE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\|[█▏▎▍▌▋▊▉ ]*\|")  # colours and bars

# Set-up cells are folded as in the gallery; what is wide scrolls instead of running off a phone.
_PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_css -%}{{ super() }}<style>
.jp-OutputArea-output { overflow-x: auto; }
body .jp-RenderedHTMLCommon table { display: block; overflow-x: auto; max-width: 100%; }
summary { color: #666; cursor: pointer; font-size: 88%; }
</style>{%- endblock -%}
{%- block input_group -%}
{%- if 'hide-input' in cell.metadata.get('tags', []) -%}
<details><summary>code</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
"""


class Progress:
    """Print cell, seconds, memory and last printed line of a notebook every `LINE_S` seconds."""

    def __init__(self, name: str, n_cells: int, stream: IO[str]) -> None:
        self.name, self.n_cells, self.stream = name, n_cells, stream
        self.peak_mib, self.cell, self.source, self.printed = 0.0, 1, "", ""

    def cell_starts(self, cell: Any, cell_index: int) -> None:
        """Note that a cell starts; nbclient calls this."""
        self.cell, self.source = cell_index + 1, cell.source

    def write(self, text: str) -> None:
        """Note the last line that the kernel printed; papermill calls this."""
        lines = [line.strip() for line in re.split(r"[\r\n]", _NOISE.sub("", text))]
        self.printed = next((line for line in reversed(lines) if line), self.printed)

    def flush(self) -> None:
        """Do nothing; papermill calls this."""

    def report(self, ended: threading.Event) -> None:
        """Measure memory and print lines until the event is set."""
        watch, next_line = Stopwatch(), LINE_S
        while not ended.wait(SAMPLE_S):
            memory = 0.0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                    memory += process.memory_info().rss / 2**20
            self.peak_mib = max(self.peak_mib, memory)
            if watch.seconds >= next_line:
                next_line += LINE_S
                place = f"{self.name}: cell {self.cell} of {self.n_cells}"
                line = f"{place}, {watch.seconds:.0f} s, {memory:.0f} MiB  {self.printed}"
                print(line, file=self.stream, flush=True)


class OwnPythonKernelManager(AsyncKernelManager):
    """Starts this very Python, whatever kernel named python3 a user has registered."""

    def __init__(self, **options: Any) -> None:
        # Without folders to search, python3 means `sys.executable -m ipykernel_launcher`.
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)


def _execute(pipeline: Pipeline, stage: Stage, progress: Progress, copy: Path) -> None:
    def failure(what: str, code: str, rest: str = "") -> SuiteError:
        code = "\n".join(f"    {line}" for line in code.splitlines())
        return SuiteError(f"{stage.name} {what}\n\n{code}\n\n{rest}\n\nThe notebook so far: {copy}")

    # papermill reads braces in a path as places for parameters.
    both = (pipeline.sources[stage.name], copy)
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in both)
    try:
        executed = papermill.execute_notebook(
            source,
            target,
            parameters=dict(pipeline.parameters.get(stage.name, {})),
            kernel_name="python3",
            progress_bar=False,
            stdout_file=progress,
            stderr_file=progress,
            start_timeout=300,
            kernel_manager_class=OwnPythonKernelManager,
            extra_arguments=["--log-level=CRITICAL"],  # else it tells of TCP and of its end
            on_cell_start=progress.cell_starts,
            coalesce_streams=True,
        )
    except PapermillExecutionError as error:
        rest = "\n".join(str(error).rstrip().splitlines()[-12:])
        raise failure(f"failed in cell [{error.exec_count}]", error.source, rest) from error
    except RuntimeError as error:  # the kernel died or did not start
        what = f"failed, perhaps for lack of memory ({progress.peak_mib:.0f} MiB): {error}"
        raise failure(what, progress.source) from error
    for cell in executed.cells:  # papermill succeeds when a notebook calls `sys.exit()`
        if any(output.get("ename") == "SystemExit" for output in cell.get("outputs", [])):
            raise failure("ended by SystemExit", cell.source)


def _read_metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    return read_json(path) if path.exists() else {}


def hash_library() -> str:
    """Hash every file of the package."""
    library = Path(__file__).resolve().parents[1]
    suffixes = (".py", ".yaml", ".md", ".json")
    files = sorted(path for path in library.rglob("*") if path.suffix in suffixes)
    return hash_json([hash_file(file) for file in files])


def write_html(notebook: Path) -> None:
    """Write an executed notebook as a page beside it."""
    html, _ = HTMLExporter(raw_template=_PAGE).from_filename(str(notebook))
    write_text(notebook.with_suffix(".html"), html)


def clear_outputs(pipeline: Pipeline, stage: Stage) -> None:
    """Remove the marks of a complete run: the output that is written last, then `run.json`.

    The notebook replaces the rest, and training checks its own folders. Only force removes
    models, and nothing those in `earlier/`. There goes a tiny base that has changed, for it passes
    for finished.
    """
    folder, doomed = pipeline.artifacts / stage.name, []
    if pipeline.force:
        doomed = [path for path in folder.glob("*") if path.name not in (RECORD, EARLIER)]
    is_changed = any(name.startswith("base/") for name in pipeline.damage(stage))
    if is_changed and not doomed and (folder / "base").exists():
        move_aside(folder / "base", folder / EARLIER / "base-changed")
    (folder / stage.outputs[-1]).unlink(missing_ok=True)
    for path in filter(Path.exists, doomed):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / RECORD).unlink(missing_ok=True)


def run_notebook(pipeline: Pipeline, stage: Stage, stream: IO[str]) -> None:
    """Execute a notebook, check its outputs, write `run.json`; SuiteError if it does not end well.

    An executed copy, also as HTML, goes to `notebooks/` beside the run folders.
    """
    folder = pipeline.artifacts / stage.name
    copy = pipeline.artifacts / "notebooks" / f"{stage.name}.ipynb"
    clear_outputs(pipeline, stage)
    single = [folder / name for name in stage.outputs if not name.endswith("/")]
    before = {path: path.stat().st_mtime_ns for path in single if path.exists()}
    folder.mkdir(parents=True, exist_ok=True)
    copy.parent.mkdir(exist_ok=True)
    record: dict[str, Any] = {
        "library": hash_library(),
        "parameters": pipeline.all_parameters(stage.name),
        "inputs": measure_states(pipeline.inputs(stage)),
    }
    watch, ended = Stopwatch(), threading.Event()
    n_cells = len(nbformat.read(pipeline.sources[stage.name], as_version=4).cells)
    progress = Progress(stage.name, n_cells, stream)
    threading.Thread(target=progress.report, args=[ended], daemon=True).start()
    try:
        _execute(pipeline, stage, progress, copy)
    finally:
        ended.set()
    for promise in stage.outputs:
        files = files_under(folder, promise)
        if not files or files[0].stat().st_mtime_ns == before.get(files[0]):
            raise SuiteError(f"{stage.name} ran to its end but did not write {folder / promise}")
    write_html(copy)
    record["outputs"] = measure_states(pipeline.outputs(stage))
    record |= {"seconds": round(watch.seconds, 1), "peak_mib": round(progress.peak_mib, 1)}
    write_json(folder / RECORD, record)


def run_suite(
    pipeline: Pipeline, names: Sequence[str], stream: IO[str], list_only: bool = False
) -> list[dict[str, Any]]:
    """Run notebooks in order, but those that are up to date; return the closing table's rows.

    SuiteError if a run fails, or if an earlier notebook was not selected and is incomplete.
    """
    stages = [pipeline.by_name[name] for name in names]
    for i, stage in enumerate(stages):
        if missing := pipeline.missing_input(stage, names[:i]):
            raise SuiteError(missing)
    rows = []
    for i, stage in enumerate(stages, 1):
        title = f"[{i}/{len(stages)}] {stage.name}"
        if pipeline.lacks_test(stage):
            print(f"{title}: left out, no test file; give one with TEST=<file>", file=stream)
            continue
        reason = pipeline.why_run(stage)
        if reason and list_only:
            print(f"{title}: would run, {reason}", file=stream)
            continue
        if reason:
            print(f"{title}: runs, {reason}", file=stream, flush=True)
            run_notebook(pipeline, stage, stream)
        record = pipeline.read_record(stage)
        state = f"done in {record['seconds']:.0f} s" if reason else "up to date"
        if record.get("library") != hash_library():
            state += ", but the library changed since (FORCE=1 rebuilds)"
        print(f"{title}: {state}", file=stream, flush=True)
        folder = pipeline.artifacts / stage.name
        known = _read_metrics(folder) | record
        row: dict[str, Any] = {"notebook": stage.name, "status": "ran" if reason else "skipped"}
        row |= {name: known.get(name) for name in _SUMMARY}
        rows.append(row | {"output": str(folder)})
    return rows


def format_results(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the closing tables: what ran, and the models' scores on the same battles.

    Only 05 scores all models on the same battles. Without it, each score names its own number.
    """
    table = pd.DataFrame(rows, columns=["notebook", "status", "seconds", "peak_mib"])
    table["peak_mib"] = [f"{value:,.0f}" if value else "–" for value in table["peak_mib"]]
    table = table.rename(columns={"peak_mib": "peak memory, MiB"})
    texts = [table.to_string(index=False)]
    metrics = {row["notebook"]: _read_metrics(Path(row["output"])) for row in rows}
    blend, scored = metrics.get("05_ensemble", {}), []
    for row in rows:
        own, folder = metrics[row["notebook"]], Path(row["output"])
        if "log_loss" in own and own is not blend:
            bounds = {side: own.get(f"log_loss_{side}") for side in ("low", "high")}
            label = label_member(folder.parent, folder.name)
            scored.append({"model": label, "battles": own["n_pairs"], **own, **bounds})
    title = "Log loss in nats, 95 % interval, on different battles"
    if "ladder" in blend:
        scored = [{"battles": blend["n_pairs"], **rung} for rung in blend["ladder"]]
        title = f"Log loss in nats, 95 % interval, on the same {blend['n_pairs']:,} battles"
        if oracle := blend.get("oracle_log_loss"):
            true = {"model": "oracle (true probabilities)", "log_loss": oracle}
            scored.append({"battles": blend["n_pairs"], **true})
    if scored:
        scores = _format_scores(scored, blend.get("published", ""))
        texts.append(f"{title}, all held out\n{scores}")
    return "\n\n".join(texts)


def _format_scores(scored: Sequence[Mapping[str, Any]], published: str) -> str:
    """Format a line per model, and mark the one that is published."""
    table = pd.DataFrame(scored, columns=["model", "log_loss", "low", "high", "battles"])
    is_published = table["model"].eq(published).map({True: "published", False: ""})
    bounds, formats = {"log_loss": ("low", "high")}, {"log_loss": "{:.3f}"}
    headers = {"log_loss": "log loss (95 % interval)", "is_published": ""}
    return to_text(table.assign(is_published=is_published), formats, 4, bounds, headers)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of the suite."""
    parser = argparse.ArgumentParser(prog="python -m src.utils.suite.run", description=__doc__)
    add = parser.add_argument
    add("--only", default="", metavar="NB", help="02, or 02,05, or 03-05, or full names")
    add("--profile", default="", help="of notebooks/profiles, or a file (demo; small with data)")
    add("--data", nargs="+", default=[], metavar="PATH", help="folder or files of training battles")
    add("--test", default="", metavar="PATH", help="test file, if not beside the training data")
    add("--set", nargs="+", action="extend", default=[], metavar="NB.NAME=VALUE", help="parameters")
    add("--artifacts", default="", metavar="DIR", help="where the run folders go")
    add("--force", action="store_true", help="run what is up to date, too")
    add("--list", action="store_true", help="list what would run and why, and stop")
    parser.set_defaults(named={})  # `make_pipeline` adds PROFILE, DATA, TEST, also remembered ones
    return parser.parse_args(arguments)


def count_idle_cores() -> int:
    """Count the cores that are idle now, at least one: beside a busy process more threads wait."""
    busy_share = psutil.cpu_percent(interval=0.5) / 100
    return max(1, round((os.cpu_count() or 1) * (1 - busy_share)))


def recall_options(options: argparse.Namespace) -> dict[str, str]:
    """Add to PROFILE, DATA and TEST those that earlier runs in the artifacts folder named."""
    profile, data = options.profile, paths.make_absolute(" | ".join(options.data).strip())
    profile = os.path.abspath(profile) if profile.endswith((".yaml", ".yml")) else profile
    named = {"PROFILE": profile, "DATA": data, "TEST": paths.make_absolute(options.test.strip())}
    named = {name: text for name, text in named.items() if text}
    recalled = paths.read_remembered(paths.artifacts_dir())
    for name in [*named, "TEST"] if data else named:  # other data have a test file of their own
        recalled.pop(name, None)
    if recalled:
        texts = " ".join(f"{name}={text}" for name, text in recalled.items())
        texts += f", as in the last run of {os.path.relpath(paths.artifacts_dir())}"
        print(f"{texts} (DATA=demo PROFILE=demo for the demo arena)", flush=True)
    return recalled | named


def make_pipeline(options: argparse.Namespace) -> Pipeline:
    """Make the pipeline that the command line asks for, and set the kernels' environment."""
    if options.artifacts:
        os.environ["ARENA_ARTIFACTS"] = str(Path(options.artifacts).expanduser().resolve())
    os.environ.update(QUIET)
    os.environ.setdefault("OMP_NUM_THREADS", str(count_idle_cores()))
    options.named = recall_options(options)
    data, test = (options.named.get(name, "") for name in ("DATA", "TEST"))
    raw, profile = paths.find_raw_data(data, test), options.named.get("PROFILE")
    for path in raw.train if raw.kind != "demo" else ():
        with contextlib.suppress(ValueError):  # 01 stops at a damaged file, and names the place
            print(describe_file(path), flush=True)
    if not profile:
        profile = "demo" if raw.kind == "demo" else "small"
        print(f"PROFILE={profile}, since none was named: tiny models", flush=True)
    sections = config.read_profile(profile)
    pipeline = Pipeline(paths.artifacts_dir(), {}, force=options.force)
    pipeline.parameters = config.make_parameters(
        pipeline.defaults, profile=sections, data=data, test=test, settings=options.set
    )
    return pipeline


def report_errors(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; errors and signals are reported on stderr."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that kernels end, too
    try:
        return command()
    except (SuiteError, FileNotFoundError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes from here.", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; return the exit code."""
    options = parse_arguments(arguments)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # failures are reported once
    pipeline = make_pipeline(options)
    names = config.choose_names(options.only, list(pipeline.by_name))
    named = pipeline.check_profile(options.named, names)
    if not options.list:
        write_json(pipeline.artifacts / paths.SETTINGS, named)
    rows = run_suite(pipeline, names, sys.stdout, list_only=options.list)
    if not options.list:
        text = format_results(rows)
        write_json(pipeline.artifacts / "summary.json", rows)
        write_text(pipeline.artifacts / "summary.md", f"```\n{text}\n```\n")
        print(f"\n{text}\n\nExecuted notebooks and HTML: {pipeline.artifacts}/notebooks")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
