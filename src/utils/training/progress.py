"""Show and log how training goes: progress, TensorBoard, and a live learning curve."""

import io
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src.utils.stats.model_plots import plot_learning_curve
from src.utils.stats.scores import class_prior, log_loss

LINE_S = 30.0  # from one line of progress to the next, where there is no bar
_LINE = "{desc}: {n_fmt} of {total_fmt} steps, {elapsed} elapsed, {remaining} left{postfix}"


class Progress:
    """Shows and logs the training of one model.

    Steps, time left, losses and throughput are a bar in a terminal or a notebook; elsewhere a new
    line every `LINE_S` seconds, also during a validation. Each validation is written as an event
    for `tensorboard --logdir FOLDER`, and a notebook shows the learning curve, redrawn.

    `step` of `n_steps` are taken already; what a killed run logged after them becomes void.
    `labels` are the held-out votes, (N,) int; without any there is no curve.
    """

    def __init__(
        self, title: str, folder: Path, step: int, n_steps: int, labels: np.ndarray
    ) -> None:
        self.title, self.labels = title, labels
        self._has_bar = sys.stdout.isatty() or is_notebook()
        self._bar = tqdm(
            desc=title,
            total=n_steps,
            initial=step,
            mininterval=2,
            file=sys.stdout if self._has_bar else io.StringIO(),
            bar_format=None if self._has_bar else _LINE,
        )
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._is_drawn = False
        self._held_out = ""
        self._closed = threading.Event()
        if not self._has_bar:
            threading.Thread(target=self._print_lines, daemon=True).start()

    def _print_lines(self) -> None:
        while not self._closed.wait(LINE_S):
            print(self._bar, flush=True)

    def show_step(self, row: dict) -> None:
        """Show a row of `FoldTrainer.describe_interval`."""
        self._bar.set_postfix_str(
            f"train {row['train_loss']:.4f}, {self._held_out}"
            f"{row['tokens_per_second'] / 1000:.1f}k tok/s, "
            f"{100 * row['padding_share']:.0f} % padding, {row['peak_mib']:.0f} MiB",
            refresh=False,
        )
        self._bar.update(row["step"] - self._bar.n)

    def show_validation(self, history: list[dict]) -> None:
        """Show and log the last row of `FoldTrainer.history`, and draw all."""
        row = history[-1]
        if "log_loss" in row:
            self._held_out = f"held out {row['log_loss']:.4f}, "
        self.show_step(row)
        self._bar.refresh()
        if not self._has_bar:
            print(self._bar, flush=True)
        for name in sorted(row.keys() - {"fold", "seed", "step"}):
            shown = "held_out" if name == "log_loss" else name
            self._writer.add_scalar(shown, row[name], row["step"])
        self._writer.flush()
        if is_notebook() and len(self.labels):
            self._draw(pd.DataFrame(history))

    def _draw(self, history: pd.DataFrame) -> None:
        from IPython.display import Image, display

        prior = log_loss(np.tile(class_prior(self.labels), (len(self.labels), 1)), self.labels)
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        ax = plot_learning_curve(figure.subplots(), history, prior)
        ax.set_xlabel(f"epochs; {self.title} is at {history['epoch'].iloc[-1]:.2f}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        display(Image(buffer.getvalue()), display_id=str(id(self)), update=self._is_drawn)
        self._is_drawn = True

    def close(self) -> None:
        """Close the bar and the event file."""
        self._closed.set()
        self._bar.close()
        self._writer.close()


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")
