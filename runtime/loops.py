"""Which loop runs a package: the host's, or a device's where the backend has one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from ..engines.backend import DeviceBackend, HostBackend, Log, choose_backend, to_stderr
from ..engines.errors import PackageError
from ..engines.package import Package
from .host_loop import HostLoop
from .job import Loop
from .replay import Graphs

HOST_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "vae_decoder")
DEVICE_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "step", "vae_decoder")


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
    if isinstance(engine, DeviceBackend):
        _check_nets(package, DEVICE_NETS)
        from .device_loop import DeviceLoop

        log = options.log or to_stderr
        device, nets = engine.open_device(package, DEVICE_NETS, log=log)
        loop = DeviceLoop(device, nets, package.manifest.latent_scale, graphs=options.graphs, log=log)
        return loop, engine.describe()
    assert isinstance(engine, HostBackend), name
    _check_nets(package, HOST_NETS)
    with ExitStack() as stack:
        nets = {
            net: stack.enter_context(engine.open_net(package, net, threads=options.threads))
            for net in HOST_NETS
        }
        return HostLoop(nets, stack.pop_all()), engine.describe()


def _check_nets(package: Package, wanted: tuple[str, ...]) -> None:
    if missing := set(wanted) - set(package.manifest.nets):
        raise PackageError(
            f"{package.root} has no {', '.join(sorted(missing))}",
            expected=f"the nets {', '.join(wanted)}",
            fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE.",
        )
