"""fp32 islands: nodes of an fp16 graph that compute in float32, named.

A graph's precision is its own business since TensorRT 11 has no fp16 switch, so an island is written out: a
Cast where a value enters, another where it leaves, and float32 between. Weights stay stored in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

_HALF, _FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PLUMBING = ("Cast", "Constant")


def find(model: ir.Model) -> tuple[str, ...]:
    """Names of the nodes that compute in float32, casts from and to it aside."""
    return tuple(
        node.name or ""
        for node in model.graph
        if node.op_type not in _PLUMBING and any(value.dtype == _FULL for value in node.outputs)
    )


def run_in_fp32(model: ir.Model, names: Collection[str]) -> None:
    """Let the named nodes compute in float32, with casts around them and none between them.

    Native Attention is written out first (see `write_out_attention`); then all of it is the island.
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
    """`value` in float32. What an older island cast to fp16 is taken before the cast: it may not fit."""
    cast = value.producer()
    if cast is not None and cast.op_type == "Cast":
        source = cast.inputs[0]
        if source is not None and source.dtype == _FULL:
            return source
    return _cast(graph.insert_before, node, value, _FULL)


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
    back = _cast(graph.insert_after, producer, value, _HALF)
    for use in outside:
        use.node.replace_input_with(use.idx, back)
    for index, output in enumerate(graph.outputs):
        if output is value:
            # The boundary keeps its name and its type.
            value.name, back.name = f"{value.name}/float32", value.name
            graph.outputs[index] = back


def _cast(
    insert: Callable[[ir.Node, ir.Node], None], at: ir.Node, value: ir.Value, target: ir.DataType
) -> ir.Value:
    name = f"{value.name}/{'float32' if target == _FULL else 'float16'}"
    node = ir.node("Cast", [value], {"to": target}, name=f"{name}/Cast")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, target, value.shape
    insert(at, node)
    return node.outputs[0]


def upcast_attention(model: ir.Model) -> None:
    """Compute attention's scores in float32: what `upcast_attention` in a UNet's config asks for.

    Stable Diffusion 2.1's scores overflow fp16. As in diffusers' `Attention.get_attention_scores`, the
    probabilities go back to fp16 before they weight the values.
    """
    names: list[str] = []
    for node in [n for n in model.graph if n.op_type == "Attention"]:
        names += [name for name in write_out_attention(model.graph, node) if not name.endswith("/values")]
    run_in_fp32(model, names)


def write_out_attention(graph: ir.Graph, node: ir.Node) -> list[str]:
    """Replace a native Attention by MatMul and Softmax; returns the new nodes' names.

    TensorRT-RTX has no kernel for a float32 Attention and refuses the graph. Only for attention without a
    mask or with a causal one, on (B, heads, T, width) operands: all of Stable Diffusion's.
    """
    query, key, value = node.inputs[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    assert len(node.inputs) == 3 or not any(node.inputs[3:])
    new, scores = attention_scores(node)
    if node.attributes.get_int("is_causal", 0):
        masked = _causal(node, scores)
        scores = masked.outputs[0]
        new.append(masked)
    shares = ir.node("Softmax", [scores], {"axis": -1}, name=f"{node.name}/shares")
    result = ir.node("MatMul", [shares.outputs[0], value], name=f"{node.name}/values")
    new += [shares, result]
    _name_outputs(new, query)
    result.outputs[0].name = node.outputs[0].name  # it may be an output of the graph
    result.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(node.outputs[0], result.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return [item.name or "" for item in new[2:]]


def attention_scores(node: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that compute an Attention's scores, not yet in a graph, and the scores (B, heads, T, T)."""
    query, key = node.inputs[:2]
    assert query is not None
    assert key is not None
    assert key.shape is not None
    assert query.dtype is not None
    batch, heads, tokens, width = key.shape
    assert isinstance(width, int)
    scale = ir.node(
        "Constant",
        [],
        {"value": ir.tensor(node.attributes.get_float("scale", width**-0.5), dtype=query.dtype)},
        name=f"{node.name}/scale",
    )
    turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]}, name=f"{node.name}/turned")
    scaled = ir.node("Mul", [query, scale.outputs[0]], name=f"{node.name}/scaled")
    scores = ir.node("MatMul", [scaled.outputs[0], turned.outputs[0]], name=f"{node.name}/scores")
    new = [scale, turned, scaled, scores]
    _name_outputs(new, query)
    turned.outputs[0].shape = ir.Shape([batch, heads, width, tokens])
    scale.outputs[0].shape = ir.Shape([])
    return new, scores.outputs[0]


def score_values(node: ir.Node) -> tuple[str, ...]:
    """Names of the values, up to the Softmax, that writing an Attention out would add."""
    return tuple(f"{node.name}/{part}.out" for part in ("turned", "scaled", "scores", "masked"))


def _causal(node: ir.Node, scores: ir.Value) -> ir.Node:
    """Scores with minus infinity above the diagonal. The length is the text encoder's, a number."""
    key = node.inputs[1]
    assert key is not None
    assert key.shape is not None
    assert key.dtype is not None
    tokens = key.shape[2]
    assert isinstance(tokens, int)
    mask = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1).astype(key.dtype.numpy())
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    constant = ir.Value(
        name=f"{node.name}/mask",
        type=ir.TensorType(key.dtype),
        shape=ir.Shape(mask.shape),
        const_value=ir.tensor(mask, name=f"{node.name}/mask"),
    )
    graph.register_initializer(constant)
    return ir.node("Add", [scores, constant], name=f"{node.name}/masked")


def _name_outputs(nodes: Collection[ir.Node], like: ir.Value) -> None:
    assert like.dtype is not None
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = f"{node.name}.out", ir.TensorType(like.dtype)
