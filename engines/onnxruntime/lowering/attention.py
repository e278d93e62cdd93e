"""Lowers self-attention for ONNX Runtime's CPU provider: `com.microsoft.MultiHeadAttention` in tiles.

The standard `Attention` stores the scores of all pairs of pixels: 1 GB per layer for two pictures of 512x512
in SD 1.5. `MultiHeadAttention` computes them block by block in the processor's cache, but only where queries,
keys and values come as (B, L, heads * size), as they leave their projections (onnxruntime:
contrib_ops/cpu/bert/multihead_attention.cc). So the split into heads goes with it.

Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .values import CONTRIB, numbers_of

if TYPE_CHECKING:
    import onnx_ir as ir

_HEADS_OUT = (0, 2, 1, 3)  # (B, L, heads, size) to (B, heads, L, size), and back
_PLAIN = {"is_causal": 0, "qk_matmul_output_mode": 0, "q_num_heads": 0, "kv_num_heads": 0}


def lower_attention(model: ir.Model) -> int:
    """Lower every self-attention in place; how many those are."""
    import onnx_ir.passes.common as passes

    lowered = sum(_lower(model.graph, node) for node in list(model.graph))
    if lowered:
        model.opset_imports[CONTRIB] = 1
        passes.RemoveUnusedNodesPass()(model)
    return lowered


def _lower(graph: ir.Graph, node: ir.Node) -> bool:
    import onnx_ir as ir

    split = [_split(value) for value in node.inputs] if _is_plain(node) else []
    merged = _merge(node.outputs[0]) if split else None
    if merged is None or any(item is None for item in split) or len({item[1] for item in split if item}) > 1:
        return False
    whole = [item[0] for item in split if item]
    heads = next(item[1] for item in split if item)
    attributes: dict[str, object] = {"num_heads": heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale", 0.0)
    made = ir.node(
        "MultiHeadAttention",
        whole,
        attributes,  # pyright: ignore[reportArgumentType]
        domain=CONTRIB,
        name=f"{node.name}/tiled",
    )
    made.outputs[0].name = f"{merged.name}/tiled"
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(merged, made.outputs[0])
    return True


def _is_plain(node: ir.Node) -> bool:
    """Whether it is an attention in float32 of nothing but queries, keys and values."""
    import onnx_ir as ir

    return (
        node.domain == ""
        and node.op_type == "Attention"
        and node.outputs[0].dtype == ir.DataType.FLOAT
        and len(node.inputs) == 3
        and len(node.outputs) == 1
        and node.attributes.get_float("softcap", 0.0) == 0.0
        and all(node.attributes.get_int(name, value) == value for name, value in _PLAIN.items())
    )


def _split(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(B, L, heads * size) and the heads of a value that is it as (B, heads, L, size)."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshaped = transpose.inputs[0]
    reshape = reshaped.producer() if reshaped is not None else None
    if tuple(transpose.attributes.get_ints("perm", ())) != _HEADS_OUT or reshape is None:
        return None
    target = numbers_of(reshape.inputs[1]) if reshape.op_type == "Reshape" else None
    whole = reshape.inputs[0]
    # Only a batch and a length that are copied tell that the input has three dimensions, and only numbers
    # that are written tell how many heads there are.
    if whole is None or target is None or len(target) != 4 or target[:2] != (0, 0) or min(target[2:]) < 1:
        return None
    return whole, target[2]


def _merge(value: ir.Value) -> ir.Value | None:
    """The (B, L, heads * size) that is made of (B, heads, L, size), where nothing else is."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != "Transpose" or value.is_graph_output():
        return None
    turned = users[0].outputs[0]
    after = [use.node for use in turned.uses()]
    whole = len(after) == 1 and after[0].op_type == "Reshape" and not turned.is_graph_output()
    if not whole or tuple(users[0].attributes.get_ints("perm", ())) != _HEADS_OUT:
        return None
    target = numbers_of(after[0].inputs[1])
    merged = after[0].outputs[0]
    ok = target is not None and len(target) == 3 and target[:2] == (0, 0) and not merged.is_graph_output()
    return merged if ok else None
