"""Where the time of one picture goes, stage after stage, above what the peers take for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..records import Document
from . import words
from .reading import Against, Stages, against, cases, peers, stages
from .sheet import (
    BLUE,
    GREEN,
    GREY,
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
    whisker,
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
    others = {side: against(document, case, side).get("picture") for side in peers(document)}
    bars = _bars(found, case)
    total = found.total or sum(found.seconds.values())
    names = [*(name for name, *_ in bars), "latentrt", *others]
    heading = "Where the time of one picture goes" if found.total else "One picture, added up from its stages"
    note = "" if found.total else " · stages timed one by one; no whole picture was timed"
    sheet = Sheet(heading, words.about(document, case), source + note, height=0.33 * len(names) + 0.75)
    axes = sheet.axes[0]
    times = [item.seconds for item in others.values() if item and item.seconds]
    unit, unit_name = words.seconds_unit(max([total, *times]))
    for y, (_, begin, taken, colour) in enumerate(bars):
        end = (begin + taken) / unit
        axes.barh(y, taken / unit, left=begin / unit, height=0.62, color=colour)
        axes.plot([end, end], [y, y + 1], color=GREY, linewidth=0.7)
        beside(axes, end, y, f"{words.seconds(taken)}  {words.percent(taken / total)}")
    _whole(axes, len(bars), BLUE, (total, found.p90, ""), unit)
    for y, item in enumerate(others.values(), start=len(bars) + 1):
        _peer(axes, y, item, unit)
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


def _peer(axes: Any, y: int, item: Against | None, unit: float) -> None:
    if item is None or item.seconds is None:
        known = filter(None, (item.status, item.reason)) if item else ["not measured"]
        reason = ": ".join(known)
        short = reason if len(reason) <= _REASON else f"{reason[:_REASON]}…"
        beside(axes, 0, y, short, color=GREY)
        return
    note = f"  {words.ratio(item.ratio.value)}× ours" if item.ratio else ""
    _whole(axes, y, "#9A9A9A", (item.seconds, item.p90, note), unit)


def _whole(axes: Any, y: int, colour: str, time: tuple[float, float | None, str], unit: float) -> None:
    """A bar up to the median, a whisker to p90; a tail that would squeeze the bars is an arrow."""
    middle, p90, note = time
    axes.barh(y, middle / unit, height=0.62, color=colour)
    end = max(middle, p90 or middle)
    shown = min(end, _TAIL * middle)
    whisker(axes, y, (middle / unit, shown / unit), arrow=shown < end)
    far = f"  p90 {words.seconds(p90)}" if shown < end else ""
    weight = "bold" if colour == BLUE else "normal"
    beside(axes, shown / unit, y, words.seconds(middle) + note + far, weight=weight)
