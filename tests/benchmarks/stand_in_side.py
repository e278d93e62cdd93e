"""The demo model, and a side without a process: answers at once, and says how long it would have taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.sides.contract import YARDSTICK, Task
from latentrt.benchmarks.verbs import additions, controls
from latentrt.engines.package import Package
from latentrt.runtime.model import SHIPPED

PACKAGE = Package.open(SHIPPED["demo"])
TASK = Task(model=PACKAGE.root, threads=1)
WITH_CHECKPOINT = replace(TASK, checkpoint=PACKAGE.root.parent / "checkpoint", backend="onnxruntime")
QUICK = Pace(runs=2, rounds=1, budget=0, least=1, warm_up=0)
CASE = Case(width=64, height=64, guidance_scale=3.0, steps=2)
Outputs = Mapping[str, np.ndarray]


def row_of(document: Document, workload: str) -> Row:
    """The only row of a workload."""
    (row,) = document.select(workload)
    return row


@dataclass
class StandInSide:
    """`seconds` of a workload and case; `outputs` of any; `figures` of each run; memory for `most` pictures.

    The yardstick takes 2 ms.
    """

    name: str
    seconds: Callable[[str, Case], float]
    outputs: Outputs = field(default_factory=dict[str, np.ndarray])
    figures: Callable[[], dict[str, Any]] = dict[str, Any]
    error: SideError | None = None
    most: int = 100
    stamp: Mapping[str, Any] = field(default_factory=dict[str, Any])
    slots: dict[str, float] = field(default_factory=dict[str, float])

    def prepare(self, workload: str, case: Case, *, slot: str = "") -> tuple[dict[str, Any], Outputs]:
        if self.error is not None:
            raise self.error
        if case.pictures > self.most:
            raise SideError("FAILED", "out of memory")
        own = workload != YARDSTICK
        self.slots[slot] = self.seconds(workload, case) if own else 0.002
        return {"seconds": self.slots[slot], "figures": {}}, self.outputs if own else {}

    def time(
        self, runs: int, *, slot: str = "", beside: str | None = None
    ) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        own, other = self.slots[slot], self.slots[beside] if beside else 0.0
        pair = {"own_s": own, "beside_s": other} if beside else {}
        return (own + other,) * runs, [{**self.figures(), **pair} for _ in range(runs)]

    def __enter__(self) -> "StandInSide":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass
class MadeUp:
    """A process that says what it took, in place of `SideProcess`.

    `shades` of its pictures by workload, and `images` of one side's; `errors` by side, and workload or
    opening; `figures` by workload and number of openings; seconds of `stages` by slot, else 1.5 in the loop.
    """

    shades: Mapping[str, int] = field(default_factory=dict[str, int])
    figures: Callable[[str, int], dict[str, Any]] = lambda workload, opened: {}
    opened: list[str] = field(default_factory=list[str])
    images: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    errors: dict[tuple[str, str], SideError] = field(default_factory=dict[tuple[str, str], SideError])
    stages: dict[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    tasks: list[Task] = field(default_factory=list[Task])
    name: str = ""
    pid: int = 1
    stamp: Mapping[str, Any] = field(default_factory=lambda: {"side": {"version": "1"}})

    def take_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for verb in (additions, controls):
            monkeypatch.setattr(verb, "SideProcess", self)
        monkeypatch.setattr(additions, "resident_bytes", lambda pid: (1, 2_000_000))

    def __call__(self, name: str, module: str, task: Task) -> "MadeUp":
        self.tasks.append(task)
        self.opened.append(module)
        self._fail(name, f"open {self.opened.count(module)}")
        return replace(self, name=name)

    def _fail(self, name: str, what: str) -> None:
        if error := self.errors.get((name, what)):
            raise error

    def prepare(self, workload: str, case: Case, *, slot: str = "") -> tuple[dict[str, Any], Outputs]:
        self._fail(slot or self.name, workload)
        shade = self.images.get((slot or self.name, workload), self.shades.get(workload, 0))
        image = np.full((1, 8, 8, 3), shade, np.uint8)
        image[0, 0, 0] = 255
        return {"seconds": 0.1, "figures": self.figures(workload, len(self.opened))}, {"image": image}

    def time(
        self, runs: int, *, slot: str = "", beside: str | None = None
    ) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        usual = {"text_encoder": 9.0, "unet": 1.0, "update": 0.5, "vae_decoder": 9.0}
        return (19.5,) * runs, [{"stages_s": self.stages.get(slot, usual)}] * runs

    def __enter__(self) -> "MadeUp":
        return self

    def __exit__(self, *error: object) -> None:
        pass
