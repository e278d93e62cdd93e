"""`latentrt bench memory`: what each side holds, by stage, over one request, and from step to step.

Memory is looked at from outside the process, every few milliseconds: resident memory in /proc, and what NVML
says that the process holds on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...engines.net_weights import engine_bytes
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS, Array
from ..case import HOST_NETS, Case
from ..machine import clocks, describe_machine
from ..process import SideError, SideProcess
from ..records import Document, Row, Status
from ..sides.contract import AGAIN, CEILING, OURS, WATCHED, Task
from ..sides.watched import GROWTH, SETTLED, STEADY, TIMELINE, growth_per_step
from .latency import Progress, Sides, check, document_of, silent
from .memory_watch import (
    DeviceWatch,
    Look,
    Series,
    holding,
    measure_baselines,
    on_a_grid,
    resident,
    sampled,
)

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
    watch: DeviceWatch | None = None,
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
        watch: NVML; the first CUDA device's by default.
        progress: called with a line at every stage.

    Raises:
        SideError: our side cannot be opened.
    """
    watch = watch or DeviceWatch.open()
    progress("an empty interpreter" + (" and an empty CUDA context" if watch else ""))
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
    progress("our timeline of one request")
    rows.append(bench.attempt(TIMELINE, lambda: timeline(bench)))
    progress(f"our growth over {steps} steps")
    rows.append(bench.attempt(GROWTH, lambda: growth(bench, steps)))
    baselines = {"interpreter": interpreter, "context": context}
    settings = {"peers": sides.peers, "interval_s": interval, "warm_pictures": _WARM, "baselines": baselines}
    return document_of("memory", package, sides.task, rows, settings)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What rows are made with.

    Attributes:
        interpreter: bytes of an empty interpreter; None but on Linux.
        context: bytes of an empty CUDA context; None without a GPU or where NVML does not tell.
        weights: bytes at the width of the arithmetic.
        watch: None without a GPU.
        interval: seconds between samples.
    """

    package: Package
    task: Task
    case: Case
    interpreter: int | None
    context: int | None
    weights: int
    watch: DeviceWatch | None
    interval: float

    def row(
        self,
        workload: str,
        rounds: Sequence[Sequence[float]] = (),
        figures: Mapping[str, Any] | None = None,
        *,
        side: str = OURS,
        status: Status = "ok",
        reason: str = "",
        stamp: Mapping[str, Any] | None = None,
    ) -> Row:
        """In bytes, and the most of them over those of the weights."""
        sizes = [size for turn in rounds for size in turn]
        ratio = {"weights": self.weights, "over_weights": max(sizes) / self.weights} if sizes else {}
        return Row(
            side=side,
            workload=workload,
            case=self.case.to_json(),
            unit="B",
            rounds=tuple(tuple(map(float, turn)) for turn in rounds),
            status=status,
            reason=reason,
            figures={**(figures or {}), **ratio},
            stamp={**describe_machine(), **clocks()} if stamp is None else stamp,
        )

    def missing(self, workload: str, reason: str, **named: Any) -> Row:
        """A row for what cannot be measured here."""
        return self.row(workload, status="not available", reason=reason, **named)

    def attempt(self, workload: str, measure: Callable[[], Row]) -> Row:
        """The row, or one that says why there is none."""
        try:
            return measure()
        except SideError as error:
            return self.row(workload, status=error.status, reason=error.reason)

    def look(self) -> Look | None:
        """What NVML says now; None without a GPU."""
        return self.watch.look() if self.watch else None


# ── sides ──────────────────────────────────────────────────────────────────────────────────────────


def measure_side(
    bench: Bench, name: str, wanted: Mapping[str, Array]
) -> tuple[list[Row], Mapping[str, Array]]:
    """A side's rows, and its picture; a peer whose picture is not `wanted` has a row that FAILED.

    Raises:
        SideError: our side cannot be opened.
    """
    before = bench.look()
    stages: dict[str, tuple[int, tuple[int, int] | None]] = {}  # looks until then, and what was resident
    try:
        with (
            sampled(bench.look, bench.interval) as looks,
            SideProcess(name, OURS if name == AGAIN else name, bench.task) as item,
        ):
            pid = item.pid
            stages[OPENED] = len(looks), resident(pid)
            outputs = item.prepare("picture", bench.case)[1]
            stages[FIRST] = len(looks), resident(pid)
            item.time(_WARM)
            stages[PEAK] = len(looks), resident(pid)
            own, stamp = item.ask(do="memory")["own"], item.stamp
        if wanted:
            check(outputs, wanted, bench.package)
    except SideError as error:
        if name == OURS and not stages:
            raise
        return [bench.row(OPENED, side=name, status=error.status, reason=error.reason)], {}
    rows = [_host_row(bench, name, stage, found, stamp) for stage, (_, found) in stages.items()]
    if before is not None:
        for stage, (count, _) in stages.items():
            series, known_by = holding(pid, before, looks[: max(count, 1)])
            rows.append(_device_row(bench, name, stage, [size for _, size in series], known_by, stamp))
    return [*rows, _ledger_row(bench, name, own, stamp)], outputs


def _host_row(
    bench: Bench, name: str, stage: str, found: tuple[int, int] | None, stamp: Mapping[str, Any]
) -> Row:
    if found is None or bench.interpreter is None:
        return bench.missing(stage, _NO_PROC, side=name, stamp=stamp)
    rss, peak = found
    figures = {"rss": rss, "peak": peak, "empty_interpreter": bench.interpreter}
    size = (peak if stage == PEAK else rss) - bench.interpreter
    return bench.row(stage, [(size,)], figures, side=name, stamp=stamp)


def _device_row(
    bench: Bench, name: str, stage: str, sizes: Sequence[int], known_by: str, stamp: Mapping[str, Any]
) -> Row:
    workload = ON_DEVICE + stage
    if not sizes or bench.context is None:
        reason = "NVML does not tell what it holds, if anything"
        return bench.missing(workload, reason, side=name, stamp=stamp)
    whole = max(sizes) if stage == PEAK else sizes[-1]
    figures = {"whole": whole, "empty_context": bench.context, "measured_by": known_by}
    return bench.row(workload, [(max(0, whole - bench.context),)], figures, side=name, stamp=stamp)


def _ledger_row(bench: Bench, name: str, own: Mapping[str, Any], stamp: Mapping[str, Any]) -> Row:
    """What the side counts itself, in total and by net, and whatever else it tells."""
    if not own:
        return bench.missing(LEDGER, "it does not tell what it holds", side=name, stamp=stamp)
    nets: Mapping[str, Mapping[str, int | None]] = own.get("ledger", {})
    known = sum(net.get(part) or 0 for net in nets.values() for part in _PARTS) + own.get("scratch", 0)
    figures = {"nets": nets, **{key: value for key, value in own.items() if key != "ledger"}}
    return bench.row(LEDGER, [(known,)] if nets else [], figures, side=name, stamp=stamp)


# ── our requests ───────────────────────────────────────────────────────────────────────────────────


def timeline(bench: Bench) -> Row:
    """Resident memory less an empty interpreter's; `device` is the same of a GPU, less an empty context.

    Figures: `interval_s`, `marks` ({"stage", "at_s"} since the request began), `seconds`.
    """
    if bench.interpreter is None:
        return bench.missing(TIMELINE, _NO_PROC)
    before = bench.look()
    with sampled(bench.look, bench.interval) as looks, SideProcess(WATCHED, WATCHED, bench.task) as item:
        pid = item.pid
        with sampled(lambda: (resident(pid) or (None,))[0], bench.interval) as series:
            seen = item.prepare(TIMELINE, bench.case)[0]["figures"]
        nothing: tuple[Series, str] = ((), "")
        held, known_by = holding(pid, before, list(looks)) if before else nothing
        stamp = item.stamp
    began, ended = seen["began"], seen["ended"]
    interval = max(bench.interval, (ended - began) / _SAMPLES)

    def over(sizes: Series, empty: int) -> list[int]:
        return [max(0, size - empty) for size in on_a_grid(sizes, began, ended, interval)]

    marks = [{"stage": stage, "at_s": moment - began} for stage, moment in seen["marks"]]
    figures: dict[str, Any] = {"interval_s": interval, "seconds": ended - began, "marks": marks}
    if held and bench.context is not None:
        figures |= {"device": over(held, bench.context), "device_measured_by": known_by}
    return bench.row(TIMELINE, [over(series, bench.interpreter)], figures, stamp=stamp)


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
    traced, on_device = seen["traced"], seen["device_allocations"]
    first = min(SETTLED, len(traced) - 1)
    grown, per_step = traced[-1] - traced[first], growth_per_step(traced)
    allocated = None if on_device is None else sum(on_device)
    figures = {"steps": len(traced), "from_step": first, "growth_per_step": per_step}
    figures |= {"requests": seen["requests"], "traced_growth": grown, "device_allocations": allocated}
    problems: list[str] = []
    if per_step > STEADY:
        problems.append(f"{per_step:.0f} bytes per step, {grown} from step {first} to {len(traced)}")
    if allocated:
        problems.append(f"{allocated} allocations on the device between rows")
    status: Status = "FAILED" if problems else "ok"
    return bench.row(GROWTH, [traced], figures, status=status, reason="; ".join(problems))
