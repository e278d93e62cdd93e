"""Classifier-free guidance: how the rows of a UNet call are laid out, and how their outputs are combined."""

from __future__ import annotations

import numpy as np

from ...engines.spec import Array


def batch(rows: Array, guided: bool) -> Array:
    """(N, …) -> (B, …): the UNet's rows, with guidance each picture twice (unconditional rows first)."""
    return np.concatenate([rows, rows]) if guided else rows


def combine(prediction: Array, scale: float, rescale: float, guided: bool) -> Array:
    """One prediction per picture from the rows of a UNet call.

    Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, in the form u + scale * (c - u); with
    `rescale` > 0 the result's standard deviation is drawn towards that of the conditional rows
    (Lin et al. 2023, arXiv 2305.08891, eqs. 14 to 16).

    Args:
        prediction: (B, C, H/8, W/8), any float dtype; B = 2N if guided, else N.
        scale: guidance scale.
        rescale: phi, 0 to 1.
        guided: whether the first half of the rows is unconditional.

    Returns:
        (N, C, H/8, W/8) float32.
    """
    rows = prediction.astype(np.float32, copy=False)
    if not guided:
        return rows
    half = len(rows) // 2
    unconditional, conditional = rows[:half], rows[half:]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the loop checks the result
        combined: Array = unconditional + scale * (conditional - unconditional)
        if rescale:
            axes = tuple(range(1, rows.ndim))
            # ddof=1 as torch.std, which diffusers uses
            wanted: Array = np.std(conditional, axes, ddof=1, keepdims=True)
            found: Array = np.std(combined, axes, ddof=1, keepdims=True)
            combined = combined * (rescale * (wanted / found) + (1 - rescale))
    return combined
