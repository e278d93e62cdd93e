"""Lowers group normalisation for ONNX Runtime's CPU provider, which has no kernel for it.

It runs the operator's function body: twenty nodes, with a variance E[x^2] - E[x]^2. For the normalisation of
whole rows there is a kernel, `LayerNormalization`, which works on all cores and adds up in float64. Without
gamma and beta, which are of channels, a group is such a row:

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

The body's error is 7e-4 there. Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .graph_images import GraphImages
from .values import rank_of, weight_shape

if TYPE_CHECKING:
    import onnx_ir as ir

_OPSET = 21  # before, gamma and beta had one number per group


def lower_group_norms(model: ir.Model) -> int:
    """Lower every group normalisation in float32 in place; how many those are."""
    import onnx_ir.passes.common as passes

    if model.opset_imports.get("", 0) < _OPSET:
        return 0
    images = GraphImages(model.graph)
    lowered = sum(_lower(images, node) for node in list(model.graph))
    if lowered:
        passes.RemoveUnusedNodesPass()(model)
    return lowered


def _lower(images: GraphImages, node: ir.Node) -> bool:
    import onnx_ir as ir

    if node.domain != "" or node.op_type != "GroupNormalization":
        return False
    data, gamma, beta = node.inputs
    channels, groups = weight_shape(gamma), node.attributes.get_int("num_groups", 0)
    rank = rank_of(data)
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
