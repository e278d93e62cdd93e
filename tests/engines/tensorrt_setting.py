"""What the tests of TensorRT's nets share: the demo package on the simulated library and host memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import latentrt.demo
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import Package
from latentrt.engines.profiles import NetProfile, Profile, net_profiles
from latentrt.engines.spec import NETS
from latentrt.engines.tensorrt.flavour import Flavour, flavour
from latentrt.engines.tensorrt.loading import EngineOf
from latentrt.engines.tensorrt.nets import BoundTensorRTNet, TensorRTNet, open_engine
from tests.engines.host_device import HostDevice
from tests.engines.net_inputs import input_shapes, random_inputs
from tests.engines.simulated_tensorrt import SimulatedLibrary, simulated_engine
from tests.engines.simulated_tensorrt_names import VARIANTS

PACKAGE = Package.open(Path(latentrt.demo.__path__[0]) / "package")
DEMO_NETS = [name for name, row in NETS.items() if name in PACKAGE.manifest.nets and row.usual]
PROFILES = (Profile.parse("64x64:b1-2"), Profile.parse("64-128@128x64-128@128:b1-2:t77-154"))
SMALL, LARGE = (
    {"E": 1, "N": 1, "B": 2, "P": 2, "S": 3, "T": 77, "H": 64, "W": 64, "H/8": 8, "W/8": 8},
    {"E": 3, "N": 2, "B": 4, "P": 3, "S": 5, "T": 154, "H": 96, "W": 128, "H/8": 12, "W/8": 16},
)


def row(variant: str) -> Flavour:
    return flavour(variant.partition(" ")[0], VARIANTS[variant])


def profiles(net: str) -> tuple[NetProfile, ...]:
    return net_profiles(net, PACKAGE.manifest.nets[net].spec, PROFILES)


def graph(net: str) -> Path:
    return PACKAGE.path(PACKAGE.manifest.nets[net].graph)


def shapes(net: str, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return input_shapes(PACKAGE.manifest.nets[net].spec, sizes)


def inputs(net: str, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    return random_inputs(PACKAGE.manifest.nets[net].spec, shapes(net, sizes))


def reference(net: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with ONNXRUNTIME.open_net(PACKAGE, net, threads=1) as plain:
        return plain(**arrays)


def library(variant: str, device: HostDevice) -> SimulatedLibrary:
    return SimulatedLibrary(variant, device.submit)


def open_simulated(
    trt: SimulatedLibrary, variant: str, net: str, device: HostDevice, *, options: Any = None, **extra: Any
) -> TensorRTNet:
    """A net of the demo package. `options` go to `engine_of` and `open_engine`, `extra` into the engine."""
    own = {name: value for name, value in (options or {}).items() if name in ("cache", "graph", "changed")}
    more = {name: value for name, value in (options or {}).items() if name not in own}
    data = simulated_engine(variant, graph(net), profiles(net), **extra)
    return open_engine(engine_of(trt, row(variant), net, device, **more), data, **own)


def engine_of(trt: Any, flavour: Flavour, net: str, device: HostDevice, **change: Any) -> EngineOf:
    """What an engine of the demo package is of."""
    known = {"spec": PACKAGE.manifest.nets[net].spec, "profiles": profiles(net), "device": device}
    return EngineOf(trt=trt, flavour=flavour, net=net, **{**known, **change})


class Buffers:
    """Device memory for one call: inputs uploaded, outputs to be read."""

    def __init__(
        self, device: HostDevice, arrays: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray]
    ) -> None:
        self.device = device
        self.results = {name: np.zeros_like(array) for name, array in results.items()}
        self.addresses = {n: device.allocate(a.nbytes) for n, a in (*arrays.items(), *results.items())}
        for name, array in arrays.items():
            device.upload(self.addresses[name], array)

    def read(self) -> dict[str, np.ndarray]:
        for name, array in self.results.items():
            self.device.download(self.addresses[name], array)
        self.device.synchronize()
        return self.results


def bound(
    net: TensorRTNet, device: HostDevice, name: str, sizes: Mapping[str, int]
) -> tuple[BoundTensorRTNet, Buffers, dict[str, np.ndarray]]:
    """The net bound to buffers of its own, and what it should compute."""
    arrays = inputs(name, sizes)
    expected = reference(name, arrays)
    buffers = Buffers(device, arrays, expected)
    size = net.scratch(shapes(name, sizes))
    block = device.allocate(size) if size else 0
    return net.bind(shapes(name, sizes), buffers.addresses, block), buffers, expected
