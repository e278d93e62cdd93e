"""Lowers products that are rounded to int8 for ONNX Runtime's CPU provider: whole numbers are multiplied.

A rounded package has data that are rounded and scaled back in front of every product, and weights that are
scaled back (`export/quantised/graph.py`). The provider multiplies signed data slowly, and a convolution with
narrow numbers only where its output is rounded too. So products become

    q = QuantizeLinear(x, s, 128)                            uint8: the signed numbers, plus 128
    y = MatMulIntegerToFloat(q, w, s, t, 128, bias)          s t[n] sum_k (q[k] - 128) w[k, n] + bias[n]

the operator that the provider itself makes of MatMulInteger, Cast, Mul and Add, with sums in 32 bits. A
convolution is a product of columns: pixels channels last, as bytes, each beside its neighbours. They are made
for some rows of the picture at a time, as a picture's columns together are nine times as large as it is.

Without instructions that add products of bytes up in 32 bits (`processors.adds_bytes`) pairs of products are
added in 16 bits, and saturate. Sizes are read in the graph, so one graph serves every batch and picture. Only
engines are lowered, never packages. Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from .graph_images import CONTRIB, FIRST, LAST, GraphImages, weight_shape
from .patterns import maker_of

if TYPE_CHECKING:
    import onnx_ir as ir

_ZERO = 128  # what uint8 has for the zero of int8
_MOST_COLUMNS = 2**25  # bytes of a convolution's columns at a time: about SD 1.5's largest activation
_SIDES = (1, 3)  # of kernels
_STEPS = (1, 2)


def lower_rounded(model: ir.Model, pixels: int) -> int:
    """Lower every product in int8 and float32 in place; how many those are.

    Args:
        model: the graph.
        pixels: of its images, all of a batch together, at the size that columns are cut for.
    """
    import onnx_ir.passes.common as passes

    lowering = _Lowering(GraphImages(model.graph), pixels, _shrunk(model.graph))
    lowered = sum(lowering.lower(node) for node in list(model.graph))
    if lowered:
        model.opset_imports[CONTRIB] = 1
        passes.RemoveUnusedNodesPass()(model)
    return lowered


def _shrunk(graph: ir.Graph) -> Mapping[ir.Value, float]:
    """How many times as long as a value's a side of the first input is; a Resize doubles, as UNets do."""
    found: dict[ir.Value, float] = {graph.inputs[0]: 1}
    for node in graph:
        share = next((found[value] for value in node.inputs if value in found), None)
        if share is not None:
            if node.op_type == "Conv":
                share *= node.attributes.get_ints("strides", (1, 1))[0]
            found.update(dict.fromkeys(node.outputs, share / 2 if node.op_type == "Resize" else share))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Data:
    """Rounded data: what is rounded, and the scale."""

    values: ir.Value
    scale: ir.Value


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """A narrow weight.

    Attributes:
        stored: its numbers.
        scales: (N,), one for each of the output's channels.
        axes: the stored axis of each axis that the product reads.
    """

    stored: ir.Value
    scales: ir.Value
    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Window:
    """What a convolution reads of an image.

    Attributes:
        side: of the kernel.
        step: from one place to the next.
        pads: top, left, bottom, right.
    """

    side: int
    step: int
    pads: tuple[int, ...]


def _data(value: ir.Value | None) -> _Data | None:
    """What a product's rounded data are made of; None for other data."""
    import onnx_ir as ir

    back = maker_of(value, "DequantizeLinear")
    there = maker_of(back.inputs[0], "QuantizeLinear") if back is not None else None
    if back is None or there is None or len(there.inputs) != 3 or there.inputs[1:] != back.inputs[1:]:
        return None
    values, scale, zero = there.inputs
    number = zero.const_value if zero is not None else None
    plain = number is not None and number.dtype == ir.DataType.INT8 and not number.numpy().any()
    one = scale is not None and scale.const_value is not None and not scale.const_value.shape.rank()
    if values is None or scale is None or not plain or not one:
        return None
    return _Data(values=values, scale=scale)


def _weight(value: ir.Value | None, channels: int) -> _Weight | None:
    """The narrow weight that a product reads, with the output's `channels` on that axis; None for others."""
    import onnx_ir as ir

    turns: list[Sequence[int]] = []
    while (turn := maker_of(value, "Transpose")) is not None:
        turns.append(turn.attributes.get_ints("perm", ()))
        value = turn.inputs[0]
    back = maker_of(value, "DequantizeLinear")
    stored, scales = back.inputs[:2] if back is not None else (None, None)
    if back is None or stored is None or scales is None or len(back.inputs) != 2:
        return None
    shape, number = weight_shape(stored), weight_shape(scales)
    if shape is None or number is None or len(number) != 1 or stored.dtype != ir.DataType.INT8:
        return None
    axes = tuple(range(len(shape)))
    for perm in turns:
        axes = tuple(perm[axis] for axis in axes)
    along = back.attributes.get_int("axis", 1) == axes[channels] and not back.attributes.get_int(
        "block_size", 0
    )
    return _Weight(stored=stored, scales=scales, axes=axes) if along else None


def _window(node: ir.Node, side: int) -> _Window | None:
    """What a convolution reads; None where it is not lowered."""
    numbers = node.attributes
    steps = set(numbers.get_ints("strides", (1, 1)))
    plain = (
        set(numbers.get_ints("dilations", (1, 1))) == {1}
        and numbers.get_int("group", 1) == 1
        and numbers.get_string("auto_pad", "NOTSET") == "NOTSET"
    )
    if not plain or side not in _SIDES or len(steps) != 1 or not steps <= set(_STEPS):
        return None
    return _Window(side=side, step=steps.pop(), pads=tuple(numbers.get_ints("pads", (0, 0, 0, 0))))


class _Lowering:
    """One walk over a graph. What several products read is made once, in front of the first of them."""

    def __init__(self, images: GraphImages, pixels: int, shrunk: Mapping[ir.Value, float]) -> None:
        self._images, self._pixels, self._shrunk = images, pixels, shrunk
        self._made: dict[tuple[Any, ...], ir.Value] = {}
        self._count = 0

    def lower(self, node: ir.Node) -> bool:
        """Replace a node if it is a rounded product; whether it is."""
        import onnx_ir as ir

        rules = {"MatMul": (self._matrix, 1), "Conv": (self._convolution, 0)}
        if node.domain != "" or node.op_type not in rules or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        rule, channels = rules[node.op_type]
        data, weight = _data(node.inputs[0]), _weight(node.inputs[1], channels)
        return data is not None and weight is not None and rule(node, data, weight)

    def _matrix(self, node: ir.Node, data: _Data, weight: _Weight) -> bool:
        if len(weight.axes) != 2:
            return False
        numbers = self._turned(node, weight, (0, 1))
        added, bias = _bias_behind(node, weight)
        rows = self._bytes(node, data)
        self._replace(added, self._product(added, rows, data, numbers, weight, bias))
        return True

    def _convolution(self, node: ir.Node, data: _Data, weight: _Weight) -> bool:
        shape = weight_shape(weight.stored) or ()
        sides = {shape[axis] for axis in weight.axes[2:]}
        window = _window(node, sides.pop()) if len(shape) == 4 and len(sides) == 1 else None
        if window is None:
            return False
        numbers = self._turned(node, weight, (2, 3, 1, 0))  # columns are of places first, then of channels
        numbers = self._add(node, "Reshape", [numbers, self._ints(-1, shape[weight.axes[0]])])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        parts = [
            self._product(node, columns, data, numbers, weight, bias)
            for columns in self._columns(node, data, window, shape[weight.axes[1]])
        ]
        whole = self._add(node, "Concat", parts, axis=1) if len(parts) > 1 else parts[0]
        self._replace(node, self._add(node, "Transpose", [whole], perm=FIRST[4]))
        return True

    def _bytes(self, node: ir.Node, data: _Data) -> ir.Value:
        """Data as uint8, in their shape."""
        import onnx_ir as ir

        return self._once(
            ("bytes", data.values, data.scale),
            lambda: self._add(
                node, "QuantizeLinear", [data.values, data.scale, self._zero], ir.DataType.UINT8
            ),
        )

    def _columns(self, node: ir.Node, data: _Data, window: _Window, channels: int) -> Sequence[ir.Value]:
        """What the output's pixels are made of: (B, some rows, W, side^2 C), one band after another."""
        import onnx_ir as ir

        whole = self._image(node, data, window.pads)
        if (window.side, window.step) == (1, 1):
            return [whole]
        count, step = self._bands(node, window, channels), self._ints(window.step, window.step)
        shape = self._add(node, "Shape", [whole], ir.DataType.INT64, start=1, end=3)
        size = self._add(node, "Sub", [shape, self._ints(*[window.side - window.step] * 2)])
        size = self._add(node, "Div", [size, step])  # (2,): the output's height and width

        def corner(down: int, right: int) -> ir.Value:
            """(2,), where the window stands at so many shares of the output's height and width."""
            pixel = self._add(node, "Mul", [size, self._ints(down, right)])
            pixel = self._add(node, "Div", [pixel, self._ints(count, count)])
            return self._add(node, "Mul", [pixel, step])

        return [
            self._band(node, whole, window, corner(band, 0), corner(band + 1, count)) for band in range(count)
        ]

    def _band(
        self, node: ir.Node, whole: ir.Value, window: _Window, begin: ir.Value, end: ir.Value
    ) -> ir.Value:
        """The columns of the rows from one corner to the other. Slice cuts off what is behind the image."""
        axes, steps = self._ints(1, 2), self._ints(window.step, window.step)
        places: list[ir.Value] = []
        for place in product(range(window.side), repeat=2):
            corners = (self._add(node, "Add", [corner, self._ints(*place)]) for corner in (begin, end))
            places.append(self._add(node, "Slice", [whole, *corners, axes, steps]))
        return self._add(node, "Concat", places, axis=3) if len(places) > 1 else places[0]

    def _bands(self, node: ir.Node, window: _Window, channels: int) -> int:
        value = node.inputs[0]
        share = self._shrunk.get(value, 1) * window.step if value is not None else 1
        return ceil(window.side**2 * channels * self._pixels / share**2 / _MOST_COLUMNS)

    def _image(self, node: ir.Node, data: _Data, pads: tuple[int, ...]) -> ir.Value:
        """Data as bytes with channels last, (B, H, W, C), and zeros around them."""
        flat = self._bytes(node, data)
        last = self._once(("last", flat), lambda: self._add(node, "Transpose", [flat], perm=LAST[4]))
        top, left, bottom, right = pads
        around = self._ints(0, top, left, 0, 0, bottom, right, 0)
        if not any(pads):
            return last
        return self._once(("padded", flat, pads), lambda: self._add(node, "Pad", [last, around, self._zero]))

    def _product(
        self,
        before: ir.Node,
        rows: ir.Value,
        data: _Data,
        numbers: ir.Value,
        weight: _Weight,
        bias: ir.Value | None,
    ) -> ir.Value:
        import onnx_ir as ir

        inputs = [rows, numbers, data.scale, weight.scales, self._zero, None, bias]
        value = self._images.contrib(before, "MatMulIntegerToFloat", inputs, self._name(before))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value

    def _turned(self, node: ir.Node, weight: _Weight, order: Sequence[int]) -> ir.Value:
        """The numbers of a weight in another order of the axes that the product reads; made at load."""
        perm = tuple(weight.axes[axis] for axis in order)
        if perm == tuple(range(len(perm))):
            return weight.stored
        return self._add(node, "Transpose", [weight.stored], perm=perm)

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        import onnx_ir as ir

        old = node.outputs[0]
        value.shape = old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        value.name, old.name = old.name, value.name
        self._images.graph.remove(node, safe=True)

    def _once(self, key: tuple[Any, ...], make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _add(
        self,
        before: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = None,
        **attributes: object,
    ) -> ir.Value:
        import onnx_ir as ir

        value = self._images.insert(before, kind, inputs, self._name(before), **attributes)
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        return value

    def _name(self, before: ir.Node) -> str:
        self._count += 1
        return f"{before.outputs[0].name}/rounded.{self._count}"

    @property
    def _zero(self) -> ir.Value:
        return self._images.tensor("rounded/zero", np.array(_ZERO, np.uint8))

    def _ints(self, *numbers: int) -> ir.Value:
        return self._images.constant(*numbers)


def _bias_behind(product: ir.Node, weight: _Weight) -> tuple[ir.Node, ir.Value | None]:
    """The sum that alone reads a product, with a number for each channel, and those; else the product."""
    value = product.outputs[0]
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not value.is_graph_output():
        for bias in users[0].inputs:
            if bias is not value and weight_shape(bias) == weight_shape(weight.scales):
                return users[0], bias
    return product, None
