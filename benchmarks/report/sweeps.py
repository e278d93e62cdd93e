"""Latency against steps, batch and size, with percentile bands and the fitted lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..records import Document
from . import words
from .reading import Sweep, sweeps
from .sheet import BLUE, INK, SKY, Planned, Sheet

_AXES = {"steps": "steps", "batch": "pictures at once", "pixels": "megapixels of the picture"}
_VARIED = {"steps": {"steps"}, "batch": {"pictures"}, "pixels": {"width", "height"}}


def draw_sweeps(document: Document, source: str) -> Iterator[Planned]:
    """One sheet with a panel for each axis."""
    if found := list(sweeps(document)):
        yield "scaling", partial(_draw, document, found, source)


def _draw(document: Document, found: Sequence[Sweep], source: str) -> Sheet:
    varied = set[str]().union(*(_VARIED.get(sweep.of, set[str]()) for sweep in found))
    about = words.about(document, {key: value for key, value in found[0].case.items() if key not in varied})
    sheet = Sheet("Latency against what was varied", about, source, height=3.3, panels=len(found))
    for axes, sweep in zip(sheet.axes, found, strict=True):
        _panel(axes, sweep)
    sheet.legend(*sheet.axes[0].get_legend_handles_labels())
    return sheet


def _panel(axes: Any, sweep: Sweep) -> None:
    scale = 1e6 if sweep.of == "pixels" else 1.0
    x, p50, p90, p99 = (np.array(column, np.float64) for column in zip(*sweep.points, strict=True))
    x = x / scale
    unit, unit_name = words.seconds_unit(float(p99.max()))
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
    axes.set_ylabel(f"{words.workload(sweep.workload)}, {unit_name}")
    axes.grid(axis="y")
    title = words.workload(sweep.workload)
    axes.set_title(f"{title[0].upper()}{title[1:]} against {sweep.of}")
    residual = "" if sweep.residual is None else f"\nlargest residual {words.percent(sweep.residual)}"
    axes.text(0.03, 0.985, words.line(sweep) + residual, transform=axes.transAxes, va="top", size=8.5)
