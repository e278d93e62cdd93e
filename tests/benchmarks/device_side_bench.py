"""latentrt's own side on host memory, with nets that are watched."""

from collections import Counter
from typing import Any

from latentrt.benchmarks.sides.contract import OpenSide
from latentrt.benchmarks.sides.ours_device import device_side
from latentrt.engines.backend import MemoryLedger
from latentrt.engines.device import Addresses, BoundNet, DeviceNet, Shapes
from latentrt.engines.package import Package
from latentrt.engines.spec import NetSpec
from latentrt.runtime.loop.device.cuda_graphs import Graphs
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.pipeline import SHIPPED, Pipeline
from tests.engines.host_device import HostDevice

PACKAGE = Package.open(SHIPPED["demo"])


class Spied:
    """A net on a device that claims scratch memory, and counts its runs under its name."""

    def __init__(self, name: str, net: DeviceNet, runs: Counter[str], scratch: int) -> None:
        self.name, self.net, self.runs, self.size = name, net, runs, scratch
        self.capturable = True

    @property
    def spec(self) -> NetSpec:
        return self.net.spec

    @property
    def memory(self) -> MemoryLedger:
        return self.net.memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def scratch(self, shapes: Shapes) -> int:
        return self.size

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> "SpiedRun":
        assert scratch, "bound without the scratch memory it asked for"
        return SpiedRun(self, self.net.bind(shapes, addresses, scratch))


class SpiedRun:
    profile = "spied"

    def __init__(self, net: Spied, bound: BoundNet) -> None:
        self.net, self.bound, self.close = net, bound, bound.close

    @property
    def capturable(self) -> bool:
        return self.net.capturable

    def enqueue(self) -> None:
        self.net.runs[self.net.name] += 1
        self.bound.enqueue()


def open_on(device: HostDevice, nets: dict[str, Any], graphs: Graphs = "auto") -> tuple[OpenSide, DeviceLoop]:
    loop = DeviceLoop(device, nets, PACKAGE.manifest, graphs=graphs)
    return device_side(Pipeline.over(PACKAGE, loop, "stand-in", cache_bytes=0), loop), loop
