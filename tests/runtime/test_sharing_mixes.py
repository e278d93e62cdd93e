"""Requests of every kind, at random: what is drawn side by side is what each draws alone, to the byte.

On a device a request alone has its numbers put together there, and one that shares calls on the host: those
two differ in rounding. What a server draws always goes the second way, and there it is the same to the byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import Control, Pipeline, Result
from latentrt.runtime.loop.sharing import Ended, Failed, SharedSteps
from latentrt.runtime.pipeline import Step
from latentrt.runtime.sampling.samplers import SAMPLERS
from tests.engines.host_device import HostDevice
from tests.parity_pair import photo
from tests.runtime.device_bench import device_pipeline

DEMO = Path(__file__).parents[2] / "demo"
PROMPTS = ("a red circle on a blue background", "a green star", "", "a cross <lora:cross:0.7>", "(ring:1.3)")
SIZES = ((64, 64), (64, 96), (96, 64), (128, 128))
LORAS: tuple[list[Any] | None, ...] = (None, None, ["striped"], [("striped", 0.5), ("cross", -0.4)])


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(backend="onnxruntime", device="cpu") as opened:
        opened.load_control("edges")
        yield opened


@pytest.fixture(scope="module")
def on_device(pipe: Pipeline) -> Iterator[Pipeline]:
    with device_pipeline(pipe.package, HostDevice(), loras=DEMO / "adapters") as (opened, _):
        opened.load_control(DEMO / "controls" / "edges")
        yield opened


def a_request(chance: random.Random, most_steps: int) -> dict[str, Any]:
    """One of any kind that the shipped model draws."""
    height, width = chance.choice(SIZES)
    request: dict[str, Any] = {
        "prompt": chance.choice(PROMPTS),
        "sampler": chance.choice(sorted(SAMPLERS)),
        "num_inference_steps": chance.randint(1, most_steps),
        "guidance_scale": chance.choice((1.0, 3.0, 7.5)),
        "seed": chance.randrange(1000),
        "height": height,
        "width": width,
    }
    if chance.random() < 0.3:
        request["guidance_rescale"] = 0.7
    if chance.random() < 0.3 and request["num_inference_steps"] > 4:  # some call is in the interval
        request["guidance_interval"] = chance.choice(((0.0, 0.5), (0.3, 1.0)))
    if chance.random() < 0.3:
        request["num_images_per_prompt"] = 2
    if chance.random() < 0.3:
        request["negative_prompt"] = "a blue background"
    if chance.random() < 0.2:
        request["tile"] = 64
    if chance.random() < 0.4:
        request |= {"image": photo(height, width), "strength": chance.choice((0.5, 0.9))}
        request["num_inference_steps"] = max(2, request["num_inference_steps"])  # of which half are left
        if chance.random() < 0.5:
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2] = 255
            request["mask_image"] = Image.fromarray(mask)
    request["loras"] = chance.choice(LORAS)
    if chance.random() < 0.3:
        hint = Image.fromarray(np.asarray(photo(height, width)))
        request["controls"] = [Control(model="edges", image=hint, preparation="canny")]
    return request


def side_by_side(pipe: Pipeline, requests: list[dict[str, Any]], chance: random.Random) -> dict[int, Any]:
    """What came of each: some arrive later, and some are cancelled, which are left out."""
    rows = chance.choice((1, 2, 5, 8))
    sizes = chance.choice((pipe.row_sizes(rows), (rows,)))  # as the pipeline has them, or always all
    shared: SharedSteps[Step, Result[Any]] = SharedSteps(rows, sizes)
    waiting = list(enumerate(requests))
    found: dict[int, Any] = {}
    leaves = {number for number in range(len(requests)) if chance.random() < 0.1}
    while waiting or len(shared):
        if waiting and (not len(shared) or chance.random() < 0.3):
            number, request = waiting.pop(0)
            shared.add(number, pipe.shared(request), chance.choice((0, 0, 1)))
        for event in shared.turn():
            if isinstance(event, Ended):
                found[int(str(event.name))] = event.value
            elif isinstance(event, Failed):
                found[int(str(event.name))] = event.error
        for number in tuple(leaves):
            if chance.random() < 0.05:
                shared.remove(number)
                leaves.discard(number)
    return found


def alone(pipe: Pipeline, request: dict[str, Any]) -> Result[Any]:
    return pipe(**request)


def alone_in_shared_steps(pipe: Pipeline, request: dict[str, Any]) -> Result[Any]:
    *_, (_, result) = pipe.stream_many([request])
    assert isinstance(result, Result), result
    return result


def check(
    pipe: Pipeline,
    seed: int,
    most_steps: int,
    by_itself: Callable[[Pipeline, dict[str, Any]], Result[Any]] = alone,
    differ: int = 0,
) -> int:
    """How many pictures of a mix were compared; `differ` is by how much a byte may."""
    chance = random.Random(seed)
    requests = [a_request(chance, most_steps) for _ in range(chance.randint(2, 6))]
    compared = 0
    for number, result in side_by_side(pipe, requests, chance).items():
        assert isinstance(result, Result), (seed, number, result)
        wanted = by_itself(pipe, requests[number])
        for ours, theirs in zip(result.images, wanted.images, strict=True):
            most = np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max()
            assert most <= differ, (seed, number, most)
            compared += 1
    return compared


def test_some_mixes(pipe: Pipeline) -> None:
    assert sum(check(pipe, seed, 8) for seed in range(8)) > 20


def test_some_mixes_on_a_device(on_device: Pipeline) -> None:
    assert sum(check(on_device, seed, 4, alone_in_shared_steps) for seed in range(4)) > 10
    assert sum(check(on_device, seed, 4, alone, differ=1) for seed in range(4)) > 10


@pytest.mark.slow
def test_two_hundred_mixes(pipe: Pipeline) -> None:
    assert sum(check(pipe, seed, 50) for seed in range(100, 300)) > 600


@pytest.mark.slow
def test_two_hundred_mixes_on_a_device(on_device: Pipeline) -> None:
    assert sum(check(on_device, seed, 50, alone_in_shared_steps) for seed in range(100, 300)) > 600
