"""Reads a picture from a file, a Pillow image or an array as (H, W, 3) uint8 RGB.

diffusers leaves the conversion to Pillow's ``convert("RGB")``. This differs in four ways:

1. EXIF's orientation is applied, as diffusers' `load_image` and AUTOMATIC1111 do.
2. Transparent pixels are laid over white, as AUTOMATIC1111 and transformers do; ``convert`` drops alpha,
   which uncovers colours that nobody saw.
3. Greyscale of 16 bits keeps its upper 8, as Pillow does with colours of 16 bits; ``convert`` turns all but
   the darkest 256 shades white.
4. Files are limited before anything is decoded: six formats, `MAX_FILE_SIZE`, `MAX_PIXELS`.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from ...engines.errors import UsageError
from .write import MAX_PIXELS, Pixels

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_SIZE = 512 * 2**20  # bytes: MAX_PIXELS with 8 each, uncompressed

ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]

# EXIF 2.3, table 6: how to turn a stored picture upright; 1 is upright already
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow's getexif looks for the orientation.
_TOLD_BY = ("exif", "raw profile type exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_TIFF_TILE = (322, 323)  # TIFF 6.0, section 15: TileWidth and TileLength
_WARNINGS_LOCK = threading.Lock()


def read_image(source: ImageSource, *, name: str = "image", background: int = 255) -> Pixels:
    """Read a picture.

    Args:
        source: a file (`FORMATS`; of an animation the first frame), a Pillow image, or an array (H, W),
            (H, W, 1), (H, W, 3) or (H, W, 4): uint8, bool, or floats from 0 to 1 (diffusers' ``np`` output).
        name: what errors call it.
        background: the grey that shows through transparent pixels; white by default.

    Returns:
        (H, W, 3) uint8 RGB, upright, a copy.

    Raises:
        UsageError: no picture, a damaged or truncated one, another format, too large, or values out of range.
    """
    return read_map(source, name=name, background=background)[0]


def read_map(source: ImageSource, *, name: str, background: int) -> tuple[Pixels, bool]:
    """Read a picture as `read_image` does, and say whether its colours may not be mixed.

    They may not where they come from a palette, or are the two of 1 bit. Pillow, and so diffusers, resizes
    such pictures by taking the nearest pixel.
    """
    with quiet(), ExitStack() as files:
        try:
            image = _open(source, name, files)
            _check_size(image, name)
            image.load()
            return _flatten(upright(image), name, background), image.mode in ("1", "P")
        except UsageError:
            raise
        # Pillow has no exceptions of its own: on damaged files its readers raise whatever their code meets
        except Exception as error:
            raise _unreadable(name, source, str(error) or type(error).__name__) from error


def read_latents(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """An array that NumPy saved (.npy); a pickle is not read.

    Raises:
        ValueError: no such file, or its header does not fit its size.
    """
    try:
        with open(path, "rb") as stream:
            versions = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, _, dtype = versions[np.lib.format.read_magic(stream)](stream)
            left = os.fstat(stream.fileno()).st_size - stream.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{left} bytes for {dtype} {shape}")
        return np.load(path, allow_pickle=False)
    except Exception as error:  # the header is Python, and its reader raises whatever that may raise
        raise ValueError(str(error)) from error


@contextmanager
def quiet() -> Generator[None]:
    """Silence Pillow, which warns of damaged metadata, and of large pictures that we measure ourselves."""
    # Filters belong to the process: two threads that restore them out of order would leave them changed.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _open(source: ImageSource, name: str, files: ExitStack) -> Image.Image:
    """The picture as a Pillow image; a file's is not decoded yet, and `files` closes it."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(
            f"{name} is of type {type(source).__name__}",
            expected="a path, a Pillow image, or an array (H, W, 3) of uint8",
            fix="Pass one picture; a file's content goes through PIL.Image.open.",
        )
    path = Path(source)
    if not path.is_file():  # a pipe or a device might never end
        raise _unreadable(name, source, "a folder" if path.is_dir() else "no such file")
    if (size := path.stat().st_size) > MAX_FILE_SIZE:
        raise _unreadable(name, source, f"{size} bytes, more than {MAX_FILE_SIZE}")
    return files.enter_context(closing(Image.open(path, formats=FORMATS)))


def _from_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UsageError(
            f"{name} has shape {array.shape}",
            expected="(H, W), (H, W, 3) or (H, W, 4)",
            fix=f"Pass one picture, channels last{': images[0]' if array.ndim == 4 else ''}.",
        )
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # written so that NaN is refused too
            raise UsageError(
                f"{name} has values from {low:g} to {high:g}",
                expected="floats from 0 to 1, none of them NaN",
                fix="Scale them, or pass uint8.",
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UsageError(
            f"{name} has dtype {array.dtype}",
            expected="uint8, or floats from 0 to 1",
            fix="Scale it to 0 to 255, then convert it: array.astype(np.uint8).",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _check_size(image: Image.Image, name: str) -> None:
    """Refuse too large a picture before it is decoded: a small header can claim any amount of memory."""
    pixels = image.width * image.height
    # a tile is decoded whole, however little of it lies inside the picture
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    tile = [tags[tag] for tag in _TIFF_TILE if isinstance(tags.get(tag), int)]
    largest = max(pixels, math.prod(tile)) if len(tile) == 2 else pixels
    if not pixels or largest > MAX_PIXELS:
        raise UsageError(
            f"{name} has {image.width} x {image.height} pixels"
            + (f" in tiles of {tile[0]} x {tile[1]}" if largest > pixels else ""),
            expected=f"1 pixel or more, and at most {MAX_PIXELS // 10**6} megapixels",
            fix="Scale it down before.",
        )


def upright(image: Image.Image) -> Image.Image:
    """Like `PIL.ImageOps.exif_transpose`, which also rewrites the metadata, and fails where it cannot."""
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if method is None:
        return image
    turned = image.transpose(method)
    for name in _TOLD_BY:  # else who makes it upright again would turn it again
        turned.info.pop(name, None)
    return turned


def _flatten(image: Image.Image, name: str, background: int) -> Pixels:
    if image.mode[0] in "IF":
        image = from_wide_grey(image, name)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (background, background, background, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def from_wide_grey(image: Image.Image, name: str) -> Image.Image:
    """The upper 8 of 16 bits. Pillow's 32-bit modes may hold those, or any other numbers."""
    shades = np.asarray(image)
    if image.mode == "F" or shades.min() < 0 or shades.max() > 0xFFFF:
        raise UsageError(
            f"{name} has grey values from {shades.min():g} to {shades.max():g} in Pillow's mode {image.mode}",
            expected="integers of 8 or 16 bits",
            fix="Scale them, and save it as PNG.",
        )
    return Image.fromarray((shades >> 8).astype(np.uint8))


def _unreadable(name: str, source: ImageSource, reason: str) -> UsageError:
    where = f"{name} {os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else name
    return UsageError(
        f"{where} cannot be read: {reason}",
        expected=f"a whole picture of at most {MAX_PIXELS // 10**6} megapixels, as {', '.join(FORMATS)}",
        fix="Check the path, or save the picture again as PNG.",
    )
