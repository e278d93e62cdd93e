"""The seam between nets and what executes them: what a backend can do, and the choice of one.

A `HostBackend` opens nets that are called with arrays, a `DeviceBackend` nets on a device (`device.py`).
`backends.py` has the table of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
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

    def refusal(self) -> BackendError | None:
        """None if nets can be opened here, else the error that says why not. Never raises."""
        ...

    def describe(self) -> str:
        """Name, version and device, for people. Raises BackendError where `refusal` has an error."""
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


_LOG = logging.getLogger(__name__)

# A request that no engine covers is an error, so whoever has built engines names the backend.
_AUTO = tuple(row for row in BACKENDS.values() if row.builds == "layouts")


def choose_backend(
    name: str = "auto", failed: Mapping[str, BackendError] = MappingProxyType({})
) -> tuple[str, Backend]:
    """The backend of that name, or with "auto" the best one that can run here and is not among `failed`.

    What "auto" takes is logged, with the reasons against the better ones.

    Raises:
        BackendError: an unknown name, or nothing of that name can run here.
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}",
            expected=f"auto, {', '.join(BACKENDS)}",
            fix="Let it be chosen: --backend auto",
        )
    if name != "auto":
        backend: Backend = BACKENDS[name].load()
        if (refused := backend.refusal()) is None:
            return name, backend
        raise BackendError(
            f"the backend {name} cannot run here: {refused.found}", expected=refused.expected, fix=refused.fix
        )
    refusals = dict[str, BackendError]()
    for row in _AUTO:
        backend = row.load()
        if (refused := failed.get(row.name) or backend.refusal()) is None:
            reasons = "".join(f"; not {better}: {why.found}" for better, why in refusals.items())
            _LOG.info("auto takes %s: %s%s", row.name, backend.describe(), reasons)
            return row.name, backend
        refusals[row.name] = refused
    last = refusals[_AUTO[-1].name]  # the one that runs on every machine
    raise BackendError(
        "no backend can run here: " + "; ".join(f"{name}: {why.found}" for name, why in refusals.items()),
        expected=last.expected,
        fix=last.fix,
    )
