"""Lowers what ONNX Runtime's CPU provider has no kernel for, or a slow one: the layout `fused`.

**Group normalisation.** The provider runs the operator's function body: twenty nodes, with a variance
E[x^2] - E[x]^2. For the normalisation of whole rows there is a kernel, `LayerNormalization`, which works on
all cores and adds up in float64. Without gamma and beta, which are of channels, a group is such a row:

    z = LayerNormalization(x as (N, G, ...), ones)
    y = gamma z + beta, z as (N, C, ...)

Reshapes copy nothing, and there are as many ones as a group has values. The time taken with the SiLU behind
it, as a share of the body's, and that of other ways to write it (two runs of turns, on two cores of a Xeon
with AVX-512, ONNX Runtime 1.31.1):

    (N, C, H, W), G            this    InstanceNorm.*    ReduceMean**    gamma repeated***
    (2, 64, 16, 16), 4         0.64         0.51             0.94             1.18
    (2, 1280, 8, 8), 32        0.83         0.81             0.68             1.25
    (2, 320, 64, 64), 32       0.53         0.66             0.65             1.08
    (1, 128, 256, 256), 32     0.47         0.53             0.59             0.96
    relative L2 to float64,
    mean of 30 deviations      1e-6         2e-5             4e-5             3e-8

    *   in place of LayerNormalization; it works on one core: the more cores there are, the worse
    **  with Sub and ReduceSumSquare
    *** and beta, to (G, D), as LayerNormalization takes them; that copies them in every run

The body's error is 7e-4 there.

**GEGLU.** A transformer's feed-forward net computes (a, b) = x W + c and goes on with a * gelu(b). `Split`
copies both halves of what are the largest values of the net. With the columns of W split, which happens once,
when the net is opened, nothing is copied; and the bias goes with the Gelu (`com.microsoft.BiasGelu`).

Measured with the product that follows, for x of (B, L, C), on two cores of a Xeon with AVX-512 (ONNX Runtime
1.31.1): (2, 256, 64) 532 us before, 459 now; (2, 64, 96) 279 and 254; (2, 4096, 320) 142 ms and 133.

**Self-attention.** The standard `Attention` stores the scores of all pairs of pixels: 1 GB per layer for two
pictures of 512x512 in SD 1.5. `MultiHeadAttention` computes them block by block in the processor's cache, but
only where queries, keys and values come as (B, L, heads * size), as they leave their projections
(onnxruntime: contrib_ops/cpu/bert/multihead_attention.cc). So the split into heads goes with it.

Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .graph_images import CONTRIB, GraphImages, weight_shape
from .patterns import biased_product, gelu_behind, heads_merged, heads_split
from .shapes import Shapes, shapes_of

if TYPE_CHECKING:
    import onnx_ir as ir

_GROUP_NORM_OPSET = 21  # before, gamma and beta had one number per group
_PLAIN = {"is_causal": 0, "qk_matmul_output_mode": 0, "q_num_heads": 0, "kv_num_heads": 0}


def lower_group_norms(model: ir.Model) -> int:
    """Lower every group normalisation in float32 in place; how many those are."""
    if model.opset_imports.get("", 0) < _GROUP_NORM_OPSET:
        return 0
    shapes = shapes_of(model.graph)
    return _lower_all(model, lambda images, node: _lower_group_norm(images, shapes, node))


def lower_geglus(model: ir.Model) -> int:
    """Lower every GEGLU in float32 in place; how many those are."""
    shapes = shapes_of(model.graph)
    return _lower_all(model, lambda images, node: _lower_geglu(images, shapes, node))


def lower_attention(model: ir.Model) -> int:
    """Lower every self-attention in float32 in place; how many those are."""
    shapes = shapes_of(model.graph)
    return _lower_all(model, lambda images, node: _lower_attention(images, shapes, node))


def _lower_all(model: ir.Model, lower: Callable[[GraphImages, ir.Node], bool]) -> int:
    import onnx_ir.passes.common as passes

    images = GraphImages(model.graph)
    lowered = sum(lower(images, node) for node in list(model.graph))
    if lowered:
        model.opset_imports[CONTRIB] = 1
        passes.RemoveUnusedNodesPass()(model)
    return lowered


def _lower_group_norm(images: GraphImages, shapes: Shapes, node: ir.Node) -> bool:
    import onnx_ir as ir

    if node.domain != "" or node.op_type != "GroupNormalization":
        return False
    data, gamma, beta = node.inputs
    channels, groups = weight_shape(gamma), node.attributes.get_int("num_groups", 0)
    rank = len(shapes.get(data, ())) if data is not None else 0
    if channels is None or rank not in (3, 4) or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    name = node.outputs[0].name

    def add(kind: str, what: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        return images.insert(node, kind, inputs, f"{name}/{what}", **attributes)

    # Of (N, C, H, W) the last dimension is copied both times, so the way back needs no computed shape.
    pixels = (-1,) if rank == 3 else (-1, 0)
    one = images.tensor("group_norm/one", np.ones(1, np.float32))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    value = add("Reshape", "groups", [data, images.constant(0, groups, *pixels)])
    size = add("Shape", "size", [value], start=2)
    size.type = ir.TensorType(ir.DataType.INT64)
    ones = add("Expand", "ones", [one, size])
    value = add("LayerNormalization", "deviations", [value, ones], axis=2, epsilon=epsilon)
    value = add("Reshape", "channels", [value, images.constant(0, channels[0], *pixels)])
    behind = images.constant(*range(1, rank - 1))
    value = add("Mul", "scaled", [value, add("Unsqueeze", "gamma", [gamma, behind])])
    value = add("Add", "normal", [value, add("Unsqueeze", "beta", [beta, behind])])
    old = node.outputs[0]
    value.shape = old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    value.name, old.name = old.name, value.name
    images.graph.remove(node, safe=True)
    return True


def _lower_geglu(images: GraphImages, shapes: Shapes, split: ir.Node) -> bool:
    import onnx_ir as ir

    biased = biased_product(split, shapes)
    gelu = gelu_behind(split) if biased is not None else None
    biased_sum = split.inputs[0]
    if biased is None or gelu is None or biased_sum is None or biased_sum.dtype != ir.DataType.FLOAT:
        return False
    product, bias = biased
    data, weight = product.inputs
    names = [output.name for output in split.outputs]
    assert weight is not None
    columns = _halves(images, split, weight, 1)
    biases = _halves(images, split, bias, 0)
    products = [
        images.insert(split, "MatMul", [data, half], f"{name}/product")
        for half, name in zip(columns, names, strict=True)
    ]
    made = images.insert(split, "Add", [products[0], biases[0]], f"{names[0]}/biased")
    fused = images.contrib(split, "BiasGelu", [products[1], biases[1]], f"{names[1]}/gelu")
    ir.convenience.replace_all_uses_with(split.outputs[0], made)
    ir.convenience.replace_all_uses_with(gelu.outputs[0], fused)
    return True


def _halves(images: GraphImages, before: ir.Node, value: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    """Both halves of a weight along an axis; ONNX Runtime makes them when it opens the net."""
    import onnx_ir as ir

    attributes: dict[str, object] = {"axis": axis, "num_outputs": 2}
    name = f"{before.outputs[0].name}/{value.name}/halves"
    node = ir.node("Split", [value], attributes, num_outputs=2, name=name)  # pyright: ignore[reportArgumentType]
    for output, which in zip(node.outputs, ("first", "second"), strict=True):
        output.name = f"{name}/{which}"
        output.type = ir.TensorType(ir.DataType.FLOAT)
    images.graph.insert_before(before, node)
    return node.outputs[0], node.outputs[1]


def _lower_attention(images: GraphImages, shapes: Shapes, node: ir.Node) -> bool:
    import onnx_ir as ir

    split = [heads_split(value, shapes) for value in node.inputs] if _is_plain_attention(node) else []
    merged = heads_merged(node.outputs[0], shapes) if split else None
    found = [item for item in split if item is not None]
    if merged is None or len(found) < len(split) or len({item.heads for item in found}) > 1:
        return False
    attributes: dict[str, object] = {"num_heads": found[0].heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale", 0.0)
    whole = [item.whole for item in found]
    made = images.contrib(node, "MultiHeadAttention", whole, f"{merged.name}/tiled", **attributes)
    ir.convenience.replace_all_uses_with(merged, made)
    return True


def _is_plain_attention(node: ir.Node) -> bool:
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
