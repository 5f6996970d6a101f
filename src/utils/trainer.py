"""The Trainer of one fold: transformers' own, with four things of ours.

Batches under a token budget, a loss that does not depend on how rows fall into
batches, validation through `predict.predict_probs`, and the whole schedule of
batches known before the first step, which makes resuming exact.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from src.utils.artifacts import write_table
from src.utils.batches import collate
from src.utils.config import FinetuneConfig
from src.utils.examples import Examples, plan_batches
from src.utils.hardware import choose_device, choose_dtype
from src.utils.losses import order_divergence
from src.utils.metrics import log_loss
from src.utils.models import atomic_folder, write_model
from src.utils.predict import LocalReader, SteadyReader, predict_pairs
from src.utils.ranks import (
    RankedTrainer,
    TeamReader,
    deal,
    is_sharded,
    on_first,
    raise_to_world,
    rank,
    sum_over_ranks,
    whole_weights,
    world_size,
)
from src.utils.schema import probs_table

MAX_GRAD_NORM = 1.0
HISTORY_COLUMNS = (
    "fold",
    "step",
    "epoch",
    "train_loss",
    "log_loss",
    "learning_rate",
    "tokens_per_second",
    "padding_share",
)


class FoldTrainer(RankedTrainer):
    """The Trainer of one fold.

    Args:
        model: and `tokenizer`: from `models.load_classifier`.
        train_pairs: battles to learn from.
        heldout: battles to validate on.
        fold: number of the fold, for messages and tables.
        config: settings.
        model_dir: gets the best weights so far, and what they say of `heldout`.
        checkpoint_dir: gets the Trainer's checkpoints.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` gives the loss of one batch

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        train_pairs: pd.DataFrame,
        heldout: pd.DataFrame,
        fold: int,
        config: FinetuneConfig,
        *,
        model_dir: Path,
        checkpoint_dir: Path,
    ) -> None:
        self.fold, self.config, self.heldout = fold, config, heldout
        self.model_dir = model_dir
        items = Examples(train_pairs, tokenizer, config)
        self.plan = plan_batches(items.lengths, config)
        lengths = [items.lengths[np.array(batch) // 2] for batch in self.plan]
        self.n_tok = np.cumsum([row_lengths.sum() for row_lengths in lengths])
        self.n_padded = np.cumsum([len(row_lengths) * row_lengths.max() for row_lengths in lengths])
        self.n_rows = np.cumsum([len(row_lengths) for row_lengths in lengths])
        self.batches_per_step = raise_to_world(config.batches_per_step)
        self.n_steps = math.ceil(len(self.plan) / self.batches_per_step)
        super().__init__(
            model,
            _training_arguments(config, self.n_steps, checkpoint_dir),
            train_dataset=items,
            processing_class=tokenizer,
            callbacks=[_ValidateAt(_validation_steps(config, self.n_steps)), _Progress(f"fold {fold}")],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self._start_interval()

    def get_train_dataloader(self) -> DataLoader:
        """All batches of all epochs as one pass, which a resumed run enters at any batch."""
        batches = deal(self.plan, self.batches_per_step)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self._collate)

    def _collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        if not items:  # a pass must be made, but counts for nothing: it has no vote to be right about
            items = [(row, np.zeros_like(target)) for row, target in map(self.train_dataset.__getitem__, (0, 1))]
        rows, targets = zip(*items, strict=True)
        return collate(rows, self.processing_class.pad_token_id) | {"labels": torch.from_numpy(np.stack(targets))}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the rows' cross entropies (and divergences between orders) over the mean number of rows a batch.

        A mean over the rows of each batch would count a battle of a small batch (a long
        one) for more than a battle of a large batch.
        """
        inputs = dict(inputs)
        targets = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits.float(), targets, reduction="sum")
        self.loss_sum += loss.detach()
        if self.config.consistency:  # a battle's divergence counts for each of its two rows
            loss = loss + 2 * self.config.consistency * order_divergence(outputs.logits).sum()
        loss = loss * (len(self.plan) / self.n_rows[-1]) * self._share_of_step(targets)
        return (loss, outputs) if return_outputs else loss

    def _share_of_step(self, targets: torch.Tensor) -> float:
        """Makes the last step's mean over all places in it one over its batches: some places stand empty."""
        step = self.state.global_step
        n_batches = self._batches_at(step + 1) - self._batches_at(step)
        n_places = self.current_gradient_accumulation_steps * world_size() if world_size() > 1 else n_batches
        return n_places / n_batches * bool(targets.any()) if n_places > n_batches else 1.0

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Predict the held-out fold as the submission does; keep the weights when they are the best so far."""
        row = self._describe_interval()
        probs = predict_pairs(
            self._make_reader(),
            self.processing_class,
            self.heldout,
            max_tokens=self.config.predict_tokens,
            tokens_per_batch=self.config.tokens_per_batch,
        ).probs
        n_lost = int(np.isnan(probs).any(axis=1).sum())
        if n_lost:
            raise FloatingPointError(
                f"fold {self.fold}, step {self.state.global_step}: {n_lost} of {len(probs)} held-out battles have "
                f"logits that are not finite; lower learning_rate ({self.config.learning_rate})"
            )
        row["log_loss"] = log_loss(probs, self.heldout["label"].to_numpy())
        is_best = row["log_loss"] < min((past["log_loss"] for past in self._validations()), default=math.inf)
        self.log(row)
        if is_best:
            self._keep(probs)
        self._start_interval()
        return {"eval_log_loss": row["log_loss"]}

    def _make_reader(self) -> LocalReader | TeamReader:
        reader = (SteadyReader if is_sharded(self.model) else LocalReader)(
            self.model, self.processing_class.pad_token_id
        )
        return TeamReader(reader.read) if world_size() > 1 else reader

    def _keep(self, probs: np.ndarray) -> None:
        self._write(probs, whole_weights(self.model))

    @on_first
    def _write(self, probs: np.ndarray, weights: dict[str, torch.Tensor] | None) -> None:
        # Weights and the predictions made with them replace the old ones in one step.
        with atomic_folder(self.model_dir) as folder:
            write_model(self.accelerator.unwrap_model(self.model), self.processing_class, folder, weights)
            write_table(folder / "oof.parquet", probs_table(self.heldout["id"], probs, fold=self.fold))

    def _start_interval(self) -> None:
        self.loss_sum = torch.zeros((), device=self.args.device)
        self.interval_start = time.perf_counter()

    def _describe_interval(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.interval_start
        last_step = max((past["step"] for past in self._validations()), default=0)
        start, end = self._batches_at(last_step), self._batches_at(self.state.global_step)
        n_tok, n_padded, n_rows = (_between(a, start, end) for a in (self.n_tok, self.n_padded, self.n_rows))
        return {
            "train_loss": sum_over_ranks(self.loss_sum).item() / n_rows,
            "learning_rate": self._get_learning_rate(),
            "seconds": seconds,
            "tokens_per_second": n_tok / seconds,
            "padding_share": 1 - n_tok / n_padded,
        }

    def _batches_at(self, step: int) -> int:
        return min(step * self.batches_per_step, len(self.plan))

    def _validations(self) -> list[dict[str, float]]:
        return [row for row in self.state.log_history if "log_loss" in row]

    def describe(self) -> dict[str, object]:
        """What `done.json` keeps of a finished fold."""
        rows = [
            row | {"fold": self.fold, "epoch": row["step"] / self.n_steps * self.config.n_epochs}
            for row in self._validations()
        ]
        return {
            "history": [{name: row[name] for name in HISTORY_COLUMNS} for row in rows],
            "seconds": sum(row["seconds"] for row in rows),
            "n_tok": int(self.n_tok[-1]),
            "n_padded": int(self.n_padded[-1]),
            "n_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }


def _between(cumulative: np.ndarray, start: int, end: int) -> float:
    return float(cumulative[end - 1] - (cumulative[start - 1] if start else 0))


def _training_arguments(config: FinetuneConfig, n_steps: int, folder: Path) -> TrainingArguments:
    device = choose_device()
    dtype = choose_dtype(device)
    on_gpu = device.type == "cuda"
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the plan holds all epochs
        gradient_accumulation_steps=raise_to_world(config.batches_per_step) // world_size(),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_share * n_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        eval_strategy="no",  # `_ValidateAt` says when
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )
    # Two GPUs in one process would mean DataParallel, which splits our batches again.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _validation_steps(config: FinetuneConfig, n_steps: int) -> set[int]:
    n_validations = min(max(1, round(config.n_evals * config.n_epochs)), n_steps)
    return {round(n_steps * place / n_validations) for place in range(1, n_validations + 1)}


class _ValidateAt(TrainerCallback):
    """Validate, then checkpoint, after the given steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for both at a step of the list."""
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        """Forget what was asked for at the last step: it has been done, and would be done again here."""
        control.should_evaluate = control.should_save = False
        return control


class _Progress(TrainerCallback):
    """One bar a fold: steps done, time left, the last log loss."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar where a resumed run stands."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            file=sys.stdout,
            mininterval=2,
            disable=rank() > 0,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Move on by one step."""
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the last validation."""
        if logs and "log_loss" in logs:
            self.bar.set_postfix_str(f"train {logs['train_loss']:.4f}, held out {logs['log_loss']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.bar.close()
