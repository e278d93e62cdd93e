"""The seam between nets and what executes them: what a backend can do, and the choice of one.

A `HostBackend` opens nets that are called with arrays, a `DeviceBackend` nets on a device (`device.py`).
`backends.py` has the table of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from .backends import BACKENDS
from .device import Device, DeviceNet, MemoryLedger
from .errors import BackendError
from .package import Package
from .spec import Array, NetSpec


class Net(Protocol):
    """A net that is called with arrays. A closed net cannot be called."""

    spec: NetSpec

    @property
    def memory(self) -> MemoryLedger:
        """What it holds now."""
        ...

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once. Inputs and outputs are named as in `spec`. Several threads may call at once."""
        ...

    def close(self) -> None:
        """Free everything. May be called twice."""
        ...


class Backend(Protocol):
    """What every backend offers."""

    def available(self) -> str | None:
        """None if nets can be opened here, else the reason why not. Never raises."""
        ...

    def describe(self) -> str:
        """Name, version and device, for people. Raises BackendError where `available` has a reason."""
        ...


@runtime_checkable
class HostBackend(Backend, Protocol):
    """A backend whose nets are called with arrays."""

    def open_net(self, package: Package, name: str, *, threads: int | None) -> Net:
        """Load one net of a package; `threads` is for one run, None is every processor."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose nets run on a device, driven by the device loop."""

    def open_device(self, package: Package, names: Sequence[str]) -> tuple[Device, Mapping[str, DeviceNet]]:
        """A device of the caller's own, and nets of the package on it.

        What a user should know of the engines that were found is logged.
        """
        ...


# A request that no engine covers is an error, so whoever has built engines names the backend.
_AUTO = tuple(row for row in BACKENDS.values() if row.builds == "layouts")


def choose_backend(name: str = "auto") -> tuple[str, Backend]:
    """The backend of that name, or with "auto" the best one that can run here.

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
    for row in _AUTO if name == "auto" else (BACKENDS[name],):
        backend: Backend = row.load()
        reason = backend.available()
        if reason is None:
            return row.name, backend
        reasons.append(f"{row.name}: {reason} ({row.install})")
    raise BackendError(
        f"no backend can run here: {'; '.join(reasons)}",
        expected="an installed backend",
        fix=f"Install one: {BACKENDS['onnxruntime' if name == 'auto' else name].install}.",
    )
