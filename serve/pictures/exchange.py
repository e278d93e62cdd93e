"""Pictures in: what strangers send, checked before it is decoded. Pictures out: results as files.

A picture comes as base64, bare or as a data URL, or as the bytes of a form's part. An address is no picture:
nothing is ever fetched or opened, so no two readers of an address can disagree about where it leads.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ...engines.errors import UsageError
from ...runtime.pictures.read import from_wide_grey, quiet, upright
from ...runtime.pictures.write import encode_picture
from .files import PictureFile, examine
from .limits import DAMAGED, NO_BASE64, NO_TEXT, PICTURE_LIMITS, TOO_MANY_BYTES, PictureLimits

if TYPE_CHECKING:
    from ...runtime.result import Result

_DATA_URL = re.compile(r"data:[\w.+/-]{0,100}(?:;[\w.+=-]{1,100}){0,4};base64,", re.ASCII | re.IGNORECASE)
# By kind, not by Image.open, which has further readers look at it: a JPEG may hold several pictures.
_READERS = {"PNG": PngImageFile, "JPEG": JpegImageFile, "WEBP": WebPImageFile}


def read_picture(sent: object, name: str, limits: PictureLimits = PICTURE_LIMITS) -> Image.Image:
    """A picture of a request, ready to be drawn on.

    Args:
        sent: the field's value: base64 (RFC 4648, section 4; bare, or a data URL), or the file's bytes.
        name: of the field, for errors.
        limits: what the picture may be.

    Returns:
        Decoded and upright, in Pillow's mode RGB, or RGBA where the file has transparency. Of 16 bits the
        upper 8; CMYK without its profile.

    Raises:
        PictureError: no text or bytes, no base64, no picture, an animation, damaged, or of an odd shape.
        PictureTooLargeError: too many bytes, pixels, texts or parts.
        MemoryError: as the system raises it.
    """
    data, file = _examined(sent, name, limits)
    try:
        return _decoded(data, file, name)
    except MemoryError:  # that is the machine's fault, not the file's
        raise
    except Exception as error:  # readers of damaged files raise whatever their code meets
        raise DAMAGED.of(name, limits) from error


def picture_bytes(sent: object, name: str, limits: PictureLimits = PICTURE_LIMITS) -> bytes:
    """The content of a picture's file, for who reads what it says; looked at, and not decoded.

    Raises:
        PictureError, PictureTooLargeError: as `read_picture`, but for what decoding alone shows.
    """
    return _examined(sent, name, limits)[0]


def _examined(sent: object, name: str, limits: PictureLimits) -> tuple[bytes, PictureFile]:
    data = sent if isinstance(sent, bytes) else _from_base64(sent, name, limits)
    return data, examine(data, name, limits)


def _from_base64(sent: object, name: str, limits: PictureLimits) -> bytes:
    if not isinstance(sent, str):
        raise NO_TEXT.of(name, limits)
    url = _DATA_URL.match(sent)
    start = url.end() if url else 0
    size = (len(sent) - start) * 3 // 4
    if size > limits.file_bytes + 2:  # of padding
        raise TOO_MANY_BYTES.of(name, limits, size)
    try:
        return base64.b64decode(sent[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise NO_BASE64.of(name, limits) from error


def _decoded(data: bytes, file: PictureFile, name: str) -> Image.Image:
    with quiet():
        opened = _READERS[file.kind](io.BytesIO(data))
    with closing(opened):
        if opened.size != (file.width, file.height):
            raise ValueError("another size than the file's own")
        opened.load()
        with quiet():
            image = upright(opened)
        if image.mode[0] == "I":
            image = from_wide_grey(image, name)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


@dataclass(frozen=True)
class Format:
    """A kind of file that leaves the server."""

    kind: str
    media_type: str
    suffix: str


FORMATS = {
    "png": Format("PNG", "image/png", ".png"),
    "jpeg": Format("JPEG", "image/jpeg", ".jpg"),
    "webp": Format("WEBP", "image/webp", ".webp"),
}
_SPELLINGS = {"jpg": "jpeg"}


@dataclass(frozen=True)
class SentPicture:
    """A picture file on its way out. `recorded`: whether it says how it was made."""

    content: bytes
    format: Format
    recorded: bool

    @property
    def as_base64(self) -> str:
        """As text, bare: clients of both APIs split at a comma, and would keep what stands before it."""
        return base64.b64encode(self.content).decode("ascii")


def find_format(name: str) -> Format:
    """A format by the name that clients use, in any case. Raises UsageError for another one."""
    plain = name.lower()
    found = FORMATS.get(_SPELLINGS.get(plain, plain))
    if found is None:
        raise UsageError(
            f"the output format {name[:40]!r}", expected=f"one of {', '.join(FORMATS)}", fix="Use png."
        )
    return found


def write_picture(
    result: Result[Any],
    index: int = 0,
    *,
    format: str = "png",
    quality: int | None = None,
    metadata: bool = True,
) -> SentPicture:
    """Picture `index` of a result as a file, with its record.

    A JPEG holds 64 kB of metadata at most: where a long prompt does not fit, the picture goes without.

    Raises:
        UsageError: another format, or a quality out of range.
    """
    wanted = find_format(format)
    options: dict[str, Any] = {"quality": quality}
    if metadata:
        try:
            return SentPicture(result.to_bytes(wanted.kind, index, **options), wanted, recorded=True)
        except UsageError:  # for other reasons it is raised again below
            pass
    content = result.to_bytes(wanted.kind, index, metadata=False, **options)
    return SentPicture(content, wanted, recorded=False)


def write_preview(image: Image.Image, *, format: str = "jpeg", quality: int | None = None) -> SentPicture:
    """A picture of a step as a file without a record.

    Raises:
        UsageError: another format, or a quality out of range.
    """
    wanted = find_format(format)
    return SentPicture(encode_picture(image, wanted.kind, quality=quality), wanted, recorded=False)
