"""How alike two arrays are, against torchmetrics' published figure, closed forms, and scipy's filters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from latentrt.benchmarks.likeness import difference, psnr, ssim


def scipy_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of (H, W, C): Wang's index written with the variances as second moments about the local mean."""

    def smooth(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5, axes=(0, 1))  # 5 pixels to each side

    x, y = x.astype(float), y.astype(float)
    mean = smooth(x), smooth(y)
    square, cross = smooth(x**2 + y**2) - mean[0] ** 2 - mean[1] ** 2, smooth(x * y) - mean[0] * mean[1]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean[0] * mean[1] + c1) * (2 * cross + c2)
    index /= (mean[0] ** 2 + mean[1] ** 2 + c1) * (square + c2)
    return float(index[5:-5, 5:-5].mean())


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(2, 48, 64, 3) uint8, with edges and with noise."""
    random = np.random.default_rng(0)
    image = Image.new("RGB", (64, 48), (40, 90, 200))
    image.paste((230, 30, 10), (10, 8, 40, 33))
    noise = random.integers(0, 256, (48, 64, 3))
    return np.stack([np.asarray(image), noise]).astype(np.uint8)


def test_ssim_of_torchmetrics_documentation() -> None:
    """https://lightning.ai/docs/torchmetrics/stable/image/structural_similarity.html: tensor(0.9219)."""
    found = torch.rand([3, 3, 256, 256], generator=torch.Generator().manual_seed(42))
    found = found.permute(0, 2, 3, 1).numpy()
    assert ssim(found, found * 0.75, peak=1.0) == pytest.approx(0.9219, abs=2e-4)


def test_ssim_is_scipys(pictures: np.ndarray) -> None:
    random = np.random.default_rng(1)
    for deviation in (1, 8, 60):
        other = np.clip(pictures + random.normal(0, deviation, pictures.shape), 0, 255).astype(np.uint8)
        wanted = [scipy_ssim(x, y) for x, y in zip(pictures, other, strict=True)]
        assert wanted[0] != pytest.approx(wanted[1], abs=1e-3)
        assert ssim(pictures, other) == pytest.approx(min(wanted), abs=1e-9)


def test_ssim_of_equal_negative_and_other_pictures(pictures: np.ndarray) -> None:
    assert ssim(pictures, pictures) == 1
    assert ssim(pictures, 255 - pictures) < 0
    assert ssim(pictures, pictures[:1]) == -1
    assert ssim(np.full_like(pictures, np.nan, dtype=float), pictures) == -1


def test_psnr() -> None:
    one = np.zeros((2, 4, 4, 3), np.uint8)
    other = one.copy()
    other[1] += 255
    assert psnr(one, other) == 0
    assert psnr(one, one) == float("inf")
    assert psnr(one, one[:1]) == -float("inf")


def test_difference() -> None:
    wanted = np.array([3.0, -4.0], np.float32)
    found = difference("prediction", wanted + np.array([0, 0.5], np.float32), wanted)
    assert found["relative_l2"] == pytest.approx(0.1)
    assert found["max_error"] == 0.5
    assert found["psnr_db"] == pytest.approx(10 * math.log10(4**2 / (0.5**2 / 2)))
    found = difference("mean", np.array([1e-6, 0.0]), np.zeros(2))
    assert found["relative_l2"] == pytest.approx(1e-6 / math.sqrt(2)), "in its own unit"
    worst = {"relative_l2": math.inf, "max_error": math.inf, "psnr_db": -math.inf}
    for other in (np.array([np.nan, 0]), np.zeros(3)):
        assert difference("image", other, np.zeros(2)) == worst
