"""Where the time of one picture goes, stage after stage, above what the peers take for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..records import Document
from . import words
from .reading import Against, Stages, against, cases, peers, percentile, row_of, stages
from .sheet import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    Planned,
    Sheet,
    beside,
    numbered,
    tidy_bars,
)

_COLOURS = {
    "text_encoder": ORANGE,
    "invariants": PURPLE,
    "unet": SKY,
    "update": RED,
    "vae_decoder": GREEN,
}
_REST = "everything else"
_LEAST = 1e-4  # of the total: a rest below that is the medians' rounding
_TAIL = 1.5  # times the median, up to which a whisker is drawn in full
_REASON = 70  # characters


def draw_waterfalls(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case whose stages are known."""
    for number, case in enumerate(cases(document)):
        if found := stages(document, case):
            yield numbered("waterfall", number), partial(_draw, document, case, found, source)


def _draw(document: Document, case: Mapping[str, Any], found: Stages, source: str) -> Sheet:
    others = [_picture(document, case, side) for side in peers(document)]
    p90s = [percentile(row_of(document, "picture", item.side, case), "p90") for item in others]
    bars = _bars(found, case)
    total = found.total or sum(found.seconds.values())
    names = [*(name for name, *_ in bars), "latentrt", *(item.side for item in others)]
    heading = "Where the time of one picture goes" if found.total else "One picture, added up from its stages"
    note = "" if found.total else " · stages timed one by one; no whole picture was timed"
    sheet = Sheet(heading, words.about(document, case), source + note, height=0.33 * len(names) + 0.75)
    axes = sheet.axes[0]
    longest = max([total, *(item.seconds or 0 for item in others)])
    unit, unit_name = words.seconds_unit(longest)
    for y, bar in enumerate(bars):
        _stage(axes, y, bar, total / unit, unit)
    _total(axes, len(bars), total, found.p90, unit)
    for y, (item, p90) in enumerate(zip(others, p90s, strict=True), start=len(bars) + 1):
        _peer(axes, y, item, p90, unit)
    tidy_bars(axes, names)
    axes.axhline(len(bars) - 0.5, color=PALE, linewidth=0.8)
    axes.set_xlim(left=0)
    what = "median; whiskers end at p90" if found.total else "medians"
    axes.set_xlabel(f"{unit_name} from prompt to pixels in host memory ({what})")
    return sheet


def _bars(found: Stages, case: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """(name, begin, seconds, colour) of every stage and of the rest, one after the other."""
    steps = case.get("steps")
    bars: list[tuple[str, float, float, str]] = []
    begin = 0.0
    for name, taken in found.seconds.items():
        times = f"{steps} × " if steps and name in ("unet", "update") else ""
        bars.append((times + words.workload(name), begin, taken, _COLOURS.get(name, GREY)))
        begin += taken
    if found.total and found.total - begin > _LEAST * found.total:
        bars.append((_REST, begin, found.total - begin, GREY))
    return bars


def _stage(axes: Any, y: int, bar: tuple[str, float, float, str], total: float, unit: float) -> None:
    _, begin, taken, colour = bar
    axes.barh(y, taken / unit, left=begin / unit, height=0.62, color=colour)
    end = (begin + taken) / unit
    axes.plot([end, end], [y, y + 1], color=GREY, linewidth=0.7)
    share = taken / unit / total
    beside(axes, end, y, f"{words.seconds(taken)}  {words.percent(share)}")


def _total(axes: Any, y: int, total: float, p90: float | None, unit: float) -> None:
    axes.barh(y, total / unit, height=0.62, color=BLUE)
    end, note = _whisker(axes, y, total, p90, unit)
    beside(axes, end, y, words.seconds(total) + note, weight="bold")


def _peer(axes: Any, y: int, item: Against, p90: float | None, unit: float) -> None:
    if item.seconds is None:
        reason = f"{item.status}: {item.reason}" if item.reason else item.status
        short = reason if len(reason) <= _REASON else f"{reason[:_REASON]}…"
        beside(axes, 0, y, short, color=GREY)
        return
    axes.barh(y, item.seconds / unit, height=0.62, color="#9A9A9A")
    ratio = f"  {words.ratio(item.ratio.value)}× ours" if item.ratio else ""
    end, note = _whisker(axes, y, item.seconds, p90, unit)
    beside(axes, end, y, words.seconds(item.seconds) + ratio + note)


def _whisker(axes: Any, y: int, middle: float, p90: float | None, unit: float) -> tuple[float, str]:
    """From the median to p90, and its end; a tail that would squeeze the bars is an arrow, and said."""
    far = p90 is not None and p90 > _TAIL * middle
    end = (_TAIL * middle if far else max(middle, p90 or middle)) / unit
    axes.plot([middle / unit, end], [y, y], color=INK, linewidth=1)
    if far:
        axes.plot(end, y, marker=">", color=INK, markersize=4)
    else:
        axes.plot([end, end], [y - 0.12, y + 0.12], color=INK, linewidth=1)
    return end, f"  p90 {words.seconds(p90)}" if far else ""


def _picture(document: Document, case: Mapping[str, Any], side: str) -> Against:
    missing = Against(
        side=side, workload="picture", seconds=None, ratio=None, status="not measured", reason=""
    )
    return next((item for item in against(document, case, side) if item.workload == "picture"), missing)
