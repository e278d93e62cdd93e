"""Our pipeline in a process that says when its stages begin.

    python -m latentrt.benchmarks.verbs.memory_timeline TASK CASE       (JSON of `Task` and `Case`)

Its first line is {"opened": seconds, "backend"}; then each line on stdin is a command (`answer`) and gets a
line back. The parent samples its memory (`memory_samples.py`); moments are `time.perf_counter()`.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tracemalloc
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.spec import DTYPES, output_shapes
from ...runtime.loop.clock import Clock
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import input_shapes
from ...runtime.loop.job import Job
from ...runtime.loop.open import LoopOptions
from ...runtime.pipeline import Pipeline
from ...runtime.request.request import make_request
from ..case import Case, rows_per_step
from ..opening import open_pipeline
from ..sides.contract import Task
from .memory_samples import resident

SETTLED = 5  # steps after which every buffer of the loop is there: no sampler remembers more than 5
BLOCKS = 10  # of the steps after that: a cache that fills once is in one of them, what grows is in most
REQUESTS = 4  # in all of which memory must grow before that is more than a library's cache
STEADY = 1.0  # bytes per step that are no growth; the smallest object, kept once in 10 steps, is 1.6
_LINES = 5  # of source that are named
_MINE = (tracemalloc.__file__, __file__)  # whose allocations are the measurement's own


class Marks(Clock):
    """A clock that remembers when each stage began."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Charge the block to `name`, and note the moment."""
        if name != "update":  # it begins with the unet's stage
            self.marks.append((name, perf_counter()))
        with super().stage(name):
            yield


def draw(pipe: Pipeline, case: Case) -> dict[str, Any]:
    """One picture, step by step: `began`, `ended`, and `marks`, [stage, moment] in order."""
    loop, clock = pipe._loop, Marks()  # pyright: ignore[reportPrivateUsage]
    began = perf_counter()
    *_, last = loop.steps(_job(pipe, case, clock), clock, None)
    with clock.stage("vae_decoder"):
        loop.decode(last.latent)
    return {"began": began, "ended": perf_counter(), "marks": clock.marks}


def watch_steps(pipe: Pipeline, case: Case) -> dict[str, Any]:
    """What the steps of a request leave behind: `watch_resident` and `watch_traced`, one after the other."""
    return {**watch_resident(pipe, case), **watch_traced(pipe, case)}


def watch_resident(pipe: Pipeline, case: Case) -> dict[str, Any]:
    """From outside of Python's allocations, over one request.

    Returns:
        resident: bytes of the process after every step; None where the system does not tell.
        device_allocations: calls of `Device.allocate` between the rows; None on the host.
    """
    rss = _numbers(len(_job(pipe, case).table))
    with _counted_allocations(pipe) as counts:
        for index in _rows(pipe, case):
            now = resident(os.getpid())
            rss[index] = now.rss if now else 0
        counted = list(counts)
    # The first row's allocations are those of the whole request: a step's are counted from the second on.
    between = [after - before for before, after in pairwise(counted)]
    return {
        "resident": rss.tolist() if all(rss) else None,
        "device_allocations": between if counted else None,
    }


def watch_traced(pipe: Pipeline, case: Case) -> dict[str, Any]:
    """Python's allocations, NumPy's among them, by tracemalloc, over a request that was drawn before.

    What a step keeps, it keeps in every request. A library that fills a cache of its own, some bytes with
    every call up to a bound, does not: a request in which memory grows is drawn again, `REQUESTS` times at
    most, and the last one counts.

    Returns:
        traced: bytes after every step.
        transient: for every step, the most that it held besides what was there after the step before it.
        requests: how many were watched.
        lines: if they grow (`growth_per_step`), where: [place, bytes], largest first.
    """
    steps = len(_job(pipe, case).table)
    traced, transient = _numbers(steps), _numbers(steps)
    gc.collect()
    gc.freeze()  # what was there before is not traced: to look at it after every step only takes time
    tracemalloc.start()
    try:
        # What was there before it was traced is replaced by what is, bit by bit: that looks like growth.
        for _ in _rows(pipe, case):
            gc.collect()
        requests = 0
        while not requests or (requests < REQUESTS and growth_per_step(traced) > STEADY):
            _trace_request(pipe, case, traced, transient)
            requests += 1
        lines = _grown(pipe, case, steps) if growth_per_step(traced) > STEADY else []
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    told = {"traced": traced.tolist(), "transient": transient.tolist()}
    return {**told, "requests": requests, "lines": lines}


def _trace_request(pipe: Pipeline, case: Case, traced: array[int], transient: array[int]) -> None:
    """Draw it, and note what is traced after every step, and the most within it."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for index in _rows(pipe, case):
        transient[index] = tracemalloc.get_traced_memory()[1] - before
        gc.collect()  # the interpreter's lists of free tuples and floats fill up to a bound: no growth
        traced[index] = before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()


def growth_per_step(traced: Sequence[int]) -> float:
    """Bytes that a step leaves behind, of the bytes after every step: the median from block to block.

    Of each of `BLOCKS` of the steps the least counts, as some buffers come and go with every other step. What
    is kept in every step, or once in every block, is in the median; what is kept once, however much, is in
    one difference: libraries fill a cache now and then.
    """
    settled = traced[min(SETTLED, len(traced) - 1) :]
    if len(settled) < 2:
        return 0.0
    blocks = min(BLOCKS, max(2, len(settled) // 2))
    edges = [round(number * len(settled) / blocks) for number in range(blocks + 1)]
    least = [(begin, min(settled[begin:end])) for begin, end in pairwise(edges)]
    return median_low((after - before) / (end - begin) for (begin, before), (end, after) in pairwise(least))


def _numbers(count: int) -> array[int]:
    """Written in place: what is noted is not to be taken for growth."""
    return array("q", bytes(8 * count))


def schedule_bytes(pipe: Pipeline, case: Case) -> int:
    """Of one step in what is computed once per request for all steps: the time embeddings."""
    spec = pipe.package.manifest.nets["unet_time"].spec
    rows = rows_per_step(case, pipe.package.manifest)
    shapes = output_shapes(spec, input_shapes(spec, {"S": rows}))
    return sum(math.prod(shapes[item.name]) * np.dtype(DTYPES[item.dtype]).itemsize for item in spec.outputs)


def _job(pipe: Pipeline, case: Case, clock: Clock | None = None) -> Job:
    request = make_request(pipe.package.manifest, case.prompt, **case.parameters)
    return pipe.prepare(request, clock)


def _rows(pipe: Pipeline, case: Case) -> Iterator[int]:
    """The index of every row, when it is done. Nothing of the state is kept here."""
    loop = pipe.loop
    for state in loop.steps(_job(pipe, case), Clock(), None):
        index = state.index
        del state
        yield index


def _grown(pipe: Pipeline, case: Case, steps: int) -> list[tuple[str, int]]:
    """Lines whose allocations grew between the settled steps and the last one."""
    snapshots: list[tracemalloc.Snapshot] = []
    for index in _rows(pipe, case):
        if index in (min(SETTLED, steps - 1), steps - 1):
            gc.collect()
            snapshots.append(tracemalloc.take_snapshot())
    # filtered only now, for that compiles patterns and keeps them
    mine = [tracemalloc.Filter(inclusive=False, filename_pattern=name) for name in _MINE]
    early, late = (snapshot.filter_traces(mine) for snapshot in snapshots)
    grown: list[tuple[str, int]] = []
    for item in late.compare_to(early, "lineno"):
        place = item.traceback[0]
        if item.size_diff > 0:
            grown.append((f"{'/'.join(Path(place.filename).parts[-2:])}:{place.lineno}", item.size_diff))
    return sorted(grown, key=lambda item: -item[1])[:_LINES]


@contextmanager
def _counted_allocations(pipe: Pipeline) -> Generator[list[int]]:
    """Of a device's loop, how many allocations there were at each synchronisation; empty on the host."""
    loop = pipe.loop
    counts: list[int] = []
    if not isinstance(loop, DeviceLoop):
        yield counts
        return
    device, calls = loop.device, 0
    allocate, synchronize = device.allocate, device.synchronize

    def counting(size: int) -> int:
        nonlocal calls
        calls += 1
        return allocate(size)

    def noting() -> None:
        synchronize()
        counts.append(calls)

    device.allocate, device.synchronize = counting, noting
    try:
        yield counts
    finally:
        device.allocate, device.synchronize = allocate, synchronize


# ── the process ────────────────────────────────────────────────────────────────────────────────────


def answer(pipe: Pipeline, case: Case, command: Mapping[str, Any]) -> dict[str, Any]:
    """Carry one command out; {"do": "draw" or "growth", "steps": of the request}."""
    verbs: Mapping[str, Callable[[Pipeline, Case], dict[str, Any]]] = {"draw": draw, "growth": watch_steps}
    told = verbs[command["do"]](pipe, replace(case, steps=command["steps"]))
    return {**told, "schedule_bytes": schedule_bytes(pipe, case)}


def main() -> None:
    """Open, then answer until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def reply(told: Mapping[str, Any]) -> None:
        replies.write(json.dumps(told) + "\n")
        replies.flush()

    task, case = Task.from_json(json.loads(sys.argv[1])), Case.from_json(json.loads(sys.argv[2]))
    began = perf_counter()
    options = LoopOptions(backend=task.backend, threads=task.threads)
    with open_pipeline(task.package, options) as pipe:
        reply({"opened": perf_counter() - began, "backend": pipe.backend})
        for line in sys.stdin:
            reply(answer(pipe, case, json.loads(line)))


if __name__ == "__main__":
    main()
