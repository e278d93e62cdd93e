"""What verbs share that measure what is added to a model, such as adapters or a ControlNet.

Pictures with what is added are compared with ours, steps are timed in turns, and peaks of memory are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import numpy as np

from ...engines.errors import MemoryLimitError
from ...engines.package import Package
from ...engines.spec import Array
from ..case import Case
from ..machine import clocks, describe_machine, resident_bytes
from ..process import SideError, SideProcess
from ..records import Row
from ..rounds import Pace, Slot, Turns, interleave
from ..sides.contract import OURS, PICTURE, STEPS, Task
from .latency import Progress, check, check_memory
from .memory import NO_PROC, PEAK

# Stages that are steps. What a ControlNet computes once a picture is counted to them, too.
_LOOP = ("unet", "update", "controls", "enqueue", "wait", STEPS)
_PLAIN = ""  # what our picture without anything is kept under

Item = TypeVar("Item")

Outputs = Mapping[str, Array]


@dataclass(kw_only=True)
class Found:
    """What the processes of a side found: their peaks, without what is added and with it."""

    before: list[float] = field(default_factory=list[float])
    peaks: list[float] = field(default_factory=list[float])
    stamp: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def open(self, item: SideProcess, trial: Trial) -> None:
        """Draw a picture without, and note the peak until then. Raises SideError."""
        trial.plain(item.prepare(PICTURE, trial.case)[1])
        self.before.append(resident_bytes(item.pid)[1])

    def end(self, item: SideProcess) -> None:
        """Note the peak of a process that is closed next."""
        self.peaks.append(resident_bytes(item.pid)[1])
        self.stamp = item.stamp

    def peak(self, side: str, case: Mapping[str, Any]) -> Row:
        """The row of its memory."""
        row = Row(side=side, workload=PEAK, case=case, unit="B", stamp=self.stamp)
        if not all(self.peaks):
            return replace(row, status="not available", reason=NO_PROC)
        rounds = tuple((size,) for size in self.peaks)
        return replace(row, rounds=rounds, figures={"before": median(self.before)})


def refused(row: Row, error: SideError) -> Row:
    """The row of what failed."""
    stamp = row.stamp or {**describe_machine(), **clocks()}
    return replace(row, status=error.status, reason=error.reason, stamp=stamp)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Whose steps are timed.

    Attributes:
        side: of the row.
        module: of `SIDES`; places of one module share a process.
        workload: of that side.
        judge: the row's figures, of the first picture. Raises SideError.
        found: is told the process' peaks, if it is to draw a picture without first.
    """

    side: str
    module: str
    workload: str
    judge: Callable[[Outputs], Mapping[str, Any]]
    found: Found | None = None

    def row(self, workload: str, case: Case) -> Row:
        """Without times."""
        return Row(side=self.side, workload=workload, case=case.to_json())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What all sides are given, and what ours drew.

    Attributes:
        package: the model.
        task: what sides open.
        case: the pictures.
        progress: is told what is being done.
        besides: bytes of what is added, where it is opened in a process of its own.
        pictures: ours by what they were drawn with.
    """

    package: Package
    task: Task
    case: Case
    progress: Progress
    besides: int = 0
    pictures: dict[str, Outputs] = field(default_factory=dict[str, Outputs])

    def plain(self, outputs: Outputs) -> Outputs:
        """The first picture without anything."""
        return self.pictures.setdefault(_PLAIN, outputs)

    def unchanged(self, outputs: Outputs) -> Mapping[str, Any]:
        """That no byte is another one than in the first picture without. Raises SideError."""
        image, first = outputs["image"], self.plain(outputs)["image"]
        if differing := int(np.count_nonzero(image != first)):
            raise SideError("FAILED", f"{differing} of {image.size} bytes of the picture differ")
        return {"differing": 0, "of": image.size}

    def check(self, side: str, added: str, outputs: Outputs) -> Mapping[str, float]:
        """How like ours a peer's picture is, and like the first one ours. Raises SideError beyond the bar."""
        if side == OURS and added not in self.pictures:
            if np.array_equal(outputs["image"], self.pictures.get(_PLAIN, {}).get("image", ())):
                raise SideError("FAILED", f"the picture is the same as without the {added}")
            self.pictures[added] = outputs
        if added not in self.pictures:
            raise SideError("not available", "ours failed: there is nothing to compare with")
        likeness = check(outputs, self.pictures[added], self.package)
        return {} if side == OURS else likeness

    def check_room(self, count: int, besides: int = 0) -> None:
        """Raise SideError where so many sides at once do not fit into memory; see `check_memory`."""
        try:
            check_memory(self.task, count, besides=besides)
        except MemoryLimitError as error:
            raise SideError("not available", error.found) from error

    def steps(self, workload: str, places: Sequence[Place], pace: Pace) -> list[Row]:
        """A row of this workload for each place, whose samples are what a step took in each picture.

        Raises:
            SideError: ours cannot be opened.
        """
        modules = {place.module for place in places}
        added = sum(module != OURS for module in modules)
        try:
            self.check_room(len(modules), besides=added * self.besides)
        except SideError as error:
            return [refused(place.row(workload, self.case), error) for place in places]
        with ExitStack() as stack:
            opened: dict[str, SideProcess] = {}
            ready: dict[Slot, tuple[Place, Mapping[str, Any]]] = {}
            first: dict[str, float] = {}
            rows: dict[str, Row] = {}
            for place in places:
                self.progress(f"{workload}: {place.side} gets ready")
                try:
                    slot = self._slot(place, opened, stack)
                    first[slot.name], outputs = slot.prepare()
                    ready[slot] = place, place.judge(outputs)
                except SideError as error:
                    if place.side == OURS and place.module not in opened:
                        raise
                    rows[place.side] = refused(place.row(workload, self.case), error)
            turns = interleave(
                list(ready), first, pace, said=lambda line: self.progress(f"{workload}: {line}")
            )
            for slot, (place, figures) in ready.items():
                rows[place.side] = _row(slot, turns[slot.name], workload, figures)
                if place.found is not None and rows[place.side].status == "ok":
                    place.found.end(slot.side)
        return [rows[place.side] for place in places]

    def _slot(self, place: Place, opened: dict[str, SideProcess], stack: ExitStack) -> Slot:
        if place.module not in opened:
            item = stack.enter_context(SideProcess(place.side, place.module, self.task))
            opened[place.module] = item
            if place.found is not None:
                place.found.open(item, self)
        side = opened[place.module]
        return Slot(side=side, slot=place.side, workload=place.workload, case=self.case)


def flipped(items: Sequence[Item], number: int) -> Sequence[Item]:
    """In every other round from the end."""
    return items if number % 2 == 0 else items[::-1]


def _row(slot: Slot, turns: Turns, workload: str, figures: Mapping[str, Any]) -> Row:
    taken, steps = iter(turns.figures), slot.case.steps
    seconds = [[next(taken)["stages_s"] for _ in turn] for turn in turns.rounds]
    rounds = tuple(
        tuple(sum(stages.get(name, 0.0) for name in _LOOP) / steps for stages in turn) for turn in seconds
    )
    return replace(slot.row(turns, figures), side=slot.slot, workload=workload, rounds=rounds)
