"""Train the model of one fold: a training loop in plain PyTorch that resumes exactly.

The rows of every optimizer step are planned before the first one, so a checkpoint needs only the
number of the step to know what comes next. A step is read in passes as large as memory allows,
which changes no more than its rounding.
"""

import math
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from src.utils.config import FinetuneConfig, name_model
from src.utils.models.batches import collate
from src.utils.models.checkpoints import hidden_size, write_model
from src.utils.models.hardware import choose_device, choose_precision
from src.utils.models.packing import can_pack, collate_packed, enable_packing
from src.utils.models.reading import LocalReader
from src.utils.runs import atomic_folder, measure_peak_mib, write_json, write_manifest, write_table
from src.utils.schema import probs_table
from src.utils.stats.scores import log_loss
from src.utils.training import processes
from src.utils.training.data import Examples, count_hits, loss_of, plan_steps, split_step
from src.utils.training.earlier import RECORD
from src.utils.training.heldout import HeldOut, Member, predict_heldout, sample_groups
from src.utils.training.processes import rank, world_size
from src.utils.training.progress import Progress, measure_memory
from src.utils.training.schedule import Schedule
from src.utils.training.session import SessionOver

MAX_GRAD_NORM = 1.0
N_CHECKPOINTS = 2  # that are kept: should the newest be damaged, the one before it serves
# Rows without a validation have no log_loss and accuracy; without a GPU nothing is reserved.
HISTORY_COLUMNS = (
    *("fold", "seed", "step", "epoch", "minutes", "train_loss", "train_accuracy"),
    *("log_loss", "accuracy", "learning_rate", "tokens_per_second", "padding_share"),
    *("memory_mib", "reserved_mib", "peak_mib"),
)
N_LOGS = 40  # rows of the history, beside those of validations
CPU_TOKENS = 4096  # of one pass on a CPU: larger ones leave its cache and are slower
_MEMORY_SHARE = 0.95  # of a GPU's memory that a pass may take; the rest is lost to fragments
_CLOCK_STEPS = 10  # between two looks at the clock, for checkpoints and the deadline
_FILL = 0.97  # share of the time left that a shortened schedule fills


class FoldTrainer:
    """Trains one model, and predicts the held-out battles of its fold at the end.

    `run_dir` gets, at the end and at once, `model/NAME` with the last weights, the predictions of
    `heldout` and how training went; before that `checkpoints/NAME`, `tensorboard/NAME` and
    `history.csv` (whose earlier rows are `earlier`), with `N_LOGS` rows and one per validation. A
    validation reads a fixed sample of whole prompts, in one order. It chooses nothing: the schedule
    ends at a rate of zero, and the weights that it ends with are kept, so that a score is of
    battles that had no say.
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
        self.n_train_pairs = len(train_pairs)
        self.config = config = member.config
        self.device = choose_device()
        self.dtype, self._dtype_reason = choose_precision(self.device, hidden_size(model))
        self.is_packed = config.packing and can_pack(model)
        if self.is_packed:
            enable_packing(model)

        self.examples = Examples(train_pairs, tokenizer, config)
        self.steps = plan_steps(self.examples.lengths, config, self.is_packed)
        counts = np.zeros((len(self.steps) + 1, 2), dtype=np.int64)
        for number, items in enumerate(self.steps, start=1):
            counts[number] = len(items), self._lengths(items).sum()
        # Rows and tokens that are read before each step and in all.
        self._totals = np.cumsum(counts, axis=0)
        self._rows_per_step = self._totals[-1, 0] / len(self.steps)

        self.schedule = Schedule(len(self.steps), config.warmup_share)
        n_validations = min(max(1, round(config.n_evals * config.n_epochs)), len(self.steps))
        ends = np.linspace(0, len(self.steps), n_validations + 1)[1:-1].round()
        # The last step is followed by a prediction of the whole fold.
        self.validation_steps = set(ends.astype(int).tolist() if len(heldout) else [])
        logs = np.linspace(0, len(self.steps), min(N_LOGS, len(self.steps)) + 1)[1:-1].round()
        self.log_steps = set(logs.astype(int).tolist()) - self.validation_steps
        self.sample = sample_groups(heldout, config.eval_pairs)
        # One for all validations: it remembers what memory did not hold.
        self.reader = LocalReader(model, tokenizer.pad_token_id, packing=config.packing)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.tokens_per_batch = config.tokens_per_batch  # lower once memory has run out
        self.step = 0  # optimizer steps taken so far
        self.history: list[dict] = []  # `describe_interval`, with the scores of a validation
        # Since the last row of the history.
        self._loss_sum = 0.0  # of the rows
        self._n_hits = 0.0  # rows whose vote was the most probable
        self._n_padded = 0  # tokens with padding that this process read
        self._seconds = 0.0  # of steps

    def _lengths(self, items: Sequence[int]) -> np.ndarray:
        return self.examples.lengths[np.asarray(items, dtype=int) // 2]

    def train(
        self,
        checkpoint: Path | None = None,
        deadline: float = math.inf,
        session_end: float = math.inf,
    ) -> None:
        """Train to the end, from the start or from a checkpoint of the same settings.

        Both times are `time.monotonic()` values, s. Where the steps would end after `deadline`, the
        rest of the schedule is shortened, so that training and prediction end in time. At
        `session_end` the schedule stays as it is: SessionOver, with a checkpoint to go on from.
        """
        processes.copy_from_first(self.weights)
        if checkpoint:
            self._load(checkpoint)
        self._choose_tokens_per_batch()
        progress = None if rank() else self._start_progress()
        n_steps, seconds = 0, 0.0  # since this process began
        saved_at = time.monotonic()
        try:
            while self.step < self.schedule.last_step:
                started = time.perf_counter()
                self.take_step()
                seconds += time.perf_counter() - started
                n_steps += 1
                if progress:
                    progress.show_step(self.describe_interval())
                is_saved = self.step in self.validation_steps
                if is_saved:
                    self._validate(progress)
                elif self.step in self.log_steps:
                    self._close_interval(progress, None)
                if n_steps % _CLOCK_STEPS == 0:
                    pace = n_steps / seconds
                    is_saved |= self._watch_clock(saved_at, deadline, session_end, pace)
                saved_at = time.monotonic() if is_saved else saved_at
            self._finish(progress, session_end)
        finally:
            if progress:
                progress.close()

    def take_step(self) -> None:
        """Take one optimizer step; when memory runs out, repeat all of it in smaller passes."""
        started = time.perf_counter()
        self._choose_tokens_per_batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.schedule.rate(self.step)
        items = self.steps[self.step][rank() :: world_size()]
        # Random numbers follow from the step, which is all that a resumed run has to know.
        seed = np.random.SeedSequence((self.config.seed, self.step, rank())).generate_state(1)[0]
        self.model.train()
        while True:
            passes = self._split(items)
            torch.manual_seed(int(seed))
            try:
                sums = self._add_gradients(passes)
                break
            except torch.OutOfMemoryError as error:
                message = str(error)
            # Not in the except block: there the error still holds the failed pass's memory.
            self.optimizer.zero_grad()
            self._read_less(passes, message)
        processes.sum_gradients(self.weights, sums)
        self._loss_sum += sums[0].item()
        self._n_hits += sums[1].item()
        self._n_padded += sum(self._count_padded(each) for each in passes)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self._seconds += time.perf_counter() - started

    def _split(self, items: Sequence[int]) -> list[list[int]]:
        return split_step(items, self._lengths(items), self.tokens_per_batch, self.is_packed)

    def _count_padded(self, items: Sequence[int]) -> int:
        lengths = self._lengths(items)
        return int(lengths.sum() if self.is_packed else len(items) * lengths.max())

    def _add_gradients(self, passes: list[list[int]]) -> torch.Tensor:
        """Add the gradients of a step's passes; returns the sums of losses to report and hits."""
        # The mean loss of a step's own rows would give a battle in a small step (of long battles)
        # more weight than one in a large step: divide by the mean rows per step.
        is_mixed = self.dtype != torch.float32
        sums = torch.zeros(2, device=self.device)
        for items in passes:
            inputs, targets = self._collate(items)
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
                logits = self.model(**inputs).logits
            loss, reported = loss_of(logits.float(), targets, self.config)
            self.scaler.scale(loss / self._rows_per_step).backward()
            sums += torch.stack([reported.detach(), count_hits(logits.detach(), targets)])
        return sums

    def _collate(self, items: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, targets = zip(*(self.examples[item] for item in items), strict=True)
        pad_id = self.tokenizer.pad_token_id
        inputs = collate_packed(rows) if self.is_packed else collate(rows, pad_id)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return inputs, torch.from_numpy(np.stack(targets)).to(self.device)

    # ---- memory ----------------------------------------------------------------------

    def _choose_tokens_per_batch(self) -> None:
        """Choose how many tokens one pass reads, if nobody did: on a GPU what its memory holds."""
        if self.tokens_per_batch:
            return
        n_tok, longest = self.config.tokens_per_step, int(self.examples.lengths.max())
        if self.device.type == "cpu":
            n_tok = min(n_tok, CPU_TOKENS)
        else:
            while n_tok > longest and not self._fits(n_tok):
                n_tok //= 2
        self.tokens_per_batch = max(n_tok, longest)

    def _fits(self, n_tok: int) -> bool:
        """Try a pass of the longest rows, forward and backward; no weight changes."""
        order = np.argsort(-self.examples.lengths, kind="stable")
        n_rows = int(np.searchsorted(self.examples.lengths[order].cumsum(), n_tok, side="right"))
        # What a pass does not need, but a step does: both moments, and what processes exchange.
        n_trained = sum(weight.numel() for weight in self.weights)
        bytes_each = 8 + 4 * (world_size() > 1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        allowed = torch.cuda.get_per_process_memory_fraction() * total
        limit = _MEMORY_SHARE * min(allowed, free + torch.cuda.memory_reserved())
        self.model.train()
        try:
            self._add_gradients([(2 * order[: max(1, n_rows)]).tolist()])
            peak = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            peak = math.inf
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        return peak + bytes_each * n_trained <= limit

    def _read_less(self, passes: list[list[int]], message: str) -> None:
        largest = max(self._count_padded(each) for each in passes)
        if max(map(len, passes)) == 1:
            raise torch.OutOfMemoryError(
                f"step {self.step}: memory does not hold a single battle; lower max_tokens "
                f"({self.config.max_tokens}) or turn on gradient_checkpointing. {message}"
            )
        self.tokens_per_batch = largest // 2
        torch.cuda.empty_cache()  # does nothing without a GPU
        warnings.warn(
            f"step {self.step}: memory does not hold a pass of {largest:,} tokens; from now on "
            f"passes have at most {self.tokens_per_batch:,}, with the same result",
            stacklevel=3,
        )

    # ---- schedule --------------------------------------------------------------------

    def _watch_clock(
        self, saved_at: float, deadline: float, session_end: float, pace: float
    ) -> bool:
        """Shorten the schedule if need be, and save when it is time; `pace` is in steps per s."""

        def decide() -> tuple[bool, bool, int]:
            now = time.monotonic()
            is_over = now > session_end
            is_due = is_over or now - saved_at > 60 * self.config.save_minutes
            return is_over, is_due, self._plan_end(deadline - now, pace)

        is_over, is_due, last_step = processes.on_first(decide)()
        planned = self.schedule.last_step
        if last_step < planned:
            if not rank():
                where = f"{self.member.name}, step {self.step:,}"
                print(f"{where}: ends at step {last_step:,}, not {planned:,}, within TRAIN_HOURS")
            self.schedule.shorten(self.step, last_step)
        if is_due:
            self._save()
        if is_over:
            raise SessionOver
        return is_due

    def _plan_end(self, left_s: float, pace: float) -> int:
        """The last step for which there is time, with the predictions that are left to make."""
        n_validations = sum(step > self.step for step in self.validation_steps)
        n_rows = n_validations * len(self.sample) + 2 * len(self.heldout)
        # A pass without gradients takes a third of the time, or half of it without checkpointing.
        steps_to_predict = n_rows / self._rows_per_step / 2
        affordable = left_s * pace - steps_to_predict
        if self.step + affordable >= self.schedule.last_step:
            return self.schedule.last_step
        # A little time stays free, so that a slow step does not change the plan again.
        return self.step + max(0, math.floor(_FILL * affordable))

    # ---- validation ------------------------------------------------------------------

    def _validate(self, progress: Progress | None) -> None:
        """Score the sample in one order, and save."""
        prediction = predict_heldout(
            self.reader, self.tokenizer, self.sample, self.member, twice_share=0.0
        )
        self._close_interval(progress, prediction.first_probs)
        self._save()

    def _finish(self, progress: Progress | None, session_end: float) -> None:
        """Predict the whole fold, and write the model with how it was trained."""
        self._save()  # the prediction takes long, and may be killed
        prediction = None
        if len(self.heldout):
            prediction = predict_heldout(
                self.reader, self.tokenizer, self.heldout, self.member, session_end=session_end
            )
            is_sampled = self.heldout["id"].isin(self.sample["id"]).to_numpy()
            self._close_interval(progress, prediction.first_probs[is_sampled])
        else:
            self._close_interval(progress, None)
        self._write_model(prediction)

    def _close_interval(self, progress: Progress | None, probs: np.ndarray | None) -> None:
        """Add a row to the history: training since the last one, and the scores of the sample."""
        row = self.describe_interval()
        if probs is not None:
            labels = self.sample["label"].to_numpy()
            row["log_loss"] = log_loss(probs, labels)
            row["accuracy"] = float((probs.argmax(axis=1) == labels).mean())
        self.history.append(row)
        self._loss_sum, self._n_hits, self._n_padded, self._seconds = 0.0, 0.0, 0, 0.0
        if progress:
            progress.show_row(row)
        if len(self.heldout) and not rank():
            table = pd.DataFrame(self.earlier + self.history, columns=list(HISTORY_COLUMNS))
            write_table(self.run_dir / "history.csv", table)

    @processes.on_first
    def _write_model(self, prediction: HeldOut | None) -> None:
        record = {
            "identity": self.member.identity,
            "history": self.history,
            "n_parameters": sum(weight.numel() for weight in self.weights),
            "n_train_pairs": self.n_train_pairs,
            "steps": [self.schedule.last_step, len(self.steps)],  # taken, planned
            "tokens_per_batch": self.tokens_per_batch,
            "predict_tokens": self.config.predict_tokens,
            "swap_gap": prediction.swap_gap if prediction else None,
        }
        with atomic_folder(self.run_dir / "model" / self.member.name) as folder:
            write_model(self.model, self.tokenizer, folder)
            write_manifest(folder)  # without what follows, which a new prediction replaces
            if prediction:
                table = probs_table(self.heldout["id"], prediction.probs, fold=self.member.fold)
                write_table(folder / "oof.parquet", table)
            write_json(folder / RECORD, record)

    def describe_interval(self) -> dict:
        """Describe training since the last row: losses in nats, the next learning rate."""
        last_step = self.history[-1]["step"] if self.history else 0
        n_rows, n_tok = self._totals[self.step] - self._totals[last_step]
        n_padded = n_tok if self.is_packed else self._n_padded * world_size()
        seconds = max(self._seconds, 1e-9)
        before = sum(row["seconds"] for row in self.history)
        return {
            "fold": self.member.fold,
            "seed": self.config.seed,
            "step": self.step,
            "epoch": self.step / len(self.steps) * self.config.n_epochs,
            "minutes": (before + seconds) / 60,
            "train_loss": float(self._loss_sum / max(n_rows, 1)),
            "train_accuracy": float(self._n_hits / max(n_rows, 1)),
            "learning_rate": self.config.learning_rate * self.schedule.rate(self.step),
            "tokens_per_second": float(n_tok / seconds),
            "padding_share": float(1 - n_tok / max(n_padded, n_tok, 1)),
            **measure_memory(),
            "peak_mib": measure_peak_mib(),
            "seconds": seconds,
            "n_tok": int(n_tok),
            "n_padded": int(n_padded),
        }

    def _start_progress(self) -> Progress:
        model = name_model(self.config.checkpoint)
        title = f"{self.member.name.replace('_', ' ')}, {model}"
        print(
            f"{title}: {self.device}, {str(self.dtype).removeprefix('torch.')} "
            f"({self._dtype_reason}), {'packed' if self.is_packed else 'padded'} passes of at most "
            f"{self.tokens_per_batch:,} tokens, {self.config.tokens_per_step:,} per step, "
            f"{self.schedule.last_step:,} steps"
        )
        # TensorBoard calls a run by its folder.
        folder = self.run_dir / "tensorboard" / self.member.name / model
        return Progress(title, folder, self.step, self.schedule.last_step)

    @processes.on_first
    def _save(self) -> None:
        state = {
            "weights": [weight.detach() for weight in self.weights],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "packed": self.is_packed,  # depends on the version of transformers, and steps on it
            "tokens_per_batch": self.tokens_per_batch,
            "step": self.step,
            "schedule": self.schedule.state(),
            "interval": (self._loss_sum, self._n_padded, self._seconds),
            "n_hits": self._n_hits,
            "history": self.history,
        }
        parent = self.run_dir / "checkpoints" / self.member.name
        with atomic_folder(parent / f"checkpoint-{self.step}") as folder:
            torch.save(state, folder / "state.pt")
            write_manifest(folder)
        for old in list_checkpoints(parent)[N_CHECKPOINTS:]:
            shutil.rmtree(old)

    def _load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        if state["packed"] != self.is_packed:
            raise ValueError(
                f"{checkpoint}: expected steps with packed={self.is_packed}, as this version of "
                f"transformers makes them, got packed={state['packed']}; resume with the version "
                f"that it was begun with, or remove {checkpoint.parent} to start again"
            )
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.schedule.load(state["schedule"])
        self._loss_sum, self._n_padded, self._seconds = state["interval"]
        self._n_hits = state.get("n_hits", 0.0)
        self.history = state["history"]
        # The same passes make the same weights to the bit. A smaller one was found out to fit.
        self.tokens_per_batch = self.config.tokens_per_batch or state["tokens_per_batch"]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = folder.glob("checkpoint-*")
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW over the trained weights; norms and biases do not decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1]},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    return torch.optim.AdamW(groups, fused=True, **options)
