"""A process's memory as seen from outside, every few milliseconds: resident, and what it holds of a GPU."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import TypeVar

import numpy as np

from ...engines.cuda.facts import Nvml, available, facts
from ..machine import resident_bytes
from ..process import LIMIT, Child

_SETTLE = 0.2  # seconds that an empty context is watched for
_EMPTY = "print(flush=True); input()"
_CONTEXT = f"from latentrt.engines.cuda.facts import load_runtime; load_runtime().cudaFree(0); {_EMPTY}"

Sample = TypeVar("Sample")


@contextmanager
def sampled(read: Callable[[], Sample | None], interval: float) -> Generator[Sequence[tuple[float, Sample]]]:
    """What `read` answers every `interval` seconds while the block runs, and once more at its end.

    The sequence of (perf_counter, answer) grows; None is no sample. Raises what `read` raises, at the end.
    """
    samples: list[tuple[float, Sample]] = []
    stop = threading.Event()

    def watch() -> None:
        last = False
        while True:
            if (value := read()) is not None:
                samples.append((perf_counter(), value))
            if last:
                return
            last = stop.wait(interval)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield samples
        finally:
            stop.set()
        watching.result()


def on_a_grid(series: Sequence[tuple[float, int]], began: float, ended: float, interval: float) -> list[int]:
    """The most in each interval between two moments, what was so when it began included.

    A peak survives however long the intervals are. The series, of (perf_counter, bytes), must not be empty.
    """
    edges = began + interval * np.arange(max(1, math.ceil((ended - began) / interval)) + 1)
    places = np.searchsorted([moment for moment, _ in series], edges)  # of the first sample from there on
    sizes = [size for _, size in series]
    return [max(sizes[max(a - 1, 0) : max(b, 1)]) for a, b in pairwise(places.tolist())]


def measure_baselines(interval: float) -> tuple[Watch, int, int | None]:
    """What looks at the GPU; bytes of an empty interpreter and CUDA context, as `memory.Bench` has them."""
    watch = device_watch()
    with Child("-c", _EMPTY) as child:
        next(child.lines(LIMIT))
        interpreter, _ = resident_bytes(child.pid)
    if (before := watch()) is None:
        return watch, interpreter, None
    with sampled(watch, interval) as looks, Child("-c", _CONTEXT) as child:
        next(child.lines(LIMIT))
        time.sleep(_SETTLE)
        held, _ = holding(child.pid, before, [look for _, look in looks])
    return watch, interpreter, held[-1] if held else None


# ── a GPU ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Look:
    """What NVML says at one moment, in bytes: of each process it names, and of the device as a whole."""

    processes: Mapping[int, int]
    used: int | None


Watch = Callable[[], Look | None]


def look(nvml: Nvml) -> Look | None:
    """Now; None where NVML tells nothing."""
    memory, processes = nvml.memory(), nvml.processes()
    used = memory[1] - memory[0] if memory else None
    return Look(processes=processes, used=used) if processes or memory else None


def device_watch() -> Watch:
    """NVML's view of the first CUDA device; it is always None where there is none."""
    return (lambda: None) if available() else partial(look, Nvml(facts().uuid))


def holding(pid: int, before: Look, looks: Sequence[Look]) -> tuple[list[int], str]:
    """Bytes of a device that a process held at each look, and how that is known; empty if it cannot be.

    Known by "process", or by "device" where NVML does not name it (in a container): all that the device had
    in use, less what was in use before the process began.
    """
    named = [look.processes[pid] for look in looks if pid in look.processes]
    if named or before.used is None:
        return named, "process"
    used = [max(0, look.used - before.used) for look in looks if look.used is not None]
    return (used if any(used) else []), "device"
