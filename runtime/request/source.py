"""What a generation starts from besides noise: a picture, with a mask perhaps, latents, one to vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ...engines.spec import Array
from ..pictures.mask import Inpainting, plan_inpainting
from ..pictures.read import read_image
from ..pictures.resize import clip_pixels, resize
from ..pictures.write import Pixels
from .parameters import LONGEST_SIDE


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """(N, H, W, 3) uint8 to start from; `strength` is the share of the schedule that is run on them."""

    pixels: Array
    strength: float


@dataclass(frozen=True, kw_only=True)
class Masked:
    """(N, H, W, 3) uint8 to repaint in part."""

    pixels: Array
    inpainting: Inpainting
    strength: float


@dataclass(frozen=True, kw_only=True)
class Latents:
    """(N, C, H/8, W/8) float32 to start from."""

    latents: Array
    strength: float


@dataclass(frozen=True, kw_only=True)
class Varied:
    """(N, S, S, 3) uint8 to vary, cut to the image encoder's size. The run itself starts from noise."""

    pixels: Array


Source = Pictures | Masked | Latents | Varied


def load_images(image: Any) -> Array | list[Pixels] | None:
    """The parameter `image`, read: latents (N, C, H/8, W/8), or a list of (H, W, 3) uint8.

    An array of four axes is a batch, and latents where it holds floats and the last axis is not colour.

    Raises:
        UsageError: a picture that cannot be read.
    """
    if image is None:
        return None
    if isinstance(image, np.ndarray) and image.ndim == 4:
        batch = cast(Array, image)
        colours = batch.shape[-1] in (3, 4)
        if batch.dtype.kind == "f" and not colours:
            return batch
        if batch.dtype.kind == "f" and batch.shape[1] == 4:
            raise UsageError(
                f"an array of shape {batch.shape}, which may be latents or pictures",
                expected="latents (N, 4, H/8, W/8), or pictures (N, H, W, 3)",
                fix="Pass pictures as uint8, or one by one in a list.",
            )
        return [read_image(one) for one in batch]
    several: Sequence[Any] = cast(Sequence[Any], image) if isinstance(image, (list, tuple)) else [image]
    if not several:
        raise UsageError("0 images", expected="one, or one for every prompt", fix="Leave image out.")
    return [read_image(one) for one in several]


def natural_size(manifest: Manifest, values: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width where none are asked for: the picture's, rounded down, or the model's.

    Raises:
        UsageError: latents that are to be enlarged, or a picture that becomes too large.
    """
    image: Array | list[Pixels] | None = values["image"]
    if values["upscale"] is not None:
        return _enlarged(manifest, image, values["upscale"])
    if image is None or "class_labels" in manifest.vectors or values["padding_mask_crop"] is not None:
        return manifest.defaults.height, manifest.defaults.width
    if isinstance(image, np.ndarray):
        return image.shape[-2] * manifest.latent_scale, image.shape[-1] * manifest.latent_scale
    height, width = image[0].shape[:2]
    step = manifest.size_multiple
    return max(height // step, 1) * step, max(width // step, 1) * step


def _enlarged(manifest: Manifest, image: Array | list[Pixels] | None, factor: float) -> tuple[int, int]:
    if not isinstance(image, list):
        raise UsageError(
            "latents with upscale",
            expected="a picture to enlarge",
            fix="Decode them first: pass the picture.",
        )
    step = manifest.size_multiple
    height, width = (max(round(side * factor) // step, 1) * step for side in image[0].shape[:2])
    if max(height, width) > LONGEST_SIDE:
        raise UsageError(
            f"upscale {factor:g} makes {width}x{height} pixels",
            expected=f"at most {LONGEST_SIDE} a side",
            fix="Use a smaller upscale.",
        )
    return height, width


def make_source(
    manifest: Manifest,
    values: Mapping[str, Any],
    height: int,
    width: int,
    shape: tuple[int, ...],
    *,
    prompts: int,
) -> Source | None:
    """Check the pictures, and fit them.

    Args:
        manifest: says what the model needs.
        values: the checked parameters, `image` as `load_images` returns it.
        height, width: of what is drawn.
        shape: (N, C, H/8, W/8) of the latents.
        prompts: their number.

    Raises:
        UsageError: a picture that does not fit, or a model that needs a picture or a mask and has none.
    """
    _refuse_missing(manifest, values)
    image, mask, strength = values["image"], values["mask_image"], values["strength"]
    if image is None:
        return None
    if not isinstance(image, np.ndarray) and len(image) not in (1, prompts, shape[0]):
        raise UsageError(
            f"{len(image)} images for {prompts} prompts",
            expected="one image, or one for every prompt",
            fix="Pass one image for all of them.",
        )
    if "class_labels" in manifest.vectors:
        config = manifest.image_processor or {}
        return Varied(pixels=_spread([clip_pixels(one, config) for one in image], shape[0]))
    if strength is None:
        strength = manifest.defaults.strength if mask is None else 1.0
    if isinstance(image, np.ndarray):
        return Latents(latents=check_latents("image", image, shape), strength=strength)
    if mask is None:
        pixels = [resize(one, height, width, values["resize_mode"]) for one in image]
        return Pictures(pixels=_spread(pixels, shape[0]), strength=strength)
    inpainting = plan_inpainting(
        image[0],
        mask,
        height,
        width,
        padding_mask_crop=values["padding_mask_crop"],
        mask_blur=values["mask_blur"],
    )
    pixels = _spread([inpainting.pixels], shape[0])
    return Masked(pixels=pixels, inpainting=inpainting, strength=strength)


def _refuse_missing(manifest: Manifest, values: Mapping[str, Any]) -> None:
    """A model that needs a picture or a mask; pictures that a model or a mask cannot take."""
    varied = "class_labels" in manifest.vectors
    image, mask = values["image"], values["mask_image"]
    if image is None and (varied or manifest.image_latents):
        raise UsageError(
            f"the model {manifest.name!r} has no image",
            expected="a picture to vary" if varied else "a picture to start from",
            fix="Pass image=…, or --image FILE.",
        )
    if varied and isinstance(image, np.ndarray):
        raise UsageError(
            "latents for a model that varies a picture",
            expected="one picture, or one for every prompt",
            fix="Pass image=… alone.",
        )
    if manifest.image_latents and mask is None:
        raise UsageError(
            f"the inpainting model {manifest.name!r} was given no mask",
            expected="mask_image, white where the picture is to be repainted",
            fix="Pass mask_image=…, or --mask FILE.",
        )
    if mask is not None and (not isinstance(image, list) or len(cast(list[Pixels], image)) != 1):
        raise UsageError(
            "a mask with several images, or with latents",
            expected="one picture, and its mask",
            fix="Call once for each picture.",
        )


def check_latents(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Finite float32 numbers of that shape. Raises UsageError."""
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, np.float32)
    if array.shape != shape or not np.isfinite(array).all():
        raise UsageError(
            f"{name} have shape {array.shape}" + ("" if array.shape != shape else " and are not all finite"),
            expected=f"finite numbers of shape {shape}",
            fix="Pass numbers of that shape, or a seed.",
        )
    return array


def _spread(images: list[Pixels], pictures: int) -> Array:
    """(N, …): each image for as many pictures."""
    return np.repeat(np.stack(images), pictures // len(images), axis=0)
