"""Train in several processes, one per GPU: started by a notebook, or by torchrun on a cluster.

A notebook calls `fit_launched`, which starts torchrun. On a cluster, torchrun is started by hand
on every node, and the notebook that is run afterwards finds every fold trained:

    torchrun --nproc-per-node 8 -m src.utils.training.launch artifacts/04_qwen --profile full
"""

import argparse
import dataclasses
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pandas as pd
import psutil
import torch
from accelerate.utils import release_memory
from torch.distributed.elastic.multiprocessing.errors import record

from src.utils.config import FinetuneConfig, read_finetuning
from src.utils.models.bases import prepare_base
from src.utils.models.hardware import choose_device
from src.utils.paths import ROOT, choose_profile
from src.utils.runs import read_json, read_pairs, write_json, write_pairs
from src.utils.training.fit import FitResult, fit, prepare_members
from src.utils.training.plan import check_device
from src.utils.training.processes import join_world, leave_world, on_first, rank, world_size
from src.utils.training.session import SessionOver, describe_progress, end_of_session, skip_cells

PROGRAM = ("-m", "src.utils.training.launch")  # what torchrun starts in each process
_LAUNCHER = "ARENA_LAUNCHER_PID"


def fit_launched(
    pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path, base: Path | None = None
) -> FitResult:
    """Train as `fit.fit` does, in `config.n_processes` processes, and show their output.

    The result is that of one process, up to rounding. RuntimeError if a process failed, with its
    error; SessionOver as for `fit`; other errors as for `check_device` and `count_processes`.
    """
    session_end = end_of_session(config.train_deadline_s)
    check_device(config, pairs, base)
    n_processes = count_processes(config)
    if n_processes > 1 and config.train != "head":  # the readers of a frozen base start their own
        release_memory()
        folder = run_dir / "launch"
        write_pairs(folder / "pairs.parquet", pairs)
        left_s = config.train_deadline_s and max(session_end - time.monotonic(), 1e-3)
        settings = dataclasses.replace(config, n_processes=n_processes, train_deadline_s=left_s)
        write_json(folder / "config.json", settings.to_json())
        options = [run_dir, "--settings", folder / "config.json"]
        options += ["--pairs", folder / "pairs.parquet", *(["--base", base] if base else [])]
        _run_torchrun(n_processes, [str(option) for option in options])
    # After a launch it finds every fold trained, or that the session is over.
    return fit(pairs, config, run_dir, base, session_end)


def fit_in_session(
    pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path, base: Path | None = None
) -> FitResult | None:
    """Train as `fit_launched` does, in a notebook that may have to go on in another session.

    When `TRAIN_DEADLINE_S` is over, it shows what is finished, what remains and what to do next,
    lets the cells below do nothing, and returns None.
    """
    from IPython.display import Markdown, display

    try:
        return fit_launched(pairs, config, run_dir, base)
    except SessionOver as over:
        names = [member.name for member in prepare_members(pairs, config, run_dir)]
        display(Markdown(describe_progress(run_dir, names, str(over))))
        skip_cells()
        return None


def count_processes(config: FinetuneConfig) -> int:
    """How many processes train: `config.n_processes`, where 0 stands for one per GPU."""
    n_gpus = torch.cuda.device_count() if choose_device().type == "cuda" else 0
    if n_gpus and config.n_processes > n_gpus:
        raise ValueError(
            f"n_processes: expected at most {n_gpus}, the number of GPUs, got {config.n_processes}"
        )
    return config.n_processes or max(n_gpus, 1)


def _run_torchrun(n_processes: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n_processes), *PROGRAM, *options]
    n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    search_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, n_threads // n_processes))}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    environment |= {"PYTHONUNBUFFERED": "1", _LAUNCHER: str(os.getpid())}
    last_lines: deque[str] = deque(maxlen=40)
    with Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, errors="replace") as process:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                last_lines.append(line)
        finally:
            process.terminate()  # in case the notebook was interrupted
            code = process.wait()
    if code:
        raise RuntimeError(
            f"training in {n_processes} processes failed (exit code {code}):\n{''.join(last_lines)}"
        )


@record  # makes torchrun report the error of the process that failed first
def main(arguments: Sequence[str] | None = None) -> None:
    """Train as one of the processes that torchrun started."""
    parser = argparse.ArgumentParser(prog=f"torchrun … {' '.join(PROGRAM)}", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, e.g. artifacts/04_qwen")
    add("--pairs", type=Path, help="battles; default: those of 01_eda beside the run folder")
    add("--base", type=Path, help="folder of the base model, in place of CHECKPOINT")
    add("--profile", default="auto", help="its section for RUN is read; auto: as in a notebook")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="parameters, e.g. N_SEEDS=2")
    add("--settings", type=Path, help="a config.json, in place of profile and parameters")
    options = parser.parse_args(arguments)
    join_world()
    threading.Thread(target=_exit_with_parents, daemon=True).start()
    config = read_config(options.run, options.settings, options.profile, options.set)
    if config.n_processes not in (0, world_size()):
        raise RuntimeError(
            f"n_processes: expected {config.n_processes} processes, torchrun started {world_size()}"
        )
    pairs = read_pairs(options.pairs or options.run.parent / "01_eda" / "pairs.parquet")
    check_device(config, pairs, options.base)
    base = options.base or on_first(prepare_base)(config, pairs, options.run / "base")
    try:
        fit(pairs, config, options.run, base)
    except SessionOver:
        if not rank():
            print(f"{options.run}: TRAIN_DEADLINE_S is over; the same command goes on from here")


def read_config(
    run_dir: Path, settings: Path | None, profile: str, changes: Sequence[str]
) -> FinetuneConfig:
    """Read the settings from a file, or as the notebook named like the run folder would."""
    folder = run_dir.resolve()
    if settings:
        return FinetuneConfig.from_json(read_json(settings))
    known = read_finetuning(choose_profile(profile, folder.parent), changes)
    if folder.name not in known:
        raise ValueError(
            f"RUN: expected a folder named {' or '.join(known)}, or --settings, got {run_dir}"
        )
    return known[folder.name]


def _exit_with_parents() -> None:
    # Else it would go on writing into the folder of the run that takes its place.
    torchrun = os.getppid()
    launcher = os.environ.get(_LAUNCHER)
    try:
        while os.getppid() == torchrun:
            if launcher and psutil.Process(torchrun).ppid() != int(launcher):
                break
            time.sleep(0.5)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
    leave_world()
