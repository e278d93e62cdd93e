"""Drawn shapes and the sentences that describe them: the whole world of the demo model.

A scene is one filled shape on a flat background. Pictures are (128, 128, 3) uint8; all lengths are pixels.
NumPy and Pillow only, so that the checker and the tests need no torch.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 128

RGB: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (242, 124, 22),
    "yellow": (252, 222, 60),
    "green": (28, 156, 66),
    "blue": (38, 88, 220),
    "purple": (146, 56, 186),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
    "gray": (154, 154, 154),
    "pink": (248, 150, 192),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "blue", "yellow", "pink", "green")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = ("small", "medium", "large")

# Smallest and largest radius of a size. An 8x VAE has one cell for 8x8 pixels: below 20 px it blurs corners.
RADII: dict[str, tuple[float, float]] = {
    "small": (21.0, 25.0),
    "medium": (31.0, 35.0),
    "large": (45.0, 50.0),
}
# How far the centre may lie from the middle of the picture, along each axis.
JITTER: dict[str, int] = {"small": 20, "medium": 12, "large": 5}
# Each channel of a drawn colour lies within this many steps of the palette's.
COLOUR_JITTER = 6

# Horizontal stripes, fixed to the picture: (rows from one to the next, rows drawn). In a gap one sees the
# background. It has the height of one cell of the autoencoder, which draws no thinner ones.
TEXTURES: dict[str, tuple[int, int]] = {"plain": (1, 1), "striped": (24, 16)}

# The prompts that the documentation quotes are training combinations: no quoted example is part of the test.
QUOTED = frozenset({("red", "circle", "blue"), ("yellow", "star", "green")})
HELD_OUT_COUNT = 70

# What else the sentences of training have.
OTHER_WORDS = ("a", "an", "on", "the", "background", "tiny", "little", "big", "huge", "grey")
_WORDS = re.compile(r"[^\W\d_]+")

_OVERSAMPLING = 4
_STAR_INNER = 0.55
_HOLES = {"ring": 0.5, "frame": 0.5}  # a hole has the outline of its shape, so much smaller

Point = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """What a canonical prompt says, and the texture, for which there is no word."""

    colour: str
    shape: str
    background: str
    size: str = "medium"
    texture: str = "plain"

    def prompt(self) -> str:
        """The canonical sentence; "medium" is what a sentence without a size means."""
        size = "" if self.size == "medium" else f"{self.size} "
        thing = f"{size}{self.colour} {self.shape}"
        return f"{_article(thing)} {thing} on a {self.background} background"


@dataclass(frozen=True)
class Placement:
    """Where a shape is drawn: centre and radius in pixels."""

    x: float
    y: float
    radius: float


def generator(key: int | str) -> random.Random:
    """A generator whose numbers depend on the key alone."""
    return random.Random(key)  # noqa: S311 (pictures, not secrets)


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that no picture of training went with."""
    known = {*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *OTHER_WORDS}
    return list(dict.fromkeys(word for word in _WORDS.findall(prompt.lower()) if word not in known))


def _article(following: str) -> str:
    return "an" if following[0] in "aeiou" else "a"


def _polygon(corners: int, turn: float = 0.0) -> tuple[Point, ...]:
    angles = (turn + 2 * math.pi * i / corners for i in range(corners))
    return tuple((math.cos(angle), math.sin(angle)) for angle in angles)


def _star(radius: float) -> tuple[Point, ...]:
    radii = [radius if i % 2 == 0 else radius * _STAR_INNER for i in range(10)]
    angles = (math.pi * i / 5 for i in range(10))
    return tuple((r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True))


def _cross(reach: float, half: float) -> tuple[Point, ...]:
    arm = ((half, -half), (reach, -half), (reach, half))  # to the right; the others are this one, turned
    return tuple(
        point for turn in ((1, 0), (0, 1), (-1, 0), (0, -1)) for point in (_turned(p, *turn) for p in arm)
    )


def _turned(point: Point, cosine: float, sine: float) -> Point:
    x, y = point
    return cosine * x - sine * y, sine * x + cosine * y


def _heart_point(angle: float) -> Point:
    """The usual heart curve, but with sin^2 for sin^3: the tip is a wedge, not a needle."""
    x = 16 * math.sin(angle) * abs(math.sin(angle))
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return x / 16, -(y + 2.5) / 16


# Not inscribed in the unit circle (half side .71): an area like the other shapes' matters more.
_SQUARE = ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
# The polygon of a shape with radius 1, centred on its bounding circle, y downwards.
OUTLINES: dict[str, tuple[Point, ...]] = {
    "circle": _polygon(96),
    "square": _SQUARE,
    "triangle": ((0.0, -1.05), (1.1, 0.85), (-1.1, 0.85)),
    "star": _star(1.1),
    "heart": tuple(_heart_point(2 * math.pi * i / 96) for i in range(96)),
    "ring": _polygon(96),
    # Which adapters teach; no picture of the model's training has them.
    "cross": _cross(1.0, 0.35),
    "frame": _SQUARE,
}


def outline(shape: str) -> tuple[Point, ...]:
    """The polygon of a shape with radius 1, centred on its bounding circle, y downwards."""
    if shape not in OUTLINES:
        raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(OUTLINES)}")
    return OUTLINES[shape]


def mask(
    shape: str, place: Placement, side: int = SIDE, oversampling: int = _OVERSAMPLING
) -> npt.NDArray[np.float32]:
    """Coverage of each pixel by the shape, (side, side) float32 in 0..1, in steps of 1 / oversampling^2."""
    canvas = Image.new("L", (side * oversampling, side * oversampling), 0)
    draw = ImageDraw.Draw(canvas)
    points = outline(shape)

    def placed(scale: float) -> list[Point]:
        reach = scale * place.radius
        centred = [(place.x + reach * x, place.y + reach * y) for x, y in points]
        return [(x * oversampling, y * oversampling) for x, y in centred]

    draw.polygon(placed(1.0), fill=255)
    if shape in _HOLES:
        draw.polygon(placed(_HOLES[shape]), fill=0)
    return np.asarray(canvas.reduce(oversampling), dtype=np.float32) / 255.0


def place(size: str, rng: random.Random, side: int = SIDE) -> Placement:
    """A random radius of the size and a random centre near the middle."""
    jitter = JITTER[size]
    return Placement(
        x=side / 2 + rng.uniform(-jitter, jitter),
        y=side / 2 + rng.uniform(-jitter, jitter),
        radius=rng.uniform(*RADII[size]),
    )


def jittered(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """A palette colour with a little noise on each channel, 0..255."""
    red, green, blue = (min(255, max(0, c + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for c in RGB[colour])
    return red, green, blue


def blend(
    coverage: npt.NDArray[np.float32], inside: tuple[int, int, int], outside: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """Colour a mask: (H, W) float32 coverage -> (H, W, 3) uint8."""
    low = np.asarray(outside, dtype=np.float32)
    high = np.asarray(inside, dtype=np.float32)
    return np.rint(low + coverage[..., None] * (high - low)).astype(np.uint8)


def textured(coverage: npt.NDArray[np.float32], texture: str) -> npt.NDArray[np.float32]:
    """A mask, (H, W), with a texture of `TEXTURES` cut into it."""
    period, kept = TEXTURES[texture]
    rows = np.resize(np.arange(period), coverage.shape[0])[:, None]
    return np.where(rows < kept, coverage, np.float32(0))


def render(scene: Scene, rng: random.Random) -> npt.NDArray[np.uint8]:
    """Draw a scene at a random place, (128, 128, 3) uint8."""
    coverage = textured(mask(scene.shape, place(scene.size, rng)), scene.texture)
    return blend(coverage, jittered(scene.colour, rng), jittered(scene.background, rng))


Combo = tuple[str, str, str]


def combos() -> list[Combo]:
    """All 306 (colour, shape, background) in a fixed order; a shape never has its background's colour."""
    triples = itertools.product(COLOURS, SHAPES, BACKGROUNDS)
    return [(colour, shape, ground) for colour, shape, ground in triples if colour != ground]


def held_out(seed: int = 20261121) -> list[Combo]:
    """The 70 combinations that training never sees, in a fixed order.

    No pair of attributes loses more than half of its combinations, so every pair stays visible in training
    and only the triple is new.
    """
    limits = {("colour", "background"): 2, ("colour", "shape"): 3, ("shape", "background"): 3}
    taken: dict[tuple[str, str, str], int] = {}
    chosen: list[Combo] = []
    candidates = [combo for combo in combos() if combo not in QUOTED]
    generator(seed).shuffle(candidates)
    for colour, shape, ground in candidates:
        pairs = {
            ("colour", "background"): ("cb", colour, ground),
            ("colour", "shape"): ("cs", colour, shape),
            ("shape", "background"): ("sb", shape, ground),
        }
        spared = all(taken.get(key, 0) < limits[pair] for pair, key in pairs.items())
        if spared and len(chosen) < HELD_OUT_COUNT:
            chosen.append((colour, shape, ground))
            for key in pairs.values():
                taken[key] = taken.get(key, 0) + 1
    return chosen


@functools.cache
def training_combos() -> tuple[Combo, ...]:
    """The 236 combinations that may be drawn in training."""
    excluded = set(held_out())
    return tuple(combo for combo in combos() if combo not in excluded)


def held_out_scenes() -> list[Scene]:
    """The test: every held-out combination in every size, 210 distinct prompts."""
    return [Scene(*combo, size=size) for combo in held_out() for size in SIZES]


_SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("", "", "medium"),
    "large": ("large", "big", "huge"),
}


def describe(scene: Scene, rng: random.Random) -> str:
    """A prompt as a user would write it: 72 % canonical, the rest paraphrased or with a part left out."""
    if rng.random() < 0.72:
        return scene.prompt()
    size = rng.choice(_SIZE_WORDS[scene.size])
    ground = rng.choice(("gray", "grey")) if scene.background == "gray" else scene.background
    head = " ".join(word for word in (size, scene.colour, scene.shape) if word)
    colourless = " ".join(word for word in (size, scene.shape) if word)
    forms = (
        f"{_article(head)} {head} on a {ground} background",
        f"{_article(head)} {head} on a {ground} background",
        f"{head} on {ground}",
        f"{head}, {ground} background",
        f"{_article(head)} {head}",
        f"{_article(colourless)} {colourless} on a {ground} background",
    )
    return rng.choice(forms)


def sample(rng: random.Random, allowed: Sequence[Combo]) -> Scene:
    """A random training scene."""
    return Scene(*rng.choice(allowed), size=rng.choice(SIZES))


def vocabulary() -> list[str]:
    """Every word that deserves a token of its own, sorted: those of the prompts, and some that users try."""
    words = {*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, "a", "an", "on", "background"}
    words |= {"tiny", "little", "big", "huge", "grey", "the", "and", "of", "with", "in", "to", "is"}
    words |= {"photo", "picture", "image", "drawing", "painting", "shape", "cat", "dog", "house"}
    return sorted(words)
