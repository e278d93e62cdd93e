"""Numbers of controls may be Python's or NumPy's; what is no number is refused before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt import Control, ImagePrompt, Pipeline
from latentrt.engines.errors import UsageError
from tests.serve.live import open_demo

EDGES = np.zeros((64, 64, 3), np.uint8)
EDGES[16:48, 16:48] = 255
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        opened.load_control("edges")
        opened.load_control("likeness")
        yield opened


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control", "guess"])
@pytest.mark.parametrize("one", [1, np.float32(1), np.float64(1), np.int64(1)])
def test_kinds_of_numbers(pipe: Pipeline, mode: Any, one: Any) -> None:
    plain = Control(model="edges", image=EDGES, mode=mode)
    wanted = pipe("a red circle", controls=[plain], **SMALL).images
    other = replace(plain, strength=one, start=type(one)(0), end=one)
    np.testing.assert_array_equal(pipe("a red circle", controls=[other], **SMALL).images, wanted)


def test_kinds_of_numbers_of_an_image_prompt(pipe: Pipeline) -> None:
    plain = ImagePrompt(model="likeness", image=EDGES)
    wanted = pipe("a red circle", controls=[plain], **SMALL).images
    other = replace(plain, strength=np.float32(1), end=np.float64(1))
    np.testing.assert_array_equal(pipe("a red circle", controls=[other], **SMALL).images, wanted)


ODD: list[tuple[Any, str]] = [
    (Control(model="edges", image=EDGES, strength=10**400), "control_strength"),
    (Control(model="edges", image=EDGES, start=10**400), "control_start"),
    (Control(model="edges", image=EDGES, preparation=["canny"]), "control_preparation"),  # pyright: ignore[reportArgumentType]
    (Control(model="edges", image=EDGES, resize_mode=["pad"]), "control_resize_mode"),  # pyright: ignore[reportArgumentType]
    (Control(model="edges", image=EDGES, settings=None), "settings"),  # pyright: ignore[reportArgumentType]
    (ImagePrompt(model="likeness", image=EDGES, strength=[1]), "ip_adapter_strength"),  # pyright: ignore[reportArgumentType]
    (ImagePrompt(model="likeness", image=EDGES, strength=[]), "ip_adapter_strength"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("control", "words"), ODD)
def test_what_is_no_number_or_name(pipe: Pipeline, control: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pipe("a red circle", controls=[control], **SMALL)
