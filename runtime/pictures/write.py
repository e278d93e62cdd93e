"""Writes picture files that say how they were made, and reads that record back.

PNG: text chunks ``parameters`` (AUTOMATIC1111's text) and ``latentrt`` (our JSON). JPEG and WebP: EXIF
UserComment with the text, where AUTOMATIC1111 keeps it, and MakerNote with the JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin

from ...engines.errors import StorageError, UsageError, command

MAX_PIXELS = 8192 * 8192

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FORMATS = tuple(dict.fromkeys(_FORMATS.values()))
QUALITY = 95  # of JPEG and WebP, 1 to 100; JPEG keeps the colours' full resolution
_RECORD_PREFIX = b"latentrt\0"
_UNICODE_PREFIX = b"UNICODE\0"  # EXIF 2.3, 4.6.5: the eight bytes before a UserComment name its encoding

Pixels = npt.NDArray[np.uint8]

# fmt: off
# what Pillow's readers and the record's JSON raise on damaged files
_DAMAGE = (
    OSError, ValueError, TypeError, SyntaxError, ArithmeticError, LookupError, RecursionError, EOFError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class PictureMetadata:
    """How a picture was made; None if the file does not say.

    Attributes:
        parameters: AUTOMATIC1111's text, for `parse_infotext`.
        record: our own values, as they were saved.
    """

    parameters: str | None
    record: dict[str, Any] | None


def to_pil(image: Pixels) -> Image.Image:
    """``(H, W, 3)`` uint8 RGB as a Pillow image. Raises UsageError for another shape or dtype."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UsageError(
            f"a picture of shape {image.shape} and dtype {image.dtype}",
            expected="(height, width, 3) and uint8",
            fix="Pass one picture of the batch, before any conversion.",
        )
    return Image.fromarray(np.ascontiguousarray(image))


def grid(images: Sequence[Pixels]) -> Pixels:
    """Lay pictures out in rows, as square as can be; the rest of the last row is black.

    Args:
        images: N pictures ``(H, W, 3)`` uint8, all of one size.

    Returns:
        ``(ceil(N / columns) * H, columns * W, 3)`` uint8.
    """
    columns = math.ceil(math.sqrt(len(images)))
    height, width, channels = images[0].shape
    rows = math.ceil(len(images) / columns)
    sheet = np.zeros((rows, height, columns, width, channels), np.uint8)
    for index, image in enumerate(images):
        sheet[index // columns, :, index % columns] = image
    return np.reshape(sheet, (rows * height, columns * width, channels))


def save_picture(
    path: str | Path,
    image: Pixels | Image.Image,
    *,
    infotext: str | None = None,
    record: Mapping[str, Any] | None = None,
    quality: int | None = None,
) -> None:
    """Write a picture. A file of that name is replaced whole, or stays as it was.

    Args:
        path: ends in .png, .jpg, .jpeg or .webp, which decides the format.
        image: ``(H, W, 3)`` uint8, or a Pillow image.
        infotext: AUTOMATIC1111's text (`format_infotext`); None leaves it out.
        record: our own values, of types that JSON has; None leaves it out.
        quality: of JPEG and WebP, 1 to 100; None is QUALITY.

    Raises:
        UsageError: another file name, a quality out of range, a picture that cannot be written, or metadata
            that the format cannot hold.
        StorageError: a full disk, or a folder that cannot be written.
    """
    kind = check_target(Path(path))
    data = encode_picture(image, kind, infotext=infotext, record=record, quality=quality)
    _replace_file(Path(path), memoryview(data))


def encode_picture(
    image: Pixels | Image.Image,
    kind: str = "PNG",
    *,
    infotext: str | None = None,
    record: Mapping[str, Any] | None = None,
    quality: int | None = None,
) -> bytes:
    """The content of a picture's file; `kind` is one of FORMATS. For the rest see `save_picture`."""
    if kind not in FORMATS:
        raise UsageError(f"format {kind!r}", expected=", ".join(FORMATS), fix="Use PNG.")
    if quality is not None and (
        kind == "PNG" or isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100
    ):
        raise UsageError(
            f"quality {quality!r} of {kind}",
            expected="1 to 100, of JPEG and WEBP; PNG keeps every pixel as it is",
            fix="Leave quality out.",
        )
    lossy: dict[str, Any] = {} if kind == "PNG" else {"quality": quality or QUALITY}
    if kind == "JPEG":
        lossy["subsampling"] = 0
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    data = io.BytesIO()
    try:
        picture.save(data, kind, **lossy, **_metadata_options(kind, infotext, record))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise UsageError(
            f"a picture cannot be written as {kind}: {error}",
            expected="a picture, text and JSON values that the format can hold (JPEG: 64 kB of them)",
            fix="Save as .png, or without metadata.",
        ) from error
    return data.getvalue()


def check_target(path: Path) -> str:
    """Pillow's name for the format of `path`. Called before a picture is drawn, to fail early.

    Raises:
        UsageError: another file name.
        StorageError: its folder does not exist, or cannot be written.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(
            f"file name {path.name!r}", expected="one that ends in " + ", ".join(_FORMATS), fix="Use .png."
        )
    if not path.parent.is_dir():
        raise StorageError(
            f"the folder {path.parent} does not exist",
            expected="an existing folder",
            fix=f"Make it: {command('mkdir', '-p', path.parent)}",
        )
    if not os.access(path.parent, os.W_OK):
        raise StorageError(
            f"the folder {path.parent.resolve()} cannot be written",
            expected="a folder that this user may write to",
            fix="Choose another one: --output FILE",
        )
    return kind


def save_latents(path: Path, latents: npt.NDArray[Any]) -> None:
    """Write latents as a .npy file, whole or not at all. Raises StorageError."""
    data = io.BytesIO()
    np.save(data, latents, allow_pickle=False)
    _replace_file(path, data.getbuffer())


def _metadata_options(kind: str, infotext: str | None, record: Mapping[str, Any] | None) -> dict[str, Any]:
    text = None if record is None else json.dumps(dict(record), allow_nan=False)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in (("parameters", infotext), ("latentrt", text)):
            if value is not None:
                chunks.add_text(key, value)
        return {"pnginfo": chunks}
    tags: dict[int, bytes] = {}
    if infotext is not None:
        tags[ExifTags.Base.UserComment] = _UNICODE_PREFIX + infotext.encode("utf-16-be")
    if text is not None:
        tags[ExifTags.Base.MakerNote] = _RECORD_PREFIX + text.encode("ascii")
    if not tags:
        return {}
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = tags
    return {"exif": exif}


def _replace_file(path: Path, data: memoryview) -> None:
    """Write beside the target, then rename, so that no reader ever sees half a picture.

    The target of a link is what it leads to, as for every other program that saves a picture.
    """
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".latentrt-{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except BaseException:
            with contextlib.suppress(OSError):  # failing to clean up must not hide the error itself
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}",
            expected=f"a folder that can be written, with {len(data)} bytes free",
            fix="Free disk space, create the folder, or choose another one.",
        ) from error


def read_metadata(source: str | Path | bytes) -> PictureMetadata:
    """Read how a picture was made, whether this package wrote it, AUTOMATIC1111 or a program like it.

    `source` is a file or its content.

    Raises:
        UsageError: no file, no PNG, JPEG or WebP, damaged, truncated, or above `MAX_PIXELS`.
    """
    path = Path("the picture") if isinstance(source, bytes) else Path(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else path
        with contextlib.closing(Image.open(file, formats=("PNG", "JPEG", "WEBP"))) as picture:
            pixels = picture.width * picture.height
            if pixels > MAX_PIXELS:
                raise _unreadable(path, f"{picture.width} x {picture.height} pixels")
            # decoding shows truncation, and reaches text chunks that stand behind the pixels
            picture.load()
            parameters, record = _text_chunks(picture) if picture.format == "PNG" else _exif_texts(picture)
            return PictureMetadata(parameters=parameters, record=_parse_record(record))
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, reason: object) -> UsageError:
    return UsageError(
        f"{path}: {reason}",
        expected=f"a whole PNG, JPEG or WebP picture of at most {MAX_PIXELS // 10**6} megapixels",
        fix="Check the path, or save the picture again.",
    )


def _text_chunks(picture: Image.Image) -> tuple[str | None, str | None]:
    """What a PNG says; some programs leave its text chunks out, and write EXIF as in a JPEG."""
    texts = cast("dict[str, str]", getattr(picture, "text", {}))
    parameters, record = _exif_texts(picture)
    return texts.get("parameters", parameters), texts.get("latentrt", record)


def _exif_texts(picture: Image.Image) -> tuple[str | None, str | None]:
    exif = picture.getexif()
    # some writers put the comment into the first directory
    tags: dict[int, object] = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    comment, note = tags.get(ExifTags.Base.UserComment), tags.get(ExifTags.Base.MakerNote)
    record = None
    if isinstance(note, bytes) and note.startswith(_RECORD_PREFIX):
        record = note[len(_RECORD_PREFIX) :].decode("ascii")
    return _decode_comment(comment), record


def _decode_comment(comment: object) -> str | None:
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else None
    if not comment.startswith(_UNICODE_PREFIX):
        return comment.removeprefix(b"ASCII\0\0\0").strip(b"\0").decode("utf-8", "replace")
    text = comment[len(_UNICODE_PREFIX) :]
    # EXIF leaves the byte order open: AUTOMATIC1111 writes big-endian, exiftool the file's. In Latin text the
    # zero bytes show which it is.
    order = "le" if text[1::2].count(0) > text[::2].count(0) else "be"
    return text.decode(f"utf-16-{order}", "replace")


def _parse_record(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    record: object = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"its latentrt record is no JSON object but {text[:40]!r}")
    return cast("dict[str, Any]", record)
