"""`latentrt bench memory`: what each side holds, by stage, over one request, and from step to step.

Memory is looked at from outside the process, every few milliseconds: resident memory in /proc, and what NVML
says that the process holds on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...engines.net_weights import engine_bytes
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS, Array
from ..case import HOST_NETS, Case
from ..machine import clocks, describe_machine, resident_bytes
from ..process import SideError, SideProcess
from ..records import Document, Row, Status
from ..sides.contract import AGAIN, CEILING, OURS, WATCHED, Task
from ..sides.watched import GROWTH, SETTLED, STEADY, TIMELINE, growth_per_step
from .latency import Progress, Sides, check, document_of, silent
from .memory_watch import Watch, device_watch, holding, measure_baselines, on_a_grid, sampled

OPENED, FIRST, PEAK, LEDGER = "opened", "first picture", "peak", "ledger"
ON_DEVICE = "device "  # before the first three, where there is a GPU
STEPS = 100
INTERVAL = 0.005  # seconds
_PARTS = ("weights", "activations", "io")  # of a net's ledger
_WARM = 2  # pictures after the first one, before the peak is read
_SAMPLES = 1000  # of a timeline, at most; longer requests have longer intervals
_NO_PROC = "only Linux tells another process's resident memory (/proc)"


def measure_memory(
    package: Package,
    sides: Sides,
    case: Case,
    *,
    steps: int = STEPS,
    interval: float = INTERVAL,
    progress: Progress = silent,
) -> Document:
    """Every side in a fresh process, alone; then our timeline, and what our steps leave behind.

    Rows are in bytes:

        opened, first picture, peak    resident memory less an empty interpreter's
        device opened, …               what NVML says of the process, less an empty CUDA context's
        ledger                         what a side counts itself
        timeline                       resident memory over the first request of a fresh process
        growth per step                Python's and NumPy's allocations after every step of a request

    The figure `over_weights` is bytes over those of the model's weights at the width of the arithmetic.

    Args:
        package: the model.
        sides: who is measured, one after the other.
        case: every picture.
        steps: of the request whose growth is looked at.
        interval: seconds between samples.
        progress: called with a line at every stage.

    Raises:
        SideError: our side cannot be opened.
    """
    progress("an empty interpreter, and on a GPU an empty CUDA context")
    watch = device_watch()
    interpreter, context = measure_baselines(watch, interval)
    nets = {*HOST_NETS, *TEXT_ENCODERS} & package.manifest.nets.keys()
    bench = Bench(
        package=package,
        task=sides.task,
        case=case,
        interpreter=interpreter,
        context=context,
        weights=sum(engine_bytes(package, net) for net in nets),
        watch=watch,
        interval=interval,
    )
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
            rows.append(bench.row(workload, status=error.status, reason=error.reason))
    baselines = {"interpreter": interpreter, "context": context}
    settings = {"peers": sides.peers, "interval_s": interval, "warm_pictures": _WARM, "baselines": baselines}
    return document_of("memory", package, sides.task, rows, settings)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What rows are made with.

    Attributes:
        interpreter: bytes of an empty interpreter; 0 but on Linux.
        context: bytes of an empty CUDA context; None without a GPU or where NVML does not tell.
        weights: bytes at the width of the arithmetic.
        watch: looks at the GPU.
        interval: seconds between samples.
    """

    package: Package
    task: Task
    case: Case
    interpreter: int
    context: int | None
    weights: int
    watch: Watch
    interval: float

    def row(
        self,
        workload: str,
        sizes: Sequence[float] = (),
        figures: Mapping[str, Any] | None = None,
        *,
        side: str = OURS,
        status: Status = "ok",
        reason: str = "",
        stamp: Mapping[str, Any] | None = None,
    ) -> Row:
        """In bytes, and the most of them over those of the weights."""
        ratio = {"weights": self.weights, "over_weights": max(sizes) / self.weights} if sizes else {}
        return Row(
            side=side,
            workload=workload,
            case=self.case.to_json(),
            unit="B",
            rounds=(tuple(map(float, sizes)),) if sizes else (),
            status=status,
            reason=reason,
            figures={**(figures or {}), **ratio},
            stamp=stamp or {**describe_machine(), **clocks()},
        )


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
            sampled(bench.watch, bench.interval) as looks,
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
        return [bench.row(OPENED, side=name, status=error.status, reason=error.reason)], {}
    row = partial(bench.row, side=name, stamp=stamp)
    missing = partial(row, status="not available")
    rows: list[Row] = []
    for stage, (count, (rss, peak)) in stages.items():
        if rss and bench.interpreter:
            figures: dict[str, Any] = {"rss": rss, "peak": peak, "empty_interpreter": bench.interpreter}
            rows.append(row(stage, [(peak if stage == PEAK else rss) - bench.interpreter], figures))
        else:
            rows.append(missing(stage, reason=_NO_PROC))
        if before is None:
            continue
        held, known_by = holding(pid, before, looks[: max(count, 1)])
        if held and bench.context is not None:
            whole = max(size for _, size in held) if stage == PEAK else held[-1][1]
            figures = {"whole": whole, "empty_context": bench.context, "measured_by": known_by}
            rows.append(row(ON_DEVICE + stage, [max(0, whole - bench.context)], figures))
        else:
            rows.append(missing(ON_DEVICE + stage, reason="NVML does not tell what it holds, if anything"))
    if not own:
        return [*rows, missing(LEDGER, reason="it does not tell what it holds")], outputs
    # What the side counts itself, in total and by net, and whatever else it tells.
    nets: Mapping[str, Mapping[str, int | None]] = own.pop("ledger", {})
    known = sum(net.get(part) or 0 for net in nets.values() for part in _PARTS) + own.get("scratch", 0)
    return [*rows, row(LEDGER, [known] if nets else [], {"nets": nets, **own})], outputs


# ── our requests ───────────────────────────────────────────────────────────────────────────────────


def timeline(bench: Bench) -> Row:
    """Resident memory less an empty interpreter's; `device` is the same of a GPU, less an empty context.

    Figures: `interval_s`, `marks` ({"stage", "at_s"} since the request began), `seconds`.
    """
    if not bench.interpreter:
        return bench.row(TIMELINE, status="not available", reason=_NO_PROC)
    before = bench.watch()
    with sampled(bench.watch, bench.interval) as looks, SideProcess(WATCHED, WATCHED, bench.task) as item:
        with sampled(lambda: resident_bytes(item.pid)[0] or None, bench.interval) as series:
            figures = dict(item.prepare(TIMELINE, bench.case)[0]["figures"])
        held, known_by = holding(item.pid, before, list(looks)) if before else ((), "")
        stamp = item.stamp
    began, seconds = figures.pop("began"), figures["seconds"]
    figures["interval_s"] = interval = max(bench.interval, seconds / _SAMPLES)

    def over(sizes: Sequence[tuple[float, int]], empty: int) -> list[int]:
        return [max(0, size - empty) for size in on_a_grid(sizes, began, began + seconds, interval)]

    if held and bench.context is not None:
        figures |= {"device": over(held, bench.context), "device_measured_by": known_by}
    return bench.row(TIMELINE, over(series, bench.interpreter), figures, stamp=stamp)


def growth(bench: Bench, steps: int) -> Row:
    """Python's allocations after every step, by tracemalloc. FAILED if the steps leave anything behind."""
    with SideProcess(WATCHED, WATCHED, bench.task) as item:
        answer, _ = item.prepare(GROWTH, replace(bench.case, steps=steps))
    return judge_growth(bench, answer["figures"])


def judge_growth(bench: Bench, seen: Mapping[str, Any]) -> Row:
    """The row of what `watched.watch_steps` saw.

    Figures: `growth_per_step`, bytes, which is judged, in the last of `requests`; `traced_growth` over all
    steps but the first few, caches that libraries fill once included; `device_allocations` of a device's
    loop between its rows.
    """
    traced, allocated = seen["traced"], seen["device_allocations"]
    first = min(SETTLED, len(traced) - 1)
    figures = {
        "steps": len(traced),
        "from_step": first,
        "growth_per_step": growth_per_step(traced),
        "requests": seen["requests"],
        "traced_growth": traced[-1] - traced[first],
        "device_allocations": allocated,
    }
    problems: list[str] = []
    if figures["growth_per_step"] > STEADY:
        over = f"{figures['traced_growth']} from step {first} to {len(traced)}"
        problems.append(f"{figures['growth_per_step']:.0f} bytes per step, {over}")
    if allocated:
        problems.append(f"{allocated} allocations on the device between rows")
    status: Status = "FAILED" if problems else "ok"
    return bench.row(GROWTH, traced, figures, status=status, reason="; ".join(problems))
