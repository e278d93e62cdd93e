"""Parts of a transformer block, as the exporter writes them: heads, biased products, gates.

The CPU's lowering (`fused.py`) and CUDA's (`cuda_blocks.py`) look for the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .graph_images import weight_shape
from .shapes import Shapes

if TYPE_CHECKING:
    import onnx_ir as ir

_HEADS_OUT = (0, 2, 1, 3)  # (B, L, heads, size) to (B, heads, L, size), and back


def biased_product(split: ir.Node, shapes: Shapes) -> tuple[ir.Node, ir.Value] | None:
    """The product and the bias whose sum is split in halves of its columns, where nobody else sees either."""
    if split.domain != "" or split.op_type != "Split" or len(split.inputs) != 1 or len(split.outputs) != 2:
        return None
    added = only_maker(split.inputs[0], "Add")
    rank = len(shapes.get(added.outputs[0], ())) if added is not None else 0
    if added is None or not rank:
        return None
    axis = split.attributes.get_int("axis", 0)
    for value, bias in (added.inputs, reversed(added.inputs)):
        product, shape = only_maker(value, "MatMul"), weight_shape(bias)
        if bias is None or product is None or shape is None or not _is_weight(product.inputs[1]):
            continue
        if len(shape) == 1 and shape[0] % 2 == 0 and axis in (-1, rank - 1):
            return product, bias
    return None


def _is_weight(value: ir.Value | None) -> bool:
    """Whether it is a stored matrix, which may be stored transposed, and in another type."""
    for kind in ("Cast", "Transpose"):
        maker = maker_of(value, kind)
        value = maker.inputs[0] if maker is not None else value
    return len(weight_shape(value) or ()) == 2


def maker_of(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes a value, if it is of that kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and node.domain == "" else None


def only_maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of that kind that makes a value for one user alone."""
    node = maker_of(value, kind)
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return node if alone else None


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


def heads_split(value: ir.Value | None, shapes: Shapes) -> Heads | None:
    """The heads that a value (B, heads, L, size) consists of; None where it is made in another way."""
    transpose = maker_of(value, "Transpose")
    reshape = maker_of(transpose.inputs[0], "Reshape") if transpose is not None else None
    whole = reshape.inputs[0] if reshape is not None else None
    if value is None or transpose is None or whole is None or not _turns_heads(transpose):
        return None
    before, (rows, heads, length, size) = shapes.get(whole), shapes.get(value, (None,) * 4)
    if before is None or len(before) != 3 or before[:2] != (rows, length):
        return None
    return Heads(whole, heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def heads_merged(value: ir.Value, shapes: Shapes) -> ir.Value | None:
    """The (B, L, heads * size) that is made of (B, heads, L, size), where nothing else is."""
    transpose = _only_user(value, "Transpose")
    reshape = _only_user(transpose.outputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or not _turns_heads(transpose):
        return None
    merged = reshape.outputs[0]
    before, after = shapes.get(value), shapes.get(merged)
    same = before is not None and after is not None and after[:2] == before[::2][:2]
    return merged if same and len(after or ()) == 3 and not merged.is_graph_output() else None


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == kind and users[0].domain == "" else None


def _turns_heads(transpose: ir.Node) -> bool:
    return tuple(transpose.attributes.get_ints("perm", ())) == _HEADS_OUT
