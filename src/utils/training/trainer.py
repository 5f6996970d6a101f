"""The Trainer of one fold: transformers' own, with some things of ours.

Batches under a token budget, a loss that does not depend on how rows fall into
batches, validation through `predict.predict_probs`, and the whole schedule of
batches known before the first step, which makes resuming exact.
"""

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from src.utils.config import FinetuneConfig
from src.utils.models.batches import collate
from src.utils.models.checkpoints import hidden_size, write_model
from src.utils.models.hardware import choose_device, choose_precision
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.models.predict import LocalReader, Prediction, predict_pairs
from src.utils.runs import atomic_folder, measure_peak_mib, write_manifest, write_table
from src.utils.schema import probs_table
from src.utils.stats.scores import class_prior, log_loss
from src.utils.training.callbacks import (
    LiveCurve,
    Progress,
    TensorBoard,
    ValidateAt,
    has_stalled,
    is_interval,
)
from src.utils.training.data import Examples, plan_batches
from src.utils.training.processes import (
    TeamReader,
    deal,
    on_first,
    raise_to_world,
    sum_over_ranks,
    whole_weights,
    world_size,
)
from src.utils.training.splitting import SplittingTrainer

MAX_GRAD_NORM = 1.0
_OPTIMIZERS = {  # what transformers calls them
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
}
HISTORY_COLUMNS = (
    "fold",
    "seed",
    "step",
    "epoch",
    "train_loss",
    "log_loss",
    "swap_gap",
    "learning_rate",
    "tokens_per_second",
    "padding_share",
    "peak_mib",
)


class FoldTrainer(SplittingTrainer):
    """The Trainer of one fold, or of the refit, which holds none out.

    Args:
        model: and `tokenizer`: from `models.load_classifier`.
        train_pairs: battles to learn from.
        heldout: battles to validate on; where there is none, the last weights are kept.
        fold: number of the fold, for messages and tables; None of the refit.
        config: settings.
        model_dir: gets the best weights so far, and what they say of `heldout`.
        checkpoint_dir: gets the Trainer's checkpoints.
        log_dir: gets TensorBoard's event files; None writes none.
        stop_share: share of the steps after which to stop, above 0 to 1; the learning rate
            goes as if it were 1.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` gives the loss of one batch

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        train_pairs: pd.DataFrame,
        heldout: pd.DataFrame,
        fold: int | None,
        config: FinetuneConfig,
        *,
        model_dir: Path,
        checkpoint_dir: Path,
        log_dir: Path | None = None,
        stop_share: float = 1.0,
    ) -> None:
        self.fold, self.config, self.heldout = fold, config, heldout
        self.model_dir = model_dir
        items = Examples(train_pairs, tokenizer, config)
        self.is_packed = config.packing and can_pack(model)
        if self.is_packed:
            enable_packing(model)
        self.plan = plan_batches(items.lengths, config, self.is_packed)
        lengths = [items.lengths[np.array(batch) // 2] for batch in self.plan]
        self.n_tok = np.cumsum([row_lengths.sum() for row_lengths in lengths])
        n_padded = np.cumsum([len(row_lengths) * row_lengths.max() for row_lengths in lengths])
        self.n_padded = self.n_tok if self.is_packed else n_padded
        self.n_rows = np.cumsum([len(row_lengths) for row_lengths in lengths])
        self.batches_per_step = raise_to_world(config.batches_per_step)
        self.rows_together = 2 if config.both_orders else 1
        self.n_steps = math.ceil(len(self.plan) / self.batches_per_step)
        self.last_step = max(1, round(stop_share * self.n_steps))
        dtype, reason = choose_precision(choose_device(), hidden_size(model))
        self.start = self._describe_start(dtype, reason)
        super().__init__(
            model,
            _training_arguments(config, self.n_steps, checkpoint_dir, dtype),
            train_dataset=items,
            processing_class=tokenizer,
            callbacks=self._make_callbacks(log_dir),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self._start_interval()

    @property
    def _title(self) -> str:
        return "refit" if self.fold is None else f"fold {self.fold}"

    def _describe_start(self, dtype: torch.dtype, reason: str) -> str:
        config = self.config
        base = "" if config.quantization == "none" else f"{config.quantization} base, "
        batches = "packed" if self.is_packed else "padded"
        return (
            f"{self._title}: {choose_device()}, {str(dtype).removeprefix('torch.')} ({reason}), {base}"
            f"{batches} batches of at most {config.tokens_per_batch:,} tokens, {self.batches_per_step} a step, "
            f"{self.last_step:,} steps, {config.optimizer}"
        )

    def _make_callbacks(self, log_dir: Path | None) -> list[TrainerCallback]:
        config = self.config
        steps = {
            step for step in _validation_steps(config, self.n_steps) if step < self.last_step
        } | {self.last_step}
        callbacks = [
            ValidateAt(steps, config.patience),
            Progress(self._title, self.start, self._measure_pace),
        ]
        if log_dir:
            callbacks.append(TensorBoard(log_dir))
        if len(self.heldout):
            labels = self.heldout["label"].to_numpy()
            prior = log_loss(np.tile(class_prior(labels), (len(labels), 1)), labels)
            callbacks.append(LiveCurve(self._title, prior, config.n_epochs))
        return callbacks

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from the start, or from a checkpoint, to where training stops."""
        if checkpoint:
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not self._is_over():
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _is_over(self) -> bool:
        losses = [row["log_loss"] for row in self._validations()]
        return self.state.global_step >= self.last_step or has_stalled(losses, self.config.patience)

    def get_optimizer_cls_and_kwargs(self, args, model=None) -> tuple[type, dict[str, object]]:
        """That of transformers, told how fast each layer learns where they do not all learn alike."""
        optimizer, options = super().get_optimizer_cls_and_kwargs(args, model)
        return optimizer, options

    def get_train_dataloader(self) -> DataLoader:
        """All batches of all epochs as one pass, which a resumed run enters at any batch."""
        batches = deal(self.plan, self.batches_per_step)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self._collate)

    def _collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        if (
            not items
        ):  # a pass must be made, but counts for nothing: it has no vote to be right about
            items = [
                (row, np.zeros_like(target))
                for row, target in map(self.train_dataset.__getitem__, (0, 1))
            ]
        rows, targets = zip(*items, strict=True)
        batch = (
            collate_packed(rows)
            if self.is_packed
            else collate(rows, self.processing_class.pad_token_id)
        )
        return batch | {"labels": torch.from_numpy(np.stack(targets))}

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
        loss = loss * (len(self.plan) / self.n_rows[-1]) * self._share_of_step(targets)
        return (loss, outputs) if return_outputs else loss

    def _share_of_step(self, targets: torch.Tensor) -> float:
        """Makes the last step's mean over all places in it one over its batches: some places stand empty."""
        step = self.state.global_step
        n_batches = self._batches_at(step + 1) - self._batches_at(step)
        n_places = (
            self.current_gradient_accumulation_steps * world_size()
            if world_size() > 1
            else n_batches
        )
        return n_places / n_batches * bool(targets.any()) if n_places > n_batches else 1.0

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> dict[str, float]:
        """Predict the held-out fold as the submission does; keep the weights when they are the best so far."""
        row = self._describe_interval()
        if not len(self.heldout):
            self.log(row)
            if self.state.global_step == self.last_step:
                self._keep(None)
            self._start_interval()
            return {}
        prediction = self._predict_heldout()
        row["log_loss"] = log_loss(prediction.probs, self.heldout["label"].to_numpy())
        row["swap_gap"] = float(np.nanmean(prediction.swap_gap))
        is_best = row["log_loss"] < min(
            (past["log_loss"] for past in self._validations()), default=math.inf
        )
        self.log(row)
        if is_best:
            self._keep(prediction.probs)
        self._start_interval()
        return {"eval_log_loss": row["log_loss"]}

    def _predict_heldout(self) -> Prediction:
        prediction = predict_pairs(
            self._make_reader(),
            self.processing_class,
            self.heldout,
            max_tokens=self.config.predict_tokens,
            tokens_per_batch=self.config.tokens_per_batch,
        )
        n_lost = int(np.isnan(prediction.probs).any(axis=1).sum())
        if n_lost:
            raise FloatingPointError(
                f"fold {self.fold}, step {self.state.global_step}: {n_lost} of {len(self.heldout)} held-out battles "
                f"have logits that are not finite; lower learning_rate ({self.config.learning_rate})"
            )
        return prediction

    def _make_reader(self) -> LocalReader | TeamReader:
        reader = LocalReader(
            self.model, self.processing_class.pad_token_id, packing=self.config.packing
        )
        return TeamReader(reader.read) if world_size() > 1 else reader

    def _keep(self, probs: np.ndarray | None) -> None:
        self._write(probs, whole_weights(self.model))

    @on_first
    def _write(self, probs: np.ndarray | None, weights: dict[str, torch.Tensor] | None) -> None:
        # Weights and the predictions made with them replace the old ones in one step.
        with atomic_folder(self.model_dir) as folder:
            write_model(self.accelerator.unwrap_model(self.model), self.processing_class, folder)
            if probs is not None:
                write_table(
                    folder / "oof.parquet", probs_table(self.heldout["id"], probs, fold=self.fold)
                )

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        on_first(write_manifest)(
            Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        )

    def _start_interval(self) -> None:
        self.loss_sum = torch.zeros((), device=self.args.device)
        self.interval_start = time.perf_counter()

    def _describe_interval(self) -> dict[str, float]:
        n_rows = _between(self.n_rows, *self._interval())
        return {
            "train_loss": sum_over_ranks(self.loss_sum).item() / n_rows,
            "learning_rate": self._get_learning_rate(),
            "seconds": time.perf_counter() - self.interval_start,
            **self._measure_pace(),
        }

    def _measure_pace(self) -> dict[str, float]:
        n_tok, n_padded = (
            _between(counts, *self._interval()) for counts in (self.n_tok, self.n_padded)
        )
        return {
            "tokens_per_second": n_tok / (time.perf_counter() - self.interval_start),
            "padding_share": 1 - n_tok / n_padded,
            "peak_mib": measure_peak_mib(),
        }

    def _interval(self) -> tuple[int, int]:
        """Batches since the last validation: first, and the one after the last."""
        last_step = max((past["step"] for past in self._intervals()), default=0)
        return self._batches_at(last_step), self._batches_at(self.state.global_step)

    def _batches_at(self, step: int) -> int:
        return min(step * self.batches_per_step, len(self.plan))

    def _intervals(self) -> list[dict[str, float]]:
        return [row for row in self.state.log_history if is_interval(row)]

    def _validations(self) -> list[dict[str, float]]:
        return [row for row in self._intervals() if "log_loss" in row]

    def describe(self) -> dict[str, object]:
        """What `done.json` keeps of a finished fold."""
        names = {"fold": self.fold, "seed": self.config.seed}
        rows = [
            row | names | {"epoch": row["step"] / self.n_steps * self.config.n_epochs}
            for row in self._validations()
        ]
        last_batch = self._batches_at(self.state.global_step) - 1
        return {
            "history": [{name: row[name] for name in HISTORY_COLUMNS} for row in rows],
            "best_share": min(rows, key=lambda row: row["log_loss"])["step"] / self.n_steps
            if rows
            else None,
            "n_steps": self.state.global_step,
            "seconds": sum(row["seconds"] for row in self._intervals()),
            "n_tok": int(self.n_tok[last_batch]),
            "n_padded": int(self.n_padded[last_batch]),
            "n_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }


def _between(cumulative: np.ndarray, start: int, end: int) -> float:
    return float(cumulative[end - 1] - (cumulative[start - 1] if start else 0))


def _training_arguments(
    config: FinetuneConfig, n_steps: int, folder: Path, dtype: torch.dtype
) -> TrainingArguments:
    on_gpu = choose_device().type == "cuda"
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the plan holds all epochs
        gradient_accumulation_steps=raise_to_world(config.batches_per_step) // world_size(),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_share * n_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optim=_OPTIMIZERS[config.optimizer],
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        eval_strategy="no",  # `ValidateAt` says when
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
