"""The device loop against the host loop: the same pictures, one synchronisation each, nothing left behind."""

import threading
from collections.abc import Generator
from threading import Event

import numpy as np
import pytest

from latentrt.engines.errors import BackendError, CancelledError, NumericError
from latentrt.engines.package import Package
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.pipeline import Pipeline
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline

PROMPT = "a red circle on a blue background"
COMMON = {"num_inference_steps": 4, "seed": 5, "height": 64, "width": 96, "output_type": "latent"}


@pytest.fixture(scope="module")
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture(scope="module")
def on_device(package: Package, device: HostDevice) -> Generator[tuple[Pipeline, DeviceLoop]]:
    with device_pipeline(package, device) as opened:
        yield opened


@pytest.fixture(scope="module")
def on_host(package: Package) -> Generator[Pipeline]:
    with Pipeline.open(package.root, backend="onnxruntime") as pipe:
        yield pipe


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "euler_a"},
        {"sampler": "dpmpp_2m", "guidance_scale": 1.0},
        {"sampler": "dpmpp_3m_sde", "num_images_per_prompt": 2},
        {"sampler": "pndm", "guidance_rescale": 0.6},
        {"sampler": "heun", "num_images_per_prompt": 3, "guidance_scale": 1.0},
        {"sampler": "unipc", "negative_prompt": "a green star"},
        {"sampler": "lcm", "rng": "torch-cuda"},
        {"sampler": "dpmpp_2m", "guidance_interval": (0.2, 0.7), "guidance_rescale": 0.5},
        {"sampler": "euler", "guidance_scale": [7.0, 1.0, 4.0, 0.0]},
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_the_device_draws_what_the_host_draws(
    on_device: tuple[Pipeline, DeviceLoop], on_host: Pipeline, change: dict[str, object]
) -> None:
    parameters = {**COMMON, **change}
    wanted = on_host(PROMPT, **parameters).images
    assert relative(on_device[0](PROMPT, **parameters).images, wanted) < 2e-5
    *_, last = on_device[0].stream(PROMPT, **parameters)
    assert relative(last.latent, wanted) < 2e-5


def test_different_prompts_and_seeds_in_one_batch(
    on_device: tuple[Pipeline, DeviceLoop], on_host: Pipeline
) -> None:
    prompts = [PROMPT, "a small yellow star on a green background", PROMPT]
    parameters = {**COMMON, "negative_prompt": ["a blue heart", "", "a blue heart"], "seed": [9, 8, 2]}
    wanted = on_host(prompts, **parameters).images
    assert relative(on_device[0](prompts, **parameters).images, wanted) < 2e-5


def test_pictures_and_previews(on_device: tuple[Pipeline, DeviceLoop], on_host: Pipeline) -> None:
    parameters = {**COMMON, "output_type": "np", "num_images_per_prompt": 2}
    wanted = on_host(PROMPT, **parameters).images.astype(int)
    assert np.abs(on_device[0](PROMPT, **parameters).images - wanted).max() <= 1
    host_steps, steps = on_host.stream(PROMPT, **parameters), on_device[0].stream(PROMPT, **parameters)
    for a, b in zip(host_steps, steps, strict=True):
        assert relative(b.denoised, a.denoised) < 1e-4
        assert np.abs(np.asarray(a.preview()[0], int) - np.asarray(b.preview()[0])).max() <= 1


def test_one_synchronisation_a_picture(on_device: tuple[Pipeline, DeviceLoop], device: HostDevice) -> None:
    for steps in (4, 9):
        request = {**COMMON, "num_inference_steps": steps, "output_type": "np"}
        on_device[0](PROMPT, **request)  # may have to make room among the idle programs
        before = device.synchronisations
        on_device[0](PROMPT, **request)
        assert device.synchronisations == before + 1


def test_a_second_picture_allocates_nothing(
    on_device: tuple[Pipeline, DeviceLoop], device: HostDevice
) -> None:
    on_device[0](PROMPT, **COMMON)
    on_device[0]("a small yellow star", **COMMON)  # one text now: the negative prompt is remembered
    blocks = dict(device.sizes)
    on_device[0]("a large purple heart on a white background", **{**COMMON, "seed": 1, "sampler": "ddim"})
    assert device.sizes == blocks


def test_work_per_step_does_not_grow(on_device: tuple[Pipeline, DeviceLoop], device: HostDevice) -> None:
    """The steps of one picture cost the same number of enqueued items each: nothing is re-uploaded."""
    counts = []
    for steps in (5, 10, 15):
        on_device[0](PROMPT, **{**COMMON, "num_inference_steps": steps})  # its buffers exist from now on
        before = device.submitted
        on_device[0](PROMPT, **{**COMMON, "num_inference_steps": steps})
        # packing the table is one strided copy, which the host device counts row by row
        counts.append(device.submitted - before)
    assert counts[2] - counts[1] == counts[1] - counts[0]


def test_latents_from_a_callback_are_taken(on_device: tuple[Pipeline, DeviceLoop], on_host: Pipeline) -> None:
    def halve(pipe: Pipeline, index: int, timestep: float, values: dict[str, object]) -> dict[str, object]:
        return {"latents": np.asarray(values["latents"]) * 0.5} if index == 1 else {}

    parameters = {**COMMON, "callback_on_step_end": halve}
    wanted = on_host(PROMPT, **parameters).images
    assert relative(on_device[0](PROMPT, **parameters).images, wanted) < 2e-5


def test_cancelling(on_device: tuple[Pipeline, DeviceLoop]) -> None:
    cancel = Event()
    steps = on_device[0].stream(PROMPT, cancel=cancel, **COMMON)
    next(steps)
    cancel.set()
    with pytest.raises(CancelledError, match="before step 2 of 4"):
        next(steps)


def test_infinity_is_found(on_device: tuple[Pipeline, DeviceLoop]) -> None:
    parameters = {**COMMON, "latents": np.full((1, 4, 8, 12), 1e38, np.float32)}
    with pytest.raises(NumericError, match="after the last step"):
        on_device[0](PROMPT, **parameters)
    with pytest.raises(NumericError, match="after step 1 of 4"):
        list(on_device[0].stream(PROMPT, **parameters))
    assert np.isfinite(on_device[0](PROMPT, **COMMON).images).all(), "NaN must not outlive its request"


def test_two_open_streams_do_not_mix(on_device: tuple[Pipeline, DeviceLoop], on_host: Pipeline) -> None:
    wanted = [on_host(PROMPT, **{**COMMON, "seed": seed}).images for seed in (1, 2)]
    streams = [on_device[0].stream(PROMPT, **{**COMMON, "seed": seed}) for seed in (1, 2)]
    for first, second in zip(*streams, strict=True):
        found = first.latent, second.latent
    assert [relative(a, b) < 2e-5 for a, b in zip(found, wanted, strict=True)] == [True, True]


def test_threads_take_turns(on_device: tuple[Pipeline, DeviceLoop]) -> None:
    serial = [on_device[0](PROMPT, **{**COMMON, "seed": seed}).images for seed in range(4)]
    found: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        for _ in range(3):
            found[seed] = on_device[0](PROMPT, **{**COMMON, "seed": seed}).images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, wanted in enumerate(serial):
        np.testing.assert_array_equal(found[seed], wanted)


def test_closing_under_an_open_stream(package: Package) -> None:
    device = HostDevice()
    with device_pipeline(package, device) as (pipe, _):
        steps = pipe.stream(PROMPT, **COMMON)
        next(steps)
        pipe.close()
        assert not device.blocks
        with pytest.raises((BackendError, AssertionError)):
            next(steps)


def test_closing_frees_everything_though_the_device_failed(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    with device_pipeline(package, device) as (pipe, loop):
        pipe(PROMPT, **COMMON)

        def lost() -> None:
            raise BackendError("the device is lost", expected="a device", fix="")

        monkeypatch.setattr(device, "synchronize", lost)
        with pytest.raises(BackendError, match="lost"):
            pipe.close()
        assert not device.blocks
        for net in loop.nets.values():
            with pytest.raises(BackendError, match="closed"):
                net.bind({}, {}, 0)
