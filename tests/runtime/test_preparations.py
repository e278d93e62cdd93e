"""What makes control pictures, against OpenCV and SciPy; and what takes a net."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from latentrt.engines.errors import UsageError
from latentrt.runtime.controls.preparations import (
    NEED_A_NET,
    PREPARATIONS,
    READY,
    Preparation,
    find_preparation,
)

SIZES = [(1, 1), (1, 9), (5, 1), (20, 31), (64, 96), (130, 47)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def prepared(name: str, pixels: np.ndarray, **settings: Any) -> np.ndarray:
    preparation = find_preparation(name)
    result = preparation.apply(pixels, **preparation.check(settings))
    assert (result.shape, result.dtype) == (pixels.shape, np.uint8)
    return result


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("size", SIZES)
def test_canny_is_white_on_black(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    for settings in ({}, {"low": 300, "high": 700.5}, {"low": 10, "high": 900, "l2_gradient": True}):
        low, high = settings.get("low", 100), settings.get("high", 200)
        wanted = cv2.Canny(pixels, low, high, L2gradient=settings.get("l2_gradient", False))
        found = prepared("canny", pixels, **settings)
        np.testing.assert_array_equal(found, np.stack([wanted] * 3, axis=2))


def test_invert() -> None:
    pixels = noise(20, 31)
    np.testing.assert_array_equal(prepared("invert", pixels), cv2.bitwise_not(pixels))


@pytest.mark.parametrize("level", [None, 0, 60.5, 127, 255])
def test_threshold(level: float | None) -> None:
    pixels = noise(20, 31)
    darkest = cv2.min(cv2.min(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    _, wanted = cv2.threshold(darkest, 127 if level is None else level, 255, cv2.THRESH_BINARY)
    found = prepared("threshold", pixels, **({} if level is None else {"level": level}))
    np.testing.assert_array_equal(found, np.stack([wanted] * 3, axis=2))


@pytest.mark.parametrize("sigma", [9, 0.01, 0.5, 1, 3.3, 64])
@pytest.mark.parametrize("size", SIZES)
def test_blur(size: tuple[int, int], sigma: float) -> None:
    pixels = noise(*size)
    found = prepared("blur", pixels, **({} if sigma == 9 else {"sigma": sigma}))
    extent = round(6 * sigma + 1) | 1  # OpenCV's for pictures of 8 bits, here with weights of 32
    wanted = cv2.GaussianBlur(pixels.astype(np.float32), (extent, extent), sigma)
    assert np.abs(found - wanted).max() < 0.501  # rounded, and no more
    if sigma <= 9:
        assert difference(found, cv2.GaussianBlur(pixels, (0, 0), sigma)) <= 2


@pytest.mark.parametrize("rate", [1, 1.5, 2, 2.7, 4, 8, 64])
@pytest.mark.parametrize("size", SIZES)
def test_tile(size: tuple[int, int], rate: float) -> None:
    pixels = noise(*size)
    small = (max(int(size[1] / rate), 1), max(int(size[0] / rate), 1))
    area = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
    wanted = Image.fromarray(area).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    # OpenCV rounds halves up where it sums integers; enlarging adds to that
    assert difference(prepared("tile", pixels, rate=rate), np.asarray(wanted)) <= 2
    if rate == 1:
        np.testing.assert_array_equal(prepared("tile", pixels), pixels)


def places(height: int, width: int, scale: int) -> np.ndarray:
    """A picture whose red is the column and whose green is the row, times the scale."""
    rows, columns = np.mgrid[:height, :width] * scale
    return np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)


def test_shuffle_pulls_a_picture_about_smoothly() -> None:
    here = places(256, 256, 1).astype(int)
    found = prepared("shuffle", places(256, 256, 1)).astype(int)
    for one in (0, 1):  # columns, rows
        flow = found[..., one]
        assert (flow.min(), flow.max()) == (0, 255)
        assert max(np.abs(np.diff(flow, axis=axis)).max() for axis in (0, 1)) <= 5
        assert np.abs(flow - here[..., one]).mean() > 20


def test_shuffle_between_pixels_is_bilinear() -> None:
    size = (25, 26)
    x, y = np.moveaxis(prepared("shuffle", places(*size, 10))[..., :2], 2, 0) / 10  # to 1/20 of a pixel
    assert max(np.abs(np.diff(flow, 2, axis=axis)).max() for flow in (x, y) for axis in (0, 1)) < 0.4
    pixels = noise(*size)
    wanted = [ndimage.map_coordinates(pixels[..., one].astype(float), [y, x], order=1) for one in range(3)]
    apart = np.abs(prepared("shuffle", pixels) - np.stack(wanted, axis=2))
    assert apart.max() < 20  # of colours that are up to 255 apart from pixel to pixel
    assert apart.mean() < 3


@pytest.mark.parametrize("size", SIZES)
def test_shuffle_goes_by_its_seed(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    found = prepared("shuffle", pixels, seed=3)
    np.testing.assert_array_equal(found, prepared("shuffle", pixels, seed=3))
    if min(size) > 1:
        assert (found != prepared("shuffle", pixels)).any()
    grey = np.full_like(pixels, 77)
    np.testing.assert_array_equal(prepared("shuffle", grey), grey)


@pytest.mark.parametrize("preparation", [READY, PREPARATIONS["inpaint"], PREPARATIONS["repaint"]])
def test_what_leaves_the_picture_as_it_is(preparation: Preparation) -> None:
    pixels = noise(5, 7)
    np.testing.assert_array_equal(preparation.apply(pixels), pixels)


def test_the_default_of_every_setting_is_in_its_range() -> None:
    for name, preparation in PREPARATIONS.items():
        assert find_preparation(name) is preparation
        settings = {one: setting.default for one, setting in preparation.settings.items()}
        assert preparation.check(settings) == preparation.check({}) == settings
    assert find_preparation(None) is READY


@pytest.mark.parametrize(
    ("name", "settings", "found", "expected"),
    [
        ("canny", {"low": -1}, "low of canny is -1", "a number from 0 to 2040"),
        ("canny", {"high": 2041}, "high of canny is 2041", "a number from 0 to 2040"),
        ("canny", {"high": float("nan")}, "high of canny is nan", "a number from 0 to 2040"),
        ("canny", {"low": float("inf")}, "low of canny is inf", "a number from 0 to 2040"),
        ("canny", {"low": 10**400}, "low of canny is 1000", "a number from 0 to 2040"),
        ("canny", {"low": "100"}, "low of canny is '100'", "a number from 0 to 2040"),
        ("canny", {"low": True}, "low of canny is True", "a number from 0 to 2040"),
        ("canny", {"low": None}, "low of canny is None", "a number from 0 to 2040"),
        ("canny", {"l2_gradient": 1}, "l2_gradient of canny is 1", "a bool"),
        ("canny", {"lo": 1}, "canny has no setting 'lo'", "one of low, high, l2_gradient"),
        ("invert", {"low": 1}, "invert has no setting 'low'", "no setting"),
        (None, {"low": 1}, "a ready map has no setting 'low'", "no setting"),
        ("blur", {"sigma": 0}, "sigma of blur is 0", "a number from 0.01 to 64"),
        ("tile", {"rate": 0.5}, "rate of tile is 0.5", "a number from 1 to 64"),
        ("threshold", {"level": 256}, "level of threshold is 256", "a number from 0 to 255"),
        ("shuffle", {"seed": 1.0}, "seed of shuffle is 1.0", "an integer from 0 to 4294967295"),
        ("shuffle", {"seed": -1}, "seed of shuffle is -1", "an integer from 0 to 4294967295"),
    ],
)
def test_settings_out_of_range(name: str | None, settings: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_preparation(name).check(settings)
    assert caught.value.found.startswith(found)
    assert caught.value.expected == expected


def test_settings_of_other_number_types() -> None:
    found = PREPARATIONS["canny"].check({"low": np.float32(0.5), "high": np.int64(7)})
    assert found == {"low": 0.5, "high": 7.0, "l2_gradient": False}
    assert [type(value) for value in found.values()] == [float, float, bool]


@pytest.mark.parametrize(
    "name",
    [
        *["depth", "depth_midas", "Depth_Anything", "normal_bae", "openpose", "dw_openpose_full"],
        *["lineart", "lineart_anime", "mlsd", "softedge_hed", "pidinet", "teed", "seg_ofade20k"],
        *["scribble_hed", "mediapipe_face"],
    ],
)
def test_preparations_that_take_a_net_say_what_to_give(name: str) -> None:
    with pytest.raises(UsageError, match="takes a net") as caught:
        find_preparation(name)
    assert name in caught.value.found
    assert "Give the map itself, " in caught.value.fix
    assert any(looks in caught.value.fix for looks in NEED_A_NET.values())


@pytest.mark.parametrize("name", ["cany", "", "Canny", "seed", 3])
def test_unknown_preparations(name: Any) -> None:
    with pytest.raises(UsageError, match="expected one of canny, invert, ") as caught:
        find_preparation(name)
    assert repr(name) in caught.value.found
