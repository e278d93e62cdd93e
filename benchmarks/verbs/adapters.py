"""`latentrt bench adapters`: what a change of adapters costs, ours beside diffusers', and what none costs.

The files are made: random weights on the model's own. Each round opens every side alone, in a fresh process,
in an order that flips, so that no more than one of them has to fit into memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from ...engines.package import Package
from ..case import Case
from ..models.loras import RANK, TARGETS, write_lora
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..rounds import Pace
from ..sides.adapted import CHANGES, FOLLOWED, LOAD, NEW, picture_after
from ..sides.contract import ADAPTED, DIFFUSERS, DIFFUSERS_ADAPTED, OURS, PICTURE, UNUSED, Task
from .additions import Found, Place, Trial, flipped, refused
from .latency import Progress, document_of, silent

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
class _Side(Found):
    """What the rounds of a side found, by file and workload."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict[tuple[str, str], list[float]])
    firsts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    likeness: dict[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    failed: dict[str, SideError] = field(default_factory=dict[str, SideError])
    closed: SideError | None = None

    def of(self, lora: str, workload: str) -> list[float]:
        """The samples of a file and a workload."""
        return self.samples.setdefault((lora, workload), [])


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
        changed, without = (
            Trial(package=package, task=task, case=each, progress=progress) for each in (one, case)
        )
        rows = list(_changed(changed, changes)) if changes.files else []
        if WITHOUT in changes.loras:
            places = (
                Place(side=OURS, module=OURS, workload=PICTURE, judge=without.unchanged),
                Place(side=LOADED, module=ADAPTED, workload=UNUSED, judge=without.unchanged),
            )
            rows += without.steps(STEP, places, pace)
    return document_of("adapters", package, task, rows, vars(changes))


def _changed(trial: Trial, changes: Changes) -> Iterator[Row]:
    """The rows of all sides."""
    found = {name: _Side() for name in (OURS, *changes.peers)}
    for number in range(changes.rounds):
        for name in flipped(list(found), number):
            if found[name].closed is None:
                trial.progress(f"round {number + 1} of {changes.rounds}: {name}")
                _go(trial, changes, name, found[name])
    for name, side in found.items():
        yield from _rows(trial, changes, name, side)


def _go(trial: Trial, changes: Changes, name: str, found: _Side) -> None:
    """Open a side, and go through every file; what fails is not gone through again."""
    try:
        with SideProcess(name, SIDES[name], trial.task) as item:
            found.open(item, trial)
            # The first change of a process imports what it needs, and reads the names of the model's weights.
            _file(trial, item, changes.files[0], found, first=True)
            for lora in changes.files:
                _file(trial, item, lora, found)
            found.end(item)
    except SideError as error:
        if name == OURS and not found.before:
            raise
        found.closed = error


def _file(trial: Trial, item: SideProcess, lora: str, found: _Side, *, first: bool = False) -> None:
    """Go through a file once."""
    if lora in found.failed:
        return
    try:
        answer, outputs = item.prepare(lora, trial.case)
        found.likeness[lora] = trial.check(item.name, f"adapter {lora!r}", outputs)
    except SideError as error:
        found.failed[lora] = error
        return
    for workload, seconds in answer["figures"].items():
        kept = found.firsts.setdefault(workload, []) if first else found.of(lora, workload)
        kept.append(seconds)


def _rows(trial: Trial, changes: Changes, name: str, found: _Side) -> Iterator[Row]:
    """A side's rows: one for each file and workload, and its peak."""
    case = {"rank": changes.rank, **trial.case.to_json()}
    if found.closed is not None:
        yield refused(Row(side=name, workload="open", stamp=found.stamp), found.closed)
        return
    for lora in changes.files:
        about = {"lora": lora, **case}
        if lora in found.failed:
            row = Row(side=name, workload=LOAD, case=about, stamp=found.stamp)
            yield refused(row, found.failed[lora])
            continue
        for workload in WORKLOADS:
            figures = {"first_s": median(found.firsts[workload])} if lora == changes.files[0] else {}
            if workload == picture_after(NEW):
                figures |= found.likeness[lora]
            yield Row(
                side=name,
                workload=workload,
                case=about,
                rounds=tuple((sample,) for sample in found.of(lora, workload)),
                figures=figures,
                stamp=found.stamp,
            )
    yield found.peak(name, case)
