"""`latentrt bench latency`: how long each stage and a whole picture take, ours beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from ...engines.errors import MemoryLimitError
from ...engines.net_weights import engine_bytes
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS, Array
from ...engines.tolerances import NET_RELATIVE_L2, PICTURE_DB
from ...runtime import doctor
from ..case import NETS, WORKLOADS, Case
from ..likeness import difference, psnr
from ..process import SideError, SideProcess
from ..records import Document, Row
from ..roofline import COPY, GEMM, with_roofline, workload_parts
from ..rounds import Pace, Slot, Turns, interleave
from ..sides.contract import AGAIN, CEILING, OURS, REFERENCES, YARDSTICK, Task, open_package

# What a picture spends in nets, by the stages of the host's loop; the rest is scheduler, guidance and Python.
ENGINE_STAGES = ("text_encoder", "invariants", "unet", "vae_decoder")

# Resident memory of a side over the bytes of its weights at the width of the arithmetic: SD 1.5 in fp32 has
# 4.3 GB of them and took 5.9 GB with convolutions in Winograd's form, 7.2 GB at the peak of a picture.
OVER_WEIGHTS = 1.6
SHORT = 1.0  # seconds: what takes longer than that has the machine's slow moments averaged already

Progress = Callable[[str], None]


def silent(line: str) -> None:
    """Report no progress."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Who is measured: ours, `peers` of `sides.contract.SIDES`, and those of REFERENCES that take part."""

    task: Task
    peers: tuple[str, ...] = ()
    references: tuple[str, ...] = REFERENCES

    @property
    def names(self) -> tuple[str, ...]:
        """Sides as rows name them, in the order of the first round."""
        names = (OURS, AGAIN, *self.peers, CEILING)
        return tuple(name for name in names if name not in REFERENCES or name in self.references)

    def open(self, stack: ExitStack, progress: Progress = silent) -> tuple[list[SideProcess], list[Row]]:
        """Those that can be opened, each in a fresh process, and a row for each other one.

        Raises:
            SideError: ours cannot.
            MemoryLimitError: all of them at once take more memory than there is.
        """
        check_memory(self.task, sum(name != CEILING for name in self.names))
        opened: list[SideProcess] = []
        missing: list[Row] = []
        for name in self.names:
            progress(f"opening {name}")
            module = OURS if name == AGAIN else name
            try:
                opened.append(stack.enter_context(SideProcess(name, module, self.task)))
            except SideError as error:
                if name == OURS:
                    raise
                missing.append(Row(side=name, workload="open", status=error.status, reason=error.reason))
        return opened, missing


def check_memory(task: Task, count: int, *, besides: int = 0) -> None:
    """Raise MemoryLimitError where so many sides of a task at once take more memory than there is.

    `besides`: bytes of other weights in all of them; what pictures take is counted with the model.

    The system would kill one of them, in the middle of a measurement that takes minutes.
    """
    package, facts = open_package(task), doctor.memory()
    known = [size for size in (facts["available"], facts["limit"]) if size is not None]
    need = int(count * OVER_WEIGHTS * weights_of(package)) + besides
    if known and need > min(known) and task.device == "cpu":
        raise MemoryLimitError(
            f"{count} sides of {package.manifest.name} at once take about {need / 1e9:.0f} GB of memory,"
            f" and there are {min(known) / 1e9:.1f} GB",
            expected="sides that fit beside each other",
            fix="Measure fewer in one run, with --peers, or without the A/A pair: --references yardstick",
        )


def weights_of(package: Package) -> int:
    """Bytes of the weights that draw a picture, at the width of the arithmetic."""
    return sum(engine_bytes(package, net) for net in {*NETS, *TEXT_ENCODERS} & package.manifest.nets.keys())


def measure_latency(
    package: Package,
    sides: Sides,
    cases: Sequence[Case],
    *,
    workloads: Sequence[str] = WORKLOADS,
    pace: Pace,
    progress: Progress = silent,
) -> Document:
    """Rows of every case, workload and side, which take turns (`rounds.py`).

    A peer whose output differs from ours has a row that FAILED, and no time in it.

    Raises:
        SideError: ours cannot be opened.
    """
    with ExitStack() as stack:
        opened, rows = sides.open(stack, progress)
        for case in cases:
            for workload in workloads:
                bench = Bench(package=package, sides=sides, workload=workload, case=case, progress=progress)
                rows += bench.measure(opened, pace)
    return document_of("latency", package, sides.task, rows, {"peers": sides.peers, "workloads": workloads})


def document_of(
    verb: str, package: Package, task: Task, rows: Iterable[Row], settings: Mapping[str, Any] | None = None
) -> Document:
    """The document of a verb: its rows, the package, and how sides were opened."""
    opened = {"backend": task.backend, "threads": task.threads, "device": task.device}
    return Document(
        benchmark=verb,
        model=describe_model(package),
        settings={**(settings or {}), **opened},
        rows=tuple(rows),
    )


def describe_model(package: Package) -> dict[str, Any]:
    """What a document says of the package."""
    manifest = package.manifest
    files = {name for net in manifest.nets.values() for name in net.weights}
    weights = {name: package.path(name).stat().st_size for name in sorted(files)}
    facts = {"name": manifest.name, "family": manifest.family, "dtype": manifest.dtype}
    facts |= {"format": manifest.quantised["format"]} if manifest.quantised else {}
    return {**facts, "weights_bytes": weights}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One workload of one case: sides are prepared and compared one by one, then timed in turns."""

    package: Package
    sides: Sides
    workload: str
    case: Case
    progress: Progress

    def measure(self, opened: Sequence[SideProcess], pace: Pace) -> list[Row]:
        """A row for each side, and for each ceiling."""
        ready: dict[Slot, dict[str, Any]] = {}
        rows: list[Row] = []
        wanted: Mapping[str, Array] | None = None
        for slot in self._slots(opened):
            self.progress(f"{self.workload}: {slot.name} gets ready")
            try:
                seconds, outputs = slot.prepare()
                alike = {} if slot.name == OURS or not outputs else self._check(outputs, wanted)
            except SideError as error:
                rows.append(self._row(slot, Turns(status=error.status, reason=error.reason), {}))
                continue
            wanted = outputs if slot.name == OURS else wanted
            ready[slot] = {"first_s": seconds, **alike}
        first = {slot.name: float(figures["first_s"]) for slot, figures in ready.items()}
        beside = list(self._beside(list(ready), first))
        about = f"{self.workload} {self.case.width}x{self.case.height} b{self.case.pictures}"
        turns = interleave(
            [*ready, *beside], first, pace, said=lambda line: self.progress(f"{about}: {line}")
        )
        rows += [self._row(slot, turns[slot.name], figures) for slot, figures in ready.items()]
        rows = with_roofline(rows, workload_parts(self.package, self.workload, self.case))
        return rows + [_over_yardstick(slot, turns[slot.name]) for slot in beside]

    def _slots(self, opened: Sequence[SideProcess]) -> Iterator[Slot]:
        for side in opened:
            if side.name != CEILING:
                yield Slot(side=side, slot=side.name, workload=self.workload, case=self.case)
            elif self.workload in (*ENGINE_STAGES, "picture"):  # what no net takes part in has no ceiling
                for name in (GEMM, COPY):
                    yield Slot(side=side, slot=f"{CEILING} {name}", workload=name, case=self.case)

    def _beside(self, ready: Sequence[Slot], first: dict[str, float]) -> Iterator[Slot]:
        """Our short runs with the yardstick, whose first seconds are added to `first`."""
        if YARDSTICK not in self.sides.references or self.sides.task.device != "cpu":
            return
        for slot in ready:
            if slot.name in (OURS, AGAIN) and first[slot.name] < SHORT:
                self.progress(f"{self.workload}: {slot.name} gets its yardstick")
                seconds, _ = replace(slot, slot=YARDSTICK, workload=YARDSTICK).prepare()
                found = replace(slot, beside=True)
                first[found.name] = first[slot.name] + seconds
                yield found

    def _check(self, found: Mapping[str, Array], wanted: Mapping[str, Array] | None) -> dict[str, float]:
        if wanted is None:
            raise SideError("not available", "ours failed: there is nothing to compare with")
        return check(found, wanted, self.package)

    def _row(self, slot: Slot, turns: Turns, figures: Mapping[str, Any]) -> Row:
        during = {"during": self.workload} if slot.side.name == CEILING else {}
        return slot.row(turns, {**during, **figures, **medians(turns, self.case.steps)})


def _over_yardstick(slot: Slot, turns: Turns) -> Row:
    """What each run took over what the yardstick's next to it did."""
    figures = iter(turns.figures)
    pairs = [[next(figures) for _ in turn] for turn in turns.rounds]
    seconds = [pair["beside_s"] for turn in pairs for pair in turn]
    return replace(
        slot.row(turns, {"of": slot.side.name, "yardstick_p50_s": median(seconds) if seconds else None}),
        side=YARDSTICK,
        unit="1",
        rounds=tuple(tuple(pair["own_s"] / pair["beside_s"] for pair in turn) for turn in pairs),
    )


def worst_output(
    found: Mapping[str, Array], wanted: Mapping[str, Array], *, net_bar: float, picture_bar: float
) -> tuple[str, dict[str, float], str]:
    """The output that is the furthest from the `wanted` one: name, `difference`, and what is wrong with it.

    The bar of a picture is the least dB that the worst of a batch may have, a net's the most relative L2.
    """
    judged: list[tuple[str, dict[str, float], str]] = []
    for name, array in wanted.items():
        other = found.get(name, array[:0])
        figures = difference(name, other, array)
        value = figures["relative_l2"]
        problem = "" if value <= net_bar else f"relative L2 {value:.2e}, above {net_bar:g}"
        if array.dtype == np.uint8:  # (N, H, W, 3)
            figures["psnr_db"] = psnr(other, array)
            problem = (
                ""
                if figures["psnr_db"] >= picture_bar
                else f"{figures['psnr_db']:.1f} dB, below {picture_bar:g}"
            )
        judged.append((name, figures, problem))
    return max(judged, key=lambda item: item[1]["relative_l2"])


def check(found: Mapping[str, Array], wanted: Mapping[str, Array], package: Package) -> dict[str, float]:
    """How like ours a peer's outputs are, the worst of them. Raises SideError beyond the bar."""
    shared = {name: array for name, array in wanted.items() if name in found}
    if not shared:
        return {}
    dtype = package.manifest.dtype
    name, figures, problem = worst_output(
        found, shared, net_bar=NET_RELATIVE_L2[dtype], picture_bar=PICTURE_DB[dtype]
    )
    if problem:
        raise SideError("FAILED", f"{name} is not ours: {problem}")
    return figures


def medians(turns: Turns, steps: int) -> dict[str, Any]:
    """Medians of the runs' figures: the device's own seconds, the stages', and what no net took."""
    samples = [seconds for turn in turns.rounds for seconds in turn]
    one = turns.figures[0] if turns.figures else {}
    clocks = ("device", "host")
    ours = ("stages_s", *(f"{clock}_s" for clock in clocks))
    known = {name: value for name, value in one.items() if name not in ours}
    for clock in clocks:
        if times := [item[f"{clock}_s"] for item in turns.figures if f"{clock}_s" in item]:
            known[f"{clock}_p50_s"] = median(times)
    stages = [item["stages_s"] for item in turns.figures if "stages_s" in item]
    if not stages:
        return known
    known["stages_p50_s"] = {name: median(item.get(name, 0.0) for item in stages) for name in stages[0]}
    if set(ENGINE_STAGES) <= set(stages[0]):
        outside = [
            seconds - sum(item[name] for name in ENGINE_STAGES)
            for seconds, item in zip(samples, stages, strict=True)
        ]
        shares = [own / seconds for own, seconds in zip(outside, samples, strict=True)]
        known |= {"non_engine_share": median(shares), "non_engine_s_per_step": median(outside) / steps}
    return known
