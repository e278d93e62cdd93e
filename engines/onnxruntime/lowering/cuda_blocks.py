"""Transformer blocks for ONNX Runtime's CUDA provider: attention that turns nothing, and GEGLU as one kernel.

**Attention.** Given (B, heads, L, size), the kernels for the standard `Attention` turn the queries to (B, L,
heads, size) and the result back, after the graph has turned both the other way. Given (B, L, heads * size),
which is how projections leave them, they turn nothing (onnxruntime: core/providers/cuda/llm/attention.cc,
`Attention<T>::ComputeInternal`: Q_K_V_BSNH). The operator of opset 23 takes both, so the heads are not split
at all.

**Cross-attention.** Keys and values enter the loop with their heads split, (B, heads, T, size), and the
standard operator wants all three alike. `com.microsoft.MultiHeadAttention` takes queries (B, L, heads * size)
with just such keys and values, and its kernels read all three where they lie
(contrib_ops/cuda/bert/multihead_attention.cc: Q_K_V_BSNH_BNSH_BNSH). In half precision on sm_90 and later it
calls cuDNN's attention, elsewhere flash attention.

**Attention with upcast scores.** Where a UNet's config asks for it, a package in half precision computes
scores and their softmax in float32, node by node, because q k may exceed float16 (Stable Diffusion 2.1).
Fused kernels never store scores: flash and memory-efficient attention hold them in float32 registers,
whatever the type of q. So such an island becomes an `Attention` again, if queries and keys enter it from
float16.

**GEGLU.** (a, b) = x W + c and then a * gelu(b) are four kernels behind the product, and one as
`com.microsoft.BiasSplitGelu`. It adds c in the type of x and computes the rest in float32; it was compiled
for the widths of Stable Diffusion.

Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph_images import GraphImages, is_half_or_float
from .patterns import Heads, biased_product, gelu_behind, heads_merged, heads_split, maker_of
from .shapes import Shapes, shapes_of

if TYPE_CHECKING:
    import onnx_ir as ir

_PAST_KEY = 4  # of Attention's inputs: from here on there is a cache, which is always split into heads
_LARGEST_HEAD = (
    256  # is_supported in contrib_ops/cuda/bert/flash_attention/flash_api.cc; a multiple of 8, too
)
# BiasSplitGelu::ComputeInternal in contrib_ops/cuda/diffusion/bias_split_gelu.cc: the width before the split
_SPLIT_GELU_WIDTHS = frozenset({2560, 5120, 6144, 10240, 12288})


def lower_blocks(model: ir.Model) -> None:
    """Lower every attention and GEGLU of the graph in place; what the kernels do not take stays as it is."""
    images, shapes = GraphImages(model.graph), shapes_of(model.graph)
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Attention":
            _lower_attention(images, shapes, node)
        elif node.domain == "" and node.op_type == "MatMul":
            _lower_upcast_attention(images, shapes, node)
        elif node.domain == "" and node.op_type == "Split":
            _lower_geglu(images, shapes, node)


def _lower_attention(images: GraphImages, shapes: Shapes, node: ir.Node) -> None:
    """Queries as they leave their projection, and keys and values too if they come from one here."""
    import onnx_ir as ir

    queries, keys, values = (heads_split(value, shapes) for value in node.inputs[:3])
    merged = heads_merged(node.outputs[0], shapes)
    if queries is None or merged is None or len(node.outputs) > 1 or not is_half_or_float(node.outputs[0]):
        return
    if keys is not None and values is not None:
        made = _flat_attention(images, node, queries, keys, values)
    elif keys is None and values is None:
        made = _cross_attention(images, shapes, node, queries)
    else:
        return
    if made is not None:
        ir.convenience.replace_all_uses_with(merged, made)


def _flat_attention(
    images: GraphImages, node: ir.Node, queries: Heads, keys: Heads, values: Heads
) -> ir.Value | None:
    if any(value is not None for value in node.inputs[_PAST_KEY:]):
        return None
    attributes = {name: item.value for name, item in node.attributes.items()}
    heads = {"q_num_heads": queries.heads, "kv_num_heads": keys.heads}
    inputs = [queries.whole, keys.whole, values.whole, *node.inputs[3:]]
    return images.insert(node, "Attention", inputs, f"{node.outputs[0].name}/flat", **{**attributes, **heads})


def _cross_attention(images: GraphImages, shapes: Shapes, node: ir.Node, queries: Heads) -> ir.Value | None:
    plain = {"is_causal": 0, "qk_matmul_output_mode": 0, "softmax_precision": 0}
    keys, values = node.inputs[1:3]
    split = [shapes.get(value, ()) if value is not None else () for value in (keys, values)]
    heads = (queries.heads, queries.size)
    if len(node.inputs) > 3 or any(shape[1:2] + shape[3:] != heads for shape in split):
        return None
    if node.attributes.get_float("softcap", 0.0) != 0.0:
        return None
    if any(node.attributes.get_int(name, value) != value for name, value in plain.items()):
        return None
    attributes: dict[str, object] = {"num_heads": queries.heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale", 0.0)
    inputs = [queries.whole, keys, values]
    return images.contrib(node, "MultiHeadAttention", inputs, f"{node.outputs[0].name}/cross", **attributes)


def _lower_upcast_attention(images: GraphImages, shapes: Shapes, product: ir.Node) -> None:
    """softmax(scale q k^T) v, where all but the last product is in float32."""
    import onnx_ir as ir

    shares = maker_of(product.inputs[0], "Cast")
    softmax = maker_of(shares.inputs[0], "Softmax") if shares is not None else None
    scores = maker_of(softmax.inputs[0], "MatMul") if softmax is not None else None
    turned = _upcast(scores.inputs[1]) if scores is not None else None
    turn = maker_of(turned, "Transpose")
    if shares is None or softmax is None or scores is None or turn is None:
        return
    float16, float32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
    if shares.outputs[0].dtype != float16 or scores.outputs[0].dtype != float32:
        return
    if turn.attributes.get_ints("perm", ()) != (0, 1, 3, 2) or softmax.attributes.get_int("axis", -1) != -1:
        return
    upcast, scale = _scaled(scores.inputs[0])
    parts = (upcast, turn.inputs[0], product.inputs[1])
    found = [heads_split(value, shapes) for value in parts]
    merged = heads_merged(product.outputs[0], shapes) if scale > 0 else None
    heads = [item for item in found if item is not None]
    if merged is None or len(heads) < 3 or any(item.heads != heads[0].heads for item in heads):
        return
    if any(item.size % 8 or item.size > _LARGEST_HEAD for item in heads):
        return
    made = images.insert(
        product,
        "Attention",
        [item.whole for item in heads],
        f"{product.outputs[0].name}/flat",
        scale=scale,
        q_num_heads=heads[0].heads,
        kv_num_heads=heads[0].heads,
    )
    ir.convenience.replace_all_uses_with(merged, made)


def _upcast(value: ir.Value | None) -> ir.Value | None:
    """The float16 that a value in float32 is cast from."""
    import onnx_ir as ir

    cast = maker_of(value, "Cast")
    source = cast.inputs[0] if cast is not None else None
    return source if source is not None and source.dtype == ir.DataType.FLOAT16 else None


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What is scaled by a number that is written in the graph, in float16, and that number."""
    import onnx_ir as ir

    node = maker_of(value, "Mul")
    for first, second in (node.inputs, reversed(node.inputs)) if node is not None else ():
        number = _upcast(second)
        tensor = ir.convenience.get_const_tensor(number) if number is not None else None
        if tensor is not None and tensor.size == 1:
            return _upcast(first), float(tensor.numpy())
    return None, 0.0


def _lower_geglu(images: GraphImages, shapes: Shapes, split: ir.Node) -> None:
    import onnx_ir as ir

    shape = shapes.get(split.inputs[0], ()) if split.inputs and split.inputs[0] is not None else ()
    if len(shape) != 3 or shape[-1] not in _SPLIT_GELU_WIDTHS or not is_half_or_float(split.inputs[0]):
        return
    biased = biased_product(split, shapes)
    gelu = gelu_behind(split) if biased is not None else None
    gate = _only_product(split.outputs[0], gelu.outputs[0]) if gelu is not None else None
    if biased is None or gate is None:
        return
    product, bias = biased
    inputs = [product.outputs[0], bias]
    made = images.contrib(split, "BiasSplitGelu", inputs, f"{gate.outputs[0].name}/gated")
    ir.convenience.replace_all_uses_with(gate.outputs[0], made)


def _only_product(first: ir.Value, second: ir.Value) -> ir.Node | None:
    """The Mul of two values that have no other user; None where its product is an output of the graph."""
    users = {use.node for value in (first, second) for use in value.uses()}
    node = next(iter(users)) if len(users) == 1 else None
    if node is None or node.op_type != "Mul" or node.domain != "" or node.outputs[0].is_graph_output():
        return None
    return node if set(node.inputs) == {first, second} else None
