"""What values reach in a net, measured by ONNX Runtime on the inputs of pictures that are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...engines.onnxruntime.lowering.files import give_weights, read_graph
from ...engines.onnxruntime.session import CPU, open_session, run_error, session_options
from ...engines.package import Package
from ...engines.spec import Array
from .places import Place

if TYPE_CHECKING:
    import onnx_ir as ir

Inputs = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a tensor reaches over all inputs.

    Attributes:
        peak: the largest magnitude.
        rms: the root of the mean square.
        channels: (C,) float32, each channel's largest magnitude, of what matrices are multiplied with.
    """

    peak: float
    rms: float
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
    import onnx_ir

    model = read_graph(package, net)
    wanted = {place.data: place.operator for place in places}
    _probe(model, wanted)
    options = session_options(None)
    give_weights(options, package, net)
    path = package.path(package.manifest.nets[net].graph)
    content = cast(Any, onnx_ir).to_proto(model).SerializeToString()
    session: Any = open_session(path, options, [CPU], culprit=net, content=content)
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
    square = float(np.mean(found[f"{name}/square"]))
    return Range(peak=float(peaks.max()), rms=square**0.5, channels=None if operator == "Conv" else peaks)


def _probe(model: ir.Model, wanted: Mapping[str, str]) -> None:
    """Have a graph put out the peaks and mean squares of some tensors in place of its outputs."""
    import onnx_ir as ir

    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    del graph.outputs[:]

    def add(operator: str, inputs: list[Any], name: str, **numbers: int) -> ir.Value:
        node = ir.node(operator, inputs, numbers, num_outputs=1)
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        graph.append(node)
        return node.outputs[0]

    last = ir.node("Constant", [], {"value": ir.tensor(np.array([-1], np.int64))}, num_outputs=1)
    last.outputs[0].name = "ranges/last"
    graph.append(last)
    for name, operator in wanted.items():
        wide = add("Cast", [values[name]], f"{name}/wide", to=int(ir.DataType.FLOAT))
        size = add("Abs", [wide], f"{name}/size")
        if operator != "Conv":  # (…, C) -> (rows, C)
            rows = [size, _shape_of_rows(graph, wide, last.outputs[0], name)]
            size = add("Reshape", rows, f"{name}/rows")
            axes = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))}, num_outputs=1)
            axes.outputs[0].name = f"{name}/axes"
            graph.append(axes)
            graph.outputs.append(add("ReduceMax", [size, axes.outputs[0]], f"{name}/peak", keepdims=0))
        else:
            graph.outputs.append(add("ReduceMax", [size], f"{name}/peak", keepdims=0))
        square = add("Mul", [wide, wide], f"{name}/squared")
        graph.outputs.append(add("ReduceMean", [square], f"{name}/square", keepdims=0))


def _shape_of_rows(graph: ir.Graph, value: ir.Value, last: ir.Value, name: str) -> ir.Value:
    """(-1, C): what only the run knows."""
    import onnx_ir as ir

    channels = ir.node("Shape", [value], {"start": -1}, num_outputs=1)
    shape = ir.node("Concat", [last, channels.outputs[0]], {"axis": 0}, num_outputs=1)
    for node, what in ((channels, "channels"), (shape, "shape")):
        node.outputs[0].name = f"{name}/{what}"
        graph.append(node)
    return shape.outputs[0]
