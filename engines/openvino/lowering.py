"""What becomes of a net's graph before OpenVINO compiles it.

A transformer's feed-forward layer multiplies into two halves, of which one gates the other (GEGLU, Shazeer
2020, arXiv 2002.05202, section 2). The graph has one product and splits it, as the weights are stored.
OpenVINO copies each half then, with one thread. Two products of half the rows write what is needed where it
is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..spec import Array
from .library import library, opset


def lower(model: Any, weights: Mapping[str, Array]) -> None:
    """Lower a net in place.

    Args:
        model: the net.
        weights: by the name of the constant that reads them. What is in fewer bits is not multiplied as it
            is stored, and stays as it is.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Split" and node.get_output_size() == 2:
            _split_product(node, weights)


def constant(array: Array) -> Any:
    """A constant that reads an array where it lies, and keeps it."""
    return library().op.Constant(array, shared_memory=True)


def _split_product(split: Any, weights: Mapping[str, Array]) -> None:
    """Two products in place of one whose columns (…, 2N) are split; nothing where it is something else."""
    total = split.input_value(0).get_node()
    product = _maker(total, 0, "MatMul") if total.get_type_name() == "Add" else None
    turned = _maker(product, 1, "Transpose") if product is not None else None
    if product is None or turned is None or not _is_last_axis(split):
        return
    weight = weights.get(_stored(turned.input_value(0)))  # (2N, C)
    bias = weights.get(_stored(total.input_value(1)))  # (2N,)
    if weight is None or bias is None or bias.shape != weight.shape[:1]:
        return
    half = len(weight) // 2
    for index in (0, 1):
        rows = slice(index * half, (index + 1) * half)
        one = opset().matmul(product.input_value(0), constant(weight[rows]), False, True)
        split.output(index).replace(opset().add(one, constant(bias[rows])).output(0))


def _maker(node: Any, index: int, kind: str) -> Any:
    """What makes an input of a node, if it is of this kind; else None."""
    found = node.input_value(index).get_node()
    return found if found.get_type_name() == kind else None


def _is_last_axis(split: Any) -> bool:
    axis, rank = split.input_value(1).get_node(), split.input_value(0).get_partial_shape().rank
    known = axis.get_type_name() == "Constant" and rank.is_static
    return known and int(axis.data) in (-1, rank.get_length() - 1)


def _stored(value: Any) -> str:
    """The name of a constant, which may go through a cast to its own type."""
    node = value.get_node()
    if node.get_type_name() == "Convert" and node.get_element_type() == node.input(0).get_element_type():
        node = node.input_value(0).get_node()
    name: str = node.get_friendly_name()
    return name
