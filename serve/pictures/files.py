"""What a picture file says of itself, read without decoding: kind, size, and whether it is safe to decode.

Image libraries decide some of this too late: Pillow's reader of WebP has the canvas allocated when the file
is opened, and that of PNG inflates texts before anyone has asked for them. So the files are walked here.

Sources: PNG, third edition (W3C 2025), 5 and 11; JPEG, ITU-T T.81, annex B; WebP, RFC 9649, section 2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from .limits import (
    ANIMATED,
    DAMAGED,
    EMPTY,
    PICTURE_LIMITS,
    TOO_LONG,
    TOO_MANY_BYTES,
    TOO_MANY_PARTS,
    TOO_MANY_PIXELS,
    TOO_MUCH_TEXT,
    TOO_SMALL,
    UNKNOWN_KIND,
    PictureLimits,
    Problem,
)

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables and reserved ones
_JPEG_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xDA)})
_JPEG_TABLES = frozenset({0xC4, 0xDB, 0xDD})
_SCAN = 0xDA
_WEBP_ANIMATED = 0x02


@dataclass(frozen=True)
class PictureFile:
    """A file that may be decoded. `kind` is Pillow's name of its format."""

    kind: str
    width: int
    height: int


def examine(data: bytes, name: str, limits: PictureLimits = PICTURE_LIMITS) -> PictureFile:
    """Walk through a file.

    Args:
        data: its content.
        name: what errors call it.
        limits: what it may be.

    Raises:
        PictureError: none of the three formats, damaged, animated, or of an odd shape.
        PictureTooLargeError: too many bytes, pixels, texts or parts.
    """
    return _Walk(data, name, limits).file()


class _Walk:
    """One file on its way through; `_texts` and `_parts` are what has been met so far."""

    def __init__(self, data: bytes, name: str, limits: PictureLimits) -> None:
        self._data = data
        self._name = name
        self._limits = limits
        self._texts = 0
        self._parts = 0
        self._size: tuple[int, int] | None = None

    def file(self) -> PictureFile:
        data = self._data
        if not data:
            raise self._error(EMPTY)
        if len(data) > self._limits.file_bytes:
            raise self._error(TOO_MANY_BYTES, len(data))
        kind, walk = self._kind()
        try:
            walk()
        except (struct.error, IndexError) as error:  # a field beyond the end
            raise self._error(DAMAGED) from error
        if self._size is None:
            raise self._error(DAMAGED)
        return PictureFile(kind, *self._size)

    def _kind(self) -> tuple[str, Callable[[], None]]:
        data = self._data
        if data.startswith(_PNG):
            return "PNG", self._png
        if data.startswith(_JPEG):
            return "JPEG", self._jpeg
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return "WEBP", self._webp
        raise self._error(UNKNOWN_KIND)

    def _error(self, problem: Problem, *numbers: int) -> Exception:
        return problem.of(self._name, self._limits, *numbers)

    def _png(self) -> None:
        at, kind = len(_PNG), b""
        while kind != b"IEND":
            length, kind = struct.unpack_from(">I4s", self._data, at)
            self._part(at + 8, length + 4)  # and its checksum
            if kind == b"IHDR":
                self._measured(*struct.unpack_from(">II", self._data, at + 8), first=at == len(_PNG))
            elif kind in _PNG_ANIMATION:
                raise self._error(ANIMATED)
            elif kind not in _PNG_PIXELS:
                self._text(length)
                self._inflated(kind, self._data[at + 8 : at + 8 + length])
            at += length + 12

    def _inflated(self, kind: bytes, content: bytes) -> None:
        """Count what a compressed text or profile would become, which may be a thousand times more."""
        if kind == b"iTXt":
            _, _, rest = content.partition(b"\0")
            packed = rest[2:].split(b"\0", 2)[-1] if rest[:1] not in (b"", b"\0") else b""
        elif kind in (b"zTXt", b"iCCP"):
            packed = content.partition(b"\0")[2][1:]
        else:
            return
        try:
            inflated = len(zlib.decompressobj().decompress(packed, self._limits.inflated_bytes + 1))
        except zlib.error:
            return  # what does not inflate takes no memory, and is nothing to whoever reads the picture
        if inflated > self._limits.inflated_bytes:
            raise self._error(TOO_MUCH_TEXT)
        self._text(inflated)

    def _jpeg(self) -> None:
        at, marker = 2, 0
        while marker != _SCAN:
            if self._data[at] != 0xFF:
                raise self._error(DAMAGED)
            marker = self._data[at + 1]
            if marker == 0xFF:  # filling
                at += 1
                continue
            if marker in _JPEG_NO_LENGTH:  # a start or an end in front of the pixels
                raise self._error(DAMAGED)
            (length,) = struct.unpack_from(">H", self._data, at + 2)
            self._part(at + 2, length)
            if marker in _JPEG_FRAMES:
                height, width = struct.unpack_from(">HH", self._data, at + 5)
                self._measured(width, height, first=self._size is None)
            elif marker not in _JPEG_TABLES:
                self._text(length)
            at += 2 + length
        if self._data.count(b"\xff\xda") > self._limits.scans:
            raise self._error(TOO_MANY_PARTS)

    def _webp(self) -> None:
        (length,) = struct.unpack_from("<I", self._data, 4)
        at, end = 12, 8 + length
        if end > len(self._data):
            raise self._error(DAMAGED)
        canvas: tuple[int, int] | None = None
        while at < end:
            kind, length = struct.unpack_from("<4sI", self._data, at)
            self._part(at + 8, length)
            content = self._data[at + 8 : at + 8 + min(length, 16)]
            if kind == b"VP8X":
                if content[0] & _WEBP_ANIMATED:
                    raise self._error(ANIMATED)
                canvas = _uint24(content, 4) + 1, _uint24(content, 7) + 1
                self._check(*canvas)
            elif kind in (b"ANIM", b"ANMF"):
                raise self._error(ANIMATED)
            elif kind in (b"VP8 ", b"VP8L"):
                self._measured(*self._bitstream_size(kind, content), first=self._size is None)
            elif kind != b"ALPH":
                self._text(length)
            at += 8 + length + length % 2
        if canvas and canvas != self._size:
            raise self._error(DAMAGED)

    def _bitstream_size(self, kind: bytes, content: bytes) -> tuple[int, int]:
        if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", content, 6)
            return width & 0x3FFF, height & 0x3FFF
        if kind == b"VP8L" and content[0] == 0x2F:
            (bits,) = struct.unpack_from("<I", content, 1)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        raise self._error(DAMAGED)

    def _part(self, start: int, length: int) -> None:
        self._parts += 1
        if self._parts > self._limits.parts:
            raise self._error(TOO_MANY_PARTS)
        if start + length > len(self._data):
            raise self._error(DAMAGED)

    def _text(self, length: int) -> None:
        self._texts += length
        if self._texts > self._limits.metadata_bytes:
            raise self._error(TOO_MUCH_TEXT)

    def _measured(self, width: int, height: int, *, first: bool) -> None:
        """The picture's size, which stands once in a file: readers disagree on which of two counts."""
        if not first:
            raise self._error(DAMAGED)
        self._check(width, height)
        self._size = width, height

    def _check(self, width: int, height: int) -> None:
        limits = self._limits
        if width * height > limits.pixels:
            raise self._error(TOO_MANY_PIXELS, width, height)
        if min(width, height) < limits.shortest_side:
            raise self._error(TOO_SMALL, width, height)
        if max(width, height) > limits.ratio * min(width, height):
            raise self._error(TOO_LONG, width, height)


def _uint24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")
