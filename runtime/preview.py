"""Latents as pictures, well or quickly: for looking on, and for the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..engines.errors import NumericError, UsageError
from ..engines.package import Manifest
from ..engines.spec import DTYPES, Array
from .loop.denoise import narrow
from .loop.job import Loop
from .pictures.write import Pixels, check_pictures, to_pil
from .request.request import Request
from .request.source import Masked

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEWS = ("decoder", "tiny", "rgb", "fast")


def preview(latent: Array, kind: str, *, manifest: Manifest, loop: Loop, request: Request) -> list[Image]:
    """Clean latents (N, C, H/8, W/8) as pictures; `kind` as `Step.preview` explains.

    Raises:
        UsageError: an unknown kind, or one that the package does not have.
        NumericError: the picture is not finite.
    """
    if kind == "fast":
        kind = "tiny" if "preview_decoder" in manifest.nets else "rgb" if manifest.latent_rgb else "decoder"
    if kind == "decoder":
        images = check_finite(*loop.decode(latent, tile=request.tile))
        return [to_pil(image) for image in put_back(images, request)]
    if kind == "tiny" and "preview_decoder" in manifest.nets:
        dtype = DTYPES[manifest.net("preview_decoder").spec.inputs[0].dtype]
        decoded = loop.call("preview_decoder", latent=narrow(latent, dtype))
        return [to_pil(image) for image in check_finite(decoded["image"], decoded["mean"])]
    if kind == "rgb" and manifest.latent_rgb:
        return [to_pil(image) for image in project(latent, np.array(manifest.latent_rgb, np.float32))]
    raise UsageError(
        f"the preview {kind!r} of {manifest.name!r}",
        expected=f"one of {', '.join(PREVIEWS)}, with a tiny autoencoder for `tiny`",
        fix="Export with --tiny-vae, or choose another kind.",
    )


def project(latent: Array, latent_rgb: Array) -> Pixels:
    """One pixel per latent cell.

    Args:
        latent: (N, C, h, w).
        latent_rgb: (C + 1, 3): shades 0 ... 1 per unit of each channel, the offset last.

    Returns:
        (N, h, w, 3) uint8.
    """
    shades: Array = np.einsum("nchw,cs->nhws", latent, latent_rgb[:-1]) + latent_rgb[-1]
    return np.rint(np.minimum(np.maximum(shades, 0), 1) * 255).astype(np.uint8)


def finished(images: Array, request: Request) -> list[Image] | Array:
    """Decoded pictures (N, H, W, 3) uint8 as the request's `output_type` returns them.

    Raises:
        NumericError: a picture of one colour.
    """
    check_pictures(images)
    images = put_back(images, request)
    return images if request.output_type == "np" else [to_pil(image) for image in images]


def put_back(images: Array, request: Request) -> Array:
    """What lies outside a request's mask, put back into decoded pictures (N, H, W, 3) uint8."""
    if not isinstance(request.source, Masked):
        return images
    return np.stack([request.source.inpainting.paste(image) for image in images])


def check_finite(image: Array, mean: Array) -> Array:
    """The image (N, H, W, 3); its mean (N,), taken before clamping, shows what uint8 cannot.

    Raises:
        NumericError: a mean is NaN or infinite.
    """
    if not np.isfinite(mean).all():
        raise NumericError(
            "the decoded picture is not finite",
            expected="finite numbers",
            fix="An fp16 package may overflow: export it again with --dtype fp32.",
        )
    return image
