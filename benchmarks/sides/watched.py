"""Our pipeline as a side that watches itself: when its stages begin, and what its steps leave in memory.

    timeline            one picture; figures `began`, by `time.perf_counter()`, which on Linux is one clock
                        for all processes, `seconds`, and `marks`: {stage, at_s since it began}, in order
    growth per step     what the steps of a request leave behind (`watch_steps`)

Both are done once, as they are prepared, and have no outputs. `latentrt bench memory` opens the side and
samples its process from outside.
"""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median_low
from time import perf_counter
from typing import Any

import numpy as np

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
REQUESTS = 12  # in all of which memory must grow before that is more than a library's cache; one in four does
STEADY = 1.0  # bytes per step that are no growth; the smallest object, kept once in 10 steps, is 1.6


class Marks(Clock):
    """A clock that remembers when each stage began."""

    def __init__(self) -> None:
        super().__init__()
        self.began = perf_counter()
        self.marks: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Charge the block to `name`, and note the moment."""
        if name != "update":  # it begins with the unet's stage
            self.marks.append({"stage": name, "at_s": perf_counter() - self.began})
        with super().stage(name):
            yield


def draw(pipe: Pipeline, case: Case) -> dict[str, Any]:
    """One picture, step by step: the figures of "timeline"."""
    clock = Marks()
    *_, last = pipe.loop.steps(_job(pipe, case, clock), clock, None)
    with clock.stage("vae_decoder"):
        pipe.loop.decode(last.latent)
    return {"began": clock.began, "seconds": perf_counter() - clock.began, "marks": clock.marks}


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
    settled = np.asarray(traced[min(SETTLED, len(traced) - 1) :])
    if len(settled) < 2:
        return 0.0
    blocks = np.array_split(settled, min(BLOCKS, max(2, len(settled) // 2)))
    least, lengths = [block.min() for block in blocks], [len(block) for block in blocks]
    return float(median_low(np.diff(least) / lengths[:-1]))


def _job(pipe: Pipeline, case: Case, clock: Clock | None = None) -> DenoiseJob:
    return pipe.prepare(make_request(pipe.package.manifest, case.prompt, **case.parameters), clock)


def _rows(pipe: Pipeline, case: Case) -> Iterator[int]:
    """The index of every row, when it is done. Nothing of the state is kept here."""
    for state in pipe.loop.steps(_job(pipe, case), Clock(), None):
        index = state.index
        del state
        yield index


def device_allocations(pipe: Pipeline, case: Case) -> int | None:
    """Calls of `Device.allocate` between the rows of a request that was prepared before; None on the host."""
    if not isinstance(pipe.loop, DeviceLoop):
        return None
    _job(pipe, case)
    device, calls = pipe.loop.device, 0
    allocate = device.allocate

    def counting(size: int) -> int:
        nonlocal calls
        calls += 1
        return allocate(size)

    device.allocate = counting
    try:
        # The first row's allocations are those of the whole request: a step's are counted from the second on.
        after_rows = [calls for _ in _rows(pipe, case)]
    finally:
        device.allocate = allocate
    return after_rows[-1] - after_rows[0]


# ── the side ───────────────────────────────────────────────────────────────────────────────────────


def open_side(task: Task) -> OpenSide:
    """The pipeline, with the loop that a user has."""
    pipe, resources = open_pipeline(task), ExitStack()
    resources.callback(pipe.close)
    makers = {TIMELINE: partial(_once, draw, pipe), GROWTH: partial(_once, watch_steps, pipe)}
    return OpenSide(name=WATCHED, versions={"backend": pipe.backend}, makers=makers, resources=resources)


def _once(
    watch: Callable[[Pipeline, Case], dict[str, Any]], pipe: Pipeline, case: Case, stack: ExitStack
) -> Work:
    seen = watch(pipe, case)
    return Work(call=dict[str, Array], figures=lambda: seen)
