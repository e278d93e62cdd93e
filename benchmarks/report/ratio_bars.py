"""Ours against the peers, workload by workload: ratios with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..case import WORKLOADS
from ..intervals import Interval
from ..records import Document
from ..sides.contract import AGAIN, OURS
from . import words
from .reading import Against, against, cases, p50, peers, row_of
from .sheet import BLUE, GREY, INK, RED, Planned, Sheet, beside, numbered, ticks_by, tidy_bars

_TICKS = (1.05, 1.1, 1.15, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200)


_TAIL = 2.0  # times the ratio, up to which an interval is drawn in full


def draw_ratios(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case with a peer in it, of the workloads that peers have."""
    for number, case in enumerate(cases(document)):
        rows = [item for side in peers(document) for item in against(document, case, side) if item.ratio]
        if rows:
            again = [item for item in against(document, case, AGAIN) if item.ratio]
            found = [item for item in (*again, *rows) if item.workload in {row.workload for row in rows}]
            yield numbered("peers", number), partial(_draw, document, case, found, source)


def _draw(document: Document, case: Mapping[str, Any], found: list[Against], source: str) -> Sheet:
    rows: list[tuple[str, Against | None]] = []
    for name in sorted({item.workload for item in found}, key=_place):
        ours = p50(row_of(document, name, OURS, case))
        rows.append((f"{words.workload(name)}, ours {words.seconds(ours)}", None))
        items = [item for item in found if item.workload == name]
        rows += [("A/A: latentrt again" if item.side == AGAIN else item.side, item) for item in items]
    heading = "Time of each peer over ours: right of the line, ours is faster"
    sheet = Sheet(heading, words.about(document, case), source, height=0.27 * len(rows) + 0.8)
    axes = sheet.axes[0]
    axes.set_xscale("log")
    for y, (_, item) in enumerate(rows):
        if item:
            _bar(axes, y, item)
    tidy_bars(axes, [name for name, _ in rows])
    for tick, (_, item) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_weight("bold" if item is None else "normal")
    axes.axvline(1, color=INK, linewidth=1)
    _limit(axes, [item.ratio for item in found if item.ratio])
    axes.set_xlabel("time ÷ ours, median of interleaved rounds (log scale); whiskers: 95 % interval")
    return sheet


def _bar(axes: Any, y: int, item: Against) -> None:
    ratio = item.ratio
    assert ratio is not None
    color = GREY if item.side == AGAIN or ratio.low <= 1 <= ratio.high else BLUE if ratio.low > 1 else RED
    axes.barh(y, ratio.value - 1, left=1, height=0.6, color=color, alpha=0.85)
    end = min(ratio.high, _TAIL * max(ratio.value, 1))
    axes.plot([ratio.low, end], [y, y], color=INK, linewidth=1.1)
    axes.plot([ratio.low, ratio.low], [y - 0.16, y + 0.16], color=INK, linewidth=1.1)
    if end < ratio.high:  # a tail that would squeeze the bars; the label says how far it goes
        axes.plot(end, y, marker=">", color=INK, markersize=4)
    else:
        axes.plot([end, end], [y - 0.16, y + 0.16], color=INK, linewidth=1.1)
    interval = f"[{words.ratio(ratio.low)}, {words.ratio(ratio.high)}]"
    beside(
        axes,
        max(end, 1),
        y,
        f"{words.ratio(ratio.value)}×  {interval}  {words.seconds(item.seconds)}",
    )


def _limit(axes: Any, ratios: list[Interval]) -> None:
    """Limits with all bars inside, and ticks that say what they are."""
    low = min(0.93, min(ratio.low for ratio in ratios) / 1.03)
    high = max(1.1, max(min(ratio.high, _TAIL * max(ratio.value, 1)) for ratio in ratios) * 1.03)
    axes.set_xlim(low, high)
    ticks = [*_TICKS, *(round(1 / tick, 2) for tick in _TICKS)]
    shown = _apart([tick for tick in ticks if low <= tick <= high], math.log(high / low) / 14)
    axes.set_xticks(shown)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(ticks_by(lambda value: f"{value:g}×"))


def _apart(ticks: list[float], least: float) -> list[float]:
    """Those that keep their distance on a log scale, 1 among them."""
    kept = [1.0]
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        if all(abs(math.log(tick / other)) >= least for other in kept):
            kept.append(tick)
    return sorted(kept)


def _place(workload: str) -> int:
    """In the order of a picture."""
    return WORKLOADS.index(workload) if workload in WORKLOADS else len(WORKLOADS)
