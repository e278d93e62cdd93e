"""OpenVINO as two backends: nets on any CPU that it has kernels for, and on Intel's GPUs and NPUs.

One computes in float32. The other in bfloat16, where the CPU multiplies it: that is OpenVINO's own choice
there, and coarser than the bars of exact packages. Some CPUs take longer with it: a Xeon with AVX512-BF16 and
without AMX took twice as long, where a Zen 4 takes half as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BackendError
from ..package import Package
from ..processors import multiplies_bfloat16
from ..spec import NETS
from ..tolerances import BF16
from .library import HOST, core, refusal, version
from .nets import F32, OpenvinoNet


@dataclass(frozen=True)
class OpenvinoBackend:
    """`HostBackend` of OpenVINO on one of its devices, in one precision."""

    device: str = HOST
    precision: str = F32
    fixed_shapes: ClassVar[bool] = True  # see `HostBackend`

    def refusal(self) -> BackendError | None:
        """None if OpenVINO works and has the device and the precision, else the error that says why not."""
        if self.precision == BF16 and not multiplies_bfloat16():
            return BackendError(
                "this processor does not multiply bfloat16",
                expected="one with AVX512-BF16 or AMX",
                fix="Compute in float32: --backend openvino",
            )
        return refusal(self.device)

    def describe(self) -> str:
        """Version, device and precision."""
        if found := self.refusal():
            raise found
        name = core().get_property(self.device, "FULL_DEVICE_NAME")
        precision = "" if self.precision == F32 else f", {self.precision}"
        return f"openvino {version()} ({self.device}: {name.strip()}{precision})"

    def on(self, device: str) -> OpenvinoBackend:
        """The same on another of OpenVINO's devices: "GPU", "GPU.1", "NPU"."""
        return OpenvinoBackend(device)

    def open_net(self, package: Package, name: str, *, threads: int | None = None) -> OpenvinoNet:
        """Load one net of a package; see `OpenvinoNet`.

        In bfloat16 are nets that run in every step, and those of pictures: what runs once a prompt takes no
        time, and every step has its error.
        """
        row = NETS.get(name)
        precision = self.precision if row is None or row.in_loop or row.tiled else F32
        return OpenvinoNet(package, name, threads=threads, device=self.device, precision=precision)


OPENVINO = OpenvinoBackend()
OPENVINO_BF16 = OpenvinoBackend(precision=BF16)
