"""Captured loops: the same pictures, captured once per shape and steps, and only where that is faster."""

import numpy as np
import pytest

from latentrt.engines.package import Package
from latentrt.runtime.loop.device.cuda_graphs import Replay
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline

PROMPT = "a red circle on a blue background"
SMALL = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}


def test_a_replayed_loop_draws_the_same(package: Package) -> None:
    device = HostDevice()
    requests: list[dict[str, object]] = [
        {"seed": 1},
        {"seed": 2, "sampler": "ddim"},
        {"seed": 3, "guidance_scale": 2.0},
        {"seed": 1, "num_inference_steps": 5},
    ]
    with device_pipeline(package, device) as (plain, _):
        wanted = [plain(PROMPT, **{**SMALL, **request}).images for request in requests]
    launches = 0
    with device_pipeline(package, device, graphs="on") as (pipe, _):
        for request, images in zip(requests, wanted, strict=True):
            np.testing.assert_array_equal(pipe(PROMPT, **{**SMALL, **request}).images, images)
            # the first is plain; sampler, seed, prompt, guidance and steps are data of the one graph
            assert device.launches == launches
            launches += 5 if request is requests[2] else 3
        *_, last = pipe.stream(PROMPT, **{**SMALL, **requests[0]})
        np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[0][0])


def test_noise_is_replayed_too(package: Package) -> None:
    device = HostDevice()
    with device_pipeline(package, device, graphs="on") as (pipe, _):
        first = pipe(PROMPT, **SMALL, seed=1, sampler="euler_a").images
        pipe(PROMPT, **SMALL, seed=2, sampler="euler_a")
        np.testing.assert_array_equal(pipe(PROMPT, **SMALL, seed=1, sampler="euler_a").images, first)
        assert device.launches == 6


def test_what_cannot_be_captured_runs_plainly_and_says_why(package: Package) -> None:
    device = HostDevice(capturable=False)
    lines: list[str] = []
    with device_pipeline(package, device, graphs="on", log=lines.append) as (pipe, _):
        pictures = [pipe(PROMPT, **SMALL, seed=1).images for _ in range(6)]
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])
    assert device.launches == 0
    assert lines == ["the loop is not captured: the stream cannot be captured"] * 3, "three attempts"


def _runs(graphs: str, seconds: dict[bool, float], count: int) -> list[bool]:
    """Which of `count` runs were replayed, if a graph takes `seconds[True]` and a plain loop the other."""
    device, replay, replayed = HostDevice(), Replay(graphs), []  # pyright: ignore[reportArgumentType]
    for _ in range(count):
        replay.begin(device, lambda: None)
        replay.enqueue(lambda: None)
        replayed.append(replay.replayed)
        replay.record_time(seconds[replay.replayed])
    replay.close()
    replay.close()
    return replayed


@pytest.mark.parametrize(
    ("graphs", "graph_s", "expected"),
    [
        ("auto", 0.5, [False, False, True, True, True, True]),
        ("auto", 1.5, [False, False, True, True, False, False]),
        ("on", 1.5, [False, True, True, True, True, True]),
        ("off", 0.5, [False] * 6),
    ],
)
def test_the_faster_way_is_taken(graphs: str, graph_s: float, expected: list[bool]) -> None:
    assert _runs(graphs, {True: graph_s, False: 1.0}, 6) == expected
