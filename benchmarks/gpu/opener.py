"""What the GPU check runs on: a backend's nets on a device. A parameter, so that tests can pass another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from ...engines.backend import DeviceBackend, choose_backend, to_stderr
from ...engines.cuda.device import CudaDevice
from ...engines.cuda.facts import Nvml, facts
from ...engines.device import Device, DeviceNet, Graph
from ...engines.errors import BackendError
from ...engines.onnxruntime.cuda_backend import ONNXRUNTIME_CUDA
from ...engines.onnxruntime.nets import OnnxRuntimeDeviceNet
from ...engines.package import Manifest, Package
from ...engines.tensorrt.build import built_nets
from ...engines.tensorrt.flavour import ENGINE_BACKENDS, flavour
from ...runtime.loop.device.cuda_graphs import Graphs
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.pipeline import Pipeline

PROMPT = "a red circle on a blue background"

OpenDevice = Callable[[Package, Sequence[str]], tuple[Device, Mapping[str, DeviceNet]]]
OpenProfiled = Callable[[Package, Sequence[str], Path], tuple[Device, Mapping[str, OnnxRuntimeDeviceNet]]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work the sections do. Pixels are multiples of the package's `size_multiple`.

    Attributes:
        width, height: of the usual picture.
        short: the other side of a picture that is not square.
        large, many: side and number of pictures of the request that must not fit (the ladder).
        guidance: the scale wherever guidance is on.
        steps: where the picture counts, not the time.
        timed_steps, runs: of what is timed.
        shares: of what the large request takes with memory to spare: how much is left free, in turn.
        pictures: that must leave the host's memory as it is.
        cycles: of opening, drawing and closing, after a first one that is not counted.
        threads: of ONNX Runtime's CPU nets, which say what is right; None is every processor.
    """

    width: int
    height: int
    short: int
    large: int
    guidance: float
    many: int = 16
    steps: int = 8
    timed_steps: int = 20
    runs: int = 12
    cycles: int = 3
    pictures: int = 200
    shares: tuple[float, ...] = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15, 0.08)
    threads: int | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Scale:
        """For a GPU: the package's own size, and up to twice that."""
        defaults, multiple = manifest.defaults, manifest.size_multiple
        return cls(
            width=defaults.width,
            height=defaults.height,
            short=max(defaults.height * 3 // 4 // multiple, 1) * multiple,
            large=2 * max(defaults.width, defaults.height),
            guidance=defaults.guidance_scale if defaults.guidance_scale > 1 else 5.0,
        )

    @property
    def profile(self) -> str:
        """What engines are built for, in the grammar of profiles: all that the sections draw."""
        low = min(self.width, self.height, self.short)
        high = max(self.large, self.width, self.height)
        sides = [f"{low}-{high}@{side}" for side in (self.width, self.height)]
        return f"{'x'.join(sides)}:b1-{self.many}"

    def request(self, **changes: Any) -> dict[str, Any]:
        """Parameters of a picture."""
        usual = {"width": self.width, "height": self.height, "num_inference_steps": self.steps, "seed": 1}
        return {**usual, "guidance_scale": self.guidance, "output_type": "np", **changes}

    @property
    def large_request(self) -> dict[str, Any]:
        """Parameters of the request that must not fit."""
        side = {"width": self.large, "height": self.large}
        return self.request(**side, num_images_per_prompt=self.many, num_inference_steps=3)


class CountedDevice:
    """A device of which is known how often captured work was launched."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.launches = 0

    def __getattr__(self, name: str) -> Any:
        """What is not counted."""
        return getattr(self._device, name)

    @contextmanager
    def capture(self) -> Generator[list[Graph], None, None]:
        """As the device's own."""
        graphs: list[Graph] = []
        with self._device.capture() as captured:
            yield graphs
        graphs += [_CountedGraph(self, graph) for graph in captured]


class _CountedGraph:
    def __init__(self, device: CountedDevice, graph: Graph) -> None:
        self._device, self._graph = device, graph

    def launch(self) -> None:
        self._device.launches += 1
        self._graph.launch()

    def close(self) -> None:
        self._graph.close()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open pipeline, and what is behind it. `log` has what the loop said."""

    pipe: Pipeline
    loop: DeviceLoop
    device: CountedDevice
    log: list[str]


@dataclass(frozen=True, kw_only=True)
class Opener:
    """One backend, ready to open.

    Attributes:
        backend: its name.
        package: what is drawn with.
        open_device: a device, and nets on it.
        watch: the same device for an onlooker: it reads the free memory, and takes memory away.
        measured_by: who says how much is free.
        open_capturing: as `open_device`, where runs may be captured for the asking alone.
        open_profiled: as `open_device`, with a folder for profiles; where nodes may be left to the CPU.
        unsupported: why this GPU is none of the backend's, so that being refused is no failure; "" if it is.
    """

    backend: str
    package: Package
    open_device: OpenDevice
    watch: Callable[[], Device]
    measured_by: str
    open_capturing: OpenDevice | None = None
    open_profiled: OpenProfiled | None = None
    unsupported: str = ""

    @contextmanager
    def nets(self) -> Generator[tuple[Device, Mapping[str, DeviceNet]], None, None]:
        """A device and every net of the loop."""
        device, nets = self.open_device(self.package, built_nets(self.package))
        with ExitStack() as stack:
            stack.callback(device.close)
            for net in nets.values():
                stack.callback(net.close)
            yield device, nets

    @contextmanager
    def pipeline(self, graphs: Graphs = "off") -> Generator[Opened, None, None]:
        """A pipeline on the device. With graphs "on", runs may be captured, whatever the default is."""
        opened = (graphs == "on" and self.open_capturing) or self.open_device
        device, nets = opened(self.package, built_nets(self.package))
        counted, log = CountedDevice(device), list[str]()
        loop = DeviceLoop(cast(Device, counted), nets, self.package.manifest, graphs=graphs, log=log.append)
        try:
            pipe = Pipeline.over(self.package, loop, self.backend, cache_bytes=0)
            yield Opened(pipe=pipe, loop=loop, device=counted, log=log)
        finally:
            loop.close()

    @contextmanager
    def watching(self) -> Generator[Device, None, None]:
        """The onlooker's device."""
        device = self.watch()
        try:
            yield device
        finally:
            device.close()


def backend_opener(backend: str, package: Package) -> Opener:
    """For a backend on the first CUDA device.

    Raises:
        BackendError: it cannot run here, with the reason; or it runs on no device.
    """
    name, engine = choose_backend(backend)
    if not isinstance(engine, DeviceBackend):
        raise BackendError(
            f"the backend {name!r} runs on no device",
            expected="onnxruntime-cuda, tensorrt or tensorrt-rtx",
            fix="Leave --backends out to check all of them.",
        )
    gpu = facts()
    sees = not gpu.unified and Nvml(gpu.uuid).memory() is not None
    only_onnxruntime: dict[str, Any] = {}
    if engine is ONNXRUNTIME_CUDA:
        only_onnxruntime = {
            "open_capturing": partial(ONNXRUNTIME_CUDA.open_device, capture=True),
            "open_profiled": _open_profiled,
        }
    return Opener(
        backend=name,
        package=package,
        open_device=partial(engine.open_device, log=to_stderr),
        watch=CudaDevice,
        measured_by="NVML, all processes" if sees else "cudaMemGetInfo",
        unsupported=_unsupported(name, gpu.compute_capability, gpu.sm),
        **only_onnxruntime,
    )


def _open_profiled(
    package: Package, names: Sequence[str], folder: Path
) -> tuple[Device, Mapping[str, OnnxRuntimeDeviceNet]]:
    device, nets = ONNXRUNTIME_CUDA.open_device(package, names, profile=folder)
    return device, cast("Mapping[str, OnnxRuntimeDeviceNet]", nets)


def _unsupported(backend: str, capability: tuple[int, int], sm: str) -> str:
    listed = flavour(backend).compute_capabilities if backend in ENGINE_BACKENDS else ()
    if not listed or "{}.{}".format(*capability) in listed:
        return ""
    return f"{sm} is none of {', '.join(listed)}"
