"""Where the memory is: by net, the measured peaks, and over the course of one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..records import Document, Row
from ..sides.contract import OURS
from . import words
from .reading import figure, finite, items, mapping, p50, peers
from .sheet import BLUE, GREEN, GREY, INK, ORANGE, PALE, SKY, Planned, Sheet, beside, tidy_bars

_PARTS = {"weights": BLUE, "activations": ORANGE, "io": GREEN}
_SAID = {"weights": "weights", "activations": "activations", "io": "in and out"}
SHARED = "shared activations"
_PEAKS = {"peak": "peak in host memory", "device peak": "peak on the device"}


@dataclass(frozen=True, kw_only=True)
class NetMemory:
    """One net, in bytes; None is what the backend does not tell."""

    name: str
    weights: float | None
    activations: float | None
    io: float | None

    @property
    def total(self) -> float:
        """Of what is known."""
        return sum(part for part in (self.weights, self.activations, self.io) if part is not None)


def ledger(row: Row) -> list[NetMemory]:
    """The figures `nets`, `{"unet": {"weights": …}}`, and `scratch`, the activations that nets share."""
    found = [
        NetMemory(name=name, **{part: finite(mapping(facts).get(part)) for part in _PARTS})
        for name, facts in mapping(row.figures.get("nets")).items()
    ]
    if (scratch := figure(row, "scratch")) is not None:
        found.append(NetMemory(name=SHARED, weights=None, activations=scratch, io=None))
    return found


def peaks(document: Document) -> list[tuple[str, str, float]]:
    """(where, side, bytes) of every measured peak, ours first; a second run of ours is left out."""
    return [
        (said, side, value)
        for workload, said in _PEAKS.items()
        for side in (OURS, *peers(document))
        for row in document.select(workload, side)
        if row.unit == "B" and (value := p50(row)) is not None
    ]


def untold(nets: list[NetMemory]) -> bool:
    """Whether some activations are in a library's arena that does not tell its size."""
    return any(net.activations is None for net in nets if net.name != SHARED)


def draw_memory(document: Document, source: str) -> Iterator[Planned]:
    """The ledger of our nets beside the peaks, and the timeline."""
    row = next((row for row in document.select("ledger", OURS) if row.status == "ok"), None)
    if row and (nets := ledger(row)):
        yield "ledger", partial(_draw_ledger, document, row, nets, source)
    for row in document.select("timeline", OURS):
        for name, line in timelines(row):
            yield name, partial(_draw_timeline, document, row, name, line, source)


def _draw_ledger(document: Document, row: Row, nets: list[NetMemory], source: str) -> Sheet:
    measured = peaks(document)
    names = [
        *(words.workload(net.name) for net in nets),
        "all nets",
        *(f"{side}, {where}" for where, side, _ in measured),
    ]
    sheet = Sheet(
        "Where the memory is", words.about(document, row.case), source, height=0.33 * len(names) + 0.95
    )
    axes = sheet.axes[0]
    everything = {part: sum(getattr(net, part) or 0 for net in nets) for part in _PARTS}
    total = NetMemory(name="all nets", **everything)
    longest = max([total.total, *(size for *_, size in measured)])
    scale, unit = _scale(longest)
    for y, net in enumerate([*nets, total]):
        _stacked(axes, y, net, scale)
    for y, (*_, size) in enumerate(measured, start=len(nets) + 1):
        axes.barh(y, size / scale, height=0.62, color="#9A9A9A")
        beside(axes, size / scale, y, words.amount(size, "B"), weight="bold")
    tidy_bars(axes, names)
    axes.axhline(len(nets) + 0.5, color=PALE, linewidth=0.8)
    axes.set_xlim(left=0)
    note = " (activations are in the library's arena, which does not tell)" if untold(nets) else ""
    axes.set_xlabel(unit + note)
    _legend(axes, total, bool(measured))
    return sheet


def _stacked(axes: Any, y: int, net: NetMemory, scale: float) -> None:
    begin = 0.0
    for part, colour in _PARTS.items():
        size = (getattr(net, part) or 0.0) / scale
        axes.barh(y, size, left=begin, height=0.62, color=colour)
        begin += size
    beside(axes, begin, y, words.amount(net.total, "B"))


def _legend(axes: Any, total: NetMemory, measured: bool) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=colour, label=_SAID[part]) for part, colour in _PARTS.items() if getattr(total, part)
    ]
    if measured:
        handles.append(Patch(color="#9A9A9A", label="peak of the process, less an empty one"))
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        borderaxespad=0.2,
        handlelength=1.3,
        columnspacing=1.4,
    )


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Bytes at `seconds` since the request began, and (seconds, stage) of what began when."""

    seconds: tuple[float, ...]
    sizes: tuple[float, ...]
    marks: tuple[tuple[float, str], ...]


def timelines(row: Row) -> Iterator[tuple[str, Timeline]]:
    """Of a row of workload "timeline": in host memory, and on the device where it was watched."""
    every = figure(row, "interval_s")
    if row.status != "ok" or every is None:
        return
    told = [mapping(item) for item in items(row.figures.get("marks"))]
    marks = tuple(
        (moment, str(item.get("stage"))) for item in told if (moment := finite(item.get("at_s"))) is not None
    )
    series = {"timeline": list(row.samples), "timeline-device": items(row.figures.get("device"))}
    for name, values in series.items():
        sizes = tuple(size for value in values if (size := finite(value)) is not None)
        if len(sizes) > 1:
            seconds = tuple(every * number for number in range(len(sizes)))
            known = first_of_each([mark for mark in marks if mark[0] <= seconds[-1]])
            yield name, Timeline(seconds=seconds, sizes=sizes, marks=known)


def first_of_each(marks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Where each stage begins for the first time: steps alternate between two of them."""
    found: dict[str, float] = {}
    for moment, stage in marks:
        found.setdefault(stage, moment)
    return tuple((moment, stage) for stage, moment in found.items())


def _draw_timeline(document: Document, row: Row, name: str, line: Timeline, source: str) -> Sheet:
    seconds, sizes = np.array(line.seconds), np.array(line.sizes)
    where = "Device memory" if name == "timeline-device" else "Host memory"
    heading = f"{where} over the first request of a process"
    sheet = Sheet(heading, words.about(document, row.case), source, height=3.4)
    axes = sheet.axes[0]
    scale, unit = _scale(float(sizes.max()))
    axes.fill_between(seconds, sizes / scale, color=SKY, alpha=0.45, linewidth=0)
    axes.plot(seconds, sizes / scale, color=BLUE, linewidth=1.4)
    axes.set_xlim(min(0.0, float(seconds.min())), float(seconds.max()) * 1.02)
    axes.set_ylim(0, 1.12 * sizes.max() / scale)
    axes.set_xlabel("s from the request; lines: where each stage begins for the first time")
    axes.set_ylabel(f"{unit} in use")
    axes.grid(axis="y")
    top = int(sizes.argmax())
    axes.plot(seconds[top], sizes[top] / scale, marker="o", color=INK, markersize=4)
    right = seconds[top] > 0.5 * seconds.max()
    axes.annotate(
        f"peak {words.amount(float(sizes[top]), 'B')}",
        (seconds[top], sizes[top] / scale),
        (-6 if right else 6, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9},  # lines end behind it
    )
    _mark(sheet, axes, line.marks)
    return sheet


def _mark(sheet: Sheet, axes: Any, marks: Sequence[tuple[float, str]]) -> None:
    """Lines where stages begin, their names above the panel in as many lanes as it takes.

    From the last to the first, upwards: no line crosses a name.
    """
    sheet.settle()
    panel = axes.get_window_extent()
    across = axes.get_xaxis_transform()
    lanes: list[float] = []  # where the leftmost name of each begins, pixels
    for x, stage in reversed(marks):
        text = axes.annotate(
            words.workload(stage), (x, 1), (3, 0), xycoords=across, textcoords="offset points", size=8.5
        )
        if sheet.extent(text).x1 > panel.x1 + 4:
            text.set_ha("right")
            text.set_position((-3, 0))
        box = sheet.extent(text)
        lane = next((number for number, begin in enumerate(lanes) if box.x1 + 8 < begin), len(lanes))
        lanes[lane : lane + 1] = [box.x0]
        text.set_position((text.get_position()[0], 4 + 12 * lane))
        top = 1 + (12 * lane + 12) / (panel.height / sheet.figure.dpi * 72)
        axes.plot([x, x], [0, top], transform=across, color=GREY, linewidth=0.8, clip_on=False)
    sheet.settle()


def _scale(longest: float) -> tuple[float, str]:
    return (1e9, "GB") if longest >= 1e9 else (1e6, "MB")
