"""Where a model runs and in which precision, from what this machine really has."""

import logging

import torch


def choose_device() -> torch.device:
    """The GPU that this build of torch has kernels for, else the CPU."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        # A card that is too old answers is_available() with True and fails at the first operation.
        if any(arch.startswith(f"sm_{major}") for arch in torch.cuda.get_arch_list()):
            return torch.device("cuda", torch.cuda.current_device())
        logging.getLogger(__name__).warning(
            "GPU of capability %d.%d has no kernels in this torch; using the CPU", major, minor
        )
    return torch.device("cpu")


def choose_dtype(device: torch.device) -> torch.dtype:
    """The dtype to compute in: bf16 where it is real (capability 8.0 up), fp16 on older GPUs, fp32 on CPU.

    `torch.cuda.is_bf16_supported` counts emulation and is True on a T4.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
