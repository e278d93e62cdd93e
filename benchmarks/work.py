"""FLOPs and least traffic of one net at concrete sizes, from its ONNX graph alone: no weight is read.

Counted as the field does: a multiply-add is 2 FLOP, a convolution is the direct one (Winograd's algorithm
needs fewer), both matmuls of attention count; norms, softmax and elementwise work do not.
`torch.utils.flop_counter` counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..engines.errors import BackendError, PackageError, UsageError
from ..engines.package import Package

Kind = Literal["convolution", "linear", "attention", "norm"]

_NORMS = [f"{kind}Normalization" for kind in ("Group", "Layer", "Instance", "Batch", "RMS")]
# What attention without an operator of its own has between its two matmuls: the scores are never stored.
_ON_SCORES = ("Softmax", "Cast", "Mul", "Div", "Add", "Sub", "Where")
_LONGEST = 300  # characters of a library's message: inference names every node behind the first it fails at
# They multiply matrices too, or hold graphs of their own; nothing that we export has them.
_NOT_COUNTED = (
    *("ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"),
    *("MatMulInteger", "QLinearMatMul", "Einsum", "LSTM", "GRU", "RNN"),
    *("If", "Loop", "Scan"),
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operator that is not elementwise. Attention is one layer, also where the graph spells it out.

    Attributes:
        kind: of operator.
        flops: of its matmuls; 0 of a norm.
        bytes: read and written if it is one kernel: inputs and weights once, the output once.
    """

    kind: Kind
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of a net is. Bytes are those of the graph's own dtypes.

    Attributes:
        layers: in the order of the graph.
        parameters: numbers in its weights.
        least_bytes: what any implementation moves whose caches do not outlive the call: weights once, as the
            layers read them after the graph's own casts (of a table only the rows that are looked up),
            inputs and outputs once.
    """

    layers: tuple[Layer, ...]
    parameters: int
    least_bytes: int

    @property
    def flops(self) -> int:
        """The sum over all layers."""
        return sum(layer.flops for layer in self.layers)


def net_work(package: Package, net: str, sizes: Mapping[str, int]) -> Work:
    """What one call of a net is; its weights file need not exist.

    Args:
        package: has the graph.
        net: its name.
        sizes: of every symbol in the net's inputs (`engines.spec`): {"B": 2, "H/8": 64, "W/8": 64, "T": 77}.

    Raises:
        UsageError: a symbol has no size.
        PackageError: the graph cannot be read, or has an operator whose work is not counted.
        BackendError: the library `onnx` is not installed.
    """
    graph, sized = _sized(package.path(package.manifest.nets[net].graph), sizes)
    return _Count(_Tensors(sized)).work(graph)


def _library() -> Any:
    try:
        return import_module("onnx")
    except ImportError as error:
        raise BackendError(
            "onnx is not installed, which reads the graphs whose work is counted",
            expected="the package onnx",
            fix="Install it: pip install onnx.",
        ) from error


def _sized(path: Path, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """The graph, and a model with the shape of every tensor in it."""
    onnx = _library()
    try:
        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            model = import_module("onnx.inliner").inline_local_functions(model)
        _set_sizes(model.graph, sizes)
        sized = onnx.ModelProto.FromString(model.SerializeToString())
        _make_inferable(sized.graph)
        folded = True
        while folded:
            sized = onnx.shape_inference.infer_shapes(sized, strict_mode=True)
            folded = _fold_sizes(sized.graph)
        return model.graph, sized
    except UsageError:
        raise
    except Exception as error:  # protobuf and onnx have classes of their own
        message = " ".join(str(error).split())[:_LONGEST]
        raise PackageError(
            f"the work of {path} cannot be counted ({type(error).__name__}: {message})",
            expected="a graph of standard operators at sizes that fit it",
            fix="Export the package again, or choose other sizes.",
        ) from error


def _fold_sizes(graph: Any) -> bool:
    """Replace nodes that compute with sizes by their results; whether there were any.

    onnx's own data propagation does not go through Reshape and Div (1.23).
    """
    numpy_helper, int64 = import_module("onnx.numpy_helper"), _library().TensorProto.INT64
    shapes = {value.name: _shape(value.type.tensor_type) for value in (*graph.input, *graph.value_info)}
    known = {
        item.name: numpy_helper.to_array(item)
        for item in graph.initializer
        if item.data_type == int64 and not item.external_data
    }
    folded: list[Any] = []
    for node in graph.node:
        value = _size_value(node, shapes, known)
        if value is not None:
            known[node.output[0]] = value
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            folded.append(node)
    for node in folded:
        graph.node.remove(node)
    return bool(folded)


def _size_value(node: Any, shapes: Mapping[str, tuple[int, ...] | None], known: Mapping[str, Any]) -> Any:
    """The int64 array that a node gives, None where it depends on more than sizes."""
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0])
        if shape is None:
            return None
        limits = {item.name: item.i for item in node.attribute}
        return np.array(shape[limits.get("start", 0) : limits.get("end")], np.int64)
    if not node.input or len(node.output) != 1 or any(name not in known for name in node.input):
        return None
    evaluator = import_module("onnx.reference").ReferenceEvaluator(node)
    (value,) = evaluator.run(None, {name: known[name] for name in node.input})
    return np.asarray(value)


def _make_inferable(graph: Any) -> None:
    """onnx 1.23 infers no shape behind GroupNormalization: that of its input."""
    for node in graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]


def _set_sizes(graph: Any, sizes: Mapping[str, int]) -> None:
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_param:
                continue
            if dim.dim_param not in sizes:
                raise UsageError(
                    f"no size for {dim.dim_param!r} of the input {value.name!r}",
                    expected=f"one besides those of {', '.join(sorted(sizes)) or 'none'}",
                    fix="Add it to `sizes`.",
                )
            dim.dim_value = sizes[dim.dim_param]
    del graph.value_info[:]  # shapes in symbols
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _shape(kind: Any) -> tuple[int, ...] | None:
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


class _Tensors:
    """Shape and type of every tensor of a model, and of which weight each constant is made."""

    def __init__(self, model: Any) -> None:
        graph = model.graph
        self._types: dict[str, tuple[tuple[int, ...] | None, int]] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            self._types[value.name] = _shape(value.type.tensor_type), value.type.tensor_type.elem_type
        for weight in graph.initializer:
            self._types[weight.name] = tuple(weight.dims), weight.data_type
        self.roots: dict[str, str] = {weight.name: weight.name for weight in graph.initializer}
        for node in graph.node:
            sources = [name for name in node.input if name]
            if all(name in self.roots for name in sources):
                root = self.roots[sources[0]] if sources else node.output[0]
                self.roots.update(dict.fromkeys(node.output, root))

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises PackageError where inference found none."""
        shape, _ = self._types.get(name, (None, 0))
        if shape is None:
            raise PackageError(
                f"the shape of the tensor {name!r} does not follow from the inputs'",
                expected="a graph whose shapes depend on the sizes of its inputs alone",
                fix="Export the package again with this release.",
            )
        return shape

    def nbytes(self, *names: str) -> int:
        """Bytes of all their elements."""
        width = import_module("onnx.helper").tensor_dtype_to_np_dtype
        return sum(prod(self.shape(name)) * width(self._types[name][1]).itemsize for name in names)

    def is_float(self, name: str) -> bool:
        """Whether it is a parameter, not an index or a shape."""
        proto = _library().TensorProto
        return self._types[name][1] in (proto.FLOAT, proto.FLOAT16, proto.BFLOAT16, proto.DOUBLE)


class _Count:
    """Goes through a graph once."""

    def __init__(self, tensors: _Tensors) -> None:
        self._tensors = tensors
        self._layers: list[Layer] = []
        # tensor -> the layer that began an attention, and bytes of its output
        self._scores: dict[str, tuple[int, int]] = {}
        self._read: dict[str, int] = {}  # weight -> bytes of it that are needed, as they are read

    def work(self, graph: Any) -> Work:
        tensors = self._tensors
        for node in graph.node:
            if node.output[0] not in tensors.roots:
                self._read_weights(node)
                self._add(node)
        return Work(
            layers=tuple(self._layers),
            parameters=sum(prod(tensors.shape(root)) for root in self._read if tensors.is_float(root)),
            least_bytes=tensors.nbytes(*(value.name for value in (*graph.input, *graph.output)))
            + sum(self._read.values()),
        )

    def _read_weights(self, node: Any) -> None:
        for position, name in enumerate(node.input):
            root = self._tensors.roots.get(name)
            if root is not None:
                size = self._tensors.nbytes(name)
                looked_up = (node.op_type, position) == ("Gather", 0)
                rows = self._tensors.nbytes(node.output[0]) if looked_up else size
                self._read[root] = max(min(rows, size), self._read.get(root, 0))

    def _add(self, node: Any) -> None:
        tensors, written = self._tensors, node.output[0]
        if node.op_type in _NOT_COUNTED:
            raise PackageError(
                f"the work of the operator {node.op_type} ({node.name or written}) is not counted",
                expected="Conv, Gemm, MatMul and Attention",
                fix="Export the package again with this release, or teach `benchmarks/work.py` the operator.",
            )
        if node.op_type in _NORMS:
            self._layers.append(Layer(kind="norm", flops=0, bytes=tensors.nbytes(node.input[0], written)))
        elif node.op_type == "MatMul" and not any(name in tensors.roots for name in node.input):
            self._add_matmul_of_attention(node)
        elif node.op_type in _MATMULS:
            kind, flops = _MATMULS[node.op_type]
            size = tensors.nbytes(*filter(None, node.input), written)
            self._layers.append(Layer(kind=kind, flops=flops(node, tensors), bytes=size))
        elif node.op_type in _ON_SCORES:
            begun = [self._scores[name] for name in node.input if name in self._scores]
            if begun:
                self._scores[written] = begun[0]

    def _add_matmul_of_attention(self, node: Any) -> None:
        """Scores begin a layer; shares times values end it, and then the scores need not be stored."""
        left, right, written = map(self._tensors.nbytes, (*node.input, node.output[0]))
        flops = _matmul(node, self._tensors)
        if node.input[0] in self._scores:
            index, scores = self._scores[node.input[0]]
            begun = self._layers[index]
            size = begun.bytes - scores + right + written
            self._layers[index] = replace(begun, flops=begun.flops + flops, bytes=size)
            return
        self._scores[node.output[0]] = len(self._layers), written
        self._layers.append(Layer(kind="attention", flops=flops, bytes=left + right + written))


def _convolution(node: Any, tensors: _Tensors) -> int:
    per_output = prod(tensors.shape(node.input[1])[1:])  # (Cout, Cin / groups, *kernel)
    return 2 * prod(tensors.shape(node.output[0])) * per_output


def _gemm(node: Any, tensors: _Tensors) -> int:
    turned = any(item.name == "transA" and item.i for item in node.attribute)
    inner = tensors.shape(node.input[0])[0 if turned else 1]
    return 2 * prod(tensors.shape(node.output[0])) * inner


def _matmul(node: Any, tensors: _Tensors) -> int:
    return 2 * prod(tensors.shape(node.output[0])) * tensors.shape(node.input[0])[-1]


def _attention(node: Any, tensors: _Tensors) -> int:
    """Each of T keys is multiplied with every query, and each of T values adds to every output."""
    keys = tensors.shape(node.input[1])[-2]  # (B, H, T, D) or (B, T, H*D)
    return 2 * keys * (prod(tensors.shape(node.input[0])) + prod(tensors.shape(node.output[0])))


_MATMULS: Mapping[str, tuple[Kind, Callable[[Any, _Tensors], int]]] = {
    "Conv": ("convolution", _convolution),
    "Gemm": ("linear", _gemm),
    "MatMul": ("linear", _matmul),
    "Attention": ("attention", _attention),
}
