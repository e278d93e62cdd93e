"""Parts of a transformer block, as the exporter writes them: heads, biased products, gates.

The CPU's lowering (`fused.py`) and CUDA's (`cuda_blocks.py`) look for the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .graph_images import numbers_of, rank_of, weight_shape

if TYPE_CHECKING:
    import onnx_ir as ir

HEADS_OUT = (0, 2, 1, 3)  # (B, L, heads, size) to (B, heads, L, size), and back


def biased_product(split: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The product and the bias whose sum is split in halves of its columns, where nobody else sees either."""
    if split.domain != "" or split.op_type != "Split" or len(split.inputs) != 1 or len(split.outputs) != 2:
        return None
    added = only_maker(split.inputs[0], "Add")
    if added is None:
        return None
    axis = split.attributes.get_int("axis", 0)
    for value, bias in (added.inputs, reversed(added.inputs)):
        product, shape = only_maker(value, "MatMul"), weight_shape(bias)
        if bias is None or product is None or shape is None or not _is_weight(product.inputs[1]):
            continue
        rank = rank_of(product.inputs[0])
        if rank is not None and len(shape) == 1 and shape[0] % 2 == 0 and axis in (-1, rank - 1):
            return product, bias
    return None


def _is_weight(value: ir.Value | None) -> bool:
    """Whether it is a stored matrix, which may be stored transposed."""
    maker = value.producer() if value is not None else None
    stored = maker.inputs[0] if maker is not None and maker.op_type == "Transpose" else value
    return len(weight_shape(stored) or ()) == 2


def only_maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of that kind that makes a value for one user alone."""
    maker = value.producer() if value is not None else None
    if value is None or maker is None or maker.domain != "" or maker.op_type != kind:
        return None
    return maker if len(list(value.uses())) == 1 and not value.is_graph_output() else None


def gelu_behind(split: ir.Node) -> ir.Node | None:
    """The exact Gelu of the second half, where nobody else sees that, and somebody the first."""
    first, second = split.outputs
    users = [use.node for use in second.uses()]
    if len(users) != 1 or first.is_graph_output() or second.is_graph_output():
        return None
    gelu = users[0]
    exact = gelu.attributes.get_string("approximate", "none") == "none"
    alone = gelu.op_type == "Gelu" and not gelu.outputs[0].is_graph_output()
    return gelu if exact and alone and gelu.domain == "" else None


@dataclass(frozen=True)
class Heads:
    """A value (B, heads, L, size) that is made of (B, L, heads * size).

    Attributes:
        whole: what it is made of.
        heads: how many.
        size: of each.
    """

    whole: ir.Value
    heads: int
    size: int


def heads_split(value: ir.Value | None) -> Heads | None:
    """The heads that a value (B, heads, L, size) consists of; None where it is made in another way."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshaped = transpose.inputs[0]
    reshape = reshaped.producer() if reshaped is not None else None
    if tuple(transpose.attributes.get_ints("perm", ())) != HEADS_OUT or reshape is None:
        return None
    target = numbers_of(reshape.inputs[1]) if reshape.op_type == "Reshape" else None
    whole = reshape.inputs[0]
    # Only a batch and a length that are copied tell that the input has three dimensions, and only numbers
    # that are written tell how many heads there are.
    if whole is None or target is None or len(target) != 4 or target[:2] != (0, 0) or min(target[2:]) < 1:
        return None
    return Heads(whole, target[2], target[3])


def heads_merged(value: ir.Value) -> ir.Value | None:
    """The (B, L, heads * size) that is made of (B, heads, L, size), where nothing else is."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != "Transpose" or value.is_graph_output():
        return None
    turned = users[0].outputs[0]
    after = [use.node for use in turned.uses()]
    whole = len(after) == 1 and after[0].op_type == "Reshape" and not turned.is_graph_output()
    if not whole or tuple(users[0].attributes.get_ints("perm", ())) != HEADS_OUT:
        return None
    target = numbers_of(after[0].inputs[1])
    merged = after[0].outputs[0]
    ok = target is not None and len(target) == 3 and target[:2] == (0, 0) and not merged.is_graph_output()
    return merged if ok else None
