"""Show and log how training goes: lines or a bar of progress, TensorBoard, memory."""

import io
import sys
import threading
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LINE_S = 30.0  # from one line of progress to the next, where there is no bar
# Column of the history -> its name in TensorBoard; what is not named here is a cost.
_TAGS = {
    "train_loss": "loss/train",
    "log_loss": "loss/held_out",
    "train_accuracy": "accuracy/train",
    "accuracy": "accuracy/held_out",
}
_LINE = "{desc}: {n_fmt} of {total_fmt} steps, {elapsed} elapsed, {remaining} left{postfix}"


class Progress:
    """Shows and logs the training of one model.

    Steps, time left, losses and throughput are a bar in a terminal or a notebook; elsewhere a new
    line every `LINE_S` seconds, also during a validation. Each row of the history is written as
    events for `tensorboard --logdir FOLDER`.

    `step` of `n_steps` are taken already; what a killed run logged after them becomes void.
    """

    def __init__(self, title: str, folder: Path, step: int, n_steps: int) -> None:
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

    def show_row(self, row: dict) -> None:
        """Log a row of `FoldTrainer.history`, and show it if it is of a validation."""
        if "log_loss" in row:
            self._held_out = f"held out {row['log_loss']:.4f}, "
        self.show_step(row)
        if "log_loss" in row:
            self._bar.refresh()
            if not self._has_bar:
                print(self._bar, flush=True)
        for name in sorted(row.keys() - {"fold", "seed", "step"}):
            self._writer.add_scalar(_TAGS.get(name, f"cost/{name}"), row[name], row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the bar and the event file."""
        self._closed.set()
        self._bar.close()
        self._writer.close()


def measure_memory() -> dict[str, float]:
    """Measure memory, MiB: most that was used and reserved on the GPU, else what is resident."""
    if torch.cuda.is_available():
        used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory_mib": used / 2**20, "reserved_mib": reserved / 2**20}
    return {"memory_mib": psutil.Process().memory_info().rss / 2**20}


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")
