"""A process's memory as seen from outside, every few milliseconds: resident, and what it holds of a GPU."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from ...engines.cuda.facts import Nvml, available, facts
from ..process import LIMIT, Child

_SETTLE = 0.2  # seconds that an empty context is watched for
_EMPTY = "print(flush=True); input()"
_CONTEXT = f"from latentrt.engines.cuda.facts import load_runtime; load_runtime().cudaFree(0); {_EMPTY}"
_PROC = Path("/proc")

Sample = TypeVar("Sample")
Series = Sequence[tuple[float, int]]  # (perf_counter, bytes)


def resident(pid: int) -> tuple[int, int] | None:
    """Bytes of a process that are resident now, and the most that ever were; None if that is not known.

    The most is the kernel's VmHWM, not getrusage's ru_maxrss: that begins with what the process was forked
    from, and a small child of a large parent shows the parent's.
    """
    try:
        text = (_PROC / str(pid) / "status").read_text(encoding="utf-8")
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):  # a process that has just ended has no memory
        return None
    return now, max(now, peak)


@contextmanager
def sampled(read: Callable[[], Sample | None], interval: float) -> Generator[Sequence[tuple[float, Sample]]]:
    """What `read` answers every `interval` seconds while the block runs, and once more at its end.

    The sequence of (perf_counter, answer) grows; None is no sample.
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

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def on_a_grid(series: Series, began: float, ended: float, interval: float) -> tuple[int, ...]:
    """The most in each interval between two moments; one without a sample has that of the one before it.

    A peak survives however long the intervals are. Raises ValueError without any sample until `ended`.
    """
    values: list[int | None] = [None] * max(1, math.ceil((ended - began) / interval))
    before: int | None = None
    for moment, size in series:
        if moment < began:
            before = size
        elif moment < ended:
            place = min(int((moment - began) / interval), len(values) - 1)
            values[place] = max(size, values[place] or 0)
    known = before if before is not None else next((size for size in values if size is not None), None)
    if known is None:
        raise ValueError("no samples")
    filled: list[int] = []
    for value in values:
        known = value if value is not None else known
        filled.append(known)
    return tuple(filled)


def measure_baselines(watch: DeviceWatch | None, interval: float) -> tuple[int | None, int | None]:
    """Bytes of an empty interpreter and of an empty CUDA context, as `Bench` has them."""
    with Child("-c", _EMPTY) as child:
        next(child.lines(LIMIT))
        found = resident(child.pid)
    interpreter = found[0] if found else None
    if watch is None:
        return interpreter, None
    before = watch.look()
    with sampled(watch.look, interval) as looks, Child("-c", _CONTEXT) as child:
        next(child.lines(LIMIT))
        time.sleep(_SETTLE)
        held, _ = holding(child.pid, before, list(looks))
    return interpreter, held[-1][1] if held else None


# ── a GPU ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Look:
    """What NVML says at one moment, in bytes: of each process it names, and of the device as a whole."""

    processes: Mapping[int, int]
    used: int | None


class DeviceWatch:
    """NVML's view of the first CUDA device. Tests pass an `Nvml` of their own."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml

    @classmethod
    def open(cls) -> DeviceWatch | None:
        """None where there is no CUDA device, or NVML tells nothing of it."""
        if available():
            return None
        watch = cls(Nvml(facts().uuid))
        look = watch.look()
        return watch if look.processes or look.used is not None else None

    def look(self) -> Look:
        """Now."""
        memory = self._nvml.memory()
        return Look(processes=self._nvml.processes(), used=memory[1] - memory[0] if memory else None)


def holding(pid: int, before: Look, looks: Iterable[tuple[float, Look]]) -> tuple[Series, str]:
    """How much of a device a process held, and how that is known; empty if it cannot be known.

    Known by "process", or by "device" where NVML does not name it (in a container): all that the device had
    in use, less what was in use before the process began.
    """
    taken = list(looks)
    named = [(moment, look.processes[pid]) for moment, look in taken if pid in look.processes]
    if named or before.used is None:
        return named, "process"
    used = [(moment, max(0, look.used - before.used)) for moment, look in taken if look.used is not None]
    return (used if any(size for _, size in used) else []), "device"
