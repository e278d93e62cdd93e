"""The first latent of a run: noise, or a picture with as much noise as the schedule begins with.

Noise is drawn in diffusers' order, so that a seed means the same: for a picture's posterior, for the first
latent, and with a mask for the masked picture's posterior, even where that is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from ..engines.package import Manifest
from ..engines.spec import Array
from .loop.calls import Pause
from .loop.denoise import guided_batch
from .loop.job import Kept
from .pictures.mask import latent_mask
from .request.request import Request, latent_shape
from .request.source import Latents, Masked, Pictures, Varied
from .sampling.noise import NoiseSource
from .sampling.table import Table

# image (N, H, W, 3) and mask (N, H, W, 1) uint8 -> mean and, where there is a posterior, std (N, C, h, w),
# at the end of the pauses in which others have their turn
Encode = Callable[[Array, Array], Generator[Pause, None, tuple[Array, ...]]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """The parts of a `job.DenoiseJob` that depend on what the run starts from."""

    first: Array
    image_latents: Array | None = None
    kept: Kept | None = None


def make_start(
    request: Request, manifest: Manifest, table: Table, source: NoiseSource, encode: Encode
) -> Generator[Pause, None, Start]:
    """Make the first latent, and what stays the same in every step; drawing noise advances `source`.

    Yields what `encode` yields.
    """
    shape = latent_shape(manifest, request.height, request.width)

    def noise() -> Array:
        return source.draw(shape) if request.latents is None else request.latents

    def encoded(pixels: Array, mask: Array | None = None) -> Generator[Pause, None, Array]:
        """(N, C, h, w): a sample of every picture's posterior. If all pictures are equal, one is encoded."""
        hidden = np.zeros((*pixels.shape[:3], 1), np.uint8) if mask is None else mask
        one = slice(1 if (pixels == pixels[:1]).all() else None)
        mean, *deviation = yield from encode(pixels[one], hidden[one])
        drawn = mean + deviation[0] * source.draw(shape) if deviation else mean
        return np.broadcast_to(drawn, (len(pixels), *shape)).astype(np.float32)

    match request.source:
        case None | Varied():
            return Start(first=table.init * noise())
        case Latents(latents=clean):
            return _from_latent(request, clean, noise, table)
        case Pictures(pixels=pixels):
            return _from_latent(request, (yield from encoded(pixels)), noise, table)
        case Masked() as masked if manifest.image_latents:
            return (yield from _with_channels(request, masked, manifest, table, noise, encoded))
        case Masked(pixels=pixels) as masked:
            clean = yield from encoded(pixels)
            drawn = noise()
            if len(manifest.net("vae_encoder").spec.outputs) > 1:
                source.draw(shape)  # diffusers encodes the masked picture here as well
            first = table.init * drawn if masked.strength == 1 else _noised(clean, drawn, table)
            mask = _mask(masked, manifest.latent_scale)
            return Start(first=first, kept=Kept(latent=clean, noise=drawn, mask=mask))


def _from_latent(request: Request, clean: Array, noise: Callable[[], Array], table: Table) -> Start:
    """Add noise to a clean latent, unless it still has the noise that another model left in it."""
    return Start(first=clean if request.denoising_start is not None else _noised(clean, noise(), table))


def _with_channels(
    request: Request,
    masked: Masked,
    manifest: Manifest,
    table: Table,
    noise: Callable[[], Array],
    encoded: Callable[..., Generator[Pause, None, Array]],
) -> Generator[Pause, None, Start]:
    """The start of an inpainting UNet, which sees mask and masked picture behind the latent in every step."""
    from_noise = masked.strength == 1
    clean = None if from_noise else (yield from encoded(masked.pixels))
    drawn = noise()
    hidden = np.where(masked.inpainting.mask, np.uint8(255), np.uint8(0))[None, ..., None]  # (1, H, W, 1)
    seen = yield from encoded(masked.pixels, np.repeat(hidden, len(drawn), axis=0))
    parts = {"mask": _mask(masked, manifest.latent_scale), "masked_image": seen}
    channels = np.concatenate([parts[name] for name in manifest.image_latents], axis=1)
    return Start(
        first=table.init * drawn if clean is None else _noised(clean, drawn, table),
        image_latents=guided_batch(channels, request.guided),
    )


def _noised(clean: Array, noise: Array, table: Table) -> Array:
    """The clean latent with as much noise as the first row expects, variance-preserving."""
    signal = float(table.alpha_bar[0])
    return signal**0.5 * clean + (1 - signal) ** 0.5 * noise


def _mask(masked: Masked, scale: int) -> Array:
    """(N, 1, H/8, W/8) float32, 1 where the picture is repainted."""
    mask = latent_mask(masked.inpainting.mask, scale)
    return np.repeat(mask[None, None], len(masked.pixels), axis=0)
