"""TensorRT as a backend: whether its engines can run here, what it is, and its nets on a device.

`tensorrt/rtx_backend.py` is the same for the other library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backend import Log, to_stderr
from ..cuda import facts as cuda_facts
from ..device import Device, DeviceNet
from ..errors import BackendError
from ..package import Package
from . import device as tensorrt_device
from .flavour import flavour, installed_version

BACKEND = "tensorrt"


def available(backend: str = BACKEND, *, runtime: Any = None) -> str | None:
    """None if engines of this backend can run here, else the reason; the library itself is not imported.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.
        runtime: the CUDA runtime; `cuda.bindings.runtime` unless a test passes another.
    """
    try:
        flavour(backend)
    except BackendError as error:
        return error.found
    return cuda_facts.available(runtime)


def describe(backend: str = BACKEND) -> str:
    """Version and device, for people. Raises BackendError where `available` has a reason."""
    row = flavour(backend)
    facts = cuda_facts.facts()
    return f"{row.module} {installed_version(backend)} ({facts.name}, {facts.sm})"


def open_device(
    package: Package,
    names: Sequence[str],
    *,
    backend: str = BACKEND,
    log: Log = to_stderr,
) -> tuple[Device, Mapping[str, DeviceNet]]:
    """A device of its own for the caller, and nets on it. See `device.open_device`."""
    return tensorrt_device.open_device(backend, package, names, log=log)
