"""Train a classifier fold by fold, so that it can be killed at any moment and goes on where it was.

Built on the Trainer of transformers, with four things of our own: batches under a
token budget, a loss that does not depend on how rows fall into batches, validation
through `predict.predict_probs`, and the whole schedule of batches known before
the first step, which makes resuming exact.
"""

import gc
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from src.utils.artifacts import hash_file, hash_json, hash_pairs, read_json, write_json, write_table
from src.utils.batches import collate, encode_both_orders, make_batches
from src.utils.config import FinetuneConfig
from src.utils.metrics import log_loss
from src.utils.mirror import swap_probs
from src.utils.models import (
    atomic_folder,
    choose_device,
    choose_dtype,
    load_classifier,
    quiet_transformers,
    write_model,
)
from src.utils.predict import predict_probs
from src.utils.schema import FROZEN_COLUMNS, LABELS, check_pairs, check_probs, probs_of, probs_table
from src.utils.text import TEMPLATE_VERSION

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


@dataclass(frozen=True)
class FitResult:
    """What training left behind.

    Attributes:
        oof: id, fold, one float32 column per label: every battle of the folds in
            `config.folds`, predicted by the model that did not see its fold.
        history: one row a validation, columns `HISTORY_COLUMNS`; losses in nats per battle,
            `train_loss` over the steps since the row before.
        n_train_pairs: battles trained on, mean over folds.
        n_parameters: weights that were trained.
        seconds: of training, validation aside, all folds.
        tokens_per_second: real tokens (no padding) of training.
        padding_share: share of the tokens of training that were padding.
    """

    oof: pd.DataFrame
    history: pd.DataFrame
    n_train_pairs: int
    n_parameters: int
    seconds: float
    tokens_per_second: float
    padding_share: float


def fit(pairs: pd.DataFrame, config: FinetuneConfig, run_dir: Path, base: Path | None = None) -> FitResult:
    """Train one model per held-out fold and predict that fold.

    The best weights of fold k, by log loss on it, lie in `run_dir / "model" / "fold_k"`.
    Each epoch reads every battle once, in an order drawn at random; the next epoch
    reads it in the other order. A fold that was finished, or begun, with the same
    settings and battles is taken up again; anything else found there is removed.

    Args:
        pairs: battles with label, group and fold.
        config: settings; `config.folds` are held out one after the other.
        run_dir: gets `model/` and `checkpoints/`.
        base: folder of the base, in place of what `config.checkpoint` names.

    Returns:
        Held-out probabilities and how training went.

    Raises:
        ValueError: a fold of the config is empty or is all there is.
        FloatingPointError: validation gave logits that are not finite.
    """
    check_pairs(pairs, FROZEN_COLUMNS)
    key = _make_key(pairs, config)
    _remove_stale(run_dir, key, config.folds)
    folds = [_fit_fold(pairs, fold, config, run_dir, base, key) for fold in config.folds]
    oof = pd.concat([pd.read_parquet(_model_dir(run_dir, fold) / "oof.parquet") for fold in config.folds])
    history = pd.DataFrame([row for done in folds for row in done["history"]], columns=list(HISTORY_COLUMNS))
    seconds, n_tok, n_padded = (sum(done[name] for done in folds) for name in ("seconds", "n_tok", "n_padded"))
    return FitResult(
        oof=oof.reset_index(drop=True),
        history=history,
        n_train_pairs=round(np.mean([done["n_train_pairs"] for done in folds])),
        n_parameters=folds[0]["n_parameters"],
        seconds=seconds,
        tokens_per_second=n_tok / max(seconds, 1e-9),
        padding_share=1 - n_tok / n_padded,
    )


# ---- what lies where ---------------------------------------------------------


def _model_dir(run_dir: Path, fold: int) -> Path:
    return run_dir / "model" / f"fold_{fold}"


def _checkpoint_dir(run_dir: Path, fold: int) -> Path:
    return run_dir / "checkpoints" / f"fold_{fold}"


def _make_key(pairs: pd.DataFrame, config: FinetuneConfig) -> str:
    settings = {name: value for name, value in config.to_json().items() if name != "folds"}
    soft = [hash_file(Path(config.soft_labels).expanduser())] if config.soft_labels else []
    return hash_json([settings, hash_pairs(pairs), TEMPLATE_VERSION, *soft])


def _remove_stale(run_dir: Path, key: str, folds: tuple[int, ...]) -> None:
    # Whoever predicts with this run takes every model that lies here.
    kept = {f"fold_{fold}" for fold in folds if _has_key(_checkpoint_dir(run_dir, fold), key)}
    for kind in ("model", "checkpoints"):
        for folder in (run_dir / kind).glob("fold_*"):
            if folder.name not in kept:
                shutil.rmtree(folder)


def _has_key(folder: Path, key: str) -> bool:
    return (folder / "key.json").exists() and read_json(folder / "key.json") == key


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    # The state is the last file that the Trainer writes, and names the step that it is of.
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / "trainer_state.json")["global_step"] == int(checkpoint.name.split("-")[1])
    except (OSError, ValueError, KeyError):
        return False


# ---- one fold ----------------------------------------------------------------


def _fit_fold(
    pairs: pd.DataFrame, fold: int, config: FinetuneConfig, run_dir: Path, base: Path | None, key: str
) -> dict[str, object]:
    folder = _checkpoint_dir(run_dir, fold)
    if (folder / "done.json").exists() and (_model_dir(run_dir, fold) / "oof.parquet").exists():
        return read_json(folder / "done.json")
    train_pairs, heldout = _split(pairs, fold, config)
    write_json(folder / "key.json", key)
    model, tokenizer = load_classifier(config, base)
    _check_length(model, config)
    trainer = _FoldTrainer(model, tokenizer, train_pairs, heldout, fold, config, run_dir)
    checkpoint = _last_whole_checkpoint(folder)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    done = trainer.describe() | {"n_train_pairs": len(train_pairs)}
    write_json(folder / "done.json", done)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return done


def _split(pairs: pd.DataFrame, fold: int, config: FinetuneConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    is_heldout = (pairs["fold"] == fold).to_numpy()
    if is_heldout.all() or not is_heldout.any():
        raise ValueError(
            f"folds: expected fold {fold} to hold some of the {len(pairs)} battles and not all, "
            f"got {int(is_heldout.sum())}; there are folds {sorted(pairs['fold'].unique().tolist())}"
        )
    train_pairs = pairs[~is_heldout]
    if config.max_pairs and len(train_pairs) > config.max_pairs:
        rng = np.random.default_rng(config.seed)
        train_pairs = train_pairs.iloc[np.sort(rng.choice(len(train_pairs), config.max_pairs, replace=False))]
    return train_pairs.reset_index(drop=True), pairs[is_heldout].reset_index(drop=True)


def _check_length(model: nn.Module, config: FinetuneConfig) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and config.max_tokens > limit:
        raise ValueError(
            f"max_tokens: expected at most {limit}, what {config.checkpoint} reads, got {config.max_tokens}"
        )


class _BothOrders(Dataset):
    """Every battle twice: item 2i is battle i as given, item 2i + 1 is its mirror."""

    def __init__(self, pairs: pd.DataFrame, tokenizer, config: FinetuneConfig) -> None:
        orders = encode_both_orders(pairs, tokenizer, config.max_tokens)
        # A Python int takes 36 bytes in a list, here 4.
        self.rows = [[np.array(row, dtype=np.int32) for row in rows] for rows in orders]
        targets = make_targets(pairs, config)
        self.targets = np.stack([targets, swap_probs(targets)])
        self.lengths = np.array([max(len(a), len(b)) for a, b in zip(*self.rows, strict=True)])

    def __len__(self) -> int:
        return 2 * len(self.lengths)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        row, order = divmod(int(item), 2)
        return self.rows[order][row], self.targets[order, row]


def make_targets(pairs: pd.DataFrame, config: FinetuneConfig) -> np.ndarray:
    """What the model is to say of each battle: the vote, mixed with soft labels where there are some.

    The teachers of soft labels were fitted to votes that are held out here, so what a
    student of theirs scores is faintly optimistic.

    Args:
        pairs: N battles with `id` and `label`.
        config: `soft_labels` and `soft_weight` are read.

    Returns:
        (N, C) float32, rows sum to 1.

    Raises:
        FileNotFoundError: no such file of soft labels.
        ValueError: it holds something else, or none of these battles.

    Source: distillation, Hinton et al. 2015, arXiv:1503.02531.
    """
    votes = np.eye(len(LABELS), dtype=np.float32)[pairs["label"].to_numpy(dtype=np.int64)]
    if not config.soft_labels:
        return votes
    soft = _read_soft_labels(Path(config.soft_labels).expanduser(), pairs["id"])
    known = np.isfinite(soft).all(axis=1, keepdims=True)
    weight = np.where(known, config.soft_weight, 0.0)
    return ((1 - weight) * votes + weight * np.where(known, soft, 0.0)).astype(np.float32)


def _read_soft_labels(path: Path, ids: pd.Series) -> np.ndarray:
    """(N, C) float64 in the order of the ids; NaN where a battle has none."""
    if not path.is_file():
        raise FileNotFoundError(f"soft_labels: {path} not found; 05 writes it with WRITE_SOFT_LABELS=True")
    table = pd.read_parquet(path)
    missing = [name for name in ("id", *LABELS) if name not in table.columns]
    if missing or table["id"].duplicated().any():
        raise ValueError(f"soft_labels: {path}: expected one row an id and columns {LABELS}, lacks {missing}")
    check_probs(probs_of(table))
    if not ids.isin(table["id"]).any():
        raise ValueError(f"soft_labels: {path}: expected some of the {len(ids)} training battles, found none")
    return table.set_index("id")[list(LABELS)].reindex(ids).to_numpy(dtype=np.float64)


def plan_batches(lengths: np.ndarray, config: FinetuneConfig) -> list[list[int]]:
    """Lay out every batch of a training run.

    Args:
        lengths: (N,) tokens of each battle.
        config: n_epochs, tokens_per_batch and seed are read.

    Returns:
        Items of each batch: 2i is battle i as given, 2i + 1 is its mirror. Every epoch has
        each battle once; epochs 2k and 2k + 1 have it in opposite orders. A fraction of
        an epoch takes that share of its batches.
    """
    plan: list[list[int]] = []
    for epoch in range(math.ceil(config.n_epochs)):
        orders = np.random.default_rng((config.seed, epoch // 2)).integers(0, 2, len(lengths)) ^ (epoch % 2)
        batches = make_batches(lengths, config.tokens_per_batch, config.seed, epoch)
        n_batches = math.ceil(min(1.0, config.n_epochs - epoch) * len(batches))
        plan += [(2 * rows + orders[rows]).tolist() for rows in batches[:n_batches]]
    return plan


class _FoldTrainer(Trainer):
    """The Trainer of one fold."""

    loss_is_scaled_for_ga = False  # `compute_loss` gives the loss of one batch

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        train_pairs: pd.DataFrame,
        heldout: pd.DataFrame,
        fold: int,
        config: FinetuneConfig,
        run_dir: Path,
    ) -> None:
        self.fold, self.config, self.heldout = fold, config, heldout
        self.model_dir = _model_dir(run_dir, fold)
        items = _BothOrders(train_pairs, tokenizer, config)
        self.plan = plan_batches(items.lengths, config)
        lengths = [items.lengths[np.array(batch) // 2] for batch in self.plan]
        self.n_tok = np.cumsum([row_lengths.sum() for row_lengths in lengths])
        self.n_padded = np.cumsum([len(row_lengths) * row_lengths.max() for row_lengths in lengths])
        self.n_rows = np.cumsum([len(row_lengths) for row_lengths in lengths])
        self.n_steps = math.ceil(len(self.plan) / config.batches_per_step)
        super().__init__(
            model,
            _training_arguments(config, self.n_steps, _checkpoint_dir(run_dir, fold)),
            train_dataset=items,
            processing_class=tokenizer,
            callbacks=[_ValidateAt(_validation_steps(config, self.n_steps)), _Progress(f"fold {fold}")],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self._start_interval()

    def get_train_dataloader(self) -> DataLoader:
        """All batches of all epochs as one pass, which a resumed run enters at any batch."""
        return DataLoader(self.train_dataset, batch_sampler=self.plan, collate_fn=self._collate)

    def _collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        rows, targets = zip(*items, strict=True)
        return collate(rows, self.processing_class.pad_token_id) | {"labels": torch.from_numpy(np.stack(targets))}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the rows' cross entropies over the mean number of rows a batch.

        A mean over the rows of each batch would count a battle of a small batch (a long
        one) for more than a battle of a large batch.
        """
        inputs = dict(inputs)
        targets = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits.float(), targets, reduction="sum")
        self.loss_sum += loss.detach()
        loss = loss * (len(self.plan) / self.n_rows[-1])
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Predict the held-out fold as the submission does; keep the weights when they are the best so far."""
        row = self._describe_interval()
        probs = predict_probs(
            self.model,
            self.processing_class,
            self.heldout,
            max_tokens=self.config.max_tokens,
            tokens_per_batch=self.config.tokens_per_batch,
        )
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

    def _keep(self, probs: np.ndarray) -> None:
        # Weights and the predictions made with them replace the old ones in one step.
        with atomic_folder(self.model_dir) as folder:
            write_model(self.accelerator.unwrap_model(self.model), self.processing_class, folder)
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
            "train_loss": self.loss_sum.item() / n_rows,
            "learning_rate": self._get_learning_rate(),
            "seconds": seconds,
            "tokens_per_second": n_tok / seconds,
            "padding_share": 1 - n_tok / n_padded,
        }

    def _batches_at(self, step: int) -> int:
        return min(step * self.config.batches_per_step, len(self.plan))

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
        gradient_accumulation_steps=config.batches_per_step,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_share * n_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
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
