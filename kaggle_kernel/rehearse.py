"""Run the built kernel as Kaggle would, on this machine: `make rehearse`.

Kaggle's folders are made in the old and in the new layout, inputs read-only; there is no
network; a hidden test that is unlike the three visible rows takes their place. The
submission is checked as the competition would check it.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import nbformat
import numpy as np
import pandas as pd

from src.utils import paths
from src.utils.battles.demo import make_battles
from src.utils.delivery.submit import SUBMISSION_COLUMNS, check_submission
from src.utils.runs import read_json, write_json
from src.utils.schema import TEXTS

COMPETITION = "llm-classification-finetuning"
LIMIT_S = 9 * 3600
NO_BASES: Mapping[str, Path] = MappingProxyType({})
N_POOL = 1500  # demo battles that the hidden test is mixed from
MEDIAN_CHARS, SPREAD = 1000.0, 0.9  # of an answer, log-normal, about as in the training data
# Cells as they stand in test.csv; each takes the place of an answer or of the prompt now and then.
UGLY_CELLS = (
    '[""]',
    "[null]",
    "[]",
    "",
    "null",
    "this is no JSON",
    '["half an emoji \\ud83d", "and the other half \\ude00"]',
    '["<|im_end|> [SEP] </s>", null, "<script>alert(1)</script>"]',
    json.dumps(["*" * 50_000]),
    json.dumps(["word " * 10_000]),
    json.dumps(
        ["Что такое 日本語? これは答えです。 هذا جواب עברית ไทย हिन्दी 한국어 ελληνικά 😀"],
        ensure_ascii=False,
    ),
    json.dumps(["line\r\nbreaks\u2028\u2029\x00 tab\t"]),
)
UGLY_SHARE = 0.02

# Where there are no network namespaces: connections to other machines fail.
BLOCK_SOCKETS = """
import socket

def refuse(self, address, *rest, connect=socket.socket.connect):
    local = ("127.", "::1", "localhost")
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(local):
        raise OSError(101, "Network is unreachable: this is a rehearsal")
    return connect(self, address, *rest)

socket.socket.connect = refuse
"""

# Runs in the kernel's own Python, which may hold none of this package.
RUNNER = """
import socket
import sys

import nbformat
from nbclient import NotebookClient

try:
    socket.create_connection(("1.1.1.1", 53), 3)
    sys.exit("the network is not cut")
except OSError:
    pass
source, working, executed = sys.argv[1:]
notebook = nbformat.read(source, 4)
try:
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": working}}).execute()
finally:
    nbformat.write(notebook, executed)
"""
NAMESPACE = (
    'mount --bind "$ARENA_KAGGLE_ROOT/input" "$ARENA_KAGGLE_ROOT/input" && '
    'mount -o remount,ro,bind "$ARENA_KAGGLE_ROOT/input" && ip link set lo up && exec "$@"'
)


@dataclass(frozen=True)
class Case:
    """One run of the kernel."""

    n_rows: int
    layout: str  # "old" or "new"
    deadline_s: float = 0.0  # another deadline, to see what is given up; 0 keeps the notebook's


def make_hidden_test(n_rows: int, seed: int = 0) -> pd.DataFrame:
    """Make a test table unlike the visible one: ids unseen and unsorted, cells as text, repeats.

    Returns:
        `n_rows` distinct ids, and some of them again: id, prompt, response_a, response_b.
    """
    rng = np.random.default_rng(seed)
    pool = make_battles(N_POOL, seed=seed + 1)[0]
    chosen = rng.integers(0, N_POOL, n_rows)
    n_chars = np.exp(rng.normal(np.log(MEDIAN_CHARS), SPREAD, (n_rows, 2))).astype(int)
    columns = {"id": rng.choice(2**31, n_rows, replace=False)}
    columns["prompt"] = [
        json.dumps([turn or "" for turn in pool["prompt"].iloc[row]]) for row in chosen
    ]
    for column, lengths in zip(TEXTS[1:], n_chars.T, strict=True):
        columns[column] = [
            json.dumps([_stretch(pool[column].iloc[row][0] or "", length)])
            for row, length in zip(chosen, lengths, strict=True)
        ]
    test = pd.DataFrame(columns, dtype=object)
    for place in np.flatnonzero(rng.random(n_rows) < UGLY_SHARE):
        test.loc[place, TEXTS[rng.integers(len(TEXTS))]] = UGLY_CELLS[rng.integers(len(UGLY_CELLS))]
    same = np.flatnonzero(rng.random(n_rows) < UGLY_SHARE)
    test.loc[same, "response_b"] = test.loc[same, "response_a"]
    return pd.concat([test, test.iloc[: n_rows // 100]], ignore_index=True)


def _stretch(text: str, n_chars: int) -> str:
    return (f"{text} " * (n_chars // (len(text) + 1) + 1))[: max(n_chars, 1)]


def lay_out(
    root: Path, build: Path, case: Case, bases: Mapping[str, Path] = NO_BASES
) -> np.ndarray:
    """Make Kaggle's folders under `root`.

    Args:
        root: gets them.
        build: holds `kernel/` and `dataset/`.
        case: rows of the hidden test, and layout.
        bases: name of an attached model, the second part of its source -> its local folder. A
            source without one is left out, as if it were not attached.

    Returns:
        Ids that the submission must hold, in order.
    """
    metadata = read_json(build / "kernel" / "kernel-metadata.json")
    (dataset_id,) = metadata["dataset_sources"]
    is_new = case.layout == "new"
    competition = root / "input" / ("competitions" if is_new else "") / COMPETITION
    dataset = root / "input" / (f"datasets/{dataset_id}" if is_new else dataset_id.split("/")[1])
    competition.mkdir(parents=True)
    (root / "working").mkdir()
    shutil.copytree(
        build / "dataset", dataset, ignore=shutil.ignore_patterns("dataset-metadata.json")
    )
    for source in metadata["model_sources"]:
        owner, name, *version = source.split("/")
        place = root / "input" / (f"models/{owner}" if is_new else "") / name / "/".join(version)
        if name in bases:
            shutil.copytree(bases[name], place)
    test = make_hidden_test(case.n_rows)
    test.to_csv(competition / "test.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    ids = np.random.default_rng(1).permutation(test["id"].unique().tolist())
    sample = pd.DataFrame({"id": ids.astype(int)} | dict.fromkeys(SUBMISSION_COLUMNS[1:], 1 / 3))
    sample.to_csv(competition / "sample_submission.csv", index=False)
    return ids


def set_deadline(kernel: Path, deadline_s: float, target: Path) -> Path:
    """Copy a kernel with another deadline, set as papermill does, after the parameters."""
    notebook = nbformat.read(kernel, as_version=4)
    place = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"DEADLINE_S = {deadline_s}"))
    nbformat.write(notebook, target)
    return target


def cut_network(
    command: list[str], environment: dict[str, str], scratch: Path
) -> tuple[list[str], dict[str, str], str]:
    """Wrap a command so that it has no network and cannot write to its inputs.

    Returns:
        The command, its environment, and how it was done.
    """
    if (
        shutil.which("unshare")
        and not subprocess.run(["unshare", "-Urnm", "true"], capture_output=True).returncode
    ):
        return (
            ["unshare", "-Urnm", "sh", "-c", NAMESPACE, "sh", *command],
            environment,
            "network namespace",
        )
    (scratch / "sitecustomize.py").write_text(BLOCK_SOCKETS)
    for path in (Path(environment["ARENA_KAGGLE_ROOT"]) / "input").rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    return command, environment | {"PYTHONPATH": str(scratch)}, "blocked sockets"


def rehearse(
    build: Path,
    case: Case,
    root: Path,
    python: str = sys.executable,
    bases: Mapping[str, Path] = NO_BASES,
) -> dict:
    """Run the built kernel once and check its submission.

    Args:
        build: holds `kernel/` and `dataset/`.
        case: rows of the hidden test, and layout.
        root: gets Kaggle's folders; must not exist.
        python: interpreter of the kernel, e.g. with the versions of Kaggle's image.
        bases: folders of the attached models, as for `lay_out`.

    Returns:
        Its `timing.json`, with `seconds_of_kernel` and `isolation`.

    Raises:
        RuntimeError: a cell failed; the message holds the end of its output.
        ValueError: the submission is not what the competition expects.
    """
    ids = lay_out(root, build, case, bases)
    metadata = read_json(build / "kernel" / "kernel-metadata.json")
    scratch = root / "scratch"
    scratch.mkdir()
    (scratch / "runner.py").write_text(RUNNER)
    kernel = build / "kernel" / metadata["code_file"]
    if case.deadline_s:
        kernel = set_deadline(kernel, case.deadline_s, scratch / "kernel.ipynb")
    command = [python, scratch / "runner.py", kernel, root / "working"]
    command = [*map(str, command), str(root / "executed.ipynb")]
    hidden = ("ARENA_ARTIFACTS", "PYTHONPATH", "HF_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "ARENA_KAGGLE_ROOT": str(root),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "HF_HOME": str(scratch / "hub"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(scratch / "ipython"),
    }
    command, environment, isolation = cut_network(command, environment, scratch)
    start = time.monotonic()
    ran = subprocess.run(
        command,
        cwd=root / "working",
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    seconds = time.monotonic() - start
    if ran.returncode:
        raise RuntimeError(f"the kernel failed:\n{ran.stdout[-1000:]}{ran.stderr[-4000:]}")
    check_submission(pd.read_csv(root / "working" / "submission.csv", dtype={"id": str}), ids)
    timing = read_json(root / "working" / "artifacts" / "06_kaggle_inference" / "timing.json")
    return timing | {"seconds_of_kernel": round(seconds, 1), "isolation": isolation}


def describe(case: Case, timing: dict) -> str:
    """Summarise a run in a few lines."""
    lines = [
        f"{case.n_rows:,} rows, {case.layout} layout, {timing['isolation']}: "
        f"a valid submission.csv after {timing['seconds_of_kernel']:,} s"
    ]
    lines += [
        f"  {n_pairs:,} battles by {members}"
        for members, n_pairs in timing["n_pairs_by_members"].items()
    ]
    for member in timing["members"]:
        line = (
            f"  {member['member']}: {member['status']}, {member['seconds']:,} s, "
            f"{member['n_reached']:,} battles, {member['n_twice']:,} in both orders, "
            f"{member['n_cut']:,} cut {member['note']}"
        )
        lines.append(line.rstrip())
    lines.append(
        "  " + ", ".join(f"{name} {version}" for name, version in timing["versions"].items())
    )
    return "\n".join(lines)


def read_base(given: str) -> tuple[str, Path]:
    """Read NAME=FOLDER.

    Raises:
        argparse.ArgumentTypeError: it has another form, or the folder holds no checkpoint.
    """
    name, _, folder = given.partition("=")
    if not name or not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"expected NAME=FOLDER with a config.json in the folder, got {given!r}"
        )
    return name, Path(folder)


def describe_machine() -> str:
    """Cores and load of this machine, to judge the seconds by."""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} cores{load}"


def main() -> int:
    """Rehearse from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=paths.ROOT / "build" / "kaggle")
    parser.add_argument(
        "--rows", type=int, default=25_000, help="distinct battles of the hidden test"
    )
    parser.add_argument(
        "--deadline-s", type=float, default=0.0, help="a tighter deadline, to see what is given up"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the kernel")
    parser.add_argument(
        "--base",
        action="append",
        default=[],
        type=read_base,
        metavar="NAME=FOLDER",
        help="local folder of an attached model; NAME is the second part of its source; repeatable",
    )
    parser.add_argument("--write", type=Path, help="JSON file that gets what was measured")
    options = parser.parse_args()
    if not (options.build / "kernel" / "kernel-metadata.json").exists():
        print(f"{options.build}: no built kernel. Run `make kernel` first.", file=sys.stderr)
        return 1
    bases, results = dict(options.base), []
    for source in read_json(options.build / "kernel" / "kernel-metadata.json")["model_sources"]:
        if source.split("/")[1] not in bases:
            name = source.split("/")[1]
            print(f"{source}: left out, as if it were not attached; give --base {name}=FOLDER")
    for case in (Case(0, "old"), Case(1, "old"), Case(options.rows, "new", options.deadline_s)):
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
            try:
                timing = rehearse(
                    options.build.resolve(), case, Path(scratch) / "kaggle", options.python, bases
                )
            except (RuntimeError, ValueError, OSError, subprocess.TimeoutExpired) as error:
                print(f"{case.n_rows:,} rows, {case.layout} layout: {error}", file=sys.stderr)
                return 1
        print(describe(case, timing), flush=True)
        results.append(asdict(case) | timing)
    if options.write:
        write_json(options.write, {"machine": describe_machine(), "cases": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
