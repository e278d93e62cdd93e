"""`latentrt bench cold-start`: how long a fresh process takes to its first picture, and where the time goes.

Two views of it. Whole processes, by the parent's clock, beside a bare interpreter and one that imports NumPy:

    bare interpreter, import numpy, import latentrt.runtime, --help, whole process

and the parts of the last one, by its own clock:

    import          of latentrt.runtime
    open            manifest, checks of the graphs' paths, and tokenizer
    deserialise     the backend's library, and every net
    first picture   what is allocated, or compiled, on first use included
    second picture

Torch is blocked, and files are in the system's cache: a round before the first is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

from ...engines.package import Package
from ..case import Case
from ..machine import clocks, describe_machine
from ..process import SideError, run
from ..records import Document, Row
from ..sides.contract import OURS, Task
from .latency import Progress, describe_model, silent

REPEATS, QUICK_REPEATS = 7, 2
# Seconds, of medians: what the README promises.
BARS: Mapping[str, float] = {"import latentrt.runtime": 0.4, "--help": 0.2}
PARTS = ("import", "open", "deserialise", "first picture", "second picture")
WHOLE = "whole process"
_BLOCKED = "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None)\n"
_DRAW = """
import json
from time import perf_counter
task, prompt, parameters = json.loads(sys.argv[1])
marks = [perf_counter()]
from latentrt.runtime import Pipeline
marks.append(perf_counter())
from latentrt.runtime import pipeline
open_loop = pipeline.open_loop
def opening(*arguments):
    marks.append(perf_counter())
    return open_loop(*arguments)
pipeline.open_loop = opening
with Pipeline.open(**task) as pipe:
    marks.append(perf_counter())
    for text in (prompt, prompt + " again"):  # encoded prompts are cached
        pipe(text, **parameters)
        marks.append(perf_counter())
print(json.dumps({"marks": marks, "backend": pipe.backend}))
"""
_LIMIT = 900.0  # seconds for a process


@dataclass(kw_only=True)
class _Variant:
    """A process that is started over and over, and what was found: samples by workload."""

    arguments: list[str]
    workloads: tuple[str, ...]
    case: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rounds: list[tuple[float, ...]] = field(default_factory=list[tuple[float, ...]])
    backend: str = ""
    reason: str = ""

    def start(self, *, counted: bool) -> None:
        """Once, until it ends. One that failed is not started again."""
        if self.reason:
            return
        began = perf_counter()
        try:
            lines = run(self.arguments, limit=_LIMIT)
        except SideError as error:
            self.reason = error.reason
            return
        seconds = [perf_counter() - began]
        if len(self.workloads) > 1:
            answer = json.loads(lines[-1])
            self.backend, marks = answer["backend"], answer["marks"]
            seconds += [after - before for before, after in pairwise(marks)]
        if counted:
            self.rounds.append(tuple(seconds))

    def rows(self, machine: Mapping[str, Any]) -> list[Row]:
        """One for each workload."""
        stamp = {**machine, **({"side": {"backend": self.backend}} if self.backend else {})}
        rows: list[Row] = []
        for index, workload in enumerate(self.workloads):
            row = Row(side=OURS, workload=workload, case=self.case, stamp=stamp)
            if self.reason:
                row = replace(row, status="FAILED", reason=self.reason)
            else:
                row = replace(row, rounds=tuple((turn[index],) for turn in self.rounds))
            if row.rounds and workload in BARS:
                bar = BARS[workload]
                row = replace(row, figures={"bar_s": bar, "met": row.summary["p50"] < bar})
            rows.append(row)
        return rows


def measure_cold_start(
    package: Package,
    task: Task,
    case: Case | None = None,
    *,
    repeats: int = REPEATS,
    progress: Progress = silent,
) -> Document:
    """Rows of every process and part, one sample for each round; the order flips from round to round.

    `task` says backend and threads; without a `case` pictures are as the package wants them.
    """
    case = case or Case.of(package.manifest)
    variants = _variants(package, task, case)
    for number in range(repeats + 1):
        progress(f"round {number} of {repeats}" if number else "a first round, not counted")
        for variant in variants if number % 2 == 0 else reversed(variants):
            variant.start(counted=number > 0)
    machine = {**describe_machine(), **clocks()}
    return Document(
        benchmark="cold-start",
        model=describe_model(package),
        settings={"repeats": repeats, "backend": task.backend, "threads": task.threads},
        rows=tuple(row for variant in variants for row in variant.rows(machine)),
    )


def _variants(package: Package, task: Task, case: Case) -> list[_Variant]:
    opened = {"model": str(package.root), "backend": task.backend, "threads": task.threads}
    request = json.dumps([opened, case.prompt, case.parameters])
    return [
        _Variant(workloads=("bare interpreter",), arguments=["-c", "pass"]),
        _Variant(workloads=("import numpy",), arguments=["-c", "import numpy"]),
        _Variant(
            workloads=("import latentrt.runtime",),
            arguments=["-c", f"{_BLOCKED}from latentrt.runtime import Pipeline"],  # loaded when asked for
        ),
        _Variant(workloads=("--help",), arguments=["-m", "latentrt.cli", "--help"]),
        _Variant(
            workloads=(WHOLE, *PARTS), arguments=["-c", f"{_BLOCKED}{_DRAW}", request], case=case.to_json()
        ),
    ]
