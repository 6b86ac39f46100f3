"""How often a training writes its checkpoint."""

import math
import time

SHARE_OF_TIME = 0.05  # of training that writing checkpoints may take


class Pace:
    """Decides after which steps a checkpoint is written.

    That is every ``every`` steps; with 0, so often that writing takes at most a twentieth of the time, counted in steps
    so that several processes agree.
    """

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self._interval = self._left = every or 1  # the first one tells how long writing takes
        self._started = time.perf_counter()

    def due(self, steps: int) -> bool:
        """Count steps; return whether it is time."""
        self._left -= steps
        return self._left <= 0

    def next_interval(self, write_seconds: float) -> int:
        """Return after how many steps the next checkpoint is due, given how long the last one took to write."""
        if self.every:
            return self.every
        step_seconds = (time.perf_counter() - self._started - write_seconds) / max(1, self._interval - self._left)
        return max(1, math.ceil(write_seconds / (SHARE_OF_TIME * max(step_seconds, 1e-6))))

    def restart(self, interval: int | None = None) -> None:
        """Start counting anew, to ``interval`` steps or to as many as before."""
        self._interval = self._left = interval or self._interval
        self._started = time.perf_counter()
