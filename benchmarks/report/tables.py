"""The Markdown of the README: for each model and machine what a newcomer wants to know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..intervals import LEAST
from ..records import Document, Row
from ..roofline import GEMM
from ..sides.contract import OURS
from . import words
from .reading import Against, against, cases, figure, items, p50, peers, percentile, row_of, spread, workloads
from .results import Result
from .roofline import ceiling_rates
from .summary import summaries

_KINDS = ("latency", "scaling", "throughput", "memory", "cold-start", "build", "parity", "detection")
_FIGURES = {
    "waterfall": "one picture, stage by stage",
    "peers": "ours against peers",
    "roofline": "roofline",
    "scaling": "steps, batch, size",
    "ledger": "memory by net",
    "timeline": "memory over a request",
}


def markdown(results: Sequence[Result], figures: Mapping[str, Sequence[str]]) -> str:
    """Everything between the markers.

    Args:
        results: all documents; of those that answer the same question the newest counts.
        figures: links by `Result.name`.
    """
    sections: dict[tuple[str, str], list[Result]] = {}
    for result in _newest(results):
        about = words.model(result.document), words.machine(result.document)
        sections.setdefault(about, []).append(result)
    if not sections:
        return "Nothing was measured yet: `latentrt bench latency demo`."
    return "\n\n".join(
        "\n\n".join(_section(model, machine, found, figures))
        for (model, machine), found in sorted(sections.items())
    )


def _newest(results: Iterable[Result]) -> list[Result]:
    """One of each question, in the order of the verbs."""
    kept: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: (result.document.date, result.name)):
        document = result.document
        asked = sorted(json.dumps(dict(case), sort_keys=True) for case in cases(document))
        against = ",".join(map(str, document.settings.get("peers", ())))
        timed = ",".join(sorted({row.workload for row in document.select(side=OURS)}))
        about = [document.benchmark, words.model(document), words.machine(document), against, timed, *asked]
        kept[json.dumps(about)] = result
    places = {name: place for place, name in enumerate(_KINDS)}
    return sorted(
        kept.values(), key=lambda item: (places.get(item.document.benchmark, len(places)), item.name)
    )


def _section(
    model: str, machine: str, results: Sequence[Result], figures: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    days = dict.fromkeys(
        words.day(result.document) for result in sorted(results, key=lambda item: item.document.date)
    )
    commits = dict.fromkeys(str(result.document.machine.get("commit") or words.DASH) for result in results)
    yield f"**{_safe(model)}** on {_safe(machine)}; {', '.join(days)}; commit {', '.join(commits)}"
    for result in results:
        if result.document.benchmark == "latency":
            for case in cases(result.document):
                yield _latency(result.document, case)
            if missing := _missing(result.document):
                yield missing
    lines = [
        _line(what, found, _command(result.document))
        for result in results
        for what, found in summaries(result.document)
    ]
    if lines:
        yield "\n".join(["| what | result | reproduce |", "|---|---|---|", *lines])
    if links := [_link(link) for result in results for link in figures.get(result.name, ())]:
        yield "Figures: " + " · ".join(links)


def _latency(document: Document, case: Mapping[str, Any]) -> str:
    """Rows of one case: ours, every peer's time over ours, the share of the ceiling, the A/A pair."""
    sides = [side for side in peers(document) if any(row.rounds for row in document.select(side=side))]
    found = {side: {item.workload: item for item in against(document, case, side)} for side in sides}
    head = [
        words.case(case),
        "ours: p50 [p90]",
        *(f"{side} ÷ ours" for side in sides),
        "of best GEMM",
        "of floor",
        "A/A",
    ]
    lines = [_row(head), "|" + "---|" * len(head)]
    for name in workloads(document, case):
        ours = row_of(document, name, OURS, case)
        ratios = [_ratio(found[side].get(name)) for side in sides]
        shares = [words.number(figure(ours, share), 2) for share in ("of_best_gemm", "of_floor")]
        cells = [
            words.workload(name),
            _time(ours),
            *ratios,
            *shares,
            words.percent(spread(document, case, name)),
        ]
        lines.append(_row(cells))
    return "\n".join([*lines, "", f"Reproduce: `{_command(document)}`; {_brackets(document, case)}."])


def _brackets(document: Document, case: Mapping[str, Any]) -> str:
    """What stands in the square brackets after a ratio."""
    rounds = {
        words.workload(name): len(row.rounds)
        for name in workloads(document, case)
        if (row := row_of(document, name, OURS, case)) and row.rounds
    }
    few = {name: count for name, count in rounds.items() if count < LEAST}
    told = ["95 % interval"] if len(few) < len(rounds) else []
    told += [f"{name}: range of {count} rounds" for name, count in few.items()]
    rates = ceiling_rates(document, GEMM)
    best = f"; best GEMM: {words.amount(max(rates), 'FLOP/s')}" if rates else ""
    return f"square brackets after a ratio: {', '.join(told)}{best}"


def _time(row: Row | None) -> str:
    if row is None or row.status != "ok":
        return row.status if row else words.DASH
    p90 = percentile(row, "p90")
    return words.value_of(p50(row), row.unit) + (f" [{words.value_of(p90, row.unit)}]" if p90 else "")


def _ratio(item: Against | None) -> str:
    if item is None or (item.ratio is None and item.status == "ok"):
        return words.DASH
    if item.ratio is None:
        return words.DASH if item.status == "not available" else item.status
    ratio = item.ratio
    return f"{words.ratio(ratio.value)}× [{words.ratio(ratio.low)}, {words.ratio(ratio.high)}]"


def _missing(document: Document) -> str:
    """Why rows have no time, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in document.rows:
        if (
            row.status == "ok"
            or not row.reason
            or (row.status == "not available" and "no workload" in row.reason)
        ):
            continue
        what = row.side if row.workload == "open" else f"{row.side}, {words.workload(row.workload)}"
        names = reasons.setdefault(f"{row.status}: {row.reason}", [])
        if what not in names:
            names.append(what)
    return "\n".join(f"- {_safe('; '.join(names))}: {_safe(reason)}" for reason, names in reasons.items())


def _line(what: str, found: str, command: str) -> str:
    return _row([what, found, f"`{command}`"])


def _command(document: Document) -> str:
    """As the document says it was called; else its verb with the model and the peers."""
    if document.benchmark == "detection":
        return "python -m latentrt.benchmarks.verbs.detection --out FILE"
    if document.benchmark == "export":
        dtypes = " ".join(map(str, document.settings.get("dtypes", ())))
        model = f"--recipe {document.settings.get('recipe')} --dtypes {dtypes}"
        return f"python -m latentrt.benchmarks.models.full_size FOLDER {model} --out FILE"
    names = items(document.settings.get("peers"))
    asked = f" --peers {','.join(map(str, names))}" if names else ""
    verb = f"latentrt bench {document.benchmark} {document.model.get('name')}{asked}"
    told = document.settings.get("command") or verb
    return " ".join(str(told).replace("`", "").split())


def _link(target: str) -> str:
    stem = target.rpartition("/")[2].removesuffix(".png")
    kind = next((name for name in _FIGURES if stem.endswith(f"-{name}") or f"-{name}-" in stem), "")
    return f"[{_FIGURES.get(kind, stem)}]({target.replace(' ', '%20')})"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def _safe(text: str) -> str:
    """Without what ends a cell of a table or begins an HTML tag or comment."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
