"""The seam between nets and what executes them: open, call with named arrays, close.

A backend is a module that satisfies `HostBackend` (its nets are called with arrays) or `DeviceBackend` (its
nets run on a device, see `device.py`). Nothing is imported before it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .errors import BackendError
from .package import Package
from .spec import Array, NetSpec

if TYPE_CHECKING:
    from .device import Device, DeviceNet

# The module that implements each, and the command that installs it.
BACKENDS: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime.backend", 'pip install "latentrt[cpu]"'),
    "tensorrt": ("tensorrt.backend", 'pip install "latentrt[tensorrt]"'),
    "tensorrt-rtx": ("tensorrt.rtx_backend", 'pip install "latentrt[tensorrt-rtx]"'),
    "onnxruntime-cuda": ("onnxruntime.cuda_backend", 'pip install "latentrt[cuda]"'),
}
# What "auto" chooses from, best first. Not TensorRT: its engines must have been built for the request.
_AUTO = ("onnxruntime-cuda", "onnxruntime")


Log = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Where remarks go unless the caller has a place for them."""
    print(f"latentrt: {line}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class MemoryLedger:
    """What one net holds, in bytes. Activations are None where the backend does not tell."""

    weights: int
    activations: int | None
    io: int


class Net(Protocol):
    """A callable net. Nothing is allocated before `__enter__`; a closed net cannot be called."""

    @property
    def spec(self) -> NetSpec:
        """Inputs and outputs."""
        ...

    @property
    def memory(self) -> MemoryLedger:
        """What it holds now."""
        ...

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once. Inputs and outputs are named as in `spec`. Safe to call from several threads."""
        ...

    def close(self) -> None:
        """Free everything. May be called twice."""
        ...

    def __enter__(self) -> Net:
        """The net itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        ...


class Backend(Protocol):
    """What every backend's module offers."""

    def available(self) -> str | None:
        """None if nets can be opened here, else the reason why not."""
        ...

    def describe(self) -> str:
        """Name, version and device, for people."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose nets run on a device, driven by the device loop."""

    def open_device(
        self, package: Package, names: Sequence[str], *, log: Log
    ) -> tuple[Device, Mapping[str, DeviceNet]]:
        """A device of its own for the caller, and nets of the package on it.

        `log` is told what a user should know of the engines that were found, in a line each.
        """
        ...


@runtime_checkable
class HostBackend(Backend, Protocol):
    """A backend whose nets are called with arrays."""

    def open_net(self, package: Package, name: str, *, threads: int | None) -> Net:
        """Load one net of a package."""
        ...


def choose_backend(name: str = "auto") -> tuple[str, Backend]:
    """The backend of that name, or with "auto" the best one that is present.

    Raises:
        BackendError: an unknown name, or nothing of that name can run here.
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}",
            expected=f"auto, {', '.join(BACKENDS)}",
            fix="Choose one of these: --backend auto.",
        )
    reasons: list[str] = []
    for candidate in _AUTO if name == "auto" else (name,):
        module, install = BACKENDS[candidate]
        backend: Backend = import_module(f".{module}", __package__)  # pyright: ignore[reportAssignmentType]
        reason = backend.available()
        if reason is None:
            return candidate, backend
        reasons.append(f"{candidate}: {reason} ({install})")
    raise BackendError(
        f"no backend can run here: {'; '.join(reasons)}",
        expected="an installed backend",
        fix=f"Install one: {BACKENDS['onnxruntime' if name == 'auto' else name][1]}.",
    )
