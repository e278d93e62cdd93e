"""What the operators of a graph prove about the shapes of its values.

A package's graphs carry no shapes between their nodes, and ONNX's own inference stops at the operators of
ONNX Runtime and gives unknown sizes no names. Here every size is a number, a name that an input of the graph
gives it, or "axis i of the value v", where it came up first. Two values of equal sizes then have the same
shape whenever the graph runs: which is what a kernel wants that adds without broadcasting.

onnx-ir is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .graph_images import CONTRIB, numbers_of

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Size:
    """A size that no number is known of: what axis `axis` of `value` is when the graph runs."""

    value: ir.Value
    axis: int


@dataclass(frozen=True)
class Flat:
    """The number of pixels of an image of these sizes."""

    height: Dim
    width: Dim


Dim = int | str | Size | Flat
Dims = tuple[Dim, ...]  # from the first axis to the last
Shapes = Mapping["ir.Value", Dims]

_LIKE_FIRST = frozenset(
    {
        *("Cast", "Clip", "Cos", "Gelu", "Identity", "Relu", "Sigmoid", "Sin", "Softmax", "Swish", "Tanh"),
        *("GroupNorm", "GroupNormalization", "LayerNormalization"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
_BROADCAST = frozenset({"Add", "Div", "GreaterOrEqual", "Max", "Mul", "Sub", "Where"})
_CONTRIB = frozenset(
    {"BiasSplitGelu", "GroupNorm", "MultiHeadAttention", "NhwcConv"}
)  # all others are ONNX's


def shapes_of(graph: ir.Graph) -> Shapes:
    """The shapes of a graph's values, as far as they can be told; values of unknown rank are missing."""
    found = _Walk()
    for value in (*graph.inputs, *graph.initializers.values()):
        found.learn_stored(value)
    for node in graph:
        found.learn(node)
    return found.shapes


class _Walk:
    """One walk over a graph, in its order."""

    def __init__(self) -> None:
        self.shapes: dict[ir.Value, Dims] = {}
        self._rules: Mapping[str, Callable[[ir.Node], Dims | None]] = {
            **dict.fromkeys(_LIKE_FIRST, lambda node: self._of(node.inputs[0])),
            **dict.fromkeys(_BROADCAST, lambda node: self._broadcast(node.outputs[0], node.inputs)),
            "Attention": self._attention,
            "BiasSplitGelu": lambda node: self._halved(node, -1),
            "Concat": self._concat,
            "Constant": self._constant,
            "Conv": lambda node: self._conv(node, channels=1),
            "Gather": self._gather,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "MultiHeadAttention": self._attention,
            "NhwcConv": lambda node: self._conv(node, channels=3),
            "Pad": self._pad,
            "Reshape": self._reshape,
            "Resize": self._resize,
            "Slice": self._slice,
            "Split": self._split,
            "Squeeze": self._squeeze,
            "Transpose": self._transpose,
            "Unsqueeze": self._unsqueeze,
        }

    def learn_stored(self, value: ir.Value) -> None:
        """An input or a weight."""
        if value.shape is not None:
            self.shapes[value] = tuple(
                size if isinstance(size, int) else str(size.value or f"{value.name}.{axis}")
                for axis, size in enumerate(value.shape)
            )

    def learn(self, node: ir.Node) -> None:
        """The outputs of a node whose inputs are known."""
        known = node.domain == (CONTRIB if node.op_type in _CONTRIB else "")
        rule = self._rules.get(node.op_type) if known else None
        dims = rule(node) if rule is not None else None
        if dims is not None:  # of other operators the further outputs are statistics, caches and the like
            outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
            self.shapes.update(dict.fromkeys(outputs, dims))

    def _of(self, value: ir.Value | None) -> Dims | None:
        return self.shapes.get(value) if value is not None else None

    def _broadcast(self, made: ir.Value, values: Sequence[ir.Value | None]) -> Dims | None:
        shapes = [self._of(value) for value in values]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return None
        rank = max(map(len, known))
        rows = [(1,) * (rank - len(shape)) + shape for shape in known]
        dims: list[Dim] = []
        for axis, sizes in enumerate(zip(*rows, strict=True)):
            wide = {size for size in sizes if size != 1} or {1}
            dims.append(wide.pop() if len(wide) == 1 else Size(made, axis))
        return tuple(dims)

    def _attention(self, node: ir.Node) -> Dims | None:
        """(B, L, C) of queries that have the form; heads on an axis of their own are left to Transposes."""
        queries, values = self._of(node.inputs[0]), self._of(node.inputs[2])
        if queries is None or values is None or len(queries) not in (3, 4):
            return None
        if len(queries) == 4:
            return (*queries[:3], values[-1])
        return (*queries[:2], values[2] if len(values) == 3 else queries[2])

    def _slice(self, node: ir.Node) -> Dims | None:
        shape, axes = self._of(node.inputs[0]), numbers_of(node.inputs[3]) if len(node.inputs) > 3 else None
        if shape is None or axes is None:
            return None
        cut = {axis % len(shape) for axis in axes}
        return tuple(Size(node.outputs[0], axis) if axis in cut else size for axis, size in enumerate(shape))

    def _split(self, node: ir.Node) -> Dims | None:
        two = len(node.inputs) == 1 and len(node.outputs) == 2
        return self._halved(node, node.attributes.get_int("axis", 0)) if two else None

    def _halved(self, node: ir.Node, axis: int) -> Dims | None:
        shape = self._of(node.inputs[0])
        size = shape[axis] if shape else 0
        if not shape or not isinstance(size, int) or size % 2:
            return None
        axis %= len(shape)
        return (*shape[:axis], size // 2, *shape[axis + 1 :])

    def _concat(self, node: ir.Node) -> Dims | None:
        shapes = [shape for value in node.inputs if (shape := self._of(value)) is not None]
        if len(shapes) < len(node.inputs):
            return None
        axis = node.attributes.get_int("axis", 0) % len(shapes[0])
        # On the other axes all are equal: a number or a name says more than where a size came up.
        dims = [
            next((size for size in sizes if isinstance(size, int | str)), sizes[0])
            for sizes in zip(*shapes, strict=True)
        ]
        numbers = [size for shape in shapes if isinstance(size := shape[axis], int)]
        dims[axis] = sum(numbers) if len(numbers) == len(shapes) else Size(node.outputs[0], axis)
        return tuple(dims)

    def _constant(self, node: ir.Node) -> Dims | None:
        import onnx_ir as ir

        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        return tuple(size for size in tensor.shape if isinstance(size, int)) if tensor is not None else None

    def _conv(self, node: ir.Node, *, channels: int) -> Dims | None:
        data, weight = self._of(node.inputs[0]), self._of(node.inputs[1])
        if data is None or weight is None or len(data) != 4 or len(weight) != 4:
            return None
        pads, made = node.attributes.get_ints("pads", ()), node.outputs[0]
        kernel = [weight[axis] for axis in range(1, 4) if axis != channels]
        image = [axis for axis in range(1, 4) if axis != channels]
        ones = all(set(node.attributes.get_ints(name, (1,))) == {1} for name in ("strides", "dilations"))
        if ones and len(pads) == 4 and [pads[0] + pads[2] + 1, pads[1] + pads[3] + 1] == kernel:
            sizes = [data[axis] for axis in image]
        else:
            sizes: list[Dim] = [Size(made, axis) for axis in image]
        return (data[0], weight[0], *sizes) if channels == 1 else (data[0], *sizes, weight[0])

    def _gather(self, node: ir.Node) -> Dims | None:
        data, places = self._of(node.inputs[0]), self._of(node.inputs[1])
        if data is None or places is None:
            return None
        axis = node.attributes.get_int("axis", 0) % len(data)
        return (*data[:axis], *places, *data[axis + 1 :])

    def _gemm(self, node: ir.Node) -> Dims | None:
        left, right = self._of(node.inputs[0]), self._of(node.inputs[1])
        if left is None or right is None:
            return None
        rows, columns = node.attributes.get_int("transA", 0), 1 - node.attributes.get_int("transB", 0)
        return (left[rows], right[columns])

    def _matmul(self, node: ir.Node) -> Dims | None:
        """With a matrix on the right, or of two values of the same rank."""
        left, right = self._of(node.inputs[0]), self._of(node.inputs[1])
        if left is None or right is None or len(left) < 2 or (len(right) != 2 and left[:-2] != right[:-2]):
            return None
        return (*left[:-1], right[-1])

    def _pad(self, node: ir.Node) -> Dims | None:
        shape, pads, made = self._of(node.inputs[0]), numbers_of(node.inputs[1]), node.outputs[0]
        if shape is None or pads is None or len(pads) != 2 * len(shape):
            return None
        more = [
            before + behind for before, behind in zip(pads[: len(shape)], pads[len(shape) :], strict=True)
        ]
        return tuple(
            size + more[axis] if isinstance(size, int) else Size(made, axis) if more[axis] else size
            for axis, size in enumerate(shape)
        )

    def _reshape(self, node: ir.Node) -> Dims | None:
        shape, parts = self._of(node.inputs[0]) or (), _target(node.inputs[1])
        if parts is None or node.attributes.get_int("allowzero", 0):
            return None
        if len(shape) == 4 and len(parts) == 3 and parts[:2] == (0, -1) and parts[2] == shape[3]:
            return (shape[0], Flat(shape[1], shape[2]), shape[3])
        if len(shape) == 3 and len(parts) == 4 and parts[0] == 0 and parts[3] == shape[2]:
            # As many pixels as before in two sizes: whoever adds this to an image of the old sizes broadcasts
            # nothing, unless he adds a row to a column.
            pixels = shape[1]
            if isinstance(pixels, Flat):
                return (shape[0], pixels.height, pixels.width, shape[2])
        made = node.outputs[0]
        return tuple(
            shape[axis] if part == 0 and axis < len(shape) else part or Size(made, axis)
            for axis, part in enumerate(None if part == -1 else part for part in parts)
        )

    def _resize(self, node: ir.Node) -> Dims | None:
        shape = self._of(node.inputs[0])
        return tuple(Size(node.outputs[0], axis) for axis in range(len(shape))) if shape else None

    def _squeeze(self, node: ir.Node) -> Dims | None:
        shape, axes = self._of(node.inputs[0]), numbers_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if shape is None or axes is None:
            return None
        gone = {axis % len(shape) for axis in axes}
        return tuple(size for axis, size in enumerate(shape) if axis not in gone)

    def _transpose(self, node: ir.Node) -> Dims | None:
        shape, perm = self._of(node.inputs[0]), node.attributes.get_ints("perm", ())
        return tuple(shape[axis] for axis in perm) if shape and len(perm) == len(shape) else None

    def _unsqueeze(self, node: ir.Node) -> Dims | None:
        shape, axes = self._of(node.inputs[0]), numbers_of(node.inputs[1])
        if shape is None or axes is None or min(axes) < 0:
            return None
        dims = list(shape)
        for axis in sorted(axes):
            dims.insert(axis, 1)
        return tuple(dims)


def _target(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The numbers of a new shape, with None for one that is computed; None if their count is unknown."""
    numbers = numbers_of(value)
    maker = value.producer() if value is not None else None
    if numbers is not None or maker is None or maker.op_type != "Concat":
        return numbers
    parts: list[int | None] = []
    for item in maker.inputs:
        known = numbers_of(item)
        if known is None and not _is_one(item):
            return None
        parts.extend(known or (None,))
    return tuple(parts)


def _is_one(value: ir.Value | None) -> bool:
    """Whether it is a vector of one number: a size, or a scalar that was given an axis."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "Shape":
        return maker.attributes.get_int("end", 0) - maker.attributes.get_int("start", 0) == 1
    if maker is None or maker.op_type not in ("Reshape", "Unsqueeze"):
        return False
    return numbers_of(maker.inputs[1]) in ((-1,), (1,), (0,))
