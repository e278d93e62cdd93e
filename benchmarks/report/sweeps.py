"""Latency against steps, batch and size, with percentile bands and the fitted lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..records import Document, Row
from ..sides.contract import OURS
from . import words
from .reading import figure, finite, pairs
from .sheet import BLUE, INK, SKY, Planned, Sheet

_AXES = {"steps": "steps", "batch": "pictures at once", "pixels": "megapixels of the picture"}
_PER = {"steps": "step", "batch": "picture", "pixels": "megapixel"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One workload along one axis.

    Attributes:
        of: what is varied: "steps", "batch" or "pixels".
        workload: what was timed.
        points: (x, p50, p90, p99) in order of x; percentiles are None where only the median is known.
        slope: seconds per unit of x, of the fitted line; None without one.
        intercept: seconds at 0.
        residual: the largest distance of a point from the line, as a share of the largest point.
        case: what does not change.
    """

    of: str
    workload: str
    points: tuple[tuple[float, float, float | None, float | None], ...]
    slope: float | None
    intercept: float | None
    residual: float | None
    case: Mapping[str, Any]


def sweeps(document: Document) -> list[Sweep]:
    """One for each row of workload "fit"."""
    return [sweep for row in document.select("fit", OURS) if (sweep := _sweep(document, row)).points]


def _sweep(document: Document, fit: Row) -> Sweep:
    of = str(fit.figures.get("of", ""))
    wanted = fit.figures.get("workload")
    measured = [
        row
        for row in document.select(side=OURS)
        if row.figures.get("axis") == of and row.status == "ok" and row.rounds and row.workload != "fit"
    ]
    points: list[tuple[float, float, float | None, float | None]] = []
    for x, taken in pairs(fit.figures.get("points")):
        place, median = finite(x), finite(taken)
        if place is None or median is None:
            continue
        row = next((row for row in measured if _x(of, row.case) == place), None)
        summary = row.summary if row else {"p50": median}
        points.append((place, summary["p50"], summary.get("p90"), summary.get("p99")))
    workload = str(wanted or (measured[0].workload if measured else "latency"))
    good = fit if fit.status == "ok" else None
    slope, intercept = figure(good, "slope"), figure(good, "intercept")
    return Sweep(
        of=of,
        workload=workload,
        points=tuple(sorted(points)),
        slope=slope,
        intercept=intercept,
        residual=figure(good, "residual"),
        case=fit.case,
    )


def _x(of: str, case: Mapping[str, Any]) -> float | None:
    if of == "pixels":
        width, height = finite(case.get("width")), finite(case.get("height"))
        return width * height if width and height else None
    return finite(case.get("pictures" if of == "batch" else of))


def line_of(sweep: Sweep) -> str:
    """`0.021 s + 12.1 ms per step`; empty without a fit."""
    if sweep.slope is None or sweep.intercept is None:
        return ""
    per = sweep.slope * (1e6 if sweep.of == "pixels" else 1)
    sign = "−" if sweep.intercept < 0 else "+"
    slope = f"{words.seconds(per)} per {_PER.get(sweep.of, sweep.of)}"
    if sweep.intercept == 0:
        return slope
    return f"{slope} {sign} {words.seconds(abs(sweep.intercept))}"


def draw_sweeps(document: Document, source: str) -> Iterator[Planned]:
    """One sheet with a panel for each axis."""
    if found := sweeps(document):
        yield "scaling", partial(_draw, document, found, source)


def _draw(document: Document, found: list[Sweep], source: str) -> Sheet:
    case = {name: value for name, value in found[0].case.items() if name not in _varied(found)}
    sheet = Sheet(
        "Latency against what was asked for",
        words.about(document, case),
        source,
        height=3.3,
        panels=len(found),
    )
    for axes, sweep in zip(sheet.axes, found, strict=True):
        _panel(axes, sweep)
    handles, labels = sheet.axes[0].get_legend_handles_labels()
    sheet.legend(handles, labels)
    sheet.settle()
    return sheet


def _varied(found: list[Sweep]) -> set[str]:
    names = {"steps": {"steps"}, "batch": {"pictures"}, "pixels": {"width", "height"}}
    return set[str]().union(*(names.get(sweep.of, set[str]()) for sweep in found))


def _panel(axes: Any, sweep: Sweep) -> None:
    scale = 1e6 if sweep.of == "pixels" else 1.0
    x = np.array([point[0] for point in sweep.points]) / scale
    p50 = np.array([point[1] for point in sweep.points])
    p90, p99 = (
        np.array([middle if value is None else value for value, middle in zip(column, p50, strict=True)])
        for column in ([point[2] for point in sweep.points], [point[3] for point in sweep.points])
    )
    unit, name = words.seconds_unit(float(p99.max()))
    axes.fill_between(x, p90 / unit, p99 / unit, color=SKY, alpha=0.55, linewidth=0, label="p90 to p99")
    axes.plot(x, p50 / unit, color=BLUE, marker="o", markersize=4, linewidth=1.4, label="p50")
    if sweep.slope is not None and sweep.intercept is not None:
        ends = np.array([0.0, x.max() * 1.04])
        line = (sweep.slope * ends * scale + sweep.intercept) / unit
        axes.plot(ends, line, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), label="fitted line")
    axes.set_xlim(0, x.max() * 1.06)
    axes.set_ylim(0, 1.34 * p99.max() / unit)
    if sweep.of != "pixels":
        axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_xlabel(_AXES.get(sweep.of, sweep.of))
    axes.set_ylabel(f"{words.workload(sweep.workload)}, {name}")
    axes.grid(axis="y")
    title = words.workload(sweep.workload)
    axes.set_title(f"{title[0].upper()}{title[1:]} against {sweep.of}")
    residual = "" if sweep.residual is None else f"\nlargest residual {words.percent(sweep.residual)}"
    axes.text(0.03, 0.985, line_of(sweep) + residual, transform=axes.transAxes, va="top", size=8.5)
