"""The figures: where a picture's time goes, ours against the peers, each net under the machine's ceilings.

Each `plan_…` answers how to draw a figure of one case of a latency document; None where it has none.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from .. import words
from ..intervals import Interval
from ..records import Row
from ..roofline import COPY, GEMM
from ..sides.contract import AGAIN, bench_library
from .reading import Against, Case, Result, against, ceiling_rates, figure, our_rows, peers, stages, summary

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
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_STAGES = {"text_encoder": ORANGE, "invariants": PURPLE, "unet": SKY, "update": RED, "vae_decoder": GREEN}
_REST = "everything else"
_LEAST = 1e-4  # of the total: a rest below that is the medians' rounding
_REASON = 70  # characters
_TICKS = (1.05, 1.1, 1.15, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200)
_PICTURE_TAIL, _RATIO_TAIL = 1.5, 2.0  # times the bar, up to which a whisker is drawn in full
Draw: TypeAlias = "Callable[[], Sheet]"


@contextmanager
def house_style() -> Generator[None]:
    """matplotlib's own defaults with ours on top, whatever the user's settings are; undone at the end.

    Raises:
        BackendError: matplotlib is not installed.
    """
    matplotlib = bench_library("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


class Sheet:
    """A figure with one panel, `height` inches with its labels. To be made and finished within `house_style`.

    Below the heading are model, case, machine and date, at the foot the document, commit and release.
    """

    def __init__(self, heading: str, result: Result, case: Case, *, height: float) -> None:
        from matplotlib.figure import Figure

        document, tall = result.document, height + _HEAD + _FOOT
        model, machine, day = words.model(document), words.machine(document), words.day(document)
        release = document.machine["libraries"].get("latentrt")
        known = {"latentrt": release, "commit": document.machine.get("commit")}
        facts = [f"{result.name}.json", *(f"{what} {value}" for what, value in known.items() if value)]
        self.figure: Any = Figure(figsize=(_WIDTH, tall), dpi=DPI, facecolor="white")
        left, inside = _SIDE / _WIDTH, 1 - 2 * _SIDE / _WIDTH
        self.figure.set_layout_engine("constrained", rect=(left, _FOOT / tall, inside, height / tall))
        write = self.figure.text
        write(left, 1 - 0.14 / tall, heading, size=13, weight="bold", va="top")
        write(left, 1 - 0.45 / tall, f"{model}, {words.case(case)} · {machine} · {day}", color=GREY, va="top")
        write(left, 0.11 / tall, " · ".join(facts), size=7, color=GREY, va="bottom")
        self.axes: Axes = self.figure.subplots()

    def png(self, digest: str) -> bytes:
        """The picture, without a date; `digest` of the document goes into its metadata."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", metadata={"Software": None, DIGEST: digest})
        return file.getvalue()


def _tidy_bars(axes: Axes, names: list[str]) -> None:
    """Horizontal bars: the first on top, their names at the left, a grid to read lengths by."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _beside(axes: Axes, x: float, y: float, text: str, **style: str) -> None:
    """A label right of a point; the layout makes room for what leaves the panel."""
    place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axes.annotate(text, (x, y), size=8.5, **place, **style)


def _whisker(axes: Axes, y: float, middle: float, ends: tuple[float, float], *, arrow: bool) -> None:
    """A line with caps, or with an arrow at its right end where it goes on."""
    sides = [[middle - ends[0]], [ends[1] - middle]]
    axes.errorbar(middle, y, xerr=sides, xlolims=arrow, color=INK, linewidth=1, capsize=3)


# ── one picture, stage after stage, above what the peers take for it ──────────────────────────────


def plan_waterfall(result: Result, case: Case) -> Draw | None:
    """For a case whose picture's stages are known."""
    picture = our_rows(result.document, case).get("picture")
    known = picture and picture.status == "ok" and stages(picture)
    return partial(_draw_waterfall, result, case, picture) if picture and known else None


def _draw_waterfall(result: Result, case: Case, picture: Row) -> Sheet:
    document, total = result.document, picture.summary["p50"]
    others = {side: against(document, case, side).get("picture") for side in peers(document)}
    bars = stages(picture)
    rest = total - sum(bars.values())
    if rest >= _LEAST * total:
        bars[_REST] = rest
    times = {name: f"{case['steps']} × " if name in ("unet", "update") else "" for name in bars}
    names = [*(times[name] + words.workload(name) for name in bars), "latentrt", *others]
    sheet = Sheet("Where the time of one picture goes", result, case, height=0.33 * len(names) + 0.75)
    axes = sheet.axes
    middles = [summary(item.row) or 0.0 for item in others.values() if item]
    unit, unit_name = words.scale(max([total, *middles]), "s")
    end = 0.0
    for y, (name, taken) in enumerate(bars.items()):
        axes.barh(y, taken / unit, left=end, height=0.62, color=_STAGES.get(name, GREY))
        end += taken / unit
        axes.plot([end, end], [y, y + 1], color=GREY, linewidth=0.7)
        _beside(axes, end, y, f"{words.seconds(taken)}  {words.percent(taken / total)}")
    _whole(axes, len(bars), picture, unit, color=BLUE, weight="bold")
    for y, item in enumerate(others.values(), start=len(bars) + 1):
        _peer(axes, y, item, unit)
    _tidy_bars(axes, names)
    axes.axhline(len(bars) - 0.5, color=PALE, linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit_name} from prompt to pixels in host memory (median; whiskers end at p90)")
    return sheet


def _peer(axes: Axes, y: int, item: Against | None, unit: float) -> None:
    if item and item.row.status == "ok":
        note = f"  {words.ratio(item.ratio.value)}× ours" if item.ratio else ""
        _whole(axes, y, item.row, unit, note, color="#9A9A9A")
        return
    reason = ": ".join(filter(None, (item.row.status, item.row.reason))) if item else "not measured"
    _beside(axes, 0, y, reason if len(reason) <= _REASON else f"{reason[:_REASON]}…", color=GREY)


def _whole(
    axes: Axes, y: int, row: Row, unit: float, note: str = "", *, color: str, weight: str = "normal"
) -> None:
    """A bar up to the median, a whisker to p90; a tail that would squeeze the bars is an arrow."""
    middle, p90 = row.summary["p50"], row.summary["p90"]
    axes.barh(y, middle / unit, height=0.62, color=color)
    shown = min(p90, _PICTURE_TAIL * middle)
    _whisker(axes, y, middle / unit, (middle / unit, shown / unit), arrow=shown < p90)
    far = f"  p90 {words.seconds(p90)}" if shown < p90 else ""
    _beside(axes, shown / unit, y, words.seconds(middle) + note + far, weight=weight)


# ── ours against the peers: ratios with their confidence intervals ─────────────────────────────────


def plan_ratios(result: Result, case: Case) -> Draw | None:
    """For a case with a peer in it, of the workloads that peers have."""
    sides = {side: against(result.document, case, side) for side in (AGAIN, *peers(result.document))}
    bars: list[tuple[str, Against | None]] = []
    for name, row in our_rows(result.document, case).items():
        found = {side: rows[name] for side, rows in sides.items() if name in rows and rows[name].ratio}
        if found.keys() - {AGAIN}:
            bars.append((f"{words.workload(name)}, ours {words.seconds(summary(row))}", None))
            bars += [("A/A: latentrt again" if side == AGAIN else side, it) for side, it in found.items()]
    return partial(_draw_ratios, result, case, bars) if bars else None


def _draw_ratios(result: Result, case: Case, bars: Sequence[tuple[str, Against | None]]) -> Sheet:
    heading = "Time of each peer over ours: right of the line, ours is faster"
    sheet = Sheet(heading, result, case, height=0.27 * len(bars) + 0.8)
    axes = sheet.axes
    axes.set_xscale("log")
    low, high = 0.93, 1.1
    for y, (_, item) in enumerate(bars):
        if item and item.ratio:
            end = _bar(axes, y, item.row, item.ratio)
            low, high = min(low, item.ratio.low / 1.03), max(high, end * 1.03)
    _tidy_bars(axes, [name for name, _ in bars])
    for tick, (_, item) in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_weight("bold" if item is None else "normal")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(low, high)
    axes.set_xticks(_spaced(low, high))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("time ÷ ours, median of interleaved rounds (log scale); whiskers: 95 % interval")
    return sheet


def _bar(axes: Axes, y: int, row: Row, ratio: Interval) -> float:
    """Draw one, and answer where its whisker ends; how far the interval goes is in the label."""
    even = row.side == AGAIN or ratio.low <= 1 <= ratio.high
    color = GREY if even else BLUE if ratio.low > 1 else RED
    axes.barh(y, ratio.value - 1, left=1, height=0.6, color=color, alpha=0.85)
    end = min(ratio.high, _RATIO_TAIL * max(ratio.value, 1))
    _whisker(axes, y, ratio.value, (ratio.low, end), arrow=end < ratio.high)
    label = f"{words.ratio(ratio.value)}×  {words.interval(ratio)}  {words.seconds(summary(row))}"
    _beside(axes, max(end, 1), y, label)
    return end


def _spaced(low: float, high: float) -> list[float]:
    """Ticks that keep their distance on a log scale, 1 among them."""
    kept = [1.0]
    for tick in sorted((*_TICKS, *(round(1 / tick, 2) for tick in _TICKS)), key=lambda it: abs(math.log(it))):
        far = all(abs(math.log(tick / other)) >= math.log(high / low) / 14 for other in kept)
        kept += [tick] if far and low <= tick <= high else []
    return sorted(kept)


# ── nets under the machine's two ceilings, measured in the same run (Williams et al. 2009) ─────────


def plan_roofline(result: Result, case: Case) -> Draw | None:
    """For a case with a net whose FLOPs and bytes are known, if both ceilings are."""
    ceilings = [ceiling_rates(result.document, name) for name in (GEMM, COPY)]
    rows = [row for name, row in our_rows(result.document, case).items() if name != "picture"]
    nets = [row for row in rows if row.status == "ok" and row.figures.get("flop_per_s")]
    return partial(_draw_roofline, result, case, nets, *ceilings) if nets and all(ceilings) else None


def _draw_roofline(
    result: Result, case: Case, nets: Sequence[Row], gemm: list[float], copy: list[float]
) -> Sheet:
    from matplotlib.ticker import EngFormatter, LogLocator

    sheet = Sheet("How near each net is to the machine's limits", result, case, height=4.4)
    axes = sheet.axes
    best, moved = max(gemm), max(copy)
    rates = {row.workload: row.figures["flop_per_s"] for row in nets}
    places = {row.workload: row.figures["flops"] / row.figures["bytes"] for row in nets}
    low = min(best / moved / 8, min(places.values()) / 3)
    high = max(best / moved * 10, max(places.values()) * 8)
    bottom = min(best / 20, min(rates.values()) / 3)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, best * 3))
    x = np.geomspace(low, high, 400)
    roof = np.minimum(x * moved, best)
    worst = np.minimum(x * min(copy), min(gemm))
    times = f" (least of {len(gemm)}: {words.amount(min(gemm), 'FLOP/s')})" if len(gemm) > 1 else ""
    name = f"best GEMM {words.amount(best, 'FLOP/s')}{times}\ncopy {words.amount(moved, 'B/s')}"
    axes.fill_between(x, worst, roof, color=SKY, alpha=0.4, linewidth=0)
    axes.plot(x, roof, color=BLUE, linewidth=1.6, label=name)
    marks: dict[str, Any] = {"marker": "o", "linestyle": "", "markeredgecolor": INK, "markersize": 7}
    for row, color in zip(nets, (ORANGE, PURPLE, SKY, GREEN, RED, GREY), strict=False):
        name, of_floor = row.workload, figure(row, "of_floor")
        label = f"{words.workload(name)}: {words.amount(rates[name], 'FLOP/s')}"
        label += "" if of_floor is None else f"\n{of_floor:.2f} of the floor"
        axes.plot(places[name], rates[name], color=color, label=label, **marks)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), labelspacing=1.1, borderaxespad=0)
    axes.set_xlabel("arithmetic intensity: FLOP per byte that has to be moved (log scale)")
    axes.set_ylabel("FLOP/s (log scale)")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if best * 3 < 200 * bottom else (1,)))
    axes.yaxis.set_major_formatter(EngFormatter("FLOP/s"))
    axes.minorticks_off()
    axes.grid(which="major")
    return sheet
