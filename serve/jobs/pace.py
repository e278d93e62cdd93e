"""How fast this server draws: seconds for each pixel of a step."""

from __future__ import annotations

import threading

# Of a new measurement in the mean: the last ten count for nine tenths, so other sizes show within seconds.
WEIGHT = 0.2


class Pace:
    """An exponentially weighted mean, which the warm-up begins and the worker feeds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mean: float | None = None

    @property
    def seconds_per_pixel_step(self) -> float | None:
        """None before the first measurement."""
        with self._lock:
            return self._mean

    def feed(self, pixel_steps: int, seconds: float) -> None:
        """Take in that so many pixels of so many steps took so long; nothing at all tells nothing."""
        if pixel_steps <= 0 or seconds <= 0:
            return
        new = seconds / pixel_steps
        with self._lock:
            self._mean = new if self._mean is None else self._mean + WEIGHT * (new - self._mean)

    def seconds(self, pixel_steps: int) -> float | None:
        """How long so many take; None before the first measurement."""
        mean = self.seconds_per_pixel_step
        return None if mean is None else mean * pixel_steps
