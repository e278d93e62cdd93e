"""The demo package, host memory that passes for a GPU, and lowered graphs that ONNX Runtime's CPU can run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from latentrt.engines.cuda.facts import DeviceFacts
from latentrt.engines.device import DeviceNet
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import Package
from tests.engines.contrib_oracle import executable
from tests.engines.host_device import HostDevice

GPU = DeviceFacts(
    index=0,
    name="NVIDIA L4",
    compute_capability=(8, 9),
    multiprocessors=58,
    driver="580.82.07",
    cuda="13.0",
    total=24 * 2**30,
    unified=False,
    uuid="GPU-0",
)

OpenNet = Callable[..., DeviceNet]


class KnownHost(HostDevice):
    """Host memory, under a GPU's name."""

    facts = GPU
    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


def open_on_cpu(package: Package, name: str, device: Any, **options: Any) -> DeviceNet:
    """`open_onnxruntime_net` with the CPU provider, which has no kernels for lowered graphs."""
    return open_onnxruntime_net(
        package, name, device, provider=CPU, submit=device.submit, threads=1, **options
    )


def oracle_opener(folder: Path, opened: list[tuple[str, bytes]] | None = None) -> OpenNet:
    """As `open_on_cpu`, but lowered graphs run as the oracle's functions. `opened` gets what was asked."""

    def open_net(
        package: Package,
        name: str,
        device: Any,
        *,
        graph: Path | None = None,
        **options: Any,
    ) -> DeviceNet:
        if opened is not None:
            opened.append((name, graph.read_bytes() if graph else b""))
        if graph is not None:
            model = executable(onnx.load(graph, load_external_data=False))
            graph = folder / f"{name}-{len(list(folder.iterdir()))}.onnx"
            onnx.save(model, graph)
        return open_on_cpu(package, name, device, graph=graph)

    return open_net
