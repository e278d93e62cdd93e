"""ONNX's native Attention written out as MatMul and Softmax: TensorRT-RTX refuses it in float32.

Only for attention without a mask or with a causal one, on (B, heads, T, width) operands: that is all of
Stable Diffusion's.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir


def write_out_attention(graph: ir.Graph, node: ir.Node) -> list[str]:
    """Replace a native Attention by MatMul and Softmax; returns the names of the nodes that compute them."""
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
