"""Several generations side by side: in each turn one call of the UNet, with rows of as many as fit.

A sampler is a table, and a UNet takes a timestep for each of its rows, so requests share calls whatever their
samplers, steps and guidance are. What a row of a call computes does not depend on the other rows, so pictures
are those of a request that runs alone: to the byte on a CPU, in the layout that the tests open.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np

from ...engines.errors import CancelledError
from ...engines.spec import Array
from .calls import Pause
from .job import Clock, UNetCall

Item = TypeVar("Item")
End = TypeVar("End")
ROWS = 8  # of a call, at most
_FIRST = 2**31  # a priority above all others
PATIENCE = 16  # turns that a generation of lower priority waits at most


@dataclass(frozen=True, kw_only=True)
class Yielded(Generic[Item]):
    """What a generation has yielded."""

    name: Hashable
    item: Item


@dataclass(frozen=True, kw_only=True)
class Ended(Generic[End]):
    """What a generation has returned."""

    name: Hashable
    value: End


@dataclass(frozen=True, kw_only=True)
class Failed:
    """What a generation has raised."""

    name: Hashable
    error: Exception


@dataclass(kw_only=True)
class _Generation(Generic[Item, End]):
    """One of them; `waits` is what it waits for, None before its first turn."""

    name: Hashable
    steps: Generator[UNetCall | Pause | Item, None, End]
    priority: int
    waits: UNetCall | Pause | None = None
    waits_since: int = 0


class SharedSteps(Generic[Item, End]):
    """Runs generations: generators that yield calls of the UNet, pauses and other items, and return an end.

    Every turn belongs to who waits longest, and to others of its kind (the same weights, the same sizes). So
    with G generations of one priority none waits more than G turns for an answer; one of lower priority waits
    while there are others, but not longer than `PATIENCE` turns before it is in that order too. A new one
    starts at once where nobody waits; else one starts in each turn, as encoding its prompts makes the others
    wait. What follows a pause is a turn of its own. One thread takes the turns.

    Args:
        rows: of a call, at most; a generation that has more runs alone.
        sizes: numbers of rows that a call may have, in their order: others are filled up to the next one.
            For a device, on which each number is another engine's profile or another plan.
    """

    def __init__(self, rows: int = ROWS, sizes: Sequence[int] = ()) -> None:
        self._rows, self._sizes = rows, tuple(sizes)
        self._running: dict[Hashable, _Generation[Item, End]] = {}
        self._turns = 0
        self.rows_of_turn = 0  # that the last turn's call had, without what filled it up

    def __len__(self) -> int:
        """How many are running."""
        return len(self._running)

    def add(
        self, name: Hashable, steps: Generator[UNetCall | Pause | Item, None, End], priority: int = 0
    ) -> None:
        """Let a generation take part from the next turn on; no other that runs has its name.

        Where its turn is does not change what it draws. Higher priorities come first.
        """
        assert name not in self._running, name
        self._running[name] = _Generation(name=name, steps=steps, priority=priority)

    def remove(self, name: Hashable) -> None:
        """Close a generation between two turns; nothing happens where it has ended."""
        if (one := self._running.pop(name, None)) is not None:
            one.steps.close()

    def close(self) -> None:
        """Close all of them."""
        for name in tuple(self._running):
            self.remove(name)

    def turn(self) -> list[Yielded[Item] | Ended[End] | Failed]:
        """Start who is new, run one call, and go on with those whose rows were in it; what became of them."""
        self._turns, self.rows_of_turn = self._turns + 1, 0
        events: list[Yielded[Item] | Ended[End] | Failed] = []
        self._end_cancelled(events)
        new = [one for one in self._running.values() if one.waits is None]
        new.sort(key=lambda one: -one.priority)
        busy = len(new) < len(self._running)
        for one in new[: 1 if busy else None]:
            self._advance(one, events)
        chosen = self._choose()
        if len(chosen) == 1 and isinstance(chosen[0].waits, Pause):
            self._advance(chosen[0], events)
            return events
        calls = [one.waits for one in chosen if isinstance(one.waits, UNetCall)]
        self.rows_of_turn = sum(call.rows for call in calls)
        for one, call, prediction in zip(chosen, calls, self._predict(calls), strict=True):
            if isinstance(prediction, Exception):
                self._advance(one, events, prediction)
            else:
                call.answer(prediction)
                self._advance(one, events)
        return events

    def _end_cancelled(self, events: list[Yielded[Item] | Ended[End] | Failed]) -> None:
        for one in tuple(self._running.values()):
            if isinstance(one.waits, UNetCall):
                try:
                    one.waits.check()
                except CancelledError as error:
                    self._advance(one, events, error)

    def _choose(self) -> list[_Generation[Item, End]]:
        """Who runs now, in their order: one that pauses, or all whose calls go together."""
        waiting = sorted((one for one in self._running.values() if one.waits), key=self._order)
        chosen: list[_Generation[Item, End]] = []
        left, kind = self._rows, None
        for one in waiting:
            if not isinstance(call := one.waits, UNetCall):
                if not chosen:
                    return [one]
            elif not chosen or (call.rows <= left and call.kind == kind):
                chosen.append(one)
                left, kind = left - call.rows, kind or call.kind
        return chosen

    def _order(self, one: _Generation[Item, End]) -> tuple[int, int]:
        patient = self._turns - one.waits_since <= PATIENCE
        return (-one.priority if patient else -_FIRST, one.waits_since)

    def _predict(self, calls: Sequence[UNetCall]) -> list[Array | Exception]:
        """What the UNet answers to each; an error of a common call is looked for by asking one by one."""
        if not calls:
            return []
        try:
            return list(together(calls, self._sizes))
        except Exception as error:
            if len(calls) == 1:
                return [error]
        return [answer for call in calls for answer in self._predict([call])]

    def _advance(
        self,
        one: _Generation[Item, End],
        events: list[Yielded[Item] | Ended[End] | Failed],
        error: Exception | None = None,
    ) -> None:
        """Run a generation to the next call that it waits for, or to its end."""
        try:
            item = next(one.steps) if error is None else one.steps.throw(error)
            while not isinstance(item, (UNetCall, Pause)):
                events.append(Yielded(name=one.name, item=item))
                item = next(one.steps)
        except StopIteration as end:
            del self._running[one.name]
            events.append(Ended(name=one.name, value=end.value))
        except Exception as raised:
            del self._running[one.name]
            events.append(Failed(name=one.name, error=raised))
        else:
            one.waits, one.waits_since = item, self._turns


def together(calls: Sequence[UNetCall], sizes: Sequence[int] = ()) -> list[Array]:
    """Run calls of one kind as one; the prediction of each. Their clocks share the time by rows.

    `sizes` as of `SharedSteps`. Raises what the net raises.
    """
    first, rows = calls[0], sum(call.rows for call in calls)
    size = next((size for size in sizes if size >= rows), rows)
    inputs = first.inputs
    if len(calls) > 1 or size > rows:
        # What fills up are rows that are there: their numbers are finite if any are.
        filled = [*(call.inputs for call in calls), *[_row(first)] * (size - rows)]
        inputs = {name: np.concatenate([one[name] for one in filled]) for name in first.inputs}
    began = perf_counter()
    prediction = first.run(**inputs)["prediction"]
    seconds = perf_counter() - began
    parts: list[Array] = []
    start = 0
    for call in calls:
        parts.append(prediction[start : start + call.rows])
        start += call.rows
        call.clock.seconds["unet"] = call.clock.seconds.get("unet", 0.0) + seconds * call.rows / rows
    return parts


def _row(call: UNetCall) -> dict[str, Array]:
    return {name: value[:1] for name, value in call.inputs.items()}


def rows_that_gain(call: UNetCall, most: int = 16, within: float = 1.05, repeats: int = 2) -> int:
    """The smallest number of rows at which one takes at most `within` times as long as at the best number.

    Powers of two are tried, on this machine, with copies of a call.

    Args:
        call: whose inputs are repeated; it is not answered.
        most: rows, at most; a call that has more counts as it is.
        within: how much slower than at the best number one may be.
        repeats: of each size, of which the fastest counts.
    """
    if replace(call).kind != call.kind:  # of an older package, whose calls are never shared
        return call.rows
    sizes = [call.rows]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)

    def seconds(rows: int) -> float:
        calls = [replace(call, clock=Clock()) for _ in range(rows // call.rows)]
        took: list[float] = []
        for _ in range(repeats + 1):  # the first may allocate
            began = perf_counter()
            together(calls)
            took.append(perf_counter() - began)
        return min(took[1:]) / rows

    each = {rows: seconds(rows) for rows in sizes}
    return next(rows for rows in sizes if each[rows] <= within * min(each.values()))
