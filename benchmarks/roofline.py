"""How far a row is from what the machine can do: floors of the nets' work, by ceilings of the same run.

The roofline model: no less time than FLOPs over the best rate of a matmul, nor than bytes over the rate of a
copy (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009). It assumes that convolutions are direct,
and that no cache outlives a net's call. A fraction above 1 is possible, then, and says which of the two does
not hold: Winograd's convolution, or weights that fit the last cache.

Work is counted on a net's ONNX graph alone, as `torch.utils.flop_counter` counts it: a multiply-add is 2
FLOP, a convolution is the direct one, both matmuls of attention count; norms, softmax and elementwise work
do not. No weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from statistics import median
from typing import Any

import numpy as np

from ..engines.errors import LatentrtError, PackageError, UsageError
from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS
from ..runtime.request.request import make_request
from ..runtime.sampling.samplers import make_table
from .case import NETS, Case, rows_per_step, sizes_of
from .records import Row, short
from .sides.contract import CEILING, bench_library

GEMM, COPY = "gemm", "copy"  # the workloads of the ceiling
_UNITS = {GEMM: "flop", COPY: "byte"}
_COUNTED = ("Conv", "Gemm", "MatMul", "Attention")
# They multiply matrices too, or hold graphs of their own; nothing that we export has them.
_NOT_COUNTED = (
    *("ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"),
    *("MatMulInteger", "QLinearMatMul", "Einsum", "LSTM", "GRU", "RNN"),
    *("If", "Loop", "Scan"),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of a net is.

    Attributes:
        flops: of all that multiplies matrices.
        least_bytes: what any implementation moves whose caches do not outlive the call: weights once, as they
            are read after the graph's own casts (of a table only the rows that are looked up), inputs and
            outputs once.
    """

    flops: int
    least_bytes: int


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
    path, onnx = package.path(package.manifest.nets[net].graph), bench_library("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        model = import_module("onnx.inliner").inline_local_functions(model)
        tensors = _Tensors(model, sizes)
    except LatentrtError:
        raise
    except Exception as error:  # protobuf and onnx have classes of their own
        raise PackageError(
            f"the work of {path} cannot be counted ({type(error).__name__}: {short(str(error))})",
            expected="a graph of standard operators at sizes that fit it",
            fix="Export the package again, or choose other sizes.",
        ) from error
    return _count(model.graph, tensors)


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


def floor_s(parts: Parts, *, flop_per_s: float, byte_per_s: float) -> float:
    """The least seconds of some parts, one after the other, on a machine with these ceilings.

    Of each net the larger counts: FLOPs over the best rate of a matmul, or least bytes over that of a copy.
    """
    return sum(calls * max(work.flops / flop_per_s, work.least_bytes / byte_per_s) for calls, work in parts)


def with_roofline(rows: Sequence[Row], parts: Parts) -> list[Row]:
    """Rows of one workload and case, and those of the ceilings that took turns with them, with more figures.

    docs/benchmarks.md has the figures. Ratios are medians over rounds where both sides have as many: a slow
    minute then falls on both and leaves their ratio. What no ceiling was measured for is left out.

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

        def at(gemm_s: float, copy_s: float) -> float:
            return floor_s(parts, flop_per_s=work / gemm_s, byte_per_s=moved / copy_s)

        found["floor_s"] = at(gemm.summary["p50"], copy.summary["p50"])
        found["of_floor"] = median(at(*best) / own for own, *best in _turns(row, gemm, copy))
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
        self._onnx: Any = import_module("onnx")
        graph, type_of = model.graph, self._onnx.helper.make_tensor_type_proto
        for value in graph.input:
            _set_sizes(value, sizes)
        self._types: dict[str, Any] = {value.name: value.type for value in graph.input}
        self._types |= {item.name: type_of(item.data_type, item.dims) for item in graph.initializer}
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
        helper, int64 = self._onnx.numpy_helper, self._onnx.TensorProto.INT64
        known = [item for name in node.input if (item := self._values.get(name)) and item.data_type == int64]
        name, *more = node.output
        if node.op_type == "Shape":
            limits = {item.name: item.i for item in node.attribute}
            value = np.array(self.shape(node.input[0])[limits.get("start", 0) : limits.get("end")], np.int64)
        elif known and len(known) == len(node.input) and not more:
            given = {source: helper.to_array(item) for source, item in zip(node.input, known, strict=True)}
            (value,) = import_module("onnx.reference").ReferenceEvaluator(node).run(None, given)
        else:
            return False
        self._values[name] = helper.from_array(np.asarray(value))
        return True

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

    def nbytes(self, name: str) -> int:
        """Bytes of all its elements."""
        kind = self._onnx.helper.tensor_dtype_to_np_dtype(self._types[name].tensor_type.elem_type)
        return prod(self.shape(name)) * kind.itemsize


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


def _count(graph: Any, tensors: _Tensors) -> Work:
    """Go through a graph once. What is computed of constants alone is no work of a call."""
    flops = 0
    read: dict[str, int] = {}  # weight -> bytes of it that are needed, as they are read
    for node in graph.node:
        written = node.output[0]
        if written in tensors.roots:
            continue
        if node.op_type in _NOT_COUNTED:
            raise PackageError(
                f"the work of the operator {node.op_type} ({node.name or written}) is not counted",
                expected=", ".join(_COUNTED),
                fix="Export the package again with this release, or teach `roofline.py` the operator.",
            )
        if node.op_type in _COUNTED:
            flops += _flops(node, tensors)
        for position, name in enumerate(node.input):
            if (root := tensors.roots.get(name)) is not None:
                size = tensors.nbytes(name)
                if (node.op_type, position) == ("Gather", 0):
                    size = min(size, tensors.nbytes(written))
                read[root] = max(size, read.get(root, 0))
    outside = sum(tensors.nbytes(value.name) for value in (*graph.input, *graph.output))
    return Work(flops=flops, least_bytes=outside + sum(read.values()))


def _flops(node: Any, tensors: _Tensors) -> int:
    """FLOPs of an operator of `_COUNTED`."""
    left, right, written = (tensors.shape(name) for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Attention":  # each of T keys meets every query, and each of T values every output
        return 2 * right[-2] * (prod(left) + prod(written))  # keys are (B, H, T, D) or (B, T, H*D)
    if node.op_type == "Conv":
        return 2 * prod(written) * prod(right[1:])  # (Cout, Cin / groups, *kernel)
    turned = node.op_type == "Gemm" and any(item.name == "transA" and item.i for item in node.attribute)
    return 2 * prod(written) * left[0 if turned else -1]
