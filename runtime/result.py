"""Latents as pictures, for looking on and for the end, and the record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import NumericError, UsageError, numeric_fix
from ..engines.package import Manifest
from ..engines.spec import DTYPES, Array
from .loop.denoise import narrow
from .loop.job import Loop
from .pictures.write import Pixels, format_infotext, save_picture, to_pil
from .request.request import Request
from .request.source import Masked, Varied
from .sampling.config import SamplerConfig
from .sampling.names import a1111_name

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEWS = ("decoder", "tiny", "rgb", "fast")


def _sampler_record(config: SamplerConfig) -> dict[str, Any]:
    """Name, diffusers class, and every option that differs from our default; the betas are the model's."""
    options = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "noise"}
    defaults = {item.name: item.default for item in fields(config)}
    return {name: value for name, value in options.items() if name == "eta" or value != defaults[name]}


def _strength(request: Request) -> float | None:
    """The strength of what the run started from; a latent that another model left has none."""
    return None if request.denoising_start is not None else request.strength


def _of_some(request: Request, index: int) -> dict[str, Any]:
    """What only some requests have, and this one does."""
    masked = request.source if isinstance(request.source, Masked) else None
    values: dict[str, Any] = {
        "prompt_2": request.prompts_2[index],
        "negative_prompt_2": request.negative_prompts_2[index],
        "clip_skip": request.clip_skip or None,
        "strength": _strength(request),
        "mask_region": masked.inpainting.region if masked else None,
        "mask_blur": masked.inpainting.blur or None if masked else None,
        "noise_level": request.noise_level if isinstance(request.source, Varied) else None,
        "timesteps": request.timesteps,
        "sigmas": request.sigmas,
        "denoising_start": request.denoising_start,
        "denoising_end": request.denoising_end,
        "sizes": dict(request.sizes.positive) or None,
        "negative_sizes": dict(request.sizes.negative) or None,
        "tile": request.tile,
    }
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Pictures of one call.

    Attributes:
        images: N PIL images (`output_type="pil"`), or an array: (N, H, W, 3) uint8 for "np",
            (N, C, H/8, W/8) float32 for "latent".
        request: what was asked, with every default filled in.
        seconds: wall time per stage.
        producer: package, backend and release, for the record.
    """

    images: list[Image] | Array
    request: Request
    seconds: Mapping[str, float]
    producer: Mapping[str, str]

    def record(self, index: int = 0) -> dict[str, Any]:
        """How picture `index` was made, as JSON: every parameter that was given as a value.

        Pictures, latents and callbacks are not in it, nor the betas of a scheduler config with its own.
        """
        request = self.request
        return {
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompts[index],
            "prompt_syntax": request.prompt_syntax,
            "seed": request.seeds[index],
            "rng": request.rng,
            "sampler": _sampler_record(request.sampler),
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "guidance_rescale": request.guidance_rescale,
            "height": request.height,
            "width": request.width,
            **_of_some(request, index),
            **self.producer,
        }

    def infotext(self, index: int = 0) -> str:
        """The `parameters` text of AUTOMATIC1111 for picture `index`."""
        request = self.request
        sampler, schedule = a1111_name(request.sampler)
        return format_infotext(
            {
                "prompt": request.prompts[index],
                "negative_prompt": request.negative_prompts[index] or "",
                "Steps": request.num_inference_steps,
                "Sampler": sampler,
                "Schedule type": schedule,
                "CFG scale": request.guidance_scale,
                "Seed": request.seeds[index],
                "Size": f"{request.width}x{request.height}",
                "Model": self.producer["model"],
                "Denoising strength": _strength(request),
                "Clip skip": request.clip_skip + 1,  # 1 is the last layer there
                "RNG": "CPU" if request.rng == "torch-cpu" else "GPU",
                "Version": f"latentrt {self.producer['latentrt']}",
            }
        )

    def save(self, path: str | Path, index: int = 0, *, metadata: bool = True) -> None:
        """Write picture `index` with its record; the format follows the suffix (.png, .jpg, .webp).

        Raises:
            StorageError: the file cannot be written; an existing one stays as it was.
            UsageError: the suffix is unknown, or the result holds latents.
        """
        infotext, record = (self.infotext(index), self.record(index)) if metadata else (None, None)
        save_picture(path, self.images[index], infotext=infotext, record=record)


def preview(latent: Array, kind: str, *, manifest: Manifest, loop: Loop, request: Request) -> list[Image]:
    """Clean latents (N, C, H/8, W/8) as pictures; `kind` as `Step.preview` explains.

    Raises:
        UsageError: an unknown kind, or one that the package does not have.
        NumericError: the picture is not finite.
    """
    if kind == "fast":
        kind = "tiny" if "preview_decoder" in manifest.nets else "rgb" if manifest.latent_rgb else "decoder"
    if kind == "decoder":
        images = check_finite(*loop.decode(latent, tile=request.tile), manifest.dtype)
        return [to_pil(image) for image in put_back(images, request)]
    if kind == "tiny" and "preview_decoder" in manifest.nets:
        dtype = DTYPES[manifest.net("preview_decoder").spec.inputs[0].dtype]
        decoded = loop.call("preview_decoder", latent=narrow(latent, dtype))
        images = check_finite(decoded["image"], decoded["mean"], manifest.dtype)
        return [to_pil(image) for image in images]
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


def finished(images: Array, request: Request, dtype: str) -> list[Image] | Array:
    """Decoded pictures (N, H, W, 3) uint8 as the request's `output_type` returns them.

    `dtype` is the package's, for the error's advice.

    Raises:
        NumericError: a picture of one colour.
    """
    check_pictures(images, dtype)
    images = put_back(images, request)
    return images if request.output_type == "np" else [to_pil(image) for image in images]


def put_back(images: Array, request: Request) -> Array:
    """What lies outside a request's mask, put back into decoded pictures (N, H, W, 3) uint8."""
    if not isinstance(request.source, Masked):
        return images
    return np.stack([request.source.inpainting.paste(image) for image in images])


def check_finite(image: Array, mean: Array, dtype: str) -> Array:
    """The image (N, H, W, 3); its mean (N,), taken before clamping, shows what uint8 cannot.

    `dtype` is the package's, for the error's advice.

    Raises:
        NumericError: a mean is NaN or infinite.
    """
    if not np.isfinite(mean).all():
        raise NumericError(
            "the decoded picture is not finite",
            expected="finite numbers",
            fix=numeric_fix(dtype),
        )
    return image


def check_pictures(images: Pixels, dtype: str) -> None:
    """Refuse pictures of one colour: NaN or an overflow in the nets looks like this after the decoder.

    Args:
        images: ``(H, W, 3)`` or ``(B, H, W, 3)`` uint8.
        dtype: the package's, for the error's advice.

    Raises:
        NumericError: every pixel of a picture is the same; says which pictures of the batch.
    """
    batch = images if images.ndim == 4 else images[None]
    constant = (batch == batch[:, :1, :1]).all(axis=(1, 2, 3))
    if constant.any():
        numbers = ", ".join(str(index) for index in np.flatnonzero(constant))
        colour = tuple(int(value) for value in batch[int(constant.argmax()), 0, 0])
        raise NumericError(
            f"picture {numbers} of a batch of {len(batch)} (counted from 0) is a single colour, {colour}",
            expected="pixels that differ",
            fix=numeric_fix(dtype),
        )
