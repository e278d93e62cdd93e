"""Masks, regions and pasting, against diffusers' processors; outside the mask exactly the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.mask import Inpainting, crop_region, latent_mask, plan_inpainting, read_mask

# as in StableDiffusionInpaintPipeline
IMAGES = VaeImageProcessor()
MASKS = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def brushed(height: int, width: int, *, soft: bool = False) -> Image.Image:
    """A white stroke and a dot on black."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    draw.ellipse((width * 0.5, height * 0.3, width * 0.8, height * 0.55), fill=255)
    draw.line((width * 0.4, height * 0.5, width * 0.6, height * 0.7), fill=255, width=3)
    return MASKS.blur(mask, 3) if soft else mask


def as_bools(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.numpy()[0, 0]
    assert set(np.unique(array)) <= {0.0, 1.0}
    return array == 1


# ── masks ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(96, 64), (192, 128), (48, 32), (97, 65), (300, 200)])
def test_masks_are_those_of_diffusers(size: tuple[int, int], soft: bool) -> None:
    mask = brushed(*size, soft=soft)
    coloured = Image.merge("RGB", [mask, mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM), mask])
    for image in (mask, coloured):
        found = read_mask(image, 96, 64)
        np.testing.assert_array_equal(found, as_bools(MASKS.preprocess(image, 96, 64)))
        assert found.any()
        assert not found.all()


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
def test_masks_are_resized_like_their_picture(mode: str) -> None:
    mask = brushed(97, 65, soft=True)
    found = read_mask(mask, 96, 96, image_size=(194, 130), resize_mode=mode)
    np.testing.assert_array_equal(found, as_bools(MASKS.preprocess(mask, 96, 96, resize_mode=mode)))


def test_the_middle_grey_is_kept() -> None:
    shades = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(read_mask(shades, 16, 16), shades / 255 >= 0.5)
    np.testing.assert_array_equal(read_mask(shades >= 200, 16, 16), shades >= 200)
    assert read_mask(np.full((16, 16), 1.0), 16, 16).all()


def test_what_nobody_painted_is_kept() -> None:
    strokes = np.full((16, 16, 4), 255, np.uint8)
    strokes[:, 5:, 3] = 0  # transparent, but white below, as some programs save it
    found = read_mask(Image.fromarray(strokes), 16, 16)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(16) < 5, (16, 16)))


@pytest.mark.parametrize(
    ("mask", "image", "fits"),
    [
        ((64, 96), (128, 192), True),
        ((128, 192), (64, 96), True),
        ((512, 512), (64, 64), True),
        ((67, 101), (512, 768), True),  # 512 x 768 at 101 of width is 67.33 high
        ((400, 601), (64, 96), True),
        ((64, 96), (96, 64), False),
        ((64, 64), (64, 96), False),
        ((66, 96), (64, 96), False),
        ((512, 520), (512, 512), False),
        ((100, 104), (512, 512), False),
    ],
)
def test_masks_of_another_size(mask: tuple[int, int], image: tuple[int, int], fits: bool) -> None:
    source = np.full(mask, 255, np.uint8)
    if fits:
        assert read_mask(source, *image).shape == image
        assert read_mask(source, 64, 64, image_size=image).shape == (64, 64)
        return
    for sizes in ({}, {"image_size": image}):
        message = f"init has wrong mask sizes: {mask[1]} x {mask[0]} .* of {image[1]} x {image[0]}; "
        with pytest.raises(UsageError, match=message):
            read_mask(source, *image, **sizes, name="init")


def test_masks_with_nothing_to_repaint() -> None:
    with pytest.raises(UsageError, match=r"mask_image is black at the size that is drawn, 16 x 8"):
        read_mask(np.zeros((8, 16), np.uint8), 8, 16)
    thin = np.zeros((512, 512), np.uint8)
    thin[100] = 255
    with pytest.raises(UsageError, match="paint with a larger brush"):
        read_mask(thin, 64, 64)
    with pytest.raises(
        UsageError, match="paint with a larger brush"
    ):  # no region helps: it is the whole width
        plan_inpainting(noise(512, 512), thin, 64, 64, padding_mask_crop=0)


def test_masks_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"mask_image 'missing\.png' cannot be read"):
        read_mask("missing.png", 8, 8)


@pytest.mark.parametrize("scale", [4, 8])
def test_latent_masks_are_those_of_torch(scale: int) -> None:
    for size in [(64, 96), (72, 40), (8, 8)]:
        mask = np.random.default_rng(1).random(size) < 0.5
        wanted = torch.nn.functional.interpolate(
            torch.from_numpy(mask)[None, None].float(), size=(size[0] // scale, size[1] // scale)
        )
        found = latent_mask(mask, scale)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.numpy()[0, 0])


# ── regions ────────────────────────────────────────────────────────────────────────────────────


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    drawn=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    pad=st.integers(0, 30),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=250, deadline=None)
def test_regions_are_those_of_diffusers(
    size: tuple[int, int], drawn: tuple[int, int], pad: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, bool)
    top, left = generator.integers(0, size)
    bottom, right = generator.integers((top, left), size) + 1
    mask[top:bottom, left:right] = generator.random((bottom - top, right - left)) < 0.3
    mask[top, left] = True
    width, height = drawn[0] * 64, drawn[1] * 64
    wanted = MASKS.get_crop_region(Image.fromarray(mask), width, height, pad)
    assert crop_region(mask, width, height, pad) == wanted
    left, top, right, bottom = wanted
    assert mask[top:bottom, left:right].sum() == mask.sum()


# ── what is drawn, and pasted ──────────────────────────────────────────────────────────────────


def drawn_over(plan: Inpainting) -> np.ndarray:
    return noise(*plan.mask.shape, seed=7)


@pytest.mark.parametrize("size", [(96, 64), (192, 128), (150, 150)])
def test_the_original_comes_back_outside_the_mask(size: tuple[int, int]) -> None:
    image, mask = noise(*size), brushed(*size)
    plan = plan_inpainting(image, mask, 96, 64)
    shown = IMAGES.preprocess(Image.fromarray(image), 96, 64)
    assert torch.equal(to_floats(plan.pixels), shown)
    np.testing.assert_array_equal(plan.mask, as_bools(MASKS.preprocess(mask, 96, 64)))
    assert (plan.region, plan.blur) == (None, 0)
    drawn = drawn_over(plan)
    result = plan.paste(drawn)
    assert (result.shape, result.dtype) == ((96, 64, 3), np.uint8)
    np.testing.assert_array_equal(result[~plan.mask], plan.pixels[~plan.mask])
    np.testing.assert_array_equal(result[plan.mask], drawn[plan.mask])


def to_floats(pixels: np.ndarray) -> torch.Tensor:
    return 2 * torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None] - 1


@pytest.mark.parametrize("padding", [0, 5, 32, 500])
@pytest.mark.parametrize("size", [(96, 64), (200, 333), (64, 64), (51, 97)])
@pytest.mark.parametrize("drawn_size", [(64, 64), (96, 40)])
def test_padding_crop_is_that_of_diffusers(
    size: tuple[int, int], drawn_size: tuple[int, int], padding: int
) -> None:
    height, width = drawn_size
    image, mask = Image.fromarray(noise(*size)), brushed(*size)
    plan = plan_inpainting(image, mask, height, width, padding_mask_crop=padding)
    region = MASKS.get_crop_region(mask, width, height, padding)
    wanted: dict[str, Any] = {"height": height, "width": width, "resize_mode": "fill", "crops_coords": region}
    assert plan.region == region
    assert torch.equal(to_floats(plan.pixels), IMAGES.preprocess(image, **wanted))
    np.testing.assert_array_equal(plan.mask, as_bools(MASKS.preprocess(mask, **wanted)))
    drawn = drawn_over(plan)
    result = plan.paste(drawn)
    overlaid = IMAGES.apply_overlay(mask, image, Image.fromarray(drawn), region)
    np.testing.assert_array_equal(result, np.asarray(overlaid))
    kept = np.asarray(mask) == 0
    np.testing.assert_array_equal(result[kept], np.asarray(image)[kept])
    assert (result[~kept] != np.asarray(image)[~kept]).mean() > 0.9


def test_a_mask_of_another_size_is_brought_to_the_picture_before_the_crop() -> None:
    image = noise(200, 100)
    plan = plan_inpainting(image, brushed(400, 200), 64, 64, padding_mask_crop=4)
    np.testing.assert_array_equal(plan.repainted, read_mask(brushed(400, 200), 200, 100))
    assert plan.paste(drawn_over(plan)).shape == image.shape
    with pytest.raises(UsageError, match="wrong mask sizes: 100 x 100 pixels for a picture of 100 x 200"):
        plan_inpainting(image, brushed(100, 100), 64, 64, padding_mask_crop=4)
    with pytest.raises(UsageError, match="wrong mask sizes: 100 x 100 pixels for a picture of 100 x 200"):
        plan_inpainting(image, brushed(100, 100), 64, 64)


@pytest.mark.parametrize("padding", [None, 40])
def test_blur_softens_the_edge(padding: int | None) -> None:
    image, mask = Image.fromarray(noise(96, 96)), brushed(96, 96)
    plan = plan_inpainting(image, mask, 96, 96, padding_mask_crop=padding, mask_blur=3)
    drawn = drawn_over(plan)
    result = plan.paste(drawn)
    soft = MASKS.blur(mask, 3)
    overlaid = IMAGES.apply_overlay(soft, image, Image.fromarray(drawn), plan.region)
    # diffusers premultiplies in 8 bits, which costs up to two shades
    assert np.abs(result.astype(int) - np.asarray(overlaid)).max() <= 2
    share = np.asarray(soft)
    np.testing.assert_array_equal(result[share == 0], np.asarray(image)[share == 0])
    if padding is None:
        np.testing.assert_array_equal(result[share == 255], drawn[share == 255])
    assert ((share > 0) & (share < 255)).mean() > 0.05
    np.testing.assert_array_equal(
        plan.mask, plan_inpainting(image, mask, 96, 96, padding_mask_crop=padding).mask
    )


def test_blur_beyond_the_region_finds_the_original() -> None:
    white = np.full((96, 96, 3), 255, np.uint8)
    plan = plan_inpainting(white, brushed(96, 96), 64, 64, padding_mask_crop=0, mask_blur=8)
    np.testing.assert_array_equal(plan.paste(np.full((64, 64, 3), 255, np.uint8)), white)
