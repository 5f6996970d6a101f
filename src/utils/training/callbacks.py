"""What happens beside the steps of training: when to validate and stop, and what is shown meanwhile."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback

from src.utils.stats.plots import plot_learning_curve
from src.utils.training.processes import rank

_SHOWN = {"log_loss": "held_out"}  # names in TensorBoard where they differ


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the best loss lies `patience` validations back or more; never with a patience of 0.

    Example:
        [1.0, 0.9, 0.91, 0.95], 2 -> True
    """
    return bool(patience and losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


class ValidateAt(TrainerCallback):
    """Validate, then checkpoint, after the given steps; stop after the last, or when validations grow no better.

    Args:
        steps: of the optimizer, from 1.
        patience: validations without a better loss before training stops; 0 goes to the end.
    """

    def __init__(self, steps: set[int], patience: int) -> None:
        self.steps, self.patience = steps, patience

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for both at a step of the list."""
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True
        if state.global_step >= max(self.steps):
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, **kwargs):
        """Stop where the losses so far say so; they are in the checkpoint, so that a resumed run knows them."""
        if has_stalled(
            [row["log_loss"] for row in state.log_history if "log_loss" in row], self.patience
        ):
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        """Forget what was asked for at the last step: it has been done, and would be done again here."""
        control.should_evaluate = control.should_save = False
        return control


class Progress(TrainerCallback):
    """One bar a model: steps done, time left, throughput, memory, the last losses.

    Args:
        title: stands before the bar.
        start: a line that is printed first.
        measure_pace: gives tokens_per_second, padding_share and peak_mib as they are now.
    """

    def __init__(
        self, title: str, start: str, measure_pace: Callable[[], dict[str, float]]
    ) -> None:
        self.title, self.start, self.measure_pace, self.losses = title, start, measure_pace, ""

    def on_train_begin(self, args, state, control, **kwargs):
        """Say what is done, and open the bar where a resumed run stands."""
        if rank() == 0:
            print(self.start)
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
        self.bar.set_postfix_str(self.losses + describe_pace(self.measure_pace()), refresh=False)
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the last validation."""
        if is_interval(logs):
            held_out = f"held out {logs['log_loss']:.4f}, " if "log_loss" in logs else ""
            self.losses = f"train {logs['train_loss']:.4f}, {held_out}"
            self.bar.set_postfix_str(self.losses + describe_pace(logs))

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.bar.close()


def describe_pace(pace: dict[str, float]) -> str:
    """Say how fast training goes.

    Example:
        {"tokens_per_second": 12345, "padding_share": 0.041, "peak_mib": 800} -> "12.3k tok/s, 4 % padding, 800 MiB"
    """
    n_tok, padding = pace["tokens_per_second"] / 1000, 100 * pace["padding_share"]
    return f"{n_tok:.1f}k tok/s, {padding:.0f} % padding, {pace['peak_mib']:.0f} MiB"


def is_interval(logs: dict[str, float] | None) -> bool:
    """Tell what `FoldTrainer.evaluate` logs from what transformers does."""
    return bool(logs) and "padding_share" in logs


class TensorBoard(TrainerCallback):
    """Writes event files: `tensorboard --logdir FOLDER` draws them.

    transformers' own callback would begin anew in another file what a killed run logged.

    Args:
        folder: gets the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the file; what a killed run logged after its last checkpoint is void."""
        if rank() == 0:
            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add a point to each curve."""
        if rank() == 0 and is_interval(logs):
            for name, value in logs.items():
                self.writer.add_scalar(_SHOWN.get(name, name), value, state.global_step)
            self.writer.flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Close the file."""
        if rank() == 0:
            self.writer.close()


class LiveCurve(TrainerCallback):
    """The learning curve under a notebook's cell, drawn anew at each validation; nothing outside a notebook.

    Args:
        title: of the figure, e.g. "fold 0".
        prior: log loss of the class shares, nats per battle.
        n_epochs: that all steps make.
    """

    def __init__(self, title: str, prior: float, n_epochs: float) -> None:
        self.title, self.prior, self.n_epochs, self.handle = title, prior, n_epochs, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Draw what is known by now in place of the figure before."""
        if not (is_notebook() and is_interval(logs) and "log_loss" in logs):
            return
        from IPython.display import Image, display

        image = Image(self._draw(state))
        if self.handle is None:
            self.handle = display(image, display_id=True)
        else:
            self.handle.update(image)

    def _draw(self, state) -> bytes:
        history = pd.DataFrame([row for row in state.log_history if is_interval(row)])
        history["epoch"] = history["step"] / state.max_steps * self.n_epochs
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        ax = plot_learning_curve(figure.subplots(), history.assign(fold=0, seed=0), self.prior)
        ax.set_title(
            f"{self.title}, epoch {history['epoch'].iloc[-1]:.2f} of {self.n_epochs:g}", loc="right"
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook, the first of its world."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel") and rank() == 0
