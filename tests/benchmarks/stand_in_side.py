"""The demo model, and a side without a process: answers at once, and says how long it would have taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.sides.contract import YARDSTICK, Task
from latentrt.engines.package import Package
from latentrt.runtime.model import SHIPPED

PACKAGE = Package.open(SHIPPED["demo"])
TASK = Task(model=PACKAGE.root, threads=1)
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
