"""The table of packages in fewer bits: times, memory, and how far their pictures are from what they were."""

from __future__ import annotations

from collections.abc import Iterator

from .. import words
from ..records import Document, Row
from ..sides.contract import OURS
from ..verbs.memory import PEAK
from ..verbs.quantised import APART, RIGHT, WORKLOADS
from .cells import command_of, ratio_cell, table_row
from .reading import against, figure, summary

_EXPLAINED = (
    "likeness: to ours as it was, relative L2 of the UNet and dB of the picture; peak: resident memory of the"
    " process, with what opening it took"
)


def quantised_table(document: Document) -> str:
    """A row for each side, and columns for each workload that was measured."""
    timed = [name for name in WORKLOADS if any(document.select(name))]
    judged = any(document.select(RIGHT))
    head = ["drawn by", *(cell for name in timed for cell in (words.workload(name), "÷ ours"))]
    head += ["likeness", "peak", *(["right pictures"] if judged else [])]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for side in document.settings["sides"]:
        if any(row.rounds for row in document.select(side=side)):
            lines.append(table_row(_cells(document, side, timed, judged=judged)))
    case = words.case(next(row.case for row in document.rows if row.case))
    of = next((f"; right: of {row.figures['count']}" for row in document.select(RIGHT)), "")
    of += "; sides were open one at a time, in turns" if document.settings.get("open") == APART else ""
    return "\n".join([*lines, "", f"Reproduce: `{command_of(document)}`; {case}; {_EXPLAINED}{of}."])


def _cells(document: Document, side: str, timed: list[str], *, judged: bool) -> Iterator[str]:
    yield side
    for name in timed:
        row = next(document.select(name, side), None)
        other = None if side == OURS or row is None else against(document, row.case, side).get(name)
        yield words.seconds(summary(row)) if row and row.rounds else _why(row)
        yield ratio_cell(other) if other else words.DASH
    yield words.DASH if side == OURS else ", ".join(_likeness(document, side)) or words.DASH
    yield words.amount(summary(next(document.select(PEAK, side), None)), "B")
    if judged:
        yield _right(next(document.select(RIGHT, side), None))


def _why(row: Row | None) -> str:
    return "FAILED" if row and row.status == "FAILED" else words.DASH


def _likeness(document: Document, side: str) -> Iterator[str]:
    unet, picture = (next(document.select(name, side), None) for name in ("unet", "picture"))
    if (distance := figure(unet, "relative_l2")) is not None:
        yield f"{distance:.1e}"
    if (decibels := figure(picture, "psnr_db")) is not None:
        yield f"{decibels:.1f} dB"
    if any(row and "below_bar" in row.figures for row in (unet, picture)):
        yield "below the bar"


def _right(row: Row | None) -> str:
    if row is None:
        return words.DASH
    return f"{row.figures['strict']}, shuffled prompts {row.figures['shuffled']}"
