"""One line for each thing a document found out, besides latency's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..records import Document, Row
from ..sides.contract import OURS
from ..verbs.build import TOGETHER
from ..verbs.cold_start import PARTS
from ..verbs.detection import PAIR, SLOWED
from ..verbs.throughput import OFFLINE, SINGLE_STREAM, SWEEP
from . import words
from .reading import cases, figure, finite, items, mapping, peers, row_of, summary

Lines = Iterator[tuple[str, str]]
_AXES = {"steps": (1, "step"), "batch": (1, "picture"), "pixels": (1e6, "megapixel")}
_LEDGER = {"weights": "weights", "activations": "activations", "io": "in and out"}


def summaries(document: Document) -> Lines:
    """(what, result) of a document, in Markdown."""
    if document.benchmark in _SUMMARIES:
        yield from _SUMMARIES[document.benchmark](document)


def _latency(document: Document) -> Lines:
    for case in cases(document):
        row = row_of(document, "picture", OURS, case)
        share, each = figure(row, "non_engine_share"), figure(row, "non_engine_s_per_step")
        if share is not None:
            step = f", {words.seconds(each)} per step" if each is not None else ""
            yield (
                f"time outside the engines, {words.case(case)}",
                f"{words.percent(share)} of a picture{step}",
            )


def _scaling(document: Document) -> Lines:
    """The line through the points of each axis, and the points."""
    for row in document.select("fit", OURS):
        of = str(row.figures.get("of"))
        what = f"{words.workload(str(row.figures.get('workload')))} against {of}"
        points = [
            f"{x / _AXES.get(of, (1, ''))[0]:.3g}: {words.seconds(taken)}"
            for point in items(row.figures.get("points"))
            for x, taken in [map(finite, items(point))]
            if x is not None and taken is not None
        ]
        slope, intercept, left = (figure(row, name) for name in ("slope", "intercept", "residual"))
        if slope is None or intercept is None:
            yield what, f"{'; '.join(points)}; {row.status}: {row.reason}"
            continue
        scale, unit = _AXES.get(of, (1, of))
        sign = "−" if intercept < 0 else "+"
        line = f"{words.seconds(slope * scale)} per {unit} {sign} {words.seconds(abs(intercept))}"
        yield what, f"{line}, largest residual {words.percent(left)} ({'; '.join(points)})"


def _throughput(document: Document) -> Lines:
    sweep = [
        f"{row.case.get('pictures')}: {words.number(rate)}"
        for row in document.select(SWEEP, OURS)
        if row.status == "ok" and (rate := figure(row, "samples_per_s")) is not None
    ]
    if sweep:
        yield "throughput by batch, pictures per second", "; ".join(sweep)
    for scenario, write in ((SINGLE_STREAM, _tails), (OFFLINE, _rate)):
        for row in document.select(scenario, OURS):
            good = row.status == "ok"
            yield f"throughput, {scenario}", write(row) if good else f"{row.status}: {row.reason}"


def _tails(row: Row) -> str:
    """The scenario's own metric first."""
    tails = {name: figure(row, name) for name in ("p90", "p50", "p99")}
    return ", ".join(f"{name} {words.seconds(value)}" for name, value in tails.items() if value is not None)


def _rate(row: Row) -> str:
    batch = figure(row, "batch")
    at = f" at batch {batch:.0f}" if batch else ""
    return f"{words.number(figure(row, 'samples_per_s'))} pictures/s{at}"


def _memory(document: Document) -> Lines:
    for workload, where in (("peak", "peak in host memory"), ("device peak", "peak on the device")):
        sizes = [
            f"{side} {words.amount(size, 'B')}"
            for side in (OURS, *peers(document))
            for row in document.select(workload, side)
            if row.unit == "B" and (size := summary(row)) is not None
        ]
        if sizes:
            yield where, ", ".join(sizes)
    for row in document.select("ledger", OURS):
        if row.status == "ok":
            yield from _ledger(row)
    for row in document.select("timeline", OURS):
        if row.status == "ok" and row.samples:
            yield "memory over the first request of a process", _timeline(row)
    for row in document.select("growth per step", OURS):
        grown, steps = figure(row, "growth_per_step"), figure(row, "steps")
        if grown is not None and steps is not None:
            after = figure(row, "from_step") or 0
            yield "what each step leaves behind", f"{grown:.2g} B, over {steps - after:.0f} steps"


def _ledger(row: Row) -> Lines:
    """What the library says that each net holds."""
    total, untold = figure(row, "scratch") or 0.0, False
    nets: list[str] = []
    for name, facts in mapping(row.figures.get("nets")).items():
        sizes = {label: finite(mapping(facts).get(part)) for part, label in _LEDGER.items()}
        untold = untold or sizes["activations"] is None
        known = {label: size for label, size in sizes.items() if size}
        total += sum(known.values())
        if known:
            parts = ", ".join(f"{label} {words.amount(size, 'B')}" for label, size in known.items())
            nets.append(f"{words.workload(name)}: {parts}")
    if nets:
        without = "; of activations the library does not tell" if untold else ""
        yield "memory of the nets", words.amount(total, "B") + without
        yield "memory by net", "; ".join(nets)


def _timeline(row: Row) -> str:
    """How much at the beginning, and at most during which stage."""
    every, sizes = figure(row, "interval_s") or 0.0, row.samples
    top = max(range(len(sizes)), key=sizes.__getitem__)
    stage = ""
    for mark in map(mapping, items(row.figures.get("marks"))):
        if (finite(mark.get("at_s")) or 0.0) <= every * (top + 1):
            stage = f" ({words.workload(str(mark.get('stage')))})"
    begin, peak = words.amount(sizes[0], "B"), words.amount(sizes[top], "B")
    seconds = words.seconds(every * len(sizes))
    return f"{begin} at its beginning, peak {peak} after {words.seconds(every * top)}{stage} of {seconds}"


def _cold_start(document: Document) -> Lines:
    """The parts of one process, and whole processes."""
    found: dict[str, list[str]] = {}
    for row in document.select(side=OURS):
        if (middle := summary(row)) is not None:
            what = "cold start, its parts" if row.workload in PARTS else "cold start, whole processes"
            found.setdefault(what, []).append(f"{row.workload} {words.seconds(middle)}")
    for what, parts in found.items():
        yield what, ", ".join(parts)


def _build(document: Document) -> Lines:
    """All nets; the row "every net", where there is one, has what they take together."""
    rows = {row.workload: row for row in document.select(side=OURS) if row.unit == "s"}
    together = rows.pop(TOGETHER, None)
    nets = [row for row in rows.values() if summary(row) is not None]
    if not nets:
        return
    taken = summary(together) or sum(summary(row) or 0.0 for row in nets)
    sizes = [size for row in nets if (size := figure(row, "engine_mb")) is not None]
    peaks = [size for row in nets if (size := figure(row, "peak_rss_gb")) is not None]
    parts = [f"{len(nets)} of {len(rows)} nets in {words.seconds(taken)}"]
    parts += [f"peak {words.amount(max(peaks) * 1e9, 'B')}"] if peaks else []
    parts += [f"engines {words.amount(sum(sizes) * 1e6, 'B')}"] if sizes else []
    yield "build of the engines", ", ".join(parts)


def _export(document: Document) -> Lines:
    """Each package: time, CPU time and peak memory."""
    for case in cases(document):
        row, peak = row_of(document, "export", OURS, case), row_of(document, "export peak memory", OURS, case)
        if summary(row) is None:
            continue
        cpu, memory = figure(row, "cpu_seconds"), summary(peak)
        parts = [words.seconds(summary(row))]
        parts += [f"{words.seconds(cpu)} of CPU time"] if cpu is not None else []
        parts += [f"peak {words.amount(memory, 'B')}"] if memory is not None else []
        yield f"export with `--verify`, {case.get('dtype', '')}", ", ".join(parts)


def _parity(document: Document) -> Lines:
    """The worst of all nets, and of all pictures."""
    for what, pictures in (("nets", False), ("pictures", True)):
        rows = [row for row in document.select(side=OURS) if (row.workload == "picture") == pictures]
        known = {
            name: [value for row in rows if (value := figure(row, name)) is not None]
            for name in ("relative_l2", "psnr_db", "ssim")
        }
        if not known["relative_l2"]:
            continue
        references = [row.figures["reference"] for row in rows if row.figures.get("reference")]
        failed = sum(row.status == "FAILED" for row in rows)
        parts = [f"{len(known['relative_l2'])} compared{f', {failed} FAILED' if failed else ''}"]
        if worst := max(known["relative_l2"]):
            parts += [f"largest relative L2 {worst:.1e}"]
            parts += [f"lowest PSNR {min(known['psnr_db']):.1f} dB"] if known["psnr_db"] else []
            parts += [f"lowest SSIM {min(known['ssim']):.4f}"] if known["ssim"] else []
        else:
            parts.append("identical")
        yield f"parity of {what} with {next(iter(references), 'the reference')}", ", ".join(parts)


def _detection(document: Document) -> Lines:
    named = ((SLOWED, "`compare` finds a planted slowdown"), (PAIR, "`compare` passes an A/A pair"))
    for workload, what in named:
        rows = list(document.select(workload))
        if rows:
            slower = finite(rows[0].case.get("slow_down"))
            size = f" of {100 * slower:g} %" if slower else ""
            yield f"{what}{size}", f"{sum(row.status == 'ok' for row in rows)} of {len(rows)} times"


_SUMMARIES: Mapping[str, Callable[[Document], Lines]] = {
    "latency": _latency,
    "scaling": _scaling,
    "throughput": _throughput,
    "memory": _memory,
    "cold-start": _cold_start,
    "build": _build,
    "export": _export,
    "parity": _parity,
    "detection": _detection,
}
