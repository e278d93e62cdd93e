"""`latentrt bench cold-start`: how long a fresh process takes to its first picture, and where the time goes.

Whole processes by the parent's clock, and the parts of the last one by its own (docs/benchmarks.md). Torch is
blocked, and files are in the system's cache: a round before the first is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

from ...engines.package import Package
from ..case import Case
from ..machine import clocks, describe_machine
from ..process import LIMIT, SideError, run
from ..records import Document, Row
from ..sides.contract import OURS, Task
from .latency import Progress, document_of, silent

REPEATS, QUICK_REPEATS = 7, 2
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
        pipe(text, output_type="np", **parameters)
        marks.append(perf_counter())
print(json.dumps({"marks": marks, "backend": pipe.backend}))
"""


def measure_cold_start(
    package: Package, task: Task, case: Case | None = None, *, repeats: int, progress: Progress = silent
) -> Document:
    """Rows of every process and part, one sample for each round; the order flips from round to round.

    `task` says backend and threads; without a `case` pictures are as the package wants them.
    """
    case = case or Case.of(package.manifest)
    opened = {"model": str(task.model), "backend": task.backend, "threads": task.threads}
    request = json.dumps([opened, case.prompt, case.parameters])
    processes = {
        "bare interpreter": ["-c", "pass"],
        "import numpy": ["-c", "import numpy"],
        "import latentrt.runtime": ["-c", f"{_BLOCKED}from latentrt.runtime import Pipeline"],  # loads it
        "--help": ["-m", "latentrt.cli", "--help"],
        WHOLE: ["-c", f"{_BLOCKED}{_DRAW}", request],
    }
    stamp = {**describe_machine(), **clocks()}
    rows = {name: [Row(side=OURS, workload=name, stamp=stamp)] for name in processes}
    rows[WHOLE] = [replace(rows[WHOLE][0], workload=name, case=case.to_json()) for name in (WHOLE, *PARTS)]
    for number in range(repeats + 1):
        progress(f"round {number} of {repeats}" if number else "a first round, not counted")
        for name in processes if number % 2 == 0 else reversed(processes):
            rows[name] = _start(rows[name], processes[name], counted=number > 0)
    found = [row for group in rows.values() for row in group]
    return document_of("cold-start", package, task, found, {"repeats": repeats})


def _start(rows: list[Row], arguments: Sequence[str], *, counted: bool) -> list[Row]:
    """The rows of a process and its parts with one more sample. One that failed is not started again."""
    if rows[0].status != "ok":
        return rows
    began = perf_counter()
    try:
        lines = run(arguments, limit=LIMIT)
    except SideError as error:
        return [replace(row, status="FAILED", reason=error.reason, rounds=()) for row in rows]
    seconds, side = [perf_counter() - began], dict[str, Any]()
    if len(rows) > 1:
        answer = json.loads(lines[-1])
        seconds += [after - before for before, after in pairwise(answer["marks"])]
        side = {"side": {"backend": answer["backend"]}}
    return [
        replace(row, rounds=(*row.rounds, (taken,)) if counted else (), stamp={**row.stamp, **side})
        for row, taken in zip(rows, seconds, strict=True)
    ]
