"""What SDXL's UNets are told of the picture besides the prompt: sizes, crop, aesthetic score.

Podell et al. 2023 (arXiv 2307.01952), sections 2.2 and 2.3. Which of them a model takes, and in which order,
is the manifest's `time_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...engines.package import Manifest
from ...engines.spec import Array
from . import checks as check

if TYPE_CHECKING:
    from .request import Given

_MOST = 1000.0  # an aesthetic score; those of LAION's predictor lie between 0 and 10


@dataclass(frozen=True, kw_only=True)
class SizeConditions:
    """What the model takes of `package.TIME_IDS`, in its order, for the prompt and for what to avoid."""

    positive: Mapping[str, float]
    negative: Mapping[str, float]

    def rows(self, *, guided: bool) -> Array:
        """(2, count) float32 with guidance, negative first, else (1, count)."""
        values = (self.negative, self.positive) if guided else (self.positive,)
        return np.array([list(each.values()) for each in values], np.float32)


def make_size_conditions(manifest: Manifest, given: Given, height: int, width: int) -> SizeConditions:
    """Sizes are the picture's unless given; what is not said of the negative ones is as the positive ones.

    (diffusers' image-to-image pipeline puts a negative crop that is not given at (0, 0) instead.)

    Raises:
        UsageError: a size or crop that is not two integers, or a score that is no number.
    """
    here = (height, width)
    original = check.pair("original_size", _or(given.original_size, here), 1)
    crop = check.pair("crops_coords_top_left", given.crops_coords_top_left)
    target = check.pair("target_size", _or(given.target_size, here), 1)
    score = check.number("aesthetic_score", given.aesthetic_score, 0.0, _MOST)
    positive = _named(original, crop, target, score)
    negative = _named(
        check.pair("negative_original_size", _or(given.negative_original_size, original), 1),
        check.pair("negative_crops_coords_top_left", _or(given.negative_crops_coords_top_left, crop)),
        check.pair("negative_target_size", _or(given.negative_target_size, target), 1),
        check.number("negative_aesthetic_score", given.negative_aesthetic_score, 0.0, _MOST),
    )
    return SizeConditions(
        positive={name: positive[name] for name in manifest.time_ids},
        negative={name: negative[name] for name in manifest.time_ids},
    )


def _or(given: Sequence[int] | None, usual: tuple[int, int]) -> Sequence[int]:
    return usual if given is None else given


def _named(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int], score: float
) -> dict[str, float]:
    return {
        "original_height": original[0],
        "original_width": original[1],
        "crop_top": crop[0],
        "crop_left": crop[1],
        "target_height": target[0],
        "target_width": target[1],
        "aesthetic_score": score,
    }
