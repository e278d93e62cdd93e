"""Several generations side by side: in each turn one call of the UNet, with rows of as many as fit.

A sampler is a table, and a UNet takes a timestep for each of its rows, so requests share calls whatever their
samplers, steps and guidance are. What a row of a call computes does not depend on the other rows, so pictures
are those of a request that runs alone: to the byte on a CPU, in the layout that the tests open.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar, cast

import numpy as np

from ...engines.spec import Array
from .job import UNetCall

Item = TypeVar("Item")
End = TypeVar("End")
ROWS = 8  # of a call, at most


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
    """One of them; `call` is what it waits for, None before its first turn."""

    name: Hashable
    steps: Generator[UNetCall | Item, None, End]
    call: UNetCall | None = None
    waits_since: int = 0


class SharedSteps(Generic[Item, End]):
    """Runs generations: generators that yield calls of the UNet and other items, and return something.

    Every turn belongs to who waits longest, and to others of its kind (the same weights, the same sizes). So
    with G generations none waits more than G turns for an answer. A new one starts at once where nobody
    waits; else one starts in each turn, as encoding its prompts makes the others wait. One thread takes the
    turns.

    Args:
        rows: of a call, at most; a generation that has more runs alone.
        sizes: numbers of rows that a call may have, in their order: others are filled up to the next one.
            For a device, on which each number is another engine's profile or another plan.
    """

    def __init__(self, rows: int = ROWS, sizes: Sequence[int] = ()) -> None:
        self._rows, self._sizes = rows, tuple(sizes)
        self._running: dict[Hashable, _Generation[Item, End]] = {}
        self._turns = 0

    def __len__(self) -> int:
        """How many are running."""
        return len(self._running)

    def add(self, name: Hashable, steps: Generator[UNetCall | Item, None, End]) -> None:
        """Let a generation take part from the next turn on; no other that runs has its name."""
        assert name not in self._running, name
        self._running[name] = _Generation(name=name, steps=steps)

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
        self._turns += 1
        events: list[Yielded[Item] | Ended[End] | Failed] = []
        new = [one for one in self._running.values() if one.call is None]
        busy = len(new) < len(self._running)
        for one in new[: 1 if busy else None]:
            self._advance(one, events)
        chosen = self._choose()
        for one, prediction in zip(chosen, self._predict(chosen), strict=True):
            if isinstance(prediction, Exception):
                self._advance(one, events, prediction)
            else:
                cast("UNetCall", one.call).answer(prediction)
                self._advance(one, events)
        return events

    def _choose(self) -> list[_Generation[Item, End]]:
        """Who runs now: in the order in which they began to wait."""
        waiting = sorted(
            (one for one in self._running.values() if one.call is not None), key=lambda one: one.waits_since
        )
        chosen: list[_Generation[Item, End]] = []
        left = self._rows
        for one in waiting:
            call = cast("UNetCall", one.call)
            if not chosen or (call.rows <= left and call.kind == cast("UNetCall", chosen[0].call).kind):
                chosen.append(one)
                left -= call.rows
        return chosen

    def _predict(self, chosen: Sequence[_Generation[Item, End]]) -> list[Array | Exception]:
        """What the UNet answers to each; an error of a common call is looked for by asking one by one."""
        calls = [cast("UNetCall", one.call) for one in chosen]
        if not calls:
            return []
        try:
            return list(together(calls, self._sizes))
        except Exception as error:
            if len(calls) == 1:
                return [error]
        return [answer for one in chosen for answer in self._predict([one])]

    def _advance(
        self,
        one: _Generation[Item, End],
        events: list[Yielded[Item] | Ended[End] | Failed],
        error: Exception | None = None,
    ) -> None:
        """Run a generation to the next call that it waits for, or to its end."""
        try:
            item = next(one.steps) if error is None else one.steps.throw(error)
            while not isinstance(item, UNetCall):
                events.append(Yielded(name=one.name, item=item))
                item = next(one.steps)
        except StopIteration as end:
            del self._running[one.name]
            events.append(Ended(name=one.name, value=cast("End", end.value)))
        except Exception as raised:
            del self._running[one.name]
            events.append(Failed(name=one.name, error=raised))
        else:
            one.call, one.waits_since = item, self._turns


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
