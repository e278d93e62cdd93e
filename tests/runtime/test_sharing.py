"""Generations that share calls of the UNet: pictures are those of requests alone, failures stay alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt import Pipeline, UsageError
from latentrt.engines.errors import BackendError, CancelledError, LatentrtError
from latentrt.engines.package import Package
from latentrt.engines.spec import Array
from latentrt.runtime.loop import sharing
from latentrt.runtime.loop.calls import Pause
from latentrt.runtime.loop.job import Clock, UNetCall
from latentrt.runtime.loop.sharing import PATIENCE, Ended, Failed, SharedSteps, Yielded
from latentrt.runtime.pipeline import Step
from latentrt.runtime.result import Result
from tests.engines.host_device import HostDevice
from tests.parity_pair import photo
from tests.runtime.device_bench import device_pipeline
from tests.runtime.test_adapters import write

# ── a UNet that is none ────────────────────────────────────────────────────────────────────────────


class FakeUNet:
    """Rows are independent; a row whose latent is 1313 makes the call fail."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, latent: Array, time: Array) -> dict[str, Array]:
        self.calls.append(len(latent))
        if (latent == 1313).any():
            raise BackendError("1313", expected="another number", fix="Pass one.")
        return {"prediction": 3 * latent + time[:, :1] ** 2}


def walk(unet: FakeUNet, start: float, steps: int, rows: int, width: int) -> Generator[Any, None, float]:
    """A generation whose end depends on every answer."""
    state = np.full((rows, width), start) + np.arange(rows)[:, None]
    for step in range(steps):
        call = UNetCall(run=unet, inputs={"latent": state, "time": np.full((rows, 1), step)}, clock=Clock())
        yield call
        state = (state + call.prediction) % 11
        yield step
    yield Pause()
    return float(state.sum())


def alone(*arguments: Any) -> float:
    steps = walk(FakeUNet(), *arguments)
    while True:
        try:
            item = next(steps)
        except StopIteration as end:
            return end.value
        if isinstance(item, UNetCall):
            item.answer(item.run(**item.inputs)["prediction"])


walks = st.tuples(
    st.integers(0, 10).map(float), st.integers(0, 12), st.integers(1, 5), st.sampled_from([1, 2])
)


arrivals_of = st.lists(
    st.tuples(walks, st.integers(0, 20), st.none() | st.integers(0, 20)), min_size=1, max_size=8
)
schedules = given(
    arrivals_of,
    st.integers(1, 9),
    st.sampled_from([(), (4, 8), (9,)]),
    st.lists(st.integers(-1, 1), min_size=8, max_size=8),
)


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_schedule(count: int) -> None:
    """Whoever comes when, and whoever leaves: ends are those of walks alone, and nobody waits too long."""
    settings(max_examples=count, deadline=None)(schedules(check_schedule))()


def check_schedule(
    arrivals: list[tuple[Any, int, int | None]], rows: int, sizes: tuple[int, ...], priorities: list[int]
) -> None:
    unet = FakeUNet()
    shared: SharedSteps[int, float] = SharedSteps(rows, sizes)
    ends, steps, ran = dict[int, float](), dict[int, list[int]](), dict[int, int]()
    left = {number for number, (_, _, leaves) in enumerate(arrivals) if leaves is not None}
    for turn in range(200):
        for number, (arguments, comes, leaves) in enumerate(arrivals):
            if comes == turn:
                shared.add(number, walk(unet, *arguments), priorities[number])
                ran[number] = turn
            if leaves == turn:
                shared.remove(number)
                ran.pop(number, None)
        most = len(shared)
        unet.calls.clear()
        for event in shared.turn():
            assert not isinstance(event, Failed)
            number = int(str(event.name))
            if isinstance(event, Ended):
                ends[number] = event.value
                ran.pop(number, None)
            else:
                steps.setdefault(number, []).append(event.item)
                ran[number] = turn
        assert len(unet.calls) <= 1
        longest = 2 * len(arrivals) + (PATIENCE if any(priorities[: len(arrivals)]) else 0)
        assert all(turn - since <= longest for since in ran.values()), "somebody waits"
        largest = max((arguments[2] for arguments, _, _ in arrivals), default=0)
        assert all(size <= max(rows, largest, *sizes, 0) for size in unet.calls)
        if not most and turn > 20:
            break
    assert not len(shared)
    for number, (arguments, _, _) in enumerate(arrivals):
        if number not in left:
            assert ends[number] == alone(*arguments)
            assert steps.get(number, []) == list(range(arguments[1]))


def test_calls_are_shared_and_filled_up() -> None:
    unet = FakeUNet()
    shared: SharedSteps[int, float] = SharedSteps(6, (4, 8))
    for number, rows in enumerate((1, 2, 2, 3)):
        shared.add(number, walk(unet, number, 1, rows, 2))
    shared.turn()
    assert unet.calls == [8], "five rows, and what fills them up"
    while len(shared):
        shared.turn()
    assert unet.calls == [8, 4]


@pytest.mark.parametrize(
    ("fixed", "each", "wanted"), [(0.0, 1.0, 2), (1000.0, 1.0, 16), (2.0, 10.0, 4), (10.0, 10.0, 16)]
)
def test_as_many_rows_as_gain(
    fixed: float, each: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least number at which a row takes at most 5 % longer than at the best one, up to 16."""
    now = 0.0

    def unet(latent: Array) -> dict[str, Array]:
        nonlocal now
        now += fixed + each * len(latent)
        return {"prediction": latent}

    monkeypatch.setattr(sharing, "perf_counter", lambda: now)
    call = UNetCall(run=unet, inputs={"latent": np.zeros((2, 3))}, clock=Clock())
    assert sharing.rows_that_gain(call) == wanted
    best = min(fixed / rows + each for rows in (2, 4, 8, 16))
    assert fixed / wanted + each <= 1.05 * best


def test_calls_that_are_never_shared_have_their_own_rows() -> None:
    inputs = {"latent": np.zeros((2, 3)), "time": np.zeros((1, 3))}
    call = UNetCall(run=FakeUNet(), inputs=inputs, clock=Clock())
    assert sharing.rows_that_gain(call) == 2


def test_higher_priorities_end_first() -> None:
    """And who must wait for them does not wait longer than its patience."""
    shared: SharedSteps[int, float] = SharedSteps(1)
    order: list[int] = []
    for number, priority in enumerate((0, 1, 5)):
        shared.add(number, walk(FakeUNet(), number, 40, 1, 2), priority)
    turns: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for turn in range(400):
        for event in shared.turn():
            if isinstance(event, Ended):
                order.append(int(str(event.name)))
            else:
                turns[int(str(event.name))].append(turn)
    assert order == [2, 1, 0]
    assert max(np.diff(turns[0])) <= PATIENCE + 2
    assert turns[0][0] > 5 > turns[2][0], "the others come first"


def test_others_have_their_turn_before_a_pause_ends() -> None:
    """A picture of four tiles is decoded between the steps of another."""
    shared: SharedSteps[int, float] = SharedSteps(8)
    unet = FakeUNet()

    def decoding() -> Generator[Any, None, float]:
        yield from walk(unet, 1, 1, 1, 2)
        for _ in range(3):
            yield Pause()
        return 0.0

    shared.add("decoding", decoding())
    shared.add("other", walk(unet, 2, 12, 1, 2))
    steps, events = 0, list[Any]()
    while len(shared) == 2:
        events = shared.turn()
        steps += sum(isinstance(event, Yielded) and event.name == "other" for event in events)
    assert events == [Ended(name="decoding", value=0.0)]
    assert steps == 4, "one with its own step, and one between each two of the four pauses"


def test_a_failure_is_its_own() -> None:
    """Whoever shares a call with it goes on; what the failing one raises is told."""
    shared: SharedSteps[int, float] = SharedSteps(8)
    unet, closed = FakeUNet(), list[str]()

    def failing() -> Generator[Any, None, float]:
        try:
            yield from walk(unet, 1313, 3, 1, 2)
        finally:
            closed.append("failing")
        return 0.0

    shared.add("good", walk(unet, 2, 3, 2, 2))
    shared.add("bad", failing())
    shared.add("other", walk(unet, 5, 3, 1, 2))
    events = [event for _ in range(9) for event in shared.turn()]
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.name == "bad"
    assert isinstance(failed.error, BackendError)
    assert closed == ["failing"]
    ends = {event.name: event.value for event in events if isinstance(event, Ended)}
    assert ends == {"good": alone(2, 3, 2, 2), "other": alone(5, 3, 1, 2)}


def test_what_is_left_is_closed() -> None:
    closed = list[int]()

    def waiting(number: int) -> Generator[Any, None, float]:
        try:
            yield from walk(FakeUNet(), 1, 100, 1, 2)
        finally:
            closed.append(number)
        return 0.0

    shared: SharedSteps[int, float] = SharedSteps(8)
    for number in range(3):
        shared.add(number, waiting(number))
    shared.turn()
    shared.remove(1)
    shared.remove("nobody")
    assert closed == [1]
    shared.close()
    assert sorted(closed) == [0, 1, 2]


def test_a_call_without_an_answer() -> None:
    steps = walk(FakeUNet(), 1, 2, 1, 2)
    next(steps)
    with pytest.raises(UsageError, match="goes on before its call of the UNet was answered"):
        next(steps)


# ── pictures ───────────────────────────────────────────────────────────────────────────────────────

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "output_type": "np"}


def half() -> Image.Image:
    return Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32))))


REQUESTS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "sampler": "dpmpp_2m", "num_inference_steps": 4, "seed": 1},
    {"prompt": "a star", "sampler": "euler_a", "num_inference_steps": 7, "seed": 2, "guidance_scale": 3.0},
    {"prompt": PROMPT, "sampler": "ddim", "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 3},
    {"prompt": ["a ring", "a heart"], "negative_prompt": "blue", "num_inference_steps": 2, "seed": [4, 5]},
    {"prompt": "a star", "sampler": "unipc", "num_inference_steps": 5, "guidance_rescale": 0.7, "seed": 6},
    {"prompt": "a star", "image": photo(64, 64), "strength": 0.6, "num_inference_steps": 5, "seed": 7},
    {"prompt": "a", "image": photo(64, 64), "mask_image": half(), "num_inference_steps": 3, "seed": 8},
    {"prompt": PROMPT, "num_inference_steps": 3, "seed": 9, "loras": ["loop"]},
    {"prompt": PROMPT, "num_inference_steps": 2, "seed": 9, "width": 96},
    {"prompt": PROMPT, "num_inference_steps": 2, "seed": 9, "width": 128, "draw_tile": 64},
    {"prompt": "", "num_inference_steps": 2, "seed": 9, "output_type": "latent", "loras": ["loop"]},
]


@pytest.fixture(scope="module")
def pipe(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    loras: Path = tmp_path_factory.mktemp("loras")
    write(loras / "loop.safetensors", "loop")
    with Pipeline.open(package.root, backend="onnxruntime", loras=loras) as opened:
        yield opened


def test_pictures_are_those_of_requests_alone(pipe: Pipeline) -> None:
    requests = [{**SMALL, **request} for request in REQUESTS]
    wanted = [pipe(**request).images for request in requests]
    for rows, at_once in ((8, 11), (5, 3), (1, 4)):
        results: dict[int, Array] = {}
        steps: dict[int, int] = {}
        for number, item in pipe.stream_many(iter(requests), rows=rows, at_once=at_once):
            if isinstance(item, Step):
                steps[number] = steps.get(number, 0) + 1
            else:
                assert isinstance(item, Result), item
                results[number] = item.images
                assert item.seconds["unet"] > 0
        assert len(results) == len(requests)
        for number, images in enumerate(wanted):
            np.testing.assert_array_equal(results[number], images, err_msg=str(number))
        assert steps[0] == 4


def test_what_fails_says_so_and_leaves_the_others(pipe: Pipeline) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPT, "num_inference_steps": 2, **SMALL},
        {"prompt": PROMPT, "num_inference_steps": 0, **SMALL},
        {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1e38, **SMALL},
        {"num_inference_steps": 1, "seed": 1, **SMALL, "output_type": "pil"},
    ]
    found: dict[int, Any] = {}
    for number, item in pipe.stream_many(requests):
        found[number] = item
    assert isinstance(found[0], Result)
    assert isinstance(found[1], UsageError)
    assert isinstance(found[2], LatentrtError)
    assert isinstance(found[3].images[0], Image.Image)


def test_tiles_are_decoded_in_turns(pipe: Pipeline) -> None:
    """Between two tiles another request has a step; both pictures are those of requests alone."""
    tiled = {**SMALL, "prompt": PROMPT, "num_inference_steps": 1, "seed": 1, "width": 160, "tile": 64}
    other = {**SMALL, "prompt": PROMPT, "num_inference_steps": 9, "seed": 2}
    shared: SharedSteps[Step, Result[Any]] = SharedSteps(8)
    shared.add("tiled", pipe.shared(tiled))
    shared.add("other", pipe.shared(other))
    found: dict[Any, Result[Any]] = {}
    between = 0
    while len(shared):
        for event in shared.turn():
            assert not isinstance(event, Failed), event
            if isinstance(event, Ended):
                found[event.name] = event.value
            elif event.name == "other" and "tiled" not in found:
                between += 1
    assert between == 2, "one between each two of three tiles"
    assert found["tiled"].seconds["vae_decoder"] > 0
    for name, request in (("tiled", tiled), ("other", other)):
        np.testing.assert_array_equal(found[name].images, pipe(**request).images)


@pytest.mark.parametrize("masked", [False, True])
def test_tiles_are_encoded_in_turns(pipe: Pipeline, masked: bool) -> None:
    """Before each tile another request has a step, so that a large start picture holds nobody up for long."""
    start: dict[str, Any] = {"image": photo(64, 160), "strength": 0.5}
    if masked:
        start["mask_image"] = Image.fromarray(np.pad(np.full((64, 80), 255, np.uint8), ((0, 0), (0, 80))))
    wide = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "seed": 1,
        **start,
        "tile": 64,
        "output_type": "latent",
    }
    other = {**SMALL, "prompt": PROMPT, "num_inference_steps": 12, "seed": 2}
    shared: SharedSteps[Step, Result[Any]] = SharedSteps(2)
    shared.add("other", pipe.shared(other))
    shared.turn()
    shared.add("wide", pipe.shared(wide))
    found: dict[Any, Result[Any]] = {}
    seen: list[Any] = []
    while len(shared):
        for event in shared.turn():
            assert not isinstance(event, Failed), event
            if isinstance(event, Ended):
                found[event.name] = event.value
            else:
                seen.append(event.name)
    assert seen.index("wide") >= 3, "one before each of the three tiles"
    assert found["wide"].seconds["vae_encoder"] > 0
    np.testing.assert_array_equal(found["wide"].images, pipe(**wide).images)
    np.testing.assert_array_equal(found["other"].images, pipe(**other).images)


def test_one_is_cancelled_and_one_has_no_time_left(pipe: Pipeline) -> None:
    cancel = Event()
    request = {**SMALL, "prompt": PROMPT, "num_inference_steps": 4, "seed": 1}
    shared: SharedSteps[Step, Result[Any]] = SharedSteps(8)
    shared.add("cancelled", pipe.shared(request, cancel=cancel))
    shared.add("late", pipe.shared(request, timeout=1e-9))
    shared.add("drawn", pipe.shared(request))
    first = shared.turn()
    cancel.set()
    events = [*first, *(event for _ in range(9) for event in shared.turn())]
    ends = {event.name: event for event in events if not isinstance(event, Yielded)}
    assert "the time limit of 1e-09 s was over before step 1 of 4" in str(ends["late"].error)  # pyright: ignore
    assert isinstance(ends["cancelled"], Failed)
    assert isinstance(ends["cancelled"].error, CancelledError)
    steps = [event.name for event in events if isinstance(event, Yielded)]
    assert steps.count("cancelled") == 1
    assert steps.count("drawn") == 4


def test_what_is_no_error_of_ours_leaves_the_others_too(pipe: Pipeline) -> None:
    """A request that is none, and a picture whose own code fails."""

    class Broken(Image.Image):
        def load(self) -> Any:
            raise ZeroDivisionError

    good = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1, **SMALL}
    picture = Broken()
    picture._size = (64, 64)
    found = dict(pipe.stream_many([good, None, {**good, "image": picture}, good]))  # pyright: ignore[reportArgumentType]
    assert isinstance(found[1], TypeError)
    assert isinstance(found[2], Exception)
    np.testing.assert_array_equal(found[0].images, found[3].images)  # pyright: ignore[reportAttributeAccessIssue]


def test_requests_are_taken_as_there_is_room(pipe: Pipeline) -> None:
    taken: list[int] = []

    def requests() -> Iterator[dict[str, Any]]:
        for number in range(6):
            taken.append(number)
            yield {"prompt": PROMPT, "num_inference_steps": 3, "seed": number, **SMALL}

    steps = pipe.stream_many(requests(), at_once=2)
    next(steps)
    assert taken == [0, 1]
    steps.close()
    assert taken == [0, 1]


def test_a_device_draws_the_same(package: Package, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [{**SMALL, **request} for request in REQUESTS[:4]]
    told: set[tuple[int, ...]] = set()
    plain = sharing.together
    monkeypatch.setattr(
        sharing, "together", lambda calls, sizes: (told.add(tuple(sizes)), plain(calls, sizes))[1]
    )
    with device_pipeline(package, HostDevice()) as (on_device, _):
        assert on_device.row_sizes(8) == (1, 2, 4, 8)
        assert on_device.row_sizes(6) == (1, 2, 4, 6)
        assert on_device.row_sizes(1) == (1,)
        assert pipe.row_sizes(8) == ()
        found = dict(on_device.stream_many(requests))
        for number, request in enumerate(requests):
            images = found[number].images  # pyright: ignore[reportAttributeAccessIssue]
            assert np.abs(images.astype(int) - pipe(**request).images).max() <= 1
    assert told == {(1, 2, 4, 8)}


def test_every_call_may_have_all_rows(package: Package) -> None:
    """Then the net of a device sees one number of rows, whatever is drawn side by side."""
    requests = [{**SMALL, **request} for request in REQUESTS[:3]]
    with device_pipeline(package, HostDevice()) as (on_device, loop):
        run, seen = loop._run_unet, set[int]()

        def counted(**inputs: Array) -> dict[str, Array]:
            seen.add(len(inputs["latent"]))
            return run(**inputs)

        loop._run_unet = counted  # pyright: ignore[reportAttributeAccessIssue]
        found: Any = dict(on_device.stream_many(requests, rows=8, sizes=(8,)))
        assert seen == {8}
        for number, request in enumerate(requests):
            by_itself: Any = dict(on_device.stream_many([request], sizes=(8,)))
            np.testing.assert_array_equal(found[number].images, by_itself[0].images)
        assert seen == {8}


def test_events_have_names() -> None:
    shared: SharedSteps[int, float] = SharedSteps(8)
    shared.add("one", walk(FakeUNet(), 1, 1, 1, 2))
    assert shared.turn() == [Yielded(name="one", item=0)], "and then it pauses"
    assert shared.turn() == [Ended(name="one", value=alone(1, 1, 1, 2))]
