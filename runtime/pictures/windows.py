"""Where a picture that is larger than a model draws well is cut into windows, which the UNet sees one by one.

A step of the whole picture is the weighted mean of its windows' steps: Bar-Tal et al. 2023 (MultiDiffusion,
arXiv 2302.08113), eq. 5, where the weights are those of a linear cross-fade (`tiling.axis_tiles`) in place of
equal ones, so that a window's border, which sees nothing beyond itself, counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...engines.spec import Array
from .tiling import axis_tiles


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """One of them, in latent values: rows `top` to `bottom`, columns `left` to `right`.

    Attributes:
        weight: (bottom - top, right - left) float32; those of all windows add up to 1 everywhere.
    """

    top: int
    bottom: int
    left: int
    right: int
    weight: Array

    def of(self, values: Array, scale: int = 1) -> Array:
        """(…, rows, columns) -> the window of it; `scale` are its values along each axis for a latent's."""
        rows = slice(self.top * scale, self.bottom * scale)
        return np.ascontiguousarray(values[..., rows, self.left * scale : self.right * scale])


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How large they are.

    Attributes:
        side: in latent values; a picture that is shorter is one window along that axis.
        overlap: what two neighbours share, at least, in latent values.
    """

    side: int
    overlap: int

    def over(self, rows: int, columns: int) -> tuple[Window, ...]:
        """The windows of a latent of that size: all of one shape, the last ones moved inwards."""
        stride = self.side - self.overlap
        return tuple(
            Window(
                top=top,
                bottom=top + len(down),
                left=left,
                right=left + len(across),
                weight=down[:, None] * across,
            )
            for top, down in axis_tiles(rows, self.side, stride)
            for left, across in axis_tiles(columns, self.side, stride)
        )


def blend(windows: tuple[Window, ...], parts: Sequence[Array]) -> Array:
    """(…, rows, columns) float32: the weighted mean of the windows' parts; of a single one its own."""
    if len(windows) == 1:
        return parts[0]
    size = max(one.bottom for one in windows), max(one.right for one in windows)
    whole = np.zeros((*parts[0].shape[:-2], *size), np.float32)
    for window, values in zip(windows, parts, strict=True):
        whole[..., window.top : window.bottom, window.left : window.right] += values * window.weight
    return whole
