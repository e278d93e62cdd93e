"""OpenVINO as a backend: nets on any CPU that it has kernels for, and on Intel's GPUs and NPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BackendError
from ..package import Package
from .library import HOST, core, refusal, version
from .nets import OpenvinoNet


@dataclass(frozen=True)
class OpenvinoBackend:
    """`HostBackend` of OpenVINO on one of its devices."""

    device: str = HOST
    fixed_shapes: ClassVar[bool] = True  # see `HostBackend`

    def refusal(self) -> BackendError | None:
        """None if OpenVINO works and has the device, else the error that says why not."""
        return refusal(self.device)

    def describe(self) -> str:
        """Version and device."""
        if found := self.refusal():
            raise found
        name = core().get_property(self.device, "FULL_DEVICE_NAME")
        return f"openvino {version()} ({self.device}: {name.strip()})"

    def on(self, device: str) -> OpenvinoBackend:
        """The same on another of OpenVINO's devices: "GPU", "GPU.1", "NPU"."""
        return OpenvinoBackend(device)

    def open_net(self, package: Package, name: str, *, threads: int | None = None) -> OpenvinoNet:
        """Load one net of a package; see `OpenvinoNet`."""
        return OpenvinoNet(package, name, threads=threads, device=self.device)


OPENVINO = OpenvinoBackend()
