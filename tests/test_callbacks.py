import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from src.utils.training import callbacks
from src.utils.training.callbacks import LiveCurve, ValidateAt, describe_pace, has_stalled


def row(step, loss):
    return {"step": step, "log_loss": loss, "train_loss": loss, "padding_share": 0.0}


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 1, False),
        ([1.0, 0.9, 0.95], 2, False),
        ([1.0, 0.9, 0.95, 0.9], 2, True),
        ([1.0, 0.9, 0.95, 0.89], 2, False),
        ([1.0, 2.0, 3.0], 0, False),
    ],
)
def test_training_stalls_when_the_best_loss_lies_patience_validations_back(
    losses, patience, expected
):
    assert has_stalled(losses, patience) is expected


def test_training_stops_at_the_last_step_of_the_list():
    callback, control = ValidateAt({3, 6}, patience=0), TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=3), control)
    assert control.should_evaluate and control.should_save and not control.should_training_stop
    callback.on_step_end(None, TrainerState(global_step=6), control)
    assert control.should_training_stop


def test_a_pace_is_said_in_words():
    pace = {"tokens_per_second": 12345, "padding_share": 0.041, "peak_mib": 800.4}
    assert describe_pace(pace) == "12.3k tok/s, 4 % padding, 800 MiB"


@pytest.fixture
def shown(monkeypatch):
    """What a notebook displays: (action, display id, bytes)."""
    import IPython.display

    seen = []

    class Handle:
        def update(self, image):
            seen.append(("update", image.data))

    def display(image, display_id):
        seen.append(("display", image.data))
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    return seen


def draw(n_validations):
    curve = LiveCurve("fold 0", prior=1.09, n_epochs=2.0)
    state = TrainerState(max_steps=8)
    for step in range(1, n_validations + 1):
        state.log_history.append(row(step, 1.1 - step / 10))
        curve.on_log(None, state, None, logs=state.log_history[-1])
        curve.on_log(None, state, None, logs={"train_runtime": 3.0})


def test_a_notebook_has_one_figure_that_is_drawn_anew(shown, monkeypatch):
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace(kernel=None))
    draw(3)
    assert [action for action, _ in shown] == ["display", "update", "update"]
    assert (
        all(data.startswith(b"\x89PNG") for _, data in shown)
        and len({data for _, data in shown}) == 3
    )


def test_nothing_is_drawn_outside_a_notebook(shown, monkeypatch):
    draw(2)
    monkeypatch.setattr(
        sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace()
    )  # a terminal
    draw(2)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace(kernel=None))
    monkeypatch.setattr(callbacks, "rank", lambda: 1)
    draw(2)
    assert not shown
