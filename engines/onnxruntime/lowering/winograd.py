"""Lowers 3x3 convolutions for ONNX Runtime's CPU provider: fewer multiplications, in standard operators.

ONNX Runtime convolves directly. Winograd's algorithm F(m x m, 3 x 3) makes m x m pixels of the output from a
tile of a x a of the input, a = m + 2, with a^2 products per pair of channels instead of 9 m^2
(Lavin and Gray 2015, arXiv 1509.09308, equation 8 and section 4):

    Y = A^T [(G g G^T) * (B^T d B)] A

Written here with one row per place in a tile, so that every step is one large operator that ONNX Runtime runs
on all cores, and no step moves less than a pixel's channels at once:

    d (a^2, tiles, C)       Gather of pixels from the padded image, channels last
    v = (B^T x B^T) d       one matrix product, x the Kronecker product
    p[k] = v[k] u[k]        a^2 matrix products, (tiles, C) by (C, M); u from the weights, folded at load
    y = (A^T x A^T) p       one matrix product, (m^2, tiles, M), and the tiles are put together

Sizes are read in the graph, so one graph serves every batch and picture. Only engines are lowered, never
packages. Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...spec import Array
from .graph_images import FIRST, LAST, GraphImages
from .values import weight_shape
from .winograd_kernels import TILES, Kernel, choose

if TYPE_CHECKING:
    import onnx_ir as ir


def lower_convolutions(model: ir.Model, location: str) -> tuple[Kernel, ...]:
    """Lower in place every convolution that `choose` has an algorithm for; the weights that need making.

    A session gets those from memory (`SessionOptions.add_initializer`), and uses them where they are. The
    graph still has to name a file for them, which ONNX Runtime looks for and does not read: `location`, the
    package's weights file, relative to its folder.
    """
    import onnx_ir.passes.common as passes

    images = GraphImages(model.graph)
    made: list[Kernel] = []
    for node in list(model.graph):
        shape, weight = _kernel_shape(node)
        chosen = choose(shape[1], shape[0]) if shape else None
        if chosen is not None:
            made.append(_Lowered(images, node, location, shape, weight, *chosen).run())
    passes.RemoveUnusedNodesPass()(model)
    return tuple(made)


def _kernel_shape(node: ir.Node) -> tuple[tuple[int, ...], str]:
    """(M, C, 3, 3) and the stored weight of a convolution that keeps its image's size; () of other nodes."""
    import onnx_ir as ir

    if node.domain != "" or node.op_type != "Conv" or node.outputs[0].dtype != ir.DataType.FLOAT:
        return (), ""
    shape = weight_shape(node.inputs[1]) or ()
    numbers = node.attributes
    same = (
        tuple(numbers.get_ints("pads", ())) == (1, 1, 1, 1)
        and tuple(numbers.get_ints("strides", (1, 1))) == (1, 1)
        and tuple(numbers.get_ints("dilations", (1, 1))) == (1, 1)
        and numbers.get_int("group", 1) == 1
        and numbers.get_string("auto_pad", "NOTSET") == "NOTSET"
    )
    if not same or len(shape) != 4 or shape[2:] != (3, 3):
        return (), ""
    weight = node.inputs[1]
    assert weight is not None
    maker = weight.producer()
    stored = maker.inputs[0] if maker is not None else weight
    assert stored is not None
    return shape, stored.name or ""


class _Lowered:
    """One convolution, as it is put in front of the node that it replaces."""

    def __init__(
        self,
        images: GraphImages,
        node: ir.Node,
        location: str,
        shape: tuple[int, ...],
        weight: str,
        m: int,
        left: bool,
    ) -> None:
        self._images, self._node, self._tile = images, node, TILES[m]
        self._location = location
        self._made, self._channels = shape[:2]
        self._kernel = Kernel(name=f"{node.outputs[0].name}/winograd", weight=weight, m=m, left=left)
        self._count = 0

    def run(self) -> Kernel:
        """Replace the node."""
        import onnx_ir as ir

        data, _, bias = (*self._node.inputs, None)[:3]
        assert data is not None
        size = self._add("Shape", [data], start=2)
        tiles, corners = self._tiles(data, size)
        last = self._image(self._products(tiles), corners, size)
        out = self._add("Transpose", [last], perm=FIRST[4])
        if bias is not None:
            out = self._add("Add", [out, self._add("Unsqueeze", [bias, self._ints(1, 2)])])
        old = self._node.outputs[0]
        out.shape = old.shape
        ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        out.name, old.name = old.name, out.name
        self._images.graph.remove(self._node, safe=True)
        return self._kernel

    def _tiles(self, data: ir.Value, size: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The tiles (a^2, tiles * C), and (B, th, tw): the numbers of their first pixels."""
        m, a = self._tile.m, self._tile.a
        turned = self._add("Transpose", [data], perm=LAST[4])
        # Behind the image as much as the last tile may need, whatever the size is.
        padded = self._add("Pad", [turned, self._ints(0, 1, 1, 0, 0, m, m, 0)])
        shape = self._add("Shape", [padded], end=3)
        every = self._add("ReduceProd", [shape], keepdims=0)
        numbers = self._add("Range", [self._scalar(0), every, self._scalar(1)])
        numbers = self._add("Reshape", [numbers, shape])  # (B, H + 1 + m, W + 1 + m), of every pixel
        corners = self._add("Slice", [numbers, self._ints(0, 0), size, self._ints(1, 2), self._ints(m, m)])
        first = self._add("Slice", [numbers, self._ints(0, 0, 0), self._ints(1, a, a), self._ints(0, 1, 2)])
        first = self._add("Reshape", [first, self._ints(a * a, 1)])
        places = self._add("Add", [first, self._add("Reshape", [corners, self._ints(1, -1)])])
        rows = self._add("Reshape", [padded, self._ints(-1, self._channels)])
        tiles = self._add("Gather", [rows, places], axis=0)
        return self._add("Reshape", [tiles, self._ints(a * a, -1)]), corners

    def _products(self, tiles: ir.Value) -> ir.Value:
        """(m^2, tiles * M) of (a^2, tiles * C)."""
        a = self._tile.a
        values = self._add("MatMul", [self._matrix("data"), tiles])
        values = self._add("Reshape", [values, self._ints(a * a, -1, self._channels)])
        if self._kernel.left:
            values = self._add("Transpose", [values], perm=(0, 2, 1))
            products = self._add("MatMul", [self._weights(self._made, self._channels), values])
            products = self._add("Transpose", [products], perm=(0, 2, 1))
        else:
            products = self._add("MatMul", [values, self._weights(self._channels, self._made)])
        products = self._add("Reshape", [products, self._ints(a * a, -1)])
        return self._add("MatMul", [self._matrix("output"), products])

    def _weights(self, *pairs: int) -> ir.Value:
        """The initializer that a session gets from memory."""
        import onnx_ir as ir

        shape = ir.Shape((self._tile.a**2, *pairs))
        name, size = self._kernel.name, 4 * self._tile.a**2 * pairs[0] * pairs[1]
        tensor = ir.ExternalTensor(self._location, 0, size, ir.DataType.FLOAT, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._images.graph.register_initializer(value)
        return value

    def _image(self, parts: ir.Value, corners: ir.Value, size: ir.Value) -> ir.Value:
        """The image (B, H, W, M) of (m^2, tiles * M)."""
        m, made = self._tile.m, self._ints(self._made)
        count = self._add("Shape", [corners])
        split = self._add("Concat", [self._ints(m, m), count, made], axis=0)
        parts = self._add("Reshape", [parts, split])
        parts = self._add("Transpose", [parts], perm=(2, 3, 0, 4, 1, 5))
        whole = self._add("Concat", [self._add("Mul", [count, self._ints(1, m, m)]), made], axis=0)
        image = self._add("Reshape", [parts, whole])
        return self._add("Slice", [image, self._ints(0, 0), size, self._ints(1, 2)])

    def _add(self, kind: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        import onnx_ir as ir

        self._count += 1
        name = f"{self._node.outputs[0].name}/winograd.{self._count}"
        value = self._images.insert(self._node, kind, inputs, name, **attributes)
        if kind == "Shape":
            value.type = ir.TensorType(ir.DataType.INT64)
        return value

    def _ints(self, *numbers: int) -> ir.Value:
        return self._images.constant(*numbers)

    def _scalar(self, number: int) -> ir.Value:
        return self._images.tensor(f"scalar/{number}", np.array(number, np.int64))

    def _matrix(self, which: str) -> ir.Value:
        """The Kronecker product of a matrix of the tile with itself."""
        matrix: Array = getattr(self._tile, which)
        return self._images.tensor(
            f"winograd/{self._tile.m}/{which}", np.kron(matrix, matrix).astype(np.float32)
        )
