"""The adapters that ship, on the shipped model, judged by the automatic checker on held-out scenes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from latentrt.demo.checker import Verdict, check
from latentrt.demo.evaluate_adapters import ADAPTERS
from latentrt.demo.lessons import LESSONS, LORAS, SHAPE, Lesson
from latentrt.demo.shapes import Scene
from latentrt.runtime import Pipeline

EVERY = LESSONS.values()
needs_loras = pytest.mark.skipif(
    not hasattr(Pipeline, "load_lora_weights"), reason="this runtime does not apply adapters yet"
)
needs_embeddings = pytest.mark.skipif(
    not hasattr(Pipeline, "load_textual_inversion"), reason="this runtime reads no embeddings yet"
)
a_few_of_fifty = pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as pipe:
        yield pipe


@pytest.fixture
def adapted(pipe: Pipeline) -> Pipeline:
    """With both LoRAs loaded; nothing is drawn with them before they are chosen."""
    load: Any = pipe
    for name in LORAS:
        load.load_lora_weights(file_of(name))
    return pipe


def file_of(name: str) -> Path:
    return ADAPTERS / f"{name}.safetensors"


def draw(pipe: Pipeline, scenes: list[Scene], **parameters: Any) -> np.ndarray:
    """(N, 128, 128, 3) uint8."""
    return np.asarray(
        pipe([scene.prompt() for scene in scenes], seed=0, output_type="np", **parameters).images
    )


def judged(pipe: Pipeline, scenes: list[Scene], **parameters: Any) -> list[Verdict]:
    return [check(picture) for picture in draw(pipe, scenes, **parameters)]


def share(lesson: Lesson, verdicts: list[Verdict]) -> float:
    return sum(map(lesson.seen, verdicts)) / len(verdicts)


@needs_loras
@pytest.mark.parametrize("lesson", [LESSONS[name] for name in LORAS], ids=lambda lesson: lesson.name)
@a_few_of_fifty
def test_a_lora_draws_what_the_model_cannot(adapted: Pipeline, lesson: Lesson, count: int) -> None:
    scenes = lesson.tests(count)
    without, half, whole = (
        judged(adapted, scenes, loras=[(lesson.name, strength)] if strength else [])
        for strength in (0.0, 0.5, 1.0)
    )
    assert share(lesson, whole) >= 0.9
    assert share(lesson, without) <= 0.02
    ends = sorted(median(map(lesson.amount, verdicts)) for verdicts in (without, whole))
    assert ends[0] < median(map(lesson.amount, half)) < ends[1]


@needs_loras
@a_few_of_fifty
def test_both_loras_together_draw_both(adapted: Pipeline, count: int) -> None:
    scenes = [replace(scene, texture="striped") for scene in LESSONS["teal"].tests(count)]
    verdicts = judged(adapted, scenes, loras=[(name, 1.0) for name in LORAS])
    assert all(share(LESSONS[name], verdicts) >= 0.9 for name in LORAS)


@needs_loras
def test_one_after_the_other_and_back_is_the_same_to_the_byte(adapted: Pipeline) -> None:
    scenes = LESSONS["teal"].tests(2)
    plain, striped, teal, again, bare = (
        draw(adapted, scenes, loras=loras)
        for loras in ([], [("striped", 1.0)], [("teal", 1.0)], [("striped", 1.0)], [])
    )
    np.testing.assert_array_equal(striped, again)
    np.testing.assert_array_equal(plain, bare)
    assert (striped != teal).any()
    assert (striped != plain).any()


@needs_embeddings
@a_few_of_fifty
def test_an_embedding_draws_a_shape_that_the_model_does_not_know(pipe: Pipeline, count: int) -> None:
    lesson = LESSONS[SHAPE]
    scenes = lesson.tests(count)
    without = judged(pipe, scenes)
    load: Any = pipe
    load.load_textual_inversion(file_of(lesson.name))
    assert share(lesson, judged(pipe, scenes)) >= 0.9
    assert share(lesson, without) <= 0.02


@pytest.mark.parametrize("lesson", EVERY, ids=lambda lesson: lesson.name)
def test_what_is_judged_was_never_trained_on(lesson: Lesson) -> None:
    training = lesson.training()
    assert not set(training) & set(lesson.held_out)
    assert {*training, *lesson.held_out} == set(lesson.combos)
    tests = lesson.tests(50)
    assert {(scene.colour, scene.shape, scene.background) for scene in tests} <= set(lesson.held_out)
    assert {scene.size for scene in tests} == set(lesson.sizes)
    assert all(scene.texture == lesson.texture for scene in tests)


@pytest.mark.parametrize("lesson", EVERY, ids=lambda lesson: lesson.name)
def test_they_are_small_and_in_half_precision(lesson: Lesson) -> None:
    assert file_of(lesson.name).stat().st_size < 1_000_000
    assert {str(tensor.dtype) for tensor in load_file(file_of(lesson.name)).values()} == {"float16"}
