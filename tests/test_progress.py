import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from src.utils.training import progress
from src.utils.training.progress import Progress


def row(step, loss=1.0):
    return {
        "step": step,
        "epoch": step / 4,
        "fold": 0,
        "seed": 0,
        "log_loss": loss,
        "train_loss": loss + 0.1,
        "tokens_per_second": 12_345.0,
        "padding_share": 0.041,
        "peak_mib": 800.4,
    }


@pytest.fixture
def start(tmp_path):
    """A function: start the progress of eight steps."""
    started = []

    def make(labels=(0, 1, 2)):
        started.append(Progress("fold 0", tmp_path, 2, 8, np.array(labels)))
        return started[-1]

    yield make
    for one in started:
        one.close()


def test_without_a_terminal_a_line_has_steps_losses_pace_and_time_left(start, capsys):
    shown = start()
    shown.show_step(row(3))
    shown.show_validation([row(4, 0.9876)])
    *_, line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"fold 0: 4 of 8 steps, \d+:\d+ elapsed, \d+:\d+ left, train 1\.0876, held out 0\.9876, "
        r"12\.3k tok/s, 4 % padding, 800 MiB",
        line,
    )


def test_without_a_terminal_lines_keep_coming_while_no_step_ends(start, capsys, monkeypatch):
    assert progress.LINE_S <= 60
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    shown = start()
    shown.show_step(row(3))
    time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all(line.startswith("fold 0: 3 of 8 steps") for line in lines)
    shown.close()
    time.sleep(0.2)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_bar(start, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = start()
    shown.show_validation([row(4)])
    shown.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and re.search(r"\rfold 0: +50%.*4/8 .*held out 1\.0000", out)


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook displays: (display id, whether it replaces one, bytes)."""
    import IPython.display

    seen = []
    monkeypatch.setattr(
        IPython.display,
        "display",
        lambda image, display_id, update: seen.append((display_id, update, image.data)),
    )
    return seen


def be_in_notebook(monkeypatch):
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)


def test_a_notebook_has_one_figure_that_is_redrawn(start, displayed, monkeypatch):
    be_in_notebook(monkeypatch)
    shown = start()
    for n_rows in (1, 2, 3):
        shown.show_validation([row(step, 1.1 - step / 10) for step in range(1, n_rows + 1)])
    ids, updates, images = zip(*displayed, strict=True)
    assert len(set(ids)) == 1 and updates == (False, True, True)
    assert all(image.startswith(b"\x89PNG") for image in images) and len(set(images)) == 3


def test_nothing_is_drawn_outside_a_notebook_or_without_held_out_battles(
    start, displayed, monkeypatch
):
    start().show_validation([row(1)])
    be_in_notebook(monkeypatch)
    start(labels=()).show_validation([row(1)])
    assert not displayed
