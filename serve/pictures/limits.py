"""What a stranger's picture may be, and the errors that say so: all texts stand here, none is a library's."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """How large a picture may be. All of it is known before a pixel is decoded.

    Attributes:
        file_bytes: of the file, not of its base64.
        pixels: width times height.
        shortest_side: pixels.
        ratio: of the longer side to the shorter one.
        metadata_bytes: texts, profiles and EXIF together, as stored and inflated.
        inflated_bytes: of one compressed text or profile; more than a mebibyte Pillow does not take.
        parts: chunks of a PNG or WebP, segments of a JPEG.
        scans: passes of a progressive JPEG; each one visits every pixel again.
    """

    file_bytes: int = 24 * 2**20
    pixels: int = 4096 * 4096
    shortest_side: int = 8
    ratio: int = 20
    metadata_bytes: int = 4 * 2**20
    inflated_bytes: int = 2**20
    parts: int = 16_384
    scans: int = 100


PICTURE_LIMITS = PictureLimits()


class PictureError(UsageError):
    """A picture of a request that is none, or of a kind that is not taken."""


class PictureTooLargeError(PictureError):
    """A picture of a request that is larger than it may be."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a picture. {name} is the field, {0} and {1} are its numbers."""

    found: str
    expected: str
    fix: str
    error: type[PictureError] = PictureError

    def of(self, name: str, limits: PictureLimits, *numbers: int) -> PictureError:
        """This problem as the error to raise."""
        found = self.found.format(*numbers, name=name)
        return self.error(found, expected=self.expected.format(limits=limits), fix=self.fix)


_A_PICTURE = "one whole picture as PNG, JPEG or WebP"
_SAVE_AGAIN = "Save the picture again as PNG."
_SMALLER = "Scale the picture down before."

# fmt: off
NO_TEXT = Problem(
    "{name} is no text", "base64 of " + _A_PICTURE, "Send base64, one picture a field.")
NO_BASE64 = Problem(
    "{name} is no base64", "base64 of " + _A_PICTURE + ", bare or as a data URL",
    "Send base64: addresses and paths are not followed, whatever they lead to.")
EMPTY = Problem("{name} is empty", _A_PICTURE, _SAVE_AGAIN)
UNKNOWN_KIND = Problem("{name} is neither PNG, JPEG nor WebP", _A_PICTURE, _SAVE_AGAIN)
DAMAGED = Problem("{name} is damaged or incomplete", _A_PICTURE, _SAVE_AGAIN)
ANIMATED = Problem("{name} is an animation", _A_PICTURE, "Send one of its pictures.")
TOO_SMALL = Problem(
    "{name} has {0} x {1} pixels", "{limits.shortest_side} pixels a side or more", "Send a larger picture.")
TOO_LONG = Problem(
    "{name} has {0} x {1} pixels", "one side at most {limits.ratio} times the other", "Crop it before.")
TOO_MANY_PIXELS = Problem(
    "{name} has {0} x {1} pixels", "at most {limits.pixels} pixels", _SMALLER, PictureTooLargeError)
TOO_MANY_BYTES = Problem(
    "{name} has {0} bytes", "at most {limits.file_bytes}", _SMALLER, PictureTooLargeError)
TOO_MUCH_TEXT = Problem(
    "{name} has too many texts, profiles or other metadata", "at most {limits.metadata_bytes} bytes of them",
    "Save the picture again without metadata.", PictureTooLargeError)
TOO_MANY_PARTS = Problem(
    "{name} consists of too many parts", "at most {limits.parts} parts and {limits.scans} scans",
    _SAVE_AGAIN, PictureTooLargeError)
# fmt: on
PROBLEMS = (
    *(NO_TEXT, NO_BASE64, EMPTY, UNKNOWN_KIND, DAMAGED, ANIMATED, TOO_SMALL, TOO_LONG),
    *(TOO_MANY_PIXELS, TOO_MANY_BYTES, TOO_MUCH_TEXT, TOO_MANY_PARTS),
)
