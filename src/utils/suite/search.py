"""Run one notebook over a grid of parameters, several at a time, and put every run on the leaderboard.

    python -m src.utils.suite.search ridge.yaml --jobs 2

The file names a notebook and the values of each parameter; every combination is run:

    notebook: "02"
    grid:
      RIDGE: [0.5, 1.0, 2.0]
      N_TREES: [50, 200]

Each combination is a run of the suite in a folder of its own, `artifacts/sweeps/<file>/<combination>`,
so that a sweep that was stopped goes on where it was.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from src.utils import paths
from src.utils.config import SuiteError, check_parameter, read_parameters
from src.utils.runs import hash_json, read_json, write_leaderboard, write_text
from src.utils.suite.pipeline import NOTEBOOKS, STAGES

_FIRST = STAGES[0].name
_UNSAFE = re.compile(r"[^\w.+-]+")
_MAX_NAME = 80  # characters of a folder's name


class Sweep(NamedTuple):
    """What a sweep file asks for."""

    name: str
    notebook: str  # its full name
    points: list[dict[str, Any]]  # parameters of each run


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no sweep, or names a notebook that does not exist.
        SuiteError: a parameter does not exist or has another type.
    """
    path = Path(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    grid = content.get("grid") if isinstance(content, dict) else None
    if not isinstance(grid, dict) or not all(
        isinstance(values, list) and values for values in grid.values()
    ):
        raise ValueError(
            f"{path}: expected `notebook:` and a `grid:` of lists, got {content!r:.100}"
        )
    wanted = str(content.get("notebook", ""))
    notebook = next(
        (stage.name for stage in STAGES if wanted and stage.name.startswith(wanted.zfill(2))), None
    )
    if notebook is None or notebook == _FIRST:
        raise ValueError(
            f"{path}: notebook: expected one of {[stage.name for stage in STAGES[1:]]}, got {wanted!r}"
        )
    defaults = read_parameters(NOTEBOOKS / f"{notebook}.ipynb")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for name, values in grid.items():
        for value in values:
            check_parameter(notebook, name, value, defaults)
    return Sweep(path.stem, notebook, points)


def name_point(point: dict[str, Any]) -> str:
    """A folder name that tells the parameters, with a hash where it had to be shortened or cleaned.

    Example:
        {"RIDGE": 0.5, "SEED": 1} -> "RIDGE=0.5,SEED=1"
    """
    told = ",".join(f"{name}={value}" for name, value in point.items())
    plain = ",".join(f"{name}={_UNSAFE.sub('_', str(value))}" for name, value in point.items())
    return (
        told
        if plain == told and len(told) <= _MAX_NAME
        else f"{plain[:_MAX_NAME]}-{hash_json(point)[:6]}"
    )


def run_sweep(
    sweep: Sweep, artifacts: Path, options: Sequence[str] = (), n_jobs: int = 1
) -> list[str]:
    """Run every combination and rebuild the leaderboard.

    Args:
        sweep: from `read_sweep`.
        artifacts: the folder of all run folders; a finished notebook 01 in it is used by every run.
        options: passed on to the suite, e.g. ["--data", "train.csv"].
        n_jobs: runs at a time; they share the cores evenly.

    Returns:
        What failed, one message a run; empty where all went well.
    """
    folder = Path(artifacts) / "sweeps" / sweep.name
    n_threads = max((os.cpu_count() or 1) // n_jobs, 1)

    def run(point: dict[str, Any]) -> str:
        return _run_point(
            sweep.notebook, point, folder / name_point(point), Path(artifacts), options, n_threads
        )

    with ThreadPoolExecutor(n_jobs) as pool:
        told = list(
            tqdm(pool.map(run, sweep.points), total=len(sweep.points), desc=sweep.name, unit="run")
        )
    write_leaderboard(artifacts)
    return [message for message in told if message]


def _run_point(
    notebook: str,
    point: dict[str, Any],
    folder: Path,
    artifacts: Path,
    options: Sequence[str],
    n_threads: int,
) -> str:
    """Run the suite in a folder of its own; returns what went wrong, or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    if (artifacts / _FIRST / "run.json").exists() and not (folder / _FIRST).exists():
        shutil.copytree(artifacts / _FIRST, folder / _FIRST)
    settings = [
        f"{notebook[:2]}.{name}={json.dumps(value)}" for name, value in point.items()
    ]  # JSON is YAML
    only = [
        "--only",
        f"{_FIRST[:2]},{notebook[:2]}",
        "--artifacts",
        str(folder),
        "--set",
        *settings,
    ]
    command = [sys.executable, "-m", "src.utils.suite.run", *only, *options]
    threads = {
        name: str(n_threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    write_text(folder / "sweep.log", done.stdout + done.stderr)
    return (
        ""
        if done.returncode == 0
        else f"{folder.name}: {done.stderr.strip()[-500:]}\n{folder / 'sweep.log'}"
    )


def format_scores(sweep: Sweep, artifacts: Path) -> str:
    """One line a finished run of the sweep, the best first."""
    scores = []
    for point in sweep.points:
        path = (
            Path(artifacts)
            / "sweeps"
            / sweep.name
            / name_point(point)
            / sweep.notebook
            / "metrics.json"
        )
        if path.exists():
            scores.append((read_json(path)["log_loss"], name_point(point)))
    return "\n".join(f"{loss:.4f}  {name}" for loss, name in sorted(scores))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m src.utils.suite.search", description="Run a notebook over a grid."
    )
    parser.add_argument("file", type=Path, help="YAML with `notebook` and `grid`")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--artifacts", default="", metavar="DIR", help="where the run folders go")
    given, options = parser.parse_known_args(arguments)
    artifacts = (
        Path(given.artifacts).expanduser().resolve() if given.artifacts else paths.artifacts_dir()
    )
    try:
        sweep = read_sweep(given.file)
    except (OSError, ValueError, SuiteError) as error:
        print(f"{given.file}: {error}", file=sys.stderr)
        return 1
    failed = run_sweep(sweep, artifacts, options, max(given.jobs, 1))
    print(format_scores(sweep, artifacts))
    print(f"\nLeaderboard: {os.path.relpath(artifacts / 'leaderboard.csv')}")
    print("\n\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
