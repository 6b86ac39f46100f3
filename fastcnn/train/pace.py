"""How often a training writes its checkpoint."""

import math
import time

SHARE_OF_TIME = 0.05  # that writing checkpoints may take of training


class Pace:
    """After which steps a checkpoint is written.

    A resumed run repeats the steps since its checkpoint, with the same losses; so what a kill costs is their time.
    Every ``every`` steps, or with 0 as often as writing takes a twentieth of the time at most: that is counted in
    steps, so that several processes agree.

    Example:
        >>> pace = Pace(every=2)
        >>> [pace.due(steps=1) for step in range(2)]
        [False, True]
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
        """Return after how many steps the next one is due, from how long writing one took just now."""
        if self.every:
            return self.every
        step_seconds = (time.perf_counter() - self._started - write_seconds) / max(1, self._interval - self._left)
        return max(1, math.ceil(write_seconds / (SHARE_OF_TIME * max(step_seconds, 1e-6))))

    def restart(self, interval: int | None = None) -> None:
        """Count from here on to ``interval``, or to the one before."""
        self._interval = self._left = interval or self._interval
        self._started = time.perf_counter()
