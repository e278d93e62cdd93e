"""Edges of a picture, bit for bit those of OpenCV's `cv2.Canny`, which canny control nets were trained on.

J. Canny, A Computational Approach to Edge Detection (1986), as OpenCV defines it: no blur before, Sobel's
derivatives of 3 x 3 pixels, their directions in four sectors, and two thresholds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..pictures.write import Pixels

Ints = npt.NDArray[np.int32]
Places = npt.NDArray[np.intp]
Edges = npt.NDArray[np.bool_]

LOW, HIGH = 100.0, 200.0  # what the nets' authors used

# tan(22.5°) in fixed point; tan(67.5°) is 2 more. Floating point would put some pixels in the next sector.
_SHIFT = 15
_TAN_22_5 = round((2**0.5 - 1) * 2**_SHIFT)


def canny(pixels: Pixels, low: float = LOW, high: float = HIGH, *, l2_gradient: bool = False) -> Edges:
    """Find edges.

    Args:
        pixels: (H, W, C) uint8; each pixel goes by the channel in which it changes most.
        low: an edge reaches as far as the gradient exceeds this; 0 or more.
        high: an edge has a pixel whose gradient exceeds this. The smaller of the two is taken as `low`.
        l2_gradient: measure a gradient by its length, up to 1443, in place of |dx| + |dy|, up to 2040.

    Returns:
        (H, W) bool, True on edges: one pixel wide, connected over sides and corners.
    """
    low, high = sorted((low, high))
    if l2_gradient:
        low, high = low**2, high**2  # of squares, which are integers: nothing is rounded
    dx, dy, size = _strongest_gradient(pixels, l2_gradient)
    stride = pixels.shape[1] + 2
    # a frame of zeros: beyond the picture nothing changes
    framed = np.pad(size, 1).ravel()
    steep = size > low
    places = np.flatnonzero(np.pad(steep, 1))
    places = places[_is_ridge(framed, places, stride, dx[steep], dy[steep])]
    edges = np.zeros(framed.size, np.bool_)
    edges[_connected(places, framed[places] > high, stride, framed.size)] = True
    return np.reshape(edges, (-1, stride))[1:-1, 1:-1]


def _strongest_gradient(pixels: Pixels, squared: bool) -> tuple[Ints, Ints, Ints]:
    """dx, dy and their size, each (H, W), of the channel where the size is largest; the first of equals."""
    best: tuple[Ints, Ints, Ints] | None = None
    for channel in np.moveaxis(pixels, 2, 0):
        dx, dy = _sobel(channel)
        size = dx * dx + dy * dy if squared else np.abs(dx) + np.abs(dy)
        if best is None:
            best = dx, dy, size
            continue
        larger = size > best[2]
        for kept, new in zip(best, (dx, dy, size), strict=True):
            np.copyto(kept, new, where=larger)
    assert best is not None
    return best


def _sobel(channel: Pixels) -> tuple[Ints, Ints]:
    """Derivatives to the right and downwards; beyond the picture its outermost pixels repeat."""
    wide = np.pad(channel.astype(np.int32), 1, mode="edge")
    down = wide[:-2] + 2 * wide[1:-1] + wide[2:]  # (H, W + 2)
    right = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]  # (H + 2, W)
    return down[:, 2:] - down[:, :-2], right[2:] - right[:-2]


def _is_ridge(framed: Ints, places: Places, stride: int, dx: Ints, dy: Ints) -> Edges:
    """Whether the gradient is largest at these places, of both neighbours along its direction.

    `dx` and `dy` are those of the places; none is zero in both.
    """
    x, y = np.abs(dx), np.abs(dy) << _SHIFT
    across = y < x * _TAN_22_5
    upright = y > x * (_TAN_22_5 + (2 << _SHIFT))
    falling = (dx < 0) == (dy < 0)  # from the upper left to the lower right
    step = np.where(across, 1, np.where(upright, stride, np.where(falling, stride + 1, stride - 1)))
    size = framed[places]
    # Of two equals side by side the first is the ridge; of two that meet at a corner, neither.
    return (size > framed[places - step]) & (size + (across | upright) > framed[places + step])


def _connected(places: Places, strong: Edges, stride: int, total: int) -> Places:
    """Those places that a chain of neighbours, over sides or corners, joins to a strong one.

    Chains may be as long as the picture has pixels, so they are not followed step by step. Each place points
    to another of its component, at last to one that all share: the least. Y. Shiloach and U. Vishkin, An
    O(log n) Parallel Connectivity Algorithm (1982). The strong ones are one component from the start.
    """
    number = np.zeros(total, np.intp)  # of each place, from 1; 0 elsewhere
    number[places] = np.arange(1, places.size + 1)
    pairs = [(number[places], number[places + step]) for step in (1, stride - 1, stride, stride + 1)]
    one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    root = np.arange(places.size + 1)
    root[1:][strong] = 0
    one, other = one[other > 0], other[other > 0]
    while one.size:
        one, other = root[one], root[other]
        apart = one != other
        one, other = one[apart], other[apart]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while (root[root] != root).any():
            root = root[root]
    return places[root[1:] == 0]
