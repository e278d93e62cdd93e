"""What img2img starts from, as AUTOMATIC1111 means it: the picture, its mask, and what is put under the mask.

Source: `modules/api/api.py` and `modules/processing.py` (`StableDiffusionProcessingImg2Img.init`), release
1.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ...engines.errors import UsageError
from ...engines.spec import Array
from ...runtime.pictures.read import read_image
from ...runtime.pictures.resize import resize
from ..jobs.refusals import UnknownPictureError
from ..pictures.exchange import read_picture

_RESIZE = ("default", "crop", "fill")  # resize_mode by its number
_ORIGINAL, _FILLED = 1, 0  # inpainting_fill
# Pixels over which what surrounds a mask spreads into it; what a narrower one reaches covers the wider ones'.
_SPREADS = (256, 64, 16, 4, 2)


def read_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a pipeline that say what img2img starts from.

    Args:
        values: of `fields.FIELDS["img2img"]`.

    Raises:
        UnknownPictureError: there is no picture.
        PictureError, PictureTooLargeError: one that is none.
        UsageError: several pictures, or a way to use them that is not carried out.
    """
    image = read_picture(_only(values["init_images"]), "init_images")
    mode = _resize_mode(values["resize_mode"])
    found: dict[str, Any] = {"strength": values["denoising_strength"]}
    if values["mask"] is None:
        return {**found, "image": image, "resize_mode": mode}
    mask = _read_mask(values)
    if values["inpaint_full_res"]:
        found["padding_mask_crop"] = values["inpaint_full_res_padding"]
    elif mode != "default":  # which a pipeline has for pictures without a mask
        image, mask = (_resized(one, values, mode) for one in (image, mask))
    if values["inpainting_fill"] == _FILLED:
        image = fill_under(image, mask)
    return {**found, "image": image, "mask_image": mask, "mask_blur": _blur(values)}


def _only(pictures: list[Any]) -> Any:
    if not pictures:
        raise UnknownPictureError(
            "Init image not found",
            expected="a picture to start from",
            fix="Send one as base64 in init_images.",
        )
    if len(pictures) > 1:
        raise UsageError(
            f"init_images has {len(pictures)} pictures",
            expected="one; n_iter or batch_size draw several of it",
            fix="Send a request for each.",
        )
    return pictures[0]


def _resize_mode(number: int) -> str:
    if not 0 <= number < len(_RESIZE):
        raise UsageError(
            f"resize_mode is {number}",
            expected="0 (stretch), 1 (crop) or 2 (fill)",
            fix="Use one of these: latents are not stretched.",
        )
    return _RESIZE[number]


def _read_mask(values: Mapping[str, Any]) -> Image.Image:
    """White where the picture is drawn anew. Of a mask with transparency, what is opaque counts as white."""
    if values["inpainting_fill"] not in (_FILLED, _ORIGINAL):
        raise UsageError(
            f"inpainting_fill is {values['inpainting_fill']}",
            expected="0 (fill) or 1 (original)",
            fix="Use one of these, with denoising_strength 1 for no trace of what was there.",
        )
    sent = read_picture(values["mask"], "mask")
    mask = sent.getchannel("A") if sent.mode == "RGBA" else sent.convert("L")
    return ImageOps.invert(mask) if values["inpainting_mask_invert"] else mask


def _blur(values: Mapping[str, Any]) -> float:
    if values["mask_blur"] is not None:
        return values["mask_blur"]
    if values["mask_blur_x"] != values["mask_blur_y"]:
        raise UsageError(
            f"mask_blur_x is {values['mask_blur_x']:g} and mask_blur_y is {values['mask_blur_y']:g}",
            expected="the same blur in both directions",
            fix="Send mask_blur instead.",
        )
    return values["mask_blur_x"]


def _resized(image: Image.Image, values: Mapping[str, Any], mode: str) -> Image.Image:
    height, width = (max(8, min(values[side], 16384)) for side in ("height", "width"))
    return Image.fromarray(resize(read_image(image), height, width, mode))


def fill_under(image: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with the colours around a mask spread into it, those nearest to it from the nearest.

    Args:
        image: RGB or RGBA.
        mask: of its size or its aspect ratio; white where it is to be filled.

    Returns:
        RGB; outside the mask as it was.
    """
    pixels = read_image(image)  # (H, W, 3) uint8
    hidden = np.asarray(mask.convert("L").resize((pixels.shape[1], pixels.shape[0]))) >= 128
    if hidden.all() or not hidden.any():
        return Image.fromarray(pixels)
    seen = Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255)))
    shown = Image.fromarray(np.where(hidden[..., None], np.uint8(0), pixels))
    outside: Array = pixels[~hidden]
    filled: Array = np.broadcast_to(outside.mean(axis=0, dtype=np.float32), pixels.shape)
    for spread in _SPREADS:
        soft = ImageFilter.GaussianBlur(spread)
        weight = np.asarray(seen.filter(soft), np.float32)[..., None] / 255  # (H, W, 1)
        near = np.asarray(shown.filter(soft), np.float32)
        share = np.minimum(weight * 2, 1)  # at the mask's edge half of what is near is seen
        colour = near / np.maximum(weight, 1 / 255)
        filled = share * np.minimum(colour, 255) + (1 - share) * filled
    return Image.fromarray(np.where(hidden[..., None], np.rint(filled).astype(np.uint8), pixels))
