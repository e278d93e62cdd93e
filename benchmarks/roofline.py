"""How far a row is from what the machine can do: floors of the nets' work, by ceilings of the same run.

The roofline model: no less time than FLOPs over the best rate of a matmul, nor than bytes over the rate of a
copy (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009). It assumes that convolutions are direct,
and that no cache outlives a net's call. A fraction above 1 is possible, then, and says which of the two does
not hold: Winograd's convolution, or weights that fit the last cache.

Work is counted on a net's ONNX graph alone, as the field does it: a multiply-add is 2 FLOP, a convolution is
the direct one, both matmuls of attention count; norms, softmax and elementwise work do not.
`torch.utils.flop_counter` counts the same. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from ..engines.errors import BackendError, PackageError, UsageError
from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS
from ..runtime.request.request import make_request
from ..runtime.sampling.samplers import make_table
from .case import Case, rows_per_step, sizes_of
from .records import Row
from .sides.contract import CEILING

GEMM, COPY = "gemm", "copy"  # the workloads of the ceiling
_UNITS = {GEMM: "flop", COPY: "byte"}
# The nets that a workload calls once.
_NETS = {
    "text_encoder": ("text_encoder",),
    "invariants": ("unet_context", "unet_time"),
    "unet": ("unet",),
    "vae_decoder": ("vae_decoder",),
}
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """`calls` calls of one net."""

    work: Work
    calls: int = 1


Parts = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least seconds that some parts take one after the other.

    Attributes:
        compute_s: FLOPs over the best rate of a matmul.
        bytes_s: least bytes over the rate of a copy.
        floor_s: the larger of the two, net by net.
        layers_s: the larger of the two, layer by layer: each is one kernel, and elementwise work is free.
    """

    compute_s: float
    bytes_s: float
    floor_s: float
    layers_s: float


def workload_parts(package: Package, workload: str, case: Case) -> Parts:
    """What a run of a workload (`case.WORKLOADS`) calls; empty for one that calls no net.

    It is the same for every side: a side that does more, such as the same keys and values in every step, is
    further from the floor for it.

    Raises:
        LatentrtError: whatever `net_work` raises, or SamplerError for the case's sampler.
    """
    manifest = package.manifest
    sizes = sizes_of(case, manifest)

    def part(net: str, calls: int = 1, **changes: int) -> Part:
        return Part(work=net_work(package, net, {**sizes, **changes}), calls=calls)

    if workload in _NETS:
        return tuple(map(part, _NETS[workload]))
    if workload != "picture":
        return ()
    # Texts are encoded once, however many pictures; Heun and DPM2 call the UNet twice in a step.
    request = make_request(manifest, case.prompt, **case.parameters)
    rows = len(make_table(request.sampler, case.steps))
    return (
        *(part(net) for net in TEXT_ENCODERS if net in manifest.nets),
        part("unet_context", B=sizes["P"]),
        part("unet_time", S=rows * rows_per_step(case, manifest)),
        part("unet", calls=rows),
        part("vae_decoder"),
    )


def floor(parts: Parts, *, flop_per_s: float, byte_per_s: float) -> Floor:
    """The floors of some parts on a machine with these ceilings."""

    def least(flops: int, size: int) -> tuple[float, float]:
        return flops / flop_per_s, size / byte_per_s

    nets = [(part.calls, least(part.work.flops, part.work.least_bytes)) for part in parts]
    layers = [(part.calls, least(layer.flops, layer.bytes)) for part in parts for layer in part.work.layers]
    return Floor(
        compute_s=sum(calls * compute for calls, (compute, _) in nets),
        bytes_s=sum(calls * moving for calls, (_, moving) in nets),
        floor_s=sum(calls * max(pair) for calls, pair in nets),
        layers_s=sum(calls * max(pair) for calls, pair in layers),
    )


def with_roofline(rows: Sequence[Row], parts: Parts) -> tuple[Row, ...]:
    """Rows of one workload and case, and those of the ceilings that took turns with them, with more figures.

    Each side's row in seconds gets

        flops, bytes         of one run: `Work.flops` and `Work.least_bytes`
        flop_per_s           at the median
        of_best_gemm         that, over the rate of the best matmul
        floor_compute_s, floor_bytes_s, floor_s, floor_layers_s    see Floor; ceilings at their medians
        of_floor             floor_s over the time

    and a ceiling's own row, whose figures have the `flops` or `bytes` of a run, `flop_per_s` or `byte_per_s`.
    The two ratios are medians over rounds where both sides have as many: a slow minute then falls on both
    and leaves their ratio. What no ceiling was measured for is left out.

    Args:
        rows: rows that are not "ok", or not in seconds, stay as they are.
        parts: `workload_parts` of that workload and case.
    """
    ceilings = {row.workload: row for row in rows if row.side == CEILING and _counts(row)}
    return tuple(_with_figures(row, parts, ceilings) if _counts(row) else row for row in rows)


def _counts(row: Row) -> bool:
    return row.status == "ok" and row.unit == "s" and bool(row.samples)


def _with_figures(row: Row, parts: Parts, ceilings: Mapping[str, Row]) -> Row:
    found: dict[str, Any] = {}
    if row.side == CEILING:
        found = {f"{_UNITS[row.workload]}_per_s": _amount(row) / row.summary["p50"]}
    elif parts:
        found = _figures(row, parts, ceilings.get(GEMM), ceilings.get(COPY))
    return replace(row, figures={**row.figures, **found})


def _amount(ceiling: Row) -> float:
    """FLOPs or bytes of one run."""
    return float(ceiling.figures[f"{_UNITS[ceiling.workload]}s"])


def _figures(row: Row, parts: Parts, gemm: Row | None, copy: Row | None) -> dict[str, Any]:
    flops = sum(part.calls * part.work.flops for part in parts)
    size = sum(part.calls * part.work.least_bytes for part in parts)
    found: dict[str, Any] = {"flops": flops, "bytes": size, "flop_per_s": flops / row.summary["p50"]}
    if gemm:
        per_run = flops / _amount(gemm)
        found["of_best_gemm"] = median(per_run * ceiling / own for own, ceiling in _turns(row, gemm))
        found["floor_compute_s"] = per_run * gemm.summary["p50"]
    if copy:
        found["floor_bytes_s"] = size / _amount(copy) * copy.summary["p50"]
    if gemm and copy:
        work, moved = _amount(gemm), _amount(copy)

        def at(gemm_s: float, copy_s: float) -> Floor:
            return floor(parts, flop_per_s=work / gemm_s, byte_per_s=moved / copy_s)

        whole = at(gemm.summary["p50"], copy.summary["p50"])
        shares = [at(gemm_s, copy_s).floor_s / own for own, gemm_s, copy_s in _turns(row, gemm, copy)]
        found |= {"floor_s": whole.floor_s, "floor_layers_s": whole.layers_s, "of_floor": median(shares)}
    return found


def _turns(*rows: Row) -> list[tuple[float, ...]]:
    """The rows' medians, round by round; over all rounds where they do not have as many."""
    if len({len(row.rounds) for row in rows}) == 1 and all(turn for row in rows for turn in row.rounds):
        return [tuple(map(median, turns)) for turns in zip(*(row.rounds for row in rows), strict=True)]
    return [tuple(row.summary["p50"] for row in rows)]


# ── counting ───────────────────────────────────────────────────────────────────────────────────────


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
                fix="Export the package again with this release, or teach `roofline.py` the operator.",
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
