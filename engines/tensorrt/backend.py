"""TensorRT and TensorRT-RTX as backends: a package's engines on a CUDA device. One class serves both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from ..cuda import facts as cuda_facts
from ..cuda.device import CudaDevice
from ..cuda.facts import DeviceFacts
from ..device import Addresses, BoundNet, Device, DeviceNet, MemoryLedger, Shapes
from ..errors import BackendError, command
from ..net_weights import changed_names
from ..package import Package
from ..profiles import NetProfile, choose
from ..spec import NetSpec
from ..store.engine_store import EngineStore, Entry
from .build import built_nets, find_engines
from .flavour import REFITTABLE, Flavour, flavour, installed_version, load
from .loading import EngineOf
from .nets import open_entry
from .preflight import check_capability
from .refit import rebuild_refittable

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine that is built: its profiles, in its own order, and what puts it on the device."""

    profiles: tuple[NetProfile, ...]
    open: Callable[[], DeviceNet]


class ChosenNet:
    """`DeviceNet` over candidates, at least one: each call's shapes choose the engine and its profile.

    An engine is opened when a request first chooses it, and stays open.
    """

    graphs_outlive_other_shapes = True  # as `TensorRTNet`

    def __init__(
        self,
        spec: NetSpec,
        candidates: Sequence[Candidate],
        *,
        backend: str,
        package: str,
        further: Sequence[str] = (),
    ) -> None:
        """`backend`, `package` and `further` as in `profiles.choose`."""
        self.spec = spec
        self._candidates = tuple(candidates)
        self._open: dict[int, DeviceNet] = {}
        self._choose = partial(choose, backend=backend, package=package, further=further)

    @property
    def memory(self) -> MemoryLedger:
        """What all open engines hold together."""
        parts = [net.memory for net in self._open.values()]
        activations = [part.activations for part in parts if part.activations is not None]
        return MemoryLedger(
            weights=sum(part.weights for part in parts),
            activations=max(activations, default=None),  # they share one block
            io=sum(part.io for part in parts),
        )

    def scratch(self, shapes: Shapes) -> int:
        """Bytes for the engine that these shapes choose. Raises UsageError if no engine covers them."""
        return self._net(shapes).scratch(shapes)

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundNet:
        """Bind the engine that these shapes choose. Raises UsageError, MemoryLimitError."""
        return self._net(shapes).bind(shapes, addresses, scratch)

    def settle(self) -> None:
        """Settle every open engine."""
        for net in self._open.values():
            net.settle()

    def release(self) -> None:
        """Release what every open engine can spare."""
        for net in self._open.values():
            net.release()

    def stream_weights(self) -> int:
        """Stream the weights of every open engine; the bytes that this frees."""
        return sum(net.stream_weights() for net in self._open.values())

    def close(self) -> None:
        """Free everything, also where closing one fails. May be called twice."""
        nets, self._open = self._open, {}
        with ExitStack() as stack:
            for net in nets.values():
                stack.callback(net.close)

    def _net(self, shapes: Shapes) -> DeviceNet:
        owners = [index for index, item in enumerate(self._candidates) for _ in item.profiles]
        profiles = [profile for item in self._candidates for profile in item.profiles]
        owner = owners[self._choose(profiles, shapes)]
        if owner not in self._open:
            self._open[owner] = self._candidates[owner].open()
        return self._open[owner]


Engines = Sequence[tuple[Entry, tuple[NetProfile, ...]]]


class TensorRTBackend:
    """`AdaptingBackend` of one of the libraries; `name` is `tensorrt` or `tensorrt-rtx`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refusal(self, *, runtime: Any = None) -> BackendError | None:
        """None if engines can run here, else the error; the library itself is not imported. Never raises.

        `runtime` is the CUDA runtime: `cuda.bindings.runtime` unless a test passes another.
        """
        try:
            flavour(self.name)
        except BackendError as error:
            return error
        return cuda_facts.refusal(runtime)

    def describe(self, index: int = 0) -> str:
        """Version and device, for people. Raises BackendError where `refusal` has an error."""
        row = flavour(self.name)
        gpu = cuda_facts.facts(index)
        return f"{row.module} {installed_version(self.name)} ({gpu.name}, {gpu.sm})"

    def open_device(
        self,
        package: Package,
        names: Sequence[str],
        *,
        index: int = 0,
        store: EngineStore | None = None,
    ) -> tuple[Device, Mapping[str, DeviceNet]]:
        """A device of the caller's own, and every net behind all of its engines.

        Of engines for the same shapes those come first that were not built refittable: these may be slower.
        A line is logged if the library does not list this kind of device, or finds an engine not the best for
        it. `store` is the user's own unless given.

        Raises:
            BackendError: the device is too old for the package's format, or a net has no engine for this
                library and device, with the command that builds them.
        """
        row, place = flavour(self.name), store or EngineStore()
        version = installed_version(self.name) or ""
        device = CudaDevice(index)
        try:
            check_capability(package.manifest, device.facts)
            found = {
                name: find_engines(package, name, row, version, place, gpu=device.facts) for name in names
            }
            if missing := [name for name, engines in found.items() if not engines]:
                raise BackendError(
                    f"{package.root} has no {self.name} {version} engines of {', '.join(missing)} for"
                    f" {device.name} ({device.facts.sm})",
                    expected="one of every net in the engine store (`latentrt cache ls`)",
                    fix=f"Build them: {command('latentrt', 'build', package.root, '--backend', self.name)}",
                )
            nets = {
                name: _net(row, package, name, device, sorted(engines, key=_is_refittable))
                for name, engines in found.items()
            }
        except BaseException:
            device.close()
            raise
        if line := _remark(row, device.facts):
            _LOG.warning(line)
        return device, nets

    def open_another(
        self, device: Device, package: Package, name: str, *, store: EngineStore | None = None
    ) -> DeviceNet:
        """See `AdaptingBackend`: a net with other weights behind its engines that were built refittable.

        The weights are replaced in an engine when a request first chooses it. With the package's own weights
        all engines serve, those first that were not built so.

        Raises:
            BackendError: there is none, with the command that builds them.
        """
        row, place = flavour(self.name), store or EngineStore()
        cuda = cast(CudaDevice, device)  # `open_device` has made it
        version = installed_version(self.name) or ""
        found = find_engines(package, name, row, version, place, gpu=cuda.facts)
        if not package.changes_of(name):
            if not found:
                raise BackendError(
                    f"{package.root} has no {self.name} {version} engine of {name} for {cuda.name}"
                    f" ({cuda.facts.sm})",
                    expected="one in the engine store (`latentrt cache ls`)",
                    fix="Build it: "
                    + command("latentrt", "build", package.root, "--backend", self.name, "--nets", name),
                )
            return _net(row, package, name, cuda, sorted(found, key=_is_refittable))
        engines = [item for item in found if _is_refittable(item)]
        if not engines:
            changed = [net for net in built_nets(package) if changed_names(package, net)]
            raise BackendError(
                f"{package.root} has no {self.name} {version} engine of {name} for {cuda.name}"
                f" ({cuda.facts.sm}) whose weights adapters may change",
                expected="engines that were built refittable, beside the others",
                fix=rebuild_refittable(package.root, self.name, changed),
            )
        return _net(row, package, name, cuda, engines, further=("--weights", "refittable"))


def _is_refittable(item: tuple[Entry, tuple[NetProfile, ...]]) -> bool:
    return REFITTABLE in item[0].key.flags


def _remark(row: Flavour, gpu: DeviceFacts) -> str:
    """A remark if portable engines are not meant for this GPU, though the library may run them; else ""."""
    listed = [f"sm_{name.replace('.', '')}" for name in row.compute_capabilities]
    if not row.portable or gpu.sm in listed:
        return ""
    return f"TensorRT-RTX lists {', '.join(listed)}; this is {gpu.sm}: trying"


def _net(
    row: Flavour,
    package: Package,
    name: str,
    device: CudaDevice,
    engines: Engines,
    *,
    further: Sequence[str] = (),
) -> ChosenNet:
    """A net behind engines, with the package's changes; `further` as in `profiles.choose`."""
    file, root = package.manifest.nets[name], str(package.root)

    def opener(entry: Entry, profiles: tuple[NetProfile, ...]) -> Callable[[], DeviceNet]:
        def open_engine() -> DeviceNet:
            of = EngineOf(
                trt=load(row),
                flavour=row,
                net=name,
                spec=file.spec,
                profiles=profiles,
                device=device,
                package=root,
            )
            changed = package if package.changes_of(name) else None
            net = open_entry(of, entry, package.path(file.graph), package.weights_folder(name), changed)
            if net.remark:
                _LOG.warning("the engine of %r: %s", name, net.remark)
            return net

        return open_engine

    candidates = [Candidate(profiles=profiles, open=opener(entry, profiles)) for entry, profiles in engines]
    return ChosenNet(file.spec, candidates, backend=row.backend, package=root, further=further)


TENSORRT = TensorRTBackend("tensorrt")
TENSORRT_RTX = TensorRTBackend("tensorrt-rtx")
