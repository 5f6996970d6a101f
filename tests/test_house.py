"""The repository as a whole: light imports, the style of notebooks, names that exist."""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from src.utils.config import CONFIGS, PROFILES, make_parameters, read_parameters, read_profile
from src.utils.paths import REAL_DATA
from src.utils.suite.pipeline import STAGES
from tests.conftest import NO_REAL_DATA

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "utils"
MODULES = {
    ".".join(path.relative_to(LIBRARY).with_suffix("").parts): path
    for path in sorted(LIBRARY.rglob("*.py"))
    if path.stem != "__init__"
}
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
LIGHT = (
    "schema",
    "config",
    "paths",
    "runs",
    "battles",
    "stats",
    "suite",
    "models.baseline",
    "models.insight",
)
BLOCK_HEAVY = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(name + " must not be loaded here")
sys.meta_path.insert(0, Block())
"""
IGNORED = {".git", *(ROOT / ".gitignore").read_text().replace("/\n", "\n").split()}

every_module = pytest.mark.parametrize("module", MODULES)
every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS)


# ── the package ───────────────────────────────────────────────────────────────────────


def test_light_modules_load_where_torch_is_missing():
    names = [name for name in MODULES if name.startswith(LIGHT)]
    script = BLOCK_HEAVY + "\n".join(f"import src.utils.{name}" for name in names)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


def test_init_files_of_folders_stay_empty():
    for path in LIBRARY.glob("*/__init__.py"):
        assert path.read_text().strip() == "", path


@every_module
def test_every_module_has_a_docstring_and_tests(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    names = (module.replace(".", "_"), module.rpartition(".")[2])
    assert any((ROOT / "tests" / f"test_{name}.py").exists() for name in names), (
        f"{module} has no test file"
    )


# ── the notebooks ─────────────────────────────────────────────────────────────────────


def read_cells(notebook, kind="code"):
    return [
        cell
        for cell in nbformat.read(NOTEBOOKS[notebook], as_version=4).cells
        if cell.cell_type == kind
    ]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def parse(cell):
    lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith("%")]
    return ast.parse("\n".join(lines))


def test_the_notebooks_are_those_of_the_pipeline():
    assert list(NOTEBOOKS) == [stage.name for stage in STAGES]


@every_notebook
def test_a_notebook_names_its_kernel_and_carries_no_outputs(notebook):
    assert nbformat.read(NOTEBOOKS[notebook], as_version=4).metadata.kernelspec.name == "python3"
    for cell in read_cells(notebook):
        assert cell.outputs == [], cell.source
        assert cell.execution_count is None, cell.source


@every_notebook
def test_a_notebook_starts_with_what_it_reads_and_writes(notebook):
    first = nbformat.read(NOTEBOOKS[notebook], as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert {"reads", "writes", "hardware"} <= set(re.findall(r"\w+", first.source.lower()))


@every_notebook
def test_a_notebook_has_one_parameters_cell_of_plain_lines(notebook):
    (cell,) = [cell for cell in read_cells(notebook) if is_parameters(cell)]
    for line in filter(str.strip, cell.source.splitlines()):
        assert line.count("=") == 1, line
        assert re.match(r"[A-Z][A-Z0-9_]*: \S.* = \S", line), line
    assert read_parameters(NOTEBOOKS[notebook])["PROFILE"] == "auto"


@every_notebook
def test_findings_come_first_then_parameters(notebook):
    box, parameters = read_cells(notebook)[:2]
    assert box.source.endswith("in_short = Findings()  # filled at the end")
    assert box.metadata.tags == ["hide-input"] and is_parameters(parameters)


@every_notebook
def test_cells_hold_no_library_code(notebook):
    banned = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.While)
    for cell in read_cells(notebook):
        assert not re.search(r"^\s*!|^\s*%(pip|conda)", cell.source, re.MULTILINE), cell.source
        found = [node for node in ast.walk(parse(cell)) if isinstance(node, banned)]
        assert not found, f"{type(found[0]).__name__} in\n{cell.source}"


@every_notebook
def test_cells_hold_no_absolute_path(notebook):
    for cell in read_cells(notebook):
        texts = [node.value for node in ast.walk(parse(cell)) if isinstance(node, ast.Constant)]
        wrong = [
            text for text in texts if isinstance(text, str) and re.match(r"(/|~/|[A-Z]:\\)\w", text)
        ]
        assert not wrong, cell.source


@every_notebook
def test_a_cell_is_one_act(notebook):
    for cell in read_cells(notebook):
        only_imports = all(
            isinstance(node, ast.Import | ast.ImportFrom | ast.Expr) for node in parse(cell).body
        )
        n_lines = sum(bool(line.strip()) for line in cell.source.splitlines())
        assert is_parameters(cell) or only_imports or n_lines <= 15, (
            f"{n_lines} lines in\n{cell.source}"
        )


def run_folders(cell):
    """Variable -> notebook whose run folder it holds, for `x = paths.run_dir("NN_name")`."""
    for node in ast.walk(parse(cell)):
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        for name, call in zip(target.elts, value.elts, strict=True) if both else [(target, value)]:
            asked = isinstance(call, ast.Call) and getattr(call.func, "attr", "") in (
                "run_dir",
                "find_run",
            )
            if asked and isinstance(name, ast.Name) and isinstance(call.args[0], ast.Constant):
                yield name.id, call.args[0].value


@every_notebook
def test_a_notebook_reads_only_smaller_numbers_and_writes_only_its_own_folder(notebook):
    cells = read_cells(notebook)
    folders = dict(pair for cell in cells for pair in run_folders(cell))
    assert folders.get("run_dir") == notebook
    assert all(name <= notebook for name in folders.values()), folders
    assert set(folders.values()) <= {stage.name for stage in STAGES}
    others = {variable for variable, name in folders.items() if name != notebook}
    for node in (
        node for cell in cells for node in ast.walk(parse(cell)) if isinstance(node, ast.Call)
    ):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name.startswith(("write_", "to_", "save")) and node.args:
            written = {part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)}
            assert not written & others, ast.unparse(node)


@pytest.mark.parametrize("notebook", CONFIGS)
def test_parameters_are_the_defaults_of_the_settings_class(notebook):
    shown = read_parameters(NOTEBOOKS[notebook])
    settings = {name.upper(): value for name, value in CONFIGS[notebook]().to_json().items()}
    assert {name: shown[name] for name in settings if name in shown}.items() <= settings.items()
    hidden = settings.keys() - shown.keys()
    assert not hidden or shown["OPTIONS"] == {}, f"hidden without OPTIONS: {hidden}"
    assert len(shown) <= 12


# ── what people type ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_is_one_that_the_notebooks_take(profile):
    defaults = {name: read_parameters(path) for name, path in NOTEBOOKS.items()}
    parameters = make_parameters(defaults, profile=read_profile(profile))
    for notebook, config in CONFIGS.items():
        given = defaults[notebook] | parameters[notebook]
        assert config.from_parameters(given, notebook) == config.from_parameters(
            defaults[notebook], notebook, profile
        )


def test_there_is_a_profile_for_every_default_of_the_runner():
    assert {"demo", "small", "full"} <= {path.stem for path in PROFILES.glob("*.yaml")}


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wrong = [
        line
        for line in lines
        if line and not re.match(r"#|[\w.-]+(\[\w+\])?==[\w.+]+( ?;.*)?$", line)
    ]
    assert not wrong


def test_every_target_of_the_makefile_is_explained():
    text = (ROOT / "Makefile").read_text()
    targets = {
        name for line in re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE) for name in line.split()
    }
    assert targets == set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))


def tree_entries(text):
    """The paths of the first code block that shows a tree, nested by indent."""
    block = next(part for part in text.split("```")[1::2] if "Makefile" in part and "src/" in part)
    folders = []
    for line in block.splitlines():
        match = re.match(r"([\s│├└─]*)([\w.][\w./-]*)", line)
        if not match:
            continue
        depth, name = len(match[1]), match[2]
        folders = [(d, folder) for d, folder in folders if d < depth]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((depth, name))
        yield path


def test_the_documented_tree_is_that_of_the_repository():
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    entries = list(tree_entries(page))
    known = [path for path in entries if path.split("/")[0] not in IGNORED]
    assert not [path for path in known if not (ROOT / path).exists()]
    tree = next(part for part in page.split("```")[1::2] if "src/utils/" in part)
    named = set(re.findall(r"\w+", tree))
    assert not [module for module in MODULES if module.rpartition(".")[2] not in named]


# ── what stays out of the repository ──────────────────────────────────────────────────


def repository_texts():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        yield name, text
        if path.suffix == ".ipynb":
            cells = nbformat.reads(text, as_version=4).cells
            yield name, "\n".join(cell.source for cell in cells)


def test_no_file_names_the_place_where_it_was_written():
    places = ("/" + "work/", "." + "library")
    found = [
        (name, place) for name, text in repository_texts() for place in places if place in text
    ]
    assert not found


def test_no_real_battle_is_in_the_repository():
    if not REAL_DATA.is_dir():
        pytest.skip(NO_REAL_DATA)
    csv.field_size_limit(10**7)
    starts = set()
    for path in REAL_DATA.glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            cells = [
                row[name]
                for row in csv.DictReader(file)
                for name in ("prompt", "response_a")
                if row.get(name)
            ]
        texts = [turn for cell in cells for turn in json.loads(cell) if turn]
        starts |= {text[:100] for text in texts if len(text) >= 100}
    everything = "\n".join(text for _, text in repository_texts())
    assert not [start for start in starts if start in everything]
