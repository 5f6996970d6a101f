"""Train the model of one fold: a training loop in plain PyTorch that resumes exactly.

All batches of all epochs are planned before the first step, so a checkpoint needs only the
number of the step to know what comes next.
"""

import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from src.utils.config import FinetuneConfig
from src.utils.models.batches import collate
from src.utils.models.checkpoints import hidden_size, write_model
from src.utils.models.hardware import choose_device, choose_precision
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.models.predict import LocalReader, predict_pairs
from src.utils.runs import atomic_folder, measure_peak_mib, write_manifest, write_table
from src.utils.schema import probs_table
from src.utils.stats.scores import log_loss
from src.utils.training import processes
from src.utils.training.data import Examples, loss_of, plan_batches
from src.utils.training.processes import rank, world_size
from src.utils.training.progress import Progress

MAX_GRAD_NORM = 1.0
N_CHECKPOINTS = 2  # that are kept: should the newest be damaged, the one before it serves
HISTORY_COLUMNS = (
    *("fold", "seed", "step", "epoch", "train_loss", "log_loss", "swap_gap", "learning_rate"),
    *("tokens_per_second", "padding_share", "peak_mib"),
)


@dataclass(frozen=True)
class Member:
    """One model to train."""

    name: str  # of its folders, e.g. "fold_0"
    fold: int | None  # held out; None for the refit
    config: FinetuneConfig  # with a seed of its own
    key: str = ""  # hash of everything that determines the model
    stop_share: float = 1.0  # of all steps, after which to stop; above 0


class FoldTrainer:
    """Trains one model and validates it on the held-out battles of its fold.

    `run_dir` gets the best weights, with their predictions of `heldout`, in `model/NAME`, and
    `checkpoints/NAME`, `tensorboard/NAME` and, at every validation, `history.csv` (whose earlier
    rows are `earlier`). Without held-out battles the last weights are kept, without a history.
    Training stops after `member.stop_share` of the steps; the rate is planned for all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train_pairs: pd.DataFrame,
        heldout: pd.DataFrame,
        member: Member,
        run_dir: Path,
        earlier: Sequence[dict] = (),
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.heldout, self.member, self.run_dir = heldout, member, run_dir
        self.earlier = list(earlier)
        self.config = config = member.config
        self.device = choose_device()
        self.dtype, self._dtype_reason = choose_precision(self.device, hidden_size(model))
        self.is_packed = config.packing and can_pack(model)
        if self.is_packed:
            enable_packing(model)

        self.examples = Examples(train_pairs, tokenizer, config)
        plan = plan_batches(self.examples.lengths, config, self.is_packed)
        # A multiple of the processes, so that all have equally much to do in a step.
        self.batches_per_step = math.ceil(config.batches_per_step / world_size()) * world_size()
        starts = range(0, len(plan), self.batches_per_step)
        self.steps = [plan[start : start + self.batches_per_step] for start in starts]
        counts = np.zeros((len(self.steps) + 1, 3), dtype=np.int64)
        for number, batch in enumerate(plan):
            lengths = self.examples.lengths[np.array(batch) // 2]
            n_padded = lengths.sum() if self.is_packed else len(batch) * lengths.max()
            counts[number // self.batches_per_step + 1] += len(batch), lengths.sum(), n_padded
        # Rows, tokens, and tokens with padding, that are read before each step and in all.
        self._totals = np.cumsum(counts, axis=0)
        self._rows_per_batch = self._totals[-1, 0] / len(plan)

        self.last_step = max(1, round(member.stop_share * len(self.steps)))
        n_validations = min(max(1, round(config.n_evals * config.n_epochs)), len(self.steps))
        ends = np.linspace(0, len(self.steps), n_validations + 1)[1:].round()
        self.validation_steps = {min(int(end), self.last_step) for end in ends}
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.n_orders = 2 if config.both_orders else 1  # rows of a battle in a batch
        self.n_parts = 1  # that each batch is split into; more when memory runs out
        # Steps depend on both. Whether batches are packed depends on the version of transformers.
        self._made_by = {"n_processes": world_size(), "packed": self.is_packed}
        self.step = 0  # optimizer steps taken so far
        self.history: list[dict] = []  # per validation: `describe_interval`, log_loss, swap_gap
        self._loss_sum = 0.0  # of the rows since the last validation

    def train(self, checkpoint: Path | None = None) -> None:
        """Train to the end, from the start or from a checkpoint of the same settings."""
        processes.copy_from_first(self.weights)
        if checkpoint:
            self._load(checkpoint)
        progress = None if rank() or self.is_finished else self._start_progress()
        self._interval_start = time.perf_counter()  # of the steps since the last validation
        try:
            while not self.is_finished:
                self.take_step()
                row = self.describe_interval()
                if progress:
                    progress.show_step(row)
                if self.step in self.validation_steps:
                    if len(self.heldout):
                        self._validate(row)
                    self.history.append(row)
                    self._save()
                    if progress:
                        progress.show_validation(self.history)
                    self._loss_sum = 0.0
                    self._interval_start = time.perf_counter()
        finally:
            if progress:
                progress.close()
        if not len(self.heldout):
            self._write_model(None)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is taken, or the best loss is `patience` validations old."""
        losses = self._losses()
        n_since_best = len(losses) - 1 - int(np.argmin(losses)) if losses else 0
        return self.step >= self.last_step or 0 < self.config.patience <= n_since_best

    def _losses(self) -> list[float]:
        return [row["log_loss"] for row in self.history if "log_loss" in row]

    def take_step(self) -> None:
        """Take one optimizer step; when memory runs out, repeat all of it in smaller parts."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        batches = self.steps[self.step][rank() :: world_size()]
        # Random numbers follow from the step, which is all that a resumed run has to know.
        seed = np.random.SeedSequence((self.config.seed, self.step, rank())).generate_state(1)[0]
        self.model.train()
        while True:
            torch.manual_seed(int(seed))
            try:
                loss_sum = self._add_gradients(batches)
                break
            except torch.OutOfMemoryError as error:
                message = str(error)
            # Not in the except block: there the error still holds the failed pass's memory.
            self.optimizer.zero_grad()
            self._split_further(batches, message)
        processes.sum_gradients(self.weights, loss_sum)
        self._loss_sum += loss_sum.item()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1

    def _add_gradients(self, batches: list[list[int]]) -> torch.Tensor:
        """Add the gradients of batches; returns the sum of the losses to report."""
        # The mean loss of a batch's own rows would give a battle in a small batch (of long
        # battles) more weight than one in a large batch: divide by the mean rows per batch.
        n_rows = self._rows_per_batch * len(self.steps[self.step])
        is_mixed = self.dtype != torch.float32
        loss_sum = torch.zeros((), device=self.device)
        for batch in batches:
            size = math.ceil(len(batch) / self.n_orders / self.n_parts) * self.n_orders
            for start in range(0, len(batch), size):
                inputs, targets = self._collate(batch[start : start + size])
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
                    logits = self.model(**inputs).logits
                loss, reported = loss_of(logits.float(), targets, self.config)
                self.scaler.scale(loss / n_rows).backward()
                loss_sum += reported.detach()
        return loss_sum

    def _collate(self, items: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, targets = zip(*(self.examples[item] for item in items), strict=True)
        pad_id = self.tokenizer.pad_token_id
        inputs = collate_packed(rows) if self.is_packed else collate(rows, pad_id)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return inputs, torch.from_numpy(np.stack(targets)).to(self.device)

    def _split_further(self, batches: list[list[int]], message: str) -> None:
        if self.n_parts >= max(map(len, batches)) / self.n_orders:
            raise torch.OutOfMemoryError(
                f"step {self.step}: memory does not hold a single battle; lower max_tokens "
                f"({self.config.max_tokens}) or turn on gradient_checkpointing. {message}"
            )
        self.n_parts *= 2
        torch.cuda.empty_cache()  # does nothing without a GPU
        warnings.warn(
            f"step {self.step}: memory does not hold a batch of {self.config.tokens_per_batch} "
            f"tokens; from now on each is read in {self.n_parts} parts, with the same result",
            stacklevel=3,
        )

    def _learning_rate(self) -> float:
        """Of the next step: a linear warm-up, then half a cosine down to 0."""
        n_warm = math.ceil(self.config.warmup_share * len(self.steps))
        if self.step < n_warm:
            return self.config.learning_rate * self.step / n_warm
        progress = (self.step - n_warm) / max(1, len(self.steps) - n_warm)
        return self.config.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    def _validate(self, row: dict) -> None:
        """Predict the held-out battles; keep the weights when they are the best so far."""
        prediction = predict_pairs(
            LocalReader(self.model, self.tokenizer.pad_token_id, packing=self.config.packing),
            self.tokenizer,
            self.heldout[rank() :: world_size()],  # each process predicts its share
            max_tokens=self.config.predict_tokens,
            tokens_per_batch=self.config.tokens_per_batch,
        )
        probs = processes.gather_rows(prediction.probs)
        n_lost = int(np.isnan(probs).any(axis=1).sum())
        if n_lost:
            raise FloatingPointError(
                f"{self.member.name}, step {self.step}: logits of {n_lost} of {len(probs)} battles "
                f"are not finite; lower learning_rate ({self.config.learning_rate})"
            )
        row["log_loss"] = log_loss(probs, self.heldout["label"].to_numpy())
        row["swap_gap"] = float(np.nanmean(processes.gather_rows(np.asarray(prediction.swap_gap))))
        if row["log_loss"] < min(self._losses(), default=math.inf):
            self._write_model(probs)

    @processes.on_first
    def _write_model(self, probs: np.ndarray | None) -> None:
        # Weights and the predictions made with them replace the old ones in one step.
        with atomic_folder(self.run_dir / "model" / self.member.name) as folder:
            write_model(self.model, self.tokenizer, folder)
            if probs is not None:
                table = probs_table(self.heldout["id"], probs, fold=self.member.fold)
                write_table(folder / "oof.parquet", table)

    def describe_interval(self) -> dict:
        """Describe training since the last validation: losses in nats, the next learning rate."""
        seconds = time.perf_counter() - self._interval_start
        last_step = self.history[-1]["step"] if self.history else 0
        n_rows, n_tok, n_padded = self._totals[self.step] - self._totals[last_step]
        return {
            "fold": self.member.fold,
            "seed": self.config.seed,
            "step": self.step,
            "epoch": self.step / len(self.steps) * self.config.n_epochs,
            "train_loss": float(self._loss_sum / n_rows),
            "learning_rate": self._learning_rate(),
            "tokens_per_second": float(n_tok / seconds),
            "padding_share": float(1 - n_tok / n_padded),
            "peak_mib": measure_peak_mib(),
            "seconds": seconds,
            "n_tok": int(n_tok),
            "n_padded": int(n_padded),
        }

    def _start_progress(self) -> Progress:
        title = self.member.name.replace("_", " ")
        print(
            f"{title}: {self.device}, {str(self.dtype).removeprefix('torch.')} "
            f"({self._dtype_reason}), {'packed' if self.is_packed else 'padded'} batches of at "
            f"most {self.config.tokens_per_batch:,} tokens, {self.batches_per_step} per step, "
            f"{self.last_step:,} steps"
        )
        folder = self.run_dir / "tensorboard" / self.member.name
        labels = self.heldout["label"].to_numpy()
        return Progress(title, folder, self.step, self.last_step, labels)

    @processes.on_first
    def _save(self) -> None:
        state = {
            "weights": [weight.detach() for weight in self.weights],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "made_by": self._made_by,
            "step": self.step,
            "history": self.history,
        }
        parent = self.run_dir / "checkpoints" / self.member.name
        with atomic_folder(parent / f"checkpoint-{self.step}") as folder:
            torch.save(state, folder / "state.pt")
            write_manifest(folder)
        for old in list_checkpoints(parent)[N_CHECKPOINTS:]:
            shutil.rmtree(old)
        if len(self.heldout):
            table = pd.DataFrame(self.earlier + self.history, columns=list(HISTORY_COLUMNS))
            write_table(self.run_dir / "history.csv", table)

    def _load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        if state["made_by"] != self._made_by:
            raise ValueError(
                f"{checkpoint}: made by {state['made_by']}, got {self._made_by}; resume with the "
                f"former, or remove {checkpoint.parent} to start again"
            )
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = folder.glob("checkpoint-*")
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW over the trained weights, with 32- or 8-bit state; norms and biases do not decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1]},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):  # keeps 32-bit state, as bitsandbytes advises
            manager = GlobalOptimManager.get_instance()
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW8bit(groups, **options)
