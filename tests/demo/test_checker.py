from dataclasses import replace

import numpy as np
import pytest

from latentrt.demo import shapes
from latentrt.demo.checker import SEMANTIC_IOU, STRIPED, check
from latentrt.demo.shapes import Placement, Scene
from tests.sizes import a_tenth_of


def scenes(count: int) -> list[Scene]:
    rng = shapes.generator("checker")
    return [shapes.sample(rng, shapes.combos()) for _ in range(count)]


@pytest.mark.parametrize("texture", shapes.TEXTURES)
@a_tenth_of(500)
def test_every_true_render_is_right_and_shuffled_prompts_are_wrong(count: int, texture: str) -> None:
    asked = [replace(scene, texture=texture) for scene in scenes(count)]
    rng = shapes.generator("pictures")
    verdicts = [check(shapes.render(scene, rng)) for scene in asked]
    wrong = [(s.prompt(), v) for s, v in zip(asked, verdicts, strict=True) if not v.obeys(s)]
    assert wrong == []
    shuffled = zip(asked[1:] + asked[:1], verdicts, strict=True)
    # Chance is 1 in 3 sizes x 306 combinations.
    assert sum(verdict.obeys(scene, SEMANTIC_IOU) for scene, verdict in shuffled) <= count / 100


@pytest.mark.parametrize("attribute", ["background", "colour", "size", "shape", "texture"])
def test_one_wrong_attribute_is_enough(attribute: str) -> None:
    drawn = {"colour": "red", "shape": "circle", "background": "blue", "size": "medium"}
    other = {
        "colour": "green",
        "shape": "ring",
        "background": "white",
        "size": "large",
        "texture": "striped",
    }
    seen = check(shapes.render(Scene(**drawn), shapes.generator(0)))
    assert seen.obeys(Scene(**drawn))
    assert not seen.obeys(Scene(**(drawn | {attribute: other[attribute]})))


@pytest.mark.parametrize("shape", sorted(set(shapes.OUTLINES) - set(shapes.SHAPES)))
def test_a_shape_that_the_model_does_not_know_is_told_from_those_that_it_knows(shape: str) -> None:
    rng = shapes.generator(shape)
    asked = [replace(scene, shape=shape) for scene in scenes(20)]
    assert all(check(shapes.render(scene, rng)).obeys(scene) for scene in asked)


@pytest.mark.parametrize("shape", shapes.OUTLINES)
def test_the_depth_of_stripes_is_what_they_were_drawn_with(shape: str) -> None:
    whole = shapes.mask(shape, Placement(64.0, 64.0, 40.0))
    striped = shapes.textured(whole, "striped")
    for depth in (0.0, 0.3, 0.7, 1.0):
        coverage = (1 - depth) * whole + depth * striped
        verdict = check(shapes.blend(coverage, shapes.RGB["red"], shapes.RGB["white"]))
        assert verdict.depth == pytest.approx(depth, abs=0.1)
        assert verdict.texture == ("striped" if depth > STRIPED else "plain")


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_half_a_shape_is_a_bad_shape(shape: str) -> None:
    place = Placement(64.0, 64.0, 33.0)
    whole = shapes.mask(shape, place)
    cut = whole.copy()
    cut[:, 64:] = 0
    picture = shapes.blend(cut, shapes.RGB["red"], shapes.RGB["white"])
    kept = float((cut > 0.5).sum() / (whole > 0.5).sum())
    # The true template at its true place is a lower bound; no template fits a left half.
    assert kept - 0.02 <= check(picture).iou < 0.9


def test_a_flat_picture_shows_nothing() -> None:
    verdict = check(np.full((128, 128, 3), shapes.RGB["pink"], dtype=np.uint8))
    assert (verdict.background, verdict.shape, verdict.colour, verdict.iou) == (
        "pink",
        "nothing",
        "nothing",
        0.0,
    )


def test_noise_is_no_shape() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert check(noise).iou < SEMANTIC_IOU


def test_blur_and_speckles_do_not_change_the_verdict() -> None:
    scene = Scene("white", "star", "gray", "small")
    picture = shapes.render(scene, shapes.generator(4)).astype(np.float64)
    shifted = [np.roll(picture, (dy, dx), axis=(0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    speckles = np.random.default_rng(0).normal(0, 8, picture.shape)
    spoilt = (np.mean(shifted, axis=0) + speckles).clip(0, 255).astype(np.uint8)
    assert check(spoilt).obeys(scene)


def test_a_picture_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a picture of shape \(128, 64, 3\), expected \(N, N, 3\)"):
        check(np.zeros((128, 64, 3), dtype=np.uint8))
