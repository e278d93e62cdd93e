"""What SDXL's UNets are told of the picture besides the prompt: sizes, crop, aesthetic score.

Podell et al. 2023 (arXiv 2307.01952), sections 2.2 and 2.3. Which of them a model takes, and in which order,
is the manifest's `time_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.package import Manifest
from ...engines.spec import Array


@dataclass(frozen=True, kw_only=True)
class SizeConditions:
    """What the model takes of `package.TIME_IDS`, in its order, for the prompt and for what to avoid."""

    positive: Mapping[str, float]
    negative: Mapping[str, float]

    def rows(self, *, guided: bool) -> Array:
        """(2, count) float32 with guidance, negative first, else (1, count)."""
        values = (self.negative, self.positive) if guided else (self.positive,)
        return np.array([list(each.values()) for each in values], np.float32)


def make_size_conditions(
    manifest: Manifest, values: Mapping[str, Any], height: int, width: int
) -> SizeConditions:
    """Sizes are the picture's unless given; what is not said of the negative ones is as the positive ones.

    (diffusers' image-to-image pipeline puts a negative crop that is not given at (0, 0) instead.)

    Args:
        manifest: says which conditions the model takes.
        values: the checked parameters.
        height: of what is drawn.
        width: of what is drawn.
    """
    here = (height, width)
    original, target = values["original_size"] or here, values["target_size"] or here
    crop = values["crops_coords_top_left"]
    positive = _named(original, crop, target, values["aesthetic_score"])
    negative = _named(
        values["negative_original_size"] or original,
        values["negative_crops_coords_top_left"] or crop,
        values["negative_target_size"] or target,
        values["negative_aesthetic_score"],
    )
    return SizeConditions(
        positive={name: positive[name] for name in manifest.time_ids},
        negative={name: negative[name] for name in manifest.time_ids},
    )


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
