"""How fast this server draws, by what it has drawn, and when jobs may be done at that pace."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

# Of what a measurement says otherwise: the last ten count for nine tenths, so other loads show in seconds.
WEIGHT = 0.2


class Pace:
    """What a step of a picture takes: a time for itself, and one for its pixels.

    A step of a tiny picture takes almost as long as that of a larger one, so a mean over pixels would tell
    large ones far too long a time. Both times follow the measurements by least mean squares, normalised
    (Widrow and Hoff 1960; Haykin, "Adaptive Filter Theory", chapter 6): a measurement changes what it is
    about. The first one, the warm-up's, counts for pixels alone, and its size is the unit they count in.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unit: float | None = None  # pixels
        self._each_step = self._each_unit = 0.0  # seconds

    @property
    def seconds_per_pixel_step(self) -> float | None:
        """At the size of the first measurement; None before it."""
        with self._lock:
            return None if self._unit is None else (self._each_step + self._each_unit) / self._unit

    def feed(self, steps: int, pixel_steps: int, seconds: float) -> None:
        """Take in that so many steps of pictures, of so many pixels in all, took so long.

        Nothing at all tells nothing.
        """
        if steps <= 0 or pixel_steps <= 0 or seconds <= 0:
            return
        with self._lock:
            if self._unit is None:
                self._unit, self._each_unit = pixel_steps / steps, seconds / steps
                return
            units = pixel_steps / self._unit
            odd = WEIGHT * (seconds - self._each_step * steps - self._each_unit * units)
            length = steps**2 + units**2
            self._each_step = max(0.0, self._each_step + odd * steps / length)
            self._each_unit = max(0.0, self._each_unit + odd * units / length)

    def seconds(self, steps: int, pixel_steps: int) -> float | None:
        """How long so many take; None before the first measurement."""
        with self._lock:
            if self._unit is None:
                return None
            return self._each_step * steps + self._each_unit * pixel_steps / self._unit


def ends(jobs: Iterable[tuple[int, float]], at_once: int) -> list[float]:
    """When each job is done, in seconds from now.

    Args:
        jobs: of each, in their order, how many rounds it has left, and the seconds of one: a step of each of
            its pictures. The first `at_once` take turns, round by round; when one ends, the next begins.
        at_once: how many.
    """
    waiting = deque(enumerate(jobs))
    found = [0.0] * len(waiting)
    running: list[tuple[int, int, float]] = []  # number, rounds left, seconds of one
    now = 0.0
    while running or waiting:
        while waiting and len(running) < at_once:
            number, (rounds, seconds) = waiting.popleft()
            running.append((number, rounds, seconds))
        least = min(rounds for _, rounds, _ in running)
        now += least * sum(seconds for *_, seconds in running)
        left: list[tuple[int, int, float]] = []
        for number, rounds, seconds in running:
            if rounds == least:
                found[number] = now
            else:
                left.append((number, rounds - least, seconds))
        running = left
    return found
