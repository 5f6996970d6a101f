"""The learning rate of every step: planned for all of them, shortened where time runs out."""

import math


class Schedule:
    """A linear warm-up, then half a cosine down to 0, over `n_steps` steps.

    A shortened schedule goes through the rest of the same curve in fewer steps.
    """

    def __init__(self, n_steps: int, warmup_share: float) -> None:
        self.n_steps = n_steps  # planned
        self.last_step = n_steps  # that will be taken
        self._n_warm = math.ceil(warmup_share * n_steps)
        self._shortened_at = 0  # the step when that was last done
        self._place = 0.0  # of that step, in planned steps

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0) as a share of its peak, 0 to 1."""
        place = self._find_place(step)
        if place < self._n_warm:
            return place / self._n_warm
        progress = (place - self._n_warm) / max(1, self.n_steps - self._n_warm)
        return (1 + math.cos(math.pi * progress)) / 2

    def shorten(self, step: int, last_step: int) -> None:
        """End at another step than planned; `step` are taken already."""
        self._place, self._shortened_at = self._find_place(step), step
        self.last_step = last_step

    def _find_place(self, step: int) -> float:
        n_taken, n_left = step - self._shortened_at, self.last_step - self._shortened_at
        return self._place + n_taken * ((self.n_steps - self._place) / max(n_left, 1))

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.last_step, self._shortened_at, self._place]

    def load(self, state: list[float]) -> None:
        """Take over what `state` gave."""
        last_step, shortened_at, self._place = state
        self.last_step, self._shortened_at = int(last_step), int(shortened_at)
