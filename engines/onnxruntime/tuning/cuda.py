"""Measures the layouts of ONNX Runtime's CUDA nets on the device at hand; the engine store remembers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from ...cuda.device import CudaDevice
from ...device import BoundNet, Device, DeviceNet
from ...errors import BackendError
from ...package import Package
from ...spec import DTYPES, Array, output_shapes
from ...store.engine_store import BuiltEngine, EngineStore, OnProgress, Report, build_missing
from ...tolerances import NET_RELATIVE_L2
from ...tuning.choice import (
    ROUNDS,
    WARM_UP,
    Measured,
    choice_facts,
    choose_layout,
    measured_profile,
    tuned_nets,
)
from ..lowering.files import check_lowering
from ..lowering.lower import lower
from ..nets import cuda_refusal, open_onnxruntime_net
from .cuda_layouts import CUDA_LAYOUTS, layout_key

RUNS = 4  # enqueued for one wait, as the loop enqueues them
_SEED = 0


def tune_package(
    package: Package,
    store: EngineStore,
    progress: OnProgress | None = None,
    *,
    nets: Iterable[str] = (),
    device: CudaDevice | None = None,
    open_net: Callable[..., DeviceNet] = open_onnxruntime_net,
    rounds: int = ROUNDS,
) -> tuple[BuiltEngine, ...]:
    """Make sure that the store has the fastest layout of every net that has a choice.

    Takes seconds, and while it lasts the memory of two sessions of one net.

    `nets` picks some of TUNED_NETS; `device` stays open, and is the first CUDA device unless given.

    Raises:
        BackendError: there is no GPU, or onnx-ir is not installed.
        UsageError: a name in `nets` that has no choice.
        StorageError: the store cannot be written.
        LatentrtError: whatever opening and running the package's own graph raises.
    """
    names = tuned_nets(package, nets)
    with ExitStack() as stack:
        if device is None:
            device = _cuda_device()
            stack.callback(device.close)
        check_lowering()

        def measure(net: str, path: Path, report: Report) -> dict[str, Any]:
            with TemporaryDirectory() as folder:
                return _Trials(package, net, device, open_net, Path(folder), report, rounds).choose(path)

        found = [store.find(layout_key(package, net, device.facts)) for net in names]
        return build_missing(store, found, measure, progress)


def _cuda_device() -> CudaDevice:
    if found := cuda_refusal():
        raise BackendError(
            f"layouts are measured on the GPU that runs them, and here is none to use: {found.found}",
            expected=found.expected,
            fix=found.fix,
        )
    return CudaDevice()


@dataclass
class _Trials:
    """The layouts of one net on one device: all share the same random inputs, and the outputs."""

    package: Package
    net: str
    device: Device
    open_net: Callable[..., DeviceNet]
    folder: Path
    report: Report
    rounds: int
    done: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    addresses: dict[str, int] = field(default_factory=dict[str, int])

    def choose(self, path: Path) -> dict[str, Any]:
        """Write the graph of the fastest layout to `path`, and return the figures."""
        spec = self.package.manifest.nets[self.net].spec
        self.shapes = {
            name: shapes[1] for name, shapes in measured_profile(self.package, self.net).shapes.items()
        }
        rng = np.random.default_rng(_SEED)
        every = {**self.shapes, **output_shapes(spec, self.shapes)}
        with ExitStack() as stack:
            for tensor in (*spec.inputs, *spec.outputs):
                address = self.device.allocate(tensor.nbytes(every[tensor.name]))
                stack.callback(self.device.free, address)
                self.addresses[tensor.name] = address
            for tensor in spec.inputs:
                content = rng.standard_normal(every[tensor.name]).astype(DTYPES[tensor.dtype])
                self.device.upload(self.addresses[tensor.name], content)
            choice = choose_layout(
                self.measure,
                CUDA_LAYOUTS,
                # Also in fp32: what `plain` makes of group normalisation is itself up to 7e-4 off
                # (`lowering/fused.py`), so a better layout may be 1e-4 away from it.
                parity=NET_RELATIVE_L2["fp16"],
                rounds=self.rounds,
            )
        path.write_bytes(self.graph(choice.layout).read_bytes())
        return choice_facts(choice)

    def graph(self, layout: str) -> Path:
        """The graph of a layout. Raises BackendError, PackageError."""
        if layout == "plain":
            return self.package.path(self.package.manifest.nets[self.net].graph)
        path = self.folder / layout / f"{self.net}.onnx"
        return path if path.exists() else lower(self.package, self.net, path.parent)

    def measure(self, name: str) -> Measured:
        """Open the net in the layout of that name, and run it once.

        Raises:
            LatentrtError: it cannot be lowered, opened, bound or run.
        """
        self.report(f"opening {name}", self.done / self._total)
        graph = None if name == "plain" else self.graph(name)
        with ExitStack() as stack:
            net = self.open_net(self.package, self.net, self.device, graph=graph)
            stack.callback(net.close)
            block = 0
            if scratch := net.scratch(self.shapes):
                block = self.device.allocate(scratch)
                stack.callback(self.device.free, block)
            bound = net.bind(self.shapes, self.addresses, block)
            stack.callback(bound.close)
            bound.enqueue()
            outputs: dict[str, Array] = {}
            shapes = output_shapes(net.spec, self.shapes)
            for tensor in net.spec.outputs:
                outputs[tensor.name] = np.empty(shapes[tensor.name], DTYPES[tensor.dtype])
                self.device.download(self.addresses[tensor.name], outputs[tensor.name])
            self.device.synchronize()
            opened = stack.pop_all()
        return Measured(outputs=outputs, run=lambda: self.time(name, bound), close=opened.close)

    @property
    def _total(self) -> int:
        return (self.rounds + WARM_UP) * len(CUDA_LAYOUTS)

    def time(self, name: str, bound: BoundNet) -> float:
        """Milliseconds of one run."""
        self.done += 1
        self.report(f"timing {name}", min(self.done / self._total, 1.0))
        began = perf_counter()
        for _ in range(RUNS):
            bound.enqueue()
        self.device.synchronize()
        return 1000 * (perf_counter() - began) / RUNS
