"""`latentrt bench throughput`: pictures per second by batch, and two of MLPerf's scenarios.

    SingleStream   one query after the other; the metric is the 90th percentile of their latencies
    Offline        one query of many samples, in calls of the best batch; the metric is samples per second

They are defined in mlcommons/inference_policies, inference_rules.adoc, "Scenarios".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter

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
    batches: Sequence[int],
    rules: Rules,
    pace: Pace,
    progress: Progress = silent,
) -> Document:
    """Rows "batch sweep" for every batch, then "SingleStream" and "Offline", of our side in a fresh process.

    Samples are seconds: of a call in the sweep, of a query in a scenario. `batches` are pictures per call.

    Raises:
        SideError: our side cannot be opened.
    """
    progress(NO_SUBMISSION)
    with SideProcess(OURS, OURS, task) as side:
        points = {str(batch): replace(case, pictures=batch) for batch in batches}
        rows = [_with_rate(row) for row in time_points(side, "picture", points, pace, progress)]
        best = max(rows, key=lambda row: row.figures.get("samples_per_s", 0.0)).case["pictures"]
        for scenario, batch in ((SINGLE_STREAM, 1), (OFFLINE, best)):
            progress(f"{scenario}: {batch} a call")
            asked = replace(case, pictures=batch)
            row = Row(side=OURS, workload=scenario, case=asked.to_json(), stamp=side.stamp)
            try:
                answer, _ = side.prepare("picture", asked)  # before a clock runs
                if scenario == SINGLE_STREAM:
                    calls = queries = _single_stream(side, rules)
                else:
                    most = max(1, min(rules.samples // batch, int(rules.budget / answer["seconds"])))
                    calls = [_draw(side) for _ in range(most)]
                    queries = [sum(calls)]
            except SideError as error:
                rows.append(replace(row, status=error.status, reason=error.reason))
                continue
            samples = batch * len(calls)
            figures = {"samples": samples, "samples_per_s": samples / sum(calls)}
            rows.append(replace(row, rounds=(tuple(queries),), figures=figures))
    settings = {"batches": list(batches), "rules": asdict(rules), "submission": NO_SUBMISSION}
    return document_of("throughput", package, task, rows, settings)


def _with_rate(row: Row) -> Row:
    figures = {"samples_per_s": row.case["pictures"] / row.summary["mean"]} if row.samples else {}
    return replace(row, workload=SWEEP, figures=figures)


def _single_stream(side: SideProcess, rules: Rules) -> list[float]:
    """Latencies of queries, one after the other, until there are enough of them and enough time is over."""
    latencies: list[float] = []
    while (total := sum(latencies)) < rules.budget and (
        len(latencies) < rules.queries or total < rules.seconds
    ):
        latencies.append(_draw(side))
    return latencies


def _draw(side: SideProcess) -> float:
    """Seconds until the pixels are in the host's memory, by this process's clock: a query's latency."""
    began = perf_counter()
    side.time(1)
    return perf_counter() - began
