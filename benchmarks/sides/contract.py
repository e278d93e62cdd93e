"""The seam between a benchmark and whom it measures: open, prepare a workload, run it, look at the outputs.

A side is a module with `available` and `open_side`; it runs in a process of its own (`child.py`). Its library
is imported by `open_side`, not before.

    workload       outputs, the same from every side
    text_encoder   context (P, T, D) float
    invariants     none: what a side computes once per prompt and schedule; only ours has it
    unet           prediction (B, C, H/8, W/8) float, before guidance
    update         latent (N, C, H/8, W/8) float after several steps: everything of a step of the loop but the
                   UNet, and on the host but all nets; only ours has it
    vae_decoder    image (N, H, W, 3) uint8
    picture        image (N, H, W, 3) uint8, in the host's memory
    gemm, copy     none; what the machine can do at best (`ceiling`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ...engines.errors import BackendError, UsageError
from ...engines.spec import Array
from ..case import Case

# The module that implements each. "latentrt" is measured twice where it stands against itself.
SIDES: Mapping[str, str] = {
    "latentrt": "ours",
    "diffusers": "diffusers_eager",
    "diffusers-compile": "diffusers_compiled",
    "onnxruntime": "onnxruntime_loop",
    "onnxruntime-cuda": "onnxruntime_cuda_loop",
    "openvino": "openvino_loop",
    "tensorrt": "tensorrt_loop",
    "ceiling": "ceiling",
    "latentrt watched": "watched",
}
OURS = "latentrt"
WATCHED = "latentrt watched"  # ours, while it watches its own memory; no peer
AGAIN = "latentrt again"  # the other half of the A/A pair
CEILING = "ceiling"  # what the machine can do at best
YARDSTICK = "yardstick"  # ours over a network that is always the same, see `yardstick.py`
REFERENCES = (AGAIN, YARDSTICK, CEILING)  # sides of rows that are no peers'


class NotAvailableError(BackendError):
    """A side does not have this workload, or cannot run here: no failure, but no time either."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a side opens.

    Attributes:
        package: an exported package's folder.
        checkpoint: the diffusers folder it was exported from; None where only the package is at hand.
        threads: of a CPU; None is every processor this process may use.
        backend: which of latentrt's own (`engines.backend.BACKENDS`, or "auto").
        device: "cpu" or "cuda", of the peers that can do both.
        slow_down: what latentrt's own runs are made to take longer by, 0.1 is 10 %: to see whether a
            comparison finds it.
    """

    package: Path
    checkpoint: Path | None = None
    threads: int | None = None
    backend: str = "auto"
    device: str = "cpu"
    slow_down: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the child."""
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        return {**vars(self), "package": str(self.package), "checkpoint": checkpoint}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The reverse of `to_json`."""
        values: dict[str, Any] = dict(data)
        values["package"] = Path(values["package"])
        values["checkpoint"] = Path(values["checkpoint"]) if values["checkpoint"] else None
        return cls(**values)


class Prepared(Protocol):
    """A workload with its inputs in place, ready to be timed."""

    def run(self) -> None:
        """Once; returns when the results are there (of `picture`: as pixels in the host's memory)."""
        ...

    def outputs(self) -> Mapping[str, Array]:
        """Of the last run, by the names above."""
        ...

    def figures(self) -> Mapping[str, Any]:
        """Of the last run: `device_s` by the device's own events, `stages_s` by name; empty where unknown."""
        ...


@runtime_checkable
class Repeated(Protocol):
    """What a `Prepared` is besides if one run does the workload several times."""

    @property
    def repeats(self) -> int:
        """How often. Figures are of one of them, and so are the seconds that are reported."""
        ...


@runtime_checkable
class Held(Protocol):
    """What a `Prepared` is besides if it holds memory of a device."""

    def close(self) -> None:
        """Free it, once nobody runs it any more. May be called twice."""
        ...


class OpenSide(Protocol):
    """A side with its nets loaded."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the libraries that do the work, and what they run on."""
        ...

    def prepare(self, workload: str, case: Case) -> Prepared:
        """Raises NotAvailableError for a workload this side does not have."""
        ...

    def memory(self) -> Mapping[str, Any]:
        """What it knows of its own memory, in bytes: a ledger, an allocator's peak; may be empty."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Side(Protocol):
    """What a module of this folder offers."""

    def available(self, task: Task) -> str | None:
        """None if it can run here, else the reason: a library or a checkpoint that is missing."""
        ...

    def open_side(self, task: Task) -> OpenSide:
        """Load every net. Raises NotAvailableError or LatentrtError."""
        ...


def side(name: str) -> Side:
    """The side of that name; nothing of its library is imported yet. Raises UsageError for another name."""
    if name not in SIDES:
        raise UsageError(
            f"unknown side {name!r}",
            expected=", ".join(SIDES),
            fix=f"Choose of these: --peers {list(SIDES)[1]}.",
        )
    found: Side = import_module(f".{SIDES[name]}", __package__)  # pyright: ignore[reportAssignmentType]
    return found


def not_available(name: str, workload: str) -> NotAvailableError:
    """The error of a side that does not have a workload."""
    return NotAvailableError(
        f"{name} has no workload {workload!r}",
        expected="another workload",
        fix=f"Leave {name} out, or choose other workloads.",
    )
