"""What a request may start from, and what only some models take: each refusal by name."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.errors import SamplerError, UsageError
from latentrt.engines.package import Defaults, Manifest, NetFile
from latentrt.engines.spec import text_encoder, unet_time
from latentrt.runtime.request.request import Request, make_request
from latentrt.runtime.request.source import Latents, Masked, Pictures, Varied

SD = Manifest(
    name="sd",
    family="sd1",
    dtype="fp32",
    latent_channels=4,
    context_width=8,
    scheduler={"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False},
    nets={},
    defaults=Defaults(num_inference_steps=10, height=64, width=96, strength=0.5),
)


def with_vectors(**widths: int) -> dict[str, NetFile]:
    spec = unet_time(invariants=(), vectors=widths)
    return {"unet_time": NetFile(graph="unet/time.onnx", weights=(), spec=spec)}


XL = dataclasses.replace(
    SD,
    time_ids=("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width"),
    nets=with_vectors(text_embeds=8, time_ids=6),
)
REFINER = dataclasses.replace(SD, time_ids=(*XL.time_ids[:4], "aesthetic_score"))
INPAINT = dataclasses.replace(SD, image_latents=("mask", "masked_image"))
UNCLIP = dataclasses.replace(SD, name="unclip", nets=with_vectors(class_labels=16))
LCM = dataclasses.replace(SD, nets=with_vectors(timestep_cond=16))

PICTURE = np.random.default_rng(0).integers(0, 256, (43, 61, 3), np.uint8)
MASK = np.zeros((43, 61), np.uint8)
MASK[10:30, 20:40] = 255


def ask(manifest: Manifest = SD, **parameters: Any) -> Request:
    return make_request(manifest, "a", seed=1, **parameters)


def test_a_picture_sets_the_size_and_the_models_strength() -> None:
    request = ask(image=PICTURE)
    assert isinstance(request.source, Pictures)
    assert (request.height, request.width) == (40, 56), "rounded down to a multiple of 8"
    assert request.source.pixels.shape == (1, 40, 56, 3)
    assert request.source.strength == 0.5
    assert (ask(image=PICTURE, height=72, strength=0.25).height, ask(image=PICTURE, width=8).width) == (72, 8)


@pytest.mark.parametrize("kind", ["path", "pillow", "list", "batch"])
def test_a_picture_may_come_as_anything(tmp_path: Path, kind: str) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "p.png")
    image: Any = {
        "path": tmp_path / "p.png",
        "pillow": Image.fromarray(PICTURE),
        "list": [PICTURE],
        "batch": PICTURE[None],
    }[kind]
    source, plain = ask(image=image).source, ask(image=PICTURE).source
    assert isinstance(source, Pictures)
    assert isinstance(plain, Pictures)
    np.testing.assert_array_equal(source.pixels, plain.pixels)


def test_pictures_go_with_their_prompts() -> None:
    other = 255 - PICTURE
    request = make_request(
        SD, ["a", "b"], image=[PICTURE, other], num_images_per_prompt=2, height=43 // 8 * 8
    )
    assert isinstance(request.source, Pictures)
    first, second, third, fourth = request.source.pixels
    assert (first == second).all()
    assert (third == fourth).all()
    assert (first != third).any()


def test_latents_set_the_size() -> None:
    latents = np.ones((1, 4, 5, 7), np.float64)
    request = ask(image=latents, strength=1.0)
    assert isinstance(request.source, Latents)
    assert (request.height, request.width) == (40, 56)
    assert request.source.latents.dtype == np.float32


def test_a_mask_repaints_at_full_strength() -> None:
    source = ask(image=PICTURE, mask_image=MASK).source
    assert isinstance(source, Masked)
    assert source.strength == 1
    assert source.pixels.shape == (1, 40, 56, 3)
    cropped = ask(image=PICTURE, mask_image=MASK, padding_mask_crop=2)
    assert (cropped.height, cropped.width) == (64, 96), "the model's size, for the mask's surroundings"


def test_a_picture_to_vary_does_not_set_the_size() -> None:
    request = ask(UNCLIP, image=PICTURE, noise_level=20)
    assert isinstance(request.source, Varied)
    assert request.source.pixels.shape == (1, 224, 224, 3)
    assert (request.height, request.width, request.noise_level) == (64, 96, 20)


def test_a_default_that_is_said_is_not_refused() -> None:
    assert isinstance(ask(UNCLIP, image=PICTURE, mask_blur=float("0")).source, Varied)
    assert isinstance(ask(image=PICTURE, mask_blur=0).source, Pictures)


def test_sizes_are_the_pictures_unless_given() -> None:
    sizes = ask(XL, crops_coords_top_left=(3, 4), target_size=(128, 256)).sizes
    assert list(sizes.positive.values()) == [64, 96, 3, 4, 128, 256]
    assert sizes.negative == sizes.positive
    sizes = ask(XL, negative_original_size=(7, 8), negative_crops_coords_top_left=(0, 0)).sizes
    assert sizes.rows(guided=True).tolist() == [[7, 8, 0, 0, 64, 96], [64, 96, 0, 0, 64, 96]]
    assert ask(REFINER).sizes.rows(guided=True)[:, -1].tolist() == [2.5, 6.0]
    assert not ask(SD).sizes.positive


def test_sizes_may_be_lists_or_arrays() -> None:
    sizes = ask(XL, original_size=np.array([7, 8]), crops_coords_top_left=[0, 0]).sizes
    assert list(sizes.positive.values())[:4] == [7, 8, 0, 0]
    assert not ask(SD, crops_coords_top_left=[0, 0]).sizes.positive


def test_an_embedded_guidance_scale_needs_no_second_half() -> None:
    assert not ask(LCM, guidance_scale=8.5).guided
    assert ask(SD, guidance_scale=8.5).guided


def test_texts_of_one_and_of_each() -> None:
    encoders = {
        name: NetFile(
            graph="x.onnx",
            weights=(),
            spec=text_encoder(tokens=77, width=8, pooled=8, float_dtype="float32"),
        )
        for name in ("text_encoder", "text_encoder_2")
    }
    two = dataclasses.replace(XL, nets={**XL.nets, **encoders})
    request = make_request(two, ["a", "b"], prompt_2=["c", "d"], negative_prompt="n", num_images_per_prompt=2)
    assert request.prompts_2 == ("c", "c", "d", "d")
    assert request.negative_prompts == ("n",) * 4
    assert request.negative_prompts_2 == (None,) * 4


@pytest.mark.parametrize(
    ("manifest", "parameters", "match"),
    [
        (SD, {"strength": 0.5}, "strength without an image"),
        (SD, {"mask_image": MASK}, "mask_image without an image"),
        (SD, {"padding_mask_crop": 3}, "padding_mask_crop without an image"),
        (SD, {"image": PICTURE, "strength": 1.5}, "strength is 1.5"),
        (SD, {"image": PICTURE, "resize_mode": "zoom"}, "zoom"),
        (SD, {"image": PICTURE, "mask_image": MASK, "padding_mask_crop": -1}, "padding_mask_crop is -1"),
        (SD, {"image": PICTURE, "mask_image": MASK, "mask_blur": -1}, "mask_blur is -1"),
        (SD, {"image": PICTURE, "mask_image": np.zeros((43, 61), np.uint8)}, "nothing to repaint"),
        (SD, {"image": PICTURE, "mask_image": MASK, "resize_mode": "crop"}, "with a mask"),
        (SD, {"image": [PICTURE, PICTURE], "mask_image": MASK}, "several images"),
        (SD, {"image": np.ones((1, 4, 5, 7)), "mask_image": MASK}, "or with latents"),
        (SD, {"image": [PICTURE, PICTURE]}, "2 images for 1 prompts"),
        (SD, {"image": PICTURE, "padding_mask_crop": 3}, "padding_mask_crop without a mask"),
        (SD, {"image": PICTURE, "mask_blur": 3.0}, "mask_blur without a mask"),
        (SD, {"resize_mode": "zoom"}, "zoom"),
        (SD, {"image": np.zeros((1, 4, 24, 3))}, "may be latents or pictures"),
        (
            SD,
            {"image": PICTURE, "mask_image": MASK, "denoising_start": 0.5},
            "mask_image with denoising_start",
        ),
        (SD, {"image": PICTURE, "strength": 0.5, "denoising_start": 0.5}, "strength with denoising_start"),
        (UNCLIP, {"image": PICTURE, "strength": 0.5}, "strength is 0.5, and .*this one varies"),
        (UNCLIP, {"image": PICTURE, "mask_blur": 2.0}, "mask_blur is 2.0, and .*this one varies"),
        (SD, {"tile": 8}, "tiles of 8 pixels"),
        (SD, {"image": []}, "0 images"),
        (SD, {"image": np.ones((1, 3, 5, 7))}, r"image have shape \(1, 3, 5, 7\)"),
        (SD, {"image": np.full((1, 4, 5, 7), np.inf)}, "not all finite"),
        (SD, {"image": "nowhere.png"}, "nowhere.png"),
        (INPAINT, {}, "has no image"),
        (INPAINT, {"image": PICTURE}, "was given no mask"),
        (UNCLIP, {}, "has no image; expected a picture to vary"),
        (UNCLIP, {"image": np.ones((1, 4, 5, 7))}, "varies a picture"),
        (UNCLIP, {"image": PICTURE, "mask_image": MASK}, "mask_image, and .*this one varies"),
        (UNCLIP, {"image": PICTURE, "noise_level": 1000}, "noise_level is 1000"),
        (
            SD,
            {"noise_level": 3},
            r"noise_level is 3, and the model 'sd' has no use for it; expected .*unCLIP",
        ),
        (SD, {"prompt_2": "b"}, "two text encoders"),
        (SD, {"negative_prompt_2": "b"}, "two text encoders"),
        (SD, {"original_size": (8, 8)}, "size conditions"),
        (SD, {"crops_coords_top_left": (8, 8)}, "size conditions"),
        (REFINER, {"target_size": (8, 8)}, "target sizes"),
        (XL, {"aesthetic_score": 7.0}, "aesthetic scores"),
        (XL, {"original_size": 512}, "original_size is 512; expected two integers"),
        (XL, {"original_size": (512, 0)}, "original_size is 0"),
        (XL, {"target_size": "big"}, "target_size is 'big'"),
        (REFINER, {"aesthetic_score": -1}, "aesthetic_score is -1"),
        (SD, {"clip_skip": -1}, "clip_skip is -1"),
        (
            dataclasses.replace(SD, max_clip_skip=3),
            {"clip_skip": 4},
            "clip_skip is 4; expected an integer from 0 to 3",
        ),
        (SD, {"prompt_syntax": "midjourney"}, "expected one of a1111, comfyui, plain"),
        (SD, {"tile": 100}, "tile is 100; expected a multiple of 8"),
        (SD, {"denoising_end": 1.5}, "denoising_end is 1.5"),
        (
            SD,
            {"denoising_start": 0.5},
            "without an image; expected as image, the latent",
        ),
        (SD, {"denoising_start": 0.5, "denoising_end": 0.5, "image": PICTURE}, "0.5 is not before"),
    ],
)
def test_refused_by_name(manifest: Manifest, parameters: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        ask(manifest, **parameters)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("parameters", "rows"),
    [
        ({}, 10),
        ({"image": PICTURE, "strength": 0.55}, 5),  # int(10 * 0.55)
        ({"image": PICTURE, "strength": 1.0}, 10),
        ({"denoising_end": 0.8}, 8),
        ({"image": np.ones((1, 4, 5, 7)), "denoising_start": 0.8}, 2),
        ({"image": np.ones((1, 4, 5, 7)), "denoising_start": 0.5, "denoising_end": 0.8}, 3),
        ({"sampler": "heun"}, 19),
        ({"sampler": "plms"}, 11),
        ({"sampler": "plms", "denoising_end": 0.8, "num_inference_steps": 50}, 41),
        (
            {
                "image": np.ones((1, 4, 5, 7)),
                "sampler": "plms",
                "denoising_start": 0.8,
                "num_inference_steps": 50,
            },
            10,
        ),
        ({"sampler": "heun", "denoising_end": 0.8}, 16),
    ],
)
def test_the_part_of_the_schedule(parameters: dict[str, Any], rows: int) -> None:
    assert len(ask(**parameters).schedule()) == rows


@pytest.mark.parametrize(
    "change",
    [
        {"time_ids": ()},
        {"image_latents": ("mask",), "nets": {**XL.nets, "unet": XL.nets["unet_time"]}},
        {"max_clip_skip": 10**9},
        {"nets": with_vectors(class_labels="B")},
        {"nets": {**XL.nets, "text_encoder": XL.nets["unet_time"]}},
    ],
    ids=["time-ids", "image-latents", "clip-skip", "symbol", "pooled"],
)
def test_a_manifest_says_what_its_nets_take(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range or of the wrong type"):
        dataclasses.replace(XL, **change)


def test_a_schedule_from_a_stranger_takes_no_memory() -> None:
    with pytest.raises(SamplerError, match="num_train_timesteps is 1000000000000"):
        ask(dataclasses.replace(SD, scheduler={**SD.scheduler, "num_train_timesteps": 10**12}))


def test_two_parts_are_the_whole() -> None:
    whole = ask().schedule()
    first = ask(denoising_end=0.6).schedule()
    second = ask(image=np.ones((1, 4, 5, 7)), denoising_start=0.6).schedule()
    np.testing.assert_array_equal(np.concatenate([first.t, second.t]), whole.t)
    assert first.last_alpha_bar == pytest.approx(second.alpha_bar[0])
    assert (first.keeps[-1] ** 2).tolist() == pytest.approx([second.alpha_bar[0], 1 - second.alpha_bar[0]])


def test_a_schedule_of_which_nothing_is_left() -> None:
    with pytest.raises(UsageError, match=r"none is left to run \(strength 0.05\)"):
        ask(image=PICTURE, strength=0.05).schedule()


def test_a_samplers_own_refusal_stays() -> None:
    with pytest.raises(SamplerError):
        ask(sampler="eulr", image=PICTURE)
