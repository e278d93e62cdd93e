"""What happens to one job, numbered, for any number of readers: late, slow and returning ones.

Writers never wait for readers. A reader asks for what came after the last number it has seen; it is nudged by
a callback when there is more. What a slow one misses is gone from the log, and it is given a snapshot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .bounds import Bounds, Clock

Terminal = Literal["completed", "failed", "cancelled"]
Kind = Literal["queued", "started", "step", "preview", "image", Terminal]
TERMINAL = frozenset[str](get_args(Terminal))
Data = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; numbers of a job's events increase from 1."""

    number: int
    kind: Kind
    data: Data


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What all events up to a number have told.

    Args:
        number: of the last of those events.
        state: the last of `queued` and `started`; None before.
        position: the data of the last `queued`.
        steps: the data of each picture's last step, also of one that made no event.
        preview: the data of the newest preview.
        images: the data of all `image` events.
    """

    number: int = 0
    state: Kind | None = None
    position: Data | None = None
    steps: Mapping[int, Data] = field(default_factory=dict[int, Data])
    preview: Data | None = None
    images: tuple[Data, ...] = ()

    def then(self, event: Event) -> Snapshot:
        """With one event more."""
        told = replace(self, number=event.number)
        if event.kind in ("queued", "started"):
            position = event.data if event.kind == "queued" else self.position
            return replace(told, state=event.kind, position=position)
        if event.kind == "preview":
            return replace(told, preview=event.data)
        return replace(told, images=(*self.images, event.data)) if event.kind == "image" else told


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader gets: first the snapshot, if there is one, then the events.

    Args:
        snapshot: instead of events that the log has no more.
        events: with numbers after the reader's own and after the snapshot's.
        ended: whether nothing will follow.
    """

    snapshot: Snapshot | None
    events: tuple[Event, ...]
    ended: bool


class EventLog:
    """One job's events. Any thread may write and read.

    Args:
        bounds: `events` and `steps_per_second` of them.
        now: a clock.
        pictures: of the job; their steps share what is told in a second.
    """

    def __init__(self, bounds: Bounds, now: Clock, pictures: int = 1) -> None:
        self._bounds, self._now = bounds, now
        # For every picture a whole number of steps in each second, so that the sum is never above the bound.
        self._between_steps = 1 / max(1, bounds.steps_per_second // pictures)
        self._lock = threading.Lock()
        self._events = deque[Event]()
        self._lost = 0  # the highest number that a reader can have missed
        self._told = Snapshot()
        self._told_steps: dict[int, float] = {}  # picture -> when
        self._ended = False
        self._readers: dict[object, Callable[[], None]] = {}

    def append(self, kind: Kind, data: Data) -> None:
        """Add an event; nothing follows a terminal one."""
        with self._lock:
            added = self._add(kind, data)
        if added:
            self._nudge()

    def step(self, picture: int, data: Data) -> None:
        """Add a picture's step, unless its last is so recent that a reader had no time for it."""
        with self._lock:
            if self._ended:
                return
            self._told = replace(self._told, steps={**self._told.steps, picture: data})
            last, now = self._told_steps.get(picture), self._now()
            if last is not None and now - last < self._between_steps:
                return
            self._told_steps[picture] = now
            self._add("step", data)
        self._nudge()

    def after(self, number: int) -> Reading:
        """The events after a number, which may be from another life of the server."""
        with self._lock:
            later = tuple(event for event in self._events if event.number > number)
            if self._lost <= max(number, 0) <= self._told.number:
                return Reading(snapshot=None, events=later, ended=self._ended)
            end = tuple(event for event in later if event.kind in TERMINAL)
            if self._ended and not end:  # the number is none of ours
                end = (self._events[-1],)
            told = replace(self._told, number=end[0].number - 1) if end else self._told
            return Reading(snapshot=told, events=end, ended=self._ended)

    @property
    def told(self) -> Snapshot:
        """What all events so far have told, for who looks on once."""
        with self._lock:
            return self._told

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after each event, until the function that is returned is called.

        The writer's thread calls it, so it must return at once and take no lock: an asyncio server passes
        `partial(loop.call_soon_threadsafe, event.set)`. One that raises (its loop is closed) is called no
        more. Watch first and read then: else what comes between is noticed late.
        """
        name = object()
        with self._lock:
            self._readers[name] = wake
        return lambda: self._forget(name)

    def _forget(self, name: object) -> None:
        with self._lock:
            self._readers.pop(name, None)

    def _nudge(self) -> None:
        with self._lock:
            readers = list(self._readers.items())
        for name, wake in readers:
            try:
                wake()
            except Exception:  # whatever a reader's loop raises; the job is not to blame
                self._forget(name)

    def _add(self, kind: Kind, data: Data) -> bool:
        if self._ended:
            return False
        event = Event(number=self._told.number + 1, kind=kind, data=data)
        self._told = self._told.then(event)
        self._ended = kind in TERMINAL
        if kind == "preview":  # a new one replaces the last: nobody wants to see that, and it is large
            self._remove("preview")
        if self._ended:  # the log is kept with the job, and what was on the way is of no more use
            self._remove("step", "preview")
            self._told = replace(self._told, preview=None)
        self._events.append(event)
        if len(self._events) > self._bounds.events:
            self._lost = self._events.popleft().number
        return True

    def _remove(self, *kinds: Kind) -> None:
        """Without a gap: who has not seen these has missed nothing."""
        self._events = deque(one for one in self._events if one.kind not in kinds)
