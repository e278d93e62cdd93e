"""Shapes placed anywhere, and how well a picture follows an outline that was asked for.

What `train_controlnet` draws, and `evaluate_controls` judges. NumPy and Pillow only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import shapes
from .checker import STRICT_IOU, Mask, size_of
from .shapes import RADII, SIDE, SIZES, Placement, Scene

# A picture follows a hint if its shape overlaps the wanted one better than this (fixed before the training).
FOLLOWED_IOU = STRICT_IOU

# The smallest and the largest radius of any size: also those in between are asked for.
_RADII = (RADII[SIZES[0]][0], RADII[SIZES[-1]][1])
# Shapes reach this much beyond their radius (the star's tips); and the checker reads the background off the
# outermost pixels.
_REACH, _MARGIN = 1.1, 6.0
_INK, _PAPER = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Placed:
    """A scene, and where its shape lies."""

    scene: Scene
    place: Placement

    def drawing(self) -> npt.NDArray[np.uint8]:
        """The shape in white on black, (128, 128, 3) uint8: its edges say nothing of colours."""
        return shapes.blend(shapes.mask(self.scene.shape, self.place), _INK, _PAPER)

    def picture(self, rng: random.Random) -> npt.NDArray[np.uint8]:
        """The scene in its colours, (128, 128, 3) uint8."""
        colours = (shapes.jittered(colour, rng) for colour in (self.scene.colour, self.scene.background))
        return shapes.blend(shapes.mask(self.scene.shape, self.place), *colours)

    def likeness(self, seen: Mask) -> float:
        """How well a picture's own mask, (128, 128), overlaps the shape: intersection over union."""
        wanted = shapes.mask(self.scene.shape, self.place) > 0.5
        return float(np.count_nonzero(wanted & seen) / np.count_nonzero(wanted | seen))

    def prompt(self) -> str:
        """What it is, without its size: the outline says it."""
        scene = self.scene
        return Scene(scene.colour, scene.shape, scene.background).prompt()


def anywhere(rng: random.Random) -> Placement:
    """A random radius, and a random centre from where the shape lies inside the picture."""
    radius = rng.uniform(*_RADII)
    free = SIDE / 2 - _MARGIN - _REACH * radius
    return Placement(SIDE / 2 + rng.uniform(-free, free), SIDE / 2 + rng.uniform(-free, free), radius)


def asked(count: int, shape: str | None = None) -> list[Placed]:
    """Held-out combinations in a fixed random order, each placed anew; all of `shape`, where it is given."""
    rng = shapes.generator(f"placed {shape or 'shapes'}")
    combos = shapes.held_out()
    rng.shuffle(combos)
    found: list[Placed] = []
    for number in range(count):
        colour, own, ground = combos[number % len(combos)]
        place = anywhere(rng)
        found.append(Placed(Scene(colour, shape or own, ground, size_of(place.radius)), place))
    return found
