"""`latentrt bench throughput`: pictures per second by batch, and two of MLPerf's scenarios.

    SingleStream   one query after the other; the metric is the 90th percentile of their latencies
    Offline        one query of many samples, in calls of the best batch; the metric is samples per second

The scenarios are defined in mlcommons/inference_policies, inference_rules.adoc, "Scenarios". Their minimum
durations, model and data are not kept to: no result is a submission.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.package import Package
from ..case import Case
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..rounds import Pace
from ..sides.contract import OURS, Task
from .latency import Progress, document_of, silent
from .scaling import time_points

SWEEP, SINGLE_STREAM, OFFLINE = "batch sweep", "SingleStream", "Offline"
NO_SUBMISSION = (
    "MLPerf's scenarios, not its minimum durations, model or data: not a submission (the rules ask for 600 s;"
    " 24,576 samples Offline)"
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the scenarios keep to, in place of MLPerf's minimums; all of it is written into the document.

    Attributes:
        queries: of SingleStream, at least.
        seconds: that SingleStream lasts, at least.
        samples: of Offline's one query.
        budget: seconds for each scenario; what needs more has fewer queries or samples.
    """

    queries: int = 64
    seconds: float = 5.0
    samples: int = 64
    budget: float = 240.0

    @classmethod
    def quick(cls) -> Rules:
        """For a look."""
        return cls(queries=8, seconds=1.0, samples=8, budget=30.0)


def measure_throughput(
    package: Package,
    task: Task,
    case: Case,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    rules: Rules | None = None,
    pace: Pace | None = None,
    progress: Progress = silent,
) -> Document:
    """Rows "batch sweep" for every batch, then "SingleStream" and "Offline", of our side in a fresh process.

    Samples are seconds: of a call in the sweep, of a query in a scenario. `batches` are pictures per call.

    Raises:
        SideError: our side cannot be opened.
    """
    rules = rules or Rules()
    progress(NO_SUBMISSION)
    with SideProcess(OURS, OURS, task) as side:
        points = {str(batch): replace(case, pictures=batch) for batch in batches}
        rows = [_with_rates(row) for row in time_points(side, "picture", points, pace or Pace(), progress)]
        bench = _Scenarios(side=side, case=case, rules=rules, progress=progress)
        rows.append(bench.attempt(SINGLE_STREAM, bench.single_stream))
        rows.append(bench.attempt(OFFLINE, lambda: bench.offline(best_batch(rows))))
    settings = {"batches": list(batches), "rules": asdict(rules), "submission": NO_SUBMISSION}
    return document_of("throughput", package, task, rows, settings)


def _with_rates(row: Row) -> Row:
    batch = row.case["pictures"]
    figures: dict[str, Any] = {"batch": batch}
    if row.samples:
        mean = float(np.mean(row.samples))
        figures |= {"samples_per_s": batch / mean, "s_per_sample": mean / batch, **_percentiles(row)}
    return replace(row, workload=SWEEP, figures=figures)


def _percentiles(row: Row) -> dict[str, float]:
    return {name: row.summary[name] for name in ("p50", "p90", "p99")}


def best_batch(rows: Sequence[Row]) -> int:
    """The batch of the sweep with the most samples per second; 1 if none was timed."""
    timed = [row.figures for row in rows if row.workload == SWEEP and row.status == "ok" and row.samples]
    return int(max(timed, key=lambda figures: figures["samples_per_s"])["batch"]) if timed else 1


@dataclass(frozen=True, kw_only=True)
class _Scenarios:
    side: SideProcess
    case: Case
    rules: Rules
    progress: Progress

    def single_stream(self) -> Row:
        """One query after the other, until there are enough of them and enough time is over."""
        rules = self.rules
        self.progress(f"{SINGLE_STREAM}: at least {rules.queries} queries and {rules.seconds:g} s")
        self._prepare(1)
        latencies: list[float] = []
        total = 0.0
        while total < rules.budget and (len(latencies) < rules.queries or total < rules.seconds):
            latencies.append(self._draw(1))
            total = sum(latencies)
        row = self._row(SINGLE_STREAM, latencies, batch=1, samples=len(latencies))
        return replace(row, figures={**row.figures, **_percentiles(row)})

    def offline(self, batch: int) -> Row:
        """One query of all samples; the last call may have fewer, and so may the query if time is short."""
        fit = batch * max(1, int(self.rules.budget / max(self._prepare(batch), 1e-9)))
        samples = min(max(self.rules.samples, batch), fit)
        calls = [batch] * (samples // batch) + [samples % batch] * bool(samples % batch)
        for size in {*calls} - {batch}:
            self._prepare(size)
        self.progress(f"{OFFLINE}: one query of {samples} samples, {batch} a call")
        began = perf_counter()
        for size in calls:
            self._draw(size)
        return self._row(OFFLINE, [perf_counter() - began], batch=batch, samples=samples)

    def attempt(self, workload: str, measure: Callable[[], Row]) -> Row:
        """The row, or one that says why there is none."""
        try:
            return measure()
        except SideError as error:
            row = Row(side=OURS, workload=workload, case=self.case.to_json(), stamp=self.side.stamp)
            return replace(row, status=error.status, reason=error.reason, figures={"scenario": workload})

    def _prepare(self, pictures: int) -> float:
        """Seconds of a first picture call of that batch, before a clock runs."""
        answer, _ = self.side.prepare("picture", replace(self.case, pictures=pictures), slot=str(pictures))
        return float(answer["seconds"])

    def _draw(self, pictures: int) -> float:
        """Seconds until the pixels are in the host's memory, by this process's clock: a query's latency."""
        began = perf_counter()
        self.side.time(1, slot=str(pictures))
        return perf_counter() - began

    def _row(self, scenario: str, latencies: Sequence[float], *, batch: int, samples: int) -> Row:
        seconds = sum(latencies)
        figures = {"scenario": scenario, "batch": batch, "samples": samples}
        return Row(
            side=OURS,
            workload=scenario,
            case=replace(self.case, pictures=batch).to_json(),
            rounds=(tuple(latencies),),
            figures={**figures, "samples_per_s": samples / seconds, "seconds": seconds},
            stamp=self.side.stamp,
        )
