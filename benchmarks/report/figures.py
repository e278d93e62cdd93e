"""The figures: where a picture's time goes, ours against the peers, each net under the machine's ceilings.

Each `draw_…` yields a figure's name and how to draw it, for every case of a latency document that has it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from ...engines.errors import BackendError
from ..intervals import Interval
from ..records import Document
from ..roofline import COPY, GEMM
from ..sides.contract import AGAIN, OURS
from . import words
from .reading import (
    Against,
    against,
    cases,
    ceiling_rates,
    figure,
    peers,
    row_of,
    stages,
    summary,
    workloads,
)

# matplotlib declares most keyword arguments without a type.
Axes: TypeAlias = Any

# Okabe and Ito's colours, which people with any colour vision can tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
INK, GREY, PALE = "#222222", "#6B6B6B", "#D9D9D9"
DPI = 150
DIGEST = "latentrt-document"  # a PNG's text of that name is the digest of what it was drawn from
_WIDTH = 9.0  # inches
_HEAD, _FOOT, _SIDE = 0.78, 0.34, 0.16
_STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_STAGES = {
    "text_encoder": ORANGE,
    "invariants": PURPLE,
    "unet": SKY,
    "update": RED,
    "vae_decoder": GREEN,
}
_REST = "everything else"
_LEAST = 1e-4  # of the total: a rest below that is the medians' rounding
_REASON = 70  # characters
_TICKS = (1.05, 1.1, 1.15, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200)
_PICTURE_TAIL, _RATIO_TAIL = 1.5, 2.0  # times the bar, up to which a whisker is drawn in full
# The name of a figure, and how to draw it.
Planned: TypeAlias = "tuple[str, Callable[[], Sheet]]"


@contextmanager
def house_style() -> Generator[None]:
    """matplotlib's own defaults with ours on top, whatever the user's settings are; undone at the end.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        matplotlib: Any = import_module("matplotlib")  # its own types are partly unknown
    except ImportError as error:
        raise BackendError(
            f"matplotlib cannot be imported ({error})",
            expected="matplotlib, which draws the figures",
            fix='Install it: pip install "latentrt[bench]".',
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def numbered(name: str, number: int) -> str:
    """The first is called by the name alone, the next ones `name-2`, …."""
    return f"{name}-{number + 1}" if number else name


class Sheet:
    """A figure with one panel. To be made and finished within `house_style`.

    Args:
        heading: what it shows.
        subtitle: of whom: model, size, machine, date.
        source: where its numbers are.
        height: of the panel with its labels, inches.
    """

    def __init__(self, heading: str, subtitle: str, source: str, *, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        tall = height + _HEAD + _FOOT
        self.figure: Any = Figure(figsize=(_WIDTH, tall), dpi=DPI, facecolor="white")
        self._canvas: Any = FigureCanvasAgg(self.figure)
        left, inside = _SIDE / _WIDTH, 1 - 2 * _SIDE / _WIDTH
        place = left, _FOOT / tall, inside, height / tall
        self.figure.set_layout_engine("constrained", rect=place)
        self.figure.text(left, 1 - 0.14 / tall, heading, size=13, weight="bold", va="top")
        self.figure.text(left, 1 - 0.45 / tall, subtitle, size=9, color=GREY, va="top")
        self.figure.text(left, 0.11 / tall, source, size=7, color=GREY, va="bottom")
        self.axes: Axes = self.figure.subplots()

    def png(self, digest: str) -> bytes:
        """The picture, without a date; `digest` of the document goes into its metadata."""
        file = io.BytesIO()
        self._canvas.print_png(file, metadata={"Software": None, DIGEST: digest})
        return file.getvalue()


def ticks_by(write: Callable[[float], str]) -> Callable[[float, object], str]:
    """A formatter of ticks that does not care where on the axis they are."""
    return lambda value, _: write(value)


def tidy_bars(axes: Axes, names: list[str]) -> None:
    """Horizontal bars: the first on top, their names at the left, a grid to read lengths by."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def beside(axes: Axes, x: float, y: float, text: str, *, color: str = INK, weight: str = "normal") -> None:
    """A label right of a point; the layout makes room for what leaves the panel."""
    axes.annotate(
        text,
        (x, y),
        (5, 0),
        textcoords="offset points",
        va="center",
        color=color,
        size=8.5,
        weight=weight,
        annotation_clip=False,
    )


def whisker(axes: Axes, y: float, ends: tuple[float, float], *, arrow: bool, both: bool = False) -> None:
    """A line with a cap at its right end, or an arrow where it goes on; with one at the left if `both`."""
    axes.plot(ends, [y, y], color=INK, linewidth=1)
    if arrow:
        axes.plot(ends[1], y, marker=">", color=INK, markersize=4)
    for x in (*ends[:1] * both, *ends[1:] * (not arrow)):
        axes.plot([x, x], [y - 0.14, y + 0.14], color=INK, linewidth=1)


# ── one picture, stage after stage, above what the peers take for it ──────────────────────────────


def draw_waterfalls(document: Document, source: str) -> Iterator[Planned]:
    """A sheet for each case whose picture's stages are known."""
    for number, case in enumerate(cases(document)):
        row = row_of(document, "picture", OURS, case)
        total, found = summary(row), stages(row)
        if total and found:
            ours = total, summary(row, "p90")
            yield numbered("waterfall", number), partial(_draw_waterfall, document, case, found, ours, source)


def _draw_waterfall(
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
    names = [*(_stage(name, case) for name, _ in bars), "latentrt", *others]
    sheet = Sheet(
        "Where the time of one picture goes",
        words.about(document, case),
        source,
        height=0.33 * len(names) + 0.75,
    )
    axes = sheet.axes
    times = [item.seconds for item in others.values() if item and item.seconds]
    unit, unit_name = words.seconds_unit(max([total, *times]))
    end = 0.0
    for y, (name, taken) in enumerate(bars):
        axes.barh(y, taken / unit, left=end, height=0.62, color=_STAGES.get(name, GREY))
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


def _stage(stage: str, case: Mapping[str, Any]) -> str:
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
    shown = min(end, _PICTURE_TAIL * middle)
    whisker(axes, y, (middle / unit, shown / unit), arrow=shown < end)
    far = f"  p90 {words.seconds(p90)}" if shown < end else ""
    weight = "bold" if colour == BLUE else "normal"
    beside(axes, shown / unit, y, words.seconds(middle) + note + far, weight=weight)


# ── ours against the peers: ratios with their confidence intervals ─────────────────────────────────


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
            yield numbered("peers", number), partial(_draw_ratios, document, case, rows, source)


def _draw_ratios(
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
    return min(ratio.high, _RATIO_TAIL * max(ratio.value, 1))


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


# ── nets under the machine's two ceilings, measured in the same run (Williams et al. 2009) ─────────


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
            yield (
                numbered("roofline", number),
                partial(_draw_roofline, document, case, found, (gemm, copy), source),
            )


def _draw_roofline(
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
    for point, colour in zip(found, (ORANGE, PURPLE, SKY, GREEN, RED, GREY), strict=False):
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
