"""Inpainting: which pixels are drawn anew, which part of the picture the nets see, and how both are merged.

Masks are bool arrays here; True (white) is repainted. This follows diffusers, but for three things:

1. The original picture is put back outside the mask, always. diffusers does so with `padding_mask_crop` only,
   and otherwise returns what the autoencoder made of those pixels.
2. A mask is binarised before its region is searched for, so that the region holds what is repainted. In
   diffusers every shade but black belongs to it.
3. Transparent pixels of a mask are black, so what nobody painted is kept. diffusers drops alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from ...engines.errors import UsageError
from ...engines.spec import Array
from .read import ImageSource, read_image
from .resize import resize
from .write import Pixels, to_pil

Mask = npt.NDArray[np.bool_]
Region = tuple[int, int, int, int]  # left, top, right, bottom; the last two lie outside


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """One picture of which a part is drawn anew. Made by `plan_inpainting`.

    Attributes:
        original: (H, W, 3) uint8, the whole picture.
        repainted: (H, W) bool, which of its pixels are drawn anew.
        pixels: (height, width, 3) uint8, what the nets see: the original, or a region of it.
        mask: (height, width) bool, which of `pixels` are drawn anew.
        region: the region of the original that `pixels` shows; None if it is all of it.
        blur: radius in pixels of the original over which drawn and kept pixels merge; 0 is a hard edge.
    """

    original: Pixels
    repainted: Mask
    pixels: Pixels
    mask: Mask
    region: Region | None
    blur: float

    def paste(self, drawn: Pixels) -> Pixels:
        """Put the drawn picture, (height, width, 3) uint8, into the original. Returns (H, W, 3) uint8.

        Outside the mask (with a blur, outside its soft edge) every pixel is the original's.
        """
        layer: Pixels = drawn
        if self.region:
            left, top, right, bottom = self.region
            layer = np.array(self.original)
            layer[top:bottom, left:right] = resize(drawn, bottom - top, right - left, "crop")
        if not self.blur:
            return np.where(self.repainted[..., None], layer, self.original)
        share = _blurred(self.repainted, self.blur)[..., None]  # (H, W, 1)
        return np.rint(share * layer + (1 - share) * self.original).astype(np.uint8)


def plan_inpainting(
    image: ImageSource,
    mask_image: ImageSource,
    height: int,
    width: int,
    *,
    padding_mask_crop: int | None = None,
    mask_blur: float = 0.0,
) -> Inpainting:
    """Read a picture and its mask, and decide what is drawn.

    Args:
        image: the picture, as `read_image` takes it.
        mask_image: white where the picture is repainted; of its size, or at least its aspect ratio.
        height, width: of what is drawn, in pixels.
        padding_mask_crop: draw only the masked part and this many pixels around it, enlarged to height and
            width; the result has the picture's own size. None resizes the picture first.
        mask_blur: radius of the Gaussian blur that softens the edge of what is pasted.

    Raises:
        UsageError: a picture or mask that cannot be read, of different shape, or with nothing to repaint.
    """
    original = read_image(image)
    size = (original.shape[0], original.shape[1])
    if padding_mask_crop is None:
        pixels = resize(original, height, width)
        mask = read_mask(mask_image, height, width, image_size=size)
        return Inpainting(
            original=pixels, repainted=mask, pixels=pixels, mask=mask, region=None, blur=mask_blur
        )
    repainted = read_mask(mask_image, *size)
    region = crop_region(repainted, width, height, padding_mask_crop)
    left, top, right, bottom = region
    shades = np.array(Image.fromarray(repainted[top:bottom, left:right]).convert("RGB"))
    return Inpainting(
        original=original,
        repainted=repainted,
        pixels=resize(original[top:bottom, left:right], height, width, "fill"),
        mask=_binarise(resize(shades, height, width, "fill")),
        region=region,
        blur=mask_blur,
    )


def read_mask(
    source: ImageSource,
    height: int,
    width: int,
    *,
    image_size: tuple[int, int] | None = None,
    resize_mode: str = "default",
    name: str = "mask_image",
) -> Mask:
    """Read a mask, and resize it.

    Args:
        source: as `read_image` takes it; mid-grey and lighter is repainted.
        height, width: of the result.
        image_size: (H, W) of the picture that it belongs to; (height, width) where None.
        resize_mode: that of `resize` with which the picture is resized.
        name: what errors call it.

    Returns:
        (height, width), True where the picture is to be repainted: diffusers' `VaeImageProcessor` with
        `do_convert_grayscale` and `do_binarize`. (Masks of 1 bit or with a palette are smoothed like others
        when resized; diffusers takes the nearest pixel.)

    Raises:
        UsageError: no picture, not the picture's aspect ratio, or black everywhere.
    """
    pixels = read_image(source, name=name, background=0)
    rows, columns = pixels.shape[:2]
    image_rows, image_columns = image_size or (height, width)
    # equal ratios up to one pixel of the coarser one: a scaled size was rounded somewhere
    if abs(rows * image_columns - columns * image_rows) > max(rows, columns, image_rows, image_columns):
        raise UsageError(
            f"{name} has wrong mask sizes: {columns} x {rows} pixels for a picture of "
            f"{image_columns} x {image_rows}",
            expected="the size of the picture, or its aspect ratio",
            fix="Paint the mask on the picture itself.",
        )
    return _binarise(resize(pixels, height, width, resize_mode), name)


def latent_mask(mask: Mask, scale: int = 8) -> Array:
    """One value per latent cell: its first pixel's, as `torch.nn.functional.interpolate` (nearest) takes it.

    Returns (H / scale, W / scale) float32, 1 where the picture is repainted.
    """
    return mask[::scale, ::scale].astype(np.float32)


def crop_region(mask: Mask, width: int, height: int, pad: int = 0) -> Region:
    """The part of a picture to draw: around a mask (H, W), not empty, in the aspect ratio of what is drawn.

    `pad` pixels of surroundings are added first; then as diffusers' `VaeImageProcessor.get_crop_region`.
    """
    rows, columns = mask.shape
    left, right = _extent(np.flatnonzero(mask.any(axis=0)), pad, columns)
    top, bottom = _extent(np.flatnonzero(mask.any(axis=1)), pad, rows)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, (right - left) / ratio, rows)
    else:
        left, right = _widened(left, right, (bottom - top) * ratio, columns)
    return left, top, right, bottom


def _extent(places: npt.NDArray[np.intp], pad: int, limit: int) -> tuple[int, int]:
    """Start and end of the places and `pad` around them, within 0 ... `limit`."""
    return max(int(places[0]) - pad, 0), min(int(places[-1]) + 1 + pad, limit)


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """An interval of the wanted length around the same middle, moved and if need be cut to 0 ... `limit`."""
    more = int(wanted - (high - low))
    length = min(high - low + more, limit)
    start = min(low - more // 2, limit - length)
    start = max(start, 0)
    return start, start + length


def _binarise(pixels: Pixels, name: str = "mask_image") -> Mask:
    """True from mid-grey up. Raises UsageError if that is nowhere: the request would draw nothing."""
    mask: Mask = np.asarray(to_pil(pixels).convert("L")) >= 128
    if not mask.any():
        raise UsageError(
            f"{name} is black at the size that is drawn, {mask.shape[1]} x {mask.shape[0]}: "
            "there is nothing to repaint",
            expected="white where the picture is to be repainted",
            fix="Invert the mask, or paint with a larger brush.",
        )
    return mask


def _blurred(mask: Mask, radius: float) -> Array:
    """(H, W) float32, 0 ... 1; Pillow's filter is that of diffusers' `VaeImageProcessor.blur`."""
    soft = Image.fromarray(mask).convert("L").filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(soft, np.float32) / 255
