"""Train in sessions that end: stop in time, say what is left, go on from the earlier output.

`TRAIN_DEADLINE_S` ends a session: training stops with a checkpoint, and the next session takes the
same steps that this one would have taken. It is not `TRAIN_HOURS`, which ends the training itself
in fewer steps. On Kaggle the next version of a kernel finds its earlier output among its inputs.
"""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from src.utils import paths, runs, schema
from src.utils.battles.readers import add_groups_and_folds, load_pairs
from src.utils.config import EdaConfig
from src.utils.training.earlier import BEGUN, RECORD, list_finished

# Left behind when a run is taken over: what a launch passes on, and the sign of a complete run.
_LEFT_BEHIND = ("launch", "metrics.json", "run.json")
_PARTIAL = (".*.tmp*", ".*.old")  # of `runs.atomic_path` and `atomic_folder`


class SessionOver(Exception):
    """The time of this session is over; what is on disk is enough to go on from."""


def end_of_session(seconds: float) -> float:
    """The `time.monotonic()` value at which a session of so many seconds ends; 0: never."""
    return time.monotonic() + seconds if seconds else math.inf


# ---- the end of a session ------------------------------------------------------------


def describe_progress(run_dir: Path, names: Sequence[str], note: str = "") -> str:
    """Write in Markdown, in large letters, which models are finished and which remain."""
    finished = list_finished(run_dir)
    remaining = [_describe_begun(run_dir, name) for name in names if name not in finished]
    number = run_dir.name[:2]
    done = ", ".join(name for name in names if name in finished) or "none yet"
    return "\n\n".join(
        [
            "# This session's time is over. The training is not finished.",
            f"## Finished: {done}",
            f"## Remaining: {', '.join(remaining)}",
            *filter(None, [note]),
            "## Next: run it once more, and it goes on from here",
            f"On Kaggle: `make kernel NB={number} RESUME=1` with every setting of the first time, "
            f"then `make kernel-push NB={number}`.",
            "In the browser: *Edit*, *Add Input*, *Your Work*, choose this notebook, *Save "
            "Version*, *Save & Run All*. Elsewhere: run the notebook again.",
            "The cells below do nothing in this session.",
        ]
    )


def _describe_begun(run_dir: Path, name: str) -> str:
    folder = run_dir / "checkpoints" / name
    step = max(map(_read_step, folder.glob("checkpoint-*")), default=0)
    if not step:
        return f"{name} (not begun)"
    begun = runs.read_json(folder / BEGUN)
    n_steps = begun.get("n_steps", 0)
    return f"{name} (step {step:,} of {n_steps:,})"


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def skip_cells() -> None:
    """Let the notebook's further cells do nothing, so that it ends without an error."""
    from IPython import get_ipython

    shell = get_ipython()
    text = "Skipped: this session's time is over. Restart the kernel to train on."
    if shell is not None:
        shell.input_transformers_post.append(lambda lines: [f"print({text!r})\n"])


# ---- the next session ----------------------------------------------------------------


def prepare_session(*notebooks: str) -> None:
    """Bring the run folders of these notebooks into Kaggle's output, before the first of them runs.

    A run that an earlier version of this kernel left is taken over. `01_eda` is taken from any
    input, else its frozen split is made from the training battles, as notebook 01 makes it.
    """
    for name in notebooks:
        if (run := take_over(name)) is not None:
            print(f"{name}: goes on from {run}")
            print(*[f"  {line}" for line in _list_progress(paths.run_dir(name))], sep="\n")
    eda_dir = paths.run_dir("01_eda")
    if not (eda_dir / "bias.json").exists():
        config, raw = EdaConfig(), paths.find_raw_data()
        pairs, _ = load_pairs(raw.train)
        pairs = add_groups_and_folds(pairs, config.n_folds, config.seed)
        runs.write_pairs(eda_dir / "pairs.parquet", pairs[schema.choose_columns(pairs)])
        source = {"kind": raw.kind, "files": [path.name for path in raw.train]}
        runs.write_json(eda_dir / "bias.json", {"source": source})
        print(f"01_eda: split {len(pairs):,} battles into {config.n_folds} folds")


def _list_progress(run_dir: Path) -> list[str]:
    finished = list_finished(run_dir)
    lines = [f"{name}: finished" for name in finished]
    begun = sorted(path.name for path in (run_dir / "checkpoints").glob("*") if path.is_dir())
    return lines + [_describe_begun(run_dir, name) for name in begun if name not in finished]


def take_over(name: str) -> Path | None:
    """Copy the earlier run of a notebook from Kaggle's inputs, unless one is here already.

    Of several the one that came furthest is taken. It is copied because a kernel's output must
    hold all that its next version needs; a file is copied once, and of each unfinished model only
    the newest intact checkpoint.

    Returns:
        Where it was, or None if there is none.
    """
    target = paths.artifacts_dir() / name
    found = [path for path in sorted(paths.KAGGLE_INPUT.rglob(name)) if path.is_dir()]
    if target.exists() or not found:
        return None
    source = max(found, key=measure_progress)
    with runs.atomic_folder(target) as folder:
        copy_run(source, folder)
    return source


def measure_progress(run_dir: Path) -> tuple[int, int, int]:
    """Measure how far a run came: finished models, the step of the newest checkpoint, files."""
    steps = map(_read_step, run_dir.glob("checkpoints/*/checkpoint-*"))
    n_files = sum(path.is_file() for path in run_dir.rglob("*"))
    return len(list_finished(run_dir)), max(steps, default=0), n_files


def copy_run(source: Path, target: Path) -> None:
    """Copy a run folder so that training can go on in it; `source` may be read-only."""
    is_partial = shutil.ignore_patterns(*_PARTIAL)

    def leave_behind(folder: str, names: list[str]) -> set[str]:
        left = is_partial(folder, names)
        if Path(folder) == source:
            left.update(_LEFT_BEHIND)
        if Path(folder).parent == source / "checkpoints":
            left.update(path.name for path in _find_outdated(Path(folder)))
        return left

    # Contents alone: the modes of inputs would make the copy read-only, too.
    shutil.copytree(
        source, target, ignore=leave_behind, copy_function=shutil.copyfile, dirs_exist_ok=True
    )
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _find_outdated(folder: Path) -> list[Path]:
    """The checkpoints of a model that a run need not go on from."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_read_step, reverse=True)
    if (folder.parents[1] / "model" / folder.name / RECORD).exists():
        return checkpoints
    intact = next((path for path in checkpoints if not runs.find_damage(path)), None)
    return [path for path in checkpoints if path != intact]
