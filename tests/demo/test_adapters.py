"""The adapters that ship, on the shipped model, judged by the automatic checker on held-out scenes."""

from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from latentrt.demo.checker import Verdict, check
from latentrt.demo.lessons import LESSONS, LORAS, SHAPE, Lesson
from latentrt.demo.shapes import Scene
from latentrt.runtime import Pipeline
from latentrt.runtime.model import ADAPTERS, EMBEDDINGS

EVERY = LESSONS.values()
a_few_of_fifty = pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])


FILES = {path.stem: path for folder in (ADAPTERS, EMBEDDINGS) for path in folder["demo"].iterdir()}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as pipe:
        yield pipe


def draw(pipe: Pipeline, scenes: list[Scene], **parameters: Any) -> np.ndarray:
    """(N, 128, 128, 3) uint8."""
    return np.asarray(
        pipe([scene.prompt() for scene in scenes], seed=0, output_type="np", **parameters).images
    )


def judged(pipe: Pipeline, scenes: list[Scene], **parameters: Any) -> list[Verdict]:
    return [check(picture) for picture in draw(pipe, scenes, **parameters)]


def share(lesson: Lesson, verdicts: list[Verdict]) -> float:
    return sum(map(lesson.seen, verdicts)) / len(verdicts)


@pytest.mark.parametrize("lesson", [LESSONS[name] for name in LORAS], ids=lambda lesson: lesson.name)
@a_few_of_fifty
def test_a_lora_draws_what_the_model_cannot(pipe: Pipeline, lesson: Lesson, count: int) -> None:
    scenes = lesson.tests(count)
    without, half, whole = (
        judged(pipe, scenes, loras=[(lesson.name, strength)] if strength else [])
        for strength in (0.0, 0.5, 1.0)
    )
    assert share(lesson, whole) >= 0.9
    assert share(lesson, without) <= 0.02
    ends = sorted(median(map(lesson.amount, verdicts)) for verdicts in (without, whole))
    assert ends[0] < median(map(lesson.amount, half)) < ends[1]


@a_few_of_fifty
def test_both_loras_together_draw_both(pipe: Pipeline, count: int) -> None:
    scenes = [replace(scene, texture="striped") for scene in LESSONS["cross"].tests(count)]
    verdicts = judged(pipe, scenes, loras=[(name, 1.0) for name in LORAS])
    assert all(share(LESSONS[name], verdicts) >= 0.9 for name in LORAS)


def test_one_after_the_other_and_back_is_the_same_to_the_byte(pipe: Pipeline) -> None:
    scenes = LESSONS["cross"].tests(2)
    plain, striped, cross, again, bare = (
        draw(pipe, scenes, loras=loras)
        for loras in ([], [("striped", 1.0)], [("cross", 1.0)], [("striped", 1.0)], [])
    )
    np.testing.assert_array_equal(striped, again)
    np.testing.assert_array_equal(plain, bare)
    assert (striped != cross).any()
    assert (striped != plain).any()


@a_few_of_fifty
def test_an_embedding_draws_a_shape_that_the_model_does_not_know(pipe: Pipeline, count: int) -> None:
    lesson = LESSONS[SHAPE]
    scenes = lesson.tests(count)
    without = judged(pipe, scenes, prompt_syntax="plain")  # to which the files of a folder are no words
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
    file = FILES[lesson.name]
    assert file.stat().st_size < 1_000_000
    assert {str(tensor.dtype) for tensor in load_file(file).values()} == {"float16"}


def test_nothing_else_ships() -> None:
    assert FILES.keys() == LESSONS.keys()
