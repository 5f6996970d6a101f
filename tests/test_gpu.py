"""The checks of `gpu_checks.py`: on a GPU at the real shapes, and anywhere at tiny ones."""

import json
import os
from types import SimpleNamespace
from unittest import SkipTest

import pytest
import torch

from tests import gpu_checks
from tests.gpu_checks import CHECKS, REAL, TINY, Check, Worker, main, why_not

SLOW = ("two processes, one out of memory", "a killed training resumes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu_checks")


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=f"{why_not()}; `make gpu-check` where there is one")
@pytest.mark.parametrize("name", CHECKS)
def test_on_this_gpu_at_the_real_shapes(name, worker, folder):
    row = worker.run(name, REAL, folder / "real")
    if row["result"].startswith("skipped"):
        pytest.skip(row["result"])
    assert row["result"].startswith("passed"), row["result"]


@pytest.mark.filterwarnings("ignore:.*memory does not hold a batch:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CHECKS]
)
def test_every_check_runs_at_tiny_shapes(name, folder):
    assert CHECKS[name].run(TINY, folder / "tiny")


def fail(shapes, folder):
    raise AssertionError("7 is not 8")


def skip(shapes, folder):
    raise SkipTest("the card is too small")


@pytest.fixture
def with_gpu(monkeypatch):
    """A card that is not here, and checks that do nothing, run in this process."""
    card = SimpleNamespace(name="Some GPU", total_memory=24 * 2**30, major=8, minor=6)
    monkeypatch.setattr(gpu_checks, "why_not", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    monkeypatch.setattr(Worker, "run", lambda self, *arguments: gpu_checks.measure(*arguments))
    checks = {"good": Check(lambda shapes, folder: "fine", 14.6), "small": Check(skip)}
    monkeypatch.setattr(gpu_checks, "CHECKS", checks)
    return checks


def test_one_table_names_the_card_and_every_check(with_gpu, capsys, tmp_path):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Some GPU, 24.0 GiB, capability 8.6" in lines[0]
    assert lines[1].split() == ["check", "seconds", "peak", "GiB", "limit", "result"]
    assert "14.6" in lines[2] and "passed: fine" in lines[2]
    assert "skipped: the card is too small" in lines[3]
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_shown_counted_and_written(with_gpu, capsys, tmp_path):
    with_gpu["bad"] = Check(fail)
    assert main(["--write", str(tmp_path / "checks.json")]) == 1
    shown = capsys.readouterr().out
    assert "failed: 7 is not 8" in shown and "test_gpu.py" in shown and "1 of 3 failed" in shown
    written = json.loads((tmp_path / "checks.json").read_text())
    assert written["card"] == "Some GPU, 24.0 GiB" and "torch" in written["versions"]
    assert [row["result"].split(":")[0] for row in written["checks"]] == [
        "passed",
        "skipped",
        "failed",
    ]


def test_without_a_gpu_nothing_counts_as_checked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "nothing was checked: " in capsys.readouterr().out


def test_a_limit_above_the_card_is_skipped_and_one_below_it_holds(monkeypatch):
    fractions = []
    card = SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(gpu_checks, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(gpu_checks, "release_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with pytest.raises(SkipTest, match=r"16\.0 GiB"):
        gpu_checks.limit_memory(22.5)
    gpu_checks.limit_memory(14.6)
    gpu_checks.limit_memory(0.0)
    assert fractions == [14.6 / 16, 1.0]


@pytest.mark.slow
def test_a_check_that_loses_its_process_fails_and_the_next_one_has_another(folder):
    worker = Worker()
    try:
        assert worker.run("memory grows in place", TINY, folder)["result"].startswith("passed")
        number = worker._executor.submit(os.getpid).result()
        worker._executor.submit(os._exit, 3)
        lost = worker.run("memory grows in place", TINY, folder)
        assert lost["result"].startswith("failed: BrokenProcessPool")
        assert worker.run("memory grows in place", TINY, folder)["result"].startswith("passed")
        assert worker._executor.submit(os.getpid).result() != number
    finally:
        worker.close()
