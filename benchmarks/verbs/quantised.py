"""`latentrt bench quantised`: packages in fewer bits beside the one they were made of, and beside peers.

What has fewer bits draws another picture. How far it is from ours as it was stands beside its time, and it is
held to the bars of its format: ours below them fails, a peer's row says so. Sides that compute what ours does
take turns with them, for what is gained is gained over the fastest of those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...demo.checker import score
from ...demo.shapes import held_out_scenes
from ...engines.backends import BACKENDS
from ...engines.errors import MemoryLimitError, UsageError
from ...engines.package import Package
from ...engines.spec import Array
from ...engines.tolerances import (
    BF16,
    NET_RELATIVE_L2,
    PICTURE_DB,
    QUANTISED_PICTURE_DB,
    QUANTISED_RELATIVE_L2,
)
from ...runtime.pipeline import Pipeline
from ..case import Case
from ..machine import resident_bytes
from ..models.rounded import RANDOM
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..rounds import Pace, Slot, Turns, interleave
from ..sides.contract import DIFFUSERS, OURS, ROUNDED_PEERS, Task
from .latency import (
    OVER_WEIGHTS,
    Progress,
    check_memory,
    document_of,
    medians,
    silent,
    weights_of,
    worst_output,
)
from .memory import NO_PROC, PEAK
from .steps import draw

WORKLOADS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "picture")
RIGHT = "right pictures"  # of the demo model's held-out prompts, by its checker
_ANOTHER = 0.5  # relative L2: beyond it, another net was computed, or another prompt's picture
AT_ONCE, APART = "at once", "one at a time"  # how sides are open, in a document's settings
MOST_LOST = 0.01  # of the share of right pictures
FILE_READERS = (DIFFUSERS, *(name for name in ROUNDED_PEERS if name.startswith("sdcpp")))


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Who draws, and in which arithmetic.

    Attributes:
        side: as rows name it; ours as it was is OURS.
        module: of `SIDES`.
        task: what it opens.
        precision: whose bars hold: a format of `QUANTISED_RELATIVE_L2`, or the dtype of exact sides.
        told: whether what is below the bars only says so in place of failing: of peers in fewer bits, and of
            packages of random weights (`models/rounded.py`).
    """

    side: str
    module: str
    task: Task
    precision: str
    told: bool = False

    def judge(self, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, Any]:
        """How like ours the output is that is the furthest off; `below_bar` where that is told.

        Raises:
            SideError: beyond the bars; where that is told, beyond what only other nets are.
        """
        nets, pictures = {**NET_RELATIVE_L2, **QUANTISED_RELATIVE_L2}, {**PICTURE_DB, **QUANTISED_PICTURE_DB}
        name, figures, problem = worst_output(
            found, wanted, net_bar=nets[self.precision], picture_bar=pictures[self.precision]
        )
        if not problem:
            return figures
        if self.told and figures["relative_l2"] <= _ANOTHER:
            return {**figures, "below_bar": problem}
        raise SideError("FAILED", f"{name} is not ours: {problem}")


def modes_of(
    package: Package,
    task: Task,
    approximate: Sequence[tuple[Package, str]],
    peers: Sequence[str] = (),
    *,
    file: Path | None = None,
) -> tuple[Mode, ...]:
    """Ours as it was, ours in fewer bits, and peers.

    Args:
        package: as it was.
        task: what it is opened with.
        approximate: packages that `latentrt quantise` made of it, and the backend of each; or the package
            itself on a backend that is approximate.
        peers: of `SIDES`.
        file: the one-file checkpoint that the package is from, for peers that open one.

    Raises:
        UsageError: a package is exact, or of another model.
    """
    dtype = package.manifest.dtype
    modes = [Mode(side=OURS, module=OURS, task=task, precision=dtype)]
    modes += [_ours(package, task, other, backend) for other, backend in approximate]
    for name in peers:
        opened = task if file is None or name not in FILE_READERS else replace(task, model=file)
        precision, told = ROUNDED_PEERS.get(name, dtype), name in ROUNDED_PEERS
        modes.append(Mode(side=name, module=name, task=opened, precision=precision, told=told))
    return tuple(modes)


def _ours(package: Package, task: Task, other: Package, backend: str) -> Mode:
    """One of ours that is approximate."""
    facts, name = other.manifest.quantised, other.manifest.name
    coarse = backend in BACKENDS and BACKENDS[backend].approximate
    alike = other.manifest.family == package.manifest.family
    if not alike or not (facts or coarse):
        raise UsageError(
            f"the package {name!r} in {other.root.name} is not in fewer bits"
            if alike
            else f"the package {name!r} is of the family {other.manifest.family}",
            expected=f"a package made of {package.manifest.name!r}",
            fix="Make one: latentrt quantise PACKAGE -o NEW --to int8",
        )
    precision = str(facts.get("format", BF16))
    told = facts.get("weights") == RANDOM
    opened = replace(task, model=other.root, checkpoint=None, backend=backend)
    return Mode(
        side=f"{OURS} {precision}, {backend}", module=OURS, task=opened, precision=precision, told=told
    )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is measured.

    Attributes:
        case: of every workload.
        workloads: of WORKLOADS.
        prompts: of the demo's held-out ones, drawn by each of our modes; 0 for other models.
    """

    case: Case
    workloads: tuple[str, ...] = WORKLOADS
    prompts: int = 0


def measure_quantised(
    package: Package,
    modes: Sequence[Mode],
    inputs: Inputs,
    *,
    pace: Pace,
    progress: Progress = silent,
) -> Document:
    """Rows of every workload and side, which take turns; of each side's peak; and of right pictures.

    Sides are open at once, or where they do not fit the memory so, one at a time. Memory is looked at when a
    side has done everything; a peer that rounds while it is opened, or a library that reads a checkpoint, has
    that in its peak, too.

    Raises:
        SideError: ours as it was cannot be opened.
        MemoryLimitError: one side alone takes more memory than there is.
    """
    try:
        _check_room(package, modes)
        opened = AT_ONCE
    except MemoryLimitError:
        for mode in modes:
            _check_room(package, [mode])
        opened = APART
    rows = (_at_once if opened == AT_ONCE else _apart)(modes, inputs, pace, progress)
    rows += _right(modes, inputs, progress)
    settings = {"workloads": list(inputs.workloads), "sides": [mode.side for mode in modes], "open": opened}
    return document_of("quantised", package, modes[0].task, rows, settings)


def _at_once(modes: Sequence[Mode], inputs: Inputs, pace: Pace, progress: Progress) -> list[Row]:
    """Rows of sides that are open beside each other, and take turns run by run."""
    run = _Run(inputs=inputs, pace=pace, progress=progress)
    run.do_everything(modes)
    return run.rows


def _apart(modes: Sequence[Mode], inputs: Inputs, pace: Pace, progress: Progress) -> list[Row]:
    """Rows of sides each of which is opened as often as there are rounds; who fails has no other turn."""
    each = replace(pace, runs=1, rounds=1, least=1, budget=0.0)
    wanted: dict[str, Mapping[str, Array]] = {}
    rows: dict[tuple[str, str], Row] = {}
    failed = set[str]()
    for number in range(pace.least):
        for mode in modes if number % 2 == 0 else reversed(modes):
            if mode.side in failed:
                continue
            progress(f"round {number + 1} of {pace.least}")
            run = _Run(inputs=inputs, pace=each, progress=progress, wanted=wanted)
            run.do_everything([mode])
            for row in run.rows:
                before = rows.get((row.side, row.workload))
                rows[row.side, row.workload] = _joined(before, row) if before else row
            failed |= {row.side for row in run.rows if row.status != "ok"}
    return list(rows.values())


def _joined(first: Row, second: Row) -> Row:
    """One row of two openings' rounds; what failed has none."""
    return replace(first, rounds=first.rounds + second.rounds) if second.status == "ok" else second


def _check_room(package: Package, modes: Sequence[Mode]) -> None:
    """Raise MemoryLimitError where sides do not fit beside each other; peers in fewer bits count half."""
    besides = 0
    exact = 0
    for mode in modes:
        if mode.module in ROUNDED_PEERS:
            besides += int(OVER_WEIGHTS / 2 * weights_of(package))
        elif mode.side != OURS and mode.module == OURS:
            besides += int(OVER_WEIGHTS * weights_of(Package.open(mode.task.model)))
        else:
            exact += 1
    check_memory(modes[0].task, exact, besides=besides)


@dataclass(kw_only=True)
class _Run:
    """The processes, and what they found; `wanted` is what ours as it was put out, by workload."""

    inputs: Inputs
    pace: Pace
    progress: Progress
    wanted: dict[str, Mapping[str, Array]] = field(default_factory=dict[str, Mapping[str, Array]])
    sides: dict[str, tuple[Mode, SideProcess]] = field(default_factory=dict[str, tuple[Mode, SideProcess]])
    rows: list[Row] = field(default_factory=list[Row])

    def do_everything(self, modes: Sequence[Mode]) -> None:
        """Open these sides, measure every workload, look at their memory, and close them."""
        with ExitStack() as stack:
            self.open(modes, stack)
            for workload in self.inputs.workloads:
                self.measure(workload)
            self.rows += self.peaks()

    def open(self, modes: Sequence[Mode], stack: ExitStack) -> None:
        """Every side that can be opened, and a row for each other one.

        Those that round while they are opened come first: it takes more memory than anything behind it.
        """
        for mode in sorted(modes, key=lambda mode: mode.module not in ROUNDED_PEERS):
            self.progress(f"opening {mode.side}")
            try:
                side = stack.enter_context(SideProcess(mode.side, mode.module, mode.task))
            except SideError as error:
                if mode.side == OURS:
                    raise
                self.rows.append(
                    Row(side=mode.side, workload="open", status=error.status, reason=error.reason)
                )
                continue
            self.sides[mode.side] = mode, side

    def measure(self, workload: str) -> None:
        """Every side's row of a workload, ours as it was first: others are compared with it."""
        ready: dict[Slot, dict[str, Any]] = {}
        for mode, side in sorted(self.sides.values(), key=lambda pair: pair[0].side != OURS):
            self.progress(f"{workload}: {mode.side} gets ready")
            slot = Slot(side=side, slot=mode.side, workload=workload, case=self.inputs.case)
            try:
                seconds, outputs = slot.prepare()
                if mode.side == OURS:
                    self.wanted[workload] = outputs
                likeness = _likeness(mode, outputs, self.wanted.get(workload, {}))
                ready[slot] = {"first_s": seconds, **likeness}
            except SideError as error:
                self.rows.append(slot.row(Turns(status=error.status, reason=error.reason)))
        first = {slot.name: float(figures["first_s"]) for slot, figures in ready.items()}
        turns = interleave(
            list(ready), first, self.pace, said=lambda line: self.progress(f"{workload}: {line}")
        )
        for slot, figures in ready.items():
            known = medians(turns[slot.name], self.inputs.case.steps)
            self.rows.append(slot.row(turns[slot.name], {**figures, **known}))

    def peaks(self) -> Iterator[Row]:
        """What each process has had resident, in bytes."""
        for mode, side in self.sides.values():
            now, peak = resident_bytes(side.pid)
            row = Row(side=mode.side, workload=PEAK, case=self.inputs.case.to_json(), unit="B")
            row = replace(row, stamp=side.stamp, figures={"resident": now})
            lost = replace(row, status="not available", reason=NO_PROC, figures={})
            yield replace(row, rounds=((float(peak),),)) if peak else lost


def _likeness(mode: Mode, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, Any]:
    if not wanted:
        raise SideError("not available", "ours failed: there is nothing to compare with")
    shared = {name: array for name, array in wanted.items() if name in found}
    return mode.judge(found, shared) if mode.side != OURS and shared else {}


def _right(modes: Sequence[Mode], inputs: Inputs, progress: Progress) -> Iterator[Row]:
    """The share of our pictures that are right, and of those that are by the next prompt.

    The seed of a prompt is its place among them. A row is FAILED where more than `MOST_LOST` of what
    was right is lost.
    """
    scenes = list(held_out_scenes()[: inputs.prompts])
    exact = 0.0
    for mode in modes if scenes else ():
        if mode.module != OURS:
            continue
        progress(f"{mode.side} draws {len(scenes)} prompts")
        task = mode.task
        with Pipeline.open(task.model, backend=task.backend, threads=task.threads) as pipe:
            pictures = list(draw(pipe, scenes, {}).pictures)
        read, shuffled = score(pictures, scenes), score(pictures, scenes[1:] + scenes[:1])
        share = read.strict / read.count
        exact = share if mode.side == OURS else exact
        lost = f"{share:.1%} of the pictures are right, and {exact:.1%} as it was"
        worse = round(exact - share, 6) > MOST_LOST
        yield Row(
            side=mode.side,
            workload=RIGHT,
            unit="1",
            rounds=() if worse else ((share,),),
            status="FAILED" if worse else "ok",
            reason=lost if worse else "",
            figures={**asdict(read), "shuffled": shuffled.strict},
        )
