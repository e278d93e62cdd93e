"""What a generation starts from besides noise: a picture, with a mask perhaps, latents, one to vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engines.errors import UsageError
from ..engines.package import Manifest
from ..engines.spec import Array
from . import parameter_checks as check
from .image_input import read_image
from .mask import Inpainting, plan_inpainting
from .picture import Pixels
from .resize import clip_pixels, resize

if TYPE_CHECKING:
    from .request import Given

_WITH_IMAGE = ("mask_image", "strength", "padding_mask_crop")


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
        if batch.dtype.kind == "f" and batch.shape[-1] not in (3, 4):
            return batch
        return [read_image(one) for one in batch]
    several: Sequence[Any] = cast(Sequence[Any], image) if isinstance(image, (list, tuple)) else [image]
    if not several:
        raise UsageError("0 images", expected="one, or one for every prompt", fix="Leave image out.")
    return [read_image(one) for one in several]


def natural_size(manifest: Manifest, given: Given) -> tuple[int, int]:
    """Height and width where none are asked for: the picture's, rounded down, or the model's."""
    image = given.image
    if image is None or "class_labels" in manifest.vectors or given.padding_mask_crop is not None:
        return manifest.defaults.height, manifest.defaults.width
    if isinstance(image, np.ndarray):
        return image.shape[-2] * manifest.latent_scale, image.shape[-1] * manifest.latent_scale
    height, width = cast(list[Pixels], image)[0].shape[:2]
    step = manifest.size_multiple
    return max(height // step, 1) * step, max(width // step, 1) * step


def make_source(
    manifest: Manifest, given: Given, height: int, width: int, shape: tuple[int, ...]
) -> Source | None:
    """Check the pictures, and fit them.

    Args:
        manifest: says what the model needs.
        given: the parameters, `image` as `load_images` returns it.
        height: of what is drawn.
        width: of what is drawn.
        shape: (N, C, H/8, W/8) of the latents.

    Raises:
        UsageError: a picture that does not fit, or is missing; a strength or a mask without a picture.
    """
    _refuse_missing(manifest, given)
    if given.image is None:
        return None
    images = cast("list[Pixels]", given.image)
    if "class_labels" in manifest.vectors:
        config = manifest.image_processor or {}
        return Varied(pixels=_spread([clip_pixels(image, config) for image in images], shape[0]))
    usual = 1.0 if given.mask_image is not None else manifest.defaults.strength
    strength = check.number("strength", usual if given.strength is None else given.strength, 0.0, 1.0)
    if isinstance(given.image, np.ndarray):
        latents = check.latents("image", given.image, shape)
        assert latents is not None, "it was given"
        return Latents(latents=latents, strength=strength)
    if given.mask_image is None:
        pixels = [resize(image, height, width, given.resize_mode) for image in images]
        return Pictures(pixels=_spread(pixels, shape[0]), strength=strength)
    crop = given.padding_mask_crop
    inpainting = plan_inpainting(
        images[0],
        given.mask_image,
        height,
        width,
        padding_mask_crop=None if crop is None else check.integer("padding_mask_crop", crop, 0, 16384),
        mask_blur=check.number("mask_blur", given.mask_blur, 0.0, 1000.0),
    )
    pixels = _spread([inpainting.pixels], shape[0])
    return Masked(pixels=pixels, inpainting=inpainting, strength=strength)


def _refuse_missing(manifest: Manifest, given: Given) -> None:
    """A model that needs a picture or a mask, or a parameter that does."""
    varied = "class_labels" in manifest.vectors
    if given.image is None:
        without = [name for name in _WITH_IMAGE if getattr(given, name) is not None]
        if without or varied or manifest.image_latents:
            raise UsageError(
                f"{without[0]} without an image" if without else f"the model {manifest.name!r} has no image",
                expected="a picture to vary" if varied else "a picture to start from",
                fix="Pass image=…, or --image FILE.",
            )
        return
    if varied and (isinstance(given.image, np.ndarray) or given.mask_image is not None):
        raise UsageError(
            "latents or a mask for a model that varies a picture",
            expected="one picture, or one for every prompt",
            fix="Pass image=… alone.",
        )
    if manifest.image_latents and given.mask_image is None:
        raise UsageError(
            f"the inpainting model {manifest.name!r} was given no mask",
            expected="mask_image, white where the picture is to be repainted",
            fix="Pass mask_image=…, or --mask FILE.",
        )
    if given.mask_image is not None and given.resize_mode != "default":
        raise UsageError(
            f"resize_mode {given.resize_mode!r} with a mask",
            expected="picture and mask stretched alike, or padding_mask_crop",
            fix="Leave resize_mode out.",
        )
    several = isinstance(given.image, np.ndarray) or len(cast(list[Any], given.image)) != 1
    if given.mask_image is not None and several:
        raise UsageError(
            "a mask with several images, or with latents",
            expected="one picture, and its mask",
            fix="Call once for each picture.",
        )


def _spread(images: list[Pixels], pictures: int) -> Array:
    """(N, …): one image for all pictures, or as many images as divide them, each for its prompt's."""
    if pictures % len(images):
        raise UsageError(
            f"{len(images)} images for {pictures} pictures",
            expected="one image, or one for every prompt",
            fix="Pass one image for all of them.",
        )
    return np.repeat(np.stack(images), pictures // len(images), axis=0)
