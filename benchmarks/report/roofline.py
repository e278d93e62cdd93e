"""Each net under the machine's two ceilings, measured in the same run (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..records import Document
from ..sides.contract import CEILING, OURS
from . import words
from .reading import cases, figure, p50, row_of, workloads
from .sheet import BLUE, INK, ORANGE, SKY, Planned, Sheet, numbered, ticks_by

_PLACES = (
    (7, 5),
    (7, -13),
    (-7, 5),
    (-7, -13),
    (0, 10),
    (0, -18),
    (14, 18),
    (14, -28),
    (-14, 18),
    (-14, -28),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One net: FLOP per byte, FLOP/s, and by what part of the floor it is reached (1 is the limit)."""

    workload: str
    intensity: float
    flop_per_s: float
    of_floor: float | None


def ceiling_rates(document: Document, workload: str) -> list[float]:
    """FLOP/s of "gemm" or B/s of "copy", of every time it was measured in the run."""
    found: list[float] = []
    for row in document.select(workload, CEILING):
        work, taken = figure(row, "flops", "bytes"), p50(row)
        if taken and row.unit in ("FLOP/s", "B/s"):
            found.append(taken)
        elif taken and work and row.unit == "s":
            found.append(work / taken)
    return found


def points(document: Document, case: Mapping[str, Any]) -> list[Point]:
    """Our rows of a case with FLOPs, bytes and a time."""
    found: list[Point] = []
    for name in workloads(document, case):
        row = row_of(document, name, OURS, case)
        flops, moved, taken = figure(row, "flops"), figure(row, "bytes"), p50(row)
        if flops and moved and taken and name != "picture":
            rate = figure(row, "flop_per_s") or flops / taken
            point = Point(
                workload=name, intensity=flops / moved, flop_per_s=rate, of_floor=figure(row, "of_floor")
            )
            found.append(point)
    return found


def draw_rooflines(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case with a point, if both ceilings are known."""
    gemm, copy = (ceiling_rates(document, name) for name in ("gemm", "copy"))
    for number, case in enumerate(cases(document)):
        if gemm and copy and (found := points(document, case)):
            yield numbered("roofline", number), partial(_draw, document, case, found, gemm, copy, source)


def _draw(
    document: Document,
    case: Mapping[str, Any],
    found: list[Point],
    gemm: list[float],
    copy: list[float],
    source: str,
) -> Sheet:
    from matplotlib.ticker import LogLocator

    heading = "How near each net is to the machine's limits"
    sheet = Sheet(heading, words.about(document, case), source, height=4.4)
    axes = sheet.axes[0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    best, moved = max(gemm), max(copy)
    low, high, bottom = _limits(found, best, moved)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, best * 3)
    x = np.geomspace(low, high, 400)
    axes.fill_between(
        x,
        np.minimum(x * min(copy), min(gemm)),
        np.minimum(x * moved, best),
        color=SKY,
        alpha=0.4,
        linewidth=0,
    )
    axes.plot(x, np.minimum(x * moved, best), color=BLUE, linewidth=1.6)
    axes.set_xlabel("arithmetic intensity: FLOP per byte that has to be moved (log scale)")
    axes.set_ylabel("FLOP/s (log scale)")
    axes.xaxis.set_major_formatter(ticks_by(lambda value: f"{value:,g}".replace(",", " ")))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if best * 3 < 200 * bottom else (1,)))
    axes.yaxis.set_major_formatter(ticks_by(lambda value: words.round_amount(value, "FLOP/s")))
    axes.minorticks_off()
    axes.grid(which="major")
    taken = _ceilings(sheet, axes, gemm, copy, (low, high, bottom))
    for point in found:
        axes.plot(
            point.intensity, point.flop_per_s, marker="o", color=ORANGE, markeredgecolor=INK, markersize=7
        )
    _label(sheet, axes, found, taken, [(at, min(at * moved, best)) for at in x.tolist()])
    return sheet


def _limits(found: list[Point], best: float, moved: float) -> tuple[float, float, float]:
    """Both ends of the x axis, and the lower one of the y axis: two decades at least."""
    ridge = best / moved
    low = min(ridge / 8, min(point.intensity for point in found) / 3)
    high = max(ridge * 10, max(point.intensity for point in found) * 8)
    return low, high, min(best / 20, min(point.flop_per_s for point in found) / 3)


def _ceilings(
    sheet: Sheet,
    axes: Any,
    gemm: list[float],
    copy: list[float],
    limits: tuple[float, float, float],
) -> list[Any]:
    """Names on both lines; their texts."""
    low, high, bottom = limits
    times = f" (least of {len(gemm)}: {words.amount(min(gemm), 'FLOP/s')})" if len(gemm) > 1 else ""
    text = f"best GEMM {words.amount(max(gemm), 'FLOP/s')}{times}"
    flat = axes.annotate(text, (high, max(gemm)), (-4, 5), textcoords="offset points", ha="right", color=BLUE)
    sheet.settle()
    begin = max(low, bottom / max(copy))
    ends = axes.transData.transform([(begin, begin * max(copy)), (max(gemm) / max(copy), max(gemm))])
    run, rise = ends[1] - ends[0]
    middle = axes.transData.inverted().transform(ends.mean(axis=0))
    slanted = axes.annotate(
        f"copy {words.amount(max(copy), 'B/s')}",
        tuple(middle),
        (-7, 7),
        textcoords="offset points",
        ha="center",
        va="center",
        rotation=float(np.degrees(np.arctan2(rise, run))),
        color=BLUE,
    )
    return [flat, slanted]


def _label(
    sheet: Sheet, axes: Any, found: list[Point], taken: list[Any], roof: list[tuple[float, float]]
) -> None:
    """Each point's name and fraction, at the first place around it where neither text, point nor roof is."""
    sheet.settle()
    around = axes.get_window_extent()
    boxes = [sheet.extent(text) for text in taken]
    boxes += [_square(x, y, 9) for x, y in _pixels(axes, [(p.intensity, p.flop_per_s) for p in found])]
    boxes += [_square(x, y, 3) for x, y in _pixels(axes, roof)]
    for point in sorted(found, key=lambda point: -point.intensity):
        part = "" if point.of_floor is None else f"\n{point.of_floor:.2f} of the floor"
        text = axes.annotate(
            f"{words.workload(point.workload)}: {words.amount(point.flop_per_s, 'FLOP/s')}{part}",
            (point.intensity, point.flop_per_s),
            _PLACES[0],
            textcoords="offset points",
            size=8.5,
        )
        for dx, dy in _PLACES:
            text.set_position((dx, dy))
            text.set_ha("left" if dx > 0 else "right" if dx < 0 else "center")
            text.set_va("bottom" if dy > 0 else "top")
            box = sheet.extent(text)
            inside = (
                around.x0 <= box.x0 and box.x1 <= around.x1 and around.y0 <= box.y0 and box.y1 <= around.y1
            )
            if inside and not any(box.overlaps(other) for other in boxes):
                break
        boxes.append(sheet.extent(text))


def _pixels(axes: Any, values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [tuple(pixel) for pixel in axes.transData.transform(values)]


def _square(x: float, y: float, half: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox([[x - half, y - half], [x + half, y + half]])
