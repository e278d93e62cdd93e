"""fp32 islands: named nodes of an fp16 graph that compute in float32.

TensorRT 11 has no fp16 switch, so a graph has to say its precision itself: a Cast where a value enters an
island, another where it leaves, and float32 between. Weights stay stored in fp16.

Which nodes need it is measured: a float32 twin of the graph draws a small picture (`calibration.py`). A
value beyond LIMIT is hot, and the nodes that write or read it become an island.

Values that are stored in fp16 count. Sums within a node do not: convolutions and products accumulate in
float32 in TensorRT and ONNX Runtime, and normalisations take their statistics in float32 (`stash_type` of
the ONNX operators, 1 by default). Attention's scores do count: a fused kernel keeps them in float32, but
nothing promises that an engine finds one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ...engines.errors import DAMAGED_WEIGHTS, EXPORT_IN_FP32, NumericError
from ...engines.onnxruntime.session import WEIGHTS_FOLDER
from ...engines.processors import thread_count
from ...engines.spec import Array
from ..graphs.attention import score_nodes, score_values, write_out_attention
from ..graphs.weights import forget_shapes, is_weight
from .calibration import Drive

FP16_MAX = 65504.0  # IEEE 754 binary16
# How much further than the calibration picture a user's may reach. On the demo model, 18 pictures of 20 steps
# (guidance 3 to 7.5, three sizes) reached at most 2.0 times as far in any value of the UNet beyond 30 (2.4
# times in the decoder, 1.9 in the text encoder). This is twice the UNet's factor.
MARGIN = 4.0
LIMIT = FP16_MAX / MARGIN

_HALF, _FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PLUMBING = ("Cast", "Constant")
# The same numbers in another shape: measured where they come from.
_VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
_RANGE = "range:"


@dataclass(frozen=True)
class Island:
    """A node that computes in float32, and the largest magnitude it was seen to read or write."""

    node: str
    largest: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What measuring one component found. `where` names the node that writes the largest value, if any."""

    component: str
    islands: tuple[Island, ...]
    largest: float
    where: str


def find_islands(model: ir.Model, component: str, drive: Drive) -> Found:
    """Measure the fp16 graph of a component, and let the nodes around hot values compute in float32.

    Args:
        model: the graph after `passes.clean`, the UNet's before hoisting, with its weights attached. It is
            changed in place.
        component: the net's folder in the package, for messages.
        drive: calls the graph with inputs of a picture (`calibration`).

    Raises:
        NumericError: a value is not finite in float32, or an output is beyond fp16.
    """
    largest = measure(model, component, drive)
    for value in model.graph.outputs:
        if (reached := largest.get(value.name or "", 0.0)) > FP16_MAX:
            raise NumericError(
                f"{component}: its output {value.name} reaches {reached:.3g}",
                expected=f"at most {FP16_MAX:.0f}, fp16's largest number",
                fix=EXPORT_IN_FP32,
            )
    if not largest:  # the whole graph computes in float32 already
        return Found(component=component, islands=(), largest=0.0, where="")
    top = max(largest, key=lambda name: largest[name])
    where = {value.name: node.name for node in model.graph for value in node.outputs}.get(top)
    hot = {name for name, value in largest.items() if value > LIMIT}
    islands = tuple(
        Island(node.name or "", max(largest.get(value.name or "", 0.0) for value in _values(node)))
        for node in _around(model, hot)
    )
    run_in_fp32(model, [island.node for island in islands])
    where = where or top.removesuffix(".out")
    return Found(component=component, islands=islands, largest=largest[top], where=where)


def _around(model: ir.Model, hot: set[str]) -> list[ir.Node]:
    """The nodes that write or read a hot value. An Attention that does is written out, scores and all."""
    reached = set(hot)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        values = [value.name for value in _values(node)]
        inner = score_values(node)
        if hot.isdisjoint([*values, *inner]):
            continue
        write_out_attention(model.graph, node)
        if not hot.isdisjoint([*values[:2], *inner]):  # the query, the key, the scores
            reached.update(inner)
    return [
        node
        for node in model.graph
        if node.op_type not in _PLUMBING and any(value.name in reached for value in _values(node))
    ]


def _values(node: ir.Node) -> list[ir.Value]:
    """What a node reads and writes."""
    return [value for value in (*node.inputs, *node.outputs) if value is not None]


def island_names(model: ir.Model) -> tuple[str, ...]:
    """Names of the nodes that compute in float32, not counting casts from and to it."""
    return tuple(
        node.name or ""
        for node in model.graph
        if node.op_type not in _PLUMBING and any(value.dtype == _FULL for value in node.outputs)
    )


def run_in_fp32(model: ir.Model, names: Collection[str]) -> None:
    """Let the named nodes compute in float32, with casts around them and none between them.

    A native Attention among them is written out first, and all of its nodes join the island.
    """
    for node in [n for n in model.graph if n.name in names and n.op_type == "Attention"]:
        names = [*names, *write_out_attention(model.graph, node)]
    nodes = [node for node in model.graph if node.name in names and node.op_type not in _PLUMBING]
    leaving = [value for node in nodes for value in node.outputs if value.dtype == _HALF]
    entering: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _HALF or value in leaving:
                continue
            if value not in entering:
                entering[value] = _enter(model.graph, node, value)
            node.replace_input_with(index, entering[value])
    for value in leaving:
        _leave(model.graph, set(nodes), value)
    common.RemoveUnusedNodesPass()(model)  # casts between islands that now touch


def _enter(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """`value` in float32: cast here, or taken before the cast to fp16 that ended an earlier island."""
    earlier = value.producer()
    if earlier is not None and earlier.op_type == "Cast":
        source = earlier.inputs[0]
        if source is not None and source.dtype == _FULL:
            return source
    wide = _cast(value, _FULL)
    graph.insert_before(node, wide)
    return wide.outputs[0]


def _leave(graph: ir.Graph, nodes: Collection[ir.Node], value: ir.Value) -> None:
    """Make `value` float32 within the island and cast it back for everyone else."""
    producer = value.producer()
    assert producer is not None
    value.type = ir.TensorType(_FULL)  # a new one: clones of a graph share their types
    outside = [use for use in value.uses() if use.node not in nodes]
    for use in list(outside):
        wide = use.node.outputs[0]
        if use.node.op_type == "Cast" and wide.dtype == _FULL and not wide.is_graph_output():
            outside.remove(use)
            ir.convenience.replace_all_uses_with(wide, value)
            graph.remove(use.node, safe=True)
    if not outside and not value.is_graph_output():
        return
    narrow = _cast(value, _HALF)
    graph.insert_after(producer, narrow)
    back = narrow.outputs[0]
    for use in outside:
        use.node.replace_input_with(use.idx, back)
    for index, output in enumerate(graph.outputs):
        if output is value:
            # The boundary keeps its name and its type.
            value.name, back.name = f"{value.name}/float32", value.name
            graph.outputs[index] = back


def _cast(value: ir.Value, target: ir.DataType) -> ir.Node:
    name = f"{value.name}/{'float32' if target == _FULL else 'float16'}"
    output = ir.val(name, target, value.shape)
    return ir.node("Cast", [value], {"to": target}, name=f"{name}/Cast", outputs=[output])


def upcast_attention(model: ir.Model) -> None:
    """Compute attention's scores in float32: what `upcast_attention` in a UNet's config asks for.

    Stable Diffusion 2.1's scores overflow fp16. As in diffusers' `Attention.get_attention_scores`, the
    probabilities go back to fp16 before they weight the values.
    """
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    names = [name for node in attentions for name in write_out_attention(model.graph, node)]
    run_in_fp32(model, [name for name in names if not name.endswith("/values")])


def measure(model: ir.Model, component: str, drive: Drive) -> dict[str, float]:
    """The largest magnitude of every fp16 value that a node writes, by the value's name.

    An Attention's scores have the name that `write_out_attention` would give them. `model` stays as it is;
    `drive` calls its float32 twin, which is never a file and reads the weights where they lie. Weights that
    are stored wider than the graph computes count as they are stored, not rounded.

    Raises:
        NumericError: a value is not finite in float32.
    """
    twin = model.clone()
    watched = _watch(twin)
    _widen(twin)
    forget_shapes(twin)
    folder = _gather_weights(twin)
    graph: bytes = cast(Any, ir.to_proto(twin)).SerializeToString()
    del twin
    largest = _run(graph, folder, watched, component, drive)
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
        if is_weight(value):
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
    for use in list(value.uses()):
        if use.node.op_type == "Cast" and use.node.outputs[0].dtype == _HALF:  # as `attach` put it
            ir.convenience.replace_all_uses_with(use.node.outputs[0], value)
            graph.remove(use.node, safe=True)
    if value.dtype == _FULL:
        return
    users = {use.node for use in value.uses()}
    first = next(node for node in graph if node in users)
    wide = ir.val(f"{value.name}/widened.out", _FULL)
    ir.convenience.replace_all_uses_with(value, wide)
    cast_node = ir.node("Cast", [value], {"to": _FULL}, name=f"{value.name}/widened", outputs=[wide])
    graph.insert_before(first, cast_node)


def _gather_weights(twin: ir.Model) -> Path:
    """Say where the weights lie from one folder, which is returned: a session takes no more than one.

    Links are followed, since ONNX Runtime takes no file that a link leads to outside of its folder. Hugging
    Face's cache has links to files in a folder of their own.
    """
    tensors = {
        value: cast(ir.ExternalTensor, value.const_value)
        for value in twin.graph.initializers.values()
        if is_weight(value)
    }
    files = {value: Path(tensor.path).resolve() for value, tensor in tensors.items()}
    folder = Path(os.path.commonpath([file.parent for file in files.values()] or [os.curdir]))
    for value, tensor in tensors.items():
        value.const_value = ir.ExternalTensor(
            files[value].relative_to(folder).as_posix(),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            name=tensor.name or "",
            shape=ir.Shape(tensor.shape),
            base_dir=folder,
        )
    return folder


def _run(graph: bytes, folder: Path, watched: list[str], component: str, drive: Drive) -> dict[str, float]:
    """The largest magnitude of every watched value over all calls that `drive` makes."""
    session = open_session(graph, weights=folder, as_written=True)
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


def open_session(graph: Path | bytes, *, weights: Path | None = None, as_written: bool = False) -> Any:
    """ONNX Runtime on CPU, without arena, prepacking and folding: each keeps another copy of the weights.

    `weights` is the folder of the weights, if that is not the graph's own; `as_written` runs the nodes
    unchanged, in the graph's own order.
    """
    import onnxruntime

    ort = cast(Any, onnxruntime)  # its own stubs are incomplete
    options = ort.SessionOptions()
    options.intra_op_num_threads = thread_count(None)
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    if weights is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    providers = ["CPUExecutionProvider"]
    content = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(
        content, options, providers=providers, disabled_optimizers=["ConstantFolding"]
    )
