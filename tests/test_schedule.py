import numpy as np
import pytest

from src.utils.training.schedule import Schedule


def rates(schedule, first=0):
    return [schedule.rate(step) for step in range(first, schedule.last_step + 1)]


def test_a_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero():
    found = rates(Schedule(100, 0.1))
    np.testing.assert_allclose(found[:11], np.arange(11) / 10)
    cosine = (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(found[10:], cosine)
    assert rates(Schedule(3, 0.0))[0] == 1


@pytest.mark.parametrize("step", [5, 40])
def test_a_shortened_schedule_goes_on_from_its_rate_and_ends_at_zero(step):
    schedule, whole = Schedule(100, 0.1), Schedule(100, 0.1)
    schedule.shorten(step, 70)
    assert schedule.rate(step) == pytest.approx(whole.rate(step))
    found = rates(schedule, step)
    assert len(found) == 71 - step and found[-1] == pytest.approx(0)
    assert max(np.abs(np.diff(found[5:]))) < 0.04  # no jump
    schedule.shorten(60, 62)
    assert schedule.rate(60) == pytest.approx(found[60 - step])
    assert rates(schedule, 60)[-1] == pytest.approx(0)


def test_a_schedule_that_ends_at_once_has_a_rate():
    schedule = Schedule(100, 0.1)
    schedule.shorten(20, 20)
    assert 0 <= schedule.rate(20) <= 1


def test_a_loaded_schedule_goes_on_as_the_saved_one():
    schedule, other = Schedule(100, 0.1), Schedule(100, 0.1)
    schedule.shorten(30, 50)
    other.load(schedule.state())
    assert rates(other) == rates(schedule) and other.last_step == 50
