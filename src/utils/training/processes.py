"""Several processes that train one model: who does what, parted weights, checkpoints of them.

One process is the case of a world of one: nothing here then asks for another. By
custom each process is called a rank, all of them together the world.
"""

import contextlib
import datetime
import functools
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

_PATIENCE = datetime.timedelta(hours=2)  # the others wait while the first downloads a checkpoint
_SHARDS = "shards"  # folder of parted weights and optimizer states in a checkpoint

P = ParamSpec("P")
R = TypeVar("R")


# ---- the world ---------------------------------------------------------------


def join_world() -> None:
    """Join the processes that torchrun started; each takes the GPU of its number on its node.

    Raises:
        RuntimeError: nothing started this process as one of several.
    """
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        if name not in os.environ
    ]
    if missing:
        raise RuntimeError(
            f"expected to be started by torchrun, which sets {missing}; this is a process of its own"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)


def leave_world() -> NoReturn:
    """Leave the other processes and end this one, at once and well; everything must be on disk.

    The interpreter's own way out is not taken: a thread of gloo or autograd that asks for
    the interpreter while it shuts down aborts the process, now and then.
    """
    _wait()
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


def on_first(act: Callable[P, R]) -> Callable[P, R]:
    """Let the first process alone do something, typically to files; all wait for it and get its result."""

    @functools.wraps(act)
    def act_once(*args: P.args, **kwargs: P.kwargs) -> R:
        result = [act(*args, **kwargs) if rank() == 0 else None]
        if world_size() > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    return act_once


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def _wait() -> None:
    if world_size() > 1:
        dist.barrier()


# ---- who reads which batch -----------------------------------------------------


def raise_to_world(batches_per_step: int) -> int:
    """The next multiple of the world's size: batches of one step, when each process reads equally many.

    Example:
        5 batches a step in a world of 4 -> 8
    """
    return -(-batches_per_step // world_size()) * world_size()


def deal(plan: Sequence[list[int]], batches_per_step: int) -> list[list[int]]:
    """The batches of this process: of each step every n-th one, n being the world's size.

    Args:
        plan: all batches in order, none empty.
        batches_per_step: from `raise_to_world`.

    Returns:
        As many batches on every process. Where the last step does not go round, some end
        with an empty batch, which stands for no row.
    """
    n_ranks = world_size()
    mine = [list(batch) for batch in plan[rank() :: n_ranks]]
    return mine + [[]] * (-(-len(plan) // n_ranks) - len(mine))


class TeamReader:
    """Reads as many batches at once as there are processes, one in each; a `predict.Reader`.

    All processes walk over the same battles in the same order, and all get all
    probabilities. Each makes the same number of passes, which parted weights need: a
    process without a batch reads one that another reads, too.

    Args:
        read: token rows -> (rows, C) float64.
    """

    def __init__(self, read: Callable[[Sequence[np.ndarray]], np.ndarray]) -> None:
        self.capacity = world_size()
        self._read_rows = read
        self._waiting: deque[tuple[int, Sequence[np.ndarray]]] = deque()
        self._done: deque[tuple[int, np.ndarray]] = deque()

    def send(self, key: int, rows: Sequence[np.ndarray]) -> None:
        """Put a batch beside those that will be read with it."""
        self._waiting.append((key, rows))

    def receive(self, deadline: float) -> tuple[int, np.ndarray]:
        """Hand back the oldest batch, read together with those that wait behind it."""
        if not self._done:
            probs: list[np.ndarray | None] = [None] * world_size()
            dist.all_gather_object(
                probs, self._read_rows(self._waiting[rank() % len(self._waiting)][1])
            )
            # The world may be larger than what is left to read.
            self._done.extend(
                (key, read) for (key, _), read in zip(self._waiting, probs, strict=False)
            )
            self._waiting.clear()
        return self._done.popleft()


# ---- parted weights ------------------------------------------------------------


def shard(model: nn.Module) -> nn.Module:
    """Part every weight over the processes (FSDP2), layer by layer, each on the device of its process.

    Args:
        model: in the memory of the CPU, the same in every process; changed in place.

    Raises:
        RuntimeError: there is one process alone.

    Source: Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
    """
    if world_size() < 2:
        raise RuntimeError(
            "sharding: expected two processes or more to part the weights over, got one"
        )
    for layer in _layers(model):
        fully_shard(layer)
    fully_shard(model)
    # From now on the Trainer leaves placement and gradients to the model: its own `fsdp` option is
    # plain DDP on CPUs, without a word.
    _transformers_model(model)._is_distributed_loading_by_transformers = True
    check_sharded(model)
    return model


def _layers(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, inner ones first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        part for parts in reversed(lists) for part in parts if any(True for _ in part.parameters())
    ]


def _transformers_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` parted this model."""
    return isinstance(model, FSDPModule)


def check_sharded(model: nn.Module) -> None:
    """Assert that weights are really parted.

    Raises:
        RuntimeError: the model or one of its layers is no `FSDPModule`, or a weight is whole.
    """
    plain = [
        type(part).__name__ for part in (model, *_layers(model)) if not isinstance(part, FSDPModule)
    ]
    whole = [
        name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)
    ]
    if plain or whole:
        raise RuntimeError(
            f"sharding: expected every weight to be parted, got plain {plain[:3]}, whole {whole[:3]}"
        )


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The trained weights in one piece, on the CPU; every process must ask, the first gets them.

    Returns:
        Name -> tensor of a parted model, empty on other processes; None of a model that is whole.
    """
    if not is_sharded(model):
        return None
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_frozen
    )
    return get_model_state_dict(model, options=options)


# ---- the Trainer -----------------------------------------------------------------


class RankedTrainer(Trainer):
    """A Trainer that makes sure of what its processes share, and can save and resume parted weights."""

    def _prepare_for_training(self, *args, **kwargs):
        model, dataloader = super()._prepare_for_training(*args, **kwargs)
        _check_world(self.args.world_size, model)
        return model, dataloader

    def _save(self, output_dir=None, state_dict=None) -> None:
        if not is_sharded(self.model):  # else `_save_optimizer_and_scheduler` saves weights, too
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if not is_sharded(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        dcp.save(self._shards(), checkpoint_id=Path(output_dir) / _SHARDS)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or not is_sharded(self.model):
            return super()._load_optimizer_and_scheduler(checkpoint)
        shards = self._shards()
        dcp.load(shards, checkpoint_id=Path(checkpoint) / _SHARDS)
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=shards["model"],
            optim_state_dict=shards["optimizer"],
            options=StateDictOptions(strict=False, ignore_frozen_params=True),
        )
        self.lr_scheduler.load_state_dict(
            torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        )

    def _shards(self) -> dict[str, dict]:
        model, optimizer = get_state_dict(
            self.model,
            self.optimizer.optimizer,
            options=StateDictOptions(ignore_frozen_params=True),
        )
        return {"model": model, "optimizer": optimizer}

    def _defer_fsdp_gradient_reduction(self):
        # Gradients of whole weights, kept until the step's last batch, are memory that is not there.
        return contextlib.nullcontext()

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        _wait()  # the Trainer's state, which says that a checkpoint is whole, is written next

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        _wait()  # a process that ran ahead and died would take the one that writes along


def _check_world(n_ranks: int, model: nn.Module) -> None:
    if n_ranks != world_size():
        raise RuntimeError(f"expected the Trainer to see {world_size()} processes, got {n_ranks}")
    if world_size() == 1:
        return
    if is_sharded(model):
        check_sharded(model)
    elif not isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            f"expected DistributedDataParallel over {world_size()} processes, got a plain {type(model).__name__}"
        )
