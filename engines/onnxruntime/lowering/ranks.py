"""How many dimensions a value of a graph has: graphs carry no shapes between their nodes.

What is known comes from weights and operators. Needs onnx-ir, as what asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .image_layouts import numbers_of
from .lower import weight_shape

if TYPE_CHECKING:
    import onnx_ir as ir

_FIRST = frozenset({"Cast", "Concat", "LayerNormalization", "Resize", "Sigmoid", "Split"})
_BROADCAST = frozenset({"Add", "Div", "Mul", "Sub"})


def rank_of(value: ir.Value | None) -> int | None:
    """The rank of a value, where it says so or what made it does; else None."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in _FIRST:
        return rank_of(node.inputs[0])
    if node.op_type in _BROADCAST:
        ranks = [rank_of(item) for item in node.inputs]
        return None if None in ranks else max(rank for rank in ranks if rank is not None)
    return _made_rank(node)


def _made_rank(node: ir.Node) -> int | None:
    """Of the output of an operator that changes ranks, or tells one."""
    if node.op_type == "Conv":
        return len(weight_shape(node.inputs[1]) or ()) or None
    if node.op_type == "Transpose":
        return len(node.attributes.get_ints("perm", ())) or None
    if node.op_type == "Reshape":
        return _entries(node.inputs[1])
    if node.op_type == "Squeeze":
        return 0 if _is_one_size(node.inputs[0]) else None
    if node.op_type == "Unsqueeze":
        axes, rank = numbers_of(node.inputs[1]), rank_of(node.inputs[0])
        return None if axes is None or rank is None else rank + len(axes)
    if node.op_type == "MatMul" and rank_of(node.inputs[1]) == 2:
        return rank_of(node.inputs[0])
    return None


def _entries(value: ir.Value | None) -> int | None:
    """How many numbers a shape has that is written, or put together of numbers and sizes; else None."""
    numbers = numbers_of(value)
    maker = value.producer() if value is not None else None
    if numbers is not None or maker is None:
        return len(numbers) if numbers is not None else None
    if maker.op_type == "Concat":
        counts = [_entries(item) for item in maker.inputs]
        return None if None in counts else sum(count for count in counts if count is not None)
    scalar = maker.op_type in ("Reshape", "Unsqueeze") and rank_of(maker.inputs[0]) == 0
    return 1 if scalar else None


def _is_one_size(value: ir.Value | None) -> bool:
    """Whether it is one entry of a shape."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "Shape":
        return False
    return maker.attributes.get_int("end", 0) - maker.attributes.get_int("start", 0) == 1
