"""The products of a graph that can be rounded: matrix products and convolutions with weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from ...engines.spec import Array

if TYPE_CHECKING:
    import onnx_ir as ir

_PRODUCTS = {"MatMul": 1, "Conv": 0}  # operator -> the axis of its weight that has the output's channels
_CONSTANT = ("Cast", "Transpose")  # what may stand between a stored weight and who reads it
_FEWEST = 32  # channels on either side: below, a product is not what takes the time


@dataclass(frozen=True, kw_only=True)
class Place:
    """One product.

    Attributes:
        name: of its output.
        operator: MatMul or Conv.
        data: the name of the tensor that is multiplied.
        weight: the name of the stored weight.
        turns: the permutations that stand between the stored weight and the product, in their order.
    """

    name: str
    operator: str
    data: str
    weight: str
    turns: tuple[tuple[int, ...], ...]

    @property
    def output_axis(self) -> int:
        """The axis of the stored weight that has the output's channels."""
        return self._stored_axis(_PRODUCTS[self.operator])

    @property
    def input_axis(self) -> int:
        """The axis of the stored weight along which products are summed, that of the data's channels."""
        return self._stored_axis(1 - _PRODUCTS[self.operator])

    def _stored_axis(self, axis: int) -> int:
        return reduce(lambda found, turn: turn[found], reversed(self.turns), axis)


def find_places(model: ir.Model, operators: Sequence[str] = tuple(_PRODUCTS)) -> tuple[Place, ...]:
    """Every product of a graph but the first and the last, in the graph's order.

    What enters a net and what leaves it is what the picture is made of, and takes no time: both stay as they
    are, as in the published recipes for diffusion models (NVIDIA/Model-Optimizer, examples/diffusers).
    """
    nodes = [node for node in model.graph if node.domain == "" and node.op_type in _PRODUCTS]
    return tuple(place for place in _places(nodes[1:-1]) if place.operator in operators)


def _places(nodes: Iterable[ir.Node]) -> Iterator[Place]:
    for node in nodes:
        data, weight = node.inputs[:2]
        if data is None or weight is None:
            continue
        turns, stored = _stored(weight)
        shape, name = stored.shape, node.outputs[0].name
        if shape is None or stored.const_value is None or node.attributes.get_int("group", 1) != 1:
            continue
        if min(shape.numpy()[:2]) < _FEWEST or data.name is None or stored.name is None or name is None:
            continue
        yield Place(name=name, operator=node.op_type, data=data.name, weight=stored.name, turns=turns)


def _stored(value: ir.Value) -> tuple[tuple[tuple[int, ...], ...], ir.Value]:
    """What stands between a weight and its reader, and the stored one."""
    turns: list[tuple[int, ...]] = []
    while (maker := value.producer()) is not None and maker.op_type in _CONSTANT:
        if maker.op_type == "Transpose":
            turns.append(tuple(maker.attributes.get_ints("perm", ())))
        first = maker.inputs[0]
        assert first is not None
        value = first
    return tuple(reversed(turns)), value


def along(axis: int, values: Array, rank: int) -> Array:
    """A vector in a shape that multiplies an array of that rank along an axis."""
    return np.reshape(values, [-1 if index == axis else 1 for index in range(rank)])
