"""Where a model runs and in which precision, from what this machine really has."""

import logging

import torch

# Seconds of fp32 over those of bf16 autocast, forward and backward of ModernBERT on 4 x 512
# tokens, one thread of an EPYC with AVX512-BF16: hidden size 64 (3 layers) 0.6, 128 (4) 1.4,
# 192 (6) 2.3, 256 (6) 2.3, 384 (6) 2.2.
MIN_BF16_HIDDEN_SIZE = 128


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


def choose_dtype(device: torch.device, hidden_size: int | None = None) -> torch.dtype:
    """The dtype to compute a model in; `choose_precision` says why."""
    return choose_precision(device, hidden_size)[0]


def choose_precision(
    device: torch.device, hidden_size: int | None = None
) -> tuple[torch.dtype, str]:
    """The dtype to compute a model in, and the reason.

    bf16 where the hardware has it (`torch.cuda.is_bf16_supported` counts emulation and is
    True on a T4), fp16 on older GPUs, fp32 on other CPUs and for narrow models on any CPU.
    Weights that are trained stay 32-bit whatever is chosen: this is the dtype of autocast.

    Args:
        device: where the model lies.
        hidden_size: width of the model; None counts as narrow.

    Returns:
        The dtype, and one line for whoever starts a training.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = "capability {}.{}".format(*capability)
        if capability >= (8, 0):
            return torch.bfloat16, f"{name} has bf16 units"
        return torch.float16, f"{name} only emulates bf16"
    if not cpu_has_bf16():
        return torch.float32, "this CPU has no bf16 instructions"
    if (hidden_size or 0) < MIN_BF16_HIDDEN_SIZE:
        return (
            torch.float32,
            f"below a hidden size of {MIN_BF16_HIDDEN_SIZE} casting costs more than bf16 saves",
        )
    return torch.bfloat16, "this CPU has bf16 instructions"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-BF16 or AMX); torch emulates it elsewhere, slowly."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
