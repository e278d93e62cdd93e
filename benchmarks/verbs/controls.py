"""`latentrt bench controls`: what a ControlNet adds to a step, beside diffusers, and what none does.

The ControlNet is made: random weights, of the architecture of the published ones for the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...engines.package import Package
from ..case import Case
from ..models.controlnets import write_controlnet
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..rounds import Pace
from ..sides.contract import CONTROLLED, DIFFUSERS, DIFFUSERS_CONTROLLED, OURS, PICTURE, UNUSED, Task
from ..sides.controlled import CONTROL, GRAPHS
from .additions import Found, Place, Trial, flipped, refused
from .latency import Progress, document_of, silent

SIDES: Mapping[str, str] = {OURS: CONTROLLED, DIFFUSERS: DIFFUSERS_CONTROLLED}
PEERS = (DIFFUSERS,)
OUR_STEP = "our step"  # of sides that never loaded a ControlNet, do not use it, and use it
OUR_CALL = "our call of the UNet"  # in one process, in turns: the plain graph, and the one of IDLE
WITH_ONE = "step with one ControlNet"
# The side that has a ControlNet, without using it and using it.
IDLE, IN_USE = f"{OURS}, ControlNet loaded", f"{OURS}, ControlNet in use"
_ADDED = "ControlNet"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How often each side is opened, and which `peers` there are, of PEERS."""

    rounds: int = 3
    peers: tuple[str, ...] = PEERS


def measure_controls(
    package: Package,
    task: Task,
    case: Case,
    *,
    comparison: Comparison,
    pace: Pace,
    progress: Progress = silent,
) -> Document:
    """Rows of a step without a ControlNet, with one that is not used, and with one that is; and of memory.

    Args:
        package: the model.
        task: what sides open.
        case: the pictures, of two steps or more.
        comparison: with whom, and how often.
        pace: of the steps; the budget is for all rounds of a workload.
        progress: is told what is being done.

    Raises:
        UsageError: there is no ControlNet for the model.
        SideError: ours cannot be opened.
        OSError: the ControlNet cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="latentrt-controls-") as folder:
        progress("writing the ControlNet")
        size = write_controlnet(package, Path(folder))
        task = replace(task, control=Path(folder))
        trial = Trial(package=package, task=task, case=case, progress=progress, besides=size)
        rows = list(_rows(trial, comparison, replace(pace, budget=pace.budget / comparison.rounds)))
    return document_of("controls", package, task, rows, vars(comparison))


def _rows(trial: Trial, comparison: Comparison, pace: Pace) -> Iterator[Row]:
    ours = (
        Place(side=OURS, module=OURS, workload=PICTURE, judge=trial.unchanged),
        Place(side=IDLE, module=CONTROLLED, workload=UNUSED, judge=trial.unchanged),
        Place(side=IN_USE, module=CONTROLLED, workload=CONTROL, judge=partial(trial.check, OURS, _ADDED)),
    )
    yield from _merged(trial, OUR_STEP, ours, pace, comparison.rounds)
    found = {name: Found() for name in (OURS, *comparison.peers)}
    beside = [
        Place(
            side=name,
            module=SIDES[name],
            workload=CONTROL,
            judge=partial(trial.check, name, _ADDED),
            found=side,
        )
        for name, side in found.items()
    ]
    yield from _merged(trial, WITH_ONE, beside, pace, comparison.rounds)
    for name, side in found.items():
        if side.peaks:
            yield side.peak(name, trial.case.to_json())
    yield from _calls(trial)


def _calls(trial: Trial) -> Iterator[Row]:
    """What a call takes where nothing steers: of the plain graph, and of the one that a ControlNet needs."""
    trial.progress(f"{OUR_CALL}: in turns")
    rows = [Row(side=side, workload=OUR_CALL, case=trial.case.to_json()) for side in (OURS, IDLE)]
    try:
        trial.check_room(2)  # two graphs of the UNet, which is most of a pipeline
        with SideProcess(OURS, CONTROLLED, trial.task) as item:
            figures = item.prepare(GRAPHS, trial.case)[0]["figures"]
            stamp = item.stamp
    except SideError as error:
        yield from (refused(row, error) for row in rows)
        return
    for row, name in zip(rows, ("plain_s", "controlled_s"), strict=True):
        yield replace(row, rounds=tuple((seconds,) for seconds in figures[name]), stamp=stamp)


def _merged(trial: Trial, workload: str, places: Sequence[Place], pace: Pace, rounds: int) -> Iterator[Row]:
    """The places' rows, of several openings; one that failed in any of them has no time."""
    runs: dict[str, list[Row]] = {place.side: [] for place in places}
    for number in range(rounds):
        left = [place for place in places if all(row.status == "ok" for row in runs[place.side])]
        if not left:
            break
        for row in trial.steps(workload, flipped(left, number), pace):
            runs[row.side].append(row)
    for rows in runs.values():
        if rows:
            turns = tuple(turn for row in rows for turn in row.rounds)
            yield replace(rows[-1], rounds=turns if rows[-1].status == "ok" else ())
