"""fp32 islands from measured ranges: which values of an fp16 graph need more than fp16 can hold.

A float32 twin of the graph runs on a small picture (`calibration.py`) and gives the largest magnitude of
every value. A value is hot beyond LIMIT; the nodes that write or read it become an island.

What counts is what is stored in fp16. Sums within a node do not: convolutions and products accumulate in
float32 in TensorRT and ONNX Runtime, and normalisations take their statistics in float32 (`stash_type` of
the ONNX operators, 1 by default). Attention's scores do count: a fused kernel keeps them in float32, but
nothing promises that an engine finds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ...engines.errors import NumericError
from ...engines.spec import Array
from ..graphs.passes import forget_shapes
from ..graphs.weights import is_weight
from . import islands
from .calibration import Call

FP16_MAX = 65504.0  # IEEE 754 binary16
# How much further than the calibration picture a user's may reach. On the demo model 18 pictures of 20 steps
# (guidance 3 to 7.5, three sizes) reached at most 2.0 times as far in any value of
# the UNet beyond 30 (2.4 times in the decoder, 1.9 in the text encoder); twice the UNet's.
MARGIN = 4.0
LIMIT = FP16_MAX / MARGIN

_HALF, _FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Same numbers, other shape: measured at their source.
_VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
_TWIN = "ranges.onnx"
_RANGE = "range:"


@dataclass(frozen=True, kw_only=True)
class Island:
    """A node that computes in float32, and the largest magnitude it was seen to read or write."""

    node: str
    largest: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What measuring one component found. `where` names the node that writes the largest, if any."""

    component: str
    islands: tuple[Island, ...]
    largest: float
    where: str


def find_islands(model: ir.Model, component: str, folder: Path, drive: Callable[[str, Call], None]) -> Found:
    """Measure the fp16 graph of a component, and let the nodes around hot values compute in float32.

    Args:
        model: the graph after `surgery.clean`; changed in place.
        component: the folder of the net; the UNet before hoisting.
        folder: holds the weights file; the twin is there for a moment.
        drive: calls the twin (`Calibration.drive`).

    Raises:
        NumericError: a value is not finite in float32, or an output is beyond fp16.
    """
    largest = measure(model, component, folder, drive)
    _check_outputs(model, component, largest)
    hot = {name for name, value in largest.items() if value > LIMIT}
    if not largest:  # all of it is float32 already
        return Found(component=component, islands=(), largest=0.0, where="")
    top = max(largest, key=lambda name: largest[name])
    where = {value.name: node.name for node in model.graph for value in node.outputs}.get(top)
    nodes = _around(model, hot)
    found = Found(
        component=component,
        islands=tuple(Island(node=node.name or "", largest=_extent(node, largest)) for node in nodes),
        largest=largest[top],
        where=where or top.removesuffix(".out"),
    )
    islands.run_in_fp32(model, [island.node for island in found.islands])
    return found


def measure(
    model: ir.Model, component: str, folder: Path, drive: Callable[[str, Call], None]
) -> dict[str, float]:
    """The largest magnitude of every fp16 value that a node writes, by name.

    An Attention's scores are named as `islands.write_out_attention` names them.

    Raises:
        NumericError: a value is not finite in float32.
    """
    twin = model.clone()
    watched = _watch(twin)
    _widen(twin)
    forget_shapes(twin)
    path = folder / _TWIN
    cast(Any, ir).save(twin, path)
    del twin
    try:
        largest = _run(path, watched, component, drive)
    finally:
        path.unlink()
    for node in model.graph:
        source = node.inputs[0].name if node.op_type in _VIEWS and node.inputs[0] is not None else None
        if source in largest:
            largest[node.outputs[0].name or ""] = largest[source]
    return largest


def _watch(twin: ir.Model) -> list[str]:
    """Add an output max|x| for every value to measure; returns their names, in the outputs' order."""
    watched: list[ir.Value] = []
    for node in list(twin.graph):
        if node.op_type == "Attention":
            new, scores = islands.attention_scores(node)
            twin.graph.insert_before(node, new)
            watched.append(scores)
        if node.op_type not in (*_VIEWS, "Constant") and not _is_widened_weight(node):
            watched += [value for value in node.outputs if value.dtype == _HALF]
    for value in watched:
        size = ir.node("Abs", [value], name=f"{_RANGE}{value.name}/Abs")
        peak = ir.node("ReduceMax", size.outputs, {"keepdims": 0}, name=f"{_RANGE}{value.name}/ReduceMax")
        size.outputs[0].name, peak.outputs[0].name = f"{_RANGE}{value.name}/abs", f"{_RANGE}{value.name}"
        size.outputs[0].dtype = peak.outputs[0].dtype = _HALF
        peak.outputs[0].shape = ir.Shape([])
        producer = value.producer()
        assert producer is not None
        twin.graph.insert_after(producer, [size, peak])
        twin.graph.outputs.append(peak.outputs[0])
    return [value.name or "" for value in watched]


def _is_widened_weight(node: ir.Node) -> bool:
    return node.op_type == "Cast" and is_weight(node.inputs[0])


def _widen(twin: ir.Model) -> None:
    """Let everything compute in float32, boundary included. Weights stay stored as they are."""
    for value in list(twin.graph.initializers.values()):
        if value.dtype == _HALF:
            _widen_initializer(twin.graph, value)
    for node in twin.graph:
        _widen_attributes(node)
    for value in [*twin.graph.inputs, *(value for node in twin.graph for value in node.outputs)]:
        if value.dtype == _HALF:
            value.type = ir.TensorType(_FULL)  # a new one: clones of a graph share their types


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.as_int() == _HALF:
            node.attributes[name] = ir.AttrInt64(name, _FULL)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _HALF:
            wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
            node.attributes[name] = ir.AttrTensor(name, wide)


def _widen_initializer(graph: ir.Graph, value: ir.Value) -> None:
    if not is_weight(value):
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        value.type = ir.TensorType(_FULL)
        return
    users = {use.node for use in value.uses()}
    # Right before its first user, so that one layer's float32 weights are in memory at a time.
    first = next(node for node in graph if node in users)
    wide = ir.node("Cast", [value], {"to": _FULL}, name=f"{value.name}/widened")
    wide.outputs[0].name, wide.outputs[0].dtype = f"{value.name}/widened.out", _FULL
    ir.convenience.replace_all_uses_with(value, wide.outputs[0])
    wide.replace_input_with(0, value)
    graph.insert_before(first, wide)


def _run(
    path: Path, watched: list[str], component: str, drive: Callable[[str, Call], None]
) -> dict[str, float]:
    """The largest magnitude of every watched value over all calls that `drive` makes."""
    session = _session(path)
    outputs = [item.name for item in session.get_outputs() if not item.name.startswith(_RANGE)]
    largest = dict.fromkeys(watched, 0.0)

    def call(arrays: Mapping[str, Array]) -> list[Array]:
        found = session.run([*outputs, *(_RANGE + name for name in watched)], dict(arrays))
        # ReduceMax may overlook a NaN, but a NaN that counts reaches an output
        for name, array in zip([*watched, *outputs], [*found[len(outputs) :], *found], strict=False):
            if not np.isfinite(array).all():
                raise _not_finite(component, name)
        for name, peak in zip(watched, found[len(outputs) :], strict=True):
            largest[name] = max(largest[name], float(peak))
        return found[: len(outputs)]

    drive(component, call)
    return largest


def _not_finite(component: str, name: str) -> NumericError:
    return NumericError(
        f"{component}: {name} is not finite in float32",
        expected="finite activations on a small picture",
        fix="Download the checkpoint again; its weights may be damaged.",
    )


def _session(path: Path) -> Any:
    """ONNX Runtime on CPU, in the graph's own order and without anything that keeps a copy of the weights."""
    import onnxruntime

    ort = cast(Any, onnxruntime)  # its own stubs are incomplete
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check_outputs(model: ir.Model, component: str, largest: Mapping[str, float]) -> None:
    for value in model.graph.outputs:
        found = largest.get(value.name or "", 0.0)
        if found > FP16_MAX:
            raise NumericError(
                f"{component}: its output {value.name} reaches {found:.3g}",
                expected=f"at most {FP16_MAX:.0f}, fp16's largest number",
                fix="Export with --dtype fp32.",
            )


def _around(model: ir.Model, hot: set[str]) -> list[ir.Node]:
    """The nodes that write or read a hot value. An Attention that does is written out, scores and all."""
    reached = set(hot)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        values = [value.name for value in (*node.inputs, *node.outputs) if value is not None]
        inner = islands.score_values(node)
        if hot.isdisjoint([*values, *inner]):
            continue
        islands.write_out_attention(model.graph, node)
        if not hot.isdisjoint([*values[:2], *inner]):  # the query, the key, the scores
            reached.update(inner)
    return [
        node
        for node in model.graph
        if node.op_type not in ("Cast", "Constant")
        and any(value is not None and value.name in reached for value in (*node.inputs, *node.outputs))
    ]


def _extent(node: ir.Node, largest: Mapping[str, float]) -> float:
    return max(
        largest.get(value.name or "", 0.0) for value in (*node.inputs, *node.outputs) if value is not None
    )
