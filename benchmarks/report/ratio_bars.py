"""Ours against the peers, workload by workload: ratios with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..intervals import Interval
from ..records import Document
from ..sides.contract import AGAIN, OURS
from . import words
from .reading import Against, against, cases, peers, row_of, summary, workloads
from .sheet import BLUE, GREY, INK, RED, Planned, Sheet, beside, numbered, ticks_by, tidy_bars, whisker

_TICKS = (1.05, 1.1, 1.15, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200)
_TAIL = 2.0  # times the ratio, up to which an interval is drawn in full


def draw_ratios(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case with a peer in it, of the workloads that peers have."""
    for number, case in enumerate(cases(document)):
        sides = [against(document, case, side) for side in (AGAIN, *peers(document))]
        rows: dict[str, list[Against]] = {}
        for name in workloads(document, case):
            found = [side[name] for side in sides if name in side and side[name].ratio]
            if any(item.side != AGAIN for item in found):
                rows[name] = found
        if rows:
            yield numbered("peers", number), partial(_draw, document, case, rows, source)


def _draw(
    document: Document, case: Mapping[str, Any], found: Mapping[str, list[Against]], source: str
) -> Sheet:
    rows: list[tuple[str, Against | None]] = []
    for name, items in found.items():
        ours = summary(row_of(document, name, OURS, case))
        rows.append((f"{words.workload(name)}, ours {words.seconds(ours)}", None))
        rows += [("A/A: latentrt again" if item.side == AGAIN else item.side, item) for item in items]
    heading = "Time of each peer over ours: right of the line, ours is faster"
    sheet = Sheet(heading, words.about(document, case), source, height=0.27 * len(rows) + 0.8)
    axes = sheet.axes
    axes.set_xscale("log")
    for y, (_, item) in enumerate(rows):
        if item and item.ratio:
            _bar(axes, y, item, item.ratio)
    tidy_bars(axes, [name for name, _ in rows])
    for tick, (_, item) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_weight("bold" if item is None else "normal")
    axes.axvline(1, color=INK, linewidth=1)
    _limit(axes, [item.ratio for items in found.values() for item in items if item.ratio])
    axes.set_xlabel("time ÷ ours, median of interleaved rounds (log scale); whiskers: 95 % interval")
    return sheet


def _bar(axes: Any, y: int, item: Against, ratio: Interval) -> None:
    color = GREY if item.side == AGAIN or ratio.low <= 1 <= ratio.high else BLUE if ratio.low > 1 else RED
    axes.barh(y, ratio.value - 1, left=1, height=0.6, color=color, alpha=0.85)
    end = _shown(ratio)
    whisker(axes, y, (ratio.low, end), arrow=end < ratio.high, both=True)
    interval = f"[{words.ratio(ratio.low)}, {words.ratio(ratio.high)}]"
    beside(axes, max(end, 1), y, f"{words.ratio(ratio.value)}×  {interval}  {words.seconds(item.seconds)}")


def _shown(ratio: Interval) -> float:
    """Where a whisker ends; how far the interval goes is in the label."""
    return min(ratio.high, _TAIL * max(ratio.value, 1))


def _limit(axes: Any, ratios: list[Interval]) -> None:
    """Limits with all bars inside, and ticks that keep their distance on a log scale, 1 among them."""
    low = min(0.93, min(ratio.low for ratio in ratios) / 1.03)
    high = max(1.1, max(map(_shown, ratios)) * 1.03)
    axes.set_xlim(low, high)
    ticks = [tick for tick in (*_TICKS, *(round(1 / tick, 2) for tick in _TICKS)) if low <= tick <= high]
    kept = [1.0]
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        if all(abs(math.log(tick / other)) >= math.log(high / low) / 14 for other in kept):
            kept.append(tick)
    axes.set_xticks(sorted(kept))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(ticks_by(lambda value: f"{value:g}×"))
