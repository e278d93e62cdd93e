"""How alike two arrays are: relative L2, largest error, PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np

from ..engines.spec import Array

# Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", section III.
WINDOW, _SIGMA = 11, 1.5  # pixels
_K1, _K2 = 0.01, 0.03


def psnr(found: Array, wanted: Array, peak: float = 255.0) -> float:
    """In dB, of the worst picture of (N, …); infinite for equal ones, minus infinity for other shapes."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return -math.inf
    difference = found.astype(np.float64) - wanted
    worst = max(float((one**2).mean()) for one in difference)
    return math.inf if worst == 0 else 10 * math.log10(peak**2 / worst)


def ssim(found: Array, wanted: Array, peak: float = 255.0) -> float:
    """The mean structural similarity (Wang et al. 2004, equation 13) of the worst picture of (N, H, W, C).

    A window of 11x11 pixels weighted by a Gaussian, wherever it fits: no picture is smaller. Channels count
    alike.

    Returns:
        1 for equal pictures, less for others; -1, the least there is, for other shapes and for values
        that are not finite.
    """
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return -1.0
    x, y = found.astype(np.float64), wanted.astype(np.float64)
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    mean_x, mean_y = _weighted(x), _weighted(y)
    covariance = _weighted(x * y) - mean_x * mean_y
    variances = _weighted(x * x) - mean_x**2 + _weighted(y * y) - mean_y**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * covariance + c2) / (variances + c2)).mean(axis=(1, 2, 3)).min())


def _weighted(values: Array) -> Array:
    """The mean around each pixel, (N, H, W, C) -> (N, H-10, W-10, C); the Gaussian is separable."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    windows = np.lib.stride_tricks.sliding_window_view
    rows = windows(values, WINDOW, axis=1) @ weights
    return np.asarray(windows(rows, WINDOW, axis=2) @ weights, np.float64)


def difference(name: str, found: Array, wanted: Array) -> dict[str, float]:
    """`relative_l2`, `max_error` and `psnr_db` over a whole output; infinite where it is not finite."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return {"relative_l2": math.inf, "max_error": math.inf, "psnr_db": -math.inf}
    error = np.abs(a - b)
    # The mean over a picture may be nothing at all: it is measured against the pixels' own unit.
    size = math.sqrt(b.size) if name == "mean" else max(float(np.linalg.norm(b)), 1e-30)
    peak = 255.0 if wanted.dtype == np.uint8 else max(float(np.abs(b).max()), 1e-30)
    return {
        "relative_l2": float(np.linalg.norm(error)) / size,
        "max_error": float(error.max()),
        "psnr_db": psnr(a[None], b[None], peak),
    }
