"""Pictures as prompts: what is told apart in them, and what they ask for, alone or beside a sentence.

What `train_ip_adapter` teaches, and `evaluate_ip_adapter` judges. No torch.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

from . import shapes
from .checker import SEMANTIC_IOU, Verdict
from .shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Combo, Scene

# What an image encoder has to tell apart: the fields of a scene, and their values.
SEEN: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "background": BACKGROUNDS,
    "size": SIZES,
}
# Wanted of held-out pictures, percent, fixed before the training: to draw one's colour, background and shape;
# with a sentence that says another shape, that shape in the picture's colours.
WANTED_ALONE, WANTED_WITH_SHAPE = 80, 70


@dataclass(frozen=True)
class Asked:
    """The scene of a picture, the sentence beside it, and what is asked for: the sentence has its way."""

    shown: Scene
    prompt: str
    wanted: Scene

    def obeyed(self, verdict: Verdict) -> bool:
        """Whether colour, background and shape are right. A size is asked for by some pictures alone."""
        pairs = ((getattr(verdict, name), getattr(self.wanted, name)) for name in SEEN if name != "size")
        return all(found == wanted for found, wanted in pairs) and verdict.iou > SEMANTIC_IOU


def alone(scene: Scene) -> Asked:
    """A picture, and no sentence."""
    return Asked(scene, "", scene)


def with_shape(scene: Scene, shape: str) -> Asked:
    """A picture, and a sentence that says a shape, and nothing else."""
    return Asked(scene, f"a {shape}", replace(scene, shape=shape))


def another_shape(scene: Scene, rng: random.Random, allowed: Collection[Combo]) -> Scene:
    """The same in another shape, one of the combinations that are allowed; the scene itself if none is."""
    others = [replace(scene, shape=shape) for shape in SHAPES if shape != scene.shape]
    fitting = [one for one in others if (one.colour, one.shape, one.background) in allowed]
    return rng.choice(fitting or [scene])


def asked(count: int) -> list[Scene]:
    """Held-out scenes of all sizes, in a fixed random order."""
    scenes = shapes.held_out_scenes()
    shapes.generator("likeness asked").shuffle(scenes)
    return scenes[:count]
