"""Claims about the device and the precision, on GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from src.utils.models.hardware import (
    MIN_BF16_HIDDEN_SIZE,
    choose_device,
    choose_dtype,
    choose_precision,
    cpu_has_bf16,
    expand_segments,
)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_bf16_is_used_only_where_it_is_real(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert choose_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("has_bf16", "hidden_size", "dtype"),
    [
        (True, MIN_BF16_HIDDEN_SIZE, torch.bfloat16),
        (True, MIN_BF16_HIDDEN_SIZE - 1, torch.float32),
        (True, None, torch.float32),
        (False, 4096, torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_that_is_faster(
    monkeypatch, has_bf16, hidden_size, dtype
):
    monkeypatch.setattr("src.utils.models.hardware.cpu_has_bf16", lambda: has_bf16)
    assert choose_dtype(torch.device("cpu"), hidden_size) == dtype
    assert ("no bf16" in choose_precision(torch.device("cpu"), hidden_size)[1]) == (not has_bf16)


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_either_kind_of_bf16_instruction_is_enough(monkeypatch, name):
    for other in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, other, lambda other=other: other == name, raising=False)
    assert cpu_has_bf16()


def test_a_torch_that_cannot_tell_counts_as_without_bf16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not cpu_has_bf16()


@pytest.mark.parametrize(
    ("capability", "device"), [((6, 0), "cpu"), ((7, 5), "cuda"), ((9, 0), "cuda")]
)
def test_a_gpu_is_taken_only_where_torch_has_kernels_for_it(
    monkeypatch, caplog, capability, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert choose_device().type == device
    assert ("no kernels in this torch" in caplog.text) == (device == "cpu")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
    ],
)
def test_gpu_memory_grows_in_place_unless_the_user_set_something(given, expected):
    environment = dict(given)
    expand_segments(environment)
    assert environment == expected


def test_importing_the_hardware_is_enough_and_starts_no_cuda():
    script = (
        "import os, torch, src.utils.models.hardware\n"
        "print(os.environ['PYTORCH_ALLOC_CONF'], torch.cuda.is_initialized())"
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["expandable_segments:True", "False"]


def test_without_a_gpu_the_cpu_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
