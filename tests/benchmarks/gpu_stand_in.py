"""The device of the GPU check on host memory, and defects to plant in it.

Nets are ONNX Runtime's on the CPU at the device's addresses; they claim scratch memory as a GPU library does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.gpu.opener import Opener, Scale
from latentrt.benchmarks.sides.contract import OURS, Task, open_side
from latentrt.benchmarks.sides.ours_device import device_side
from latentrt.engines.device import Addresses, BoundNet, DeviceNet, Shapes
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import Package
from latentrt.engines.tensorrt.build import built_nets
from latentrt.runtime.model import SHIPPED
from tests.engines.host_device import HostDevice

MIB = 2**20
PACKAGE = Package.open(SHIPPED["demo"])
CASE = Case(width=64, height=64, guidance_scale=3.0, steps=2, seed=1)
SCALE = Scale(
    case=CASE,
    several=replace(CASE, pictures=3, height=48),
    large=replace(CASE, pictures=4, steps=3),
    steps=2,
    runs=3,
)
Wrap = Callable[[str, "Hungry"], DeviceNet]


class WatchedDevice(HostDevice):
    """May be asked for its memory by another thread."""

    @property
    def used(self) -> int:
        return sum(list(self.sizes.values()))


class Hungry:
    """Claims scratch memory: so many bytes for each row of a call."""

    def __init__(self, net: DeviceNet, per_row: int) -> None:
        self.net, self.per_row = net, per_row

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def scratch(self, shapes: Shapes) -> int:
        return self.per_row * next(iter(shapes.values()))[0]

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundNet:
        return self.net.bind(shapes, addresses, scratch)


def stand_in(
    device: HostDevice | None = None,
    *,
    wrap: Wrap = lambda name, net: net,
    opened: Callable[[HostDevice], None] = lambda device: None,
    backend: str = "stand-in",
    folder: Path = Path("nowhere"),
) -> Opener:
    """An opener on host memory. `wrap` gets each net, `opened` the device each time it is opened."""
    on = device or WatchedDevice(2**30)

    def open_device(
        nets: Sequence[str] = built_nets(PACKAGE), profile: Path | None = None, **layout: Any
    ) -> Any:
        opened(on)
        found = {}
        for name in nets:
            net = open_onnxruntime_net(
                PACKAGE, name, on, provider=CPU, submit=on.submit, threads=1, profile=profile
            )
            found[name] = wrap(name, Hungry(net, 2 * MIB if name in ("unet", "vae_decoder") else 0))
        return on, found

    task = Task(model=PACKAGE.root, backend=backend, threads=1)
    watch: Any = lambda: on  # noqa: E731
    return Opener(
        task=task,
        package=PACKAGE,
        open_device=open_device,
        watch=watch,
        folder=folder,
    )


@contextmanager
def in_process(opener: Opener, name: str, module: str, task: Task) -> Iterator[Any]:
    """What a verb needs of a `SideProcess`, in this process; ours is what the opener opens."""
    with ExitStack() as stack:
        if module == OURS:
            opened = stack.enter_context(opener.pipeline())
            side = device_side(opened.pipe, opened.loop)
        else:
            side = open_side(module, task)
        stack.callback(side.close)

        def prepare(workload: str, case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            with closing(side.prepare(workload, case)) as work:
                work.run()
                return {}, {output: array.copy() for output, array in work.outputs().items()}

        yield SimpleNamespace(name=name, stamp={}, prepare=prepare)
