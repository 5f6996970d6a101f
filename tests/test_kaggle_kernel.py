"""What is uploaded equals the source, and asks Kaggle for the right machine."""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import nbformat
import pytest

from src.utils.paths import ROOT

SPEC = importlib.util.spec_from_file_location("build", ROOT / "kaggle_kernel" / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


@pytest.fixture
def artifacts(tmp_path):
    folder = tmp_path / "artifacts"
    members = {"02_baseline": {"seed": 1}, "04_qwen": {"checkpoint": "Qwen/Qwen3-4B", "lora_rank": 8}}
    for name, config in members.items():
        (folder / name / "model" / "fold_0").mkdir(parents=True)
        (folder / name / "model" / "fold_0" / "model.safetensors").write_text(name)
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "metrics.json").write_text("{}")
        for run in (folder / name, folder / name / "model" / "fold_0"):
            (run / "oof.parquet").write_text("not needed")
    (folder / "05_ensemble").mkdir()
    (folder / "05_ensemble" / "blend.json").write_text(json.dumps({"members": list(members)}))
    (folder / "05_ensemble" / "metrics.json").write_text("{}")
    return folder


def test_the_code_in_the_kernel_is_the_source():
    packed = build.unzip_package(build.make_kernel())
    source = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "src").rglob("*.py")}
    assert packed == source


def test_the_kernel_is_notebook_06_with_one_more_cell():
    kernel, notebook = build.make_kernel(), nbformat.read(build.NOTEBOOK, as_version=4)
    nbformat.validate(kernel)
    assert [kernel.cells[0], *kernel.cells[2:]] == notebook.cells
    assert kernel.metadata.kernelspec.name == "python3"
    ast.parse(kernel.cells[1].source)


def test_the_first_cell_makes_the_package_importable_from_anywhere(tmp_path):
    first = build.make_kernel().cells[1].source
    # Up to the tools of Kaggle's image, which would touch this environment; -S hides the installed package.
    script = first[: first.index("os.environ")] + "import src.utils as package\nprint(package.__file__, folder)"
    (tmp_path / "first.py").write_text(script)
    command = [sys.executable, "-S", tmp_path / "first.py"]
    ran = subprocess.run(
        command, cwd=tmp_path, env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    found, folder = ran.stdout.split()
    assert found.startswith(folder)


def test_the_build_holds_the_models_of_the_blend_and_nothing_else(artifacts, tmp_path):
    build.build(artifacts, tmp_path / "kaggle", "ada")
    files = {str(path.relative_to(tmp_path / "kaggle")) for path in (tmp_path / "kaggle").rglob("*") if path.is_file()}
    runs = {f"dataset/{name}/{part}" for name in ("02_baseline", "04_qwen") for part in ("config.json", "metrics.json")}
    models = {f"dataset/{name}/model/fold_0/model.safetensors" for name in ("02_baseline", "04_qwen")}
    blend = {"dataset/05_ensemble/blend.json", "dataset/05_ensemble/metrics.json"}
    metadata = {"dataset/dataset-metadata.json", "kernel/kernel-metadata.json"}
    assert files == runs | models | blend | metadata | {"kernel/llm-preference-arena.ipynb"}


def test_the_build_asks_for_an_unfinished_model(artifacts, tmp_path):
    (artifacts / "04_qwen" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="04_qwen: the blend names it"):
        build.build(artifacts, tmp_path / "kaggle", "ada")


def test_an_adapter_whose_base_is_on_the_hub_is_named(artifacts):
    assert build.find_hub_bases(artifacts, ["02_baseline", "04_qwen"]) == ["04_qwen"]


def test_every_boolean_is_written_and_the_internet_is_off():
    metadata = json.loads((ROOT / "kaggle_kernel" / "kernel-metadata.json").read_text())
    booleans = {"is_private": True, "enable_gpu": True, "enable_tpu": False, "enable_internet": False}
    assert {name: metadata.get(name) for name in booleans} == booleans
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["competition_sources"] == ["llm-classification-finetuning"]


@pytest.mark.parametrize("name", ["kernel-metadata.json", "dataset-metadata.json"])
def test_an_id_is_the_slug_of_its_title(name):
    metadata = json.loads((ROOT / "kaggle_kernel" / name).read_text())
    slug = re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower())
    assert metadata["id"] == f"OWNER/{slug}"
    assert 6 <= len(metadata["title"]) <= 50


def test_the_kernel_reads_the_dataset_that_is_built():
    made = build.make_metadata("ada", ["02_baseline", "04_qwen"])
    assert made["kernel-metadata.json"]["dataset_sources"] == [made["dataset-metadata.json"]["id"]]
    assert made["kernel-metadata.json"]["id"].startswith("ada/")


def test_the_floor_alone_asks_for_no_gpu():
    kernel = build.make_metadata("ada", ["02_baseline"])["kernel-metadata.json"]
    assert kernel["enable_gpu"] is False
    assert "machine_shape" not in kernel
