"""MLPerf Inference's scenarios over one worker: who asks when, who waits for how long, what the metric is.

The words are those of its rules (mlcommons/inference_policies, inference_rules.adoc, "Scenarios" and "Load
Generator"); the minimum durations are not, so that nothing measured with this is a submission.

    SingleStream   a query of one sample, the next when it is answered; the metric is the 90th percentile
    Offline        one query of all samples; the metric is samples per second
    Server         queries of one sample arrive as a Poisson process, whatever the worker does; the metric is
                   the highest rate at which the 99th percentile keeps the deadline

A latency counts "from the time when the query was scheduled to be passed to the system, to the time it
receives a reply": waiting is part of it. Nothing here knows what is served or which clock it is.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SINGLE_STREAM, OFFLINE, SERVER = "SingleStream", "Offline", "Server"
TAIL = {SINGLE_STREAM: 90, SERVER: 99}  # percentile of each scenario's metric
CONFIDENCE = 0.99  # of the early-stopping estimate (appendix "Early Stopping Criterion": c = .99, d = 0)
_SIMULATED, _HALVINGS = 50_000, 16  # queries of the simulated queue; of the distance between two rates
_SMALL_DELTA = 0.05  # by which a rate is lowered that was found, but not met a second time

Serve = Callable[[int], None]  # so many samples at once; returns when they are answered


class Clock(Protocol):
    """Of the worker."""

    def now(self) -> float:
        """Seconds since whenever."""
        ...

    def wait_until(self, moment: float) -> None:
        """Return at `moment`, or at once if that is past."""
        ...


class HostClock:
    """The machine's own."""

    def now(self) -> float:
        """Seconds, monotonic."""
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        """Sleep."""
        while (left := moment - time.perf_counter()) > 0:
            time.sleep(left)


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query's life, in seconds since the run began; `batch` queries were served together."""

    arrived: float
    began: float
    ended: float
    batch: int = 1

    @property
    def latency(self) -> float:
        """From arrival to answer."""
        return self.ended - self.arrived

    @property
    def waited(self) -> float:
        """Of that, before the worker began."""
        return self.began - self.arrived


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a scenario recorded: its queries in the order of their arrival, and how many samples they had."""

    scenario: str
    queries: tuple[Query, ...]
    samples: int

    @property
    def latencies(self) -> tuple[float, ...]:
        """Seconds, in the order of arrival."""
        return tuple(query.latency for query in self.queries)

    @property
    def seconds(self) -> float:
        """Until the last answer."""
        return max(query.ended for query in self.queries)

    @property
    def samples_per_s(self) -> float:
        """Answered."""
        return self.samples / self.seconds

    def percentile(self, percent: float) -> float:
        """Of the latencies, seconds."""
        return float(np.percentile(self.latencies, percent))


def single_stream(
    serve: Serve, queries: int, seconds: float, *, budget: float = math.inf, clock: Clock | None = None
) -> Run:
    """One query after the other, until there were `queries` of them and `seconds` are over.

    `budget`: seconds after which it ends in any case, but never before one query.
    """
    clock = clock or HostClock()
    start, done = clock.now(), list[Query]()
    while True:
        began = clock.now() - start
        serve(1)
        ended = clock.now() - start
        done.append(Query(arrived=began, began=began, ended=ended))
        if ended >= budget or (len(done) >= queries and ended >= seconds):
            return Run(scenario=SINGLE_STREAM, queries=tuple(done), samples=len(done))


def offline(serve: Serve, samples: int, batch: int, *, clock: Clock | None = None) -> Run:
    """One query of all samples, served in calls of `batch`; the last call may have fewer."""
    clock = clock or HostClock()
    start = clock.now()
    for first in range(0, samples, batch):
        serve(min(batch, samples - first))
    query = Query(arrived=0.0, began=0.0, ended=clock.now() - start)
    return Run(scenario=OFFLINE, queries=(query,), samples=samples)


def poisson_arrivals(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """`count` moments in seconds: the gaps are exponential and independent, 1 / `rate` on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return tuple(np.cumsum(gaps).tolist())


def server(
    serve: Serve,
    arrivals: Sequence[float],
    *,
    most: int = 1,
    deadline: float = math.inf,
    allowed: int = 0,
    clock: Clock | None = None,
) -> Run:
    """One worker and a queue, first come, first served.

    The worker is never waited for: arrivals are fixed beforehand, and a query that arrives while the worker
    is busy waits. One thread is enough for that, as a query that waits does nothing.

    Args:
        serve: the worker.
        arrivals: seconds since the beginning, ascending.
        most: so many of the queries that wait are served in one call.
        deadline: seconds; when more than `allowed` queries took longer, the run has failed, and ends there.
        allowed: see `deadline`.
        clock: the machine's unless given.
    """
    clock = clock or HostClock()
    start, done, late = clock.now(), list[Query](), 0
    while len(done) < len(arrivals) and late <= allowed:
        first = len(done)
        clock.wait_until(start + arrivals[first])
        began = max(clock.now() - start, arrivals[first])
        batch = min(bisect_right(arrivals, began, lo=first) - first, most)
        serve(batch)
        ended = clock.now() - start
        done += [
            Query(arrived=arrived, began=began, ended=ended, batch=batch)
            for arrived in arrivals[first : first + batch]
        ]
        late += sum(query.latency > deadline for query in done[first:])
    return Run(scenario=SERVER, queries=tuple(done), samples=len(done))


def highest_rate(
    meets: Callable[[float, int], bool],
    low: float,
    high: float,
    rounds: int,
    *,
    confirm: Callable[[float, int], bool] | None = None,
    seed: int = 0,
    confirmations: int = 4,
) -> float | None:
    """The highest rate that keeps the deadline, by bisection of what is between two rates.

    What bisection found may have been one seed's luck, so that it must be met once more with another. If it
    is not, it is lowered by a twentieth and tried again, as LoadGen does; then by a tenth, then by a fifth,
    so that few runs get anywhere.

    Args:
        meets: whether a run at that rate with that seed keeps the deadline.
        low: queries per second; it is not tried unless nothing above it was met. 0 is never tried.
        high: more than the worker can do.
        rounds: of the bisection.
        confirm: as `meets`, of the runs that come last; they may be longer. Default: `meets`.
        seed: of the first run; every later run has the next one.
        confirmations: how often a rate is tried at the end, at most.

    Returns:
        A rate that was met in its last run; None if none was.
    """
    confirm = confirm or meets
    for number in range(rounds):
        rate = (low + high) / 2
        if meets(rate, seed + number):
            low = rate
        else:
            high = rate
    for number in range(confirmations if low else 0):
        if confirm(low, seed + rounds + number):
            return low
        low *= 1 - _SMALL_DELTA * 2**number
    return None


def expected_rate(services: Sequence[float], deadline: float, percent: float = TAIL[SERVER]) -> float:
    """At which `percent` of Poisson arrivals should be answered within `deadline` seconds; 0 if at no rate.

    A simulated queue, one worker, first come, first served, whose service times are drawn from `services`
    (seconds). It takes no time and proves nothing: it tells where to begin to measure.
    """
    random = np.random.default_rng(0)
    served = random.choice(np.asarray(services, np.float64), _SIMULATED)
    gaps = random.exponential(1.0, _SIMULATED)
    low, high = 0.0, 1 / float(served.mean())
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        # Lindley's recursion w' = max(0, w + service - gap) is the walk less its lowest point so far
        walk = np.concatenate([[0.0], np.cumsum(served[:-1] - gaps[1:] / rate)])
        latencies = walk - np.minimum.accumulate(walk) + served
        low, high = (rate, high) if np.percentile(latencies, percent) <= deadline else (low, rate)
    return low if high - low < low else 0.0  # it closes in on a rate, or on none


def allowed_late(queries: int) -> int:
    """How many of a run's queries may be late if its own 99th percentile is to keep the deadline.

    As many as NumPy's percentile leaves above the two latencies that it lies between.
    """
    return (queries - 1) // 100


def confidence(queries: int, late: int, percent: float = TAIL[SERVER]) -> float:
    """How sure it is that `percent` of all queries are in time, after so many of which `late` were not.

    One less the probability that a system which is in time with a probability of exactly `percent` has so
    few late queries, or fewer (binomial): the level that `most_late` sets to .99. Queries in one queue are
    late together, so that it is less sure than if they were independent; MLPerf leaves that aside too.
    """
    return 1 - sum(_probability(queries, t, 1 - percent / 100) for t in range(late + 1))


def most_late(queries: int, percent: float, confidence: float = CONFIDENCE) -> int | None:
    """How many of so many queries may be late, if `percent` of all are to be in time with that confidence.

    The largest t for which a system that is in time with a probability of exactly `percent` would have t or
    fewer late queries with a probability of at most 1 - `confidence` (binomial); None if even t = 0 is more
    likely than that: too few queries to tell.
    """
    late, below, found = 1 - percent / 100, 0.0, None
    for t in range(queries + 1):
        below += _probability(queries, t, late)
        if below > 1 - confidence:
            break
        found = t
    return found


def _probability(queries: int, late: int, share: float) -> float:
    """That exactly so many of the queries are late, if that share of all is."""
    ways = math.lgamma(queries + 1) - math.lgamma(late + 1) - math.lgamma(queries - late + 1)
    return math.exp(ways + late * math.log(share) + (queries - late) * math.log1p(-share))


def early_stopping(latencies: Sequence[float], percent: float) -> float | None:
    """MLPerf's estimate of a percentile that a short run can vouch for; None where it is too short.

    "Discard the t - 1 highest latency queries, report the maximum latency of the remaining": it is above the
    percentile itself, the more so the fewer queries there were.
    """
    allowed = most_late(len(latencies), percent)
    return sorted(latencies)[-allowed] if allowed else None
