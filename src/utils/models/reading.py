"""Readers: what runs a model on token rows, in this process or in one process per GPU.

Prediction and the states of a frozen base are read by the same readers.
"""

import contextlib
import math
import multiprocessing
import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from src.utils.config import FinetuneConfig
from src.utils.models.batches import collate
from src.utils.models.checkpoints import hidden_size, in_float32, load_finetuned, load_frozen
from src.utils.models.frozen import FrozenClassifier
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.schema import LABELS

TokenRows = Sequence[np.ndarray]  # token ids of each battle
_GRACE_S = 3.0  # after the deadline, for a process to end by itself
_LONGEST_S = 1e6  # that is waited for where there is no deadline


class ReaderLost(Exception):
    """No process is left that could read; what was read before is kept."""


class Reader(Protocol):
    """Turns token rows into probabilities, or states, one or several batches at a time."""

    capacity: int  # batches that may be under way at once

    def send(self, key: int, rows: TokenRows) -> None:
        """Start to read a batch."""

    def receive(self, deadline: float) -> tuple[int, np.ndarray] | None:
        """Wait for a batch: its key and (rows, width); None when the deadline passes first."""


class LocalReader:
    """A classifier in this process, one batch at a time; a `Reader`.

    With `packing` a batch is one row without padding, where `can_pack` knows the model.
    """

    capacity = 1
    width = len(LABELS)  # of what is read of a row

    def __init__(self, model: nn.Module, pad_id: int, *, packing: bool = True) -> None:
        self.model, self.pad_id = model, pad_id
        self.is_packed = packing and can_pack(model)
        if self.is_packed:
            enable_packing(model)
        self._done: deque[tuple[int, np.ndarray]] = deque()
        self._too_many_tok = math.inf  # that memory did not hold, padding included

    def send(self, key: int, rows: TokenRows) -> None:
        """Read a batch at once."""
        self._done.append((key, self.read(rows)))

    def receive(self, deadline: float) -> tuple[int, np.ndarray]:
        """Return the batch that was read."""
        return self._done.popleft()

    def close(self) -> None:
        """Nothing to end."""

    def read(self, rows: TokenRows) -> np.ndarray:
        """Predict each row: (rows, C) float64.

        A batch that does not fit into memory is halved until it does, and so are later ones
        of as many tokens, untried. NaN where a single row does not fit, or where logits are
        not finite even in 32 bit.
        """
        lengths = [len(row) for row in rows]
        n_tok = sum(lengths) if self.is_packed else len(rows) * max(lengths)
        if len(rows) == 1 or n_tok < self._too_many_tok:
            try:
                return self._predict(rows)
            except torch.OutOfMemoryError:
                self._too_many_tok = min(self._too_many_tok, n_tok)
            # Outside of `except`, where the failed pass no longer holds its memory.
            torch.cuda.empty_cache()  # does nothing without a GPU
            if len(rows) == 1:
                return np.full((1, self.width), np.nan)
        half = len(rows) // 2
        return np.concatenate([self.read(rows[:half]), self.read(rows[half:])])

    @torch.no_grad()
    def _predict(self, rows: TokenRows) -> np.ndarray:
        device = next(self.model.parameters()).device
        values = self._run(rows, device, choose_dtype(device, hidden_size(self.model)))
        overflowed = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
        if overflowed:
            # Where 32 bit do not fit into memory, smaller batches would not help: NaN remains.
            with contextlib.suppress(torch.OutOfMemoryError), in_float32(self.model):
                for row in overflowed:
                    values[row] = self._run([rows[row]], device, torch.float32)[0]
        values[~torch.isfinite(values).all(dim=1)] = torch.nan
        return self._finish(values)

    def _run(self, rows: TokenRows, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        batch = collate_packed(rows) if self.is_packed else collate(rows, self.pad_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                return self._compute(batch).cpu()
        finally:
            self.model.train(was_training)

    def _compute(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).logits.double()

    def _finish(self, values: torch.Tensor) -> np.ndarray:
        return torch.softmax(values, dim=1).numpy()


class StateReader(LocalReader):
    """Reads the states of a frozen base, (rows, n_states) float16, in place of probabilities."""

    def __init__(self, model: FrozenClassifier, pad_id: int, *, packing: bool = True) -> None:
        super().__init__(model, pad_id, packing=packing)
        self.width = model.n_states

    def _compute(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model.read_states(**batch)

    def _finish(self, values: torch.Tensor) -> np.ndarray:
        return values.half().numpy()


def load_reader(folder: Path, config: FinetuneConfig, base: Path | None) -> LocalReader:
    """Load a fine-tuned model to read with in this process; arguments as for `load_finetuned`."""
    model, tokenizer = load_finetuned(folder, config, base)
    return LocalReader(model, tokenizer.pad_token_id, packing=config.packing)


def load_state_reader(config: FinetuneConfig, base: Path | None) -> StateReader:
    """Load a frozen base to read its states in this process."""
    model, tokenizer = load_frozen(config, base)
    return StateReader(model, tokenizer.pad_token_id, packing=config.packing)


def open_reader(
    load: Callable[[], LocalReader], deadline: float, n_workers: int | None = None
) -> "LocalReader | ProcessReader":
    """Open a reader of one model: in processes of its own, or here where none can be started.

    `n_workers` None takes a process per GPU, or one on the CPU; 0 reads in this process.
    RuntimeError if the model is not loaded by the deadline, a `time.monotonic()` value.
    """
    devices = choose_devices(n_workers)
    if devices:
        try:
            return ProcessReader(load, devices, deadline)
        except OSError as error:
            warnings.warn(f"reading in this process, as no other starts: {error}", stacklevel=2)
    return load()


def choose_devices(n_workers: int | None) -> list[int | None]:
    """Choose the GPU of each process, None for the CPU; `n_workers` as for `open_reader`."""
    n_gpus = torch.cuda.device_count() if choose_device().type == "cuda" else 0
    n_workers = max(n_gpus, 1) if n_workers is None else n_workers
    return [worker % n_gpus if n_gpus else None for worker in range(n_workers)]


class ProcessReader:
    """One model in several processes that take batches from one queue; a `Reader`.

    Each process is an executor of its own, so that when one dies the others read its batches.
    When all die, often for lack of memory, this process does not try as well.
    """

    def __init__(
        self, load: Callable[[], LocalReader], devices: Sequence[int | None], deadline: float
    ) -> None:
        """Load the model in a process per device, None for the CPU; OSError if none starts."""
        left_s = _seconds_until(deadline)
        # A fork would share the state of CUDA and of threads.
        context = multiprocessing.get_context("spawn")
        self._executors = [ProcessPoolExecutor(1, context) for _ in devices]
        self._failures: dict[ProcessPoolExecutor, str] = {}
        self._under_way: dict[Future, tuple[int, TokenRows, ProcessPoolExecutor]] = {}
        try:
            tasks = [
                executor.submit(_load, load, device, left_s)
                for executor, device in zip(self._executors, devices, strict=True)
            ]
            if wait(tasks, left_s).not_done:
                raise RuntimeError("time ran out while the model was being loaded")
            for executor, task in zip(self._executors, tasks, strict=True):
                self._note(executor, task.exception())
            if len(self._failures) == len(devices):
                raise RuntimeError("; ".join(self._failures.values()))
        except BaseException:
            self.close()
            raise
        # The second batch of a process is ready while it reads the first.
        self.capacity = 2 * (len(devices) - len(self._failures))

    def close(self) -> None:
        """End the processes, which frees their memory."""
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)

    def send(self, key: int, rows: TokenRows) -> None:
        """Hand a batch to the process that has the fewest."""
        while alive := [each for each in self._executors if each not in self._failures]:
            n_batches = Counter(executor for _, _, executor in self._under_way.values())
            executor = min(alive, key=n_batches.__getitem__)
            try:
                self._under_way[executor.submit(_read, rows)] = (key, rows, executor)
                return
            except BrokenProcessPool as error:
                self._note(executor, error)
        raise ReaderLost("; ".join(self._failures.values()))

    def receive(self, deadline: float) -> tuple[int, np.ndarray] | None:
        """Wait for a batch: its key and (rows, C) float64; None when the deadline passes first."""
        while done := wait(self._under_way, _seconds_until(deadline), FIRST_COMPLETED).done:
            task = done.pop()
            key, rows, executor = self._under_way.pop(task)
            error = task.exception()
            if error is None:
                return key, task.result()
            self._note(executor, error)
            self.send(key, rows)
        return None

    def _note(self, executor: ProcessPoolExecutor, error: BaseException | None) -> None:
        if error is not None:
            self._failures.setdefault(executor, f"{type(error).__name__}: {error}")


def _seconds_until(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), _LONGEST_S)


_reader: LocalReader  # of a process that `ProcessReader` started


def _end_in_time(left_s: float) -> None:
    """End this process with its parent or soon after the deadline, whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join(left_s + _GRACE_S)
    os._exit(1)


def _load(load: Callable[[], LocalReader], device: int | None, left_s: float) -> None:
    global _reader
    threading.Thread(target=_end_in_time, args=(left_s,), daemon=True).start()
    if device is not None:
        torch.cuda.set_device(device)
    _reader = load()


def _read(rows: TokenRows) -> np.ndarray:
    return _reader.read(rows)
