"""Which loop runs a package: the host's, or a device's where the backend has one."""

from __future__ import annotations

from contextlib import ExitStack

from ..engines.backend import DeviceBackend, HostBackend, choose_backend
from ..engines.errors import PackageError
from ..engines.package import Package
from .host_loop import HostLoop
from .job import Loop

HOST_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "vae_decoder")
DEVICE_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "step", "vae_decoder")


def open_loop(package: Package, backend: str, threads: int | None) -> tuple[Loop, str]:
    """The loop, and for people what executes it.

    Args:
        package: holds the nets.
        backend: a name of `engines.backend.BACKENDS`, or "auto".
        threads: of a CPU backend; None is every processor this process may use.

    Raises:
        PackageError: a net is missing, or its graph is refused.
        BackendError: nothing of that name can run here, or it has no engines for this package.
    """
    name, engine = choose_backend(backend)
    if isinstance(engine, DeviceBackend):
        _check_nets(package, DEVICE_NETS)
        from .device_loop import DeviceLoop

        device, nets = engine.open_device(package, DEVICE_NETS)
        return DeviceLoop(device, nets, package.manifest.latent_scale), engine.describe()
    assert isinstance(engine, HostBackend), name
    _check_nets(package, HOST_NETS)
    with ExitStack() as stack:
        nets = {net: stack.enter_context(engine.open_net(package, net, threads=threads)) for net in HOST_NETS}
        return HostLoop(nets, stack.pop_all()), engine.describe()


def _check_nets(package: Package, wanted: tuple[str, ...]) -> None:
    if missing := set(wanted) - set(package.manifest.nets):
        raise PackageError(
            f"{package.root} has no {', '.join(sorted(missing))}",
            expected=f"the nets {', '.join(wanted)}",
            fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE.",
        )
