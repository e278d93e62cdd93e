"""The numbers of a rounded net: which places, what their data are divided by, and their weights' scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.spec import Array
from .formats import LEAST, Format
from .places import Place, along
from .ranges import Range

Weights = Mapping[str, Array]  # by the name of the stored weight, as it is stored

_ALPHA = 0.5  # of SmoothQuant
# Of the peak: where data may be cut off, so that all others are rounded by smaller steps.
_CLIPS = tuple(np.linspace(1, 0.3, 15).tolist())
_MOST_VALUES = 2**16  # of a sample that are tried
# Of the errors that are summed up to choose one. Squares count the few that are cut off too little: they are
# all to one side, and lie together. Without cutting off, bell-shaped data have steps that are too large.
_POWER = 3


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What is done to a net. Keys of the mappings are names of tensors.

    Attributes:
        format: of the numbers.
        places: that are rounded.
        left_out: the names of products that were not, because of what rounding would do to them.
        data: the scale of the data of each place, by `Place.data`; none where data are not rounded.
        divided: (C,), what each channel of normalised data is divided by, and the weights behind multiplied.
    """

    format: Format
    places: tuple[Place, ...]
    left_out: tuple[str, ...]
    data: Mapping[str, float]
    divided: Mapping[str, Array]


def plan_rounding(
    format_: Format,
    places: Sequence[Place],
    ranges: Mapping[str, Range],
    weights: Weights,
    normalised: Mapping[str, int],
) -> Rounding:
    """What is done at which places.

    Args:
        format_: of the numbers.
        places: all that could be rounded.
        ranges: of their data.
        weights: of all of them.
        normalised: the outputs of LayerNormalizations, and how many nodes read each.
    """
    if not format_.rounds_data:
        return Rounding(
            format=format_,
            places=tuple(place for place in places if _fits(format_, place, weights)),
            left_out=tuple(place.name for place in places if not _fits(format_, place, weights)),
            data={},
            divided={},
        )
    readers: dict[str, list[Place]] = {}
    for place in places:
        readers.setdefault(place.data, []).append(place)
    divided: dict[str, Array] = {}
    data: dict[str, float] = {}
    for name, behind in readers.items():
        found = ranges[name]
        data[name] = fit_scale(format_, found.peak, found.sample)
        if normalised.get(name) != len(behind) or found.channels is None or not format_.smooths:
            continue
        factor = smoothing_factors(found.channels, [_by_input(place, weights) for place in behind], _ALPHA)
        if (smooth := float((found.channels / factor).max())) < found.peak:
            divided[name] = factor
            data[name] = fit_scale(format_, smooth, found.sample / factor)
    return Rounding(
        format=format_,
        places=tuple(places),
        left_out=(),
        data=data,
        divided=divided,
    )


def fit_scale(format_: Format, peak: float, sample: Array) -> float:
    """What data are divided by: of `_CLIPS` of the peak the one with the least errors (`_POWER`).

    What is beyond is cut off. A float's error does not depend on its scale, so there it is the peak's.
    """
    scale = max(peak / format_.largest, LEAST)
    if not format_.smooths:
        return scale
    some = np.ravel(sample)[:: sample.size // _MOST_VALUES | 1]
    return min((clip * scale for clip in _CLIPS), key=lambda one: _error(format_, some, one))


def _error(format_: Format, sample: Array, scale: float) -> float:
    steps: Any = np.rint(sample / np.float32(scale))
    whole: Any = np.minimum(np.maximum(steps, format_.smallest), format_.largest)
    return float((np.abs(whole * np.float32(scale) - sample) ** _POWER).sum())


def smoothing_factors(reach: Array, weights: Iterable[Array], alpha: float) -> Array:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (Xiao et al. 2023, arXiv 2211.10438, equation 4).

    Args:
        reach: (C,), the largest magnitude of each channel of the data.
        weights: (C,), the same of the weights behind, for each product that reads the data.
        alpha: 0 to 1; how much of the difficulty goes into the weights.

    Returns:
        (C,) float32, with a geometric mean of 1.
    """
    peaks = np.max(list(weights), axis=0)
    found: Any = np.maximum(reach, LEAST) ** alpha / np.maximum(peaks, LEAST) ** (1 - alpha)
    even: Any = found / np.exp(np.log(found).mean())
    return np.minimum(np.maximum(even, 1e-3), 1e3).astype(np.float32)


def _by_input(place: Place, weights: Weights) -> Array:
    weight = weights[place.weight]
    others = tuple(axis for axis in range(weight.ndim) if axis != place.input_axis)
    return np.abs(weight.astype(np.float32)).max(axis=others)


def _fits(format_: Format, place: Place, weights: Weights) -> bool:
    """Whether blocks of a weight are whole, and its rows whole bytes."""
    weight = weights[place.weight]
    return weight.shape[place.input_axis] % format_.block == 0 and weight.shape[-1] % 2 == 0


def rounded_weight(format_: Format, place: Place, weight: Array) -> tuple[Array, Array]:
    """A weight at scale 1, as it is stored, and its scales, both float32.

    Scales have one value, one for each of the output's channels, or with blocks the weight's shape with as
    many along its input axis as there are blocks.
    """
    wide: Any = weight.astype(np.float32)
    if format_.block:
        axis = place.input_axis
        split = (*wide.shape[:axis], -1, format_.block, *wide.shape[axis + 1 :])
        blocks = wide.reshape(split)
        scale = _scale(format_, np.abs(blocks).max(axis=axis + 1, keepdims=True))
        return (blocks / scale).reshape(wide.shape), np.squeeze(scale, axis + 1)
    if not format_.by_channel:
        scale = _scale(format_, np.abs(wide).max())
        return wide / scale, scale
    others = tuple(axis for axis in range(wide.ndim) if axis != place.output_axis)
    scale = _scale(format_, np.abs(wide).max(axis=others))
    return wide / along(place.output_axis, scale, wide.ndim), scale


def _scale(format_: Format, peak: Array) -> Array:
    return np.maximum(np.asarray(peak, np.float32) / np.float32(format_.largest), np.float32(LEAST))
