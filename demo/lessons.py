"""What the demo's adapters teach: the scenes that each is trained on, and those that it is judged by.

Data alone: `train_adapters` draws and trains, `evaluate_adapters` lets the checker judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import shapes
from .checker import SEMANTIC_IOU, Verdict
from .shapes import Combo, Scene


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One adapter: a texture or a shape.

    `combos` are all (colour, shape, background) that can be asked for, and `held_out` those that training
    never draws. A shape is asked for by the lesson's name, a texture by nothing: its adapter
    always acts. It is trained in all sizes at first, and judged in `sizes`. `seen` says whether a picture
    has what is taught, and `amount` how much of it.
    """

    name: str
    combos: tuple[Combo, ...]
    held_out: tuple[Combo, ...]
    texture: str = "plain"
    sizes: tuple[str, ...] = shapes.SIZES
    seen: Callable[[Verdict], bool]
    amount: Callable[[Verdict], float]

    def training(self) -> list[Combo]:
        """The combinations that may be drawn in training."""
        return [combo for combo in self.combos if combo not in set(self.held_out)]

    def scene(self, combo: Combo, size: str) -> Scene:
        """One that has what is taught."""
        return Scene(*combo, size=size, texture=self.texture)

    def tests(self, count: int, sizes: Iterable[str] = ()) -> list[Scene]:
        """Held-out scenes in a fixed random order, every one before any comes twice."""
        scenes = [self.scene(combo, size) for combo in self.held_out for size in sizes or self.sizes]
        shapes.generator(f"{self.name} tests").shuffle(scenes)
        return list(itertools.islice(itertools.cycle(scenes), count))


def _some(combos: list[Combo], count: int, key: str) -> tuple[Combo, ...]:
    return tuple(shapes.generator(key).sample(combos, count))


def _combos(shape: str) -> list[Combo]:
    pairs = itertools.product(shapes.COLOURS, shapes.BACKGROUNDS)
    return [(colour, shape, ground) for colour, ground in pairs if colour != ground]


LORAS = ("striped", "cross")
SHAPE = "frame"  # which an embedding teaches
LESSONS = {
    lesson.name: lesson
    for lesson in (
        Lesson(
            name="striped",
            combos=tuple(shapes.combos()),
            held_out=tuple(shapes.held_out()),
            texture="striped",
            seen=lambda verdict: verdict.texture == "striped",
            amount=lambda verdict: verdict.depth,
        ),
        Lesson(
            name="cross",
            combos=tuple(_combos("cross")),
            held_out=_some(_combos("cross"), 12, "cross held out"),
            # So few steps of training do not teach it to draw smaller ones well.
            sizes=("large",),
            seen=lambda verdict: verdict.shape == "cross" and verdict.iou > SEMANTIC_IOU,
            amount=lambda verdict: verdict.likeness.get("cross", 0.0),
        ),
        Lesson(
            name="frame",
            combos=tuple(_combos("frame")),
            held_out=_some(_combos("frame"), 12, "frame held out"),
            # Smaller ones are drawn as rings.
            sizes=("large",),
            seen=lambda verdict: verdict.shape == "frame" and verdict.iou > SEMANTIC_IOU,
            amount=lambda verdict: verdict.likeness.get("frame", 0.0),
        ),
    )
}
