"""`latentrt bench adapters`: what a change of adapters costs, ours beside diffusers', and what none costs.

The files are made: random weights on the model's own. Each round opens every side alone, in a fresh process,
in an order that flips, so that no more than one of them has to fit into memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...engines.errors import MemoryLimitError
from ...engines.package import Package
from ...engines.spec import Array
from ..case import Case
from ..machine import clocks, describe_machine, resident_bytes
from ..models.loras import RANK, TARGETS, write_lora
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..rounds import Pace, Slot, Turns, interleave
from ..sides.adapted import CHANGES, FOLLOWED, LOAD, NEW, PICTURE, UNUSED, picture_after
from ..sides.contract import ADAPTED, DIFFUSERS, DIFFUSERS_ADAPTED, OURS, Task
from .latency import Progress, check, check_memory, document_of, silent
from .memory import NO_PROC, PEAK

SIDES: Mapping[str, str] = {OURS: ADAPTED, DIFFUSERS: DIFFUSERS_ADAPTED}
PEERS = (DIFFUSERS,)
WITHOUT = "none"  # in place of a file: what pictures cost that are drawn without adapters
LORAS = (*TARGETS, WITHOUT)
STEP = "step without adapters"
LOADED = f"{OURS}, adapters loaded"  # the side that has adapters, and does not use them
# Of a file, in their order.
WORKLOADS = tuple(
    name for change in CHANGES for name in (change, *(picture_after(change),) * (change in FOLLOWED))
)
_LOOP = ("unet", "update", "enqueue", "wait")  # stages that are steps


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is changed, and how often.

    Attributes:
        loras: of LORAS.
        rank: of the files.
        rounds: how often each side is opened and goes through every file.
        peers: of PEERS.
    """

    loras: tuple[str, ...] = LORAS
    rank: int = RANK
    rounds: int = 3
    peers: tuple[str, ...] = PEERS

    @property
    def files(self) -> tuple[str, ...]:
        """Those of `loras` that are files."""
        return tuple(name for name in self.loras if name != WITHOUT)


@dataclass(kw_only=True)
class _Side:
    """What the rounds of a side found: by file and workload, and what it held before the first file."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict[tuple[str, str], list[float]])
    firsts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    likeness: dict[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    failed: dict[str, SideError] = field(default_factory=dict[str, SideError])
    peaks: list[float] = field(default_factory=list[float])
    before: list[float] = field(default_factory=list[float])
    closed: SideError | None = None
    stamp: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def of(self, lora: str, workload: str) -> list[float]:
        """The samples of a file and a workload."""
        return self.samples.setdefault((lora, workload), [])


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What all sides are given; by file, or WITHOUT one, the picture that ours drew first."""

    package: Package
    task: Task
    case: Case
    changes: Changes
    progress: Progress
    wanted: dict[str, Mapping[str, Array]] = field(default_factory=dict[str, Mapping[str, Array]])

    def check(self, side: str, lora: str, outputs: Mapping[str, Array]) -> Mapping[str, float]:
        """How like ours a peer's picture is, and like the first one ours. Raises SideError beyond the bar."""
        if side == OURS and lora not in self.wanted:
            if np.array_equal(outputs["image"], self.wanted[WITHOUT]["image"]):
                raise SideError("FAILED", "the picture is the same as without the adapter")
            self.wanted[lora] = outputs
        if lora not in self.wanted:
            raise SideError("not available", "ours failed: there is nothing to compare with")
        return check(outputs, self.wanted[lora], self.package)


def measure_adapters(
    package: Package,
    task: Task,
    case: Case,
    *,
    changes: Changes,
    pace: Pace,
    progress: Progress = silent,
) -> Document:
    """Rows of every change by file, the peaks of memory, and a step without adapters.

    Args:
        package: the model.
        task: what sides open.
        case: the picture without adapters, whose steps are timed; pictures with them have one step.
        changes: which, and how often.
        pace: of the steps without adapters.
        progress: is told what is being done.

    Raises:
        SideError: ours cannot be opened.
        PackageError: a graph of the package cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="latentrt-adapters-") as folder:
        for name in changes.files or TARGETS:
            progress(f"writing the adapter {name!r}")
            write_lora(package, name, Path(folder, f"{name}.safetensors"), rank=changes.rank)
        task = replace(task, loras=Path(folder))
        one = replace(case, steps=1, sampler="euler")
        bench = _Bench(package=package, task=task, case=one, changes=changes, progress=progress)
        rows = list(_changed(bench)) if changes.files else []
        if WITHOUT in changes.loras:
            rows += _without(replace(bench, case=case), pace)
    return document_of("adapters", package, task, rows, vars(changes))


# ── changes ────────────────────────────────────────────────────────────────────────────────────────


def _changed(bench: _Bench) -> Iterator[Row]:
    """The rows of all sides."""
    found = {name: _Side() for name in (OURS, *bench.changes.peers)}
    for number in range(bench.changes.rounds):
        for name in list(found) if number % 2 == 0 else reversed(found):
            if found[name].closed is None:
                bench.progress(f"round {number + 1} of {bench.changes.rounds}: {name}")
                _go(bench, name, found[name])
    for name, side in found.items():
        yield from _rows(bench, name, side)


def _go(bench: _Bench, name: str, found: _Side) -> None:
    """Open a side, and go through every file; what fails is not gone through again."""
    try:
        with SideProcess(name, SIDES[name], bench.task) as item:
            _, plain = item.prepare(PICTURE, bench.case)
            bench.wanted.setdefault(WITHOUT, plain)
            found.before.append(resident_bytes(item.pid)[1])
            # The first change of a process imports what it needs, and reads the names of the model's weights.
            _file(bench, item, bench.changes.files[0], found, first=True)
            for lora in bench.changes.files:
                _file(bench, item, lora, found)
            found.peaks.append(resident_bytes(item.pid)[1])
            found.stamp = item.stamp
    except SideError as error:
        if name == OURS and not found.before:
            raise
        found.closed = error


def _file(bench: _Bench, item: SideProcess, lora: str, found: _Side, *, first: bool = False) -> None:
    """Go through a file once."""
    if lora in found.failed:
        return
    try:
        answer, outputs = item.prepare(lora, bench.case)
        found.likeness[lora] = bench.check(item.name, lora, outputs)
    except SideError as error:
        found.failed[lora] = error
        return
    for workload, seconds in answer["figures"].items():
        kept = found.firsts.setdefault(workload, []) if first else found.of(lora, workload)
        kept.append(seconds)


def _rows(bench: _Bench, name: str, found: _Side) -> Iterator[Row]:
    """A side's rows: one for each file and workload, and its peak."""
    stamp, likeness = found.stamp or {**describe_machine(), **clocks()}, found.likeness
    case = {"rank": bench.changes.rank, **bench.case.to_json()}
    if found.closed is not None:
        status, reason = found.closed.status, found.closed.reason
        yield Row(side=name, workload="open", status=status, reason=reason, stamp=stamp)
        return
    for lora in bench.changes.files:
        about = {"lora": lora, **case}
        if lora in found.failed:
            status, reason = found.failed[lora].status, found.failed[lora].reason
            yield Row(side=name, workload=LOAD, case=about, status=status, reason=reason, stamp=stamp)
            continue
        for workload in WORKLOADS:
            figures = {"first_s": median(found.firsts[workload])} if lora == bench.changes.files[0] else {}
            if name != OURS and workload == picture_after(NEW):
                figures |= likeness[lora]
            yield Row(
                side=name,
                workload=workload,
                case=about,
                rounds=tuple((sample,) for sample in found.of(lora, workload)),
                figures=figures,
                stamp=stamp,
            )
    peak = Row(side=name, workload=PEAK, case=case, unit="B", stamp=stamp)
    if not all(found.peaks):
        yield replace(peak, status="not available", reason=NO_PROC)
        return
    rounds = tuple((size,) for size in found.peaks)
    yield replace(peak, rounds=rounds, figures={"before": median(found.before)})


# ── without adapters ───────────────────────────────────────────────────────────────────────────────


def _without(bench: _Bench, pace: Pace) -> list[Row]:
    """A pipeline that never saw an adapter, in turns with one that has all files loaded and uses none."""
    sides = {OURS: (OURS, PICTURE), LOADED: (ADAPTED, UNUSED)}
    try:
        check_memory(bench.task, len(sides))
    except MemoryLimitError as error:
        return [Row(side=LOADED, workload=STEP, status="not available", reason=error.found)]
    with ExitStack() as stack:
        slots: list[Slot] = []
        first: dict[str, float] = {}
        images: list[Array] = []
        for name, (module, workload) in sides.items():
            bench.progress(f"{STEP}: {name} gets ready")
            side = stack.enter_context(SideProcess(name, module, bench.task))
            slots.append(Slot(side=side, slot=name, workload=workload, case=bench.case))
            first[name], outputs = slots[-1].prepare()
            images.append(outputs["image"])
        turns = interleave(slots, first, pace, said=lambda line: bench.progress(f"{STEP}: {line}"))
        own, loaded = (_steps(slot, turns[slot.name], bench.case.steps) for slot in slots)
    return [own, _compared(loaded, images)]


def _steps(slot: Slot, turns: Turns, steps: int) -> Row:
    """The row of a side, whose samples are what a step took in each picture."""
    taken = iter(turns.figures)
    seconds = [[next(taken)["stages_s"] for _ in turn] for turn in turns.rounds]
    rounds = tuple(
        tuple(sum(stages.get(name, 0.0) for name in _LOOP) / steps for stages in turn) for turn in seconds
    )
    return replace(slot.row(turns), workload=STEP, rounds=rounds)


def _compared(row: Row, images: Sequence[Array]) -> Row:
    """With the number of bytes in which the pictures differ: any is a failure."""
    differing = int(np.count_nonzero(images[0] != images[1]))
    row = replace(row, figures={**row.figures, "differing": differing, "of": images[0].size})
    if not differing:
        return row
    return replace(
        row, status="FAILED", reason=f"{differing} of {images[0].size} bytes of the picture differ"
    )
