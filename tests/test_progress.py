import re
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.utils.runs import measure_peak_mib
from src.utils.training import progress
from src.utils.training.progress import Progress, measure_memory


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

    def make():
        started.append(Progress("fold 0", tmp_path, 2, 8))
        return started[-1]

    yield make
    for one in started:
        one.close()


def test_without_a_terminal_a_line_has_steps_losses_pace_and_time_left(start, capsys):
    shown = start()
    shown.show_step(row(3))
    shown.show_row(row(4, 0.9876))
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
    shown.show_row(row(4))
    shown.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and re.search(r"\rfold 0: +50%.*4/8 .*held out 1\.0000", out)


def test_rows_without_a_validation_are_logged_and_not_printed(start, capsys, tmp_path):
    shown = start()
    for step in (3, 4):
        shown.show_row({key: value for key, value in row(step).items() if key != "log_loss"})
    shown.show_row(row(5, 0.5))
    assert len(capsys.readouterr().out.splitlines()) == 1
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [point.step for point in events.Scalars("loss/train")] == [3, 4, 5]
    assert [point.value for point in events.Scalars("loss/held_out")] == [0.5]
    assert "cost/peak_mib" in events.Tags()["scalars"]


def test_memory_is_that_of_the_process_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = measure_memory().values()
    assert 50 < found <= measure_peak_mib() + 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**21)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**22)
    assert measure_memory() == {"memory_mib": 2, "reserved_mib": 4}
