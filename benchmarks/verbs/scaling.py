"""`latentrt bench scaling`: cost against steps, batch and size, and the line through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from ...engines.package import Package
from ..case import Case
from ..intervals import fit_line
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..rounds import Pace, Slot, Turns, interleave
from ..sides.contract import OURS, Task
from .latency import Progress, document_of, silent


class Axis(NamedTuple):
    """What is timed along it, and its default values: of `pixels`, percentages of the case's own sides."""

    workload: str
    values: tuple[int, ...]


AXES: Mapping[str, Axis] = {
    "steps": Axis("picture", (5, 10, 20, 40)),
    "batch": Axis("unet", (1, 2, 4, 8)),
    # Attention grows with the square of the pixels, all else with them: the line's residual shows how much.
    "pixels": Axis("unet", (50, 100, 150, 200)),
}
# The fields of a case that vary; their product is the place on the axis.
_FIELDS = {"steps": ("steps",), "batch": ("pictures",), "pixels": ("width", "height")}


def _varied(case: Case, axis: str, value: int) -> Case:
    """The case at another point; sizes are multiples of 64 pixels, which every model draws."""
    if axis != "pixels":
        return replace(case, **dict.fromkeys(_FIELDS[axis], value))
    width, height = (max(round(side * value / 6400), 1) * 64 for side in (case.width, case.height))
    return replace(case, width=width, height=height)


def measure_scaling(
    package: Package,
    task: Task,
    case: Case,
    *,
    axes: Mapping[str, Sequence[int]],
    pace: Pace,
    progress: Progress = silent,
) -> Document:
    """Rows for every point, which take turns, and for each axis one of workload "fit".

    Our side is one fresh process; `axes` has the values by axis, of AXES.

    Raises:
        SideError: our side cannot be opened.
    """
    rows: list[Row] = []
    with SideProcess(OURS, OURS, task) as side:
        for name, values in axes.items():
            points = {f"{name} {value}": _varied(case, name, value) for value in values}
            timed = time_points(side, AXES[name].workload, points, pace, progress)
            rows += [replace(row, figures={"axis": name}) for row in timed]
            rows.append(_fit(name, case, timed))
    return document_of("scaling", package, task, rows)


def time_points(
    side: SideProcess, workload: str, points: Mapping[str, Case], pace: Pace, progress: Progress
) -> list[Row]:
    """A row for each case of one workload, by slot, in turns. One that cannot run leaves the others."""
    first: dict[str, float] = {}
    turns: dict[str, Turns] = {}
    slots = [Slot(side=side, slot=name, workload=workload, case=case) for name, case in points.items()]
    for slot in slots:
        progress(f"{slot.name}: first run")
        try:
            first[slot.name], _ = slot.prepare()
        except SideError as error:  # beyond an engine's profile, or beyond memory
            turns[slot.name] = Turns(status=error.status, reason=error.reason)
    turns |= interleave([slot for slot in slots if slot.name in first], first, pace, said=progress)
    return [slot.row(turns[slot.name]) for slot in slots]


def _fit(name: str, case: Case, rows: Sequence[Row]) -> Row:
    """The line through the points' medians."""
    good = [row for row in rows if row.status == "ok"]
    points = [(prod(row.case[field] for field in _FIELDS[name]), row.summary["p50"]) for row in good]
    figures = {"of": name, "workload": AXES[name].workload, "points": points}
    fit = Row(side=OURS, workload="fit", case=case.to_json(), figures=figures)
    if len(points) < 3:
        return replace(fit, status="FAILED", reason=f"{len(points)} points, a line with a residual needs 3")
    return replace(fit, figures={**figures, **fit_line(*zip(*points, strict=True))})
