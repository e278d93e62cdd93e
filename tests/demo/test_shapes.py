from collections import Counter

import numpy as np
import pytest

from latentrt.demo import shapes
from latentrt.demo.shapes import Placement, Scene


def area(points: tuple[tuple[float, float], ...]) -> float:
    x, y = np.asarray(points).T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


@pytest.mark.parametrize("shape", shapes.OUTLINES)
@pytest.mark.parametrize("radius", [21.0, 33.0, 50.0])
def test_coverage_is_the_area_of_the_polygon(shape: str, radius: float) -> None:
    drawn = float(shapes.mask(shape, Placement(64.3, 63.6, radius)).sum())
    expected = area(shapes.outline(shape)) * radius**2
    if shape in ("ring", "frame"):
        expected *= 0.75
    # Pillow also fills the pixels that an outline touches: half a fine pixel all around.
    assert drawn == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", shapes.OUTLINES)
def test_the_largest_shape_stays_off_the_border(shape: str) -> None:
    jitter = shapes.JITTER["large"]
    for x in (64 - jitter, 64 + jitter):
        for y in (64 - jitter, 64 + jitter):
            drawn = shapes.mask(shape, Placement(x, y, shapes.RADII["large"][1]))
            assert drawn[:2].max() == drawn[-2:].max() == drawn[:, :2].max() == drawn[:, -2:].max() == 0


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'hexagon'"):
        shapes.outline("hexagon")


def test_a_render_has_the_two_colours_of_the_scene() -> None:
    picture = shapes.render(Scene("red", "circle", "blue"), shapes.generator(0))
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    for pixel, name in ((picture[64, 64], "red"), (picture[0, 0], "blue")):
        assert np.abs(pixel.astype(int) - shapes.RGB[name]).max() <= shapes.COLOUR_JITTER


def test_the_same_generator_draws_the_same_picture() -> None:
    scene = Scene("green", "star", "pink", "small")
    first, again = (shapes.render(scene, shapes.generator("key")) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_stripes_leave_two_thirds_and_show_the_background_between() -> None:
    whole = np.ones((128, 128), np.float32)
    striped = shapes.textured(whole, "striped")
    assert striped[:120].mean() == pytest.approx(2 / 3)
    assert (striped == striped[:, :1]).all()
    np.testing.assert_array_equal(shapes.textured(whole, "plain"), whole)
    picture = shapes.render(Scene("red", "square", "blue", "large", "striped"), shapes.generator(0))
    for row, name in ((66, "blue"), (54, "red")):
        found = np.median(picture[row - 2 : row + 2, 60:68].astype(int), axis=(0, 1))
        assert np.abs(found - shapes.RGB[name]).max() <= shapes.COLOUR_JITTER


def test_words_that_only_adapters_teach_are_unknown() -> None:
    assert shapes.unknown_words("a red cross on a white background") == ["cross"]


def test_prompts() -> None:
    assert Scene("red", "circle", "blue").prompt() == "a red circle on a blue background"
    assert Scene("orange", "ring", "gray").prompt() == "an orange ring on a gray background"
    small = Scene("yellow", "star", "green", "small")
    assert small.prompt() == "a small yellow star on a green background"
    assert Scene("orange", "heart", "white", "large").prompt() == "a large orange heart on a white background"


def test_no_shape_has_the_colour_of_its_background() -> None:
    assert len(shapes.combos()) == len(set(shapes.combos())) == 306
    assert all(colour != ground for colour, _, ground in shapes.combos())


def test_the_split_is_complete_disjoint_and_keeps_the_quoted_prompts_in_training() -> None:
    held_out, training = set(shapes.held_out()), set(shapes.training_combos())
    assert len(held_out) == 70
    assert len(training) == 236
    assert held_out | training == set(shapes.combos())
    assert not held_out & training
    assert training >= shapes.QUOTED


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_training_keeps_at_least_half_of_every_pair(first: int, second: int) -> None:
    everything = Counter((combo[first], combo[second]) for combo in shapes.combos())
    kept = Counter((combo[first], combo[second]) for combo in shapes.training_combos())
    assert all(kept[pair] * 2 >= count for pair, count in everything.items())


def test_the_held_out_prompts_are_distinct() -> None:
    assert len({scene.prompt() for scene in shapes.held_out_scenes()}) == 210


def test_descriptions_say_nothing_wrong_and_are_mostly_canonical() -> None:
    rng = shapes.generator(1)
    canonical = 0
    for _ in range(2000):
        scene = shapes.sample(rng, shapes.training_combos())
        text = shapes.describe(scene, rng)
        canonical += text == scene.prompt()
        words = set(text.replace(",", "").replace("grey", "gray").split())
        assert scene.shape in words
        colours = words & set(shapes.RGB)
        assert colours <= {scene.colour, scene.background}
        assert set(text.replace(",", "").split()) <= set(shapes.vocabulary())
    assert 0.70 < canonical / 2000 < 0.82
