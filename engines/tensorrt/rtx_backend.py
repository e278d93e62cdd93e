"""`backend.py` for the module that `tensorrt_rtx` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..backend import Log, to_stderr
from ..device import Device, DeviceNet
from ..package import Package
from . import backend as tensorrt_backend

BACKEND = "tensorrt-rtx"


def available() -> str | None:
    """None if its engines can run here, else the reason."""
    return tensorrt_backend.available(BACKEND)


def describe() -> str:
    """Version and device, for people. Raises BackendError where `available` has a reason."""
    return tensorrt_backend.describe(BACKEND)


def open_device(
    package: Package, names: Sequence[str], *, log: Log = to_stderr
) -> tuple[Device, Mapping[str, DeviceNet]]:
    """See `backend.open_device`."""
    return tensorrt_backend.open_device(package, names, backend=BACKEND, log=log)
