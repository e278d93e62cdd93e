"""The Markdown of both pages: every table for docs/measurements.md, and one short table for the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median

from .. import words
from ..intervals import LEAST
from ..records import Document, Row
from ..roofline import GEMM
from ..sides.adapted import FOLLOWED, LOAD, NEW, OPEN, picture_after
from ..sides.contract import DIFFUSERS, OURS
from ..verbs.adapters import LOADED, STEP, WORKLOADS
from ..verbs.build import TOGETHER
from ..verbs.cold_start import PARTS
from ..verbs.controls import IDLE, IN_USE, OUR_CALL, OUR_STEP, WITH_ONE
from ..verbs.hosts import ASKED, AT_ONCE
from ..verbs.opening import DRAWN, OPENED, PEAK, WRITTEN
from ..verbs.serve import BATCHED, MIXED, ONE_BY_ONE, SIMULATED
from ..verbs.steps import REFERENCE_ROW
from ..verbs.throughput import OFFLINE, SINGLE_STREAM, SWEEP
from .cells import command_of, ratio_cell, safe_text, table_line, table_row
from .quantised_table import quantised_table
from .reading import (
    Case,
    Result,
    against,
    cases,
    ceiling_rates,
    figure,
    our_rows,
    peers,
    spread,
    summary,
)

Lines = Iterator[tuple[str, str]]
_AXES = {"steps": (1, "step"), "batch": (1, "picture"), "pixels": (1e6, "megapixel")}
_LEDGER = {"weights": "weights", "activations": "activations", "io": "in and out"}
_FIGURES = {
    "waterfall": "one picture, stage by stage",
    "peers": "ours against peers",
    "roofline": "roofline",
    "accuracy": "right pictures over calls",
    "distance": "distance over calls",
}
_HEAD = ("| what | result | reproduce |", "|---|---|---|")
# What the short table takes from a document besides latencies: the beginnings of `summaries`' lines.
_SHORT = (
    "peak in host memory",
    "peak on the device",
    "cold start, whole",
    "build",
    "parity of pictures",
    WITH_ONE,
)
_EXPLAINED = (
    "latency",
    "opening",
    "adapters",
    "controls",
    "serve",
    "hosts",
    "quantised",
)  # documents that say why rows have no time
_AFTER = {picture_after(name) for name in FOLLOWED}
_ROWS = 13  # of the short table, at most
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
    """A few rows: the whole picture or the large nets beside peers, memory, start, build, parity.

    `link`: to the page with all tables.
    """
    newest = _newest(results)
    lines = [
        table_line(f"{words.model(result.document)}: {what}", found, result.document)
        for result in newest
        for what, found in _highlights(result.document)
    ]
    if not lines:
        return NOTHING
    machines = "; ".join(dict.fromkeys(safe_text(words.machine(result.document)) for result in newest))
    where = f" [All measurements, and how they were made]({link})." if link else ""
    return "\n".join([*_HEAD, *lines[:_ROWS], "", f"Measured on {machines}.{where}"])


def _highlights(document: Document) -> Lines:
    for case in cases(document) if document.benchmark == "latency" and peers(document) else ():
        rows = our_rows(document, case)
        sides = {side: against(document, case, side) for side in peers(document)}
        for name in ("picture",) if "picture" in rows else ("unet", "vae_decoder"):
            if (ours := summary(rows.get(name))) is not None:
                found = {side: rows[name] for side, rows in sides.items() if name in rows}
                ratios = [f"; {side} takes {ratio_cell(item)}" for side, item in found.items() if item.ratio]
                yield f"{words.workload(name)}, {words.case(case)}", words.seconds(ours) + "".join(ratios)
    for what, result in summaries(document):
        if what.startswith(_SHORT):
            yield what, result
    if document.benchmark == "opening":
        yield from _first_pictures(document)
    if document.benchmark == "adapters":
        yield from _new_and_open(document)


def _newest(results: Iterable[Result]) -> list[Result]:
    """One of each question, in the order of the verbs."""
    kept: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: (result.document.date, result.name)):
        document = result.document
        question = {
            "about": [document.benchmark, words.model(document), words.machine(document)],
            "peers": [document.settings.get(name, []) for name in ("peers", "sides")],
            "timed": sorted({row.workload for row in document.select(side=OURS)}),
            "cases": sorted(json.dumps(case, sort_keys=True) for case in cases(document)),
        }
        kept[json.dumps(question)] = result
    places = {name: place for place, name in enumerate(_SUMMARIES)}
    last = len(places)
    return sorted(kept.values(), key=lambda item: (places.get(item.document.benchmark, last), item.name))


def _section(
    model: str, machine: str, results: Sequence[Result], figures: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    documents = [result.document for result in results]
    days = dict.fromkeys(map(words.day, sorted(documents, key=lambda document: document.date)))
    commits = ", ".join(filter(None, dict.fromkeys(item.machine.get("commit") for item in documents)))
    commit = f"; commit {commits}" if commits else ""
    yield f"**{safe_text(model)}** on {safe_text(machine)}; {', '.join(days)}{commit}"
    for document in documents:
        if document.benchmark in _TABLES:
            yield from filter(None, _TABLES[document.benchmark](document))
        if document.benchmark in _EXPLAINED and (missing := _missing(document)):
            yield missing
    lines = [table_line(*pair, document) for document in documents for pair in summaries(document)]
    if lines:
        yield "\n".join([*_HEAD, *lines])
    if links := [_link(link) for result in results for link in figures.get(result.name, ())]:
        yield "Figures: " + " · ".join(links)


def _latency(document: Document, case: Case) -> str:
    """Rows of one case: ours, every peer's time over ours, the share of the ceiling, the A/A pair."""
    sides = [side for side in peers(document) if any(row.rounds for row in document.select(side=side))]
    found = {side: against(document, case, side) for side in sides}
    versus = [f"{side} ÷ ours" for side in sides]
    head = [words.case(case), "ours: p50 [p90]", *versus, "of best GEMM", "of floor", "A/A"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    rows = our_rows(document, case)
    for name, ours in rows.items():
        time = ours.status
        if ours.status == "ok":
            time = f"{words.seconds(summary(ours))} [{words.seconds(summary(ours, 'p90'))}]"
        ratios = [ratio_cell(found[side].get(name)) for side in sides]
        shares = [words.number(figure(ours, share), 2) for share in ("of_best_gemm", "of_floor")]
        again = words.percent(spread(document, ours))
        lines.append(table_row([words.workload(name), time, *ratios, *shares, again]))
    counts = {words.workload(name): len(row.rounds) for name, row in rows.items() if row.rounds}
    few = [f"{name}: range of {count} rounds" for name, count in counts.items() if count < LEAST]
    brackets = ["95 % interval", *few] if len(few) < len(counts) else few
    rates = ceiling_rates(document, GEMM)
    best = f"; best GEMM: {words.amount(max(rates), 'FLOP/s')}" if rates else ""
    note = f"square brackets after a ratio: {', '.join(brackets)}{best}"
    return "\n".join([*lines, "", f"Reproduce: `{command_of(document)}`; {note}."])


def _opening(document: Document) -> str:
    """A row for each way to the first picture."""
    head = [f"to the first picture, {_one_step(document)}", OPENED, "of which export", DRAWN, PEAK, WRITTEN]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for (side, way), rows in _ways(document).items():
        peak, opened = rows.get(PEAK), rows.get(OPENED)
        over = figure(peak, "over_weights")
        cells = [
            words.seconds(summary(opened)) if opened else words.DASH,
            words.seconds(figure(opened, "export_s")),
            words.seconds(summary(rows[DRAWN])) if rows[DRAWN].status == "ok" else rows[DRAWN].status,
            words.amount(summary(peak), "B") + (f" ({over:.2f}× the weights)" if over else ""),
            words.amount(summary(rows.get(WRITTEN)), "B"),
        ]
        lines.append(table_row([f"{side}, {way}", *cells]))
    rounds = document.settings["rounds"]
    medians = f"medians of {rounds} rounds; " if rounds > 1 else ""
    return "\n".join([*lines, "", f"Reproduce: `{command_of(document)}`; {medians}weights: in fp32."])


def _first_pictures(document: Document) -> Lines:
    """The short table's line."""
    found = [
        f"{side if side != OURS else ''} {way} {words.seconds(summary(rows[DRAWN]))}".strip()
        for (side, way), rows in _ways(document).items()
        if rows[DRAWN].rounds
    ]
    if found:
        yield f"from the checkpoint to the first picture, {_one_step(document)}", ", ".join(found)


def _ways(document: Document) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of each way by workload, by its side and its name."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in document.rows:
        found.setdefault((row.side, row.case["way"]), {})[row.workload] = row
    return found


def _adapters(document: Document) -> str:
    """A row for each file and side; nothing where no file was measured."""
    found = _files(document)
    if not found:
        return ""
    columns = [name for name in WORKLOADS if any(name in rows for rows in found.values())]
    head = [_of_rank(document), *("then a picture" if name in _AFTER else name for name in columns)]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for (lora, side), rows in found.items():
        cells = [
            (words.seconds(summary(rows[name])) if rows[name].rounds else rows[name].status)
            if name in rows
            else words.DASH
            for name in columns
        ]
        lines.append(table_row([f"{lora}, {side}", *cells]))
    rounds = document.settings["rounds"]
    medians = f"; medians of {rounds} rounds" if rounds > 1 else ""
    return "\n".join([*lines, "", f"Reproduce: `{command_of(document)}`{medians}."])


def _new_and_open(document: Document) -> Lines:
    """The short table's line: from a file to its nets, and back to nets that are open."""
    times: dict[str, list[str]] = {}
    for (lora, side), rows in _files(document).items():
        found: list[str] = []
        for workloads in ((LOAD, NEW), (OPEN,)):
            if used := [rows[name] for name in workloads if name in rows and rows[name].rounds]:
                each = [sum(samples) for samples in zip(*(row.samples for row in used), strict=True)]
                found.append(words.seconds(median(each)))
        if found:
            times.setdefault(lora, []).append(
                f"{side if side != OURS else ''} {', again '.join(found)}".strip()
            )
    if times:
        yield (
            f"{_of_rank(document)}, from a file to its set",
            "; ".join(f"{lora} {', '.join(sides)}" for lora, sides in times.items()),
        )


def _files(document: Document) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of each adapter's file by workload, by its name and the side."""
    rows = [row for row in document.rows if "lora" in row.case]
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for lora in dict.fromkeys(row.case["lora"] for row in rows):
        for row in rows:
            if row.case["lora"] == lora:
                found.setdefault((lora, row.side), {})[row.workload] = row
    return found


# How the ways of drawing are called, in the order of the table.
_WAYS_TO_DRAW = {
    ONE_BY_ONE: "one at a time",
    BATCHED: "equal requests as one batch",
    OURS: "shared steps",
}
_LOAD_HEAD = ("p50", "p99", "pictures/s", "in time/s", "refused", "UNet calls", "rows a call")


def _loads(document: Document) -> Iterator[str]:
    """A table of what was measured, and one for each cost that was simulated."""
    measured = [row for row in document.select(MIXED) if row.rounds]
    if measured:
        yield _load_table("load, way to draw", measured, _measured_note(document))
    simulated = [row for row in document.select(SIMULATED) if row.rounds]
    for cost in dict.fromkeys(row.case["cost"] for row in simulated):
        rows = [row for row in simulated if row.case["cost"] == cost]
        yield _load_table(f"simulation ({cost}): load, way to draw", rows, _simulated_note(document, rows[0]))


def _load_table(title: str, rows: Sequence[Row], note: str) -> str:
    head = [title, *_LOAD_HEAD]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for row in rows:
        rates = [words.number(figure(row, name)) for name in ("requests_per_s", "in_time_per_s")]
        calls = [words.number(figure(row, "unet_calls"), 4), words.number(figure(row, "mean_rows"))]
        cells = [
            f"{row.case['load']:g}, {_WAYS_TO_DRAW[row.side]}",
            *(words.seconds(summary(row, name)) for name in ("p50", "p99")),
            *rates,
            words.percent(figure(row, "refused")),
            *calls,
        ]
        lines.append(table_row(cells))
    return "\n".join([*lines, "", note])


def _hosts(document: Document) -> str:
    """A row for each side: one caller, then several."""
    callers = document.settings["callers"]
    head = ["drawn by", "one caller: p50 [p99]", "÷ in process", "pictures/s"]
    head += [f"{callers} callers: p50 [p99]", "÷ in process", "pictures/s"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for side in (OURS, *peers(document)):
        cells = ["this process" if side == OURS else side]
        for workload in (ASKED, AT_ONCE):
            row = next(document.select(workload, side))
            ratio = (
                words.DASH if side == OURS else ratio_cell(against(document, row.case, side).get(workload))
            )
            p50, p99 = (words.seconds(summary(row, name)) for name in ("p50", "p99"))
            cells += [f"{p50} [{p99}]", ratio, words.number(figure(row, "requests_per_s"))]
        lines.append(table_row(cells))
    case = words.case(document.rows[0].case)
    rounds, requests = document.settings["rounds"], document.settings["requests"]
    turns = f"{rounds} rounds, a turn is {requests} requests of each caller"
    note = f"{case}; {turns}; callers share calls of the UNet."
    return "\n".join([*lines, "", f"Reproduce: `{command_of(document)}`; {note}"])


def _over_http(document: Document) -> Lines:
    """What each server adds to a request of one caller."""
    added = [
        f"{side} {ratio_cell(against(document, row.case, side).get(ASKED))}"
        for side in peers(document)
        for row in document.select(ASKED, side)
        if row.rounds
    ]
    if added:
        yield "a request to a server ÷ in process", ", ".join(added)


def _measured_note(document: Document) -> str:
    facts = document.settings
    return (
        f"Reproduce: `{command_of(document)}`; {facts['rounds']} rounds of"
        f" {facts['requests']} mixed requests; load 1: {words.number(facts['requests_per_s'])} pictures/s,"
        f" what it draws one at a time; in time: within {facts['in_time']:g} times what a request takes"
        f" alone; above load 1 at most {facts['jobs']} jobs are there;"
        f" at most {facts['rows']} rows in a shared call."
    )


def _simulated_note(document: Document, row: Row) -> str:
    """What it takes, as pictures of the first kind do."""
    cost, facts = row.figures["cost"], document.settings
    fixed, each, begin, end = (f"{1e3 * cost[name]:.3g}" for name in ("fixed", "each", "begin", "decode"))
    return (
        f"Simulation with the same scheduler: {facts['simulated']} requests; a call of the UNet with b rows"
        f" takes {fixed} + {each} b ms, a picture {begin} ms before its first step and {end} ms after its"
        " last."
    )


def _of_rank(document: Document) -> str:
    case = next(row.case for row in document.rows if "lora" in row.case)
    return f"LoRA of rank {case['rank']}, {case['width']}×{case['height']}"


def _one_step(document: Document) -> str:
    case = document.rows[0].case
    return f"{case['width']}×{case['height']}, one step"


def _missing(document: Document) -> str:
    """Why rows have no time, once for each reason; a workload that a peer does not have is no news."""
    reasons: dict[str, dict[str, None]] = {}
    for row in document.rows:
        expected = row.status == "not available" and "no workload" in row.reason
        if row.status != "ok" and row.reason and not expected:
            what = row.side if row.workload == "open" else f"{row.side}, {words.workload(row.workload)}"
            reasons.setdefault(f"{row.status}: {row.reason}", {})[what] = None
    return "\n".join(
        f"- {safe_text('; '.join(names))}: {safe_text(reason)}" for reason, names in reasons.items()
    )


def _link(target: str) -> str:
    label = next(text for name, text in _FIGURES.items() if f"-{name}." in target or f"-{name}-" in target)
    return f"[{label}]({target.replace(' ', '%20')})"


# ── one line for each thing a document found out, besides latency's table ──────────────────────────


def summaries(document: Document) -> Lines:
    """(what, result) of a document, in Markdown."""
    return _SUMMARIES[document.benchmark](document) if document.benchmark in _SUMMARIES else iter(())


def _outside(document: Document) -> Lines:
    for case in cases(document):
        row = our_rows(document, case).get("picture")
        share, each = figure(row, "non_engine_share"), figure(row, "non_engine_s_per_step")
        if share is not None:
            what = f"time outside the engines, {words.case(case)}"
            yield what, f"{words.percent(share)} of a picture, {words.seconds(each)} per step"


def _scaling(document: Document) -> Lines:
    """The line through the points of each axis, and the points."""
    for row in document.select("fit", OURS):
        facts = row.figures
        scale, unit = _AXES[facts["of"]]
        points = "; ".join(f"{x / scale:.3g}: {words.seconds(taken)}" for x, taken in facts["points"])
        what = f"{words.workload(facts['workload'])} against {facts['of']}"
        if row.status != "ok":
            yield what, f"{points}; {row.status}: {row.reason}"
            continue
        rest, each = facts["intercept"], words.seconds(facts["slope"] * scale)
        line = f"{each} per {unit} {'−' if rest < 0 else '+'} {words.seconds(abs(rest))}"
        yield what, f"{line}, largest residual {words.percent(facts['residual'])} ({points})"


def _throughput(document: Document) -> Lines:
    good = [row for row in document.select(SWEEP, OURS) if row.status == "ok"]
    if good:
        rates = [f"{row.case['pictures']}: {words.number(figure(row, 'samples_per_s'))}" for row in good]
        yield "throughput by batch, pictures per second", "; ".join(rates)
    for scenario in (SINGLE_STREAM, OFFLINE):
        yield from ((f"throughput, {scenario}", _scenario(row)) for row in document.select(scenario, OURS))


def _scenario(row: Row) -> str:
    """SingleStream's own metric is p90, Offline's the rate."""
    if row.status != "ok":
        return f"{row.status}: {row.reason}"
    if row.workload == SINGLE_STREAM:
        return ", ".join(f"{name} {words.seconds(summary(row, name))}" for name in ("p90", "p50", "p99"))
    return f"{words.number(figure(row, 'samples_per_s'))} pictures/s at batch {row.case['pictures']}"


def _memory(document: Document) -> Lines:
    for workload, where in (("peak", "peak in host memory"), ("device peak", "peak on the device")):
        sizes = [
            f"{side} {words.amount(summary(row), 'B')}"
            for side in (OURS, *peers(document))
            for row in document.select(workload, side)
            if row.samples
        ]
        if sizes:
            yield where, ", ".join(sizes)
    for workload, write in (("ledger", _ledger), ("timeline", _timeline)):
        for row in document.select(workload, OURS):
            if row.status == "ok" and row.samples:
                yield from write(row)
    for row in document.select("growth per step", OURS):
        if (grown := figure(row, "growth_per_step")) is not None:
            steps = row.figures["steps"] - row.figures["from_step"]
            yield "what each step leaves behind", f"{grown:.2g} B, over {steps} steps"


def _ledger(row: Row) -> Lines:
    """What the library says that each net holds."""
    nets: list[str] = []
    for name, facts in row.figures["nets"].items():
        known = {label: facts[part] for part, label in _LEDGER.items() if facts[part]}
        parts = ", ".join(f"{label} {words.amount(size, 'B')}" for label, size in known.items())
        nets += [f"{words.workload(name)}: {parts}"] if parts else []
    untold = any(facts["activations"] is None for facts in row.figures["nets"].values())
    without = "; of activations the library does not tell" if untold else ""
    yield "memory of the nets", words.amount(summary(row), "B") + without
    yield "memory by net", "; ".join(nets)


def _timeline(row: Row) -> Lines:
    """How much at the beginning, and at most during which stage."""
    every, sizes = row.figures["interval_s"], row.samples
    top = max(range(len(sizes)), key=sizes.__getitem__)
    begun = [mark["stage"] for mark in row.figures["marks"] if mark["at_s"] <= every * (top + 1)]
    stage = f" ({words.workload(begun[-1])})" if begun else ""
    begin, peak = words.amount(sizes[0], "B"), words.amount(sizes[top], "B")
    when = f"after {words.seconds(every * top)}{stage} of {words.seconds(every * len(sizes))}"
    yield "memory over the first request of a process", f"{begin} at its beginning, peak {peak} {when}"


def _cold_start(document: Document) -> Lines:
    """The parts of one process, and whole processes."""
    found: dict[str, list[str]] = {}
    for row in document.select(side=OURS):
        if (middle := summary(row)) is not None:
            what = "cold start, its parts" if row.workload in PARTS else "cold start, whole processes"
            found.setdefault(what, []).append(f"{row.workload} {words.seconds(middle)}")
    yield from ((what, ", ".join(parts)) for what, parts in found.items())


def _build(document: Document) -> Lines:
    """All nets together; one alone says which it is, and is no row of the short table."""
    nets = [row for row in document.select(side=OURS) if row.workload != TOGETHER]
    good = f"{sum(row.status == 'ok' for row in nets)} of {len(nets)} nets"
    for row in document.select(TOGETHER, OURS):
        result = f"{good} in {words.seconds(summary(row))}" if row.samples else f"{good}; {row.reason}"
        if row.figures:
            peak, size = row.figures["peak_rss_gb"] * 1e9, row.figures["engine_mb"] * 1e6
            result += f", peak {words.amount(peak, 'B')}, engines {words.amount(size, 'B')}"
        yield "build of the engines" if len(nets) > 1 else f"engine of {nets[0].workload} alone", result


def _export(document: Document) -> Lines:
    """Each package: time, CPU time and peak memory."""
    for case in cases(document):
        rows = our_rows(document, case)
        seconds, peak = (summary(rows.get(name)) for name in ("export", "export peak memory"))
        if seconds is not None:
            cpu = f"{words.seconds(figure(rows['export'], 'cpu_seconds'))} of CPU time"
            what = f"export with `--verify`, {case['dtype']}"
            yield what, f"{words.seconds(seconds)}, {cpu}, peak {words.amount(peak, 'B')}"


def _parity(document: Document) -> Lines:
    """The worst of all nets, and of all pictures."""
    for what, pictures in (("nets", False), ("pictures", True)):
        rows = [row for row in document.select(side=OURS) if (row.workload == "picture") == pictures]
        error, decibels, likeness = (
            [value for row in rows if (value := figure(row, name)) is not None]
            for name in ("relative_l2", "psnr_db", "ssim")
        )
        if not error:
            continue
        failed = sum(row.status == "FAILED" for row in rows)
        parts = [f"{len(error)} compared{f', {failed} FAILED' if failed else ''}"]
        if worst := max(error):
            parts += [f"largest relative L2 {worst:.1e}"]
            parts += [f"lowest PSNR {min(decibels):.1f} dB"] if decibels else []
            parts += [f"lowest SSIM {min(likeness):.4f}"] if likeness else []
        else:
            parts.append("identical")
        references = [row.figures["reference"] for row in rows if "reference" in row.figures]
        yield f"parity of {what} with {next(iter(references), 'the reference')}", ", ".join(parts)


def _with_adapters(document: Document) -> Lines:
    """What is held while adapters change, and what a step takes that uses none."""
    yield from _peaks(document, "peak while adapters change", "the first")
    yield from _unused(document, STEP, LOADED, "where some are loaded")


def _with_controls(document: Document) -> Lines:
    """What a step takes with a ControlNet, what one that is not used costs it, and what is held."""
    if call := next((row for row in document.select(OUR_CALL, OURS) if row.rounds), None):
        times = ratio_cell(against(document, call.case, IDLE).get(OUR_CALL), 3)
        idle = next(document.select(OUR_STEP, IDLE), None)
        same = (
            f", {figure(idle, 'differing'):.0f} bytes of the picture differ" if idle and idle.rounds else ""
        )
        yield (
            f"{OUR_CALL}, {words.case(call.case)}",
            (f"{words.seconds(summary(call))}; where a ControlNet is loaded and not used {times}{same}"),
        )
    ours = next(document.select(WITH_ONE, OURS), None)
    if ours and ours.rounds:
        used = next(document.select(OUR_STEP, IN_USE))
        found = against(document, ours.case, DIFFUSERS).get(WITH_ONE)
        added = f"{ratio_cell(against(document, used.case, IN_USE).get(OUR_STEP))} of one without"
        beside = f"; {DIFFUSERS} takes {ratio_cell(found)}" if found else ""
        yield f"{WITH_ONE}, {words.case(ours.case)}", f"{words.seconds(summary(ours))}, {added}{beside}"
    yield from _peaks(document, "peak with one ControlNet", "it was loaded")


def _peaks(document: Document, what: str, event: str) -> Lines:
    """The most that each side held."""
    peaks = [row for row in document.select(PEAK) if row.rounds]
    if peaks:
        sizes = (
            f"{row.side} {words.amount(summary(row), 'B')}"
            f" ({words.amount(figure(row, 'before'), 'B')} before {event})"
            for row in peaks
        )
        yield what, ", ".join(sizes)


def _unused(document: Document, workload: str, side: str, where: str, places: int = 2) -> Lines:
    """What a step takes on a side that has something loaded and does not use it."""
    own, loaded = (next(document.select(workload, name), None) for name in (OURS, side))
    if own and loaded and loaded.rounds:
        times = ratio_cell(against(document, loaded.case, side).get(workload), places)
        differing = f"{figure(loaded, 'differing'):.0f} bytes of the picture differ"
        yield workload, f"{words.seconds(summary(own))}; {where} {times}, {differing}"


def _under_load(document: Document) -> Lines:
    """Each way of drawing, at the highest load that is no overload."""
    rows = [row for row in document.select(MIXED) if row.rounds and row.case["load"] <= 1]
    highest = max((row.case["load"] for row in rows), default=0)
    times = [
        f"{_WAYS_TO_DRAW[row.side]} {words.seconds(summary(row))} [{words.seconds(summary(row, 'p99'))}]"
        for row in rows
        if row.case["load"] == highest
    ]
    if times:
        yield f"mixed requests at load {highest:g}, latency p50 [p99]", ", ".join(times)


def _calls(document: Document) -> Lines:
    """The samplers whose pictures are most often right after so many calls, and the nearest one."""
    rows = [row for row in document.select(side=OURS) if row.rounds]
    drawn = [row for row in rows if row.workload != REFERENCE_ROW]
    for calls in document.settings["calls"]:
        there = [row for row in drawn if row.figures["calls"] == calls]
        if not there:
            continue
        best = sorted(there, key=lambda row: -row.figures["strict"])[:3]
        nearest = min(there, key=lambda row: row.summary["p50"])
        shares = ", ".join(f"{row.workload} {words.percent(row.figures['strict'])}" for row in best)
        near = f"nearest {nearest.workload}, relative L2 {nearest.summary['p50']:.3f}"
        yield f"pictures that are right after {calls} calls", f"{shares}; {near}"
    for row in rows:
        if row.workload == REFERENCE_ROW:
            right = words.percent(row.figures["strict"])
            yield f"pictures that are right after {row.figures['calls']} calls", right


_TABLES: Mapping[str, Callable[[Document], Iterable[str]]] = {
    "latency": lambda document: (_latency(document, case) for case in cases(document)),
    "opening": lambda document: [_opening(document)],
    "adapters": lambda document: [_adapters(document)],
    "serve": _loads,
    "hosts": lambda document: [_hosts(document)],
    "quantised": lambda document: [quantised_table(document)],
}
# In the order in which documents are shown.
_SUMMARIES: Mapping[str, Callable[[Document], Lines]] = {
    "latency": _outside,
    "scaling": _scaling,
    "throughput": _throughput,
    "memory": _memory,
    "cold-start": _cold_start,
    "adapters": _with_adapters,
    "controls": _with_controls,
    "serve": _under_load,
    "hosts": _over_http,
    "build": _build,
    "parity": _parity,
    "steps": _calls,
    "export": _export,
}
