"""The look that all figures share: a sheet with a heading, panels and its source."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeAlias

from ...engines.errors import BackendError

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


# The name of a figure, and how to draw it.
Planned: TypeAlias = "tuple[str, Callable[[], Sheet]]"
