"""`latentrt bench memory`: what each side holds, by stage, over one request, and from step to step.

Memory is looked at from outside the process, every few milliseconds: resident memory in /proc, and what NVML
says that the process holds on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ...engines.net_weights import engine_bytes
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS, Array
from ..case import HOST_NETS, Case
from ..machine import clocks, describe_machine, resident_bytes
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..sides.contract import AGAIN, CEILING, OURS, WATCHED, Task
from ..sides.watched import GROWTH, SETTLED, STEADY, TIMELINE, growth_per_step
from .latency import Progress, Sides, check, document_of, silent
from .memory_watch import Watch, holding, measure_baselines, on_a_grid, sampled

OPENED, FIRST, PEAK, LEDGER = "opened", "first picture", "peak", "ledger"
ON_DEVICE = "device "  # before the first three, where there is a GPU
STEPS = 100
INTERVAL = 0.005  # seconds between samples
_PARTS = ("weights", "activations", "io")  # of a net's ledger
_WARM = 2  # pictures after the first one, before the peak is read
_SAMPLES = 1000  # of a timeline, at most; longer requests have longer intervals
NO_PROC = "only Linux tells another process's resident memory (/proc)"


def measure_memory(
    package: Package, sides: Sides, case: Case, *, steps: int = STEPS, progress: Progress = silent
) -> Document:
    """Every side in a fresh process, alone; then our timeline, and what our steps leave behind.

    docs/benchmarks.md has the rows, which are in bytes. `over_weights` is the most of a row over the model's
    weights at the width of the arithmetic.

    Raises:
        SideError: our side cannot be opened.
    """
    progress("an empty interpreter, and on a GPU an empty CUDA context")
    bench = Bench(package, sides.task, case, *measure_baselines(INTERVAL))
    rows: list[Row] = []
    wanted: Mapping[str, Array] = {}
    for name in sides.names:
        if name == CEILING:  # holds no model
            continue
        progress(f"{name}: opens, and draws {1 + _WARM} pictures")
        found, outputs = measure_side(bench, name, wanted)
        rows += found
        wanted = wanted or outputs
    for workload, measure in ((TIMELINE, timeline), (GROWTH, partial(growth, steps=steps))):
        progress(f"our {workload}")
        try:
            rows.append(measure(bench))
        except SideError as error:
            rows.append(Row(side=OURS, workload=workload, status=error.status, reason=error.reason))
    nets = {*HOST_NETS, *TEXT_ENCODERS} & package.manifest.nets.keys()
    weights = sum(engine_bytes(package, net) for net in nets)
    whole = (_over_weights(row, case, weights) for row in rows)
    return document_of("memory", package, sides.task, whole, {"peers": sides.peers})


def _over_weights(row: Row, case: Case, weights: int) -> Row:
    """The row in bytes, with its case, and the most of it over the weights."""
    ratio = {"weights": weights, "over_weights": max(row.samples) / weights} if row.samples else {}
    stamp = row.stamp or {**describe_machine(), **clocks()}
    return replace(row, unit="B", case=case.to_json(), figures={**row.figures, **ratio}, stamp=stamp)


class Bench(NamedTuple):
    """What is drawn, and what an empty process holds.

    `watch` looks at the GPU. `interpreter` is in bytes, 0 but on Linux; `context` is that of CUDA, None
    without a GPU or where NVML does not tell.
    """

    package: Package
    task: Task
    case: Case
    watch: Watch
    interpreter: int
    context: int | None


# ── sides ──────────────────────────────────────────────────────────────────────────────────────────


def measure_side(
    bench: Bench, name: str, wanted: Mapping[str, Array]
) -> tuple[list[Row], Mapping[str, Array]]:
    """A side's rows, and its picture; a peer whose picture is not `wanted` has a row that FAILED.

    Raises:
        SideError: our side cannot be opened.
    """
    before = bench.watch()
    stages: dict[str, tuple[int, tuple[int, int]]] = {}  # looks until then, and what was resident
    try:
        with (
            sampled(bench.watch, INTERVAL) as looks,
            SideProcess(name, OURS if name == AGAIN else name, bench.task) as item,
        ):
            pid = item.pid
            stages[OPENED] = len(looks), resident_bytes(pid)
            outputs = item.prepare("picture", bench.case)[1]
            stages[FIRST] = len(looks), resident_bytes(pid)
            item.time(_WARM)
            stages[PEAK] = len(looks), resident_bytes(pid)
            own, stamp = item.ask(do="memory")["own"], item.stamp
        if wanted:
            check(outputs, wanted, bench.package)
    except SideError as error:
        if name == OURS and not stages:
            raise
        return [Row(side=name, workload=OPENED, status=error.status, reason=error.reason)], {}

    rows = [_resident(bench, stage, *found) for stage, (_, found) in stages.items()]
    if before is not None:
        for stage, (count, _) in stages.items():
            seen = [look for _, look in looks[: max(count, 1)]]
            rows.append(_on_device(bench, stage, *holding(pid, before, seen)))
    return [replace(row, side=name, stamp=stamp) for row in (*rows, _ledger(own))], outputs


def _resident(bench: Bench, stage: str, now: int, peak: int) -> Row:
    if not (now and bench.interpreter):
        return _missing(stage, NO_PROC)
    size = (peak if stage == PEAK else now) - bench.interpreter
    return _row(stage, [size], rss=now, peak=peak, empty_interpreter=bench.interpreter)


def _on_device(bench: Bench, stage: str, held: list[int], known_by: str) -> Row:
    if not held or bench.context is None:
        return _missing(ON_DEVICE + stage, "NVML does not tell what it holds, if anything")
    whole = max(held) if stage == PEAK else held[-1]
    figures = {"whole": whole, "empty_context": bench.context, "measured_by": known_by}
    return _row(ON_DEVICE + stage, [max(0, whole - bench.context)], **figures)


def _ledger(own: dict[str, Any]) -> Row:
    """What the side counts itself, in total and by net, and whatever else it tells."""
    if not own:
        return _missing(LEDGER, "it does not tell what it holds")
    nets: Mapping[str, Mapping[str, int | None]] = own.pop("ledger", {})
    known = sum(net.get(part) or 0 for net in nets.values() for part in _PARTS) + own.get("scratch", 0)
    return _row(LEDGER, [known] if nets else [], nets=nets, **own)


def _row(workload: str, samples: Sequence[float], **figures: Any) -> Row:
    rounds = (tuple(map(float, samples)),) if samples else ()
    return Row(side=OURS, workload=workload, rounds=rounds, figures=figures)


def _missing(workload: str, reason: str) -> Row:
    return Row(side=OURS, workload=workload, status="not available", reason=reason)


# ── our requests ───────────────────────────────────────────────────────────────────────────────────


def timeline(bench: Bench) -> Row:
    """Resident memory over the first request of a fresh process, less an empty interpreter's."""
    if not bench.interpreter:
        return _missing(TIMELINE, NO_PROC)
    with SideProcess(WATCHED, WATCHED, bench.task) as item:
        with sampled(lambda: resident_bytes(item.pid)[0] or None, INTERVAL) as series:
            figures = dict(item.prepare(TIMELINE, bench.case)[0]["figures"])
        stamp = item.stamp
    began, seconds = figures.pop("began"), figures["seconds"]
    figures["interval_s"] = interval = max(INTERVAL, seconds / _SAMPLES)
    sizes = on_a_grid(series, began, began + seconds, interval)
    row = _row(TIMELINE, [max(0, size - bench.interpreter) for size in sizes], **figures)
    return replace(row, stamp=stamp)


def growth(bench: Bench, steps: int) -> Row:
    """Python's allocations after every step, by tracemalloc."""
    with SideProcess(WATCHED, WATCHED, bench.task) as item:
        answer, _ = item.prepare(GROWTH, replace(bench.case, steps=steps))
    return judge_growth(answer["figures"])


def judge_growth(seen: Mapping[str, Any]) -> Row:
    """The row of what `watched.watch_steps` saw: FAILED for growth, and for allocations between rows."""
    traced, allocated, per_step = seen["traced"], seen["device_allocations"], growth_per_step(seen["traced"])
    first = min(SETTLED, len(traced) - 1)
    figures = {"steps": len(traced), "from_step": first, "growth_per_step": per_step}
    figures |= {"requests": seen["requests"], "device_allocations": allocated}
    problems: list[str] = []
    if per_step > STEADY:
        grown = traced[-1] - traced[first]
        problems.append(f"{per_step:.0f} bytes per step, {grown} from step {first} to {len(traced)}")
    if allocated:
        problems.append(f"{allocated} allocations on the device between rows")
    row = _row(GROWTH, traced, **figures)
    return replace(row, status="FAILED", reason="; ".join(problems)) if problems else row
