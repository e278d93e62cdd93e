"""Each net under the machine's two ceilings, measured in the same run (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..records import Document
from ..roofline import COPY, GEMM
from ..sides.contract import OURS
from . import words
from .reading import cases, ceiling_rates, figure, row_of, summary, workloads
from .sheet import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, Planned, Sheet, numbered, ticks_by

_COLOURS = (ORANGE, PURPLE, SKY, GREEN, RED, GREY)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One net: FLOP per byte, FLOP/s, and by what part of the floor it is reached (1 is the limit)."""

    workload: str
    intensity: float
    flop_per_s: float
    of_floor: float | None


def points(document: Document, case: Mapping[str, Any]) -> list[Point]:
    """Our rows of a case with FLOPs, bytes and a time."""
    found: list[Point] = []
    for name in workloads(document, case):
        row = row_of(document, name, OURS, case)
        flops, moved, taken = figure(row, "flops"), figure(row, "bytes"), summary(row)
        if flops and moved and taken and name != "picture":
            found.append(
                Point(
                    workload=name,
                    intensity=flops / moved,
                    flop_per_s=figure(row, "flop_per_s") or flops / taken,
                    of_floor=figure(row, "of_floor"),
                )
            )
    return found


def draw_rooflines(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case with a point, if both ceilings are known."""
    gemm, copy = (ceiling_rates(document, name) for name in (GEMM, COPY))
    for number, case in enumerate(cases(document)):
        if gemm and copy and (found := points(document, case)):
            yield numbered("roofline", number), partial(_draw, document, case, found, (gemm, copy), source)


def _draw(
    document: Document,
    case: Mapping[str, Any],
    found: Sequence[Point],
    ceilings: tuple[list[float], list[float]],
    source: str,
) -> Sheet:
    from matplotlib.ticker import LogLocator

    gemm, copy = ceilings
    best, moved = max(gemm), max(copy)
    sheet = Sheet(
        "How near each net is to the machine's limits", words.about(document, case), source, height=4.4
    )
    axes = sheet.axes
    axes.set_xscale("log")
    axes.set_yscale("log")
    low = min(best / moved / 8, min(point.intensity for point in found) / 3)
    high = max(best / moved * 10, max(point.intensity for point in found) * 8)
    bottom = min(best / 20, min(point.flop_per_s for point in found) / 3)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, best * 3)
    x = np.geomspace(low, high, 400)
    roof = np.minimum(x * moved, best)
    worst = np.minimum(x * min(copy), min(gemm))
    times = f" (least of {len(gemm)}: {words.amount(min(gemm), 'FLOP/s')})" if len(gemm) > 1 else ""
    name = f"best GEMM {words.amount(best, 'FLOP/s')}{times}\ncopy {words.amount(moved, 'B/s')}"
    axes.fill_between(x, worst, roof, color=SKY, alpha=0.4, linewidth=0)
    axes.plot(x, roof, color=BLUE, linewidth=1.6, label=name)
    for point, colour in zip(found, _COLOURS, strict=False):
        part = "" if point.of_floor is None else f"\n{point.of_floor:.2f} of the floor"
        rate = words.amount(point.flop_per_s, "FLOP/s")
        axes.plot(
            point.intensity,
            point.flop_per_s,
            marker="o",
            linestyle="",
            color=colour,
            markeredgecolor=INK,
            markersize=7,
            label=f"{words.workload(point.workload)}: {rate}{part}",
        )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), labelspacing=1.1, borderaxespad=0)
    axes.set_xlabel("arithmetic intensity: FLOP per byte that has to be moved (log scale)")
    axes.set_ylabel("FLOP/s (log scale)")
    axes.xaxis.set_major_formatter(ticks_by(lambda value: f"{value:,g}".replace(",", " ")))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if best * 3 < 200 * bottom else (1,)))
    axes.yaxis.set_major_formatter(ticks_by(lambda value: words.round_amount(value, "FLOP/s")))
    axes.minorticks_off()
    axes.grid(which="major")
    return sheet
