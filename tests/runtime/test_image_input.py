"""Pictures that somebody hands in: what is read of files, Pillow images and arrays, and what is refused."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import ExifTags, Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.read import FORMATS, MAX_FILE_SIZE, read_image
from tests.runtime.picture_files import RGB, SMOOTH, encoded, png

GENERATOR = np.random.default_rng(1)


def same(one: np.ndarray, other: Any) -> None:
    assert one.dtype == np.uint8
    assert one.flags.writeable
    np.testing.assert_array_equal(one, np.asarray(other))


# ── what is read ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"  # its content tells the format, not its name
    path.write_bytes(encoded(kind, **{"lossless": True} if kind == "WEBP" else {}))
    with Image.open(path) as opened:
        wanted = np.asarray(opened.convert("RGB"))
        if kind not in ("JPEG", "GIF"):
            np.testing.assert_array_equal(wanted, SMOOTH)
        for source in (path, str(path), opened):
            same(read_image(source), wanted)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encoded(kind, exif=exif))
    with Image.open(path) as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    assert wanted.size == ((24, 40) if orientation in (5, 6, 7, 8) else (40, 24))
    same(read_image(path), wanted)
    with Image.open(path) as opened:
        same(read_image(opened), wanted)
        same(read_image(opened), wanted)  # the caller's picture was not turned


def palette_picture(**info: Any) -> Image.Image:
    image = RGB.quantize(8)
    image.info |= info
    return image


ALPHA = Image.fromarray(GENERATOR.integers(0, 256, (24, 40), np.uint8))
TRANSPARENT = {
    "RGBA": Image.merge("RGBA", [*RGB.split(), ALPHA]),
    "LA": Image.merge("LA", [RGB.getchannel("R"), ALPHA]),
    "PA": Image.merge("RGBA", [*RGB.split(), ALPHA]).convert("PA"),
    "one colour of a palette": palette_picture(transparency=3),
    "alpha for every colour": palette_picture(transparency=bytes(range(0, 256, 32))),
    "one grey": RGB.convert("L"),
    "one colour": RGB.copy(),
}
TRANSPARENT["one grey"].info["transparency"] = int(SMOOTH[0, 0, 0])
TRANSPARENT["one colour"].info["transparency"] = tuple(map(int, SMOOTH[5, 5]))


@pytest.mark.parametrize("name", TRANSPARENT)
def test_alpha_is_laid_over_white(name: str) -> None:
    wanted = convert_to_rgb(TRANSPARENT[name], return_numpy=True)
    same(read_image(TRANSPARENT[name]), wanted)
    assert (read_image(TRANSPARENT[name], background=0) != wanted).any()


def test_alpha_over_another_grey() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, 0] = 200, 100, 50, 255
    pixels[0, 2] = 255, 255, 255, 100
    same(read_image(pixels, background=0), [[[200, 100, 50], [0, 0, 0], [100, 100, 100]]])
    same(read_image(pixels, background=7)[:, 1:2], [[[7, 7, 7]]])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes(mode: str) -> None:
    image = RGB.convert(mode)
    same(read_image(image), image.convert("RGB"))


def test_cmyk_files(tmp_path: Path) -> None:
    for kind in ("JPEG", "TIFF"):
        path = tmp_path / "picture"
        path.write_bytes(encoded(kind, RGB.convert("CMYK")))
        with Image.open(path) as opened:
            same(read_image(path), opened.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_lose_the_lower_8(tmp_path: Path, kind: str) -> None:
    shades = GENERATOR.integers(0, 2**16, (24, 40)).astype(np.uint16)
    shades[0, :4] = 0, 255, 256, 65535
    path = tmp_path / "picture"
    path.write_bytes(encoded(kind, Image.fromarray(shades)))
    wanted = np.repeat((shades >> 8).astype(np.uint8)[..., None], 3, axis=2)
    same(read_image(path), wanted)
    same(read_image(Image.fromarray(shades.astype(np.int32))), wanted)  # what older Pillows make of it
    # Pillow itself does so with colours: three equal 16-bit channels
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in shades)
    path.write_bytes(png(40, 24, zlib.compress(rows), depth=16))
    with Image.open(path) as opened:
        same(read_image(path), opened)
        same(np.array(opened), wanted)


@pytest.mark.parametrize("shades", [np.full((2, 2), 65536), np.full((2, 2), -1), np.full((2, 2), 0.5)])
def test_greys_without_a_white(shades: np.ndarray) -> None:
    image = Image.fromarray(shades.astype(np.float32 if shades.dtype.kind == "f" else np.int32))
    with pytest.raises(UsageError, match=r"image has grey values from .* in Pillow's mode [FI]"):
        read_image(image)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    (tmp_path / "p").write_bytes(
        encoded(kind, frames[0], **options, **{"lossless": True} if kind == "WEBP" else {})
    )
    same(read_image(tmp_path / "p"), frames[0])


# ── arrays ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_floats_are_diffusers_output(dtype: Any, channels: int) -> None:
    floats = GENERATOR.random((5, 7, channels)).astype(dtype)
    floats[0, 0], floats[0, 1] = 0, 1
    if channels == 3:
        (wanted,) = VaeImageProcessor.numpy_to_pil(floats)
        same(read_image(floats), wanted)
    else:
        same(read_image(floats)[..., :1], (floats * 255).round())
        same(read_image(floats[..., 0]), read_image(floats))


def test_arrays_of_bytes_and_of_bools() -> None:
    same(read_image(SMOOTH), SMOOTH)
    same(read_image(SMOOTH[::-1, ::2]), SMOOTH[::-1, ::2])
    same(read_image(SMOOTH[..., 0]), np.repeat(SMOOTH[..., :1], 3, axis=2))
    marks = SMOOTH[..., 0] > 99
    same(read_image(marks)[..., 1], marks * 255)
    rgba = np.dstack([SMOOTH, np.asarray(ALPHA)])
    same(read_image(rgba), convert_to_rgb(Image.fromarray(rgba), return_numpy=True))
    copy = read_image(source := SMOOTH.copy())
    copy[:] = 0
    np.testing.assert_array_equal(source, SMOOTH)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 2), np.uint8), r"has shape \(8, 8, 2\); expected \(H, W\), \(H, W, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"has shape \(3, 8, 8\).*channels last\."),
        (np.zeros((1, 8, 8, 3), np.uint8), r"has shape \(1, 8, 8, 3\).*images\[0\]"),
        (np.zeros(8, np.uint8), r"has shape \(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), r"has shape \(0, 8, 3\)"),
        (np.zeros((8, 0), np.float32), r"has shape \(8, 0\)"),
        (np.zeros((8, 8, 3), np.int64), "has dtype int64"),
        (np.zeros((8, 8, 3), np.complex64), "has dtype complex64"),
        (np.full((8, 8, 3), "x"), "has dtype <U1"),
        (np.full((8, 8, 3), np.nan), "has values from nan to nan"),
        (np.full((8, 8, 3), np.inf), "has values from inf to inf"),
        (np.full((8, 8, 3), 255.0), "has values from 255 to 255"),
        (np.linspace(-1, 1, 64).reshape(8, 8), "has values from -1 to 1"),
    ],
)
def test_arrays_that_are_no_picture(array: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match="init " + message):
        read_image(array, name="init")


# ── what is refused ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("source", [None, 3, b"picture", [SMOOTH], io.BytesIO(encoded("PNG"))])
def test_other_types(source: Any) -> None:
    with pytest.raises(UsageError, match=f"image is of type {type(source).__name__}; expected a path"):
        read_image(source)


@pytest.mark.parametrize("name", ["missing.png", ".", "pipe", "nul\0", "n" * 300])
def test_paths_without_a_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"init .* cannot be read: .*expected a whole picture"):
        read_image(tmp_path / name, name="init")


def test_files_that_are_too_large(tmp_path: Path) -> None:
    with open(tmp_path / "p.png", "wb") as file:
        file.write(encoded("PNG"))
        file.truncate(MAX_FILE_SIZE + 1)  # sparse
    with pytest.raises(UsageError, match="bytes, more than 536870912"):
        read_image(tmp_path / "p.png")


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA", "PDF", "JPEG2000", "AVIF", "EPS"])
def test_formats_that_are_not_opened(tmp_path: Path, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    (tmp_path / "p.png").write_bytes(encoded(kind))
    with pytest.raises(UsageError, match="expected a whole picture of at most 67 megapixels, as PNG, JPEG"):
        read_image(tmp_path / "p.png")


def test_a_picture_without_pixels() -> None:
    with pytest.raises(UsageError, match="image has 0 x 5 pixels; expected 1 pixel or more"):
        read_image(Image.new("RGB", (0, 5)))


def test_a_mode_that_pillow_cannot_convert() -> None:
    with pytest.raises(UsageError, match="image cannot be read: conversion from La"):
        read_image(Image.new("La", (2, 2)))


def test_a_truncated_picture_that_somebody_else_opened(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded("PNG")[:-200])
    with Image.open(tmp_path / "p.png") as opened, pytest.raises(UsageError, match="image cannot be read: "):
        read_image(opened)
