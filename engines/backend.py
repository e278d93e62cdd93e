"""The seam between nets and what executes them: what a backend can do, and the choice of one.

A `HostBackend` opens nets that are called with arrays, a `DeviceBackend` nets on a device (`device.py`).
`backends.py` has the table of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from .backends import BACKENDS, BackendRow
from .device import Device, DeviceNet, MemoryLedger
from .errors import BackendError, UsageError
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
    """A backend whose nets are called with arrays.

    One that makes a net anew for each number of rows says so by an attribute `fixed_shapes` that is true.
    """

    def open_net(self, package: Package, name: str, *, threads: int | None) -> Net:
        """Load one net of a package; `threads` is for one run, None is every processor."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose nets run on a device, driven by the device loop."""

    def describe(self, index: int = 0) -> str:
        """The same with the CUDA device of that index (as CUDA_VISIBLE_DEVICES numbers them)."""
        ...

    def open_device(
        self, package: Package, names: Sequence[str], *, index: int = 0
    ) -> tuple[Device, Mapping[str, DeviceNet]]:
        """A device of the caller's own, that of `index`, and nets of the package on it.

        What a user should know of the engines that were found is logged.
        """
        ...


@runtime_checkable
class AdaptingBackend(DeviceBackend, Protocol):
    """A backend that can open a net once more on a device, with other weights (`Package.changes`)."""

    def open_another(self, device: Device, package: Package, name: str) -> DeviceNet:
        """One net of a package on a device of `open_device`. Raises as that."""
        ...


_LOG = logging.getLogger(__name__)

# A request that no engine covers is an error, so whoever has built engines names the backend.
_AUTO = tuple(row for row in BACKENDS.values() if row.builds == "layouts")


@dataclass(frozen=True)
class Place:
    """Where nets are to run: on a device or not (None is both), and on which.

    `unit` is a device that only OpenVINO drives, by its name there ("GPU", "GPU.1", "NPU"); nets on it are
    called with arrays.
    """

    on_device: bool | None = None
    index: int = 0
    unit: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """From "auto", "cpu", "cuda", "cuda:1", or "openvino:GPU". Raises UsageError."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"device is {text!r}",
                expected="auto, cpu, cuda, cuda:N, or as openvino:GPU",
                fix="Leave device out.",
            )
        on_device = None if text == "auto" else text.startswith("cuda")
        return cls(on_device, int(match[1] or 0), match[2] or "")

    def allows(self, row: BackendRow) -> bool:
        """Whether a backend runs there."""
        return row.name == OF_UNITS if self.unit else self.on_device in (None, row.on_device)

    def load(self, row: BackendRow) -> Backend:
        """A backend that runs there."""
        return row.load().on(self.unit) if self.unit else row.load()

    def __str__(self) -> str:
        """As `parse` takes it."""
        if self.unit:
            return f"{OF_UNITS}:{self.unit}"
        return "auto" if self.on_device is None else "cuda" if self.on_device else "cpu"


ANYWHERE = Place()
OF_UNITS = "openvino"  # the backend of `Place.unit`
_PLACE = re.compile(r"auto|cpu|cuda(?::(\d{1,4}))?|openvino:([A-Z]{2,8}(?:\.\d{1,2})?)")


def choose_backend(
    name: str = "auto", failed: Mapping[str, BackendError] = MappingProxyType({}), place: Place = ANYWHERE
) -> tuple[str, Backend]:
    """`find_backend`; what "auto" takes is logged, with the reasons against the better ones."""
    found, backend, better = find_backend(name, failed, place)
    if name == "auto":
        reasons = "".join(f"; not {other}: {why.found}" for other, why in better.items())
        _LOG.info("auto takes %s: %s%s", found, backend.describe(), reasons)
    return found, backend


def find_backend(
    name: str = "auto", failed: Mapping[str, BackendError] = MappingProxyType({}), place: Place = ANYWHERE
) -> tuple[str, Backend, Mapping[str, BackendError]]:
    """The backend of that name, or with "auto" the best that can run at `place`, without those that `failed`.

    Returns:
        Its name, the backend, and what speaks against each better one.

    Raises:
        BackendError: an unknown name, or nothing of that name can run here.
        UsageError: the backend of that name runs elsewhere.
    """
    check_backend(name, place)
    if name != "auto":
        backend = place.load(BACKENDS[name])
        if (refused := backend.refusal()) is None:
            return name, backend, {}
        raise BackendError(
            f"the backend {name} cannot run here: {refused.found}", expected=refused.expected, fix=refused.fix
        )
    refusals = dict[str, BackendError]()
    rows = [row for row in _AUTO if place.allows(row)] or [BACKENDS[OF_UNITS]]
    for row in rows:
        backend = place.load(row)
        if (refused := failed.get(row.name) or backend.refusal()) is None:
            return row.name, backend, refusals
        refusals[row.name] = refused
    last = refusals[rows[-1].name]  # without a place the one that runs on every machine
    raise BackendError(
        "no backend can run here: " + "; ".join(f"{name}: {why.found}" for name, why in refusals.items()),
        expected=last.expected,
        fix=last.fix,
    )


def check_backend(name: str, place: Place = ANYWHERE) -> None:
    """Raise what no machine could mend: BackendError for an unknown name, UsageError for one of elsewhere."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}",
            expected=f"auto, {', '.join(BACKENDS)}",
            fix="Let it be chosen: --backend auto",
        )
    if not place.allows(BACKENDS[name]):
        raise UsageError(
            f"the backend {name} with the device {place}",
            expected="a backend that runs there",
            fix="Leave one of the two out.",
        )
