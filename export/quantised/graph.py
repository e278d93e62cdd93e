"""Puts a rounding into a graph: narrow weights that are scaled back, and data rounded in between.


QuantizeLinear and DequantizeLinear are the form that TensorRT, OpenVINO and ONNX Runtime all read: where both
sides of a product have it, it is computed with narrow numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engines.spec import Array
from .places import Place
from .rounding import Rounding

if TYPE_CHECKING:
    import onnx_ir as ir


class RoundedGraph:
    """A graph while it is changed; its weights are given to it by who has stored them."""

    def __init__(self, model: ir.Model, rounding: Rounding) -> None:
        import onnx_ir as ir

        self._graph, self._rounding = model.graph, rounding
        self._nodes = {value.name: node for node in self._graph for value in node.outputs}
        self._narrow = getattr(ir.DataType, rounding.format.onnx)
        self._rounded: dict[str, ir.Value] = {}

    @property
    def places(self) -> tuple[Place, ...]:
        """The places of the rounding that this graph has: others are cut from the same net."""
        return tuple(place for place in self._rounding.places if place.name in self._nodes)

    def divide(self) -> None:
        """Divide the channels of normalised data, in the LayerNormalization that they come from."""
        for name, factor in self._rounding.divided.items():
            node = self._nodes.get(name)
            for index in range(1, len(node.inputs) if node else 0):
                assert node is not None
                inverse = self._constant(1 / factor, f"{name}/divided/{index}", self._type(node))
                node.replace_input_with(index, self._insert(node, "Mul", [node.inputs[index], inverse], name))

    def round(self, scales: Mapping[str, Array]) -> None:
        """Scale back the weights of all places, and round their data.

        The initializers of the weights are narrow already; `scales` are theirs, by name.
        """
        for place in self.places:
            node = self._nodes[place.name]
            if place.weight in self._graph.initializers and place.weight not in self._rounded:
                self._rounded[place.weight] = self._widen(place, node, scales[place.weight])
            if place.data in self._rounding.data:
                node.replace_input_with(0, self._data(place, node))

    def _widen(self, place: Place, node: ir.Node, scale: Array) -> ir.Value:
        """Put a DequantizeLinear behind a weight, in place of the casts there."""
        import onnx_ir as ir

        weight: Any = self._graph.initializers[place.weight]
        for use in list(weight.uses()):
            self._without_casts(use.node)
        wide = self._type(node)
        axes: dict[str, int] = {}
        if self._rounding.format.block:
            axes = {"axis": place.input_axis, "block_size": self._rounding.format.block}
        elif scale.ndim:
            axes = {"axis": place.output_axis}
        numbers = [weight, self._constant(scale, f"{place.weight}/scale", wide)]
        back = ir.node("DequantizeLinear", numbers, axes, num_outputs=1)
        back.outputs[0].name, back.outputs[0].dtype = f"{place.weight}/rounded", wide
        ir.convenience.replace_all_uses_with(weight, back.outputs[0])
        back.replace_input_with(0, weight)
        self._graph.insert_before(self._graph[0], back)
        self._retype(back.outputs[0], wide)
        return back.outputs[0]

    def _without_casts(self, node: ir.Node) -> None:
        """Take away the casts of a weight: what scales it back has the type that they make."""
        import onnx_ir as ir

        if node.op_type == "Cast":
            first = node.inputs[0]
            assert first is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], first)
            self._graph.remove(node, safe=True)
        elif node.op_type == "Transpose":
            for use in list(node.outputs[0].uses()):
                self._without_casts(use.node)

    def _retype(self, value: ir.Value, wide: Any) -> None:
        """Have the turns behind a weight say the type that they have now."""
        for use in value.uses():
            if use.node.op_type == "Transpose":
                use.node.outputs[0].dtype = wide
                self._retype(use.node.outputs[0], wide)

    def _data(self, place: Place, node: ir.Node) -> ir.Value:
        """The rounded data of a place; one pair for all products that read them."""
        if place.data not in self._rounded:
            wide, name = self._type(node), place.data
            scale = np.array(self._rounding.data[name], np.float32)
            numbers = [
                self._constant(scale, f"{name}/scale", wide),
                self._constant(np.zeros((), np.int8), f"{name}/zero", self._narrow),
            ]
            small = self._insert(node, "QuantizeLinear", [node.inputs[0], *numbers], name)
            small.dtype = self._narrow
            self._rounded[name] = self._insert(node, "DequantizeLinear", [small, *numbers], name)
            self._rounded[name].dtype = wide
        return self._rounded[place.data]

    def _type(self, node: ir.Node) -> Any:
        """What a node computes with."""
        import onnx_ir as ir

        return node.outputs[0].dtype or ir.DataType.FLOAT

    def _constant(self, array: Array, name: str, dtype: Any) -> ir.Value:
        import onnx_ir as ir

        if name in self._graph.initializers:
            return self._graph.initializers[name]
        values = np.asarray(array).astype(dtype.numpy())
        value = ir.Value(
            name=name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(dtype),
            const_value=ir.tensor(values, dtype=dtype, name=name),
        )
        self._graph.register_initializer(value)
        return value

    def _insert(self, before: ir.Node, operator: str, inputs: list[Any], name: str) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(operator, inputs, num_outputs=1)
        node.outputs[0].name = f"{name}/{operator.lower()}/{len(self._graph)}"
        node.outputs[0].dtype = self._type(before)
        self._graph.insert_before(before, node)
        return node.outputs[0]
