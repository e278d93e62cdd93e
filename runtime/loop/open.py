"""Opens the loop that runs a package: on a device where the backend has one, else on the host."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

from ...engines.backend import AdaptingBackend, Backend, DeviceBackend, HostBackend, Place, choose_backend
from ...engines.device import Device
from ...engines.errors import BackendError
from ...engines.installed import latentrt_version
from ...engines.package import Package
from ...engines.spec import NETS, TEXT_ENCODERS
from .denoise import HostLoop
from .device.verdicts import Graphs
from .job import REQUIRED, PackageLoop

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How a loop is opened. `threads` count on the host only, `graphs` on a device.

    Attributes:
        device: as `engines.backend.Place.parse` takes it.
        backend: a name of `engines.backend.BACKENDS`, or "auto".
        threads: of a CPU backend; None is one for every processor this process may use.
        graphs: whether rows are replayed as a CUDA graph: "on", "off", or "auto", where that is faster.
    """

    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    graphs: Graphs = "auto"


def open_loop(package: Package, options: LoopOptions) -> tuple[PackageLoop, str]:
    """Open a loop over a package; with "auto", on the best backend that opens it.

    Returns:
        The loop, and a description of what executes it, for people.

    Raises:
        PackageError: a net is missing, or its graph is refused.
        BackendError: nothing of that name can run here, or it has no engines for this package.
        UsageError: the device is none, or the backend does not run there.
    """
    refused, place = dict[str, BackendError](), Place.parse(options.device)
    while True:
        name, engine = choose_backend(options.backend, refused, place)
        if options.backend == "auto":
            name, engine = _measured(package, name, engine, refused)
        try:
            return _open(package, name, engine, options, place.index)
        except BackendError as error:
            if options.backend != "auto":
                raise
            # Such as a CUDA provider without its libraries, which only opening can find out.
            _LOG.warning("%s does not open: %s", name, error)
            refused[name] = error


def _measured(
    package: Package, name: str, engine: Backend, refused: Mapping[str, BackendError]
) -> tuple[str, Backend]:
    """What `latentrt build --backend auto` found to be faster than ONNX Runtime, else the same."""
    if name != "onnxruntime":
        return name, engine
    from ...engines.contest.fastest import fastest_host
    from ...engines.contest.mixed import backend_of

    found = fastest_host(package)
    if found is None or found.name == name or found.name in refused:
        return name, engine
    other: Backend = backend_of(found.nets)
    if why := other.refusal():
        _LOG.warning("%s was measured to be faster and cannot run any more: %s", found.name, why.found)
        return name, engine
    _LOG.info("auto takes %s in place of %s: %s, as was measured here", found.name, name, found.reason)
    return found.name, other


def _open(
    package: Package, name: str, engine: Backend, options: LoopOptions, index: int
) -> tuple[PackageLoop, str]:
    nets = package.manifest.nets
    for net in (*REQUIRED, "step") if isinstance(engine, DeviceBackend) else REQUIRED:
        package.manifest.net(net)  # raises PackageError
    if isinstance(engine, DeviceBackend):
        from ...engines.store.engine_store import EngineStore
        from .device.loop import DeviceLoop
        from .device.verdicts import Verdicts

        used = [net for net in nets if net not in NETS or NETS[net].usual]
        description = engine.describe(index)
        device, opened = engine.open_device(package, used, index=index)
        verdicts = Verdicts(EngineStore(), replayed_facts(package, description, device))
        again = partial(engine.open_another, device) if isinstance(engine, AdaptingBackend) else None
        loop = DeviceLoop(
            device, opened, package.manifest, graphs=options.graphs, verdicts=verdicts, open_net=again
        )
        return loop, description
    assert isinstance(engine, HostBackend), name
    with ExitStack() as stack:
        loop = stack.enter_context(closing(HostLoop(package, engine, options.threads)))
        loop.open_nets([net for net in nets if net in (*REQUIRED, *TEXT_ENCODERS)])
        stack.pop_all()
        return loop, engine.describe()


def replayed_facts(package: Package, library: str, device: Device) -> dict[str, object]:
    """All that a verdict on replayed rows holds for, besides their shape."""
    from ...engines.onnxruntime.lowering.lower import REVISION

    files = package.manifest.files
    graphs = {net: files[file.graph].sha256 for net, file in package.manifest.nets.items()}
    return {
        "latentrt": latentrt_version(),
        "library": library,
        "lowering": REVISION,
        "device": device.kind,
        "graphs": graphs,
    }
