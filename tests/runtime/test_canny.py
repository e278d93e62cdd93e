"""Edges, against OpenCV's, bit for bit."""

from __future__ import annotations

import time
from itertools import pairwise

import cv2
import numpy as np
import pytest
from PIL import Image

from latentrt.runtime.controls.canny import canny

# (H, W): a pixel, slim, odd, even, both orientations, and more rows than OpenCV gives to one thread
SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 40), (40, 1), (7, 5), (33, 57), (64, 96), (301, 240)]
# low and high: usual, equal, none, fractions, swapped, high, the most there can be in either measure
THRESHOLDS = [
    *[(100, 200), (50, 50), (0, 0), (0, 60), (10.5, 20.7), (0.5, 0.9), (200, 100)],
    *[(300, 900), (400, 1300), (1000, 2039), (2040, 2040), (1442.4, 1442.5), (1443, 5000)],
]


def assert_equal(pixels: np.ndarray) -> None:
    for low, high in THRESHOLDS:
        for l2_gradient in (False, True):
            wanted = cv2.Canny(pixels, low, high, L2gradient=l2_gradient)
            found = canny(pixels, low, high, l2_gradient=l2_gradient)
            assert (found.shape, found.dtype) == (pixels.shape[:2], np.bool_)
            np.testing.assert_array_equal(found, wanted == 255, f"{low} {high} {l2_gradient}")


def noise(size: tuple[int, int], cell: int = 1) -> np.ndarray:
    """Random colours; with cells of several pixels it has the smooth passages of a photograph."""
    coarse = (max(size[0] // cell, 1), max(size[1] // cell, 1), 3)
    pixels = np.random.default_rng(cell).integers(0, 256, coarse, np.uint8)
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return pixels if cell == 1 else np.asarray(image)


@pytest.mark.parametrize("size", SIZES)
def test_noise(size: tuple[int, int]) -> None:
    for cell in (1, 2, 5, 16):
        assert_equal(noise(size, cell))
        assert_equal(np.ascontiguousarray(noise(size, cell)[..., :1]))


@pytest.mark.parametrize("size", SIZES)
def test_equal_neighbours(size: tuple[int, int]) -> None:
    """Few shades, so that gradients tie: between neighbours, between channels, on the sectors' borders."""
    pixels = noise(size)
    assert_equal(pixels >> 7 << 7)
    assert_equal(pixels >> 6 << 6)
    assert_equal((pixels > 250).astype(np.uint8) * 255)


@pytest.mark.parametrize("slope", [(0, 1), (1, 0), (1, 1), (1, -1), (3, 5), (12, 5), (5, -12), (29, 70)])
def test_gradients(slope: tuple[int, int]) -> None:
    rows, columns = np.ogrid[:90, :70]
    ramp = rows * slope[0] + columns * slope[1]
    for period in (16, 100, 256):
        shades = ramp % period * (255 // period)
        assert_equal(np.stack([shades, shades[::-1], 255 - shades], axis=2).astype(np.uint8))


def test_shapes() -> None:
    pixels = np.full((200, 160, 3), 90, np.uint8)
    cv2.circle(pixels, (70, 90), 50, (250, 30, 30), -1)
    cv2.rectangle(pixels, (100, 20), (159, 70), (20, 120, 20), -1)  # up to the picture's edge
    cv2.line(pixels, (3, 199), (150, 80), (0, 0, 255), 1)
    cv2.ellipse(pixels, (60, 150), (40, 12), 25, 0, 360, (100, 100, 100), 3)
    assert_equal(pixels)
    assert 0.01 < canny(pixels).mean() < 0.1


def test_long_edges_are_followed_to_their_end() -> None:
    """A spiral that fills the picture, and is strong at its start alone."""
    angles = np.linspace(0, 48 * np.pi, 6000)
    places = 200 + 8 / (2 * np.pi) * angles * np.array([np.cos(angles), np.sin(angles)])
    points = places.T.round().astype(int).tolist()
    pixels = np.zeros((400, 400, 3), np.uint8)
    for number, (start, end) in enumerate(pairwise(points)):
        shade = max(160 - number // 10, 60)
        cv2.line(pixels, start, end, (shade, shade, shade), 4)
    pixels = cv2.GaussianBlur(pixels, (0, 0), 1.5)
    wanted = cv2.Canny(pixels, 20, 300)
    assert np.count_nonzero(wanted) > 500 * np.count_nonzero(cv2.Canny(pixels, 300, 300)) > 0
    np.testing.assert_array_equal(canny(pixels, 20, 300), wanted == 255)
    assert not canny(pixels, 20, 400).any()


@pytest.mark.parametrize("cell", [1, 8])
def test_a_large_picture_takes_less_than_a_second(cell: int) -> None:
    pixels = noise((1024, 1024), cell)
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        canny(pixels)
        times.append(time.perf_counter() - start)
    assert min(times) < 1
