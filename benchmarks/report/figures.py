"""Which figures a document has, and their PNGs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..records import Document
from . import words
from .memory import draw_memory
from .ratio_bars import draw_ratios
from .results import Result
from .roofline import draw_rooflines
from .sheet import Planned, Sheet, house_style
from .sweeps import draw_sweeps
from .waterfall import draw_waterfalls

_DRAWN: Mapping[str, tuple[Callable[[Document, str], Iterator[Planned]], ...]] = {
    "latency": (draw_waterfalls, draw_ratios, draw_rooflines),
    "memory": (draw_memory,),
    "scaling": (draw_sweeps,),
}


def planned_figures(result: Result) -> dict[str, Callable[[], Sheet]]:
    """How each figure of a document is drawn, by file name; matplotlib is not needed yet.

    Calls are to be made within `sheet.house_style`.
    """
    source = words.source(result.document, result.name)
    return {
        f"{result.name}-{name}.png": drawn
        for draw in _DRAWN.get(result.document.benchmark, ())
        for name, drawn in draw(result.document, source)
    }


def draw_figures(result: Result) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG) of every figure of a document."""
    for name, drawn in planned_figures(result).items():
        with house_style():
            yield name, drawn().png(result.digest)
