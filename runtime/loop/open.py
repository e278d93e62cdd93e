"""Which loop runs a package: the host's, or a device's where the backend has one."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass

from ...engines.backend import DeviceBackend, HostBackend, Log, choose_backend, to_stderr
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS
from .device.cuda_graphs import Graphs
from .host import HostLoop
from .job import Loop

# Without these there is no loop. Other nets of a package are for some requests only, or for other tools.
_REQUIRED = ("unet_context", "unet_time", "unet", "vae_decoder")
_ELSEWHERE = ("unet_whole",)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How a loop is opened. The last two count on a device only.

    Attributes:
        backend: a name of `engines.backend.BACKENDS`, or "auto".
        threads: of a CPU backend; None is every processor this process may use.
        graphs: whether rows are replayed as a captured graph: "on", "off", or "auto", where it is faster.
        log: is told, in a line each, what was given up when memory was short, and what cannot be captured.
    """

    backend: str = "auto"
    threads: int | None = None
    graphs: Graphs = "auto"
    log: Log | None = None


def open_loop(package: Package, options: LoopOptions) -> tuple[Loop, str]:
    """The loop, and for people what executes it.

    Raises:
        PackageError: a net is missing, or its graph is refused.
        BackendError: nothing of that name can run here, or it has no engines for this package.
    """
    name, engine = choose_backend(options.backend)
    nets = package.manifest.nets
    if isinstance(engine, DeviceBackend):
        _check_nets(package, (*_REQUIRED, "step"))
        from .device.loop import DeviceLoop

        log = options.log or to_stderr
        device, opened = engine.open_device(package, [net for net in nets if net not in _ELSEWHERE], log=log)
        loop = DeviceLoop(device, opened, package.manifest, graphs=options.graphs, log=log)
        return loop, engine.describe()
    assert isinstance(engine, HostBackend), name
    _check_nets(package, _REQUIRED)
    with ExitStack() as stack:
        loop = stack.enter_context(closing(HostLoop(package, engine, options.threads)))
        for net in nets:
            if net in (*_REQUIRED, *TEXT_ENCODERS):
                loop.net(net)  # now, so that the first picture need not wait for it
        stack.pop_all()
        return loop, engine.describe()


def _check_nets(package: Package, wanted: tuple[str, ...]) -> None:
    for net in wanted:
        package.manifest.net(net)
