"""ONNX's native Attention written out as MatMul and Softmax: TensorRT-RTX refuses it in float32.

Only for attention without a mask or with a causal one, on (B, heads, T, width) operands: that is all of
Stable Diffusion's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def write_out_attention(graph: ir.Graph, node: ir.Node) -> list[str]:
    """Replace a native Attention by MatMul and Softmax; returns the names of the nodes that compute them."""
    assert not any(node.inputs[3:])
    new = score_nodes(node)
    if node.attributes.get_int("is_causal", 0):
        mask = _causal_mask(graph, node)
        new.append(_part(node, "masked", "Add", [new[-1].outputs[0], mask]))
    shares = _part(node, "shares", "Softmax", new[-1].outputs, {"axis": -1})
    result = _part(node, "values", "MatMul", [shares.outputs[0], _operand(node, 2)])
    result.outputs[0].name = node.outputs[0].name  # it may be an output of the graph
    result.outputs[0].shape = node.outputs[0].shape
    new += [shares, result]
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(node.outputs[0], result.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return [item.name or "" for item in new[2:]]


def score_nodes(node: ir.Node) -> list[ir.Node]:
    """The nodes, not yet in a graph, that compute an Attention's scores: (B, heads, T, T), from the last."""
    query, key = _operand(node, 0), _operand(node, 1)
    assert key.shape is not None
    batch, heads, tokens, width = key.shape
    assert isinstance(width, int)
    factor = ir.tensor(node.attributes.get_float("scale", width**-0.5), dtype=query.dtype)
    scale = _part(node, "scale", "Constant", [], {"value": factor}, [])
    turned = _part(node, "turned", "Transpose", [key], {"perm": [0, 1, 3, 2]}, [batch, heads, width, tokens])
    scaled = _part(node, "scaled", "Mul", [query, scale.outputs[0]])
    scores = _part(node, "scores", "MatMul", [scaled.outputs[0], turned.outputs[0]])
    return [scale, turned, scaled, scores]


def score_values(node: ir.Node) -> tuple[str, ...]:
    """Names of the values, up to the Softmax, that writing an Attention out would add."""
    return tuple(f"{node.name}/{part}.out" for part in ("turned", "scaled", "scores", "masked"))


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _part(
    attention: ir.Node,
    part: str,
    operator: str,
    inputs: Sequence[ir.Value],
    attributes: dict[str, Any] | None = None,
    shape: Sequence[Any] | None = None,
) -> ir.Node:
    """A node that computes a part of `attention`, in the type of its operands."""
    name = f"{attention.name}/{part}"
    output = ir.val(f"{name}.out", _operand(attention, 0).dtype, shape)
    return ir.node(operator, inputs, attributes, name=name, outputs=[output])


def _causal_mask(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Minus infinity above the diagonal, as an initializer. The length is the text encoder's, a number."""
    key = _operand(node, 1)
    assert key.shape is not None
    assert key.dtype is not None
    tokens = key.shape[2]
    assert isinstance(tokens, int)
    mask = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1).astype(key.dtype.numpy())
    name = f"{node.name}/mask"
    constant = ir.val(name, const_value=ir.tensor(mask, name=name))
    graph.register_initializer(constant)
    return constant
