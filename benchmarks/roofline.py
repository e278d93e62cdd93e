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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from statistics import median
from typing import Any, Literal

import numpy as np

from ..engines.errors import BackendError, PackageError, UsageError
from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS
from ..runtime.request.request import make_request
from ..runtime.sampling.samplers import make_table
from .case import NETS, Case, rows_per_step, sizes_of
from .records import Row
from .sides.contract import CEILING

GEMM, COPY = "gemm", "copy"  # the workloads of the ceiling
_UNITS = {GEMM: "flop", COPY: "byte"}
Kind = Literal["convolution", "linear", "attention", "norm"]

# All that multiplies matrices. A MatMul of two tensors that are no weights is one of attention, too.
_KINDS: Mapping[str, Kind] = {
    "Conv": "convolution",
    "Gemm": "linear",
    "MatMul": "linear",
    "Attention": "attention",
}
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
    path = package.path(package.manifest.nets[net].graph)
    try:
        onnx = import_module("onnx")
    except ImportError as error:
        raise BackendError(
            "onnx is not installed, which reads the graphs whose work is counted",
            expected="the package onnx",
            fix="Install it: pip install onnx.",
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            model = import_module("onnx.inliner").inline_local_functions(model)
        tensors = _Tensors(model, sizes)
    except (UsageError, PackageError):
        raise
    except Exception as error:  # protobuf and onnx have classes of their own
        message = " ".join(str(error).split())[:_LONGEST]
        raise PackageError(
            f"the work of {path} cannot be counted ({type(error).__name__}: {message})",
            expected="a graph of standard operators at sizes that fit it",
            fix="Export the package again, or choose other sizes.",
        ) from error
    return _Count(tensors).work(model.graph)


# Works, and how often each is called.
Parts = Sequence[tuple[int, Work]]


def workload_parts(package: Package, workload: str, case: Case) -> Parts:
    """What a run of a workload (`case.WORKLOADS`) calls; empty for one that calls no net.

    It is the same for every side: a side that does more, such as the same keys and values in every step, is
    further from the floor for it.

    Raises:
        LatentrtError: whatever `net_work` raises, or SamplerError for the case's sampler.
    """
    manifest = package.manifest
    sizes = sizes_of(case, manifest)

    def part(net: str, calls: int = 1, **changes: int) -> tuple[int, Work]:
        return calls, net_work(package, net, {**sizes, **changes})

    if workload == "invariants":
        return [part("unet_context"), part("unet_time")]
    if workload != "picture":
        return [part(workload)] if workload in NETS else []
    # Texts are encoded once, however many pictures; Heun and DPM2 call the UNet twice in a step.
    rows = len(make_table(make_request(manifest, case.prompt, **case.parameters).sampler, case.steps))
    return [
        *(part(net) for net in TEXT_ENCODERS if net in manifest.nets),
        part("unet_context", B=sizes["P"]),
        part("unet_time", S=rows * rows_per_step(case, manifest)),
        part("unet", calls=rows),
        part("vae_decoder"),
    ]


def floors(parts: Parts, *, flop_per_s: float, byte_per_s: float) -> dict[str, float]:
    """The least seconds of some parts, one after the other, on a machine with these ceilings.

    Returns:
        floor_compute_s: FLOPs over the best rate of a matmul.
        floor_bytes_s: least bytes over the rate of a copy.
        floor_s: the larger of the two, net by net.
        floor_layers_s: the larger of the two, layer by layer: each is one kernel, and elementwise work is
            free.
    """
    nets = [(calls, work.flops / flop_per_s, work.least_bytes / byte_per_s) for calls, work in parts]
    return {
        "floor_compute_s": sum(calls * compute for calls, compute, _ in nets),
        "floor_bytes_s": sum(calls * moving for calls, _, moving in nets),
        "floor_s": sum(calls * max(both) for calls, *both in nets),
        "floor_layers_s": sum(
            calls * max(layer.flops / flop_per_s, layer.bytes / byte_per_s)
            for calls, work in parts
            for layer in work.layers
        ),
    }


def with_roofline(rows: Sequence[Row], parts: Parts) -> list[Row]:
    """Rows of one workload and case, and those of the ceilings that took turns with them, with more figures.

    A side's row in seconds gets `flops` and `bytes` of a run (`Work`), `flop_per_s` at its median, and
    `of_best_gemm`, that over the rate of the best matmul; the `floors` at the ceilings' medians, and
    `of_floor`, `floor_s` over the time. A ceiling's own row, whose figures have the `flops` or `bytes` of a
    run, gets `flop_per_s` or `byte_per_s`. The two ratios are medians over rounds where both sides have as
    many: a slow minute then falls on both and leaves their ratio. What no ceiling was measured for is left
    out.

    Args:
        rows: rows that are not "ok", or not in seconds, stay as they are.
        parts: `workload_parts` of that workload and case.
    """
    timed = [row.status == "ok" and row.unit == "s" and bool(row.samples) for row in rows]
    best = {row.workload: row for row, ok in zip(rows, timed, strict=True) if ok and row.side == CEILING}
    found: list[Row] = []
    for row, ok in zip(rows, timed, strict=True):
        figures: dict[str, Any] = {}
        if ok and row.side == CEILING:
            unit = _UNITS[row.workload]
            figures = {f"{unit}_per_s": row.figures[f"{unit}s"] / row.summary["p50"]}
        elif ok and parts:
            figures = _figures(row, parts, best.get(GEMM), best.get(COPY))
        found.append(replace(row, figures={**row.figures, **figures}))
    return found


def _figures(row: Row, parts: Parts, gemm: Row | None, copy: Row | None) -> dict[str, Any]:
    flops = sum(calls * work.flops for calls, work in parts)
    size = sum(calls * work.least_bytes for calls, work in parts)
    found: dict[str, Any] = {"flops": flops, "bytes": size, "flop_per_s": flops / row.summary["p50"]}
    if gemm:
        per_run = flops / gemm.figures["flops"]
        found["of_best_gemm"] = median(per_run * ceiling / own for own, ceiling in _turns(row, gemm))
    if gemm and copy:
        work, moved = gemm.figures["flops"], copy.figures["bytes"]

        def at(gemm_s: float, copy_s: float) -> dict[str, float]:
            return floors(parts, flop_per_s=work / gemm_s, byte_per_s=moved / copy_s)

        shares = [at(*best)["floor_s"] / own for own, *best in _turns(row, gemm, copy)]
        found |= {**at(gemm.summary["p50"], copy.summary["p50"]), "of_floor": median(shares)}
    return found


def _turns(*rows: Row) -> list[tuple[float, ...]]:
    """The rows' medians, round by round; over all rounds where they do not have as many."""
    if len({len(row.rounds) for row in rows}) == 1 and all(turn for row in rows for turn in row.rounds):
        return [tuple(map(median, turns)) for turns in zip(*(row.rounds for row in rows), strict=True)]
    return [tuple(row.summary["p50"] for row in rows)]


# ── counting ───────────────────────────────────────────────────────────────────────────────────────


class _Tensors:
    """The type of every tensor of a model, the values of those that are computed of sizes, and constants.

    onnx infers each node's output by itself, and is told the values of its inputs: over a whole graph
    (`infer_shapes`, also with `data_prop`, 1.23) it loses those that go through a Reshape or Div.

    Attributes:
        roots: of each constant, the weight that it is made of.
    """

    def __init__(self, model: Any, sizes: Mapping[str, int]) -> None:
        self._onnx = import_module("onnx")
        graph = model.graph
        for value in graph.input:
            _set_sizes(value, sizes)
        make_type = import_module("onnx.helper").make_tensor_type_proto
        self._types: dict[str, Any] = {value.name: value.type for value in graph.input}
        self._types |= {item.name: make_type(item.data_type, item.dims) for item in graph.initializer}
        self._values = {item.name: item for item in graph.initializer if not item.external_data}
        self.roots = {item.name: item.name for item in graph.initializer}
        opsets = list(model.opset_import)
        versions = {opset.domain: opset.version for opset in opsets}
        for node in graph.node:
            schema = self._onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
            sources = [name for name in node.input if name]
            if self._computes_sizes(node) or not sources:
                self.roots[node.output[0]] = node.output[0]
            elif all(name in self.roots for name in sources):
                self.roots.update(dict.fromkeys(node.output, self.roots[sources[0]]))
            self._types |= self._onnx.shape_inference.infer_node_outputs(
                schema, node, {name: self._types[name] for name in sources}, self._values, None, opsets
            )
            if node.op_type == "GroupNormalization":  # onnx 1.23 infers nothing of it
                self._types[node.output[0]] = self._types[node.input[0]]

    def _computes_sizes(self, node: Any) -> bool:
        """Whether the node's output depends on sizes alone; its value is kept then."""
        helper = import_module("onnx.numpy_helper")
        name, *more = node.output
        if node.op_type == "Shape":
            limits = {item.name: item.i for item in node.attribute}
            value = np.array(self.shape(node.input[0])[limits.get("start", 0) : limits.get("end")], np.int64)
        elif not more and node.input and all(self._is_size(source) for source in node.input):
            evaluator = import_module("onnx.reference").ReferenceEvaluator(node)
            given = {source: helper.to_array(self._values[source]) for source in node.input}
            value = np.asarray(evaluator.run(None, given)[0])
        else:
            return False
        self._values[name] = helper.from_array(value)
        return True

    def _is_size(self, name: str) -> bool:
        return name in self._values and self._values[name].data_type == self._onnx.TensorProto.INT64

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises PackageError where inference found none."""
        kind = self._types[name].tensor_type
        if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
            raise PackageError(
                f"the shape of the tensor {name!r} does not follow from the inputs'",
                expected="a graph whose shapes depend on the sizes of its inputs alone",
                fix="Export the package again with this release.",
            )
        return tuple(dim.dim_value for dim in kind.shape.dim)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of its elements."""
        as_numpy = import_module("onnx.helper").tensor_dtype_to_np_dtype
        return as_numpy(self._types[name].tensor_type.elem_type)

    def nbytes(self, *names: str) -> int:
        """Bytes of all their elements."""
        return sum(prod(self.shape(name)) * self.dtype(name).itemsize for name in names)


def _set_sizes(value: Any, sizes: Mapping[str, int]) -> None:
    """Put numbers in place of the symbols in an input's shape."""
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_param and dim.dim_param not in sizes:
            raise UsageError(
                f"no size for {dim.dim_param!r} of the input {value.name!r}",
                expected=f"one besides those of {', '.join(sorted(sizes)) or 'none'}",
                fix="Add it to `sizes`.",
            )
        if dim.dim_param:
            dim.dim_value = sizes[dim.dim_param]


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
            parameters=sum(
                prod(tensors.shape(root)) for root in self._read if tensors.dtype(root).kind not in "iub"
            ),
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
        elif node.op_type in _KINDS:
            size = tensors.nbytes(*filter(None, node.input), written)
            self._layers.append(Layer(kind=_KINDS[node.op_type], flops=_flops(node, tensors), bytes=size))
        elif node.op_type in _ON_SCORES:
            begun = [self._scores[name] for name in node.input if name in self._scores]
            if begun:
                self._scores[written] = begun[0]

    def _add_matmul_of_attention(self, node: Any) -> None:
        """Scores begin a layer; shares times values end it, and then the scores need not be stored."""
        left, right, written = map(self._tensors.nbytes, (*node.input, node.output[0]))
        flops = _flops(node, self._tensors)
        if node.input[0] in self._scores:
            index, scores = self._scores[node.input[0]]
            begun = self._layers[index]
            size = begun.bytes - scores + right + written
            self._layers[index] = replace(begun, flops=begun.flops + flops, bytes=size)
            return
        self._scores[node.output[0]] = len(self._layers), written
        self._layers.append(Layer(kind="attention", flops=flops, bytes=left + right + written))


def _flops(node: Any, tensors: _Tensors) -> int:
    """FLOPs of an operator of `_KINDS`."""
    left, right, written = (tensors.shape(name) for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Attention":  # each of T keys meets every query, and each of T values every output
        return 2 * right[-2] * (prod(left) + prod(written))  # keys are (B, H, T, D) or (B, T, H*D)
    if node.op_type == "Conv":
        return 2 * prod(written) * prod(right[1:])  # (Cout, Cin / groups, *kernel)
    turned = node.op_type == "Gemm" and any(item.name == "transA" and item.i for item in node.attribute)
    return 2 * prod(written) * left[0 if turned else -1]
