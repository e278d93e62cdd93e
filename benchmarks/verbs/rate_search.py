"""The search for the highest rate at which Server keeps its deadline, within a budget of seconds.

    where to look   the rate that a simulated queue, with the services of SingleStream, would keep up with
    bisection       around it, with short runs: a third of the budget
    confirmation    a longer run at the rate that was found; lowered, and run again, if it is not met

A run ends at once when it has failed, so that rates beyond the worker take little of the budget. A run's p99
is worth as much as its queries: `confidence` says how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..records import Row
from .scenarios import expected_rate, highest_rate

VOUCHED = 662  # queries, the fewest that MLPerf's early stopping takes a p99 from; no run needs more
_BISECTION, _CONFIRMATION = 0.3, 0.65  # of the budget; of what is then left, for each run that confirms
_AROUND = 0.3  # of the expected rate: so far below and above it the bisection goes
_USUAL = 0.6  # of the capacity: where the highest rate is, about, when nothing is known yet


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of Server: queries per second, how many, and the arrivals' seed."""

    rate: float
    queries: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a search.

    Attributes:
        capacity: queries per second that no worker exceeds.
        deadline: seconds for 99 % of the queries.
        fewest: queries of a run.
        shortest: seconds that a run lasts, at least, where the budget allows.
        rounds: of the bisection.
        budget: seconds for all runs.
        seed: of the first run.
    """

    capacity: float
    deadline: float
    fewest: int
    shortest: float
    rounds: int
    budget: float
    seed: int

    @property
    def needed(self) -> float:
        """Seconds without which even the bisection has too few queries."""
        return self.fewest * self.rounds / (_USUAL * self.capacity) / _BISECTION


@dataclass(kw_only=True)
class RateSearch:
    """Tries rates, and keeps every run.

    Attributes:
        measure: one run, which ends when it has failed; its figures have `met`.
        now: seconds, of the worker's clock.
        limits: see Limits.
        tried: every run so far.
        ends: the moment when the budget is over.
    """

    measure: Callable[[Trial], Row]
    now: Callable[[], float]
    limits: Limits
    tried: list[Row] = field(default_factory=list[Row])
    ends: float = 0.0

    def find(self, services: Sequence[float] = ()) -> tuple[Row | None, dict[str, Any]]:
        """The run that confirmed the highest rate, None if there was none; and what is to be told besides.

        `services`: seconds that single queries took, if the worker serves one at a time. The slowest tenth
        count as their p90: a hiccup should not decide where to look.
        """
        limits = self.limits
        self.ends = self.now() + limits.budget
        slow = float(np.percentile(services, 90)) if services else 0.0
        usual = [min(seconds, slow) for seconds in services]
        expected = expected_rate(usual, limits.deadline) if usual else 0.0
        low, high = (1 - _AROUND) * expected, min((1 + _AROUND) * expected, limits.capacity)
        if not expected:
            low, high = 0.0, limits.capacity
        found = highest_rate(self._meets, low, high, limits.rounds, confirm=self._confirms, seed=limits.seed)
        names = ("rate", "samples", "late", "p99", "met", "seconds")
        runs = [{name: row.figures.get(name) for name in names} for row in self.tried]
        figures = {"capacity": limits.capacity, "expected": expected or None, "runs": runs}
        figures |= {"resolution": (high - low) / 2**limits.rounds, "budget_s": limits.budget}
        if found is None:
            return None, {**figures, "rate": None, "met": False}
        return replace(self.tried[-1], figures={**self.tried[-1].figures, **figures}), figures

    def _meets(self, rate: float, seed: int) -> bool:
        return self._try(rate, seed, _BISECTION * self.limits.budget / self.limits.rounds)

    def _confirms(self, rate: float, seed: int) -> bool:
        """With most of the time that is left; the rest is for a lower rate, should it fail."""
        left = self.ends - self.now()
        return left * rate >= self.limits.fewest and self._try(rate, seed, _CONFIRMATION * left)

    def _try(self, rate: float, seed: int, seconds: float) -> bool:
        limits = self.limits
        most = max(VOUCHED, math.ceil(rate * limits.shortest))
        queries = min(max(int(rate * seconds), limits.fewest), most)
        self.tried.append(self.measure(Trial(rate=rate, queries=queries, seed=seed)))
        return bool(self.tried[-1].figures["met"])
