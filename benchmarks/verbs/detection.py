"""Does `compare` find a slowdown, and pass an A/A pair? `python -m latentrt.benchmarks.verbs.detection`.

Each trial measures two documents of the demo model afresh, in an order that flips from trial to trial: ours,
and ours made slower (`Task.slow_down`). `compare` judges each of them against the unslowed one of the
trial before. It is right if it reports no regression of the pair, and one of the planted slowdown.

Trials are added to --out FILE if it is there, so that a long run can be done in pieces: --first says where.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ...engines.package import Package
from ...runtime.pipeline import SHIPPED
from ..case import Case
from ..records import Document, Row, read_document
from ..rounds import Pace
from ..sides.contract import AGAIN, OURS, YARDSTICK, Task
from .compare import THRESHOLD, Comparison, compare
from .latency import Sides, describe_model, measure_latency

PLANTED = 0.10
PAIR, SLOWED = "A/A pair", "planted slowdown"
WORKLOADS = ("unet",)
SECONDS = 8.0  # of timed runs, for each workload of a document
TURN = 0.1  # seconds

Measure = Callable[[float], Document]


def run_trials(measure: Measure, numbers: Iterable[int]) -> Iterator[Row]:
    """Two rows for each trial, as soon as it is done: of the pair and of the planted slowdown.

    Args:
        measure: a fresh document, of ours slowed down by this share.
        numbers: of the trials; they decide on the order of the measurements.
    """
    before = measure(0.0)
    for number in numbers:
        order = (PAIR, SLOWED) if number % 2 else (SLOWED, PAIR)
        found = {name: measure(PLANTED if name == SLOWED else 0.0) for name in order}
        for name in (PAIR, SLOWED):
            comparison = compare(before, found[name])
            yield _row(name, number, comparison, comparison.regressed == (name == SLOWED))
        before = found[PAIR]


def _row(name: str, number: int, comparison: Comparison, right: bool) -> Row:
    verdicts = {f"{row.side}, {row.workload}": row.verdict for row in comparison.rows}
    return Row(
        side=OURS,
        workload=name,
        case={"trial": number, "slow_down": PLANTED if name == SLOWED else 0.0},
        unit="1",
        rounds=(tuple(row.ratio.value for row in comparison.rows if row.ratio),),
        status="ok" if right else "FAILED",
        reason="" if right else f"the verdicts were {verdicts}",
        figures=comparison.to_json(),
    )


def _measure_with(package: Package) -> Measure:
    case = Case.of(package.manifest)
    pace = Pace(runs=1, rounds=1_000_000, budget=SECONDS, turn=TURN, warm_up=2)

    def measure(slow_down: float) -> Document:
        task = Task(package=package.root, slow_down=slow_down)
        sides = Sides(task=task, references=(AGAIN, YARDSTICK))
        return measure_latency(package, sides, [case], workloads=WORKLOADS, pace=pace)

    return measure


def main(arguments: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """The exit code: 1 if `compare` was wrong even once. Tests measure with a function of their own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON document; trials are added to it")
    parser.add_argument("--pairs", type=int, default=20, help="trials")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    options = parser.parse_args(arguments)
    package = Package.open(SHIPPED["demo"])
    model = {**describe_model(package), "name": "demo"}
    settings = {"seconds": SECONDS, "threshold": THRESHOLD, "slow_down": PLANTED, "workloads": WORKLOADS}
    rows = list(read_document(options.out).rows) if options.out.is_file() else []
    failed = False
    numbers = range(options.first, options.first + options.pairs)
    for row in run_trials(measure or _measure_with(package), numbers):
        rows.append(row)
        document = Document(benchmark="detection", model=model, settings=settings, rows=tuple(rows))
        document.write(options.out)
        failed = document.failed
        ratios = ", ".join(f"x {ratio:.3f}" for ratio in row.samples)
        print(f"{row.case['trial']:3}  {row.workload}: {ratios}  {row.status} {row.reason}", flush=True)
    for name in (SLOWED, PAIR):
        right = [row.status == "ok" for row in rows if row.workload == name]
        print(f"{name}: right {sum(right)} of {len(right)} times")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
