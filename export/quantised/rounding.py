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

# Data whose rounding errors are a larger share of them stay as they are: 25 dB, as in NVIDIA/Model-Optimizer.
_MOST_NOISE = 10 ** (-25 / 20)
_ALPHA = 0.5  # of SmoothQuant


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
    peaks = {name: ranges[name].peak for name in readers}
    rms = {name: ranges[name].rms for name in readers}
    for name, behind in readers.items():
        reach = ranges[name].channels
        if normalised.get(name) != len(behind) or reach is None or not format_.smooths:
            continue
        factor = smoothing_factors(reach, [_by_input(place, weights) for place in behind], _ALPHA)
        if (smooth := float((reach / factor).max())) < peaks[name]:
            divided[name], peaks[name] = factor, smooth
            spread: Any = (reach / factor) ** 2  # a channel's mean square goes with what it reaches
            rms[name] *= float(np.sqrt(spread.mean() / np.mean(reach**2)))
    kept = [place for place in places if noise(format_, peaks[place.data], rms[place.data]) <= _MOST_NOISE]
    names = {place.data for place in kept}
    return Rounding(
        format=format_,
        places=tuple(kept),
        left_out=tuple(place.name for place in places if place not in kept),
        data={name: max(peaks[name] / format_.largest, LEAST) for name in peaks if name in names},
        divided={name: factor for name, factor in divided.items() if name in names},
    )


def noise(format_: Format, peak: float, rms: float) -> float:
    """About how large the rounding errors of data are, as a share of the data (root mean squares).

    Of whole numbers with the largest at `peak`: a step over the root of 12.
    """
    if format_.relative_error is not None:
        return format_.relative_error
    return peak / format_.largest / 12**0.5 / max(rms, LEAST)


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
