"""What a generation starts from besides noise: a picture, with a mask perhaps, latents, one to vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ...engines.spec import Array
from ..pictures.mask import Inpainting, plan_inpainting
from ..pictures.read import read_image
from ..pictures.resize import RESIZE_MODES, clip_pixels, resize
from ..pictures.write import Pixels
from . import checks as check

if TYPE_CHECKING:
    from .request import Given

_WITH_IMAGE = ("mask_image", "strength", "padding_mask_crop")
# What has no use without a mask.
_WITH_MASK = ("padding_mask_crop", "mask_blur")
_NOT_VARIED = ("mask_image", "strength", "padding_mask_crop", "mask_blur", "resize_mode", "denoising_start")


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
    manifest: Manifest, given: Given, height: int, width: int, shape: tuple[int, ...], *, prompts: int
) -> Source | None:
    """Check the pictures, and fit them.

    Args:
        manifest: says what the model needs.
        given: the parameters, `image` as `load_images` returns it.
        height: of what is drawn.
        width: of what is drawn.
        shape: (N, C, H/8, W/8) of the latents.
        prompts: how many there are, each for as many pictures.

    Raises:
        UsageError: a picture that does not fit, or is missing; a strength or a mask without a picture.
    """
    check.choice("resize_mode", given.resize_mode, RESIZE_MODES)
    _refuse_missing(manifest, given)
    if given.image is None:
        return None
    images = cast("list[Pixels]", given.image)
    if not isinstance(given.image, np.ndarray) and len(images) not in (1, prompts, shape[0]):
        raise UsageError(
            f"{len(images)} images for {prompts} prompts",
            expected="one image, or one for every prompt",
            fix="Pass one image for all of them.",
        )
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
        without = _said(given, _WITH_IMAGE)
        if without or varied or manifest.image_latents:
            raise UsageError(
                f"{without[0]} without an image" if without else f"the model {manifest.name!r} has no image",
                expected="a picture to vary" if varied else "a picture to start from",
                fix="Pass image=…, or --image FILE.",
            )
        return
    unused = _said(given, _NOT_VARIED)
    if varied and (unused or isinstance(given.image, np.ndarray)):
        raise UsageError(
            f"{unused[0] if unused else 'latents'} for a model that varies a picture",
            expected="one picture, or one for every prompt",
            fix="Pass image=… alone.",
        )
    without = _said(given, _WITH_MASK)
    if without and given.mask_image is None:
        raise UsageError(
            f"{without[0]} without a mask",
            expected="mask_image, white where the picture is to be repainted",
            fix=f"Pass mask_image=…, or leave {without[0]} out.",
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


def _said(given: Given, names: tuple[str, ...]) -> list[str]:
    """Those of the parameters that were given another value than their default."""
    plain = (str, int, float)
    values = {name: (getattr(given, name), getattr(type(given)(), name)) for name in names}
    return [
        name
        for name, (value, usual) in values.items()
        if value is not None and not (isinstance(value, plain) and value == usual)
    ]


def _spread(images: list[Pixels], pictures: int) -> Array:
    """(N, …): each image for as many pictures."""
    return np.repeat(np.stack(images), pictures // len(images), axis=0)
