"""The layouts of ONNX Runtime's nets on the CPU, measured and remembered in the engine store.

`latentrt build PACKAGE --backend onnxruntime` measures; opening a net only looks (`cpu_layouts.py`). An entry
is one net on one kind of processor, with one number of cores and one release of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...errors import BackendError
from ...package import Package
from ...spec import Array
from ...store.engine_store import BuiltEngine, EngineStore, Miss, OnProgress, Report, build_missing
from ...tuning.choice import (
    Measured,
    allowed_distance,
    choice_facts,
    choose_layout,
    measured_profile,
    rounding_of,
    tuned_nets,
)
from ...tuning.runs import measured_inputs, milliseconds
from ..lowering.byte_sums import check_sums
from ..lowering.files import LoweredGraph, check_lowering, open_as_written, read_graph, write_graph
from ..lowering.fused import lower_attention, lower_geglus, lower_group_norms
from ..lowering.rounded import lower_rounded
from ..lowering.winograd import Kernel, lower_convolutions
from ..nets import OnnxRuntimeNet
from ..session import library
from .cpu_layouts import INT8, cpu_key, layouts_of

CPU_ROUNDS = 4  # a UNet takes seconds: few rounds tell layouts apart that differ by a tenth
_WARM_UP = 1


def lower_for_cpu(package: Package, net: str, layout: str, folder: Path) -> LoweredGraph:
    """A net in one of its layouts but `plain`, by way of a file in `folder`.

    Raises:
        BackendError: onnx-ir is not installed, or nothing in the graph is worth lowering.
        PackageError: onnx-ir cannot read the graph.
    """
    model = read_graph(package, net)
    lowered = sum(lower(model) for lower in (lower_group_norms, lower_geglus, lower_attention))
    kernels = tuple[Kernel, ...]()
    if layout == "winograd":
        kernels = lower_convolutions(model, _weights_name(package, net))
        lowered = len(kernels)
    elif layout == INT8:
        lowered = lower_rounded(model, _pixels(package, net))
    if not lowered:
        raise BackendError(
            f"{net} has nothing in float32 that the layout {layout!r} lowers",
            expected="rounded products for 'int8', 3x3 convolutions for 'winograd', normalisation or"
            " self-attention for 'fused'",
            fix="Use the graph as it is.",
        )
    return LoweredGraph(
        layout=layout, graph=write_graph(model, folder / f"{net}.onnx").read_bytes(), kernels=kernels
    )


def _pixels(package: Package, net: str) -> int:
    """How many pixels the images have that a net is measured with."""
    first = package.manifest.nets[net].spec.inputs[0].name
    batch, _, *sides = measured_profile(package, net).shapes[first][1]
    return batch * prod(sides)


def _weights_name(package: Package, net: str) -> str:
    """What a graph of this net can call a weights file that is there; "" for a net without weights."""
    weights = package.manifest.nets[net].weights
    return package.path(weights[0]).relative_to(package.weights_folder(net)).as_posix() if weights else ""


def tune_package(
    package: Package,
    store: EngineStore,
    progress: OnProgress | None = None,
    *,
    nets: Iterable[str] = (),
    rounds: int = CPU_ROUNDS,
) -> tuple[BuiltEngine, ...]:
    """Make sure that the store has the fastest layout of every net that has a choice, on this CPU.

    Takes a dozen runs of each net, and while it lasts the memory of three sessions of it.

    Raises:
        BackendError: something is to be measured and onnx-ir is not installed.
        UsageError: a name in `nets` that has no choice.
        StorageError: the store cannot be written.
        LatentrtError: whatever opening and running the package's own graph raises.
    """

    def measure(net: str, path: Path, report: Report) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            return _Trials(package, net, Path(folder), report, rounds).choose(path)

    version = str(library().__version__)
    found = [store.find(cpu_key(package, net, version)) for net in tuned_nets(package, nets)]
    if any(isinstance(item, Miss) for item in found):
        check_lowering()  # before minutes are spent on a choice of one
    return build_missing(store, found, measure, progress)


@dataclass
class _Trials:
    """The layouts of one net, with the same random inputs."""

    package: Package
    net: str
    folder: Path
    report: Report
    rounds: int
    done: int = 0
    inputs: dict[str, Array] = field(default_factory=dict[str, Array])

    def choose(self, path: Path) -> dict[str, Any]:
        """Write the graph of the fastest layout to `path`, and return the figures."""
        manifest = self.package.manifest
        self.inputs = measured_inputs(self.package, self.net)
        choice = choose_layout(
            self.measure,
            layouts_of(self.package, self.net),
            rounds=self.rounds,
            warm_up=_WARM_UP,
            parity=allowed_distance(self.package, self.net),
        )
        facts = choice_facts(choice)
        if choice.layout != "plain":
            lowered = lower_for_cpu(self.package, self.net, choice.layout, self.folder)
            path.write_bytes(lowered.graph)
            return {**facts, "kernels": [kernel.to_json() for kernel in lowered.kernels]}
        path.write_bytes(self.package.path(manifest.nets[self.net].graph).read_bytes())
        return facts

    def measure(self, name: str) -> Measured:
        """Open the net in the layout of that name, and run it once. Raises LatentrtError.

        What others are compared with is computed node by node where products are rounded: the library fuses
        those of `plain` too, and then they may saturate.
        """
        self.report(f"opening {name}", 0.0)
        if name == INT8:
            check_sums()
        lowered = lower_for_cpu(self.package, self.net, name, self.folder) if name != "plain" else None
        with ExitStack() as stack:
            net = stack.enter_context(OnnxRuntimeNet(self.package, self.net, lowered=lowered))
            rounded = rounding_of(self.package, self.net)
            outputs = self.as_written() if rounded and lowered is None else net(**self.inputs)
            opened = stack.pop_all()
        return Measured(outputs=outputs, run=lambda: self.time(name, net), close=opened.close)

    def as_written(self) -> dict[str, Array]:
        """The outputs of the package's own graph, node by node. Raises as `open_as_written`."""
        names = [output.name for output in self.package.manifest.nets[self.net].spec.outputs]
        session = open_as_written(self.package, self.net)
        return dict(zip(names, session.run(names, self.inputs), strict=True))

    def time(self, name: str, net: OnnxRuntimeNet) -> float:
        """Milliseconds of one run."""
        self.done += 1
        total = (self.rounds + _WARM_UP) * len(layouts_of(self.package, self.net))
        self.report(f"timing {name}", min(self.done / total, 1.0))
        return milliseconds(lambda: net(**self.inputs))
