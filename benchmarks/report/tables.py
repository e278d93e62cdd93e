"""The Markdown of both pages: every table for docs/measurements.md, and one short table for the README."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..intervals import LEAST
from ..records import Document, Row
from ..roofline import GEMM
from ..sides.contract import OURS
from ..verbs.build import TOGETHER
from ..verbs.cold_start import PARTS
from ..verbs.detection import PAIR, SLOWED
from ..verbs.throughput import OFFLINE, SINGLE_STREAM, SWEEP
from . import words
from .reading import (
    Against,
    Result,
    against,
    case_key,
    cases,
    ceiling_rates,
    figure,
    finite,
    items,
    mapping,
    peers,
    row_of,
    spread,
    summary,
    workloads,
)

Lines = Iterator[tuple[str, str]]
_AXES = {"steps": (1, "step"), "batch": (1, "picture"), "pixels": (1e6, "megapixel")}
_LEDGER = {"weights": "weights", "activations": "activations", "io": "in and out"}
_KINDS = ("latency", "scaling", "throughput", "memory", "cold-start", "build", "parity", "detection")
_FIGURES = {"waterfall": "one picture, stage by stage", "peers": "ours against peers", "roofline": "roofline"}
_HEAD = ("| what | result | reproduce |", "|---|---|---|")
# What the short table takes from a document besides latencies: the beginnings of `summaries`' lines.
_SHORT = ("peak in host memory", "peak on the device", "cold start", "build", "parity")
_ROWS = 12  # of the short table, at most
NOTHING = "Nothing was measured yet: `latentrt bench latency demo`."


def full_tables(results: Sequence[Result], figures: Mapping[str, Sequence[str]]) -> str:
    """For each model and machine: latencies, everything else, and links to the figures by `Result.name`.

    Of documents that answer the same question the newest counts.
    """
    sections: dict[tuple[str, str], list[Result]] = {}
    for result in _newest(results):
        about = words.model(result.document), words.machine(result.document)
        sections.setdefault(about, []).append(result)
    parts = [part for about, found in sorted(sections.items()) for part in _section(*about, found, figures)]
    return "\n\n".join(parts) or NOTHING


def short_table(results: Sequence[Result], link: str = "") -> str:
    """At most twelve rows: the whole picture or the large nets beside peers, memory, start, build, parity.

    `link`: to the page with all tables.
    """
    newest = _newest(results)
    lines = [
        _line(f"{words.model(result.document)}: {what}", found, _command(result.document))
        for result in newest
        for what, found in _highlights(result.document)
    ]
    if not lines:
        return NOTHING
    machines = "; ".join(dict.fromkeys(_safe(words.machine(result.document)) for result in newest))
    where = f" [All measurements, and how they were made]({link})." if link else ""
    return "\n".join([*_HEAD, *lines[:_ROWS], "", f"Measured on {machines}.{where}"])


def _highlights(document: Document) -> Iterator[tuple[str, str]]:
    for case in cases(document) if document.benchmark == "latency" and peers(document) else ():
        timed = workloads(document, case)
        for name in ("picture",) if "picture" in timed else ("unet", "vae_decoder"):
            ours = summary(row_of(document, name, OURS, case))
            if ours is not None:
                found = [against(document, case, side).get(name) for side in peers(document)]
                ratios = [f"; {item.side} takes {_ratio(item)}" for item in found if item and item.ratio]
                yield f"{words.workload(name)}, {words.case(case)}", words.seconds(ours) + "".join(ratios)
    for what, found in summaries(document):
        if what.startswith(_SHORT):
            yield what, found


def _newest(results: Iterable[Result]) -> list[Result]:
    """One of each question, in the order of the verbs."""
    kept: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: (result.document.date, result.name)):
        document = result.document
        question = {
            "about": [document.benchmark, words.model(document), words.machine(document)],
            "peers": list(document.settings.get("peers", ())),
            "timed": sorted({row.workload for row in document.select(side=OURS)}),
            "cases": sorted(map(case_key, cases(document))),
        }
        kept[case_key(question)] = result
    places = {name: place for place, name in enumerate(_KINDS)}
    return sorted(
        kept.values(), key=lambda item: (places.get(item.document.benchmark, len(places)), item.name)
    )


def _section(
    model: str, machine: str, results: Sequence[Result], figures: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    documents = [result.document for result in results]
    days = dict.fromkeys(map(words.day, sorted(documents, key=lambda document: document.date)))
    known = [document.machine.get("commit") for document in documents]
    commits = ", ".join(dict.fromkeys(str(commit) for commit in known if commit))
    commit = f"; commit {commits}" if commits else ""
    yield f"**{_safe(model)}** on {_safe(machine)}; {', '.join(days)}{commit}"
    for document in documents:
        if document.benchmark == "latency":
            for case in cases(document):
                yield _latency(document, case)
            if missing := _missing(document):
                yield missing
    lines = [_line(*pair, _command(document)) for document in documents for pair in summaries(document)]
    if lines:
        yield "\n".join([*_HEAD, *lines])
    if links := [_link(link) for result in results for link in figures.get(result.name, ())]:
        yield "Figures: " + " · ".join(links)


def _latency(document: Document, case: Mapping[str, Any]) -> str:
    """Rows of one case: ours, every peer's time over ours, the share of the ceiling, the A/A pair."""
    sides = [side for side in peers(document) if any(row.rounds for row in document.select(side=side))]
    found = {side: against(document, case, side) for side in sides}
    versus = [f"{side} ÷ ours" for side in sides]
    head = [words.case(case), "ours: p50 [p90]", *versus, "of best GEMM", "of floor", "A/A"]
    lines = [_row(head), "|" + "---|" * len(head)]
    few: dict[str, int] = {}
    timed = 0
    for name in workloads(document, case):
        ours = row_of(document, name, OURS, case)
        if ours and ours.rounds:
            timed += 1
            if len(ours.rounds) < LEAST:
                few[words.workload(name)] = len(ours.rounds)
        p90 = f" [{words.seconds(summary(ours, 'p90'))}]" if summary(ours) is not None else ""
        ratios = [_ratio(found[side].get(name)) for side in sides]
        shares = [words.number(figure(ours, share), 2) for share in ("of_best_gemm", "of_floor")]
        time = ours.status if ours and ours.status != "ok" else words.seconds(summary(ours)) + p90
        again = words.percent(spread(document, case, name))
        lines.append(_row([words.workload(name), time, *ratios, *shares, again]))
    brackets = ["95 % interval"] if len(few) < timed else []
    brackets += [f"{name}: range of {count} rounds" for name, count in few.items()]
    rates = ceiling_rates(document, GEMM)
    best = f"; best GEMM: {words.amount(max(rates), 'FLOP/s')}" if rates else ""
    note = f"square brackets after a ratio: {', '.join(brackets)}{best}"
    return "\n".join([*lines, "", f"Reproduce: `{_command(document)}`; {note}."])


def _ratio(item: Against | None) -> str:
    if item is None or item.ratio is None:
        return item.status if item and item.status == "FAILED" else words.DASH
    ratio = item.ratio
    return f"{words.ratio(ratio.value)}× [{words.ratio(ratio.low)}, {words.ratio(ratio.high)}]"


def _missing(document: Document) -> str:
    """Why rows have no time, once for each reason; a workload that a peer does not have is no news."""
    reasons: dict[str, list[str]] = {}
    for row in document.rows:
        expected = row.status == "not available" and "no workload" in row.reason
        if row.status == "ok" or not row.reason or expected:
            continue
        what = row.side if row.workload == "open" else f"{row.side}, {words.workload(row.workload)}"
        names = reasons.setdefault(f"{row.status}: {row.reason}", [])
        if what not in names:
            names.append(what)
    return "\n".join(f"- {_safe('; '.join(names))}: {_safe(reason)}" for reason, names in reasons.items())


def _command(document: Document) -> str:
    """As the document says it was called; else its verb with the model and the peers."""
    if document.benchmark == "detection":
        return "python -m latentrt.benchmarks.verbs.detection --out FILE"
    if document.benchmark == "export":
        dtypes = " ".join(map(str, document.settings.get("dtypes", ())))
        model = f"--recipe {document.settings.get('recipe')} --dtypes {dtypes}"
        return f"python -m latentrt.benchmarks.models.full_size FOLDER {model} --out FILE"
    names = items(document.settings.get("peers"))
    peers_option = f" --peers {','.join(map(str, names))}" if names else ""
    verb = f"latentrt bench {document.benchmark} {document.model.get('name')}{peers_option}"
    return " ".join(str(document.settings.get("command") or verb).replace("`", "").split())


def _link(target: str) -> str:
    stem = target.rpartition("/")[2].removesuffix(".png")
    kind = next((name for name in _FIGURES if stem.endswith(f"-{name}") or f"-{name}-" in stem), "")
    return f"[{_FIGURES.get(kind, stem)}]({target.replace(' ', '%20')})"


def _line(what: str, found: str, command: str) -> str:
    return _row([what, found, f"`{command}`"])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def _safe(text: str) -> str:
    """Without what ends a cell of a table or begins an HTML tag or comment."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ── one line for each thing a document found out, besides latency's table ──────────────────────────


def summaries(document: Document) -> Lines:
    """(what, result) of a document, in Markdown."""
    return _SUMMARIES.get(document.benchmark, lambda document: iter(()))(document)


def _outside(document: Document) -> Lines:
    for case in cases(document):
        row = row_of(document, "picture", OURS, case)
        share, each = figure(row, "non_engine_share"), figure(row, "non_engine_s_per_step")
        if share is not None:
            step = f", {words.seconds(each)} per step" if each is not None else ""
            what = f"time outside the engines, {words.case(case)}"
            yield what, f"{words.percent(share)} of a picture{step}"


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
    "latency": _outside,
    "scaling": _scaling,
    "throughput": _throughput,
    "memory": _memory,
    "cold-start": _cold_start,
    "build": _build,
    "export": _export,
    "parity": _parity,
    "detection": _detection,
}
