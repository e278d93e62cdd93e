"""The package's graphs in TensorRT as Polygraphy builds them: strongly typed, for exactly a case's shapes.

Each engine is built when a case asks for it, its profile's least, best and most all the same, which is what
TensorRT is fastest with. Runs are enqueued on one stream (`execute_async_v3`), not through Polygraphy's
runner, which waits after every call.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...engines.backend import MemoryLedger
from ...engines.cuda import facts
from ...engines.device import Addresses, Device, Shapes
from ...engines.errors import BackendError
from ...engines.net_weights import engine_bytes
from ...engines.package import Package
from ...engines.spec import NetSpec, output_shapes
from ...engines.tensorrt.flavour import flavour, installed_version
from ..machine import version_of
from .contract import OpenSide, Task, missing_modules
from .plain_device_loop import open_on_cuda


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    if reason := missing_modules("tensorrt", "polygraphy") or facts.available():
        return reason
    try:
        flavour("tensorrt")
    except BackendError as error:
        return error.found
    return None


def open_side(task: Task) -> OpenSide:
    """The package; engines are built case by case. Raises BackendError, PackageError."""
    versions = {
        "tensorrt": installed_version("tensorrt") or "unknown",
        "polygraphy": version_of("polygraphy") or "unknown",
        "precision": "strongly typed",
        "profile": "min = opt = max, the case's shapes",
    }
    return open_on_cuda("tensorrt", task, PolygraphyNet, versions)


class PolygraphyNet:
    """`DeviceNet` whose engines Polygraphy builds, one for each set of shapes."""

    def __init__(self, package: Package, name: str, device: Device) -> None:
        self.spec: NetSpec = package.manifest.nets[name].spec
        self._weights = engine_bytes(package, name)
        self._graph, self._device = package.path(package.manifest.nets[name].graph), device
        self._engines: dict[tuple[Any, ...], Any] = {}

    @property
    def memory(self) -> MemoryLedger:
        """Weights at the width of the arithmetic, and activations, of every engine there is now."""
        activations = sum(int(engine.device_memory_size_v2) for engine in self._engines.values())
        return MemoryLedger(weights=self._weights * len(self._engines), activations=activations, io=0)

    def scratch(self, shapes: Shapes) -> int:
        """0: a context brings its own."""
        del shapes
        return 0

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundEngine:
        """Build the engine if these shapes have none. Raises BackendError, also if TensorRT refuses."""
        del scratch
        key = tuple(sorted(shapes.items()))
        if key not in self._engines:
            self._engines[key] = build_engine(str(self._graph), shapes)
        context = self._engines[key].create_execution_context()
        tensors = (*shapes, *output_shapes(self.spec, shapes))
        taken = [context.set_input_shape(name, tuple(shape)) for name, shape in shapes.items()]
        taken += [context.set_tensor_address(name, addresses[name]) for name in tensors]
        if not all(taken):
            raise _refused(f"TensorRT refuses the shapes {dict(shapes)} or the addresses of a net")
        return BoundEngine(context, int(getattr(self._device, "stream", 0)))

    def settle(self) -> None:
        """Nothing is kept."""

    def release(self) -> None:
        """Nothing only speeds the next call up."""

    def stream_weights(self) -> int:
        """0: all weights stay on the device."""
        return 0

    def close(self) -> None:
        """Free every engine. May be called twice."""
        self._engines.clear()


class BoundEngine:
    """`BoundNet`: an execution context with everything set."""

    profile = "exact"
    capturable = False

    def __init__(self, context: Any, stream: int) -> None:
        self._context: Any = context
        self._stream = stream

    def enqueue(self) -> None:
        """Put one run on the stream. Raises BackendError if TensorRT refuses."""
        if not self._context.execute_async_v3(self._stream):
            raise _refused("TensorRT could not enqueue a run")

    def close(self) -> None:
        """Free the context. May be called twice."""
        self._context = None


def build_engine(graph: str, shapes: Shapes) -> Any:
    """An engine of the graph for exactly these shapes. Raises what Polygraphy raises."""
    trt: Any = import_module("polygraphy.backend.trt")
    profile = trt.Profile()
    for name, shape in shapes.items():
        profile.add(name, min=shape, opt=shape, max=shape)
    network = trt.network_from_onnx_path(graph, strongly_typed=True)
    # Without this the builder refuses attention that no fused kernel has, such as the VAE's head of 512.
    network = trt.set_decomposable_attentions(network)
    return trt.engine_from_network(network, config=trt.CreateConfig(profiles=[profile]))


def _refused(found: str) -> BackendError:
    return BackendError(found, expected="an engine for these shapes", fix="Leave tensorrt out of the peers.")
