"""The Markdown of both pages: every table for docs/measurements.md, and one short table for the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..intervals import LEAST
from ..records import Document
from ..roofline import GEMM
from ..sides.contract import OURS
from . import words
from .reading import (
    Against,
    against,
    case_key,
    cases,
    ceiling_rates,
    figure,
    items,
    peers,
    row_of,
    spread,
    summary,
    workloads,
)
from .results import Result
from .summary import summaries

_KINDS = ("latency", "scaling", "throughput", "memory", "cold-start", "build", "parity", "detection")
_FIGURES = {
    "waterfall": "one picture, stage by stage",
    "peers": "ours against peers",
    "roofline": "roofline",
}
_HEAD = ("| what | result | reproduce |", "|---|---|---|")
# What the short table takes from a document besides latencies: the beginnings of `summaries`' lines.
_SHORT = ("peak in host memory", "peak on the device", "cold start", "build", "parity")
_ROWS = 12  # of the short table, at most
NOTHING = "Nothing was measured yet: `latentrt bench latency demo`."


def full_tables(results: Sequence[Result], figures: Mapping[str, Sequence[str]]) -> str:
    """For each model and machine: latencies, everything else, and links to the figures.

    Args:
        results: all documents; of those that answer the same question the newest counts.
        figures: links by `Result.name`.
    """
    sections: dict[tuple[str, str], list[Result]] = {}
    for result in _newest(results):
        about = words.model(result.document), words.machine(result.document)
        sections.setdefault(about, []).append(result)
    parts = [
        "\n\n".join(_section(model, machine, found, figures))
        for (model, machine), found in sorted(sections.items())
    ]
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
    lines = [
        _line(what, found, _command(document))
        for document in documents
        for what, found in summaries(document)
    ]
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
