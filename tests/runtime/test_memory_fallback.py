"""Out of memory: each fallback for real on a device of limited memory, or with injected failures."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.engines.backend import MemoryLedger
from latentrt.engines.device import Addresses, BoundNet, DeviceNet, Shapes
from latentrt.engines.errors import BackendError, MemoryLimitError
from latentrt.engines.package import Package
from latentrt.engines.spec import NetSpec
from latentrt.runtime.loop.device.memory_fallback import MemoryNeed, MemoryPlan, equal_rows, fit_in_memory
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline

PROMPT = "a red circle on a blue background"


@dataclass
class FakeActions:
    idle: int = 0
    streamable: int = 0
    done: list[str] = field(default_factory=list)

    def free_idle(self) -> bool:
        self.done.append("free")
        had, self.idle = self.idle, 0
        return had > 0

    def stream_weights(self) -> int:
        self.done.append("stream")
        had, self.streamable = self.streamable, 0
        return had

    def describe_memory(self) -> str:
        return "1 MiB of 2 free"


def _needing(fits: Callable[[MemoryPlan], bool], culprit: str | None) -> Callable[[MemoryPlan], MemoryPlan]:
    def attempt(plan: MemoryPlan) -> MemoryPlan:
        if not fits(plan):
            raise MemoryLimitError("9 bytes asked", expected="less", fix="", culprit=culprit)
        return plan

    return attempt


FOUR = MemoryNeed(batch=8, guided=True, pictures=4, height=1024, width=768)


def test_fallbacks_in_order_until_it_is_refused_with_the_numbers() -> None:
    lines: list[str] = []
    actions = FakeActions(idle=1, streamable=1)
    with pytest.raises(MemoryLimitError, match=r"4 x 768x1024.*1 MiB of 2 free; tried: free idle") as caught:
        fit_in_memory(_needing(lambda plan: False, None), MemoryPlan(), FOUR, actions, lines.append)
    fallbacks = [line.partition(": ")[2].partition(" -> ")[0] for line in lines]
    assert fallbacks == [
        "free idle contexts",
        *["tile the decoder"] * 3,  # picture by picture, 512, 256
        *["split the batch"] * 2,  # 4, 2
        "run the CFG halves apart",
        "stream weights",
    ]
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("culprit", "fits", "expected"),
    [
        ("unet", lambda plan: plan.rows == 1, MemoryPlan(rows=1)),
        ("vae_decoder", lambda plan: plan.tile == 256, MemoryPlan(decoder_pictures=1, tile=256)),
        (None, lambda plan: plan.decoder_pictures == 1, MemoryPlan(decoder_pictures=1)),
        ("unet", lambda plan: True, MemoryPlan()),
    ],
)
def test_only_what_helps_is_given_up(
    culprit: str | None, fits: Callable[[MemoryPlan], bool], expected: MemoryPlan
) -> None:
    _, plan = fit_in_memory(_needing(fits, culprit), MemoryPlan(), FOUR, FakeActions(), lambda line: None)
    assert plan == expected


def test_tiles_that_were_asked_for_become_smaller_than_the_picture() -> None:
    lines: list[str] = []
    need = MemoryNeed(pictures=1, height=512, width=384, tile=1024)
    fits = _needing(lambda plan: plan.tile == 256, "vae_decoder")
    _, plan = fit_in_memory(fits, need.start, need, FakeActions(), lines.append)
    assert plan == MemoryPlan(decoder_pictures=1, tile=256)
    assert len(lines) == 1


def test_other_errors_pass_through() -> None:
    def attempt(plan: MemoryPlan) -> None:
        raise BackendError("lost", expected="a device", fix="")

    with pytest.raises(BackendError, match="lost"):
        fit_in_memory(attempt, MemoryPlan(), FOUR, FakeActions(idle=1), lambda line: None)


def test_nothing_that_failed_is_kept_when_it_has_fitted() -> None:
    failed: list[weakref.ref[MemoryPlan]] = []

    def attempt(plan: MemoryPlan) -> None:
        held = MemoryPlan(rows=plan.rows)
        failed.append(weakref.ref(held))
        if plan.rows is None:
            raise MemoryLimitError("9 bytes asked", expected="less", fix="", culprit="unet")

    gc.disable()  # else it might come by and find the circle of a frame and its exception
    try:
        fit_in_memory(attempt, MemoryPlan(), FOUR, FakeActions(), lambda line: None)
        assert len(failed) == 2
        assert [held() for held in failed] == [None, None]
    finally:
        gc.enable()


class Hungry:
    """A net on host memory that claims scratch as a library does: so many bytes per input element."""

    graphs_outlive_other_shapes = True

    def __init__(self, net: DeviceNet, per_element: int) -> None:
        self.net, self.per_element, self.streamed = net, per_element, 0

    @property
    def spec(self) -> NetSpec:
        return self.net.spec

    @property
    def memory(self) -> MemoryLedger:
        return self.net.memory

    def scratch(self, shapes: Shapes) -> int:
        return self.per_element * int(np.prod(shapes["latent"]))

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundNet:
        assert scratch, "no block of activations"
        return self.net.bind(shapes, addresses, scratch)

    def stream_weights(self) -> int:
        self.streamed += 1
        return 0

    def settle(self) -> None:
        self.net.settle()

    def release(self) -> None:
        self.net.release()

    def close(self) -> None:
        self.net.close()


def _draw(
    package: Package,
    limit: int,
    hungry: dict[str, int],
    requests: list[dict[str, object]],
) -> tuple[list[np.ndarray], list[str], int]:
    device, lines = HostDevice(limit), list[str]()
    wrap = lambda name, net: Hungry(net, hungry[name]) if name in hungry else net  # noqa: E731
    with device_pipeline(package, device, wrap=wrap, log=lines.append) as (pipe, _):
        images = [pipe(PROMPT, output_type="np", num_inference_steps=2, seed=1, **r).images for r in requests]
    return images, [line.partition(": ")[2].partition(" -> ")[0] for line in lines], device.peak


def test_the_unets_rows_are_split_and_the_picture_stays(package: Package) -> None:
    request = {"num_images_per_prompt": 2, "height": 64, "width": 64}
    hungry = {"unet": 16_000}  # 16 MB for 4 rows of 4x8x8
    (wanted,), none, peak = _draw(package, 2**40, hungry, [request])
    assert none == []
    (images,), fallbacks, low = _draw(package, peak - 7_000_000, hungry, [request])
    assert fallbacks == ["split the batch"]
    assert low < peak
    assert np.abs(images.astype(int) - wanted).max() <= 1
    (images, again), fallbacks, _ = _draw(package, peak - 12_000_000, hungry, [request, request])
    assert fallbacks == ["split the batch", "run the CFG halves apart"], (
        "and the second picture gives up nothing more"
    )
    assert np.abs(images.astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(images, again)


def test_a_decoder_that_holds_the_shared_block_gives_way_to_the_unet(package: Package) -> None:
    request = {"num_images_per_prompt": 2, "height": 64, "width": 64}
    hungry = {"unet": 8_000, "vae_decoder": 16_000}  # 8 MB for 4 rows, and for 2 pictures
    (wanted,), _, peak = _draw(package, 2**40, hungry, [request])
    # the block fits, and beside it the UNet's buffers do not, however few its rows
    (images,), fallbacks, _ = _draw(package, peak - 600_000, hungry, [request])
    assert fallbacks == [
        "free idle contexts",
        "split the batch",
        "run the CFG halves apart",
        "tile the decoder",
    ]
    assert np.abs(images.astype(int) - wanted).max() <= 1


def test_the_decoder_is_tiled(package: Package) -> None:
    request = {"height": 320, "width": 320, "guidance_scale": 1.0}
    hungry = {"vae_decoder": 1_000}  # 6.4 MB for 4x40x40, 4.1 for the smallest tile
    (wanted,), none, peak = _draw(package, 2**40, hungry, [request])
    assert none == []
    (images,), fallbacks, _ = _draw(package, peak - 1_500_000, hungry, [request])
    assert fallbacks == ["tile the decoder"]
    error = np.mean((images.astype(float) - wanted) ** 2)
    assert images.shape == wanted.shape
    assert error < 40**2, "the same picture, up to what tiles cannot see of each other"


def test_idle_contexts_go_first(package: Package) -> None:
    sizes: list[dict[str, object]] = [
        {"height": 64, "width": 64 + 8 * n, "guidance_scale": 1.0} for n in range(4)
    ]
    _, none, peak = _draw(package, 2**40, {}, sizes)
    _, _, alone = _draw(package, 2**40, {}, sizes[-1:])
    assert none == []
    assert alone < peak
    _, fallbacks, _ = _draw(package, alone + 1000, {}, sizes)
    assert set(fallbacks) == {"free idle contexts"}


def test_refused_with_the_numbers(package: Package) -> None:
    with pytest.raises(MemoryLimitError, match=r"1 x 64x64 does not fit.*MiB of .* free on host memory"):
        _draw(package, 300_000, {}, [{"height": 64, "width": 64}])


@pytest.mark.parametrize(
    ("batch", "most", "rows"), [(10, 3, 2), (8, 8, 8), (8, 4, 4), (6, 4, 3), (7, 4, 1), (2, 1, 1), (4, 9, 4)]
)
def test_calls_of_a_split_batch_are_equal(batch: int, most: int, rows: int) -> None:
    """10 rows of which 3 fit are not 3, 3, 3 and 1: a convolution remembers one shape."""
    assert equal_rows(batch, most) == rows


def test_memory_that_runs_out_in_a_stream(package: Package) -> None:
    lines: list[str] = []
    wrap = lambda name, net: Hungry(net, 16_000) if name == "unet" else net  # noqa: E731
    with device_pipeline(package, HostDevice(22_000_000), wrap=wrap, log=lines.append) as (pipe, _):
        parameters = {"height": 64, "width": 64, "num_images_per_prompt": 4, "num_inference_steps": 2}
        *_, last = pipe.stream(PROMPT, seed=1, **parameters)
        assert np.isfinite(last.latent).all()
    assert "split the batch" in lines[0]


def test_memory_that_runs_out_in_the_first_row_of_a_stream(package: Package) -> None:
    """Where a library allocates by itself, that is when it does."""

    class Allocating(Hungry):
        def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
            bound = self.net.bind(shapes, addresses, scratch)

            def enqueue() -> None:
                if shapes["latent"][0] > 2:
                    raise MemoryLimitError("the arena cannot grow", expected="", fix="", culprit="unet")
                bound.enqueue()

            return SimpleNamespace(enqueue=enqueue, close=bound.close, capturable=True, profile="")

        def scratch(self, shapes: Shapes) -> int:
            return 0

    lines: list[str] = []
    wrap = lambda name, net: Allocating(net, 0) if name == "unet" else net  # noqa: E731
    parameters = {"height": 64, "width": 64, "num_images_per_prompt": 4, "num_inference_steps": 2}
    with device_pipeline(package, HostDevice(), wrap=wrap, log=lines.append) as (pipe, loop):
        *_, last = pipe.stream(PROMPT, seed=1, **parameters)
        assert np.isfinite(last.latent).all()
        assert not loop.pool.in_use
    assert {line.partition(": ")[0] for line in lines} == {"out of memory (the arena cannot grow)"}
    assert "rows=2" in lines[-1]


def test_a_pipeline_that_is_closed_in_the_middle_of_a_stream(package: Package) -> None:
    with device_pipeline(package, HostDevice()) as (pipe, _):
        steps = pipe.stream(PROMPT, height=64, width=64, num_inference_steps=3)
        next(steps)
        pipe.close()
        with pytest.raises(BackendError, match="closed while a picture was drawn"):
            next(steps)


def test_memory_that_comes_back_is_used_again(package: Package) -> None:
    device, lines = HostDevice(), list[str]()
    wrap = lambda name, net: Hungry(net, 16_000) if name == "unet" else net  # noqa: E731
    with device_pipeline(package, device, wrap=wrap, log=lines.append) as (pipe, loop):
        request = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 1, "output_type": "latent"}
        pipe(PROMPT, **request)
        loop.free_idle()
        device.limit = device.peak - 1_000_000
        pipe(PROMPT, **request)
        assert [line.partition(": ")[2].partition(" -> ")[0] for line in lines] == [
            "run the CFG halves apart"
        ]
        device.limit = 2**40
        for _ in range(32):
            assert [plan.plan for plan in loop._plans.values()] == [MemoryPlan(rows=1)]
            pipe(PROMPT, **request)
        pipe(PROMPT, **request)
        assert not loop._plans, "all at once again"
    assert len(lines) == 1


def test_weights_are_not_streamed_under_an_open_request(package: Package) -> None:
    nets: list[Hungry] = []

    def wrap(name: str, net: DeviceNet) -> DeviceNet:
        nets.append(Hungry(net, 16))
        return nets[-1] if name == "unet" else net

    with device_pipeline(package, HostDevice(), wrap=wrap) as (pipe, loop):
        steps = pipe.stream(PROMPT, num_inference_steps=2, seed=1)
        next(steps)
        loop.stream_weights()
        unet = next(
            net
            for net in nets
            if net.net.spec.inputs[0].name == "latent" and "prediction" in {o.name for o in net.spec.outputs}
        )
        assert unet.streamed == 0, "it would close what the open request has bound"
        list(steps)
        loop.stream_weights()
        assert unet.streamed == 1
