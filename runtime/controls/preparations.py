"""What makes a control picture of another picture, without a net.

`PREPARATIONS` has a row for each. They see pictures at the size that is drawn, and follow A1111's extension
sd-webui-controlnet, except where they say so. A map that takes a net to make, of depths say, is handed in
ready: `find_preparation` refuses its name, and says what the map looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...engines.errors import UsageError
from ...engines.spec import Array
from ..pictures.resize import resize
from ..pictures.write import Pixels
from .canny import HIGH, LOW, canny

Value = bool | int | float


@dataclass(frozen=True)
class Setting:
    """A number, whole if the default is; or a bool, if the default is one."""

    default: Value
    least: float = 0
    most: float = 1

    def check(self, name: str, value: Any) -> Value:
        """The value in the default's type. Raises UsageError."""
        kind = type(self.default)
        wanted, called = {
            bool: (bool, "a bool"),
            int: (Integral, "an integer"),
            float: (Real, "a number"),
        }[kind]
        right_kind = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
        number: Any = value
        if not (right_kind and self.least <= number <= self.most):  # so that NaN is refused too
            raise UsageError(
                f"{name} is {value!r}",
                expected=called if kind is bool else f"{called} from {self.least} to {self.most}",
                fix=f"Change {name}.",
            )
        return kind(number)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A way to make a control picture.

    Attributes:
        title: what errors call it.
        apply: ((H, W, 3) uint8, **settings) -> (H, W, 3) uint8.
        settings: what can be chosen.
        masked: what pixels become that a mask marks, and those beyond a padded picture; None takes no mask.
    """

    title: str
    apply: Callable[..., Pixels]
    settings: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    masked: float | None = None

    def check(self, chosen: Mapping[str, Any]) -> dict[str, Value]:
        """Every setting's value. Raises UsageError for an unknown setting, or a value out of its range."""
        for one in chosen:
            if one not in self.settings:
                raise UsageError(
                    f"{self.title} has no setting {one!r}",
                    expected=f"one of {', '.join(self.settings)}" if self.settings else "no setting",
                    fix=f"Leave {one} out.",
                )
        return {
            one: setting.check(f"{one} of {self.title}", chosen.get(one, setting.default))
            for one, setting in self.settings.items()
        }


def _as_it_is(pixels: Pixels) -> Pixels:
    return pixels


def _canny(pixels: Pixels, low: float, high: float, l2_gradient: bool) -> Pixels:
    return _white_where(canny(pixels, low, high, l2_gradient=l2_gradient))


def _invert(pixels: Pixels) -> Pixels:
    return 255 - pixels


def _threshold(pixels: Pixels, level: float) -> Pixels:
    """White where every channel exceeds the level, else black."""
    return _white_where(pixels.min(axis=2) > level)


def _blur(pixels: Pixels, sigma: float) -> Pixels:
    """A Gaussian blur as wide as OpenCV's of 8 bits, mirrored beyond the picture without its edge twice.

    OpenCV rounds the weights to 8 bits, which costs up to two shades at a sigma of 9; these are not rounded.
    """
    radius = round(6 * sigma + 1) // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    return _weighted(pixels, *(_mirrored(weights, side) for side in pixels.shape[:2]))


def _mirrored(weights: npt.NDArray[np.float64], side: int) -> Array:
    """(side, side): a row of weights of all pixels, for each pixel."""
    sources = np.pad(np.arange(side), weights.size // 2, mode="reflect")
    targets = np.arange(side)[:, None]
    matrix = np.zeros((side, side), np.float32)
    np.add.at(matrix, (targets, sources[targets + np.arange(weights.size)]), weights)
    return matrix


def _tile(pixels: Pixels, rate: float) -> Pixels:
    """Scale down by the rate, each pixel the mean of an area, and up again with a Lanczos filter."""
    height, width = pixels.shape[:2]
    small = _weighted(pixels, *(_areas(side, max(int(side / rate), 1)) for side in (height, width)))
    return resize(small, height, width)


def _areas(side: int, fewer: int) -> Array:
    """(fewer, side): the share of each pixel in each of fewer ones."""
    ends = np.arange(1, fewer + 1)[:, None] * (side / fewer)
    starts, pixel = ends - side / fewer, np.arange(side)
    overlap = np.minimum(ends, pixel + 1) - np.maximum(starts, pixel)
    return (overlap.clip(0) * (fewer / side)).astype(np.float32)


def _shuffle(pixels: Pixels, seed: int) -> Pixels:
    """Pull the picture about at random, smoothly: its colours stay, its shapes go."""
    height, width = pixels.shape[:2]
    generator = np.random.default_rng(seed)
    x = _smooth_noise(height, width, generator) * np.float32(width - 1)
    y = _smooth_noise(height, width, generator) * np.float32(height - 1)
    left, top = x.astype(np.intp), y.astype(np.intp)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    x, y = (x - np.floor(x))[..., None], (y - np.floor(y))[..., None]
    flat = np.reshape(pixels, (-1, 3))
    above = flat[top * width + left] * (1 - x) + flat[top * width + right] * x
    under = flat[below * width + left] * (1 - x) + flat[below * width + right] * x
    return _rounded(above * (1 - y) + under * y)


def _smooth_noise(height: int, width: int, generator: np.random.Generator) -> Array:
    """(H, W), from 0 to 1: a random number every 256 pixels or so, with smooth passages."""
    cell = 256
    coarse = generator.random((height // cell + 2, width // cell + 2), np.float32)
    size = (width + 2 * cell, height + 2 * cell)
    fine = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    fine = fine[cell : cell + height, cell : cell + width]
    return ((fine - fine.min()) / max(np.ptp(fine), np.finfo(np.float32).tiny)).astype(np.float32)


def _white_where(places: npt.NDArray[np.bool_]) -> Pixels:
    return np.repeat(places[..., None].astype(np.uint8) * 255, 3, axis=2)


def _weighted(pixels: Pixels, rows: Array, columns: Array) -> Pixels:
    """Sums over pixels with weights for rows (h, H) and for columns (w, W): (H, W, 3) to (h, w, 3)."""
    planes: Array = np.moveaxis(pixels, 2, 0).astype(np.float32, order="C")  # BLAS takes no other order
    sums: Array = np.moveaxis(rows @ planes @ np.transpose(columns), 0, 2)
    return _rounded(sums)


def _rounded(values: Array) -> Pixels:
    return np.rint(values).clip(0, 255).astype(np.uint8)


READY = Preparation(title="a ready map", apply=_as_it_is)
_ROWS = (
    Preparation(
        title="canny",
        apply=_canny,
        settings={
            "low": Setting(LOW, 0, 2040),
            "high": Setting(HIGH, 0, 2040),
            "l2_gradient": Setting(False),
        },
    ),
    Preparation(title="invert", apply=_invert),
    Preparation(title="threshold", apply=_threshold, settings={"level": Setting(127.0, 0, 255)}),
    Preparation(title="blur", apply=_blur, settings={"sigma": Setting(9.0, 0.01, 64)}),
    Preparation(title="tile", apply=_tile, settings={"rate": Setting(1.0, 1, 64)}),
    Preparation(title="shuffle", apply=_shuffle, settings={"seed": Setting(0, 0, 2**32 - 1)}),
    Preparation(title="inpaint", apply=_as_it_is, masked=-1.0),  # of the inpainting ControlNet
    Preparation(title="repaint", apply=_as_it_is, masked=0.0),  # of ControlNet union ProMax
)
PREPARATIONS = {row.title: row for row in _ROWS}

# Words of preparations that take a net, and the map to hand in instead.
NEED_A_NET = {
    "depth": "a depth map, light where it is near",
    "normal": "a map of normals as colours",
    "pose": "the skeleton in colours on black",
    "face": "the lines of the face in colours on black",
    "lineart": "white lines on black",
    "mlsd": "straight white lines on black",
    "hed": "soft white edges on black",
    "pidi": "soft white edges on black",
    "teed": "soft white edges on black",
    "softedge": "soft white edges on black",
    "scribble": "white strokes on black",
    "seg": "a map in the colours of ADE20K's classes",
}


def find_preparation(name: str | None) -> Preparation:
    """The preparation of that name; None is for a ready map.

    Raises:
        UsageError: one that takes a net, or an unknown one.
    """
    if name is None:
        return READY
    if name in PREPARATIONS:
        return PREPARATIONS[name]
    known = f"one of {', '.join(PREPARATIONS)}, or none for a ready map"
    for word, looks in NEED_A_NET.items():
        if word in str(name).lower():
            raise UsageError(
                f"the preparation {name!r} takes a net that latentrt does not have",
                expected=known,
                fix=f"Give the map itself, {looks}, and no preparation.",
            )
    raise UsageError(
        f"the preparation is {name!r}", expected=known, fix="Choose one of these, or leave it out."
    )
