"""A package's TensorRT engines on a CUDA device, for either library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..build import find_engines
from ..cuda.device import CudaDevice
from ..cuda.facts import DeviceFacts
from ..device import Device, DeviceNet
from ..engine_choice import Candidate, ChosenNet
from ..errors import BackendError
from ..package import Package
from ..store.engine_store import EngineStore
from .flavour import Flavour, flavour, installed_version, load
from .nets import open_entry


def missing_engines(
    backend: str, package: Package, names: Sequence[str], gpu: DeviceFacts, store: EngineStore
) -> list[str]:
    """The nets that have no engine that could run on this device."""
    row, version = flavour(backend), installed_version(backend) or ""
    return [name for name in names if not find_engines(package, name, row, version, store, gpu=gpu)]


def open_device(
    backend: str,
    package: Package,
    names: Sequence[str],
    *,
    store: EngineStore | None = None,
    log: Callable[[str], None] | None = None,
) -> tuple[Device, Mapping[str, DeviceNet]]:
    """A device, and every net behind all of its engines.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.
        package: the package.
        names: of its nets.
        store: where engines are; the user's own unless given.
        log: told in one line if the library does not list this kind of device; prints to stderr unless given.

    Raises:
        BackendError: a net has no engine for this library and device, with the command that builds them.
    """
    row, version, store = flavour(backend), installed_version(backend) or "", store or EngineStore()
    device = CudaDevice()
    try:
        if missing := missing_engines(backend, package, names, device.facts, store):
            raise BackendError(
                f"{package.root} has no {backend} {version} engines of {', '.join(missing)} for"
                f" {device.name} ({device.facts.sm})",
                expected="one of every net in the engine store (`latentrt cache ls`)",
                fix=f"Build them: latentrt build {package.root} --backend {backend}.",
            )
        nets = {name: _net(row, version, package, name, device, store) for name in names}
    except BaseException:
        device.close()
        raise
    if line := _remark(row, device.facts):
        (log or _to_stderr)(line)
    return device, nets


def _remark(row: Flavour, gpu: DeviceFacts) -> str:
    """That portable engines are not meant for this GPU, though the library may run them; "" if they are."""
    listed = [f"sm_{name.replace('.', '')}" for name in row.compute_capabilities]
    if not row.portable or gpu.sm in listed:
        return ""
    return f"TensorRT-RTX lists {', '.join(listed)}; this is {gpu.sm}: trying"


def _to_stderr(line: str) -> None:
    print(f"latentrt: {line}", file=sys.stderr)


def _net(
    row: Flavour, version: str, package: Package, name: str, device: CudaDevice, store: EngineStore
) -> ChosenNet:
    file = package.manifest.nets[name]
    candidates = [
        Candidate(
            profiles=profiles,
            open=partial(
                open_entry,
                load(row),
                row,
                entry,
                net=name,
                spec=file.spec,
                profiles=profiles,
                device=device,
                graph=package.path(file.graph),
                package=str(package.root),
            ),
        )
        for entry, profiles in find_engines(package, name, row, version, store, gpu=device.facts)
    ]
    return ChosenNet(file.spec, candidates, backend=row.backend, package=str(package.root))
