"""fp32 islands: nodes of an fp16 graph that compute in float32, named.

A graph's precision is its own business since TensorRT 11 has no fp16 switch, so an island is written out: a
Cast where a value enters, another where it leaves, and float32 between. Weights stay stored in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

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
    nodes = {node for node in model.graph if node.name in names and node.op_type not in _PLUMBING}
    leaving = [value for node in nodes for value in node.outputs if value.dtype == _HALF]
    entering: dict[ir.Value, ir.Value] = {}
    for node in model.graph:
        if node not in nodes:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _HALF or value in leaving:
                continue
            if value not in entering:
                entering[value] = _cast(model.graph.insert_before, node, value, _FULL)
            node.replace_input_with(index, entering[value])
    for value in leaving:
        _leave(model.graph, nodes, value)


def _leave(graph: ir.Graph, nodes: Collection[ir.Node], value: ir.Value) -> None:
    """Make `value` float32 within the island and cast it back for everyone else."""
    outside = [use for use in value.uses() if use.node not in nodes]
    producer = value.producer()
    assert producer is not None
    value.dtype = _FULL
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
    mask on (B, heads, T, width) operands, which is all of a UNet's.
    """
    query, key, value = node.inputs[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    assert key.shape is not None
    assert query.dtype is not None
    assert len(node.inputs) == 3
    assert not node.attributes.get_int("is_causal", 0)
    width = key.shape[3]
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
    shares = ir.node("Softmax", [scores.outputs[0]], {"axis": -1}, name=f"{node.name}/shares")
    result = ir.node("MatMul", [shares.outputs[0], value], name=f"{node.name}/values")
    new = [scale, turned, scaled, scores, shares, result]
    for item in new:
        item.outputs[0].name, item.outputs[0].dtype = f"{item.name}.out", query.dtype
    result.outputs[0].name = node.outputs[0].name  # it may be an output of the graph
    batch, heads, tokens, _ = key.shape
    turned.outputs[0].shape = ir.Shape([batch, heads, width, tokens])
    scale.outputs[0].shape = ir.Shape([])
    result.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(node.outputs[0], result.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return [item.name or "" for item in new[2:]]
