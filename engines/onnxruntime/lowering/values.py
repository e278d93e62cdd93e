"""What is known of a value of a graph: its numbers, its shape as a weight, its rank.

Graphs carry no shapes between their nodes (`export/graphs/passes.py`), so a rank follows from weights and
operators. Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
_LIKE_FIRST_INPUT = frozenset({"Cast", "Concat", "LayerNormalization", "Resize", "Sigmoid", "Split"})
_BROADCAST = frozenset({"Add", "Div", "Mul", "Sub"})


def numbers_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers of a small constant; None for what is computed, and for weights."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.dtype != ir.DataType.INT64 or len(tensor.shape) > 1:
        return None
    return tuple(np.atleast_1d(tensor.numpy()).tolist())


def weight_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a weight, which may be stored narrower and cast; None for what is computed."""
    maker = value.producer() if value is not None else None
    stored = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else value
    tensor = stored.const_value if stored is not None else None
    return tuple(size for size in tensor.shape if isinstance(size, int)) if tensor is not None else None


def rank_of(value: ir.Value | None) -> int | None:
    """The rank of a value if its own shape or its maker tells it, else None."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in _LIKE_FIRST_INPUT:
        return rank_of(node.inputs[0])
    if node.op_type in _BROADCAST:
        ranks = [rank_of(item) for item in node.inputs]
        return None if None in ranks else max(rank for rank in ranks if rank is not None)
    return _made_rank(node)


def _made_rank(node: ir.Node) -> int | None:
    """The rank of what an operator makes that changes ranks, or whose weights tell its rank."""
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
