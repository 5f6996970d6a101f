"""Claims about the device and the precision, on GPUs that are not here."""

import pytest
import torch

from src.utils.hardware import choose_device, choose_dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_bf16_is_used_only_where_it_is_real(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert choose_dtype(torch.device("cuda")) == dtype
    assert choose_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("capability", "device"), [((6, 0), "cpu"), ((7, 5), "cuda"), ((9, 0), "cuda")])
def test_a_gpu_is_taken_only_where_torch_has_kernels_for_it(monkeypatch, caplog, capability, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert choose_device().type == device
    assert ("no kernels in this torch" in caplog.text) == (device == "cpu")


def test_without_a_gpu_the_cpu_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
