"""Every way to start a picture, on the shipped model, judged by the automatic checker."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentrt.demo.checker import SEMANTIC_IOU, check
from latentrt.demo.shapes import RGB, Scene
from latentrt.engines.errors import UsageError
from latentrt.runtime import Pipeline

SIDE = 128
CENTRE = (38, 44)  # of the circle in the picture to start from: (x, y)
MASK = np.zeros((SIDE, SIDE), np.uint8)
MASK[60:124, 60:124] = 255


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A small red circle in a corner of a blue background; drawn, not generated."""
    image = Image.new("RGB", (SIDE, SIDE), RGB["blue"])
    x, y = CENTRE
    ImageDraw.Draw(image).ellipse((x - 24, y - 24, x + 24, y + 24), fill=RGB["red"])
    return image


def draw(pipe: Pipeline, prompt: str, **parameters: Any) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(pipe(prompt, output_type="np", **parameters).images)[0]


def distance(picture: np.ndarray) -> float:
    """Pixels between the middle of what is drawn and where the circle was."""
    ground = np.median(picture[:4].reshape(-1, 3), axis=0)
    y, x = np.nonzero(np.linalg.norm(picture - ground, axis=2) > 60)
    return float(np.hypot(x.mean() - CENTRE[0], y.mean() - CENTRE[1]))


@pytest.mark.parametrize(
    "scene",
    [Scene("red", "circle", "blue", "small"), Scene("yellow", "star", "blue", "small")],
    ids=lambda scene: scene.shape,
)
@pytest.mark.parametrize("seed", [1, 5])
def test_low_strength_keeps_the_layout_and_high_strength_does_not(
    pipe: Pipeline, picture: Image.Image, scene: Scene, seed: int
) -> None:
    low, high = (
        draw(pipe, scene.prompt(), image=picture, strength=strength, seed=seed) for strength in (0.15, 1.0)
    )
    assert distance(low) < 8
    assert distance(high) > 16
    assert check(high).obeys(scene, SEMANTIC_IOU), check(high)
    assert check(low).obeys(scene, SEMANTIC_IOU), check(low)


@pytest.mark.parametrize(
    "scene",
    [
        Scene("yellow", "star", "blue"),
        Scene("green", "square", "blue"),
        Scene("red", "heart", "blue"),
    ],
    ids=lambda scene: scene.shape,
)
def test_inpainting_draws_inside_and_changes_nothing_outside(
    pipe: Pipeline, picture: Image.Image, scene: Scene
) -> None:
    drawn = draw(pipe, scene.prompt(), image=picture, mask_image=MASK, padding_mask_crop=0, seed=5)
    np.testing.assert_array_equal(drawn[MASK == 0], np.asarray(picture)[MASK == 0])
    inside = Image.fromarray(drawn[60:124, 60:124]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert check(np.asarray(inside)).obeys(scene, SEMANTIC_IOU), check(np.asarray(inside))


def test_inpainting_in_place_changes_the_masked_part_only(pipe: Pipeline, picture: Image.Image) -> None:
    drawn = draw(pipe, "a large yellow star on a blue background", image=picture, mask_image=MASK, seed=5)
    changed = (drawn != np.asarray(picture)).any(axis=2)
    assert changed[MASK > 0].mean() > 0.5
    assert not changed[MASK == 0].any()


def test_a_soft_edge_reaches_across_the_mask(pipe: Pipeline, picture: Image.Image) -> None:
    parameters = {"image": picture, "mask_image": MASK, "seed": 5, "num_inference_steps": 4}
    hard, soft = (draw(pipe, "a green square", **parameters, mask_blur=blur) for blur in (0, 4))
    edge = np.s_[60:124, 56:60]  # just outside
    np.testing.assert_array_equal(hard[edge], np.asarray(picture)[edge])
    assert (soft[edge] != np.asarray(picture)[edge]).any()


@pytest.mark.parametrize("joint", [", ", " BREAK "])
def test_a_prompt_of_over_75_tokens(pipe: Pipeline, joint: str) -> None:
    scene = Scene("red", "circle", "blue", "large")
    prompt = joint.join([scene.prompt()] * 10)
    assert len(pipe._adapted._base.text._encoders[0].tokenizer.words(prompt)) > 75
    verdict = check(draw(pipe, prompt, seed=1))
    assert verdict.obeys(scene, SEMANTIC_IOU), verdict


def test_the_second_half_of_a_long_prompt_counts(pipe: Pipeline) -> None:
    scene = Scene("yellow", "star", "green", "large")
    prompt = " BREAK ".join([scene.prompt()] * 8)
    assert check(draw(pipe, prompt, seed=1)).obeys(scene, SEMANTIC_IOU)
    other = " BREAK ".join([scene.prompt()] + [Scene("red", "circle", "blue", "large").prompt()] * 7)
    assert not check(draw(pipe, other, seed=1)).obeys(scene, SEMANTIC_IOU)


def test_a_weight_changes_the_picture(pipe: Pipeline) -> None:
    parameters = {"seed": 3, "num_inference_steps": 4}
    plain, none, strong = (
        draw(pipe, f"a {word} circle on a blue background", **parameters)
        for word in ("red", "(red:1.0)", "(red:1.5)")
    )
    np.testing.assert_array_equal(plain, none)
    assert np.abs(strong.astype(int) - plain).max() > 10
    comfy = draw(pipe, "a (red:1.5) circle on a blue background", prompt_syntax="comfyui", **parameters)
    assert np.abs(strong.astype(int) - comfy).max() > 10


def test_tiles_are_close_to_the_whole(pipe: Pipeline, picture: Image.Image) -> None:
    parameters = {"image": picture, "strength": 0.3, "seed": 2, "num_inference_steps": 8}
    prompt = "a small red circle on a blue background"
    whole, tiled = (draw(pipe, prompt, **parameters, tile=tile) for tile in (None, 64))
    assert np.abs(whole.astype(int) - tiled).mean() < 12
    assert (whole != tiled).any()


def test_the_last_preview_of_an_inpainting_is_the_picture(pipe: Pipeline, picture: Image.Image) -> None:
    parameters = {"image": picture, "mask_image": MASK, "seed": 5, "num_inference_steps": 2}
    *_, last = pipe.stream("a green square", **parameters)
    np.testing.assert_array_equal(np.asarray(last.preview()[0]), draw(pipe, "a green square", **parameters))
    with pytest.raises(UsageError, match="the preview 'tiny' of 'demo'"):
        last.preview("tiny")


def test_a_callback_that_only_writes_changes_nothing(pipe: Pipeline) -> None:
    def scribble(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        values["latents"][:] = 0

    parameters = {"seed": 5, "num_inference_steps": 3}
    plain, watched = (
        draw(pipe, "a red star", **parameters, callback_on_step_end=seen) for seen in (None, scribble)
    )
    np.testing.assert_array_equal(plain, watched)


def test_warming_up_with_a_picture(pipe: Pipeline, picture: Image.Image) -> None:
    pipe.warmup(image=picture, tile=64)


def test_previews(pipe: Pipeline) -> None:
    steps = list(pipe.stream("a large red circle on a blue background", seed=7, num_inference_steps=6))
    small = steps[-1].preview("rgb")[0]
    assert small.size == (16, 16), "one pixel per latent cell"
    assert steps[2].preview("fast")[0].size == small.size
    centre, corner = (np.asarray(small, int)[y, x] for y, x in ((8, 8), (0, 0)))
    assert centre[0] - centre[2] > corner[0] - corner[2] + 40, "redder where the circle is"
