"""Train in several processes (data parallel): join them, share weights, combine results.

As in torch, the number of a process is its rank, and all processes together are the world.
"""

import datetime
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

_TIMEOUT = datetime.timedelta(hours=2)  # the others wait while the first downloads a checkpoint

P = ParamSpec("P")
R = TypeVar("R")


def join_world() -> None:
    """Join the processes that torchrun started; each takes the GPU with its local number."""
    if "RANK" not in os.environ:
        raise RuntimeError("expected to be started by torchrun, but RANK is not set")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)


def leave_world() -> NoReturn:
    """Leave the other processes and end this one with exit code 0; everything must be on disk.

    The interpreter's own shutdown is skipped: now and then a thread of gloo or autograd asks
    for the interpreter while it shuts down, and that aborts the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def world_size() -> int:
    """How many processes train together; 1 when this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_first(function: Callable[P, R]) -> Callable[P, R]:
    """Let only the first process call a function; the others wait and get the same result."""

    @functools.wraps(function)
    def call_on_first(*args: P.args, **kwargs: P.kwargs) -> R:
        result: list = [function(*args, **kwargs) if rank() == 0 else None]
        if world_size() > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    return call_on_first


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Join rows that each process computed of `table[rank()::world_size()]`, in table order."""
    parts: list = [rows] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, rows)
    joined = np.empty((sum(map(len, parts)), *rows.shape[1:]), dtype=rows.dtype)
    for number, part in enumerate(parts):
        joined[number :: len(parts)] = part
    return joined


def sum_gradients(weights: Iterable[nn.Parameter], sums: torch.Tensor) -> None:
    """Sum gradients and counts over all processes, in place; once per step, after its last batch.

    Unlike with `DistributedDataParallel`, processes may read different numbers of batches in a
    step, and each may split its own where memory runs out.
    """
    if world_size() > 1:
        tensors = [sums]
        for weight in weights:
            if weight.grad is None:  # this process had no batch in this step
                weight.grad = torch.zeros_like(weight)
            tensors.append(weight.grad)
        vector = nn.utils.parameters_to_vector(tensors)  # one transfer is quicker than many
        dist.all_reduce(vector)
        nn.utils.vector_to_parameters(vector, tensors)


def copy_from_first(weights: Iterable[nn.Parameter]) -> None:
    """Give every process the weights of the first one."""
    if world_size() > 1:
        for weight in weights:
            dist.broadcast(weight.data, src=0)
