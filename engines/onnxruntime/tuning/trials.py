"""Runs one net in each of its layouts on a device, with the same inputs, for `choose_layout` to compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Protocol

import numpy as np

from ...device import BoundNet, Device, DeviceNet
from ...package import Package
from ...profiles import NetProfile
from ...spec import DTYPES, Array, output_shapes
from ..lowering.lower import lower
from .choice import LAYOUTS, Layout, Measured

RUNS = 4  # enqueued for one wait, as the loop enqueues them
_SEED = 0

Report = Callable[[str, float], None]  # what is being done, and how much of it is done (0 to 1)


class OpenNet(Protocol):
    """`open_onnxruntime_net`, as far as it is needed here."""

    def __call__(
        self,
        package: Package,
        name: str,
        device: Device,
        *,
        graph: Path | None = None,
        prefer_nhwc: bool = False,
    ) -> DeviceNet:
        """Load one net of a package onto a device."""
        ...


class Trials:
    """Inputs and outputs on the device, which all layouts of one net share; a context manager.

    Args:
        package: the package.
        profile: the net, and its shapes: the middle one of each input's.
        device: where to run.
        open_net: opens a net there.
        folder: for lowered graphs.
        report: told what is being done.
        rounds: how often each layout will run.
    """

    def __init__(
        self,
        package: Package,
        profile: NetProfile,
        device: Device,
        open_net: OpenNet,
        folder: Path,
        *,
        report: Report,
        rounds: int,
    ) -> None:
        self._package = package
        self._net = profile.net
        self._spec = package.manifest.nets[profile.net].spec
        self._device = device
        self._open_net = open_net
        self._folder = folder
        self._report = report
        self._total = rounds * len(LAYOUTS)
        self._done = 0
        self._inputs = {name: shapes[1] for name, shapes in profile.shapes.items()}
        self._shapes = {**self._inputs, **output_shapes(self._spec, self._inputs)}
        self._addresses: dict[str, int] = {}
        self._held = ExitStack()

    def __enter__(self) -> Trials:
        """Allocate everything, and upload the same random inputs each time. Raises MemoryLimitError."""
        rng = np.random.default_rng(_SEED)
        with ExitStack() as stack:
            for tensor in (*self._spec.inputs, *self._spec.outputs):
                address = self._device.allocate(tensor.nbytes(self._shapes[tensor.name]))
                stack.callback(self._device.free, address)
                self._addresses[tensor.name] = address
            for tensor in self._spec.inputs:
                content = rng.standard_normal(self._shapes[tensor.name]).astype(DTYPES[tensor.dtype])
                self._device.upload(self._addresses[tensor.name], content)
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free inputs and outputs; what `measure` opened must be closed before."""
        self._held.close()

    def graph(self, layout: Layout) -> Path:
        """The graph of a layout, lowered where that is what it takes. Raises BackendError, PackageError."""
        if not layout.lowered:
            return self._package.path(self._package.manifest.nets[self._net].graph)
        path = self._folder / layout.name / f"{self._net}.onnx"
        if path.exists():
            return path
        return lower(self._package, self._net, path.parent, convolutions=layout.convolutions)

    def measure(self, name: str) -> Measured:
        """Open the net in the layout of that name, and run it once.

        Raises:
            LatentrtError: it cannot be lowered, opened, bound or run.
        """
        layout = LAYOUTS[name]
        self._report(f"opening {name}", self._done / self._total)
        graph = self.graph(layout) if layout.lowered else None
        with ExitStack() as stack:
            net = self._open_net(
                self._package, self._net, self._device, graph=graph, prefer_nhwc=layout.prefer_nhwc
            )
            stack.callback(net.close)
            scratch = net.scratch(self._inputs)
            block = self._device.allocate(scratch) if scratch else 0
            if block:
                stack.callback(self._device.free, block)
            bound = net.bind(self._inputs, self._addresses, block)
            stack.callback(bound.close)
            bound.enqueue()
            outputs = self._read_outputs()
            opened = stack.pop_all()
        return Measured(outputs=outputs, run=lambda: self._time(name, bound), close=opened.close)

    def _read_outputs(self) -> dict[str, Array]:
        outputs: dict[str, Array] = {}
        for tensor in self._spec.outputs:
            outputs[tensor.name] = np.empty(self._shapes[tensor.name], DTYPES[tensor.dtype])
            self._device.download(self._addresses[tensor.name], outputs[tensor.name])
        self._device.synchronize()
        return outputs

    def _time(self, name: str, bound: BoundNet) -> float:
        """Milliseconds of one run."""
        self._done += 1
        self._report(f"timing {name}", min(self._done / self._total, 1.0))
        began = perf_counter()
        for _ in range(RUNS):
            bound.enqueue()
        self._device.synchronize()
        return 1000 * (perf_counter() - began) / RUNS
