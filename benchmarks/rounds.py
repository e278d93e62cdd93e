"""Sides take turns: round by round, in an order that flips, so that a slow minute falls on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ..engines.spec import Array
from .case import Case
from .process import SideError, SideProcess
from .records import Row, Status
from .sides.contract import AGAIN, OURS, YARDSTICK


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often each side runs.

    Attributes:
        runs, rounds: how many of each side there are at least, if the budget allows.
        budget: seconds for all sides together; then it ends, but never before `least` rounds.
        turn: about so many seconds are one side's turn: many short runs, or one long one.
        most: runs in a turn.
        least: rounds that there are in any case.
        warm_up: runs of each side before the first round, besides the one that prepared it.
    """

    runs: int = 50
    rounds: int = 15
    budget: float = 60.0
    turn: float = 0.25
    most: int = 40
    least: int = 3
    warm_up: int = 5

    @classmethod
    def quick(cls) -> Pace:
        """For a look: seconds for each row."""
        return cls(rounds=8, budget=2.0, turn=0.1, warm_up=2)


@dataclass(frozen=True, kw_only=True, eq=False)  # a key: each is itself alone
class Slot:
    """A workload that a side has ready under a name, to be timed in turns with others.

    `beside`: each run is followed by one of the yardstick in the same process, and seconds are of a pair.
    """

    side: SideProcess
    slot: str
    workload: str
    case: Case
    beside: bool = False

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.slot} beside {YARDSTICK}" if self.beside else self.slot

    def prepare(self) -> tuple[float, Mapping[str, Array]]:
        """Get it ready: seconds of the first run, and its outputs. Raises SideError."""
        answer, outputs = self.side.prepare(self.workload, self.case, slot=self.slot)
        return float(answer["seconds"]), outputs

    def time(self, runs: int) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        """As `SideProcess.time`."""
        return self.side.time(runs, slot=self.slot, beside=YARDSTICK if self.beside else None)

    def row(self, turns: Turns, figures: Mapping[str, Any] | None = None) -> Row:
        """What its turns found."""
        return Row(
            side=self.side.name,
            workload=self.workload,
            case=self.case.to_json(),
            rounds=tuple(turns.rounds),
            status=turns.status,
            reason=turns.reason,
            figures=figures or {},
            stamp=self.side.stamp,
        )


@dataclass(kw_only=True)
class Turns:
    """What one side did. `figures` has an item for each sample; a side that failed has a reason."""

    rounds: list[tuple[float, ...]] = field(default_factory=list[tuple[float, ...]])
    figures: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    status: Status = "ok"
    reason: str = ""


def interleave(
    sides: Sequence[Slot],
    first: Mapping[str, float],
    pace: Pace,
    *,
    said: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Turns]:
    """Time every side; a side that fails drops out, and the others go on.

    `first` has the seconds that each side's first run took, by name; `said` gets a line about how far it is.
    """
    found = {item.name: Turns() for item in sides}
    began = clock()
    for item in sides:  # the first run took longer than any after it: look again at how long a turn is
        _turn(item, found[item.name], min(pace.warm_up, _per_turn(first[item.name], pace)))
    per_turn: dict[str, int] = {}
    seconds = 0.0  # of a round
    for name, turns in found.items():
        shortest = min((seconds for turn in turns.rounds for seconds in turn), default=first[name])
        per_turn[name] = _per_turn(shortest, pace)
        seconds += shortest * per_turn[name]
        turns.rounds.clear()
        turns.figures.clear()
    if {OURS, AGAIN} <= per_turn.keys():  # the halves of an A/A pair do the same
        per_turn[AGAIN] = per_turn[OURS]
    fewest = min(per_turn.values(), default=1)
    total = max(pace.rounds, pace.least, math.ceil(pace.runs / fewest))
    if (needed := pace.least * seconds) > pace.budget:
        said(f"{pace.least} rounds take about {needed:.0f} s, more than the budget of {pace.budget:.0f} s")
    for number in range(total):
        if number >= pace.least and clock() - began > pace.budget:
            break
        said(f"round {number + 1} of at most {total}")
        for item in _order(sides, number):
            if found[item.name].status == "ok":
                _turn(item, found[item.name], per_turn[item.name])
    return found


def _order(sides: Sequence[Slot], number: int) -> Sequence[Slot]:
    """Flipped in every other round; who is at the ends, and so has two turns in a row, goes round."""
    first = number // 2 % max(len(sides), 1)
    order = [*sides[first:], *sides[:first]]
    return order if number % 2 == 0 else order[::-1]


def _turn(item: Slot, turns: Turns, runs: int) -> None:
    """One turn. Of short runs the first is not counted: it finds the caches as another side left them."""
    lead = 1 if runs > 1 else 0
    try:
        seconds, figures = item.time(runs + lead)
    except SideError as error:
        turns.status, turns.reason = error.status, error.reason
        return
    turns.rounds.append(seconds[lead:])
    turns.figures += figures[lead:]


def _per_turn(seconds: float, pace: Pace) -> int:
    return max(1, min(round(pace.turn / max(seconds, 1e-6)), pace.most))
