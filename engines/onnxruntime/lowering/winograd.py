"""Lowers 3x3 convolutions for ONNX Runtime's CPU provider: fewer multiplications, in standard operators.

ONNX Runtime convolves directly. Winograd's algorithm F(m x m, 3 x 3) makes m x m pixels of the output from a
tile of a x a of the input, a = m + 2, with a^2 products per pair of channels instead of 9 m^2
(Lavin and Gray 2015, arXiv 1509.09308, equation 8 and section 4):

    Y = A^T [(G g G^T) * (B^T d B)] A

Written here with one row per place in a tile, so that every step is one large operator that ONNX Runtime runs
on all cores, and no step moves less than a pixel's channels at once:

    d (a^2, tiles, C)       Gather of pixels from the padded image, channels last
    v = (B^T x B^T) d       one matrix product, x the Kronecker product
    p[k] = v[k] u[k]        a^2 matrix products, (tiles, C) by (C, M); u from the weights, made at load
    y = (A^T x A^T) p       one matrix product, (m^2, tiles, M), and the tiles are put together

The weights u = G g G^T have a^2 values where a kernel g has 9, so they are made in memory when a net is
opened, from the package's own: an engine in the store would be 4 GB. ONNX Runtime could fold them, but keeps
every intermediate until all are folded: opening the UNet of SD 1.5 so took 16.6 GB.

Sizes are read in the graph, so one graph serves every batch and picture. Only engines are lowered, never
packages. Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...net_weights import changed_names, changed_values, net_tensors, weight_values
from ...package import Package
from ...spec import Array
from .graph_images import FIRST, LAST, GraphImages, weight_shape

if TYPE_CHECKING:
    import onnx_ir as ir

_FEWEST_CHANNELS = 64  # below, moving tiles costs more than the products that are saved
_MOST_FOR_FOUR = 640 * 1280  # channels in times channels out, see `choose_tile`


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One of the algorithms.

    Attributes:
        m: the side of a tile of the output, in pixels.
        data: B^T, (m + 2, m + 2).
        kernel: G, (m + 2, 3).
        output: A^T, (m, m + 2).
    """

    m: int
    data: Array
    kernel: Array
    output: Array

    @property
    def a(self) -> int:
        """The side of a tile of the input, in pixels."""
        return self.m + 2


TILES: Mapping[int, Tile] = {
    tile.m: tile
    for tile in (
        Tile(  # Lavin and Gray 2015, section 4.1
            m=2,
            data=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
            kernel=np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
            output=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
        ),
        Tile(  # section 4.3
            m=4,
            data=np.array(
                [
                    [4, 0, -5, 0, 1, 0],
                    [0, -4, -4, 1, 1, 0],
                    [0, 4, -4, -1, 1, 0],
                    [0, -2, -1, 2, 1, 0],
                    [0, 2, -1, -2, 1, 0],
                    [0, 4, 0, -5, 0, 1],
                ]
            ),
            kernel=np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
            output=np.array(
                [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
            ),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The transformed weights of one convolution.

    Attributes:
        name: of the initializer that a session gets.
        weight: the name of the weights (M, C, 3, 3) in the package's file.
        m: which of TILES.
        left: whether the matrices are (M, C), to stand on the left of a product; else they are (C, M).
    """

    name: str
    weight: str
    m: int
    left: bool

    def to_json(self) -> dict[str, Any]:
        """As the engine store keeps it."""
        return asdict(self)

    def transform(self, weight: Array) -> Array:
        """G g G^T of every pair of channels: (a^2, M, C) or (a^2, C, M), float32."""
        made, channels = weight.shape[:2]
        matrix = TILES[self.m].kernel
        both: Array = np.kron(matrix, matrix).astype(np.float32)
        pairs = (made, channels) if self.left else (channels, made)
        order = (2, 3, 0, 1) if self.left else (2, 3, 1, 0)
        places: Any = np.ascontiguousarray(np.transpose(weight, order), dtype=np.float32)
        transformed: Any = both @ places.reshape(9, -1)
        return transformed.reshape(-1, *pairs)


def choose(channels: int, made: int) -> tuple[int, bool] | None:
    """m, and whether the weights stand on the left, for a convolution; None to leave it as it is.

    F(4 x 4) saves three quarters of the products and makes the weights four times as large, F(2 x 2) saves
    5/9 and makes them 1.8 times as large. Where weights are large pictures are small, and the products wait
    for the weights to come from memory. So they take F(2 x 2); on the left they are used as they lie, where
    ONNX Runtime packs a matrix on the right again in every run.
    """
    if min(channels, made) < _FEWEST_CHANNELS:
        return None
    large = channels * made > _MOST_FOR_FOUR
    return (2, True) if large else (4, False)


def kernels(package: Package, net: str, wanted: Iterable[Kernel]) -> Iterator[tuple[Kernel, Array]]:
    """Each transformed kernel of a net, from the weights that the package's own graph would compute with.

    Raises:
        PackageError: the graph cannot be read.
        OSError: a weights file cannot be read.
        KeyError, ValueError: they are not those that the kernels were made for.
    """
    stored, folder = net_tensors(package, net), package.weights_folder(net)
    changed = set(changed_names(package, net))
    for kernel in wanted:
        name = kernel.weight
        weight = weight_values(stored[name], folder)
        yield (
            kernel,
            kernel.transform(changed_values(package, net, [name])[name] if name in changed else weight),
        )


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
