"""Run the notebooks in order with papermill, show how far they are, check what they left behind.

A notebook that is whole is skipped (`river` says when). papermill ends well on a
misspelt parameter and on `sys.exit()`; both are caught here.

    python -m src.utils.suite.run --only 02-05 --profile small --data ../arena/train.csv
"""

import argparse
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from src.utils import paths
from src.utils.config import (
    SuiteError,
    make_parameters,
    read_parameters,
    read_profile,
    split_settings,
)
from src.utils.runs import Stopwatch, read_json, write_json, write_text
from src.utils.suite.pipeline import (
    NOTEBOOKS,
    STAGES,
    STAMP,
    River,
    Stage,
    absolute_data,
    choose_notebooks,
    files_under,
    hash_leavings,
    hash_library,
)

SAMPLE_S = 0.5  # between two looks at memory, and between two refreshes of the bars

# The kernels complain of these although nothing is wrong.
_QUIET = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "TOKENIZERS_PARALLELISM": "false"}


# ── running one notebook ──────────────────────────────────────────────────────────────


@dataclass
class Result:
    """One row of the closing table."""

    notebook: str
    status: str  # ran or skipped
    seconds: float
    peak_mib: float
    log_loss: float | None
    accuracy: float | None
    oracle_log_loss: float | None
    output: str


class Monitor:
    """Watch one running notebook: cells done, its last printed line, memory of its processes."""

    def __init__(self, name: str, n_cells: int, stream: IO[str]) -> None:
        self.peak_mib = 0.0
        self.cell_source = ""
        self._done = threading.Event()
        self._bar = tqdm(
            total=n_cells,
            desc=f"{name:<20}",
            bar_format="{desc}{bar:16} {n_fmt}/{total_fmt} cells  {elapsed}{postfix}",
            file=stream,
            disable=not stream.isatty(),
            dynamic_ncols=True,
            leave=False,
        )
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._bar.close()

    def cell_starts(self, cell: Any, cell_index: int) -> None:
        """Hear from nbclient that a cell starts."""
        self.cell_source = cell.source
        self.peak_mib = max(self.peak_mib, _measure_children_mib())
        self._bar.n = cell_index

    def write(self, text: str) -> None:
        """Hear what the kernel prints; a progress bar of its own arrives here too."""
        plain = re.sub(
            r"\x1b\[[0-9;]*[A-Za-z]|\|[█▏▎▍▌▋▊▉ ]*\|", "", text
        )  # colours, and bars inside this bar
        lines = [line.strip() for line in re.split(r"[\r\n]", plain)]
        last = next((line for line in reversed(lines) if line), None)
        if last:
            self._bar.set_postfix_str(last, refresh=False)

    def flush(self) -> None:
        """Nothing is held back."""

    def _sample(self) -> None:
        ended = False
        while not ended:
            ended = self._done.wait(SAMPLE_S)
            self.peak_mib = max(self.peak_mib, _measure_children_mib())
            self._bar.refresh()


def _measure_children_mib() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended between the two calls
            continue
    return total / 2**20


def _kernel_manager(log: IO[str]) -> type[AsyncKernelManager]:
    """A kernel manager that starts this very Python, whatever kernel named python3 a user has registered."""

    class OwnPythonKernelManager(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # Without folders to search, the name python3 means `sys.executable -m ipykernel_launcher`.
            super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)

        async def start_kernel(self, **options: Any) -> None:
            await super().start_kernel(stdout=log, stderr=log, **options)

    return OwnPythonKernelManager


def _check_executed(name: str, executed: nbformat.NotebookNode, copy: Path) -> None:
    for cell in executed.cells:
        if cell.cell_type != "code":
            continue
        left = any(output.get("ename") == "SystemExit" for output in cell.outputs)
        if left or (cell.execution_count is None and cell.source.strip()):
            what = "leaves the notebook by SystemExit" if left else "was never executed"
            raise SuiteError(
                f"{name} did not run to its end: this cell {what}\n\n{_indent(cell.source)}\n\n{copy}"
            )


def _check_promises(stage: Stage, folder: Path, before: Mapping[Path, int]) -> None:
    for promise in stage.leaves:
        files = files_under(folder, promise)
        if not files:
            raise SuiteError(f"{stage.name} ran to its end but did not leave {folder / promise}")
        # Training that goes on from its checkpoints may find a finished model; single files are written again.
        old = all(file in before and file.stat().st_mtime_ns == before[file] for file in files)
        if old and not promise.endswith("/"):
            raise SuiteError(
                f"{stage.name} ran to its end but did not write {folder / promise} again: it is of an old run"
            )
    if "metrics.json" in stage.leaves:
        value = read_json(folder / "metrics.json").get("log_loss")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise SuiteError(
                f"{folder / 'metrics.json'}: expected a finite log_loss, got {value!r}"
            )


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _describe_failure(name: str, error: Exception, monitor: Monitor, words: str) -> str:
    where, source, lines = "", monitor.cell_source, f"{type(error).__name__}: {error}"
    if isinstance(error, PapermillExecutionError):
        where, source = f" in cell [{error.exec_count}]", error.source
        plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
        lines = "\n".join(plain[-12:]) or f"{error.ename}: {error.evalue}"
    elif isinstance(error, DeadKernelError):
        lines = f"Its process ended by itself or was killed, perhaps for memory; it held {monitor.peak_mib:.0f} MiB.{words}"
    return f"{name} failed{where}\n\n{_indent(source)}\n\n{lines}"


def _read_last_words(log: IO[str]) -> str:
    log.seek(0)
    # ipykernel warns of plain TCP on every start, here between two processes of one machine.
    lines = [line for line in log.read().splitlines() if "IPKernelApp" not in line]
    return "\n" + "\n".join(lines[-12:]) if lines else ""


def _write_html(copy: Path) -> None:
    from nbconvert import HTMLExporter  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        html, _ = HTMLExporter().from_filename(str(copy))
    write_text(copy.with_suffix(".html"), html)


def _scores(folder: Path) -> dict[str, float | None]:
    path = folder / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    return {name: metrics.get(name) for name in ("log_loss", "accuracy", "oracle_log_loss")}


def _execute(river: River, stage: Stage, monitor: Monitor, copy: Path) -> nbformat.NotebookNode:
    # papermill reads braces in a path as places for parameters.
    source, target = (
        str(path).replace("{", "{{").replace("}", "}}") for path in (river.source(stage), copy)
    )
    with tempfile.TemporaryFile("w+") as log:
        try:
            return papermill.execute_notebook(
                source,
                target,
                parameters=dict(river.parameters.get(stage.name, {})),
                kernel_name="python3",
                progress_bar=False,
                cwd=str(river.notebooks),
                stdout_file=monitor,
                stderr_file=monitor,
                start_timeout=300,
                kernel_manager_class=_kernel_manager(log),
                on_cell_start=monitor.cell_starts,
                coalesce_streams=True,
            )
        except (
            PapermillExecutionError,
            RuntimeError,
        ) as error:  # RuntimeError: the kernel died or did not start
            failure = _describe_failure(stage.name, error, monitor, _read_last_words(log))
            raise SuiteError(f"{failure}\n\nThe half-executed notebook: {copy}") from error


def _clear(river: River, stage: Stage) -> None:
    """Remove what must not be taken up again.

    That is everything when forced, else each folder that is not as the last run left it: a
    model of which one file is gone would pass for finished. Without its mark a run that
    fails or is killed is never taken for whole.
    """
    folder = river.folder(stage.name)
    if river.force:
        shutil.rmtree(folder, ignore_errors=True)
    for name in {Path(file).parts[0] for file in river.damage(stage)}:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in (STAMP, stage.mark):
        (folder / name).unlink(missing_ok=True)


def run_notebook(river: River, stage: Stage, stream: IO[str]) -> Result:
    """Execute one notebook, check what it left, and stamp its run folder.

    Raises:
        SuiteError: a cell failed, the notebook ended early, or a promised file is missing or of an old run.
    """
    folder, copy = river.folder(stage.name), river.artifacts / "notebooks" / f"{stage.name}.ipynb"
    _clear(river, stage)
    folder.mkdir(parents=True, exist_ok=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    key, watch = river.make_key(stage), Stopwatch()
    n_cells = len(nbformat.read(river.source(stage), as_version=4).cells)
    with Monitor(stage.name, n_cells, stream) as monitor:
        executed = _execute(river, stage, monitor, copy)
    _check_executed(stage.name, executed, copy)
    _check_promises(stage, folder, before)
    _write_html(copy)
    cost = {"seconds": round(watch.seconds, 1), "peak_mib": round(monitor.peak_mib, 1)}
    left = hash_leavings(folder, river.hashes)
    write_json(folder / STAMP, {**key, "left": left, "library": hash_library(), **cost})
    river.hashes.save()
    return Result(stage.name, "ran", **cost, **_scores(folder), output=str(folder))


# ── running them all ──────────────────────────────────────────────────────────────────


def _skip(river: River, stage: Stage) -> Result:
    folder = river.folder(stage.name)
    stamp = read_json(folder / STAMP)
    return Result(
        stage.name,
        "skipped",
        stamp["seconds"],
        stamp["peak_mib"],
        **_scores(folder),
        output=str(folder),
    )


def _skip_note(river: River, stage: Stage) -> str:
    changed = read_json(river.folder(stage.name) / STAMP)["library"] != hash_library()
    return " (library changed since; FORCE=1 remakes)" if changed else ""


def run_suite(river: River, names: Sequence[str], stream: IO[str]) -> list[Result]:
    """Run notebooks in order, skipping those that are whole, and stop at the first failure.

    A notebook that predicts test battles is left out where there are none.

    Args:
        river: where and with what.
        names: notebooks to run, in the river's order.
        stream: where progress is told; a terminal gets live bars.

    Returns:
        One result a notebook.

    Raises:
        SuiteError: an earlier notebook that was not asked for is incomplete, or a run failed.
    """
    stages = [river.by_name[name] for name in names]
    for i, stage in enumerate(stages):
        if missing := river.missing_upstream(stage, names[:i]):
            raise SuiteError(missing)
    results: list[Result] = []
    with _overall_bar(len(stages), stream) as say, _kernel_environment(river.artifacts):
        for stage in stages:
            reason = river.why_run(stage)
            if river.lacks_test(stage):
                say(f"{stage.name}: left out, there is no test file; give one with TEST=<file>", 1)
            elif reason:
                say(f"{stage.name}: runs, {reason}", 0)
                results.append(run_notebook(river, stage, stream))
                say(
                    f"{stage.name}: done in {results[-1].seconds:.0f} s{_format_score(results[-1])}",
                    1,
                )
            else:
                results.append(_skip(river, stage))
                say(f"{stage.name}: skipped, nothing changed{_skip_note(river, stage)}", 1)
    river.hashes.save()
    return results


def _format_score(result: Result) -> str:
    return "" if result.log_loss is None else f", log loss {result.log_loss:.4f}"


@contextmanager
def _overall_bar(n_notebooks: int, stream: IO[str]) -> Iterator[Any]:
    """Give a function that prints a line above the bar and moves it on by so many notebooks."""
    bar = tqdm(
        total=n_notebooks,
        bar_format="all                 {bar:16} {n_fmt}/{total_fmt} notebooks",
        file=stream,
        disable=not stream.isatty(),
        position=1,
        leave=False,
    )

    def say(line: str, n_done: int) -> None:
        tqdm.write(line, file=stream)
        stream.flush()
        bar.update(n_done)

    try:
        yield say
    finally:
        bar.close()


@contextmanager
def _kernel_environment(artifacts: Path) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({**_QUIET, **before, "ARENA_ARTIFACTS": str(artifacts)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


COLUMNS = (
    "notebook",
    "status",
    "seconds",
    "peak MiB",
    "log loss",
    "accuracy",
    "best reachable",
    "output",
)


def format_results(results: Sequence[Result], base: Path) -> str:
    """The closing table in Markdown, which is also readable as it stands.

    Args:
        results: one a notebook.
        base: folder that output paths are told from.
    """

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    rows = [
        (
            result.notebook,
            result.status,
            number(result.seconds, 1),
            number(result.peak_mib, 0),
            number(result.log_loss, 4),
            number(result.accuracy, 3),
            number(result.oracle_log_loss, 4),
            os.path.relpath(result.output, base),
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    lines = [COLUMNS, tuple("-" * width for width in widths), *rows]
    numeric = range(2, 7)

    def cell(text: str, i: int) -> str:
        return text.rjust(widths[i]) if i in numeric else text.ljust(widths[i])

    return "\n".join(
        "| " + " | ".join(cell(text, i) for i, text in enumerate(line)) + " |" for line in lines
    )


def format_ladder(result: Result) -> str:
    """The ladder that a notebook left in `metrics.json`, each rung with its 95 % interval; "" without one."""
    path = Path(result.output) / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    rungs = metrics.get("ladder", [])
    if not rungs:
        return ""
    width = max(len(rung["model"]) for rung in rungs)
    lines = [
        f"  {r['model']:<{width}}  {r['log_loss']:.4f} ({r['low']:.4f} to {r['high']:.4f})"
        for r in rungs
    ]
    return "\n".join(
        [f"{result.notebook}: log loss on {metrics['n_pairs']:,} held-out battles", *lines]
    )


def write_summary(results: Sequence[Result], artifacts: Path) -> None:
    """Write `summary.json` and `summary.md` beside the run folders."""
    write_json(artifacts / "summary.json", [asdict(result) for result in results])
    write_text(artifacts / "summary.md", format_results(results, artifacts) + "\n")


# ── the command ───────────────────────────────────────────────────────────────────────


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m src.utils.suite.run", description="Run the notebooks in order."
    )
    parser.add_argument(
        "--only", default="", metavar="NB", help="notebooks: 02 or 02,05 or 03-05 or full names"
    )
    parser.add_argument(
        "--profile",
        default="",
        help="name in notebooks/profiles or a YAML file (demo; small with data)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folder or files with training battles",
    )
    parser.add_argument(
        "--test",
        default="",
        metavar="PATH",
        help="test file, where it is not beside the training data",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NB.NAME=VALUE", help="parameters"
    )
    parser.add_argument("--artifacts", default="", metavar="DIR", help="where the run folders go")
    parser.add_argument("--force", action="store_true", help="run also what is already whole")
    parser.add_argument("--list", action="store_true", help="say what would run and why, and stop")
    return parser.parse_args(arguments)


def _make_river(options: argparse.Namespace) -> River:
    artifacts = (
        Path(options.artifacts).expanduser().resolve()
        if options.artifacts
        else paths.artifacts_dir()
    )
    os.environ["ARENA_ARTIFACTS"] = str(artifacts)  # `paths` answers for this folder from here on
    data, test = absolute_data(options.data), absolute_data([options.test])
    kind = paths.find_raw_data(data, test).kind
    profile = read_profile(options.profile or ("demo" if kind == "demo" else "small"))
    defaults = {stage.name: read_parameters(NOTEBOOKS / f"{stage.name}.ipynb") for stage in STAGES}
    settings = [setting for text in options.set for setting in split_settings(text)]
    parameters = make_parameters(defaults, profile=profile, data=data, test=test, settings=settings)
    return River(artifacts, parameters, force=options.force)


def _print_list(river: River, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        stage = river.by_name[name]
        reason = river.missing_upstream(stage, names[:i]) or river.why_run(stage)
        print(
            f"{name:<20} {'would run: ' + reason if reason else 'is whole' + _skip_note(river, stage)}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; returns the exit code."""
    options = _parse_arguments(arguments)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # failures are told below
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that kernels end with the suite
    try:
        river = _make_river(options)
        names = choose_notebooks(options.only, list(river.by_name))
        if options.list:
            _print_list(river, names)
            return 0
        results = run_suite(river, names, sys.stdout)
    except (SuiteError, FileNotFoundError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Running the same command again goes on from here.", file=sys.stderr)
        return 130
    write_summary(results, river.artifacts)
    print(f"\n{format_results(results, Path.cwd())}")
    for ladder in filter(None, map(format_ladder, results)):
        print(f"\n{ladder}")
    print(f"\nExecuted notebooks and HTML: {os.path.relpath(river.artifacts / 'notebooks')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
