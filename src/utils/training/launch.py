"""Train in several processes: one a GPU, on one machine or more, from a notebook or by torchrun.

A notebook calls `fit_launched`, which starts torchrun and takes the result from the
run folder. On a cluster torchrun is started by hand, on every node:

    torchrun --nproc-per-node 8 -m src.utils.training.launch artifacts/04_qwen --profile full

and the notebook that is run afterwards finds every fold trained.
"""

import argparse
import codecs
import gc
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pandas as pd
import psutil
import torch

from src.utils.config import (
    DecoderConfig,
    FinetuneConfig,
    make_parameters,
    read_parameters,
    read_profile,
)
from src.utils.models.hardware import choose_device
from src.utils.models.tiny import prepare_base
from src.utils.runs import read_json, read_pairs, write_json, write_pairs, write_text
from src.utils.training.fit import FitResult, fit
from src.utils.training.processes import join_world, leave_world, on_first, rank, world_size

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = {"03_modernbert": FinetuneConfig, "04_qwen": DecoderConfig}
_N_LAST_WORDS = 3000  # characters of a process that failed
_LAUNCHER = "ARENA_LAUNCHER_PID"


# ---- from a notebook -----------------------------------------------------------


def fit_launched(
    pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path, base: Path | None = None
) -> FitResult:
    """Train as `train.fit` does, in as many processes as `config.n_processes` asks for.

    Their progress is shown here. What they leave is what one process would: the same
    folders, and the same model but for the order in which numbers are added. A step
    takes at least `config.batches_per_step` batches, so that each process gets equally many.

    Args:
        pairs: and the other arguments: as for `train.fit`.

    Returns:
        What `train.fit` returns.

    Raises:
        ValueError: more processes than GPUs.
        RuntimeError: a process failed; its last words are in the message.
    """
    n_processes = count_processes(config)
    if n_processes == 1:
        return fit(pairs, config, run_dir, base)
    folder = run_dir / "launch"
    for left_behind in folder.glob("*.*"):
        left_behind.unlink()
    write_pairs(folder / "pairs.parquet", pairs)
    write_json(folder / "config.json", config.to_json())
    _free_gpu()
    command = [*_torchrun(n_processes), str(run_dir), "--settings", str(folder / "config.json")]
    command += ["--pairs", str(folder / "pairs.parquet")] + (["--base", str(base)] if base else [])
    _run(command, folder, n_processes)
    return fit(pairs, config, run_dir, base)  # finds every fold trained


def count_processes(config: FinetuneConfig) -> int:
    """How many processes train: `config.n_processes`, where 0 stands for one a GPU.

    Raises:
        ValueError: there are GPUs, but fewer than processes.
    """
    n_gpus = torch.cuda.device_count() if choose_device().type == "cuda" else 0
    if n_gpus and config.n_processes > n_gpus:
        raise ValueError(
            f"n_processes: expected at most {n_gpus}, one a GPU of this machine, got {config.n_processes}"
        )
    return config.n_processes or max(n_gpus, 1)


def _torchrun(n_processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(n_processes), "-m", "src.utils.training.launch"]


def _free_gpu() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(command: list[str], folder: Path, n_processes: int) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes))
        ),
        _LAUNCHER: str(os.getpid()),
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said = _show(process.stdout)
        code = process.wait()
    finally:
        process.terminate()  # where the notebook was interrupted
        process.wait()
    if code or not (folder / "world.json").exists():
        raise RuntimeError(
            f"training in {n_processes} processes failed (exit {code}): {_last_words(folder) or said}"
        )
    n_joined = read_json(folder / "world.json")["n_processes"]
    if n_joined != n_processes:
        raise RuntimeError(f"expected {n_processes} processes to train together, got {n_joined}")


def _show(output: IO[bytes]) -> str:
    """Print what processes say as they say it, and hand back its end."""
    decoder, said = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := os.read(output.fileno(), 4096):
        text = decoder.decode(chunk)
        sys.stdout.write(text)
        sys.stdout.flush()
        said = (said + text)[-_N_LAST_WORDS:]
    return said


def _last_words(folder: Path) -> str:
    # The process that failed first is the one to hear: the others fail for want of it.
    files = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return files[0].read_text(encoding="utf-8")[-_N_LAST_WORDS:] if files else ""


# ---- in each process ------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as one of the processes that torchrun started."""
    options = _parse(arguments)
    join_world()
    threading.Thread(target=_die_with_parents, daemon=True).start()
    folder = options.run / "launch"
    try:
        config = _read_config(options)
        _check_world_size(config)
        pairs = read_pairs(options.pairs)
        base = options.base or on_first(prepare_base)(config, pairs, options.run / "base")
        fit(pairs, config, options.run, base)
        on_first(write_json)(folder / "world.json", {"n_processes": world_size()})
    except BaseException:
        write_text(
            folder / f"error_{rank()}.txt",
            f"process {rank()} of {world_size()}\n{traceback.format_exc()}",
        )
        raise


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun … -m src.utils.training.launch", description=main.__doc__
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, e.g. artifacts/04_qwen")
    parser.add_argument(
        "--pairs", type=Path, help="battles; by custom those of 01_eda beside the run folder"
    )
    parser.add_argument(
        "--base", type=Path, help="folder of the base, in place of what CHECKPOINT names"
    )
    parser.add_argument(
        "--profile",
        default="full",
        help="profile, read with the notebook named as the run folder is",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="parameters, e.g. N_SEEDS=3"
    )
    parser.add_argument(
        "--settings", type=Path, help="a config.json, in place of notebook, profile and --set"
    )
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or options.run.parent / "01_eda" / "pairs.parquet"
    return options


def _read_config(options: argparse.Namespace) -> FinetuneConfig:
    notebook = options.run.resolve().name
    if options.settings:
        return CONFIGS.get(notebook, FinetuneConfig).from_json(read_json(options.settings))
    if notebook not in CONFIGS:
        raise ValueError(
            f"RUN: expected a folder named {' or '.join(CONFIGS)}, or --settings, got {options.run}"
        )
    defaults = read_parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
    profile = (
        {notebook: read_profile(options.profile).get(notebook, {})}
        if options.profile != "none"
        else {}
    )
    chosen = make_parameters({notebook: defaults}, profile=profile, settings=options.set)
    return CONFIGS[notebook].from_parameters(defaults | chosen[notebook], notebook)


def _check_world_size(config: FinetuneConfig) -> None:
    if config.n_processes not in (0, world_size()):
        raise RuntimeError(
            f"n_processes: expected {config.n_processes} processes, got {world_size()} from the launcher"
        )


def _die_with_parents() -> None:
    """End this process when torchrun, or the notebook that started it, was killed.

    Training on by itself it would write into the folder of the run that takes its place.
    """
    torchrun, launcher = os.getppid(), os.environ.get(_LAUNCHER)
    try:
        while os.getppid() == torchrun and (
            launcher is None or psutil.Process(torchrun).ppid() == int(launcher)
        ):
            time.sleep(0.5)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
    leave_world()
