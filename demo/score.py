"""Counts how many pictures obey their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .checker import SEMANTIC_IOU, STRICT_IOU, check
from .shapes import Scene


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
