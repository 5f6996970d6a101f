"""Run the built kernel as Kaggle would, on this machine: `make rehearse`.

Kaggle's folders are made in the old and in the new layout, inputs read-only; there is no network.
For 06 a hidden test that is unlike the three visible rows takes their place, and the submission is
checked as the competition would check it. 03 and 04 train a tiny model unbroken and in two
sessions, the second of which has the first one's output among its inputs.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import nbformat
import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from src.utils import paths
from src.utils.battles.demo import make_battles
from src.utils.config import NOTEBOOKS, make_parameters, read_parameters, read_profile
from src.utils.delivery.submit import SUBMISSION_COLUMNS, check_submission
from src.utils.runs import atomic_folder, read_json, write_json
from src.utils.schema import TEXTS
from src.utils.suite.pipeline import STAGES

COMPETITION = "llm-classification-finetuning"
LIMIT_S = 9 * 3600
NOTHING: Mapping[str, Path] = MappingProxyType({})
METADATA = "kernel-metadata.json"
OUTPUT = "output"  # beside a kernel: what its rehearsal left, for those that read it
N_TRAIN = 600  # battles of a rehearsal's train.csv
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
    n_train: int = 0  # rows of train.csv


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


def make_train(n_rows: int) -> pd.DataFrame:
    """Make training battles as the competition has them, from the demo arena."""
    pairs = make_battles(n_rows, seed=7)[0]
    table = pairs[["id", "model_a", "model_b"]].copy()
    for column in TEXTS:
        table[column] = [json.dumps(list(turns)) for turns in pairs[column]]
    for number, column in enumerate(SUBMISSION_COLUMNS[1:]):
        table[column] = (pairs["label"] == number).astype(int)
    return table


def lay_out(
    root: Path,
    build: Path,
    case: Case,
    bases: Mapping[str, Path] = NOTHING,
    outputs: Mapping[str, Path] = NOTHING,
) -> np.ndarray:
    """Make Kaggle's folders under `root`.

    Args:
        root: gets them.
        build: holds `kernel/` and perhaps `dataset/`.
        case: rows of the tables, and layout.
        bases: name of an attached model, the second part of its source -> its local folder. A
            source without one is left out, as if it were not attached.
        outputs: id of a kernel whose output is attached -> that output here.

    Returns:
        Ids that the submission must hold, in order.
    """
    metadata = read_json(build / "kernel" / METADATA)
    inputs, is_new = root / "input", case.layout == "new"
    competition = inputs / ("competitions" if is_new else "") / COMPETITION
    competition.mkdir(parents=True)
    (root / "working").mkdir()
    hidden = shutil.ignore_patterns("dataset-metadata.json")
    for source in metadata["dataset_sources"]:
        is_wheels = source.endswith("-wheels")
        folder = build.parent / "wheels" if is_wheels else build / "dataset"
        place = inputs / (f"datasets/{source}" if is_new else source.split("/")[1])
        if folder.exists():
            shutil.copytree(folder, place, ignore=hidden)
    for source, folder in outputs.items():
        shutil.copytree(
            folder, inputs / (f"notebooks/{source}" if is_new else source.split("/")[1])
        )
    for source in metadata["model_sources"]:
        owner, name, *version = source.split("/")
        place = inputs / (f"models/{owner}" if is_new else "") / name / "/".join(version)
        if name in bases:
            shutil.copytree(bases[name], place)
    if case.n_train:
        make_train(case.n_train).to_csv(competition / "train.csv", index=False)
    test = make_hidden_test(case.n_rows)
    test.to_csv(competition / "test.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    ids = np.random.default_rng(1).permutation(test["id"].unique().tolist())
    sample = pd.DataFrame({"id": ids.astype(int)} | dict.fromkeys(SUBMISSION_COLUMNS[1:], 1 / 3))
    sample.to_csv(competition / "sample_submission.csv", index=False)
    return ids


def change_parameters(kernel: Path, source: str, target: Path) -> Path:
    """Copy a kernel with one more cell, right after those that set its parameters."""
    notebook = nbformat.read(kernel, as_version=4)
    is_setting = [
        bool({"parameters", "injected-parameters"} & {*cell.metadata.get("tags", [])})
        for cell in notebook.cells
    ]
    last = max(place for place, is_one in enumerate(is_setting) if is_one)
    notebook.cells.insert(last + 1, nbformat.v4.new_code_cell(source))
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


def run_kernel(build: Path, root: Path, python: str, settings: str = "") -> tuple[float, str]:
    """Run a built kernel in the folders that `lay_out` made.

    Args:
        build: holds `kernel/`.
        root: holds Kaggle's folders, and gets `executed.ipynb`.
        python: interpreter of the kernel, e.g. with the versions of Kaggle's image.
        settings: source of one more cell of parameters.

    Returns:
        Seconds, and how the network was cut.

    Raises:
        RuntimeError: a cell failed; the message holds the end of its output.
    """
    scratch = root / "scratch"
    scratch.mkdir()
    (scratch / "runner.py").write_text(RUNNER)
    kernel = build / "kernel" / read_json(build / "kernel" / METADATA)["code_file"]
    if settings:
        kernel = change_parameters(kernel, settings, scratch / "kernel.ipynb")
    command = [python, scratch / "runner.py", kernel, root / "working"]
    command = [*map(str, command), str(root / "executed.ipynb")]
    hidden = ("ARENA_ARTIFACTS", "PYTHONPATH", "HF_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "ARENA_KAGGLE_ROOT": str(root),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "HF_HOME": str(scratch / "hub"),
        "XDG_CACHE_HOME": str(scratch / "cache"),  # no wheel of this machine
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
    if ran.returncode:
        raise RuntimeError(f"the kernel failed:\n{ran.stdout[-1000:]}{ran.stderr[-4000:]}")
    return round(time.monotonic() - start, 1), isolation


def rehearse(
    build: Path,
    case: Case,
    root: Path,
    python: str = sys.executable,
    bases: Mapping[str, Path] = NOTHING,
    outputs: Mapping[str, Path] = NOTHING,
) -> dict:
    """Run the built kernel of 06 once and check its submission.

    Args:
        build: holds `kernel/` and `dataset/`.
        case: rows of the hidden test, and layout.
        root: gets Kaggle's folders; must not exist.
        python: interpreter of the kernel, as for `run_kernel`.
        bases: folders of the attached models, as for `lay_out`.
        outputs: outputs of other kernels, as for `lay_out`.

    Returns:
        Its `timing.json`, with `seconds_of_kernel` and `isolation`.

    Raises:
        RuntimeError: a cell failed.
        ValueError: the submission is not what the competition expects.
    """
    ids = lay_out(root, build, case, bases, outputs)
    settings = f"DEADLINE_S = {case.deadline_s}" if case.deadline_s else ""
    seconds, isolation = run_kernel(build, root, python, settings)
    check_submission(pd.read_csv(root / "working" / "submission.csv", dtype={"id": str}), ids)
    timing = read_json(root / "working" / "artifacts" / "06_kaggle_inference" / "timing.json")
    return timing | {"seconds_of_kernel": seconds, "isolation": isolation}


def rehearse_training(
    build: Path,
    root: Path,
    python: str = sys.executable,
    settings: Sequence[str] = (),
    n_train: int = N_TRAIN,
) -> dict:
    """Run the kernel of 03 or 04 unbroken, then in two sessions, and compare the weights.

    Session 1 is stopped by `TRAIN_DEADLINE_S` half-way; session 2 has its output among its inputs,
    in the other layout, and goes on from it. A tiny model is trained, whatever the kernel names.

    Args:
        build: holds `kernel/`.
        root: gets Kaggle's folders of each run; must not exist.
        python: interpreter of the kernel, as for `run_kernel`.
        settings: NAME=value over those of the demo.
        n_train: battles of `train.csv`.

    Returns:
        Seconds of each run, isolation, what session 1 said, and the output of session 2.

    Raises:
        RuntimeError: a cell failed, session 1 was not stopped, or the weights differ.
    """
    metadata = read_json(build / "kernel" / METADATA)
    notebook = Path(metadata["code_file"]).stem
    seconds, isolation = {}, ""

    def run(name: str, layout: str, deadline_s: float, earlier: Path | None = None) -> Path:
        nonlocal isolation
        outputs = {metadata["id"]: earlier} if earlier else NOTHING
        lay_out(root / name, build, Case(3, layout, n_train=n_train), outputs=outputs)
        tiny = set_tiny(notebook, [*settings, f"TRAIN_DEADLINE_S={deadline_s}"])
        seconds[name], isolation = run_kernel(build, root / name, python, tiny)
        return root / name / "working" / "artifacts" / notebook

    unbroken = run("unbroken", "old", 0.0)
    check_complete(unbroken)
    for share in (0.5, 0.2, 0.05):
        shutil.rmtree(root / "session 1", ignore_errors=True)
        stopped = run("session 1", "old", share * measure_training(unbroken))
        if not (stopped / "metrics.json").exists():
            break
    else:
        raise RuntimeError("session 1: expected to be stopped by its deadline, it was complete")
    said = find_large_letters(root / "session 1" / "executed.ipynb")
    check_complete(run("session 2", "new", 0.0, root / "session 1" / "working"))
    output = root / "session 2" / "working"
    compare_weights(unbroken, output / "artifacts" / notebook)
    return {"seconds": seconds, "isolation": isolation, "said": said, "output": output}


def set_tiny(notebook: str, settings: Sequence[str] = ()) -> str:
    """Write a cell that sets the parameters of the demo's tiny models, then `settings`."""
    defaults = {notebook: read_parameters(NOTEBOOKS / f"{notebook}.ipynb")}
    profile = {notebook: read_profile("demo").get(notebook, {})}
    values = make_parameters(defaults, profile=profile, settings=settings)[notebook]
    lines = [f"{name} = {value!r}" for name, value in values.items() if name != "OPTIONS"]
    if options := values.get("OPTIONS"):
        lines.append(f"OPTIONS = OPTIONS | {options!r}")
    return "\n".join(lines)


def check_complete(run_dir: Path) -> None:
    """Raise RuntimeError unless a run wrote its metrics."""
    if not (run_dir / "metrics.json").exists():
        raise RuntimeError(f"{run_dir}: expected metrics.json at the end of the run, found none")


def measure_training(run_dir: Path) -> float:
    """Seconds of all steps of a finished run."""
    records = [read_json(path) for path in sorted(run_dir.glob("model/*/training.json"))]
    return sum(row["seconds"] for record in records for row in record["history"])


def find_large_letters(executed: Path) -> list[str]:
    """The headings in the outputs of an executed notebook; RuntimeError if there are none."""
    texts = []
    for cell in nbformat.read(executed, as_version=4).cells:
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown", "")
            texts += [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    if not texts:
        raise RuntimeError(f"{executed}: expected large letters that say what remains, found none")
    return texts


def compare_weights(one: Path, other: Path) -> None:
    """Compare the weights of all models of two runs; RuntimeError if any differs in any bit."""
    files = sorted(path.relative_to(one) for path in one.glob("model/*/*.safetensors"))
    found = sorted(path.relative_to(other) for path in other.glob("model/*/*.safetensors"))
    if not files or files != found:
        raise RuntimeError(f"models: expected {list(map(str, files))}, got {list(map(str, found))}")
    for file in files:
        expected, weights = load_file(one / file), load_file(other / file)
        for name, values in expected.items():
            if not np.array_equal(values, weights[name]):
                gap = np.abs(values - weights[name]).max()
                raise RuntimeError(f"{file}: {name} differs from the unbroken run's by {gap}")


def rehearse_once(
    build: Path, root: Path, python: str = sys.executable, outputs: Mapping[str, Path] = NOTHING
) -> dict:
    """Run a kernel that neither trains on a GPU nor submits, and check that it is complete."""
    notebook = Path(read_json(build / "kernel" / METADATA)["code_file"]).stem
    lay_out(root, build, Case(3, "new", n_train=N_TRAIN), outputs=outputs)
    seconds, isolation = run_kernel(build, root, python, set_tiny(notebook))
    output = root / "working"
    last = next(stage.outputs[-1] for stage in STAGES if stage.name == notebook)
    if not (output / "artifacts" / notebook / last).exists():
        raise RuntimeError(f"{notebook}: expected {last} at the end of the run, found none")
    return {"seconds": {notebook: seconds}, "isolation": isolation, "output": output}


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


def find_outputs(build: Path) -> dict[str, Path]:
    """Find what rehearsals of the kernels that this one reads have left; FileNotFoundError."""
    outputs = {}
    for source in read_json(build / "kernel" / METADATA)["kernel_sources"]:
        number = source.split("arena-")[1][:2]
        folder = build.parent / number / OUTPUT
        if number == build.name:  # RESUME=1: the sessions of the rehearsal are its own
            continue
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder}: not found; the kernel reads it. Run `make rehearse NB={number}` first."
            )
        outputs[source] = folder
    return outputs


def rehearse_submission(options: argparse.Namespace, build: Path) -> list[dict]:
    """Rehearse 06 with no hidden row, with one and with many; print and return each."""
    bases, results = dict(options.base), []
    for source in read_json(build / "kernel" / METADATA)["model_sources"]:
        if source.split("/")[1] not in bases:
            name = source.split("/")[1]
            print(f"{source}: left out, as if it were not attached; give --base {name}=FOLDER")
    outputs = find_outputs(build)
    for case in (Case(0, "old"), Case(1, "old"), Case(options.rows, "new", options.deadline_s)):
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
            root = Path(scratch) / "kaggle"
            timing = rehearse(build, case, root, options.python, bases, outputs)
        print(describe(case, timing), flush=True)
        results.append(asdict(case) | timing)
    return results


def rehearse_other(options: argparse.Namespace, build: Path) -> list[dict]:
    """Rehearse another notebook; print and return what happened, and keep its output."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
        root = Path(scratch) / "kaggle"
        if build.name in ("03", "04"):
            result = rehearse_training(build, root, options.python, options.set)
        else:
            result = rehearse_once(build, root, options.python, find_outputs(build))
        with atomic_folder(build / OUTPUT) as folder:
            shutil.copytree(result.pop("output"), folder, dirs_exist_ok=True)
    runs = ", ".join(f"{name} {seconds:,} s" for name, seconds in result["seconds"].items())
    print(f"{build.name}, {result['isolation']}: complete ({runs})")
    for line in result.get("said", []):
        print(f"  session 1 ended with: {line}")
    if "said" in result:
        print("  session 2 went on from its output; all weights equal those of an unbroken run")
    return [result]


def main() -> int:
    """Rehearse from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--notebook", default="06", help="01 to 07")
    add("--rows", type=int, default=25_000, help="distinct battles of the hidden test")
    add("--deadline-s", type=float, default=0.0, help="a tighter deadline, to see what is given up")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="parameters")
    add("--python", default=sys.executable, help="interpreter of the kernel")
    add(
        "--base",
        action="append",
        default=[],
        type=read_base,
        metavar="NAME=FOLDER",
        help="local folder of an attached model; NAME is the second part of its source; repeatable",
    )
    add("--write", type=Path, help="JSON file that gets what was measured")
    options = parser.parse_args()
    build = (paths.ROOT / "build" / "kaggle" / options.notebook).resolve()
    if not (build / "kernel" / METADATA).exists():
        print(f"{build}: no kernel. Run `make kernel NB={build.name}` first.", file=sys.stderr)
        return 1
    try:
        results = (rehearse_submission if build.name == "06" else rehearse_other)(options, build)
    except (RuntimeError, ValueError, OSError, subprocess.TimeoutExpired) as error:
        print(f"{build.name}: {error}", file=sys.stderr)
        return 1
    if options.write:
        write_json(options.write, {"machine": describe_machine(), "cases": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
