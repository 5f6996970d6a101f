"""Choose the device and the precision from what this machine really has."""

import logging
import os
from collections.abc import MutableMapping

import torch

# Time in fp32 over time in bf16 autocast, forward and backward of ModernBERT on 4 x 512 tokens, one
# thread of an EPYC with AVX512-BF16: hidden size 64 (3 layers) 0.6, 128 (4) 1.4, 192 (6) 2.3.
MIN_BF16_HIDDEN_SIZE = 128


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let GPU memory grow in place: every packed row has another length, which fragments it.

    Must be called before CUDA starts. What the user has set, under either name, stays.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the old name, about which torch warns
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


expand_segments()


def choose_device() -> torch.device:
    """Return the GPU if this build of torch has kernels for it, else the CPU."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        # is_available() is True for a card that is too old, and its first operation fails.
        if any(arch.startswith(f"sm_{major}") for arch in torch.cuda.get_arch_list()):
            return torch.device("cuda", torch.cuda.current_device())
        logging.getLogger(__name__).warning(
            "GPU of capability %d.%d has no kernels in this torch; using the CPU", major, minor
        )
    return torch.device("cpu")


def choose_dtype(device: torch.device, hidden_size: int | None = None) -> torch.dtype:
    """Return the dtype of `choose_precision`."""
    return choose_precision(device, hidden_size)[0]


def choose_precision(
    device: torch.device, hidden_size: int | None = None
) -> tuple[torch.dtype, str]:
    """Choose the dtype of autocast; trained weights are 32-bit whatever is chosen.

    bf16 where the hardware has it (`torch.cuda.is_bf16_supported` counts emulation and is True on
    a T4), fp16 on older GPUs, fp32 on other CPUs and for narrow models on any CPU.

    Returns:
        The dtype, and the reason in one line.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"capability {major}.{minor} has bf16 units"
        return torch.float16, f"capability {major}.{minor} only emulates bf16"
    if not cpu_has_bf16():
        return torch.float32, "this CPU has no bf16 instructions"
    if (hidden_size or 0) < MIN_BF16_HIDDEN_SIZE:
        reason = f"below a hidden size of {MIN_BF16_HIDDEN_SIZE} casting costs more than bf16 saves"
        return torch.float32, reason
    return torch.bfloat16, "this CPU has bf16 instructions"


def cpu_has_bf16() -> bool:
    """Report whether the CPU multiplies bf16 itself (AVX512-BF16, AMX); emulation is slow."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
