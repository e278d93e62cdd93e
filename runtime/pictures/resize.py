"""Resizes pictures to a request's size, or to the input of CLIP's image encoder.

Pillow resamples, as in diffusers and transformers, so results equal theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image

from ...engines.errors import PackageError, UsageError
from .write import MAX_PIXELS, Pixels, to_pil


def resize(
    pixels: Pixels,
    height: int,
    width: int,
    mode: str = "default",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Pixels:
    """Resize with a Lanczos filter, as diffusers' `VaeImageProcessor.resize`.

    Args:
        pixels: (H, W, 3) uint8.
        height, width: of the result.
        mode: "default" stretches; "fill" keeps the aspect ratio, shows all of the picture, and repeats its
            outermost rows or columns in the rest; "crop" keeps it and cuts off what does not fit.
        resample: another filter.

    Returns:
        (height, width, 3) uint8.

    Raises:
        UsageError: a picture so slim that keeping its aspect ratio leaves
            nothing of it, or takes more than `MAX_PIXELS`.
    """
    image = to_pil(pixels)
    if mode == "default":
        return np.array(image.resize((width, height), resample))
    wider = image.width / image.height > width / height
    taller = image.width / image.height < width / height
    by_width = wider if mode == "fill" else taller
    fitted = _fit_width(image, width, resample) if by_width else _fit_height(image, height, resample)
    left, top = width // 2 - fitted.width // 2, height // 2 - fitted.height // 2
    frame = Image.new("RGB", (width, height))
    frame.paste(fitted, (left, top))
    if wider and top > 0:
        for row, where in ((0, 0), (fitted.height, top + fitted.height)):
            frame.paste(fitted.resize((width, top), box=(0, row, width, row)), (0, where))
    elif taller and left > 0:
        for column, where in ((0, 0), (fitted.width, left + fitted.width)):
            frame.paste(fitted.resize((left, height), box=(column, 0, column, height)), (where, 0))
    return np.array(frame)


def clip_pixels(pixels: Pixels, config: Mapping[str, Any]) -> Pixels:
    """Resize and crop a picture as transformers' `CLIPImageProcessor` does.

    Args:
        pixels: (H, W, 3) uint8.
        config: of ``preprocessor_config.json``: `size`, the shortest edge after resizing; `crop_size`, the
            centre that is cut out; `resample`, Pillow's number of the filter. Defaults are 224, 224, bicubic.

    Returns:
        (crop height, crop width, 3) uint8.

    Raises:
        PackageError: a config with other steps or values than these.
        UsageError: no picture, or one so slim that it takes more than `MAX_PIXELS`.
    """
    edge, height, width, resample = _clip_config(config)
    image = to_pil(pixels)
    fit = _fit_width if image.width <= image.height else _fit_height
    fitted = fit(image, edge, resample)
    left, top = (fitted.width - width) // 2, (fitted.height - height) // 2
    return np.array(fitted.crop((left, top, left + width, top + height)))


def _fit_width(image: Image.Image, width: int, resample: Image.Resampling) -> Image.Image:
    """Resize to this width, keeping the aspect ratio; the height is rounded down."""
    return _resized(image, (width, image.height * width // image.width), resample)


def _fit_height(image: Image.Image, height: int, resample: Image.Resampling) -> Image.Image:
    return _resized(image, (image.width * height // image.height, height), resample)


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise UsageError(
            f"{image.width} x {image.height} pixels become {size[0]} x {size[1]} at the same aspect ratio",
            expected=f"1 pixel or more, and at most {MAX_PIXELS // 10**6} megapixels",
            fix="Cut the picture to about the aspect ratio that is drawn.",
        )
    return image.resize(size, resample)


def _clip_config(config: Mapping[str, Any]) -> tuple[int, int, int, Image.Resampling]:
    """Shortest edge, height and width of the crop, and the filter."""
    edge = _side(config, "size", "shortest_edge")
    height, width = _side(config, "crop_size", "height"), _side(config, "crop_size", "width")
    resample = config.get("resample", Image.Resampling.BICUBIC)
    both_steps = config.get("do_resize", True) and config.get("do_center_crop", True)
    fits = 0 < height <= edge and 0 < width <= edge
    if not (both_steps and fits and resample in list(Image.Resampling)):
        names = ("size", "crop_size", "resample", "do_resize", "do_center_crop")
        found = {name: config[name] for name in names if name in config}
        raise PackageError(
            f"the image processor has {found}",
            expected="resizing to a shortest edge, and cropping to no more than that, such as 224 and 224",
            fix="Export the checkpoint again, with the preprocessor_config.json of its image encoder.",
        )
    return edge, height, width, Image.Resampling(resample)


def _side(config: Mapping[str, Any], key: str, side: str) -> int:
    """A side in pixels, 0 if the config has none. Older configs have one number in place of a mapping."""
    value = config.get(key, 224)
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get(side)
    return value if isinstance(value, int) else 0
