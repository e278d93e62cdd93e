"""Which layout each image of a graph has, while a walk over the graph decides it.

A value is *turned* when it holds channels-last data under its old name. A Transpose is made only where
something asks for a layout that is not there, and once per value. Graphs carry no shapes between their nodes
(`checkpoints/graphs/weights.py`), so what is known of an image comes from weights and operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...spec import Array

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"


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


def is_half_or_float(value: ir.Value | None) -> bool:
    """Whether it is of a type that CUDA's kernels for diffusion models take; no if that is unknown."""
    import onnx_ir as ir

    return value is not None and value.dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)


LAST: Mapping[int, tuple[int, ...]] = {3: (0, 2, 1), 4: (0, 2, 3, 1)}  # rank -> channels first to last
FIRST: Mapping[int, tuple[int, ...]] = {3: (0, 2, 1), 4: (0, 3, 1, 2)}


@dataclass(frozen=True)
class Image:
    """What is known of a value of shape (B, C, L) or (B, C, H, W)."""

    rank: int
    channels: int | None = None


class GraphImages:
    """The images of one graph, and the graph's edits that change their layout."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._images: dict[ir.Value, Image] = {}
        self._turned: set[ir.Value] = set()
        self._other: dict[ir.Value, ir.Value] = {}  # a value -> the same in its other layout
        self._both: set[ir.Value] = set()  # the graph itself has these in both layouts

    def image(self, value: ir.Value | None) -> Image | None:
        """What is known of a value; None if it may be no image at all."""
        if value is None or value in self._images:
            return self._images[value] if value is not None else None
        if _over_pixels(value) is not None:
            self._images[value] = Image(4)
        elif value.shape is not None and len(value.shape) == 4:
            channels = value.shape[1]
            self._images[value] = Image(4, channels if isinstance(channels, int) else None)
        return self._images.get(value)

    def learn(self, value: ir.Value, image: Image) -> Image:
        """Record what a value is; what was known before stays."""
        if self.image(value) is None:
            self._images[value] = image
        return self._images[value]

    def is_turned(self, value: ir.Value | None) -> bool:
        """Whether the value itself holds channels-last data."""
        return value in self._turned

    def has_last(self, value: ir.Value | None) -> bool:
        """Whether the channels-last form is there without a Transpose of ours: a reason to work on it."""
        return value in self._turned or value in self._both

    def same(self, first: ir.Value, last: ir.Value, image: Image) -> None:
        """Record that `last` is `first` with channels last."""
        self._images[first], self._other[first] = image, last
        self._both.add(first)

    def turn(self, node: ir.Node, inputs: Sequence[ir.Value | None], image: Image) -> bool:
        """Give a node channels-last inputs; its output is turned from now on. Returns True."""
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        if not node.outputs[0].is_graph_output():
            node.outputs[0].shape = None  # a recorded one would be in the old order
        self._turned.add(node.outputs[0])
        self._images[node.outputs[0]] = image
        return True

    def last(self, node: ir.Node, value: ir.Value | None) -> ir.Value:
        """The channels-last form of an image, made in front of `node` if it is not there."""
        assert value is not None
        if value in self._turned:
            return value
        if value not in self._other:
            name, vector = f"{value.name}/nhwc", _over_pixels(value)
            if vector is not None:  # (B, C) as (B, 1, 1, C) where it was (B, C, 1, 1)
                made = self.insert(node, "Unsqueeze", [vector, self.constant(1, 2)], name)
            else:
                made = self.insert(node, "Transpose", [value], name, perm=LAST[self._images[value].rank])
            self._other[value] = made
        return self._other[value]

    def first(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The channels-first form of a turned image, made in front of `node` if it is not there."""
        if value not in self._other:
            order = FIRST[self._images[value].rank]
            self._other[value] = self.insert(node, "Transpose", [value], f"{value.name}/nchw", perm=order)
        return self._other[value]

    def restore_outputs(self) -> None:
        """Give the graph's outputs the layout, and the name, that they had."""
        for index, value in enumerate(self.graph.outputs):
            if value in self._turned:
                maker = value.producer()
                assert maker is not None
                shape = value.shape
                restored = self._other.get(value) or self.behind(
                    maker, "Transpose", [], f"{value.name}/nchw", perm=FIRST[self._images[value].rank]
                )
                value.name, restored.name = f"{value.name}/nhwc", value.name
                restored.shape = shape
                self.graph.outputs[index] = restored

    def insert(
        self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: object
    ) -> ir.Value:
        """A new node with one output, of the type of its first input."""
        return self._insert("", before, kind, inputs, name, attributes)

    def contrib(
        self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: object
    ) -> ir.Value:
        """The same of an operator of ONNX Runtime's own."""
        return self._insert(CONTRIB, before, kind, inputs, name, attributes)

    def _insert(
        self,
        domain: str,
        before: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, object],
    ) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes, domain=domain, name=f"{name}/{kind}")  # pyright: ignore[reportArgumentType]
        node.outputs[0].name = name
        _give_type(node.outputs[0], inputs[0])
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def behind(
        self, node: ir.Node, kind: str, more: Sequence[ir.Value], name: str, **attributes: object
    ) -> ir.Value:
        """A new node between the output of `node` and everyone who used it."""
        import onnx_ir as ir

        value = node.outputs[0]
        value.shape = None  # it changes, or else nothing would have to stand behind it
        uses = tuple(value.uses())
        made = ir.node(kind, [value, *more], attributes, name=f"{name}/{kind}")  # pyright: ignore[reportArgumentType]
        made.outputs[0].name = name
        _give_type(made.outputs[0], value)
        self.graph.insert_after(node, made)
        for use in uses:
            use.node.replace_input_with(use.idx, made.outputs[0])
        return made.outputs[0]

    def constant(self, *numbers: int) -> ir.Value:
        """An int64 vector as an initializer, shared between equal ones."""
        return self.tensor("nhwc/" + ",".join(map(str, numbers)), np.array(numbers, dtype=np.int64))

    def tensor(self, name: str, content: Array) -> ir.Value:
        """An initializer of that name, made once; a second call with the name must have the same content."""
        import onnx_ir as ir

        if name not in self.graph.initializers:  # another lowering of this graph may have made it
            tensor = ir.tensor(content, name=name)
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(content.shape)
            value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _give_type(value: ir.Value, like: ir.Value | None) -> None:
    """The same element type, in an object of its own: setting a dtype changes the object."""
    import onnx_ir as ir

    if like is not None and like.dtype is not None:
        value.type = ir.TensorType(like.dtype)


def _over_pixels(value: ir.Value) -> ir.Value | None:
    """The (B, C) of a value that is one as (B, C, 1, 1): a projection of the time embedding."""
    maker = value.producer()
    if maker is None or maker.op_type != "Unsqueeze" or numbers_of(maker.inputs[1]) != (2, 3):
        return None
    vector = maker.inputs[0]
    known = vector.shape if vector is not None else None
    return vector if known is None or len(known) == 2 else None
