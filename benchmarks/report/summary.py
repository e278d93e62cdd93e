"""One line for each thing a document found out, besides latency's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..records import Document, Row
from ..sides.contract import OURS
from ..verbs.build import TOGETHER
from ..verbs.cold_start import PARTS
from . import words
from .memory import ledger, peaks, untold
from .reading import cases, figure, finite, p50, row_of
from .sweeps import line_of, sweeps

Lines = Iterator[tuple[str, str]]


def summaries(document: Document) -> Lines:
    """(what, result) of a document, in Markdown."""
    yield from _SUMMARIES.get(document.benchmark, _nothing)(document)


def _nothing(document: Document) -> Lines:
    yield from ()


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
    for sweep in sweeps(document):
        if line := line_of(sweep):
            left = f", largest residual {words.percent(sweep.residual)}" if sweep.residual is not None else ""
            yield f"{words.workload(sweep.workload)} against {sweep.of}", f"{line}{left}"


def _throughput(document: Document) -> Lines:
    sweep = [
        f"{row.case.get('pictures')}: {words.number(rate)}"
        for row in document.select("batch sweep", OURS)
        if row.status == "ok" and (rate := figure(row, "samples_per_s")) is not None
    ]
    if sweep:
        yield "throughput by batch, pictures per second", "; ".join(sweep)
    for row in document.select(side=OURS):
        if "scenario" in row.figures:
            yield (
                f"throughput, {row.workload}",
                _scenario(row) if row.status == "ok" else f"{row.status}: {row.reason}",
            )


def _scenario(row: Row) -> str:
    """The scenario's own metric first: a latency, a rate, or a rate within a deadline."""
    rate, deadline = figure(row, "rate"), figure(row, "deadline_s")
    known = {name: figure(row, name) for name in ("p50", "p90", "p99")}
    tails = [f"{name} {words.seconds(value)}" for name, value in known.items() if value is not None]
    if row.workload == "Offline":
        parts = [f"{words.number(figure(row, 'samples_per_s'))} pictures/s"]
        return parts[0] + (f" at batch {batch:.0f}" if (batch := figure(row, "batch")) else "")
    if row.workload == "SingleStream":
        return ", ".join([*tails[1:2], *tails[:1], *tails[2:]]) or words.DASH
    if rate is None:
        return row.reason or words.DASH
    met = row.figures.get("met")
    kept = "" if met is None else "met" if met else "missed"
    limit = [f"deadline {words.seconds(deadline)} {kept}".rstrip()] if deadline is not None else []
    sure = figure(row, "confidence")
    told = [f"confidence {words.percent(sure)}"] if sure is not None else []
    return ", ".join([f"{words.number(rate)} queries/s", *tails[2:], *limit, *told])


def _memory(document: Document) -> Lines:
    by_place: dict[str, list[str]] = {}
    for where, side, size in peaks(document):
        by_place.setdefault(where, []).append(f"{side} {words.amount(size, 'B')}")
    for where, sizes in by_place.items():
        yield where, ", ".join(sizes)
    row = next((row for row in document.select("ledger", OURS) if row.status == "ok"), None)
    if row and (nets := ledger(row)):
        without = "; of activations the library does not tell" if untold(nets) else ""
        yield "memory of the nets", words.amount(sum(net.total for net in nets), "B") + without
    row = next(document.select("growth per step", OURS), None)
    grown, steps = figure(row, "growth_per_step"), figure(row, "steps")
    if row and grown is not None and steps is not None:
        after = figure(row, "from_step") or 0
        yield "what each step leaves behind", f"{grown:.2g} B, over {steps - after:.0f} steps"


def _phases(document: Document) -> Lines:
    """The parts of one process, and whole processes."""
    found: dict[str, list[str]] = {}
    for row in document.select(side=OURS):
        if (middle := p50(row)) is not None:
            what = "cold start, its parts" if row.workload in PARTS else "cold start, whole processes"
            found.setdefault(what, []).append(f"{row.workload} {words.seconds(middle)}")
    for what, parts in found.items():
        yield what, ", ".join(parts)


def _build(document: Document) -> Lines:
    """All nets; the row "every net", where there is one, has what they take together."""
    rows = {row.workload: row for row in document.select(side=OURS) if row.unit == "s"}
    together = rows.pop(TOGETHER, None)
    nets = [row for row in rows.values() if p50(row) is not None]
    if not nets:
        return
    taken = p50(together) or sum(p50(row) or 0.0 for row in nets)
    sizes = [size for row in nets if (size := figure(row, "engine_mb")) is not None]
    peaks_gb = [size for row in nets if (size := figure(row, "peak_rss_gb")) is not None]
    parts = [f"{len(nets)} of {len(rows)} nets in {words.seconds(taken)}"]
    parts += [f"peak {words.amount(max(peaks_gb) * 1e9, 'B')}"] if peaks_gb else []
    parts += [f"engines {words.amount(sum(sizes) * 1e6, 'B')}"] if sizes else []
    yield "build of the engines", ", ".join(parts)


def _export(document: Document) -> Lines:
    """Each package: time, CPU time, peak memory, and the worst net against torch."""
    for case in cases(document):
        row, peak = row_of(document, "export", OURS, case), row_of(document, "export peak memory", OURS, case)
        if p50(row) is None:
            continue
        cpu, memory = figure(row, "cpu_seconds"), p50(peak)
        parts = [words.seconds(p50(row) or 0.0)]
        parts += [f"{words.seconds(cpu)} of CPU time"] if cpu is not None else []
        parts += [f"peak {words.amount(memory, 'B')}"] if memory is not None else []
        yield f"export with `--verify`, {case.get('dtype', '')}", ", ".join(parts)


def _parity(document: Document) -> Lines:
    """The worst of all nets, and of all pictures."""
    for what, pictures in (("nets", False), ("pictures", True)):
        rows = [row for row in document.select(side=OURS) if (row.workload == "picture") == pictures]
        measured = [row for row in rows if figure(row, "relative_l2") is not None]
        if not measured:
            continue
        against = str(measured[0].figures.get("reference") or "the reference")
        failed = sum(row.status == "FAILED" for row in rows)
        parts = [f"{len(measured)} compared, {failed} FAILED"] if failed else [f"{len(measured)} compared"]
        worst = max(figure(row, "relative_l2") or 0.0 for row in measured)
        lowest = min(
            (value for row in measured if (value := figure(row, "psnr_db")) is not None), default=None
        )
        alike = min((value for row in measured if (value := figure(row, "ssim")) is not None), default=None)
        parts.append("identical" if worst == 0 else f"largest relative L2 {worst:.1e}")
        parts += [f"lowest PSNR {lowest:.1f} dB"] if lowest is not None and worst else []
        parts += [f"lowest SSIM {alike:.4f}"] if alike is not None and worst else []
        yield f"parity of {what} with {against}", ", ".join(parts)


def _detection(document: Document) -> Lines:
    said = {
        "planted slowdown": "`compare` finds a planted slowdown",
        "A/A pair": "`compare` passes an A/A pair",
    }
    for workload, what in said.items():
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
    "cold-start": _phases,
    "build": _build,
    "export": _export,
    "parity": _parity,
    "detection": _detection,
}
