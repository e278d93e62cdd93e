"""Winograd's algorithms for 3x3 convolutions, and the weights that they need, made when a net is opened.

F(m x m, 3 x 3) makes m x m pixels from a tile of a x a, a = m + 2 (Lavin and Gray 2015, arXiv 1509.09308,
equation 8): Y = A^T [(G g G^T) * (B^T d B)] A. The graphs are written by `lowering/winograd.py`; here is
G g G^T. It has a^2 values where a kernel g has 9, so it is made in memory from the package's own weights: an
engine in the store would be 4 GB. ONNX Runtime could fold it, but keeps every intermediate until all are
folded: opening the UNet of SD 1.5 so took 16.6 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PackageError
from ...safetensors_format import map_tensors
from ...spec import Array

_FEWEST_CHANNELS = 64  # below, moving tiles costs more than the products that are saved
_MOST_FOR_FOUR = 640 * 1280  # channels in times channels out, see `choose_tile`
_DTYPES = {"F16": np.float16, "F32": np.float32}


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


def kernels(weights: Path, wanted: Iterable[Kernel]) -> Iterator[tuple[Kernel, Array]]:
    """Each transformed kernel of a weights file (safetensors).

    Raises:
        PackageError: the file cannot be read, or is no safetensors file.
        KeyError, ValueError: it is not the file that the kernels were made for.
    """
    header, stored = map_tensors(weights, error=PackageError)
    for kernel in wanted:
        place = header.tensors[kernel.weight]
        flat: Any = stored[kernel.weight]
        values: Array = flat.view(_DTYPES[place.dtype]).reshape(place.shape)
        yield kernel, kernel.transform(values)
