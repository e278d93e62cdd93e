"""Our pipeline as a side that watches itself: when its stages begin, and what its steps leave in memory.

    timeline            one picture; figures `began`, `ended`, and `marks`, [stage, moment] in order, by
                        `time.perf_counter()`, which on Linux is one clock for all processes
    growth per step     what the steps of a request leave behind (`watch_steps`)

Neither has outputs. `latentrt bench memory` opens it and samples its process from outside.
"""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from statistics import median_low
from time import perf_counter
from typing import Any

from ...engines.spec import Array
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.job import Clock, DenoiseJob
from ...runtime.pipeline import Pipeline
from ...runtime.request.request import make_request
from ..case import Case
from .contract import WATCHED, OpenSide, Task, Work
from .ours import available as available
from .ours import open_pipeline

TIMELINE, GROWTH = "timeline", "growth per step"  # workloads
SETTLED = 5  # steps after which every buffer of the loop is there: no sampler remembers more than 5
BLOCKS = 10  # of the steps after that: a cache that fills once is in one of them, what grows is in most
REQUESTS = 4  # in all of which memory must grow before that is more than a library's cache
STEADY = 1.0  # bytes per step that are no growth; the smallest object, kept once in 10 steps, is 1.6


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
    """One picture, step by step: the figures of "timeline"."""
    loop, clock = pipe.loop, Marks()
    began = perf_counter()
    *_, last = loop.steps(_job(pipe, case, clock), clock, None)
    with clock.stage("vae_decoder"):
        loop.decode(last.latent)
    return {"began": began, "ended": perf_counter(), "marks": clock.marks}


def watch_steps(pipe: Pipeline, case: Case) -> dict[str, Any]:
    """What the steps of a request leave behind: the figures of "growth per step".

    What a step keeps, it keeps in every request. A library that fills a cache of its own, some bytes with
    every call up to a bound, does not: a request in which memory grows is drawn again, `REQUESTS` times at
    most, and the last one counts.

    Returns:
        traced: bytes of Python's allocations, NumPy's among them, after every step (tracemalloc).
        requests: how many were watched.
        device_allocations: see that function.
    """
    between = device_allocations(pipe, case)
    traced = array("q", bytes(8 * len(_job(pipe, case).table)))  # written in place: notes are no growth
    gc.collect()
    gc.freeze()  # what was there before is not traced: to look at it after every step only takes time
    tracemalloc.start()
    try:
        # What was there before it was traced is replaced by what is, bit by bit: that looks like growth.
        for _ in _rows(pipe, case):
            gc.collect()
        requests = 0
        while not requests or (requests < REQUESTS and growth_per_step(traced) > STEADY):
            for index in _rows(pipe, case):
                gc.collect()  # the interpreter's lists of free tuples fill up to a bound: no growth
                traced[index] = tracemalloc.get_traced_memory()[0]
            requests += 1
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    return {"traced": traced.tolist(), "requests": requests, "device_allocations": between}


def growth_per_step(traced: Sequence[int]) -> float:
    """Bytes that a step leaves behind, from the bytes after every step: the median from block to block.

    The steps are cut into `BLOCKS` blocks, and the least of each block counts, as some buffers come and go
    with every other step. What is kept in every step, or once in every block, is in the median; what is kept
    once, however much, is in one difference: libraries fill a cache now and then.
    """
    settled = traced[min(SETTLED, len(traced) - 1) :]
    if len(settled) < 2:
        return 0.0
    blocks = min(BLOCKS, max(2, len(settled) // 2))
    edges = [round(number * len(settled) / blocks) for number in range(blocks + 1)]
    least = [(begin, min(settled[begin:end])) for begin, end in pairwise(edges)]
    return median_low((after - before) / (end - begin) for (begin, before), (end, after) in pairwise(least))


def _job(pipe: Pipeline, case: Case, clock: Clock | None = None) -> DenoiseJob:
    return pipe.prepare(make_request(pipe.package.manifest, case.prompt, **case.parameters), clock)


def _rows(pipe: Pipeline, case: Case) -> Iterator[int]:
    """The index of every row, when it is done. Nothing of the state is kept here."""
    for state in pipe.loop.steps(_job(pipe, case), Clock(), None):
        index = state.index
        del state
        yield index


def device_allocations(pipe: Pipeline, case: Case) -> list[int] | None:
    """Calls of `Device.allocate` between the rows of a request that was prepared before; None on the host."""
    loop = pipe.loop
    if not isinstance(loop, DeviceLoop):
        return None
    _job(pipe, case)
    counts: list[int] = []  # of allocations so far, at each synchronisation
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
        for _ in _rows(pipe, case):
            pass
        # The first row's allocations are those of the whole request: a step's are counted from the second on.
        return [after - before for before, after in pairwise(counts)]
    finally:
        device.allocate, device.synchronize = allocate, synchronize


# ── the side ───────────────────────────────────────────────────────────────────────────────────────


def open_side(task: Task) -> OpenSide:
    """The pipeline, with the loop that a user has."""
    pipe = open_pipeline(task)

    def make(watch: Callable[[Pipeline, Case], dict[str, Any]], case: Case, stack: ExitStack) -> Work:
        seen: dict[str, Any] = {}

        def call() -> Mapping[str, Array]:
            seen.update(watch(pipe, case))
            return {}

        return Work(call=call, figures=lambda: seen)

    resources = ExitStack()
    resources.callback(pipe.close)
    makers = {TIMELINE: partial(make, draw), GROWTH: partial(make, watch_steps)}
    return OpenSide(name=WATCHED, versions={"backend": pipe.backend}, makers=makers, resources=resources)
