"""Pictures drawn in tiles: seams, sizes, what one tile is, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import CancelledError, Control, Pipeline, UsageError, read_metadata, redraw, refine
from latentrt.engines.package import Package
from latentrt.runtime.loop.job import Condition, ControlJob, FeatureJob, ImagePromptJob, SteeringJob
from latentrt.runtime.pictures.windows import Window, Windows, blend
from latentrt.runtime.request.request import make_request
from tests.engines.host_device import HostDevice
from tests.parity_pair import photo
from tests.runtime.device_bench import device_pipeline

FAST: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 1.0, "seed": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", backend="onnxruntime") as opened:
        yield opened


# ── windows ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(16, 16), (5, 40), (17, 23), (16, 17), (90, 33)])
@pytest.mark.parametrize("overlap", [0, 1, 4, 8])
def test_windows_have_one_shape_and_weights_that_add_up_to_one(size: tuple[int, int], overlap: int) -> None:
    windows = Windows(side=16, overlap=overlap).over(*size)
    total = np.zeros(size)
    for window in windows:
        total[window.top : window.bottom, window.left : window.right] += window.weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert {window.weight.shape for window in windows} == {(min(size[0], 16), min(size[1], 16))}
    for one, other in pairwise(sorted({window.left for window in windows})):
        assert one + 16 - other >= overlap


def test_what_windows_agree_on_is_blended_to_itself() -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, 30, 41)).astype(np.float32)
    windows = Windows(side=16, overlap=4).over(30, 41)
    np.testing.assert_allclose(
        blend(windows, [window.of(values) for window in windows]), values, rtol=1e-5, atol=1e-6
    )
    (whole,) = Windows(side=41, overlap=4).over(30, 41)
    assert np.shares_memory(blend((whole,), [whole.of(values)]), values)  # not copied


# ── seams ──────────────────────────────────────────────────────────────────────────────────────────


def differences(pipe: Pipeline, side: int, overlap: int, net: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Between neighbours along both axes, at borders of tiles and elsewhere: mean absolute ones.

    A ControlNet, if one is named, reads the small picture, in each tile its part of it.

    Of what was drawn less the enlarged picture, where pixels of the decoder's cells meet: only there can
    tiles begin, and neighbours differ more than inside a cell.
    """
    size = 256
    starts = [*range(0, size - side, side - overlap), size - side]
    borders = {place for start in starts for place in (start, start + side)} - {0, size}
    seams, inside = list[float](), list[float]()
    for seed in range(4):
        left, top = np.random.default_rng(seed).integers(160, 192, 2).tolist()
        small = photo(320, 320, seed).crop((left, top, left + 128, top + 128))  # the part without edges
        large = np.asarray(small.resize((size, size), Image.Resampling.LANCZOS)).astype(float)
        tiles: dict[str, Any] = {"draw_tile": side, "draw_overlap": overlap, "upscale": 2, "strength": 0.15}
        if net:
            tiles["controls"] = [Control(model=net, image=small, preparation="tile", strength=0.5)]
        drawn = pipe("", image=small, **{**FAST, "num_inference_steps": 20, "seed": seed}, **tiles).images[0]
        for changed in (drawn - large, (drawn - large).transpose(1, 0, 2)):
            between = np.abs(np.diff(changed, axis=1)).mean(axis=(0, 2))  # column x to x + 1
            for place in range(8, size, 8):
                (seams if place in borders else inside).append(between[place - 1])
    return np.array(seams), np.array(inside)


def check_seams(pipe: Pipeline, side: int, net: str | None = None) -> None:
    seams, inside = differences(pipe, side, side // 4, net)
    assert seams.mean() <= np.quantile(inside, 0.9)
    seams, inside = differences(pipe, side, 0, net)  # a negative control: tiles side by side
    assert seams.mean() > 1.5 * np.quantile(inside, 0.9)


@pytest.mark.parametrize("side", [64, 128])
def test_seams_are_within_what_the_picture_has_elsewhere(pipe: Pipeline, side: int) -> None:
    check_seams(pipe, side)


def test_seams_beside_a_controlnet_that_reads_the_picture(pipe: Pipeline) -> None:
    pipe.load_control("edges")
    try:
        check_seams(pipe, 64, net="edges")
    finally:
        pipe.unload_controls()


# ── sizes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "factor", "drawn"),
    [
        ((100, 60), 1.5, (144, 88)),
        ((64, 64), 2.0, (128, 128)),
        ((5, 131), 1.1, (8, 144)),
        ((90, 80), 1.15, (96, 88)),
    ],
)
def test_sizes_are_rounded_down_to_what_the_model_draws(
    pipe: Pipeline, size: tuple[int, int], factor: float, drawn: tuple[int, int]
) -> None:
    request = make_request(pipe.package.manifest, "", image=photo(*size), upscale=factor)
    assert (request.height, request.width) == drawn
    defaults = {"draw_tile": 128, "draw_overlap": 32, "tile": 128, "strength": 0.35}
    assert {name: getattr(request, name) for name in defaults} == defaults


def test_a_size_that_no_tile_divides(pipe: Pipeline) -> None:
    given = {**FAST, "strength": 0.3, "draw_tile": 64, "draw_overlap": 24}
    found = pipe("", image=photo(72, 104), upscale=1.5, **given).images
    assert found.shape == (1, 104, 152, 3)
    # Enlarging by oneself is the same, and so are a factor and a size.
    large = photo(72, 104).resize((152, 104), Image.Resampling.LANCZOS)
    assert np.array_equal(pipe("", image=large, **given).images, found)
    assert np.array_equal(pipe("", image=photo(72, 104), height=104, width=152, **given).images, found)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_one_tile_is_the_picture_without_tiles_to_the_byte(pipe: Pipeline, sampler: str) -> None:
    small, large = photo(48, 64), photo(48, 64).resize((128, 96), Image.Resampling.LANCZOS)
    given = {**FAST, "sampler": sampler, "strength": 0.5, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    plain = pipe("a red circle", image=large, **given).images
    for tile in (128, 512):  # as large as the picture, and larger
        tiled = pipe("a red circle", image=small, upscale=2, draw_tile=tile, **given).images
        assert np.array_equal(tiled, plain)
    assert not np.array_equal(
        pipe("a red circle", image=small, upscale=2, draw_tile=64, **given).images, plain
    )


def test_the_least_strength_leaves_the_enlarged_picture_but_for_the_autoencoder(pipe: Pipeline) -> None:
    """Strength 0 is refused, as without tiles; the last of 1000 steps alone changes nearly nothing."""
    small = photo(96, 96)
    with pytest.raises(UsageError, match="strength"):
        pipe("", image=small, upscale=2, strength=0.0, **FAST)
    large = np.asarray(small.resize((192, 192), Image.Resampling.LANCZOS))
    mean = pipe.loop.call("vae_encoder", image=large[None], mask=np.zeros((1, 192, 192, 1), np.uint8))["mean"]
    through, _ = pipe.loop.decode(mean)
    given = {**FAST, "num_inference_steps": 1000, "sampler": "ddim", "strength": 0.001, "tile": 192}
    found = pipe("", image=small, upscale=2, draw_tile=96, **given).images
    error = np.abs(through[0].astype(float) - large).mean()
    assert np.abs(found[0].astype(float) - large).mean() <= 1.1 * error + 1


# ── the rest of a request ──────────────────────────────────────────────────────────────────────────


def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline) -> None:
    given = {
        **FAST,
        "strength": 0.4,
        "upscale": 2,
        "draw_tile": 64,
        "guidance_scale": 3.0,
        "sampler": "euler_a",
    }
    pictures, prompts = [photo(48, 48), photo(48, 48, 5)], ["a red circle", "a green star"]
    both = pipe(prompts, image=pictures, **{**given, "seed": [3, 4]}).images
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        alone = pipe(prompt, image=picture, **{**given, "seed": 3 + number}).images[0]
        assert np.abs(both[number].astype(int) - alone).max() <= 1


def test_a_mask_holds_in_tiles(pipe: Pipeline) -> None:
    mask = np.zeros((96, 128), np.uint8)
    mask[30:60, 40:90] = 255
    picture = photo(96, 128)
    found = pipe("a red circle", image=picture, mask_image=mask, draw_tile=64, **FAST).images[0]
    changed = (found != np.asarray(picture)).any(axis=2)
    assert not changed[mask == 0].any()
    assert changed[mask > 0].mean() > 0.5


def test_cancelled_between_two_tiles(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, calls = Event(), list[tuple[int, ...]]()
    net = pipe.loop.net("unet")  # pyright: ignore[reportAttributeAccessIssue]

    def call(**arrays: Any) -> Any:
        calls.append(arrays["latent"].shape)
        if len(calls) == 3:
            cancel.set()
        return type(net).__call__(net, **arrays)

    monkeypatch.setitem(pipe.loop.nets, "unet", call)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CancelledError, match="before step 1 of 4"):
        pipe("", image=photo(64, 64), upscale=2, draw_tile=64, strength=0.5, cancel=cancel, **FAST)
    assert calls == [(1, 4, 8, 8)] * 3  # all of one shape


def test_records_and_redrawing(pipe: Pipeline, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    photo(64, 48).save(small)
    given = {**FAST, "output_type": "pil"}
    result = pipe("a red circle", image=small, upscale=2.5, draw_tile=64, **given)
    wanted = {
        "upscale": 2.5,
        "draw_tile": 64,
        "draw_overlap": 16,
        "strength": 0.35,
        "width": 120,
        "height": 160,
    }
    assert {name: result.record()[name] for name in wanted} == wanted
    result.save(tmp_path / "large.png")
    assert redraw(pipe, tmp_path / "large.png").to_bytes() == result.to_bytes()
    other = redraw(pipe, tmp_path / "large.png", height=64, width=64)
    assert other.images[0].size == (64, 64)
    assert (read_metadata(tmp_path / "large.png").record or {})["image"]["name"] == "small.png"


def test_a_refiner_goes_on_in_the_same_tiles(pipe: Pipeline) -> None:
    given = {**FAST, "strength": 0.5}
    result = refine(pipe, pipe, "a red circle", image=photo(64, 64), upscale=2, draw_tile=64, **given)
    assert (result.request.draw_tile, result.request.draw_overlap, result.request.tile) == (64, 16, 64)
    assert result.base is not None
    assert result.base.request.draw_tile == 64


def test_steps_and_previews(pipe: Pipeline) -> None:
    given = {**FAST, "upscale": 2, "draw_tile": 64, "strength": 0.5}
    steps = list(pipe.stream("", image=photo(64, 64), **{**given, "output_type": "pil"}))
    assert [step.latent.shape for step in steps] == [(1, 4, 16, 16)] * 4
    wanted = pipe("", image=photo(64, 64), **given).images[0]
    assert np.array_equal(np.asarray(steps[-1].preview()[0]), wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"upscale": 0.5}, "upscale is 0.5; expected a number from 1 to 16"),
        ({"upscale": 17}, "upscale is 17; expected a number from 1 to 16"),
        ({"upscale": float("nan")}, "upscale is nan"),
        ({"upscale": "2"}, "upscale is '2'"),
        ({"upscale": True}, "upscale is True"),
        ({"upscale": 2, "width": 64}, "upscale with width"),
        ({"upscale": 2, "mask_image": np.full((64, 64), 255, np.uint8)}, "upscale with a mask"),
        ({"upscale": 2, "draw_tile": 60}, "draw_tile is 60; expected a multiple of 8"),
        ({"upscale": 2, "draw_tile": 0}, "draw_tile is 0"),
        ({"upscale": 2, "draw_tile": 8}, "tiles of 8 pixels"),
        ({"upscale": 2, "draw_overlap": -8}, "draw_overlap is -8; expected an integer from 0"),
        ({"upscale": 2, "draw_overlap": 12}, "draw_overlap is 12; expected a multiple of 8"),
        (
            {"upscale": 2, "draw_overlap": 72},
            "draw_overlap is 72 of tiles of 128 pixels; expected at most half",
        ),
        ({"draw_overlap": 16}, "draw_overlap without tiles; expected draw_tile, or upscale"),
        ({"upscale": 2, "image": None}, "upscale without an image"),
        ({"upscale": 2, "image": np.zeros((1, 4, 8, 8), np.float32)}, "latents with upscale"),
        ({"upscale": 16, "image": np.zeros((8, 2000, 3), np.uint8)}, "upscale 16 makes 32000x128 pixels"),
        ({"upscale": 16, "image": np.zeros((1000, 1000, 3), np.uint8)}, "megapixels"),
        ({"tile_upscale": 2}, "there is no parameter 'tile_upscale'; expected 'upscale'"),
    ],
)
def test_what_is_refused(pipe: Pipeline, values: dict[str, Any], message: str) -> None:
    whole = {"image": photo(64, 64), **values}
    with pytest.raises(UsageError, match=message):
        make_request(pipe.package.manifest, "", **whole)


# ── on a device ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("watched", [False, True])
def test_a_device_draws_the_same_tiles(pipe: Pipeline, package: Package, watched: bool) -> None:
    given: dict[str, Any] = {**FAST, "upscale": 2, "draw_tile": 64, "strength": 0.5, "sampler": "euler_a"}
    if watched:
        given["callback_on_step_end"] = lambda pipe, index, timestep, values: None
    wanted = pipe("a red circle", image=photo(64, 64), **given).images
    with device_pipeline(package, HostDevice()) as (on_device, _):
        found = on_device("a red circle", image=photo(64, 64), **given).images
        latents = on_device("a red circle", image=photo(64, 64), **{**given, "output_type": "latent"}).images
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert latents.shape == (1, 4, 16, 16)


def test_pictures_of_controls_are_cut_as_the_latent(pipe: Pipeline) -> None:
    request = make_request(pipe.package.manifest, "", image=photo(64, 64), upscale=2, draw_tile=64, seed=1)
    job = pipe.prepare(request)
    assert job.windows == Windows(side=8, overlap=2)
    hint = np.arange(128 * 128, dtype=np.float32).reshape(1, 1, 128, 128)
    given: dict[str, Any] = {"hint": hint, "hint_of_row": (0,)}
    condition: Any = {"control_type": 0, "strength": 1.0, "on": np.ones(1)}
    steering = SteeringJob(
        controlnets=(
            ControlJob(
                manifest=None,  # pyright: ignore[reportArgumentType]
                loop=pipe.loop,
                scales=np.ones((1, 1, 1)),
                conditions=(Condition(hint=hint, hint_of_row=(0,), **condition),),
                **given,
            ),
        ),
        features=(FeatureJob(call=pipe.loop.call, strength=1.0, on=np.ones(1), **given),),
        image_prompt=ImagePromptJob(inputs={}, masks=hint[0], on=np.ones((1, 1))),
    )
    window = Window(top=2, bottom=10, left=6, right=14, weight=np.ones((8, 8), np.float32))
    part = replace(job, steering=steering).within(window)
    (net,), (features,), prompt = (
        part.steering.controlnets,
        part.steering.features,
        part.steering.image_prompt,
    )
    assert prompt is not None
    for found in (net.hint, net.conditions[0].hint, features.hint, prompt.masks[None]):
        assert np.array_equal(found, hint[..., 16:80, 48:112])
    assert np.array_equal(part.first, job.first[..., 2:10, 6:14])
