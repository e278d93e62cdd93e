"""`latentrt bench memory`: what each side holds, by stage, over one request, and from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...engines.net_weights import engine_bytes
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS, Array
from ..case import HOST_NETS, Case
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..sides.contract import AGAIN, CEILING, OURS
from .latency import Said, Sides, check, describe_model, settings_of
from .memory_request import AGAINST_STEPS, GROWTH, TIMELINE, against_steps, growth, timeline
from .memory_rows import Bench, Looks, looking, measure_baselines
from .memory_samples import INTERVAL, NO_PROC, DeviceWatch, Look, Resident, holding, resident

OPENED, FIRST, PEAK, LEDGER = "opened", "first picture", "peak", "ledger"
ON_DEVICE = "device "  # before the first three, where there is a GPU
_PARTS = ("weights", "activations", "io")  # of a net's ledger
_WARM = 2  # pictures after the first one, before the peak is read
STEPS = (100, 20, 100)


def measure_memory(
    package: Package,
    sides: Sides,
    case: Case,
    *,
    steps: Sequence[int] = STEPS,
    interval: float = INTERVAL,
    watch: DeviceWatch | None = None,
    said: Said = lambda line: None,
) -> Document:
    """Every side in a fresh process, alone; then our timeline, and what our steps leave behind.

    Rows are in bytes. "opened", "first picture" and "peak" are resident memory less an empty interpreter's;
    "device opened" and so on what NVML says of the process, less an empty CUDA context's; "ledger" is what a
    side counts itself; "timeline", "growth per step" and "peak against steps": `memory_request.py`. The
    figure `over_weights` is bytes over those of the model's weights at the width of the arithmetic.

    Args:
        package: of ours.
        sides: who; each of them alone, one after the other.
        case: of every picture.
        steps: of the request whose steps are watched, and of the two whose peaks are compared.
        interval: seconds between samples.
        watch: NVML; the first CUDA device's unless given.
        said: is told how far it is.

    Raises:
        SideError: ours cannot be opened.
    """
    watch = watch or DeviceWatch.open()
    said("an empty interpreter" + (" and an empty CUDA context" if watch else ""))
    baselines = measure_baselines(watch, interval)
    drawing = {*HOST_NETS, *TEXT_ENCODERS}
    bench = Bench(
        package=package,
        task=sides.task,
        case=case,
        baselines=baselines,
        weights=sum(engine_bytes(package, net) for net in drawing & package.manifest.nets.keys()),
        watch=watch,
        interval=interval,
    )
    rows: list[Row] = []
    wanted: Mapping[str, Array] = {}
    for name in sides.names:
        if name == CEILING:  # holds no model
            continue
        said(f"{name}: opens, and draws {1 + _WARM} pictures")
        found, outputs = measure_side(bench, name, wanted)
        rows += found
        wanted = wanted or outputs
    rows += _of_requests(bench, steps, said)
    settings = {"interval_s": interval, "warm_pictures": _WARM, "baselines": vars(baselines)}
    return Document(
        benchmark="memory",
        model=describe_model(package),
        settings={"peers": sides.peers, **settings, **settings_of(sides.task)},
        rows=tuple(rows),
    )


def _of_requests(bench: Bench, steps: Sequence[int], said: Said) -> Iterator[Row]:
    """Ours alone, over the steps of requests."""
    said("our timeline of one request")
    yield bench.attempt(TIMELINE, lambda: timeline(bench))
    said(f"our growth over {steps[0]} steps")
    yield bench.attempt(GROWTH, lambda: growth(bench, steps[0]))
    said(f"our peaks with {steps[1]} and {steps[2]} steps")
    yield bench.attempt(AGAINST_STEPS, lambda: against_steps(bench, *steps[1:]))


def measure_side(
    bench: Bench, name: str, wanted: Mapping[str, Array]
) -> tuple[list[Row], Mapping[str, Array]]:
    """A side's rows, and its picture; a peer whose picture is not `wanted` has a row that FAILED.

    Raises:
        SideError: ours cannot be opened.
    """
    before = bench.watch.look() if bench.watch else None
    stages: dict[str, tuple[int, Resident | None]] = {}  # looks until then, and what was resident
    try:
        with (
            looking(bench.watch, bench.interval) as looks,
            SideProcess(name, OURS if name == AGAIN else name, bench.task) as item,
        ):
            pid = number_of(item)
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
        seen = {stage: looks[: max(count, 1)] for stage, (count, _) in stages.items()}
        rows += [_device_row(bench, name, stage, pid, before, part, stamp) for stage, part in seen.items()]
    return [*rows, _ledger_row(bench, name, own, stamp)], outputs


def number_of(item: SideProcess) -> int:
    """Of its process; tests have none."""
    return item.pid


def _host_row(bench: Bench, name: str, stage: str, found: Resident | None, stamp: Mapping[str, Any]) -> Row:
    empty = bench.baselines.interpreter
    if found is None or empty is None:
        return bench.missing(stage, NO_PROC, side=name, stamp=stamp)
    size = (found.peak if stage == PEAK else found.rss) - empty
    return bench.row(stage, [(size,)], {**vars(found), "empty_interpreter": empty}, side=name, stamp=stamp)


def _device_row(
    bench: Bench, name: str, stage: str, pid: int, before: Look, looks: Looks, stamp: Mapping[str, Any]
) -> Row:
    held, context = holding(pid, before, looks), bench.baselines.context
    workload = ON_DEVICE + stage
    if held is None or context is None:
        return bench.missing(
            workload, "NVML does not tell what it holds, if anything", side=name, stamp=stamp
        )
    whole = held.peak if stage == PEAK else held.now
    figures = {"whole": whole, "empty_context": context, "measured_by": held.measured_by}
    return bench.row(workload, [(max(0, whole - context),)], figures, side=name, stamp=stamp)


def _ledger_row(bench: Bench, name: str, own: Mapping[str, Any], stamp: Mapping[str, Any]) -> Row:
    """What the side counts itself, in total and by net; besides, whatever else it tells."""
    if not own:
        return bench.missing(LEDGER, "it does not tell what it holds", side=name, stamp=stamp)
    nets: Mapping[str, Mapping[str, int | None]] = own.get("ledger", {})
    known = sum(net.get(part) or 0 for net in nets.values() for part in _PARTS) + own.get("scratch", 0)
    figures = {"nets": nets, **{key: value for key, value in own.items() if key != "ledger"}}
    return bench.row(LEDGER, [(known,)] if nets else [], figures, side=name, stamp=stamp)
