"""The largest magnitude of every fp16 value in a graph, measured while it draws a small picture.

A float32 twin of the graph runs on the inputs of `nets/calibration.py`.

Values that are stored in fp16 count. Sums within a node do not: convolutions and products accumulate in
float32 in TensorRT and ONNX Runtime, and normalisations take their statistics in float32 (`stash_type` of
the ONNX operators, 1 by default). Attention's scores do count: a fused kernel keeps them in float32, but
nothing promises that an engine finds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ...engines.errors import DAMAGED_WEIGHTS, NumericError
from ...engines.spec import Array
from ..graphs.attention import score_nodes
from ..graphs.passes import forget_shapes
from ..graphs.weights import is_weight
from ..nets.calibration import Drive

_HALF, _FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
# The same numbers in another shape: measured where they come from.
_VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
_TWIN = "ranges.onnx"
_RANGE = "range:"


def measure(model: ir.Model, component: str, folder: Path, drive: Drive) -> dict[str, float]:
    """The largest magnitude of every fp16 value that a node writes, by the value's name.

    An Attention's scores have the name that `write_out_attention` would give them.

    Args:
        model: an fp16 graph; it stays as it is.
        component: its name in messages.
        folder: has the weights file. The twin is written there, and deleted.
        drive: calls the twin once or more.

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
    """Add an output max|x| for every value x to measure; returns their names in the outputs' order."""
    watched: list[ir.Value] = []
    for node in list(twin.graph):
        if node.op_type == "Attention":
            new = score_nodes(node)
            twin.graph.insert_before(node, new)
            watched += new[-1].outputs
        widens_weight = node.op_type == "Cast" and is_weight(node.inputs[0])
        if node.op_type not in (*_VIEWS, "Constant") and not widens_weight:
            watched += [value for value in node.outputs if value.dtype == _HALF]
    for value in watched:
        name = f"{_RANGE}{value.name}"
        size = ir.node("Abs", [value], name=f"{name}/Abs", outputs=[ir.val(f"{name}/abs", _HALF)])
        peak = ir.node(
            "ReduceMax",
            size.outputs,
            {"keepdims": 0},
            name=f"{name}/ReduceMax",
            outputs=[ir.val(name, _HALF, [])],
        )
        producer = value.producer()
        assert producer is not None
        twin.graph.insert_after(producer, [size, peak])
        twin.graph.outputs.append(peak.outputs[0])
    return [value.name or "" for value in watched]


def _widen(twin: ir.Model) -> None:
    """Make the whole graph float32, its inputs and outputs too. Weights stay stored as they are."""
    for value in list(twin.graph.initializers.values()):
        if value.dtype == _HALF and is_weight(value):
            _widen_weight(twin.graph, value)
        elif value.dtype == _HALF:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(_FULL)
    for node in twin.graph:
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.as_int() == _HALF:
                node.attributes[name] = ir.AttrInt64(name, _FULL)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _HALF:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, wide)
    for value in [*twin.graph.inputs, *(value for node in twin.graph for value in node.outputs)]:
        if value.dtype == _HALF:
            value.type = ir.TensorType(_FULL)  # a new one: clones of a graph share their types


def _widen_weight(graph: ir.Graph, value: ir.Value) -> None:
    """Cast a weight right before its first user: one layer's float32 weights are in memory at a time."""
    users = {use.node for use in value.uses()}
    first = next(node for node in graph if node in users)
    wide = ir.val(f"{value.name}/widened.out", _FULL)
    ir.convenience.replace_all_uses_with(value, wide)
    cast_node = ir.node("Cast", [value], {"to": _FULL}, name=f"{value.name}/widened", outputs=[wide])
    graph.insert_before(first, cast_node)


def _run(path: Path, watched: list[str], component: str, drive: Drive) -> dict[str, float]:
    """The largest magnitude of every watched value over all calls that `drive` makes."""
    session = open_session(path, as_written=True)
    outputs = [item.name for item in session.get_outputs() if not item.name.startswith(_RANGE)]
    largest = dict.fromkeys(watched, 0.0)

    def call(arrays: Mapping[str, Array]) -> list[Array]:
        found = session.run([*outputs, *(_RANGE + name for name in watched)], dict(arrays))
        # ReduceMax may overlook a NaN, but a NaN that counts reaches an output
        for name, array in zip([*watched, *outputs], [*found[len(outputs) :], *found], strict=False):
            if not np.isfinite(array).all():
                raise NumericError(
                    f"{component}: {name} is not finite in float32",
                    expected="finite activations on a small picture",
                    fix=DAMAGED_WEIGHTS,
                )
        for name, peak in zip(watched, found[len(outputs) :], strict=True):
            largest[name] = max(largest[name], float(peak))
        return found[: len(outputs)]

    drive(call)
    return largest


def open_session(path: Path, *, as_written: bool = False) -> Any:
    """ONNX Runtime on CPU, without arena, prepacking and folding: each keeps another copy of the weights.

    `as_written` runs the nodes unchanged, in the graph's own order.
    """
    import onnxruntime

    ort = cast(Any, onnxruntime)  # its own stubs are incomplete
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(
        str(path), options, providers=providers, disabled_optimizers=["ConstantFolding"]
    )
