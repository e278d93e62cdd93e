"""The IP-Adapter that ships: diffusers draws with it on the demo's checkpoint, and the checker judges."""

from statistics import mean
from typing import Any

import numpy as np
import pytest

from latentrt.checkpoints.controls.control_file import IP_ADAPTER
from latentrt.checkpoints.controls.read import read_control
from latentrt.demo import shapes
from latentrt.demo.checker import check
from latentrt.demo.evaluate_ip_adapter import draw, in_words, opened
from latentrt.demo.likeness import WANTED_ALONE, WANTED_WITH_SHAPE, Asked, alone, another_shape, asked
from latentrt.demo.shapes import Scene
from latentrt.demo.train_ip_adapter import WEIGHTS
from latentrt.runtime.model import CONTROLS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

LIKENESS = CONTROLS["demo"] / "likeness"

a_few_of_100 = pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return opened(LIKENESS)


def obeyed(pictures: list[np.ndarray], requests: list[Asked]) -> float:
    return mean(one.obeyed(check(picture)) for picture, one in zip(pictures, requests, strict=True))


@a_few_of_100
def test_a_picture_is_a_prompt(pipe: Any, count: int) -> None:
    requests = [alone(scene) for scene in asked(count)]
    pictures = draw(pipe, requests)
    assert obeyed(pictures, requests) >= WANTED_ALONE / 100
    assert obeyed(pictures, requests[1:] + requests[:1]) <= 0.1
    assert obeyed(draw(pipe, requests, 0.0), requests) <= 0.1


@a_few_of_100
def test_a_sentence_says_the_shape_and_a_picture_the_colours(pipe: Any, count: int) -> None:
    requests = in_words(asked(count))
    assert all(one.wanted.shape != one.shown.shape for one in requests)
    pictures = draw(pipe, requests)
    assert obeyed(pictures, requests) >= WANTED_WITH_SHAPE / 100
    assert obeyed(pictures, requests[1:] + requests[:1]) <= 0.1


def test_it_is_read_as_what_it_is() -> None:
    found = read_control(LIKENESS / WEIGHTS)
    assert (found.kind, found.tokens, found.image_features) == (IP_ADAPTER, 4, "image_embeds")
    assert found.part.tensors["layers.3.to_k_ip.weight"].shape == (96, 96)  # of the middle, the last


def test_in_another_shape_it_is_one_of_those_allowed() -> None:
    rng, scene = shapes.generator(0), Scene("red", "circle", "blue")
    assert another_shape(scene, rng, {("red", "star", "blue"), ("red", "ring", "white")}).shape == "star"
    assert another_shape(scene, rng, set()) == scene
