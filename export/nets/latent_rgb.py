"""What colour a latent cell has, nearly: a linear map for previews, fitted to the checkpoint's own encoder.

Such maps are known for the published autoencoders; a fit has one for any, and costs encoding a few small
pictures in float32.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from ...engines.errors import NumericError
from ...engines.spec import Array
from ..checkpoint.open import Checkpoint

_PICTURES = 8
_CELLS = 16  # a side


def fit_latent_rgb(source: Checkpoint, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """The linear map from a latent in the UNet's scale to shades 0 ... 1 of its cell, by least squares.

    Returns:
        (C + 1, 3): a row for each channel, then the offset.

    Raises:
        NumericError: a latent is not finite.
    """
    pictures = colour_fields(_PICTURES, _CELLS * source.latent_scale, seed)
    latents = _encode(source, pictures)  # (N, C, h, w)
    if not np.isfinite(latents).all():
        raise NumericError(
            f"{source.vae.folder}: the encoder's latents are not finite in float32",
            expected="finite latents of small pictures",
            fix="Download the checkpoint again; its weights may be damaged.",
        )
    rows: Array = np.reshape(np.moveaxis(latents, 1, 3), (-1, latents.shape[1]))
    scale = pictures.shape[1] // latents.shape[2]
    blocks: Array = np.reshape(pictures, (len(pictures), _CELLS, scale, _CELLS, scale, 3))
    cells: Array = np.reshape(blocks.mean(axis=(2, 4)) / 255, (-1, 3))
    ones = np.ones((len(rows), 1))
    fit: list[list[float]] = np.linalg.lstsq(np.hstack([rows, ones]), cells, rcond=None)[0].tolist()
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in fit)


def colour_fields(count: int, side: int, seed: int) -> Array:
    """Smooth pictures of every colour: (count, side, side, 3) uint8, sums of three waves in each channel."""
    random = np.random.default_rng(seed)
    along = np.linspace(0, 2 * np.pi, side)
    waves = np.zeros((count, side, side, 3))
    for _ in range(3):
        across, down, phase = (random.uniform(-1.5, 1.5, (count, 1, 1, 3)) for _ in range(3))
        waves += np.sin(across * along[None, None, :, None] + down * along[None, :, None, None] + 2 * phase)
    low, high = (edge(waves, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    return ((waves - low) / (high - low) * 255).round().astype(np.uint8)


def _encode(source: Checkpoint, pictures: Array) -> Array:
    """The mean of each picture's latent, in torch and float32."""
    import torch

    from .build import BUILD

    net = BUILD["vae_encoder"](source, torch.float32)
    masks = np.zeros((*pictures.shape[:3], 1), np.uint8)
    with torch.no_grad():
        found: Any = net.module(*map(cast(Any, torch).from_numpy, (pictures, masks)))
    return (cast(tuple[Any, ...], found)[0] if isinstance(found, tuple) else found).numpy()
