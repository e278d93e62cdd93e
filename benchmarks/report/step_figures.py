"""Figures of `latentrt bench steps`: right pictures, and distance, over calls of the UNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..records import Document, Row
from ..verbs.steps import REFERENCE_ROW
from .figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, Draw, Sheet
from .reading import Case, Result, figure, summary

_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, INK)
_LINES = ("-", "--", ":")


def plan_accuracy(result: Result, case: Case) -> Draw | None:
    """For a case whose rows say which share of the pictures was right."""
    known = any(figure(row, "strict") is not None for row in result.document.select(case=case))
    return partial(_draw_accuracy, result, case) if known else None


def plan_distance(result: Result, case: Case) -> Draw | None:
    """For a case whose rows have distances."""
    known = any(row.rounds and row.workload != REFERENCE_ROW for row in result.document.select(case=case))
    return partial(_draw_distance, result, case) if known else None


def _draw_accuracy(result: Result, case: Case) -> Sheet:
    sheet = Sheet("Pictures that show what was asked for, after so many calls", result, case, height=4.4)
    _draw_lines(sheet, result.document, case, lambda row: 100 * (figure(row, "strict") or 0.0))
    if (row := next(result.document.select(REFERENCE_ROW, case=case), None)) is not None:
        share = 100 * (figure(row, "strict") or 0.0)
        sheet.axes.axhline(share, color=GREY, linewidth=1, label=f"{figure(row, 'calls'):.0f} calls")
    sheet.axes.set_ylabel("accepted by the checker, %")
    sheet.axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return sheet


def _draw_distance(result: Result, case: Case) -> Sheet:
    sheet = Sheet("Distance from the end of the path, after so many calls", result, case, height=4.4)
    _draw_lines(sheet, result.document, case, lambda row: summary(row) or 0.0)
    sheet.axes.set_yscale("log")
    sheet.axes.set_ylabel("relative L2 of the latent, median (log scale)")
    sheet.axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return sheet


def _draw_lines(sheet: Sheet, document: Document, case: Case, height: Callable[[Row], float]) -> None:
    """A line for each variant, over the number of its calls."""
    variants = list(dict.fromkeys(row.workload for row in document.select(case=case)))
    for number, variant in enumerate(name for name in variants if name != REFERENCE_ROW):
        rows = {row.figures["calls"]: row for row in document.select(variant, case=case)}
        calls = sorted(rows)
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number // len(_COLOURS)]}
        heights = [height(rows[count]) for count in calls]
        sheet.axes.plot(calls, heights, label=variant, marker="o", markersize=3, **style)
    sheet.axes.set_xscale("log")
    ticks = sorted({row.figures["calls"] for row in document.select(case=case)})
    shown = [tick for tick in ticks if tick <= 30]
    sheet.axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    sheet.axes.minorticks_off()
    sheet.axes.set_xlabel("calls of the UNet (log scale)")
    sheet.axes.grid()
