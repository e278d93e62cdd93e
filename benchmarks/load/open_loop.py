"""An open loop: requests arrive when they are due, however late the server is, and wait from then on.

Who would ask for the next picture once the last one is there never sees a queue, and measures no latency but
the shortest ("coordinated omission"). Steps are taken as the server's worker takes them (`serve/worker.py`):
arrivals join between two turns of `SharedSteps`, in one thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from ...runtime.loop.sharing import ROWS, Ended, Failed, SharedSteps, Yielded
from .traffic import Kind, Request

# The generation of requests of one kind, which yields what `SharedSteps` takes.
Start = Callable[[Sequence[Request]], Generator[Any, None, Any]]
_Events = list[Yielded[Any] | Ended[Any] | Failed]


class LoadClock(Protocol):
    """Seconds, real or made up."""

    def now(self) -> float:
        """Seconds since some beginning."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let them pass."""
        ...


class SteadyClock:
    """Real seconds."""

    def now(self) -> float:
        """The time that is never set back."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A way to draw what waits: so many generations side by side, of so many equal requests each, at most.

    A batch has those of the first one's kind that wait when it begins; nobody is held back to wait for more.
    """

    side: str
    at_once: int = 1
    pictures: int = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a run is, and what is refused in it.

    Attributes:
        warm_up: the first requests, which do not count.
        counted: those behind them. Others follow until all these have ended: at the end it is as busy.
        jobs: that wait or are drawn, at most; one more is refused. None refuses nothing.
        rows: of a call of the UNet, at most; a batch that has more of them runs alone.
    """

    warm_up: int
    counted: int
    jobs: int | None = None
    rows: int = ROWS


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A request that was drawn, at so many seconds from the beginning."""

    request: Request
    at: float

    @property
    def latency(self) -> float:
        """Seconds since it was due."""
        return self.at - self.request.due


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a run was. `counted` are its requests in the order of arrival; times are from the beginning.

    Attributes:
        counted: all that were to be measured, refused ones too.
        finished: every request that was drawn, in the order of the ends.
        refused: every one that was not.
        calls: of the UNet: when each ended, and its rows.
    """

    counted: tuple[Request, ...]
    finished: tuple[Finished, ...]
    refused: tuple[Request, ...]
    calls: tuple[tuple[float, int], ...]

    @property
    def numbers(self) -> range:
        """Numbers of the counted requests."""
        return range(self.counted[0].number, self.counted[-1].number + 1)

    @property
    def measured(self) -> tuple[Finished, ...]:
        """The counted requests that were drawn, in the order of arrival."""
        found = (one for one in self.finished if one.request.number in self.numbers)
        return tuple(sorted(found, key=lambda one: one.request.number))

    @property
    def seconds(self) -> float:
        """Between the first counted arrival and the last: rates are of this time."""
        return self.counted[-1].due - self.counted[0].due

    def within(self, at: float) -> bool:
        """Whether a moment is in that time."""
        return self.counted[0].due < at <= self.counted[-1].due


def play(
    policy: Policy, limits: Limits, requests: Iterator[Request], start: Start, clock: LoadClock
) -> Played:
    """Draw requests in one way, from an empty queue on.

    Args:
        policy: the way.
        limits: of the run.
        requests: in the order of arrival, without end.
        start: makes a generation.
        clock: real seconds, or those that `start` lets pass.

    Raises:
        Exception: what a generation raises.
    """
    loop = _OpenLoop(policy, limits, requests, start, clock)
    with closing(loop.shared):
        loop.run()
    return loop.played()


def draw(start: Start, request: Request) -> None:
    """Draw one request while nothing else is. Raises what its generation raises."""
    shared: SharedSteps[Any, Any] = SharedSteps()
    with closing(shared):
        shared.add(request.number, start((request,)))
        while len(shared):
            _check(shared.turn())


def time_alone(start: Start, kinds: Sequence[Kind], passes: int, clock: LoadClock) -> list[list[float]]:
    """Seconds of a request of each kind, one after the other: for each kind, one of each pass.

    The kinds take turns, and once more before that, as what is first may be slower.
    """
    found: list[list[float]] = [[] for _ in kinds]
    for number in range(passes + 1):
        for kind, seconds in zip(kinds, found, strict=True):
            began = clock.now()
            draw(start, Request(number=number, kind=kind, due=0.0))
            seconds.append(clock.now() - began)
    return [seconds[1:] for seconds in found]


class _OpenLoop:
    """A run while it lasts."""

    def __init__(
        self, policy: Policy, limits: Limits, requests: Iterator[Request], start: Start, clock: LoadClock
    ) -> None:
        self._policy, self._limits, self._start, self._clock = policy, limits, start, clock
        self._requests, self._next = requests, next(requests)
        self._began = clock.now()
        self._waiting: deque[Request] = deque()
        self._drawn: dict[int, tuple[Request, ...]] = {}  # by the number of each generation's first
        self._open = limits.warm_up + limits.counted  # of these, how many have not ended
        self._last = self._open  # later numbers are there for the others' sake
        self._turned = 0.0
        self._counted: list[Request] = []
        self._finished: list[Finished] = []
        self._refused: list[Request] = []
        self._calls: list[tuple[float, int]] = []
        self.shared: SharedSteps[Any, Any] = SharedSteps(limits.rows)

    def run(self) -> None:
        """Until every counted request has ended."""
        while self._open:
            self._begin()
            events = self._turn()
            self._arrive()  # before those that have ended are gone: they were there when it arrived
            self._end(events)

    def played(self) -> Played:
        """What it was."""
        return Played(
            counted=tuple(self._counted),
            finished=tuple(self._finished),
            refused=tuple(self._refused),
            calls=tuple(self._calls),
        )

    def _now(self) -> float:
        return self._clock.now() - self._began

    def _arrive(self) -> None:
        while (request := self._next).due <= self._now():
            if self._limits.warm_up <= request.number < self._last:
                self._counted.append(request)
            there = len(self._waiting) + sum(map(len, self._drawn.values()))
            if self._limits.jobs is not None and there >= self._limits.jobs:
                self._refused.append(request)
                self._close(request)
            else:
                self._waiting.append(request)
            self._next = next(self._requests)

    def _end(self, events: _Events) -> None:
        for name in _check(events):
            for request in self._drawn.pop(name):
                self._finished.append(Finished(request=request, at=self._turned))
                self._close(request)

    def _close(self, request: Request) -> None:
        self._open -= request.number < self._last

    def _begin(self) -> None:
        while self._waiting and len(self._drawn) < self._policy.at_once:
            first = self._waiting[0]
            equal = [one for one in self._waiting if one.kind == first.kind][: self._policy.pictures]
            for request in equal:
                self._waiting.remove(request)
            self._drawn[first.number] = tuple(equal)
            self.shared.add(first.number, self._start(equal))

    def _turn(self) -> _Events:
        if not len(self.shared):
            self._clock.sleep(max(0.0, self._next.due - self._now()))
            return []
        events = self.shared.turn()
        self._turned = self._now()
        if self.shared.rows_of_turn:
            self._calls.append((self._turned, self.shared.rows_of_turn))
        return events


def _check(events: _Events) -> list[Any]:
    """The names of those that have ended. Raises what one has raised."""
    for event in events:
        if isinstance(event, Failed):
            raise event.error
    return [event.name for event in events if isinstance(event, Ended)]
