"""Reads a picture back: which background, colour, size, shape and texture, and how well it is drawn.

Knows nothing about the model. The shape is the template (any place, any radius) that overlaps the picture's
own mask best, by intersection over union. NumPy and Pillow only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .shapes import OUTLINES, RADII, RGB, SIZES, TEXTURES, Placement, Scene, mask, outline, textured

SEMANTIC_IOU = 0.6
STRICT_IOU = 0.8
# From this depth on, stripes count as a texture: the gaps are nearer to the background than to the bands.
STRIPED = 0.5

_BORDER = 4
_SLOPE = 2
# Colour distance (0..441) below which a picture counts as empty.
_VISIBLE = 30.0
_NOTHING = "nothing"
# Half of what pictures are drawn with: four times faster, and an edge is placed to a quarter of a pixel.
_OVERSAMPLING = 2
# Refining never gains this much IoU: a template that starts further behind the best one need not be tried.
_GUESS_ERROR = 0.2

Mask = npt.NDArray[np.bool_]
Colour = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """What the checker sees. An empty picture has shape, colour and size "nothing" and iou 0.

    `depth` says how deep stripes are cut: 0 for a plain shape, 1 where the background shows. `likeness`
    has the intersection over union of every shape, that of the unlikely ones at a guessed place.
    """

    background: str
    colour: str
    size: str
    shape: str
    iou: float
    texture: str = "plain"
    depth: float = 0.0
    likeness: Mapping[str, float] = field(default_factory=dict[str, float])

    def obeys(self, scene: Scene, min_iou: float = STRICT_IOU) -> bool:
        """Whether all five attributes are the scene's and the shape is drawn at least this well."""
        names = ("background", "colour", "size", "shape", "texture")
        return all(getattr(self, n) == getattr(scene, n) for n in names) and self.iou > min_iou


def check(picture: npt.NDArray[np.uint8]) -> Verdict:
    """Judge one picture, (H, W, 3) uint8 with H == W."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(f"found a picture of shape {picture.shape}, expected (N, N, 3)")
    ground, inside, coverage = _layers(picture)
    background = name_of(ground)
    if inside is None:
        return Verdict(background, _NOTHING, _NOTHING, _NOTHING, 0.0)
    seen: Mask = coverage > 0.5
    depth = stripe_depth(coverage, seen)
    texture = "striped" if depth > STRIPED else "plain"
    shape, radius, likeness = best_fit(seen, texture)
    name, iou = name_of(inside), likeness[shape]
    return Verdict(background, name, size_of(radius), shape, iou, texture, depth, likeness)


def seen_mask(picture: npt.NDArray[np.uint8]) -> Mask:
    """Where a picture (N, N, 3) shows something on its background, (N, N); nowhere if it is empty."""
    seen: Mask = _layers(picture)[2] > 0.5
    return seen


def _layers(
    picture: npt.NDArray[np.uint8],
) -> tuple[Colour, Colour | None, npt.NDArray[np.floating[Any]]]:
    """The background's colour, the shape's, and how much of it covers each pixel (N, N): None if empty."""
    pixels = picture.astype(np.float32)
    ground = _border_colour(pixels)
    distance = np.sqrt(np.square(pixels - ground).sum(axis=2))
    # The most distant percent of the pixels, without the last few, lies inside even the smallest shape.
    contrast = float(np.percentile(distance, 99))
    if contrast < _VISIBLE:
        return ground, None, np.zeros_like(distance)
    inside: Colour = np.median(pixels[distance > 0.7 * contrast], axis=0)
    axis = inside - ground
    return ground, inside, (pixels - ground) @ axis / float(axis @ axis)


def stripe_depth(coverage: npt.NDArray[np.floating[Any]], seen: Mask) -> float:
    """How much less a shape covers (N, N) in the gaps of stripes than in the bands; 0 without either."""
    period, kept = TEXTURES["striped"]
    solid = closed(seen)
    row = np.resize(np.arange(period), seen.shape[0])[:, None]
    # An edge between two bands is a slope of some pixels, which says nothing about either.
    bands = coverage[solid & (row >= _SLOPE) & (row < kept - _SLOPE)]
    gaps = coverage[solid & (row >= kept + _SLOPE) & (row < period - _SLOPE)]
    return float(bands.mean() - gaps.mean()) if bands.size and gaps.size else 0.0


def closed(seen: Mask) -> Mask:
    """A mask (N, N) without the gaps of stripes: filled between two pixels of a column so near each other."""
    period, kept = TEXTURES["striped"]
    reach = (period - kept) // 2 + _SLOPE
    padded = np.pad(seen, ((2 * reach, 2 * reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)
    grown: Mask = np.max(windows, axis=-1)
    shrunk: Mask = np.min(np.lib.stride_tricks.sliding_window_view(grown, 2 * reach + 1, axis=0), axis=-1)
    return shrunk


def name_of(colour: Colour) -> str:
    """The palette's nearest name, by Euclidean distance in RGB."""
    return min(RGB, key=lambda name: float(np.square(colour - np.asarray(RGB[name], dtype=np.float32)).sum()))


def size_of(radius: float) -> str:
    """The size whose range of radii is nearest (borders at 28 and 40 px)."""
    return min(SIZES, key=lambda size: max(RADII[size][0] - radius, radius - RADII[size][1]))


def _border_colour(pixels: npt.NDArray[np.float32]) -> Colour:
    frame = np.ones(pixels.shape[:2], dtype=np.bool_)
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return np.median(pixels[frame], axis=0)


def best_fit(seen: Mask, texture: str = "plain") -> tuple[str, float, dict[str, float]]:
    """The best template for a mask (N, N), its radius in pixels, and each one's intersection over union."""
    whole = seen if texture == "plain" else closed(seen)
    guesses = {shape: _first_guess(shape, whole) for shape in OUTLINES}
    hopeful = max(iou for _, iou in guesses.values()) - _GUESS_ERROR
    fits = {
        shape: _refine(shape, placement, seen, texture)
        for shape, (placement, iou) in guesses.items()
        if iou >= hopeful
    }
    shape = max(fits, key=lambda name: fits[name][1])
    likeness = {name: iou for name, (_, iou) in (guesses | fits).items()}
    return shape, fits[shape][0].radius, likeness


def _refine(shape: str, best: Placement, seen: Mask, texture: str) -> tuple[Placement, float]:
    """Pattern search over centre and radius, down to a third of a pixel."""
    iou = _iou(shape, best, seen, texture)
    step = 2.0
    while step > 0.3:
        neighbours = (
            Placement(best.x + dx * step, best.y + dy * step, best.radius + dr * step)
            for dx, dy, dr in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
        )
        candidate, value = max(
            ((n, _iou(shape, n, seen, texture)) for n in neighbours), key=lambda fit: fit[1]
        )
        if value > iou:
            best, iou = candidate, value
        else:
            step /= 2
    return best, iou


def _first_guess(shape: str, seen: Mask) -> tuple[Placement, float]:
    """The better of two placements: one from the mask's centroid and area, one from its bounding box."""
    rows, columns = np.nonzero(seen)
    template_rows, template_columns = _template(shape)
    by_area = float(np.sqrt(rows.size / template_rows.size)) * 40.0
    offset_x = (float(template_columns.mean()) + 0.5 - 64.0) / 40.0
    offset_y = (float(template_rows.mean()) + 0.5 - 64.0) / 40.0
    area_guess = Placement(
        float(columns.mean()) + 0.5 - offset_x * by_area,
        float(rows.mean()) + 0.5 - offset_y * by_area,
        by_area,
    )
    xs, ys = zip(*outline(shape), strict=True)
    left, right = float(columns.min()), float(columns.max()) + 1
    top, bottom = float(rows.min()), float(rows.max()) + 1
    by_box = (right - left + bottom - top) / (max(xs) - min(xs) + max(ys) - min(ys))
    box_guess = Placement(
        (left + right) / 2 - (max(xs) + min(xs)) / 2 * by_box,
        (top + bottom) / 2 - (max(ys) + min(ys)) / 2 * by_box,
        by_box,
    )
    tried = [(guess, _iou(shape, guess, seen)) for guess in (area_guess, box_guess)]
    return max(tried, key=lambda fit: fit[1])


@functools.cache
def _template(shape: str) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows and columns of the pixels of a shape of radius 40 at (64, 64)."""
    rows, columns = np.nonzero(mask(shape, Placement(64.0, 64.0, 40.0)) > 0.5)
    return rows, columns


def _iou(shape: str, placement: Placement, seen: Mask, texture: str = "plain") -> float:
    if placement.radius < 2:
        return 0.0
    whole = mask(shape, placement, side=seen.shape[0], oversampling=_OVERSAMPLING)
    drawn = textured(whole, texture) > 0.5
    union = np.count_nonzero(drawn | seen)
    return float(np.count_nonzero(drawn & seen) / union) if union else 0.0


@dataclass(frozen=True)
class Score:
    """How many of `count` pictures got each attribute right; `semantic` and `strict` want all four right."""

    count: int
    background: int
    colour: int
    size: int
    shape: int
    semantic: int
    strict: int


def score(
    pictures: npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]], scenes: Sequence[Scene]
) -> Score:
    """Check pictures, each (128, 128, 3) uint8, against what was asked for."""
    pairs = [(check(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return Score(
        count=len(pairs),
        background=sum(seen.background == asked.background for seen, asked in pairs),
        colour=sum(seen.colour == asked.colour for seen, asked in pairs),
        size=sum(seen.size == asked.size for seen, asked in pairs),
        shape=sum(seen.shape == asked.shape for seen, asked in pairs),
        semantic=sum(seen.obeys(asked, SEMANTIC_IOU) for seen, asked in pairs),
        strict=sum(seen.obeys(asked, STRICT_IOU) for seen, asked in pairs),
    )
