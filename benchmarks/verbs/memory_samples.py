"""A process's memory as seen from outside, every few milliseconds: resident, and what it holds of a GPU.

Times are `time.perf_counter()`, which on Linux is one clock for all processes (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Generic, TypeVar

from ...engines.cuda.facts import Nvml, available, facts

PROC = Path("/proc")
INTERVAL = 0.005  # seconds
NO_PROC = "only Linux tells another process's resident memory (/proc)"

Sample = TypeVar("Sample")
Series = Sequence[tuple[float, int]]  # (perf_counter, bytes)


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Of one process now, in bytes.

    Attributes:
        rss: resident: `anonymous` and `file` (mapped files and shared memory, which others may share).
        peak: the most that ever was. The kernel's VmHWM, not getrusage's ru_maxrss: that begins with what
            the process was forked from, and a small child of a large parent tells the parent's.
        anonymous: its own.
        file: of mapped files.
    """

    rss: int
    peak: int
    anonymous: int
    file: int


def resident(pid: int) -> Resident | None:
    """Of that process; None if it ended, or where the system does not tell."""
    try:
        text = (PROC / str(pid) / "status").read_text(encoding="utf-8")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        sizes = {
            name: int(lines[name].split()[0]) * 1024
            for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem")
        }
    except KeyError:  # a process that has just ended has no memory
        return None
    return Resident(
        rss=sizes["VmRSS"],
        peak=max(sizes["VmHWM"], sizes["VmRSS"]),
        anonymous=sizes["RssAnon"],
        file=sizes["RssFile"] + sizes["RssShmem"],
    )


class Sampler(Generic[Sample]):
    """A thread that asks `read` every `interval` seconds while the block runs; None is no sample."""

    def __init__(self, read: Callable[[], Sample | None], interval: float = INTERVAL) -> None:
        self.samples: list[tuple[float, Sample]] = []
        self._read, self._interval = read, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampler[Sample]:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End, after a last look."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            value = self._read()
            if value is not None:
                self.samples.append((perf_counter(), value))
            if self._stop.wait(self._interval):
                value = self._read()
                if value is not None:
                    self.samples.append((perf_counter(), value))
                return


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
    found: list[int] = []
    for value in values:
        known = value if value is not None else known
        found.append(known)
    return tuple(found)


# ── a GPU ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Look:
    """What NVML says at one moment, in bytes: of each process it names, and of the device as a whole."""

    processes: Mapping[int, int]
    used: int | None


@dataclass(frozen=True, kw_only=True)
class Holding:
    """How much of a device a process held. `measured_by`: "process", or "device" where NVML does not name it
    (in a container): all that the device had in use, less what was in use before the process began."""

    series: Series = field(default_factory=tuple[tuple[float, int], ...])
    measured_by: str = ""

    @property
    def now(self) -> int:
        """Last."""
        return self.series[-1][1]

    @property
    def peak(self) -> int:
        """Most."""
        return max(size for _, size in self.series)


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


def holding(pid: int, before: Look, looks: Iterable[tuple[float, Look]]) -> Holding | None:
    """What a process held; None if it never held anything that can be told."""
    taken = list(looks)
    named = [(moment, look.processes[pid]) for moment, look in taken if pid in look.processes]
    if named:
        return Holding(series=tuple(named), measured_by="process")
    if before.used is None:
        return None
    used = [(moment, max(0, look.used - before.used)) for moment, look in taken if look.used is not None]
    return Holding(series=tuple(used), measured_by="device") if any(size for _, size in used) else None
