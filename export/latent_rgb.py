"""The colours of latents, for previews, of an autoencoder that nobody has published them for."""

from __future__ import annotations

import numpy as np
import torch

from ..checkpoints.files.open import Checkpoint
from ..checkpoints.precision.calibration import colour_fields
from ..engines import spec
from ..engines.errors import DAMAGED_WEIGHTS, NumericError
from .nets.build import NETS

# What the map is fitted to: so many pictures, of so many latent cells a side.
_PICTURES, _CELLS = 8, 16


def fit_latent_rgb(source: Checkpoint, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """The approximate colour of a latent cell, for previews: a linear map to 0 ... 1, by least squares.

    Such maps are published for well-known autoencoders. Fitting one to the checkpoint's own encoder, by
    encoding a few small pictures in float32, works for any.

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
    rows: spec.Array = np.reshape(np.moveaxis(latents, 1, 3), (-1, latents.shape[1]))
    scale = pictures.shape[1] // latents.shape[2]
    blocks: spec.Array = np.reshape(pictures, (len(pictures), _CELLS, scale, _CELLS, scale, 3))
    cells: spec.Array = np.reshape(blocks.mean(axis=(2, 4)) / 255, (-1, 3))
    ones = np.ones((len(rows), 1))
    fit: list[list[float]] = np.linalg.lstsq(np.hstack([rows, ones]), cells, rcond=None)[0].tolist()
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in fit)
