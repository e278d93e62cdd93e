"""`latentrt bench scaling`: cost against steps, batch and size, and the line through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ...engines.package import Package
from ..case import Case
from ..intervals import fit_line
from ..process import SideError, SideProcess, Slot
from ..records import Document, Row
from ..rounds import Pace, Turns, interleave
from ..sides.contract import OURS, Task
from .latency import Said, describe_model, settings_of


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is varied.

    Attributes:
        workload: what is timed along it.
        of: a case as a number on the axis.
        vary: the case with another value.
        values: the default ones; sizes are factors of the case's own.
    """

    workload: str
    of: Callable[[Case], float]
    vary: Callable[[Case, int], Case]
    values: tuple[int, ...]


def _resized(case: Case, percent: int) -> Case:
    """Both sides at so many per cent, in multiples of 64 pixels, which every model draws."""
    width, height = (max(round(side * percent / 6400), 1) * 64 for side in (case.width, case.height))
    return replace(case, width=width, height=height)


AXES: Mapping[str, Axis] = {
    "steps": Axis(
        workload="picture",
        of=lambda case: case.steps,
        vary=lambda case, steps: replace(case, steps=steps),
        values=(5, 10, 20, 40),
    ),
    "batch": Axis(
        workload="unet",
        of=lambda case: case.pictures,
        vary=lambda case, pictures: replace(case, pictures=pictures),
        values=(1, 2, 4, 8),
    ),
    # Attention grows with the square of the pixels, all else with them: the line's residual shows how much.
    "pixels": Axis(
        workload="unet",
        of=lambda case: case.width * case.height,
        vary=_resized,
        values=(50, 100, 150, 200),
    ),
}


def measure_scaling(
    package: Package,
    task: Task,
    case: Case,
    *,
    axes: Mapping[str, Sequence[int]] | None = None,
    pace: Pace | None = None,
    said: Said = lambda line: None,
) -> Document:
    """Rows for every point, which take turns, and for each axis one of workload "fit".

    Args:
        package: of ours, in one fresh process.
        task: how it is opened.
        case: what is varied.
        axes: values by axis; None is all of AXES at their own.
        pace: of each axis.
        said: is told how far it is.

    Raises:
        SideError: it cannot be opened, or a point cannot be run.
    """
    chosen = {name: axis.values for name, axis in AXES.items()} if axes is None else axes
    rows: list[Row] = []
    with ExitStack() as stack:
        side = stack.enter_context(SideProcess(OURS, OURS, task))
        for name, values in chosen.items():
            rows += _measure_axis(side, name, case, values, pace or Pace(), said)
    return Document(
        benchmark="scaling", model=describe_model(package), settings=settings_of(task), rows=tuple(rows)
    )


def _measure_axis(
    side: SideProcess, name: str, case: Case, values: Sequence[int], pace: Pace, said: Said
) -> list[Row]:
    axis = AXES[name]
    points = {f"{name} {value}": axis.vary(case, value) for value in values}
    first: dict[str, float] = {}
    failed: dict[str, Turns] = {}
    for slot, point in points.items():
        said(f"{slot}: gets ready")
        try:
            first[slot] = side.prepare(axis.workload, point, slot=slot)[0]["seconds"]
        except SideError as error:  # beyond an engine's profile, or beyond memory: the others count
            failed[slot] = Turns(status=error.status, reason=error.reason)
    slots = [Slot(name=slot, side=side) for slot in first]
    turns = failed | interleave(slots, first, pace, said=lambda line: said(f"{name}: {line}"))
    rows = [
        Row(
            side=OURS,
            workload=axis.workload,
            case=point.to_json(),
            rounds=turns[slot].frozen,
            status=turns[slot].status,
            reason=turns[slot].reason,
            figures={"axis": name},
            stamp=side.stamp,
        )
        for slot, point in points.items()
    ]
    return [*rows, _fit(name, axis, case, rows)]


def _fit(name: str, axis: Axis, case: Case, rows: Sequence[Row]) -> Row:
    """The line through the points' medians."""
    good = [row for row in rows if row.status == "ok"]
    points = [(axis.of(Case.from_json(row.case)), row.summary["p50"]) for row in good]
    figures: dict[str, Any] = {"of": name, "workload": axis.workload, "points": points}
    if len(points) < 3:
        return Row(
            side=OURS,
            workload="fit",
            case=case.to_json(),
            status="FAILED",
            reason=f"{len(points)} points, a line with a residual needs 3",
            figures=figures,
        )
    line = fit_line([x for x, _ in points], [y for _, y in points])
    return Row(side=OURS, workload="fit", case=case.to_json(), figures={**figures, **line.to_json()})
