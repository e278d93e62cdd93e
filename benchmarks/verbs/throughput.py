"""`latentrt bench throughput`: pictures a second against the batch, and MLPerf's scenarios (`scenarios.py`).

One side, ours, in a fresh process; every query draws `Case.prompt`. The scenarios are as MLPerf defines them,
but their durations, the model and the data are not: no result is a submission.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ...engines.package import Package
from ..case import Case
from ..process import SideError, SideProcess, Slot
from ..records import Document, Row, Status
from ..rounds import Pace, Turns, interleave
from ..sides.contract import OURS, Task
from .latency import Said, describe_model, settings_of
from .rate_search import Limits, RateSearch, Trial
from .scenarios import (
    OFFLINE,
    SERVER,
    SINGLE_STREAM,
    TAIL,
    Clock,
    HostClock,
    Run,
    allowed_late,
    confidence,
    early_stopping,
    offline,
    poisson_arrivals,
    server,
    single_stream,
)

SWEEP, HIGHEST = "batch sweep", "Server highest rate"  # workloads besides the scenarios' names
NO_SUBMISSION = (
    "MLPerf's scenarios, not its minimum durations, model or data: not a submission (the rules ask for 600 s;"
    " 24,576 samples Offline)"
)
_DEADLINE = 4.0  # times the median of a single query, where no deadline is given


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the scenarios keep to, in place of MLPerf's minimums; all of it stands in the document.

    Attributes:
        queries: of SingleStream and of every run of Server, at least.
        seconds: that SingleStream and every run of Server last, at least.
        samples: of Offline's one query.
        deadline: seconds within which Server answers 99 % of its queries; None is four times the median
            of SingleStream.
        rate: queries a second of a Server run of its own; None for none, or `share`.
        share: of the queries a second that SingleStream answered, in place of `rate`.
        together: so many waiting queries Server draws in one call.
        rounds: of the bisection for Server's highest rate; 0 is no search.
        budget: seconds for each scenario, and for the search (`rate_search.py`); what needs more has fewer
            queries, or no row.
        seed: of the arrivals; every run of Server has the next one.
    """

    queries: int = 64
    seconds: float = 5.0
    samples: int = 64
    deadline: float | None = None
    rate: float | None = None
    share: float | None = None
    together: int = 1
    rounds: int = 2
    budget: float = 240.0
    seed: int = 0

    @classmethod
    def quick(cls) -> Rules:
        """For a look: a rate that one worker keeps up with, in place of a search for the highest."""
        return cls(queries=8, seconds=1.0, samples=8, share=0.5, rounds=0, budget=30.0)


class Worker(Protocol):
    """What serves samples: a side's pictures, so many in one call."""

    def prepare(self, pictures: int) -> float:
        """Be ready for so many at once, before a clock runs; seconds of the first run. Raises SideError."""
        ...

    def serve(self, pictures: int) -> None:
        """Draw them; returns when their pixels are in the host's memory. Raises SideError."""
        ...


@dataclass(frozen=True, kw_only=True)
class PictureWorker:
    """A side process as a worker: a prepared picture for each batch size, in a slot of that name."""

    side: SideProcess
    case: Case
    first: dict[int, float] = field(default_factory=dict[int, float])

    def prepare(self, pictures: int) -> float:
        """As in Worker; once for each batch size."""
        if pictures not in self.first:
            case = replace(self.case, pictures=pictures)
            answer, _ = self.side.prepare("picture", case, slot=str(pictures))
            self.first[pictures] = float(answer["seconds"])
        return self.first[pictures]

    def serve(self, pictures: int) -> None:
        """As in Worker."""
        self.side.time(1, slot=str(pictures))


def measure_throughput(
    package: Package,
    task: Task,
    case: Case,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    rules: Rules | None = None,
    pace: Pace | None = None,
    said: Said = lambda line: None,
) -> Document:
    """Rows "batch sweep" for every batch, then "SingleStream", "Offline", "Server", "Server highest rate".

    Unit "s": a sweep's samples are calls, a scenario's the latencies of its queries in order of arrival.

    Args:
        package: of ours.
        task: how it is opened.
        case: the request; `pictures` is varied.
        batches: pictures per call.
        rules: of the scenarios.
        pace: of the sweep.
        said: is told how far it is.

    Raises:
        SideError: ours cannot be opened.
    """
    rules = rules or Rules()
    said(NO_SUBMISSION)
    with ExitStack() as stack:
        said(f"opening {OURS}")
        side = stack.enter_context(SideProcess(OURS, OURS, task))
        worker = PictureWorker(side=side, case=case)
        rows = sweep(side, worker, case, batches, pace or Pace(), said)
        bench = Scenarios(worker=worker, case=case, rules=rules, said=said, stamp=lambda: side.stamp)
        rows += bench.rows(best_batch(rows))
    settings = {"batches": list(batches), "rules": asdict(rules), "submission": NO_SUBMISSION}
    return Document(
        benchmark="throughput",
        model=describe_model(package),
        settings={**settings, **settings_of(task)},
        rows=tuple(rows),
    )


# ── the sweep ──────────────────────────────────────────────────────────────────────────────────────


def sweep(
    side: SideProcess, worker: Worker, case: Case, batches: Sequence[int], pace: Pace, said: Said
) -> list[Row]:
    """A row for each batch; the batches take turns."""
    first: dict[str, float] = {}
    failed: dict[str, Turns] = {}
    for batch in batches:
        said(f"{batch} pictures a call get ready")
        try:
            first[str(batch)] = worker.prepare(batch)
        except SideError as error:  # too many for the memory, or for an engine's profile
            failed[str(batch)] = Turns(status=error.status, reason=error.reason)
    slots = [Slot(name=name, side=side) for name in first]
    timed = interleave(slots, first, pace, said=lambda line: said(f"batches: {line}")) if slots else {}
    rows: list[Row] = []
    for batch in batches:
        turns = {**timed, **failed}[str(batch)]
        row = Row(
            side=OURS,
            workload=SWEEP,
            case=replace(case, pictures=batch).to_json(),
            rounds=turns.frozen,
            status=turns.status,
            reason=turns.reason,
            stamp=side.stamp,
        )
        rows.append(replace(row, figures=_sweep_figures(row, batch)))
    return rows


def _sweep_figures(row: Row, batch: int) -> dict[str, Any]:
    if not row.samples:
        return {"batch": batch}
    mean = float(np.mean(row.samples))
    return {"batch": batch, "samples_per_s": batch / mean, "s_per_sample": mean / batch, **_percentiles(row)}


def _percentiles(row: Row) -> dict[str, float]:
    return {name: row.summary[name] for name in ("p50", "p90", "p99")}


def best_batch(rows: Sequence[Row]) -> int:
    """Of the rows that were timed, the batch with the most samples a second; 1 if none was."""
    timed = [row.figures for row in rows if row.status == "ok" and row.samples]
    return int(max(timed, key=lambda found: found["samples_per_s"])["batch"]) if timed else 1


# ── the scenarios ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Scenarios:
    """All of them, over one worker."""

    worker: Worker
    case: Case
    rules: Rules
    said: Said
    stamp: Callable[[], Mapping[str, Any]] = dict[str, Any]
    clock: Clock = field(default_factory=HostClock)

    def rows(self, batch: int) -> list[Row]:
        """SingleStream, Offline with calls of `batch`, Server. What fails has a row that says so."""
        alone = self._attempt(SINGLE_STREAM, self._single_stream)
        together = self._attempt(OFFLINE, lambda: self._offline(batch))
        if not alone.samples:
            return [alone, together]
        rules, rows = self.rules, [alone, together]
        deadline = rules.deadline or _DEADLINE * alone.summary["p50"]
        if (rate := rules.rate or (rules.share or 0.0) * alone.figures["samples_per_s"]) > 0:
            rows.append(self._attempt(SERVER, lambda: self._fixed(rate, deadline)))
        known = [1 / alone.summary["p50"]]
        if rules.together > 1:
            known.append(float(together.figures.get("samples_per_s", 0.0)))
        capacity = max(known)
        if rules.rounds:
            rows.append(self._attempt(HIGHEST, lambda: self._highest(capacity, deadline, alone.samples)))
        return rows

    def _single_stream(self) -> Row:
        rules, serve = self.rules, self.worker.serve
        self.said(f"SingleStream: at least {rules.queries} queries and {rules.seconds:g} s")
        self.worker.prepare(1)
        run = single_stream(serve, rules.queries, rules.seconds, budget=rules.budget, clock=self.clock)
        return self._row(run)

    def _offline(self, batch: int) -> Row:
        """One query; of fewer samples where the budget is short."""
        first = self.worker.prepare(batch)
        fit = batch * max(1, int(self.rules.budget / max(first, 1e-9)))
        samples = min(max(self.rules.samples, batch), fit)
        if rest := samples % batch:
            self.worker.prepare(rest)
        self.said(f"Offline: one query of {samples} samples, {batch} a call")
        return self._row(offline(self.worker.serve, samples, batch, clock=self.clock), batch=batch)

    def _fixed(self, rate: float, deadline: float) -> Row:
        """Server at one rate, however late its queries are."""
        rules = self.rules
        trial = Trial(rate=rate, queries=max(rules.queries, math.ceil(rate * rules.seconds)), seed=rules.seed)
        if (takes := trial.queries / rate) > rules.budget:
            reason = f"{trial.queries} queries arrive in {takes:.0f} s: more than {rules.budget:.0f} s"
            return self._nothing(SERVER, "not available", reason)
        return self._server(SERVER, trial, deadline, allowed=trial.queries)

    def _server(self, workload: str, trial: Trial, deadline: float, allowed: int) -> Row:
        """One run, which ends when more than `allowed` queries were late."""
        most = self.rules.together
        self.said(f"{workload}: {trial.queries} queries, {trial.rate:.3g} a second")
        for pictures in range(1, most + 1):
            self.worker.prepare(pictures)
        run = server(
            self.worker.serve,
            poisson_arrivals(trial.rate, trial.queries, trial.seed),
            most=most,
            deadline=deadline,
            allowed=allowed,
            clock=self.clock,
        )
        return self._row(run, workload, batch=most, rate=trial.rate, deadline_s=deadline)

    def _highest(self, capacity: float, deadline: float, services: Sequence[float]) -> Row:
        """The run at the highest rate that kept the deadline."""
        rules = self.rules
        limits = Limits(
            capacity=capacity,
            deadline=deadline,
            fewest=math.ceil(rules.queries / 2),
            shortest=rules.seconds,
            rounds=rules.rounds,
            budget=rules.budget,
            seed=rules.seed + 1,
        )
        if limits.needed > limits.budget:
            reason = f"runs of {limits.fewest} queries: it needs a budget of {limits.needed:.0f} s or more"
            return self._nothing(HIGHEST, "not available", reason)
        search = RateSearch(
            measure=lambda trial: self._server(HIGHEST, trial, deadline, allowed_late(trial.queries)),
            now=self.clock.now,
            limits=limits,
        )
        found, figures = search.find(services if rules.together == 1 else ())
        if found is not None:
            return found
        lowest = min(row.figures["rate"] for row in search.tried)
        nothing = self._nothing(
            HIGHEST, "ok", f"no rate down to {lowest:.3g} a second kept {deadline:.3g} s in its last run"
        )
        return replace(nothing, figures={**nothing.figures, **figures})

    def _row(self, run: Run, workload: str = "", *, batch: int = 1, **figures: Any) -> Row:
        tail = TAIL.get(run.scenario)
        known: dict[str, Any] = {"scenario": run.scenario, "batch": batch, "samples": run.samples}
        if len(run.queries) > 1:  # Offline has one, which has no distribution
            known |= {f"p{percent}": run.percentile(percent) for percent in (50, 90, 99)}
        known |= {"samples_per_s": run.samples_per_s, "seconds": run.seconds, **figures}
        if tail is not None:
            known["early_stopping"] = {"percentile": tail, "s": early_stopping(run.latencies, tail)}
        if "deadline_s" in figures:
            late = sum(seconds > figures["deadline_s"] for seconds in run.latencies)
            known |= {"late": late, "met": late <= allowed_late(run.samples)}
            known["confidence"] = confidence(run.samples, late)
            known["scheduled_per_s"] = len(run.queries) / max(query.arrived for query in run.queries)
            known["waited_mean_s"] = float(np.mean([query.waited for query in run.queries]))
            known["batch_mean"] = float(np.mean([query.batch for query in run.queries]))
        return Row(
            side=OURS,
            workload=workload or run.scenario,
            case=replace(self.case, pictures=batch).to_json(),
            rounds=(run.latencies,),
            figures=known,
            stamp=self.stamp(),
        )

    def _nothing(self, workload: str, status: Status, reason: str) -> Row:
        return Row(
            side=OURS,
            workload=workload,
            case=self.case.to_json(),
            status=status,
            reason=reason,
            figures={"scenario": workload.split()[0]},
            stamp=self.stamp(),
        )

    def _attempt(self, workload: str, measure: Callable[[], Row]) -> Row:
        try:
            return measure()
        except SideError as error:
            return self._nothing(workload, error.status, error.reason)
