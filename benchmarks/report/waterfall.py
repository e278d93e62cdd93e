"""Where the time of one picture goes, stage after stage, above what the peers take for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..records import Document
from ..sides.contract import OURS
from . import words
from .reading import Against, against, cases, peers, row_of, stages, summary
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
_HEADING = "Where the time of one picture goes"
_REST = "everything else"
_LEAST = 1e-4  # of the total: a rest below that is the medians' rounding
_TAIL = 1.5  # times the median, up to which a whisker is drawn in full
_REASON = 70  # characters


def draw_waterfalls(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case whose picture's stages are known."""
    for number, case in enumerate(cases(document)):
        row = row_of(document, "picture", OURS, case)
        total, found = summary(row), stages(row)
        if total and found:
            ours = total, summary(row, "p90")
            yield numbered("waterfall", number), partial(_draw, document, case, found, ours, source)


def _draw(
    document: Document,
    case: Mapping[str, Any],
    found: Mapping[str, float],
    ours: tuple[float, float | None],
    source: str,
) -> Sheet:
    others = {side: against(document, case, side).get("picture") for side in peers(document)}
    total, p90 = ours
    bars = [*found.items(), (_REST, total - sum(found.values()))]
    if bars[-1][1] < _LEAST * total:
        bars.pop()
    names = [*(_name(name, case) for name, _ in bars), "latentrt", *others]
    sheet = Sheet(_HEADING, words.about(document, case), source, height=0.33 * len(names) + 0.75)
    axes = sheet.axes
    times = [item.seconds for item in others.values() if item and item.seconds]
    unit, unit_name = words.seconds_unit(max([total, *times]))
    end = 0.0
    for y, (name, taken) in enumerate(bars):
        axes.barh(y, taken / unit, left=end, height=0.62, color=_COLOURS.get(name, GREY))
        end += taken / unit
        axes.plot([end, end], [y, y + 1], color=GREY, linewidth=0.7)
        beside(axes, end, y, f"{words.seconds(taken)}  {words.percent(taken / total)}")
    _whole(axes, len(bars), BLUE, (total, p90, ""), unit)
    for y, item in enumerate(others.values(), start=len(bars) + 1):
        _peer(axes, y, item, unit)
    tidy_bars(axes, names)
    axes.axhline(len(bars) - 0.5, color=PALE, linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit_name} from prompt to pixels in host memory (median; whiskers end at p90)")
    return sheet


def _name(stage: str, case: Mapping[str, Any]) -> str:
    steps = case.get("steps")
    times = f"{steps} × " if steps and stage in ("unet", "update") else ""
    return times + words.workload(stage)


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
