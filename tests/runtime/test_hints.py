"""Hints, against what diffusers' ControlNet pipelines make of the same pictures; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import ExifTags, Image

from latentrt.engines.errors import UsageError
from latentrt.runtime.controls.hints import read_hints
from latentrt.runtime.pictures.resize import resize

# as in StableDiffusionControlNetPipeline, but for sizes that are no multiples of 8
CONTROL_IMAGES = VaeImageProcessor(do_convert_rgb=True, do_normalize=False, vae_scale_factor=1)
SIZES = [(64, 64), (48, 80), (33, 57), (200, 131), (7, 61), (1, 1)]
TARGETS = [(64, 64), (40, 72), (72, 40)]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(height * 1000 + width)
    return generator.integers(0, 256, (height, width, channels), np.uint8)


def of_diffusers(image: Image.Image, height: int, width: int, mode: str = "default") -> np.ndarray:
    return CONTROL_IMAGES.preprocess(image, height, width, resize_mode=mode).numpy()


def make_inpaint_condition(image: Image.Image, mask: Image.Image) -> np.ndarray:
    """That of diffusers' guide to ControlNet: (1, 3, H, W)."""
    hint = np.array(image.convert("RGB")).astype(np.float32) / 255.0
    hint[np.array(mask.convert("L")).astype(np.float32) / 255.0 > 0.5] = -1.0
    return hint[None].transpose(0, 3, 1, 2)


# ── sizes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
@pytest.mark.parametrize("size", SIZES)
def test_stretched_maps_are_those_of_diffusers(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(noise(*size)).convert(mode)
    hints = read_hints(image)
    for height, width in TARGETS:
        found = hints.at(height, width)
        assert (found.shape, found.dtype) == ((1, 3, height, width), np.float32)
        np.testing.assert_array_equal(found, of_diffusers(image, height, width))


def test_other_colour_spaces_are_left_before_resizing() -> None:
    """diffusers resizes first, which differs by up to two shades of a few pixels."""
    image = Image.fromarray(noise(48, 80)).convert("CMYK")
    apart = np.abs(read_hints(image).at(40, 72) - of_diffusers(image, 40, 72)) * 255
    assert apart.max() < 2.01
    assert (apart > 0.01).mean() < 0.01


@pytest.mark.parametrize("mode", ["RGB", "P"])
@pytest.mark.parametrize("size", SIZES)
def test_cropped_maps_are_those_of_diffusers(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(noise(*size)).convert(mode)
    hints = read_hints(image, resize_mode="crop")
    for height, width in TARGETS:
        np.testing.assert_array_equal(
            hints.at(height, width), of_diffusers(image, height, width, mode="crop")
        )


@pytest.mark.parametrize(
    ("size", "inner"),
    [
        ((64, 64), (64, 64)),
        ((32, 32), (64, 64)),
        ((50, 100), (48, 96)),
        ((100, 50), (64, 32)),
        ((1000, 1), (64, 1)),
        ((1, 1000), (1, 96)),
    ],
)
def test_padded_maps_are_whole_and_in_the_middle(size: tuple[int, int], inner: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size) | 1)  # no black
    found = read_hints(image, resize_mode="pad").at(64, 96)[0]
    rows, columns = (np.flatnonzero(found.max(axis=(0, axis)) > 0) for axis in (2, 1))
    for places, side, wanted in ((rows, 64, inner[0]), (columns, 96, inner[1])):
        assert (places[0], places[-1] + 1 - places[0]) == ((side - wanted) // 2, wanted)
    part = found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    np.testing.assert_array_equal(part, of_diffusers(image, *inner)[0])


def test_padding_makes_no_edges() -> None:
    white = np.full((40, 80, 3), 255, np.uint8)
    assert not read_hints(white, preparation="canny", resize_mode="pad").at(80, 80).any()
    assert not read_hints(white, preparation="invert", resize_mode="pad").at(80, 80).any()


def test_edges_are_found_at_the_size_that_is_drawn() -> None:
    pixels = noise(40, 60)
    hints = read_hints(pixels, preparation="canny", settings={"low": 300, "high": 800})
    for height, width in ((64, 96), (128, 192)):
        edges = cv2.Canny(resize(pixels, height, width), 300, 800)
        np.testing.assert_array_equal(hints.at(height, width), np.stack([[edges / np.float32(255)] * 3]))


# ── kinds of pictures ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["1", "P"])
def test_colours_of_a_palette_are_not_mixed(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "map.png"
    Image.fromarray(noise(40, 60)).convert(mode).save(path)
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2400) or []}
        wanted = of_diffusers(image, 64, 96)
    found = read_hints(path).at(64, 96)
    np.testing.assert_array_equal(found, wanted)
    drawn = np.rint(found[0].transpose(1, 2, 0) * 255).astype(int).reshape(-1, 3)
    assert {tuple(colour) for colour in drawn.tolist()} <= colours
    # what is prepared is a picture, not a map
    smooth = read_hints(path, preparation="tile").at(64, 96)
    with Image.open(path) as image:
        np.testing.assert_array_equal(smooth, of_diffusers(image.convert("RGB"), 64, 96))


@pytest.mark.parametrize("background", [0, 255])
def test_transparent_pixels_are_black_in_maps_and_white_in_pictures(background: int) -> None:
    strokes = np.full((8, 8, 4), 90, np.uint8)
    strokes[..., 3] = np.arange(8) * 255 // 7 > 127
    strokes[..., 3] *= 255
    opaque = strokes[..., 3:] > 0
    wanted = np.where(opaque, 90, background).repeat(3, axis=2) / np.float32(255)
    preparation = "tile" if background else None
    for source in (strokes, Image.fromarray(strokes), [Image.fromarray(strokes)]):
        found = read_hints(source, preparation=preparation).at(8, 8)
        np.testing.assert_array_equal(found[0].transpose(1, 2, 0), wanted.astype(np.float32))


def test_depths_of_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "depth.png"
    depth = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(depth).save(path)
    wanted = (depth >> 8).astype(np.float32) / 255
    np.testing.assert_array_equal(read_hints(path).at(16, 16), np.stack([[wanted] * 3]))


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise(24, 40)).save(path, exif=exif)
    upright = Image.fromarray(np.rot90(noise(24, 40), -1))
    np.testing.assert_array_equal(read_hints(path).at(40, 24), of_diffusers(upright, 40, 24))


def test_arrays() -> None:
    pixels = noise(24, 40)
    wanted = of_diffusers(Image.fromarray(pixels), 32, 32)
    for source in (
        pixels,
        pixels[None],
        [pixels],
        (pixels,),
        pixels / 255,
        (pixels / 255).astype(np.float16),
    ):
        np.testing.assert_allclose(read_hints(source).at(32, 32), wanted, atol=1.01 / 255)
    grey = pixels[..., :1]
    wanted = of_diffusers(Image.fromarray(grey[..., 0]), 32, 32)
    for source in (grey, grey[..., 0], grey / 255, grey[None]):
        np.testing.assert_array_equal(read_hints(source).at(32, 32), wanted)
    edges = grey[..., 0] > 127
    np.testing.assert_array_equal(read_hints(edges).at(24, 40), np.stack([[edges] * 3]).astype(np.float32))


def test_t46_every_picture_has_its_own_hint() -> None:
    images = [Image.fromarray(noise(*size)) for size in SIZES[:4]]
    found = read_hints(images).at(40, 72)
    assert found.shape == (4, 3, 40, 72)
    for one, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(one, of_diffusers(image, 40, 72)[0])
    batch = np.stack([noise(20, 30), noise(30, 20).transpose(1, 0, 2)])
    found = read_hints(batch).at(20, 30)
    np.testing.assert_array_equal(found, batch.transpose(0, 3, 1, 2) / np.float32(255))


# ── masks ──────────────────────────────────────────────────────────────────────────────────────────


def brush(height: int, width: int) -> Image.Image:
    shades = np.zeros((height, width), np.float32)
    cv2.circle(shades, (width // 2, height // 3), min(height, width) // 4, 255, -1)
    return Image.fromarray(cv2.GaussianBlur(shades, (0, 0), 3).astype(np.uint8))


def test_t50_inpainting_is_minus_one_exactly_where_the_mask_is_over_a_half() -> None:
    image = Image.fromarray(noise(64, 96))
    shades = Image.fromarray(np.arange(64 * 96, dtype=np.uint8).reshape(64, 96))
    for mask in (brush(64, 96), shades):
        found = read_hints(image, preparation="inpaint", mask_image=mask).at(64, 96)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, make_inpaint_condition(image, mask))
        assert 0 < (found == -1).mean() < 1
    mask = np.full((64, 96), 0.4)
    mask[:, 50:] = 0.6
    found = read_hints(image, preparation="inpaint", mask_image=mask).at(64, 96)
    np.testing.assert_array_equal(found == -1, np.broadcast_to(np.arange(96) >= 50, found.shape))


def test_t50_an_uploaded_mask_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    brush(128, 192).save(path)
    image = Image.fromarray(noise(200, 300))
    masks = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    masked = masks.preprocess(brush(128, 192), 64, 96).numpy() == 1
    found = read_hints(image, preparation="inpaint", mask_image=path).at(64, 96)
    np.testing.assert_array_equal(found, np.where(masked, -1, of_diffusers(image, 64, 96)))


def test_repainting_is_black() -> None:
    image, mask = Image.fromarray(noise(64, 96) | 1), brush(64, 96)
    found = read_hints(image, preparation="repaint", mask_image=mask).at(64, 96)
    wanted = make_inpaint_condition(image, mask)
    np.testing.assert_array_equal(found, np.where(wanted == -1, 0, wanted))


def test_masks_take_the_shape_of_their_picture() -> None:
    pixels = np.full((100, 200, 3), 255, np.uint8)
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 75:] = 255
    rows, columns = np.mgrid[:64, :64]
    kept = {
        "stretch": columns < 24,  # 75 of 200
        "crop": columns < 16,  # 25 of 100
        "pad": (columns < 24) & (rows >= 16) & (rows < 48),
    }
    for mode, white in kept.items():
        hints = read_hints(pixels, preparation="inpaint", mask_image=mask, resize_mode=mode)
        np.testing.assert_array_equal(hints.at(64, 64)[0], np.stack([np.where(white, 1, -1)] * 3))


def test_one_mask_for_all_or_one_for_each() -> None:
    images = [Image.fromarray(noise(64, 96)), Image.fromarray(noise(64, 97).copy()[:, :96])]
    masks = [brush(64, 96), brush(64, 96).transpose(Image.Transpose.ROTATE_180)]
    for mask_image, own in ((masks[0], masks[:1] * 2), (masks[:1], masks[:1] * 2), (masks, masks)):
        found = read_hints(images, preparation="inpaint", mask_image=mask_image).at(64, 96)
        for one, image, mask in zip(found, images, own, strict=True):
            np.testing.assert_array_equal(one, make_inpaint_condition(image, mask)[0])


# ── what is refused ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.full((8, 8, 3), 255.0), "control_image has values from 255 to 255"),
        (noise(8, 8) / np.float32(127.5) - 1, "control_image has values from -"),
        ([noise(8, 8), noise(8, 8) * 1.0], "control_image 2 has values from "),
        (np.full((8, 8, 3), np.nan), "control_image has values from nan to nan"),
        (noise(8, 8).astype(np.int64), "control_image has dtype int64"),
        (noise(8, 8).transpose(2, 0, 1), "control_image has shape (3, 8, 8)"),
        (noise(8, 8).transpose(2, 0, 1)[None] / 255, "control_image 1 has shape (3, 8, 8)"),
        (np.zeros((0, 8, 3), np.uint8), "control_image has shape (0, 8, 3)"),
        (np.zeros(8, np.uint8), "control_image has shape (8,)"),
        ([], "control_image has no pictures"),
        (np.zeros((0, 8, 8, 3), np.uint8), "control_image has no pictures"),
        ([[noise(8, 8)]], "control_image 1 is of type list"),
        (None, "control_image is of type NoneType"),
        ("missing.png", "control_image 'missing.png' cannot be read"),
    ],
)
def test_t47_pictures_that_are_none(image: Any, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_hints(image)
    assert caught.value.found.startswith(found)
    assert caught.value.expected
    assert caught.value.fix


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"resize_mode": "fill"}, "the resize mode of a control picture is 'fill'"),
        ({"preparation": "depth"}, "the preparation 'depth' takes a net"),
        ({"preparation": "cany"}, "the preparation is 'cany'"),
        ({"preparation": "canny", "settings": {"low": float("nan")}}, "low of canny is nan"),
        ({"settings": {"low": 100}}, "a ready map has no setting 'low'"),
        ({"preparation": "inpaint"}, "inpaint without a control_mask"),
        ({"preparation": "canny", "mask_image": brush(8, 8)}, "a control_mask with canny"),
        ({"mask_image": brush(8, 8)}, "a control_mask with a ready map"),
        ({"preparation": "inpaint", "mask_image": []}, "control_mask has no pictures"),
        ({"preparation": "inpaint", "mask_image": noise(8, 8) * 1.0}, "control_mask has values from "),
        ({"preparation": "inpaint", "mask_image": [brush(8, 8)] * 2}, "2 masks for 1 control pictures"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_hints(noise(8, 8), **options)
    assert caught.value.found.startswith(found)


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_masks_that_do_not_fit(mode: str) -> None:
    for mask, found in (
        (brush(64, 64), "control_mask has wrong mask sizes: 64 x 64 pixels for a picture of 96 x 64"),
        (np.zeros((64, 96)), "control_mask is black"),
    ):
        hints = read_hints(noise(64, 96), preparation="inpaint", mask_image=mask, resize_mode=mode)
        with pytest.raises(UsageError, match=found):
            hints.at(32, 32)


def test_slim_pictures_take_no_memory() -> None:
    with pytest.raises(UsageError, match=r"pixels become .* at the same aspect ratio"):
        read_hints(noise(5000, 1), resize_mode="crop").at(1024, 1024)
