"""The approximate colour of a latent cell: a linear map for previews, fitted to the checkpoint's own encoder.

Such maps are published for well-known autoencoders. Fitting one, by encoding a few small pictures in float32,
works for any.
"""

from __future__ import annotations

import numpy as np
import torch

from ...engines.errors import DAMAGED_WEIGHTS, NumericError
from ...engines.spec import Array
from ..checkpoint.open import Checkpoint
from .build import NETS
from .calibration import colour_fields

_PICTURES = 8
_CELLS = 16  # a side


def fit_latent_rgb(source: Checkpoint, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """The linear map from a latent cell, in the UNet's scale, to its colour in 0 ... 1, by least squares.

    Returns:
        (C + 1, 3): a row for each channel, then the offset.

    Raises:
        NumericError: a latent is not finite.
    """
    pictures = colour_fields(_PICTURES, _CELLS * source.latent_scale, seed)
    masks = np.zeros((*pictures.shape[:3], 1), np.uint8)
    encoder = NETS["vae_encoder"].build(source, torch.float32)
    latents, *_ = encoder.run({"image": pictures, "mask": masks})  # the mean: (N, C, h, w)
    if not np.isfinite(latents).all():
        raise NumericError(
            f"{source.vae.folder}: the encoder's latents are not finite in float32",
            expected="finite latents of small pictures",
            fix=DAMAGED_WEIGHTS,
        )
    rows: Array = np.reshape(np.moveaxis(latents, 1, 3), (-1, latents.shape[1]))
    scale = pictures.shape[1] // latents.shape[2]
    blocks: Array = np.reshape(pictures, (len(pictures), _CELLS, scale, _CELLS, scale, 3))
    cells: Array = np.reshape(blocks.mean(axis=(2, 4)) / 255, (-1, 3))
    ones = np.ones((len(rows), 1))
    fit: list[list[float]] = np.linalg.lstsq(np.hstack([rows, ones]), cells, rcond=None)[0].tolist()
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in fit)
