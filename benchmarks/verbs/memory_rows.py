"""Of `latentrt bench memory`: what rows have in common, and the empty processes they are compared with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...engines.package import Package
from ..case import Case
from ..machine import clocks, describe_machine
from ..process import SideError
from ..records import Row, Status
from ..sides.contract import OURS, Task
from .memory_samples import DeviceWatch, Look, Sampler, holding, resident

_SETTLE = 0.2  # seconds that an empty context is watched for
_EMPTY = "print(flush=True); input()"
_CONTEXT = f"from latentrt.engines.cuda.facts import load_runtime; load_runtime().cudaFree(0); {_EMPTY}"

Looks = Sequence[tuple[float, Look]]


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """In bytes: what an empty interpreter, and an empty CUDA context, hold.

    `interpreter` is None but on Linux, `context` without a GPU or where NVML does not tell.
    """

    interpreter: int | None
    context: int | None


def measure_baselines(watch: DeviceWatch | None, interval: float) -> Baselines:
    """Both, of processes that do nothing else."""
    with _empty(_EMPTY) as pid:
        found = resident(pid)
    context = _empty_context(watch, interval) if watch else None
    return Baselines(interpreter=found.rss if found else None, context=context)


def _empty_context(watch: DeviceWatch, interval: float) -> int | None:
    before = watch.look()
    with looking(watch, interval) as looks, _empty(_CONTEXT) as pid:
        time.sleep(_SETTLE)
        held = holding(pid, before, list(looks))
    return held.now if held else None


@contextmanager
def _empty(code: str) -> Generator[int]:
    """The number of a Python process that ran the code as far as it goes, and waits."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate("\n")


@contextmanager
def looking(watch: DeviceWatch | None, interval: float) -> Generator[Looks]:
    """What NVML says while the block runs; the sequence grows. Empty without a GPU."""
    if watch is None:
        yield []
        return
    with Sampler(watch.look, interval) as sampler:
        yield sampler.samples


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What rows are made with. `weights` is in bytes, at the width of the arithmetic."""

    package: Package
    task: Task
    case: Case
    baselines: Baselines
    weights: int
    watch: DeviceWatch | None
    interval: float

    def row(
        self,
        workload: str,
        rounds: Sequence[Sequence[float]] = (),
        figures: Mapping[str, Any] | None = None,
        *,
        side: str = OURS,
        status: Status = "ok",
        reason: str = "",
        stamp: Mapping[str, Any] | None = None,
    ) -> Row:
        """In bytes, and the most of them over those of the weights."""
        sizes = [size for turn in rounds for size in turn]
        ratio = {"weights": self.weights, "over_weights": max(sizes) / self.weights} if sizes else {}
        return Row(
            side=side,
            workload=workload,
            case=self.case.to_json(),
            unit="B",
            rounds=tuple(tuple(map(float, turn)) for turn in rounds),
            status=status,
            reason=reason,
            figures={**(figures or {}), **ratio},
            stamp={**describe_machine(), **clocks()} if stamp is None else stamp,
        )

    def missing(self, workload: str, reason: str, **named: Any) -> Row:
        """Of what cannot be measured here."""
        return self.row(workload, status="not available", reason=reason, **named)

    def attempt(self, workload: str, measure: Callable[[], Row]) -> Row:
        """The row, or that of why there is none."""
        try:
            return measure()
        except SideError as error:
            return self.row(workload, status=error.status, reason=error.reason)
