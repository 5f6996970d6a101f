"""What is uploaded equals the source, and asks Kaggle for the right machine."""

import argparse
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from src.utils.battles.readers import load_pairs
from src.utils.config import BaselineConfig, DecoderConfig
from src.utils.models import checkpoints
from src.utils.models.baseline import fit_baseline, save_baseline
from src.utils.paths import ROOT
from src.utils.schema import TEXTS
from src.utils.stats.blend import Blend


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "kaggle_kernel" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build, push, rehearse = map(load_script, ("build", "push", "rehearse"))


@pytest.fixture
def artifacts(tmp_path):
    folder = tmp_path / "artifacts"
    members = {
        "02_baseline": {"seed": 1},
        "04_qwen": {"checkpoint": "Qwen/Qwen3-4B", "lora_rank": 8},
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
    packed = build.unzip_package(build.make_kernel())
    files = [path for path in (ROOT / "src").rglob("*") if path.is_file()]
    names = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert set(packed) == names
    assert all(packed[name] == (ROOT / name).read_bytes() for name in names)


def test_the_kernel_is_notebook_06_with_one_more_cell():
    kernel, notebook = build.make_kernel(), nbformat.read(build.NOTEBOOK, as_version=4)
    nbformat.validate(kernel)
    assert [kernel.cells[0], *kernel.cells[2:]] == notebook.cells
    assert kernel.metadata.kernelspec.name == "python3"
    ast.parse(kernel.cells[1].source)


def test_the_first_cell_makes_the_package_importable_from_anywhere(tmp_path):
    first = build.make_kernel().cells[1].source
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
    build.build(artifacts, tmp_path / "kaggle", "ada")
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
        build.build(artifacts, tmp_path / "kaggle", "ada")


def test_a_build_that_fails_leaves_the_one_before(artifacts, tmp_path):
    build.build(artifacts, tmp_path / "kaggle", "ada")
    with pytest.raises(FileNotFoundError, match="03_modernbert"):
        build.build(artifacts, tmp_path / "kaggle", "ada", equal=["03_modernbert"])
    assert (tmp_path / "kaggle/dataset/04_qwen/model/fold_0/model.safetensors").exists()
    build.build(artifacts, tmp_path / "kaggle", "ada", equal=["02_baseline"])
    assert not (tmp_path / "kaggle/dataset/04_qwen").exists()


def test_an_adapter_whose_base_is_on_the_hub_is_named(artifacts):
    assert build.find_hub_bases(artifacts, ["02_baseline", "04_qwen"]) == ["04_qwen"]


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


def test_the_baseline_alone_asks_for_no_gpu():
    kernel = build.make_metadata("ada", ["02_baseline"])["kernel-metadata.json"]
    assert kernel["enable_gpu"] is False
    assert "machine_shape" not in kernel


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
    dataset = tmp_path / "build" / "kaggle" / "dataset"
    blend = json.loads((dataset / "05_ensemble" / "blend.json").read_text())
    assert Blend.from_json(blend).members == ("02_baseline",)
    folders = {path.name for path in dataset.iterdir() if path.is_dir()}
    assert folders == {"02_baseline", "05_ensemble"}


def test_members_at_equal_weight_replace_the_blend(artifacts, tmp_path):
    equal = ["02_baseline", "04_qwen"]
    assert build.build(artifacts, tmp_path / "kaggle", "ada", equal=equal) == equal
    blend = json.loads((tmp_path / "kaggle" / "dataset" / "05_ensemble" / "blend.json").read_text())
    assert Blend.from_json(blend) == Blend(tuple(equal), (0.5, 0.5))


def test_without_a_blend_the_build_names_it_and_what_to_run(artifacts, tmp_path):
    (artifacts / "05_ensemble" / "blend.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"blend\.json.*NB=01-05"):
        build.build(artifacts, tmp_path / "kaggle", "ada")


def test_attached_models_are_written_and_their_form_is_checked():
    source = "wowfattie/qwen3-4b-instruct-2507/transformers/default/1"
    kernel = build.make_metadata("ada", ["04_qwen"], [source])["kernel-metadata.json"]
    assert kernel["model_sources"] == [source]
    with pytest.raises(ValueError, match="'Qwen/Qwen3-4B'"):
        build.make_metadata("ada", ["04_qwen"], ["Qwen/Qwen3-4B"])


# ---- push --------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path):
    (tmp_path / "kernel-metadata.json").write_text(json.dumps({"id": "ada/llm-preference-arena"}))
    return tmp_path


def answering(*answers):
    """A kaggle client that gives these answers in turn, and the questions that it was asked."""
    left, asked = list(answers), []

    def ask(*arguments):
        asked.append(arguments)
        return left.pop(0)

    return ask, asked


ACCEPTED = "Kernel version 3 successfully pushed.  Please check progress at https://www.kaggle.com/code/ada/x"


def test_an_accepted_push_gives_the_id_and_nothing_submits(kernel):
    ask, asked = answering(ACCEPTED)
    assert push.push(kernel, ask) == "ada/llm-preference-arena"
    assert asked == [("kernels", "push", "-p", str(kernel))]


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
    (kernel / "kernel-metadata.json").write_text(json.dumps({"id": "OWNER/llm-preference-arena"}))
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
    build.build(artifacts, tmp_path / "kaggle", "ada")
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


def test_a_tighter_deadline_comes_right_after_the_parameters(tmp_path):
    nbformat.write(build.make_kernel(), tmp_path / "kernel.ipynb")
    changed = nbformat.read(
        rehearse.set_deadline(tmp_path / "kernel.ipynb", 60.0, tmp_path / "new.ipynb"), 4
    )
    sources = [cell.source for cell in changed.cells]
    place = next(
        i for i, cell in enumerate(changed.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    assert sources[place + 1] == "DEADLINE_S = 60.0" and "DEADLINE_S: float" in sources[place]


@pytest.fixture(scope="module")
def baseline_artifacts(tmp_path_factory, _demo_pairs):
    """A small finished CPU baseline."""
    run = tmp_path_factory.mktemp("baseline") / "02_baseline"
    config = BaselineConfig(n_hashed=256, n_trees=5)
    save_baseline(fit_baseline(_demo_pairs, config), run / "model")
    (run / "config.json").write_text(json.dumps(config.to_json()))
    (run / "metrics.json").write_text("{}")
    return run.parent


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["old", "new"])
def test_the_kernel_of_the_baseline_passes_its_rehearsal(baseline_artifacts, tmp_path, layout):
    build.build(baseline_artifacts, tmp_path / "kaggle", "ada", equal=["02_baseline"])
    timing = rehearse.rehearse(tmp_path / "kaggle", rehearse.Case(200, layout), tmp_path / "root")
    assert timing["n_pairs_by_members"] == {"02_baseline": 202}
    assert not (tmp_path / "root" / "input" / "x").exists()


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
        (artifacts / name / "metrics.json").write_text("{}")
    blend = Blend(("02_baseline", *networks), (0.4, 0.3, 0.3))
    (artifacts / "05_ensemble").mkdir()
    (artifacts / "05_ensemble" / "blend.json").write_text(json.dumps(blend.to_json()))
    (artifacts / "05_ensemble" / "metrics.json").write_text("{}")
    build.build(artifacts, tmp_path / "kaggle", "ada")
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
    (artifacts / "04_qwen" / "metrics.json").write_text("{}")
    (artifacts / "05_ensemble").mkdir()
    blend = Blend(("02_baseline", "04_qwen"), (0.5, 0.5))
    (artifacts / "05_ensemble" / "blend.json").write_text(json.dumps(blend.to_json()))
    (artifacts / "05_ensemble" / "metrics.json").write_text("{}")
    build.build(
        artifacts,
        tmp_path / "kaggle",
        "ada",
        model_sources=["ada/qwen3-tiny/transformers/default/1"],
    )
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
    build.build(baseline_artifacts, tmp_path / "kaggle", "ada", equal=["02_baseline"])
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
