"""What drawing takes as a few numbers, and requests that take just that and draw nothing.

A simulation runs them through the same queue and the same `SharedSteps` as real ones, with a clock that every
piece of work sets forward.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from ...engines.spec import Array
from ...runtime.loop.calls import Pause
from ...runtime.loop.job import Clock, UNetCall
from ...runtime.loop.sharing import together
from .open_loop import LoadClock, Start
from .traffic import Kind, Request

_ROWS = (1, 2, 4, 8)  # of the calls that the line goes through


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of drawing, for pictures of so many `pixels`; what grows with those is scaled to others.

    Attributes:
        name: whose it is.
        fixed, each: a call of the UNet with b rows takes fixed + each * b.
        begin: from a request to its first call, for each picture.
        decode: from the last call to the picture, for each.
        pixels: of a picture.
    """

    name: str
    fixed: float
    each: float
    begin: float
    decode: float
    pixels: int

    def call(self, rows: int, pixels: int) -> float:
        """Seconds of a call of the UNet."""
        return self.fixed + self.each * rows * pixels / self.pixels

    def end(self, pixels: int) -> float:
        """Seconds of decoding one picture."""
        return self.decode * pixels / self.pixels

    def alone(self, kind: Kind) -> float:
        """Seconds of one request that nothing else is drawn beside."""
        return self.begin + kind.steps * self.call(kind.rows, kind.pixels) + self.end(kind.pixels)

    def to_json(self) -> dict[str, Any]:
        """By attribute."""
        return dict(vars(self))


def gpu_like(pixels: int) -> Cost:
    """A device that has room in every call: of one with a single row, three fifths do not depend on rows.

    Assumed, not measured.
    """
    return Cost(name="GPU-like, assumed", fixed=7.8e-3, each=5.2e-3, begin=5e-3, decode=40e-3, pixels=pixels)


class MadeUpClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self._time = 0.0

    def now(self) -> float:
        """The time."""
        return self._time

    def sleep(self, seconds: float) -> None:
        """Let them pass at once, and time go on also where they are so few that a sum would swallow them."""
        if seconds > 0:
            self._time = max(self._time + seconds, math.nextafter(self._time, math.inf))


def simulated(cost: Cost, clock: LoadClock) -> Start:
    """Makes generations that call a UNet, pause and end as real ones do; all that they do is take time."""

    @cache  # calls with an equal `run` are of one kind
    def unet(pixels: int) -> Any:
        def run(latent: Array) -> Mapping[str, Array]:
            clock.sleep(cost.call(len(latent), pixels))
            return {"prediction": latent}

        return run

    def start(requests: Sequence[Request]) -> Generator[UNetCall | Pause, None, None]:
        kind, pictures = requests[0].kind, len(requests)
        latent = np.zeros((pictures * kind.rows, 1), np.float32)
        clock.sleep(cost.begin * pictures)
        for _ in range(kind.steps):
            yield UNetCall(run=unet(kind.pixels), inputs={"latent": latent}, clock=Clock())
        yield Pause()
        clock.sleep(cost.end(kind.pixels) * pictures)

    return start


def measure_cost(name: str, start: Start, kind: Kind, clock: LoadClock, repeats: int = 5) -> Cost:
    """The cost of what `start` makes, for pictures of a kind: medians, and the line through a few sizes.

    Raises:
        Exception: what a generation raises.
    """
    begins, ends = zip(*(_ends(start, kind, clock) for _ in range(repeats)), strict=True)
    each, fixed = _line(start, kind, clock, repeats)
    return Cost(
        name=name,
        fixed=fixed,
        each=each,
        begin=median(begins),
        decode=median(ends),
        pixels=kind.pixels,
    )


def _ends(start: Start, kind: Kind, clock: LoadClock) -> tuple[float, float]:
    """Seconds of a request before its first call, and after the first pause."""
    steps = start((Request(number=0, kind=kind, due=0.0),))
    began = clock.now()
    begin = paused = None
    for item in steps:
        if isinstance(item, UNetCall):
            begin = clock.now() - began if begin is None else begin
            item.answer(item.run(**item.inputs)["prediction"])
        elif isinstance(item, Pause) and paused is None:
            paused = clock.now()
    assert begin is not None
    assert paused is not None
    return begin, clock.now() - paused


def _line(start: Start, kind: Kind, clock: LoadClock, repeats: int) -> tuple[float, float]:
    """Slope and intercept of a call's seconds over its rows: sizes take turns, and once more before that."""
    request = Request(number=0, kind=replace(kind, guidance_scale=1.0), due=0.0)
    steps = start((request,))
    call = next(item for item in steps if isinstance(item, UNetCall))
    taken: dict[int, list[float]] = {rows: [] for rows in _ROWS}
    for _ in range(repeats + 1):
        for rows, seconds in taken.items():
            began = clock.now()
            together([replace(call, clock=Clock()) for _ in range(rows)])
            seconds.append(clock.now() - began)
    steps.close()
    slope, intercept = np.polyfit(_ROWS, [median(seconds[1:]) for seconds in taken.values()], 1)
    return float(slope), max(0.0, float(intercept))
