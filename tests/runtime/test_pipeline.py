"""The pipeline on the shipped model: batching, streaming, cancelling, sharing, failing."""

import asyncio
import io
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.benchmarks.case import HOST_NETS
from latentrt.engines.errors import (
    BackendError,
    CancelledError,
    CheckpointError,
    NumericError,
    PackageError,
    UsageError,
    numeric_fix,
)
from latentrt.engines.package import write_manifest
from latentrt.runtime import Pipeline
from latentrt.runtime.result import check_finite

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as pipe:
        yield pipe


def draw(pipe: Pipeline, **parameters: Any) -> np.ndarray:
    """(N, H, W, 3) uint8, four steps."""
    images = pipe(PROMPT, **{"num_inference_steps": 4, "seed": 3, "output_type": "np", **parameters}).images
    assert isinstance(images, np.ndarray)
    return images


class FakeNet:
    """A net of the pipeline with its answer changed; everything else is the real one's."""

    def __init__(self, net: Any, change: Any) -> None:
        self.net, self.spec, self.change, self.calls = net, net.spec, change, []

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append({name: array.shape for name, array in arrays.items()})
        return self.change(len(self.calls), self.net(**arrays))


def replace_net(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> FakeNet:
    fake = FakeNet(pipe.loop.nets[name], change)
    monkeypatch.setattr(pipe.loop, "nets", {**pipe.loop.nets, name: fake})
    return fake


def test_output_types(pipe: Pipeline) -> None:
    result = pipe(PROMPT, num_inference_steps=2, seed=1, height=64, width=96)
    assert result.images[0].size == (96, 64)
    assert result.request.seeds == (1,)
    assert {"text_encoder", "invariants", "unet", "update", "vae_decoder"} <= set(result.seconds)
    assert draw(pipe, num_images_per_prompt=2).shape == (2, 128, 128, 3)
    assert draw(pipe, output_type="latent").shape == (1, 4, 16, 16)


def test_rows_of_a_unet_call(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = replace_net(pipe, monkeypatch, "unet", lambda call, answer: answer)
    draw(pipe, num_images_per_prompt=3, guidance_scale=4.0)
    draw(pipe, num_images_per_prompt=3, guidance_scale=1.0)
    assert [call["latent"][0] for call in unet.calls] == [6] * 4 + [3] * 4
    for call in unet.calls:  # one timestep, and a row of it for each of the UNet's
        times = {shape[0] for name, shape in call.items() if name.startswith("time.")}
        assert times == {call["latent"][0]}


def test_invariants_are_computed_once_and_a_prompt_is_encoded_once_for_all(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = {name: replace_net(pipe, monkeypatch, name, lambda call, answer: answer) for name in HOST_NETS}
    for calls in (1, 2):
        pipe("a prompt nobody has drawn yet", num_inference_steps=4, seed=3, output_type="np")
        assert {name: len(net.calls) for name, net in nets.items()} == {
            "text_encoder": 1,
            "unet_context": calls,
            "unet_time": calls,
            "unet": 4 * calls,
            "vae_decoder": calls,
        }


def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline) -> None:
    together = draw(pipe, num_images_per_prompt=3, sampler="euler_a")
    for i, seed in enumerate((3, 4, 5)):
        alone = draw(pipe, seed=seed, sampler="euler_a")[0]
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_prompts_and_negative_prompts_matter(pipe: Pipeline) -> None:
    plain = draw(pipe)
    assert np.abs(draw(pipe, negative_prompt="a blue square").astype(int) - plain).max() > 10
    np.testing.assert_array_equal(draw(pipe, negative_prompt=""), plain)


def test_latents_replace_the_seeds_noise(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(draw(pipe, latents=noise), draw(pipe, latents=noise, seed=99))


def test_stream_yields_every_step_and_ends_with_the_picture(pipe: Pipeline) -> None:
    steps = list(pipe.stream(PROMPT, num_inference_steps=4, seed=3))
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    assert all(a.timestep > b.timestep for a, b in pairwise(steps))
    np.testing.assert_array_equal(np.asarray(steps[-1].preview()[0]), draw(pipe)[0])
    assert steps[0].preview()[0].size == (128, 128)


def test_the_denoised_estimate_comes_closer_to_the_end(pipe: Pipeline) -> None:
    steps = list(pipe.stream(PROMPT, num_inference_steps=20, seed=3))
    errors = [float(np.abs(step.denoised - steps[-1].latent).mean()) for step in steps]
    assert errors[0] > errors[10] > errors[-1]
    assert errors[-1] < 0.05 * errors[0]


def test_a_stream_can_be_left(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = replace_net(pipe, monkeypatch, "unet", lambda call, answer: answer)
    for step in pipe.stream(PROMPT, num_inference_steps=10, seed=3):
        if step.index == 1:
            break
    assert len(unet.calls) == 2


def test_cancel_stops_within_a_step_and_leaves_nothing_behind(pipe: Pipeline) -> None:
    clean = draw(pipe)
    cancel, seen = threading.Event(), []

    def stop(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        if index == 1:
            cancel.set()
        return values

    with pytest.raises(CancelledError, match="before step 3 of 4") as caught:
        draw(pipe, callback_on_step_end=stop, cancel=cancel)
    assert seen == [0, 1]
    assert caught.value.exit_code == 6
    np.testing.assert_array_equal(draw(pipe), clean)


def test_a_time_limit_ends_like_a_cancel(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(count: int, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.3 if count == 2 else 0)
        return answer

    clean = draw(pipe, timeout=60)
    unet = replace_net(pipe, monkeypatch, "unet", late)
    with pytest.raises(CancelledError, match=r"the time limit of 0\.25 s was over before step 3 of 4"):
        draw(pipe, timeout=0.25)
    assert len(unet.calls) == 2
    with pytest.raises(UsageError, match="timeout is -1"):
        draw(pipe, timeout=-1)
    monkeypatch.undo()
    np.testing.assert_array_equal(draw(pipe), clean)


@pytest.mark.parametrize("net", ["vae_encoder", "vae_decoder"])
def test_cancel_is_looked_at_between_tiles(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, net: str) -> None:
    cancel = threading.Event()

    def stop(count: int, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if count == 2:
            cancel.set()
        return answer

    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    draw(pipe, image=image, tile=64)  # every net is open
    fake = replace_net(pipe, monkeypatch, net, stop)
    with pytest.raises(CancelledError, match=f"before the {net.removeprefix('vae_')}"):
        draw(pipe, image=image, tile=64, cancel=cancel)
    assert len(fake.calls) == 2


def test_asyncio(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = draw(pipe)

    async def all_of_it() -> tuple[list[int], np.ndarray, int]:
        ticks, seen, last = 0, [], None

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async for step in pipe.stream_async(PROMPT, num_inference_steps=4, seed=3):
            seen.append(step.index)
            last = step
        ticking.cancel()
        assert last is not None
        return seen, np.asarray(last.preview()[0]), ticks

    seen, picture, ticks = asyncio.run(all_of_it())
    assert seen == [0, 1, 2, 3]
    np.testing.assert_array_equal(picture, wanted[0])
    assert ticks > 4, "the event loop was blocked while steps were drawn"

    unet = replace_net(pipe, monkeypatch, "unet", lambda call, answer: answer)

    async def left_early() -> None:
        async for step in pipe.stream_async(PROMPT, num_inference_steps=200, seed=3):
            if step.index == 1:
                break

    asyncio.run(left_early())
    time.sleep(0.2)
    assert len(unet.calls) < 8

    async def failing() -> None:
        async for _ in pipe.stream_async(PROMPT, steps=3):  # type: ignore[call-arg]
            pass

    with pytest.raises(UsageError, match="num_inference_steps"):
        asyncio.run(failing())


def test_what_images_are(pipe: Pipeline) -> None:
    shades = draw(pipe)
    parameters: dict[str, Any] = {"num_inference_steps": 4, "seed": 3}
    floats = pipe(PROMPT, output_type="float", **parameters)
    assert floats.images.dtype == np.float32
    np.testing.assert_array_equal(np.rint(floats.images * 255), shades)
    pictures = pipe(PROMPT, **parameters)
    for result in (floats, pictures, pipe(PROMPT, output_type="np", **parameters)):
        file = io.BytesIO()
        result.save(file)
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), shades[0])
    data = pictures.to_bytes("webp", quality=50)
    assert data[8:12] == b"WEBP"
    assert len(data) < len(pictures.to_bytes("WEBP"))
    assert pictures.to_bytes("jpg")[:2] == b"\xff\xd8"
    pictures.save(file := io.BytesIO(), format="JPEG", metadata=False)
    assert b"red circle".hex() not in file.getvalue().hex()


def test_a_callback_may_change_the_latents(pipe: Pipeline) -> None:
    def scale(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.5} if index == 0 else {}

    assert np.abs(draw(pipe, callback_on_step_end=scale).astype(int) - draw(pipe)).max() > 5


@pytest.mark.parametrize("answer", [3, "latents", [1], True])
def test_a_callback_that_returns_something_else(pipe: Pipeline, answer: Any) -> None:
    with pytest.raises(UsageError, match="the callback returned"):
        draw(pipe, callback_on_step_end=lambda *_: answer)


def test_a_callback_may_return_nothing_but_not_another_shape(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(draw(pipe, callback_on_step_end=lambda *_: None), draw(pipe))
    small = np.zeros((1, 4, 3, 3), np.float32)
    with pytest.raises(UsageError, match=r"shape \(1, 4, 3, 3\) from a callback"):
        draw(pipe, callback_on_step_end=lambda *_: {"latents": small})


def test_two_threads_draw_the_same_bytes_as_one(pipe: Pipeline) -> None:
    jobs = [{"seed": seed, "sampler": sampler} for seed in range(4) for sampler in ("euler_a", "dpmpp_2m")]
    serial = [draw(pipe, **job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        parallel = list(pool.map(lambda job: draw(pipe, **job), jobs))
    for one, other in zip(serial, parallel, strict=True):
        assert one.tobytes() == other.tobytes()


def test_non_finite_latent_is_found_in_its_step(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(call: int, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if call == 3:
            answer["prediction"][0, 0, 0, 0] = np.nan
        return answer

    replace_net(pipe, monkeypatch, "unet", poison)
    with pytest.raises(NumericError, match="after step 3 of 4") as caught:
        draw(pipe)
    assert caught.value.exit_code == 8
    assert caught.value.fix == numeric_fix("fp32")


def test_non_finite_picture(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_net(
        pipe, monkeypatch, "vae_decoder", lambda call, answer: {**answer, "mean": np.float32([np.inf])}
    )
    with pytest.raises(NumericError, match="picture is not finite"):
        draw(pipe)


def test_picture_of_one_colour(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = np.zeros((1, 128, 128, 3), np.uint8)
    replace_net(pipe, monkeypatch, "vae_decoder", lambda call, answer: {**answer, "image": blank})
    with pytest.raises(NumericError, match="single colour") as caught:
        draw(pipe)
    assert caught.value.fix == numeric_fix("fp32")


def test_the_real_decoder_reports_nan(pipe: Pipeline) -> None:
    latent = np.zeros((1, 4, 16, 16), np.float32)
    latent[0, 0, 5, 5] = np.nan
    with pytest.raises(NumericError, match="picture is not finite"):
        check_finite(*pipe.loop.decode(latent), "fp32")


def test_a_plain_prompt_that_is_too_long_warns_and_names_what_was_dropped(
    pipe: Pipeline, logged: list[str]
) -> None:
    few = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    cut = pipe("red " * 80 + "star", prompt_syntax="plain", **few).images
    (line,) = logged
    assert re.search("is too long; dropped: .*star", line)
    assert np.abs(pipe("red " * 80 + "star", **few).images - cut).max() > 1e-3, "chunks lose nothing"


def test_sampler_may_be_a_scheduler_config(pipe: Pipeline) -> None:
    config = {**pipe.package.manifest.scheduler, "_class_name": "EulerDiscreteScheduler"}
    np.testing.assert_array_equal(draw(pipe, sampler=config), draw(pipe, sampler="euler"))


def test_warmup_runs_every_net(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = replace_net(pipe, monkeypatch, "vae_decoder", lambda call, answer: answer)
    pipe.warmup()
    assert len(decoder.calls) == 1


def test_a_package_without_a_net_of_the_loop(pipe: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(pipe.package.root, tmp_path / "package")
    nets = {name: net for name, net in pipe.package.manifest.nets.items() if name != "unet_time"}
    write_manifest(tmp_path / "package", replace(pipe.package.manifest, nets=nets))
    with pytest.raises(PackageError, match="has no net 'unet_time'"):
        Pipeline.open(tmp_path / "package")


def test_infinite_predictions_end_in_one_error_without_warnings(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(call: int, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"prediction": answer["prediction"] * np.float32(1e38)}

    replace_net(pipe, monkeypatch, "unet", explode)
    with np.errstate(all="ignore"), pytest.raises(NumericError):
        draw(pipe)


def test_open_errors(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        Pipeline.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(PackageError, match="damaged"):
        Pipeline.open(tmp_path)
    with pytest.raises(BackendError, match="unknown backend"):
        Pipeline.open("demo", backend="nothing")
    with pytest.raises(UsageError, match="threads"):
        Pipeline.open("demo", threads=-1)


def test_a_closed_pipeline_says_so() -> None:
    pipe = Pipeline.open("demo", threads=1)
    pipe.close()
    pipe.close()
    with pytest.raises(BackendError, match="closed"):
        pipe(PROMPT)
    with pytest.raises(BackendError, match="closed"):
        pipe.loop.call("step")


def test_what_the_runtime_offers_is_listed_and_nothing_else_is_there() -> None:
    import latentrt.runtime

    assert dir(latentrt.runtime) == ["Pipeline", "Result", "Step"]
    assert latentrt.runtime.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="has no attribute 'Given'"):
        _ = latentrt.runtime.Given
