"""Measures the layouts of ONNX Runtime's CUDA nets on the device at hand; the engine store remembers them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ...cuda.device import CudaDevice
from ...cuda.facts import DeviceFacts
from ...device import BoundNet, Device, DeviceNet
from ...errors import BackendError
from ...package import Package
from ...profiles import NetProfile
from ...spec import DTYPES, Array, output_shapes
from ...store.building import BuiltEngine, OnProgress, Report, build_missing
from ...store.engine_store import EngineStore
from ...tolerances import NET_RELATIVE_L2
from ..lowering.files import lowering_missing
from ..lowering.lower import lower
from ..nets import cuda_available, open_onnxruntime_net
from .choice import ROUNDS, WARM_UP, Measured, choice_facts, choose_layout, measured_profile, tuned_nets
from .cuda_layouts import CUDA_LAYOUTS, CudaLayout, layout_key

RUNS = 4  # enqueued for one wait, as the loop enqueues them
_SEED = 0


class KnownDevice(Device, Protocol):
    """A device that knows what it is."""

    @property
    def facts(self) -> DeviceFacts:
        """What the key of a layout is made of."""
        ...


class OpenNet(Protocol):
    """The part of `open_onnxruntime_net` that measuring calls."""

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


def tune_package(
    package: Package,
    store: EngineStore,
    progress: OnProgress | None = None,
    *,
    nets: Iterable[str] = (),
    device: KnownDevice | None = None,
    open_net: OpenNet = open_onnxruntime_net,
    rounds: int = ROUNDS,
) -> tuple[BuiltEngine, ...]:
    """Make sure that the store has the fastest layout of every net that has a choice.

    Takes seconds, and while it lasts the memory of three sessions of one net.

    Args:
        package: the package.
        store: where the choices go.
        progress: called with how far it is.
        nets: only these of TUNED_NETS.
        device: to measure on, which stays open; the first CUDA device unless given.
        open_net: opens a net there.
        rounds: how often each layout is timed.

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
        if reason := lowering_missing():
            raise BackendError(
                f"there is no layout but `plain` to measure: {reason}",
                expected="onnx-ir, which lowers graphs, beside onnxruntime-gpu",
                fix='Install it: pip install "latentrt[cuda]".',
            )
        bench = _Bench(package=package, device=device, open_net=open_net, rounds=rounds)
        found = [store.find(layout_key(package, net, device.facts)) for net in names]
        return build_missing(store, found, bench.measure, progress)


def _cuda_device() -> CudaDevice:
    if reason := cuda_available():
        raise BackendError(
            f"layouts are measured on the GPU that runs them, and onnxruntime cannot use one here: {reason}",
            expected="onnxruntime-gpu, an NVIDIA driver and a CUDA device",
            fix='Run it on the machine that has the GPU, after: pip install "latentrt[cuda]".',
        )
    return CudaDevice()


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """One call of `tune_package`."""

    package: Package
    device: KnownDevice
    open_net: OpenNet
    rounds: int

    def measure(self, net: str, path: Path, report: Report) -> dict[str, Any]:
        """Write the graph of the fastest layout to `path`, and return the figures."""
        profile = measured_profile(self.package, net)
        with TemporaryDirectory() as folder:
            trials = _Trials(
                self.package,
                profile,
                self.device,
                self.open_net,
                Path(folder),
                report=report,
                rounds=self.rounds + WARM_UP,
            )
            with trials:
                choice = choose_layout(
                    trials.measure,
                    tuple(CUDA_LAYOUTS),
                    # Also in fp32: what `plain` makes of group normalisation is itself up to 7e-4 off
                    # (`lowering/group_norm.py`), so a better layout may be 1e-4 away from it.
                    parity=NET_RELATIVE_L2["fp16"],
                    rounds=self.rounds,
                )
            path.write_bytes(trials.graph(CUDA_LAYOUTS[choice.layout]).read_bytes())
        return choice_facts(choice)


class _Trials:
    """Runs one net in each of its layouts: all share inputs and outputs on the device; a context manager.

    Args:
        package: the package.
        profile: the net, and its shapes: the middle one of each input's.
        device: where to run.
        open_net: opens a net there.
        folder: for lowered graphs.
        report: called with what is being done.
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
        self._total = rounds * len(CUDA_LAYOUTS)
        self._done = 0
        self._inputs = {name: shapes[1] for name, shapes in profile.shapes.items()}
        self._shapes = {**self._inputs, **output_shapes(self._spec, self._inputs)}
        self._addresses: dict[str, int] = {}
        self._held = ExitStack()

    def __enter__(self) -> _Trials:
        """Allocate everything, and upload random inputs, the same each time. Raises MemoryLimitError."""
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

    def graph(self, layout: CudaLayout) -> Path:
        """The graph of a layout, lowered if the layout wants that. Raises BackendError, PackageError."""
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
        layout = CUDA_LAYOUTS[name]
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
