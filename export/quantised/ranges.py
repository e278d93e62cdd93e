"""What values reach in a net, measured by ONNX Runtime on the inputs of pictures that are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...engines.onnxruntime.lowering.files import open_changed, read_graph
from ...engines.onnxruntime.session import run_error
from ...engines.package import Package
from ...engines.spec import Array
from .places import Place

if TYPE_CHECKING:
    import onnx_ir as ir

Inputs = Mapping[str, Array]

# About how many rows of a tensor are sampled in each call, and values of an image: of 24 calls 10^5 values.
_ROWS, _VALUES = 4, 4096
_END = np.iinfo(np.int64).max  # of a Slice: as far as there is


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a tensor reaches over all inputs.

    Attributes:
        peak: the largest magnitude.
        sample: (rows, C) float32, some of the rows, evenly from everywhere; of images (values, 1).
        channels: (C,) float32, each channel's largest magnitude, of what matrices are multiplied with.
    """

    peak: float
    sample: Array
    channels: Array | None = None


def measure_ranges(
    package: Package, net: str, places: Iterable[Place], inputs: Iterable[Inputs]
) -> dict[str, Range]:
    """What the data of every place reaches, by its name.

    It is found inside the graph, so that what leaves it for each tensor is a few numbers.

    Raises:
        PackageError: the graph cannot be read.
        MemoryLimitError: the net does not fit.
        BackendError: an input is not the net's.
    """
    model = read_graph(package, net)
    wanted = {place.data: place.operator for place in places}
    _probe(model, wanted)
    session = open_changed(package, net, model)
    names = [output.name for output in session.get_outputs()]
    found: dict[str, list[Array]] = {name: [] for name in names}
    for feeds in inputs:
        try:
            results = session.run(names, dict(feeds))
        except Exception as error:  # onnxruntime raises a dozen classes of its own
            raise run_error(net, error, {name: value.shape for name, value in feeds.items()}) from error
        for name, value in zip(names, results, strict=True):
            found[name].append(value)
    return {name: _range(found, name, operator) for name, operator in wanted.items()}


def _range(found: Mapping[str, list[Array]], name: str, operator: str) -> Range:
    peaks = np.max(found[f"{name}/peak"], axis=0)
    sample = np.concatenate(found[f"{name}/sample"])
    return Range(peak=float(peaks.max()), sample=sample, channels=None if operator == "Conv" else peaks)


def _probe(model: ir.Model, wanted: Mapping[str, str]) -> None:
    """Have a graph put out the peaks and samples of some tensors in place of its outputs."""
    import onnx_ir as ir

    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    del graph.outputs[:]

    def add(operator: str, inputs: Sequence[ir.Value], name: str, **numbers: int) -> ir.Value:
        node = ir.node(operator, inputs, numbers, num_outputs=1)
        node.outputs[0].name = name
        graph.append(node)
        return node.outputs[0]

    def ints(*numbers: int) -> ir.Value:
        name = "ranges/" + ",".join(map(str, numbers))
        if name not in values:
            tensor = ir.tensor(np.array(numbers, np.int64))
            node = ir.node("Constant", [], {"value": tensor}, num_outputs=1)
            node.outputs[0].name = name
            graph.append(node)
            values[name] = node.outputs[0]
        return values[name]

    for name, operator in wanted.items():
        wide = add("Cast", [values[name]], f"{name}/wide", to=int(ir.DataType.FLOAT))
        shape = ints(-1, 1)
        if operator != "Conv":  # (…, C) -> (rows, C)
            channels = add("Shape", [wide], f"{name}/channels", start=-1)
            shape = add("Concat", [ints(-1), channels], f"{name}/shape", axis=0)
        rows = add("Reshape", [wide, shape], f"{name}/rows")
        size = add("Abs", [rows], f"{name}/size")
        peak = add("ReduceMax", [size, ints(0)], f"{name}/peak", keepdims=0)
        # An odd step is none of a width's divisors, so that all columns of an image have their turn.
        count = add("Shape", [rows], f"{name}/count", start=0, end=1)
        half = add("Div", [count, ints(2 * (_VALUES if operator == "Conv" else _ROWS))], f"{name}/half")
        step = add("Add", [add("Mul", [half, ints(2)], f"{name}/even"), ints(1)], f"{name}/step")
        sample = add("Slice", [rows, ints(0), ints(_END), ints(0), step], f"{name}/sample")
        for output in (peak, sample):
            output.dtype = ir.DataType.FLOAT
            graph.outputs.append(output)
