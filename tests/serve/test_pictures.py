"""Pictures from strangers. Reports 22, 29 to 32, 36 and 37 of the list of known incidents."""

import base64
import io
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.read import read_image
from latentrt.runtime.pictures.write import read_metadata
from latentrt.serve.pictures import exchange as pictures
from latentrt.serve.pictures import files as picture_files
from latentrt.serve.pictures import limits as picture_limits
from latentrt.serve.pictures.exchange import (
    FORMATS,
    SentPicture,
    find_format,
    read_picture,
    write_picture,
    write_preview,
)
from latentrt.serve.pictures.files import PictureFile, examine
from latentrt.serve.pictures.limits import (
    PICTURE_LIMITS,
    PROBLEMS,
    PictureError,
    PictureLimits,
    PictureTooLargeError,
    Problem,
)
from tests.runtime.picture_files import RGB, SMOOTH, chunk, encoded, png

HEADER = b"\x89PNG\r\n\x1a\n"
NO_LIMITS = PictureLimits(
    file_bytes=2**62,
    pixels=2**62,
    shortest_side=0,
    ratio=2**62,
    metadata_bytes=2**62,
    inflated_bytes=2**30,
    parts=2**62,
    scans=2**62,
)


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def as_url(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + as_text(data)


def refused(sent: object, limits: PictureLimits = PICTURE_LIMITS) -> PictureError:
    """The error for a picture; its text is one of ours, of the field's name, numbers and limits."""
    with pytest.raises(PictureError) as caught:
        read_picture(sent, "init_images[0]", limits)
    error = caught.value
    fitting = [problem for problem in PROBLEMS if fits(problem, error, limits)]
    assert fitting, str(error)
    assert "0x" not in str(error)
    assert not re.search(r"[/\\]", str(error).replace(" / ", ""))
    return error


def fits(problem: Problem, error: PictureError, limits: PictureLimits) -> bool:
    pattern = re.escape(problem.found).replace(r"\{name\}", re.escape("init_images[0]"))
    pattern = re.sub(r"\\\{\d\\\}", r"\\d+", pattern)
    texts = (problem.expected.format(limits=limits), problem.fix, problem.error)
    return bool(re.fullmatch(pattern, error.found)) and texts == (error.expected, error.fix, type(error))


def said(problem: Problem) -> str:
    return problem.found.format(1, 1, name="init_images[0]").split(" ", 1)[1]


# ── what is taken ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("how", [bytes, as_text, as_url])
def test_a_picture_is_read_as_pillow_reads_it(kind: str, how: Any) -> None:
    data = encoded(kind)
    read = read_picture(how(data), "image")
    assert read.mode == "RGB"
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(np.asarray(read), np.asarray(expected.convert("RGB")))
    assert examine(data, "image") == PictureFile(kind, *RGB.size)


@pytest.mark.parametrize(
    "head",
    [
        *("data:image/png;base64,", "DATA:Image/PNG;BASE64,", "data:;base64,", "data:image/jpeg;base64,"),
        *("data:image/png;charset=utf-8;base64,", "data:application/octet-stream;base64,"),
    ],
)
def test_a_data_url_may_name_any_type(head: str) -> None:
    """The first bytes of the file decide."""
    assert read_picture(as_url(encoded("WEBP"), head), "image").size == RGB.size


WEBP_WAYS: dict[str, dict[str, Any]] = {
    "lossy": {},
    "lossless": {"lossless": True},
    "with EXIF": {"exif": Image.Exif()},
    "lossless with ICC": {"lossless": True, "icc_profile": b"x" * 33},
}


@pytest.mark.parametrize("options", WEBP_WAYS.values(), ids=WEBP_WAYS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(40, 24), (9, 180), (1025, 64)])
def test_sizes_of_webp(options: dict[str, Any], mode: str, size: tuple[int, int]) -> None:
    picture = RGB.resize(size).convert(mode)
    if mode == "RGBA":
        picture.putpixel((0, 0), (1, 2, 3, 100))
    assert examine(encoded("WEBP", picture, **options), "image") == PictureFile("WEBP", *size)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"comment": "x" * 99}]
)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_sizes_of_jpeg(options: dict[str, Any], mode: str) -> None:
    data = encoded("JPEG", RGB.convert(mode), **options)
    assert examine(data, "image") == PictureFile("JPEG", *RGB.size)
    filled = data[:2] + b"\xff\xff" + data[2:]  # filling before a marker
    assert read_picture(filled, "image").size == RGB.size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_of_png(mode: str) -> None:
    """Report 30: what has no alpha becomes RGB as Pillow converts it; 16 bits keep their upper 8."""
    if mode == "I;16":
        shades = (np.arange(960).reshape(24, 40) * 68).astype(np.uint16)
        read = read_picture(encoded("PNG", Image.fromarray(shades)), "image")
        assert read.mode == "RGB"
        assert np.array_equal(
            np.asarray(read), np.repeat((shades >> 8).astype(np.uint8)[..., None], 3, axis=2)
        )
        return
    picture = RGB.convert(mode)
    read = read_picture(encoded("PNG", picture), "image")
    expected = picture.convert("RGBA" if mode in ("LA", "RGBA") else "RGB")
    assert (read.mode, read.tobytes()) == (expected.mode, expected.tobytes())


def test_a_palette_may_have_transparency() -> None:
    data = encoded("PNG", RGB.quantize(8), transparency=bytes([0, 255, 128, 255, 255, 255, 255, 255]))
    read = read_picture(data, "image")
    assert read.mode == "RGBA"
    assert read.tobytes() == Image.open(io.BytesIO(data)).convert("RGBA").tobytes()
    assert len(set(read.getchannel("A").tobytes())) == 3


@pytest.mark.parametrize("inverted", [False, True])
def test_cmyk(inverted: bool) -> None:
    data = encoded("JPEG", RGB.convert("CMYK"), quality=95)
    if inverted:  # without the mark of Adobe the same bytes are still what Pillow takes them for
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    read = read_picture(data, "image")
    assert read.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    if not inverted:
        assert np.abs(np.asarray(read).astype(int) - SMOOTH).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    read = read_picture(data, "image")
    assert (read.size, read.tobytes()) == (expected.size, expected.tobytes())
    again = read_image(read)  # as a pipeline does
    np.testing.assert_array_equal(again, np.asarray(expected))


def test_what_xmp_says_of_the_orientation_counts_once() -> None:
    told = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="3"/></x:xmpmeta>'
    for kind in ("JPEG", "WEBP"):
        data = encoded(kind, xmp=told, **({"quality": 100} if kind == "JPEG" else {"lossless": True}))
        stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        read = read_image(read_picture(data, "image"))
        np.testing.assert_array_equal(read, stored[::-1, ::-1])


def test_only_the_first_picture_of_a_jpeg_is_looked_at() -> None:
    """Phones add a second one, with the gains of bright screens."""
    data = io.BytesIO()
    RGB.save(data, "MPO", save_all=True, append_images=[RGB.rotate(180)])
    assert Image.open(io.BytesIO(data.getvalue())).n_frames == 2
    read = read_picture(data.getvalue(), "image")
    assert read.tobytes() == Image.open(io.BytesIO(data.getvalue())).convert("RGB").tobytes()


def test_damaged_exif_warns_nobody() -> None:
    data = encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\1\x12\0\3\0\0\0\1\0\6")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(data, "image").mode == "RGB"


# ── what is no picture ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sent", [None, True, 7, 1.5, [], ["aGVsbG8="], {"url": "x"}, {}, object()])
def test_a_field_of_another_type_is_named(sent: object) -> None:
    """Report 22: a mask in a list is refused, not left out."""
    with pytest.raises(PictureError, match=r"^mask is no text; expected base64 of one whole picture"):
        read_picture(sent, "mask")
    assert said(picture_limits.NO_TEXT) in str(refused(sent))


ALPHABET = [
    *("not base64!", "aGVs bG8=", "aGVsbG8", "aGVs\nbG8=", "aGVs-_8=", "=", "aGVsbG8==", "äöü", "a", "\0"),
    *(
        "data:image/png,%89PNG",
        "data:image/png,aGVsbG8=",
        "data:image/png;base64",
        "data:image/png;BASE32,AAAA",
        "data:" + "a" * 1000,
    ),
    *("data:" + ";a=b" * 5 + ";base64,AAAA", "data:image/png;base64,data:image/png;base64,AAAA", " AAAA"),
    *("aGVs=bG8", "AA==AA==", "data:image/png;base64, AAAA"),
]


@pytest.mark.parametrize("sent", ALPHABET)
def test_the_alphabet_is_strict(sent: str) -> None:
    assert said(picture_limits.NO_BASE64) in str(refused(sent))


@pytest.mark.parametrize("sent", ["", b"", "data:image/png;base64,"])
def test_nothing_is_no_picture(sent: object) -> None:
    assert said(picture_limits.EMPTY) in str(refused(sent))


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 64,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"\x89PNG\n",
        b"\xff\xd8",
        *(encoded(kind) for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA")),
    ],
    ids=lambda data: data[:4].hex(),
)
def test_three_kinds_are_taken(data: bytes) -> None:
    """By their first bytes, whatever the data URL says."""
    for sent in (data, as_url(data)):
        assert said(picture_limits.UNKNOWN_KIND) in str(refused(sent))


WHOLE = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP")}


@pytest.mark.parametrize("kind", WHOLE)
def test_truncated_files(kind: str) -> None:
    """Report 30, at every length."""
    for length in range(len(WHOLE[kind])):
        refused(WHOLE[kind][:length])


@pytest.mark.parametrize("kind", WHOLE)
def test_corrupt_files(kind: str) -> None:
    """Report 29: a byte changed anywhere gives a picture of that size or an error of ours, never another."""
    data, refusals = WHOLE[kind], 0
    for at, value in itertools.product(range(0, len(data), 1 + len(data) // 300), (0x00, 0xFF)):
        damaged = data[:at] + bytes([value]) + data[at + 1 :]
        try:
            file = examine(damaged, "init_images[0]")
            assert read_picture(damaged, "init_images[0]").size == (file.width, file.height)
        except PictureError:
            refused(damaged)
            refusals += 1
    assert refusals > 20


def test_texts_of_libraries_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 29: such a text once had an address of the process's memory in it."""

    def leaks(file: Any) -> Any:
        raise OSError(f"cannot identify {file!r} in /home/someone at 0x7f00deadbeef")

    monkeypatch.setitem(pictures._READERS, "PNG", leaks)
    assert said(picture_limits.DAMAGED) in str(refused(WHOLE["PNG"]))


def test_a_machine_without_memory_does_not_blame_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> Any:
        raise MemoryError

    monkeypatch.setitem(pictures._READERS, "PNG", full)
    with pytest.raises(MemoryError):
        read_picture(WHOLE["PNG"], "image")


@pytest.mark.parametrize(
    "data",
    [
        HEADER,
        HEADER + chunk(b"IEND", b""),
        HEADER + chunk(b"IDAT", b"") + WHOLE["PNG"][8:],  # the size does not stand first
        HEADER + WHOLE["PNG"][8:33] + WHOLE["PNG"][8:],  # and stands twice
        HEADER + chunk(b"IHDR", b"\0\0\0\x28\0\0\0") + WHOLE["PNG"][33:],
        WHOLE["PNG"][:33] + struct.pack(">I", 2**32 - 1) + WHOLE["PNG"][37:],
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xd8" + WHOLE["JPEG"][2:],
        b"\xff\xd8\xff\xda\0\x0c" + b"\0" * 64,  # pixels without a size
        WHOLE["JPEG"][:20] + b"\0" + WHOLE["JPEG"][20:],
        WHOLE["JPEG"][:20] + b"\xff\xc0\0\x0b\x08\0\x18\0\x28\1\1\x11\0" + WHOLE["JPEG"][20:],  # two sizes
        b"RIFF\x04\0\0\0WEBP",
        b"RIFF\xff\xff\xff\xffWEBP" + WHOLE["WEBP"][12:],
        WHOLE["WEBP"][:20] + b"\xff\xff\xff" + WHOLE["WEBP"][23:26] + b"\xff" + WHOLE["WEBP"][27:],
        b"RIFF\x1c\0\0\0WEBPVP8L\x10\0\0\0\x2e" + b"\0" * 15,
        b"RIFF\x1c\0\0\0WEBPVP8L\x02\0\0\0\x2f" + b"\0" * 15,
    ],
    ids=lambda data: data[:40].hex(),
)
def test_files_that_contradict_themselves(data: bytes) -> None:
    assert said(picture_limits.DAMAGED) in str(refused(data))


def riff(*parts: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for kind, content in parts
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([flags, 0, 0, 0]) + sizes


def lossless(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0" * 8


def test_a_canvas_is_as_large_as_its_picture() -> None:
    assert examine(riff(canvas(40, 24), lossless(40, 24)), "image") == PictureFile("WEBP", 40, 24)
    for data in (
        riff(canvas(40, 24), lossless(41, 24)),
        riff(lossless(40, 24), lossless(40, 24)),
        riff(canvas(40, 24)),
    ):
        assert said(picture_limits.DAMAGED) in str(refused(data))


def test_what_a_file_says_is_compared_with_what_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "examine", lambda *given: PictureFile("PNG", 40, 25))
    assert said(picture_limits.DAMAGED) in str(refused(WHOLE["PNG"]))


# ── what is too much ────────────────────────────────────────────────────────────────────────────────────


def grey(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG of zeros, with the pixels compressed block by block: there is never more than one in memory."""
    size = ((width * depth + 7) // 8 + 1) * height
    packer, parts, checksum = zlib.compressobj(9, zlib.DEFLATED, -15), [b"\x78\xda"], 1
    block = bytes(min(size, 2**24))
    packer.compress(block)
    packer.flush(zlib.Z_FULL_FLUSH)
    same = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(size // len(block)):
        parts.append(same)
        checksum = zlib.adler32(block, checksum)
    rest = bytes(size % len(block))
    parts += [packer.compress(rest) + packer.flush(), struct.pack(">I", zlib.adler32(rest, checksum))]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return HEADER + header + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")


def test_the_grey_files_are_pictures() -> None:
    for depth in (1, 8):
        assert read_picture(grey(100, 60, depth), "image").getextrema() == ((0, 0),) * 3


MEMORY = """
import base64, io, resource, sys
from PIL import Image
from latentrt.serve.pictures.limits import PictureTooLargeError
from latentrt.serve.pictures.exchange import read_picture
small = io.BytesIO()
Image.new("RGB", (64, 64)).save(small, "PNG")
read_picture(small.getvalue(), "image")
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_picture(data, "image")
except PictureTooLargeError as error:
    print(error.found)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
@pytest.mark.parametrize(("side", "depth", "least"), [(30_000, 1, 10**5), (30_000, 8, 8 * 10**5)])
def test_a_small_file_of_gigapixels(side: int, depth: int, least: int) -> None:
    """Report 32: refused with less than 20 MB of memory."""
    data = grey(side, side, depth)
    assert least < len(data) < 3 * least
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, input=data, check=True, timeout=300, stdout=subprocess.PIPE)
    found, grown = run.stdout.decode().splitlines()
    assert found == f"image has {side} x {side} pixels"
    assert int(grown) < 20


@pytest.mark.parametrize(
    "data",
    [
        png(4097, 4096, b""),
        png(2**31 - 1, 2**31 - 1, b""),
        b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\1\1\x11\0",
        riff(canvas(2**24, 2**24)),
        riff(lossless(16384, 16384)),
        riff((b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f")),
    ],
    ids=["one row more", "png", "jpeg", "canvas", "lossless", "lossy"],
)
def test_pixels_are_counted_before_they_are_decoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in WHOLE:
        monkeypatch.setitem(pictures._READERS, kind, pytest.fail)
    error = refused(data)
    assert isinstance(error, PictureTooLargeError)
    assert error.expected == f"at most {4096 * 4096} pixels"


def test_the_largest_picture_is_taken() -> None:
    assert read_picture(grey(4096, 4096, 1), "image").size == (4096, 4096)


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ((1, 1), picture_limits.TOO_SMALL),
        ((7, 8), picture_limits.TOO_SMALL),
        ((8, 8), None),
        ((1, 10_000), picture_limits.TOO_SMALL),
        ((8, 160), None),
        ((161, 8), picture_limits.TOO_LONG),
        ((10, 10_000), picture_limits.TOO_LONG),
    ],
)
@pytest.mark.parametrize("kind", WHOLE)
def test_odd_shapes(kind: str, size: tuple[int, int], problem: Problem | None) -> None:
    """Report 30: pictures of a pixel, or of one row."""
    data = encoded(kind, RGB.resize(size))
    if problem is None:
        assert read_picture(data, "image").size == size
    else:
        error = refused(data)
        assert error.found == problem.found.format(*size, name="init_images[0]")
        assert read_picture(data, "image", NO_LIMITS).size == size  # without the limit nothing else objects


def test_bytes_are_counted_before_base64_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(PICTURE_LIMITS, file_bytes=len(WHOLE["PNG"]))
    for sent in (WHOLE["PNG"], as_text(WHOLE["PNG"]), as_url(WHOLE["PNG"])):
        assert read_picture(sent, "image", limits).size == RGB.size
    for sent in (WHOLE["PNG"] + b"\0", as_text(WHOLE["PNG"] + b"\0\0\0"), as_url(WHOLE["PNG"] + b"\0\0\0")):
        assert isinstance(refused(sent, limits), PictureTooLargeError)
    monkeypatch.setattr(pictures.base64, "b64decode", pytest.fail)
    error = refused("A" * 40_000_000)
    assert error.found == "init_images[0] has 30000000 bytes"


ANIMATIONS = {
    "webp": encoded("WEBP", save_all=True, append_images=[RGB.rotate(180)], lossless=True),
    "apng": encoded("PNG", save_all=True, append_images=[RGB.rotate(180)]),
    "apng of 10,000": png(
        40, 24, b"", chunk(b"acTL", struct.pack(">II", 10_000, 0)), *[chunk(b"fcTL", bytes(26))] * 10_000
    ),
    "apng that says nothing": png(40, 24, b"", chunk(b"fcTL", bytes(26))),
    "apng with data alone": png(40, 24, b"", chunk(b"fdAT", bytes(26))),
    "webp of 10,000": riff(canvas(40, 24, 2), (b"ANIM", bytes(6)), *[(b"ANMF", bytes(24))] * 10_000),
    "webp by its flag": riff(canvas(40, 24, 2), lossless(40, 24)),
    "webp that says nothing": riff(canvas(40, 24), (b"ANIM", bytes(6)), (b"ANMF", bytes(24))),
    "webp with a frame alone": riff(canvas(40, 24), (b"ANMF", bytes(24)), lossless(40, 24)),
}


@pytest.mark.parametrize("data", ANIMATIONS.values(), ids=ANIMATIONS)
def test_animations_are_refused_undecoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 31."""
    for kind in WHOLE:
        monkeypatch.setitem(pictures._READERS, kind, pytest.fail)
    assert said(picture_limits.ANIMATED) in str(refused(data))


def text_chunks(count: int, size: int) -> list[bytes]:
    return [chunk(b"tEXt", b"key\0" + b"x" * (size - 4))] * count


def packed(kind: bytes, size: int) -> bytes:
    head = {b"zTXt": b"key\0\0", b"iCCP": b"profile\0\0", b"iTXt": b"key\0\1\0\0\0"}[kind]
    return chunk(kind, head + zlib.compress(bytes(size), 9))


def described(size: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E] = "x" * size
    return exif


PIXELS = zlib.compress(bytes((40 * 3 + 1) * 24))
FEW = replace(PICTURE_LIMITS, metadata_bytes=10_000, inflated_bytes=5_000, parts=20, scans=12)
ENOUGH = {
    "texts": png(40, 24, PIXELS, *text_chunks(10, 1000)),
    "packed texts": png(40, 24, PIXELS, packed(b"zTXt", 4900), packed(b"iTXt", 4900)),
    "a packed profile": png(40, 24, PIXELS, packed(b"iCCP", 5000)),
    "parts": png(40, 24, PIXELS, *text_chunks(17, 10)),
    "segments": encoded("JPEG", comment="x" * 9900),
    "scans": encoded("JPEG", progressive=True),
    "webp": encoded("WEBP", exif=described(9000)),
    "a text that is not packed": png(40, 24, PIXELS, chunk(b"iTXt", b"key\0\0\0\0\0" + b"x" * 99)),
    "a text of nothing": png(40, 24, PIXELS, chunk(b"iTXt", b"key"), chunk(b"zTXt", b"key\0\0no zlib")),
}
TOO_MUCH = {
    "texts": png(40, 24, PIXELS, *text_chunks(10, 1001)),
    "packed texts": png(40, 24, PIXELS, *[packed(b"zTXt", 4900), packed(b"iTXt", 4900)] * 2),
    "zTXt": png(40, 24, PIXELS, packed(b"zTXt", 5001)),
    "iTXt": png(40, 24, PIXELS, packed(b"iTXt", 5001)),
    "iCCP": png(40, 24, PIXELS, packed(b"iCCP", 5001)),
    "behind the pixels": WHOLE["PNG"][:-12] + packed(b"zTXt", 5001) + WHOLE["PNG"][-12:],
    "segments": encoded("JPEG", comment="x" * 10_000),
    "webp": encoded("WEBP", exif=described(11_000)),
}
TOO_MANY = {
    "chunks": png(40, 24, PIXELS, *text_chunks(18, 10)),
    "segments": b"\xff\xd8" + b"\xff\xe5\0\2" * 20 + WHOLE["JPEG"][2:],
    "scans": WHOLE["JPEG"][:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 12 + b"\xff\xd9",
    "webp": riff(*[(b"junk", b"")] * 20, lossless(40, 24)),
}


@pytest.mark.parametrize("data", ENOUGH.values(), ids=ENOUGH)
def test_metadata_within_the_limits(data: bytes) -> None:
    assert read_picture(data, "image", FEW).size == (40, 24)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        *(
            pytest.param(data, picture_limits.TOO_MUCH_TEXT, id=f"text: {name}")
            for name, data in TOO_MUCH.items()
        ),
        *(
            pytest.param(data, picture_limits.TOO_MANY_PARTS, id=f"parts: {name}")
            for name, data in TOO_MANY.items()
        ),
    ],
)
def test_metadata_beyond_them(data: bytes, problem: Problem) -> None:
    """Report 32, texts."""
    error = refused(data, FEW)
    assert isinstance(error, PictureTooLargeError)
    assert said(problem) in str(error)
    assert examine(data, "image", NO_LIMITS).width == 40  # without the limits nothing else objects


def test_a_text_bomb_is_inflated_up_to_the_limit() -> None:
    """64 MB in 64 kB; Pillow's own error for it would be another one."""
    data = png(40, 24, PIXELS, packed(b"zTXt", 2**26))
    assert len(data) < 70_000
    assert said(picture_limits.TOO_MUCH_TEXT) in str(refused(data))
    mebibyte = png(40, 24, PIXELS, packed(b"zTXt", 2**20))
    assert read_picture(mebibyte, "image").size == (40, 24)


@pytest.mark.parametrize("field", list(PictureLimits.__dataclass_fields__))
def test_a_limit_that_is_gone_is_noticed(field: str) -> None:
    """Each limit alone stands between its picture and the decoder."""
    samples: dict[str, tuple[bytes, PictureLimits]] = {
        "file_bytes": (WHOLE["PNG"], replace(PICTURE_LIMITS, file_bytes=100)),
        "pixels": (WHOLE["PNG"], replace(PICTURE_LIMITS, pixels=40 * 23)),
        "shortest_side": (WHOLE["PNG"], replace(PICTURE_LIMITS, shortest_side=25)),
        "ratio": (WHOLE["PNG"], replace(PICTURE_LIMITS, ratio=1)),
        "metadata_bytes": (TOO_MUCH["texts"], FEW),
        "inflated_bytes": (TOO_MUCH["zTXt"], FEW),
        "parts": (TOO_MANY["chunks"], FEW),
        "scans": (encoded("JPEG", progressive=True), replace(PICTURE_LIMITS, scans=3)),
    }
    data, limits = samples[field]
    refused(data, limits)
    without = replace(limits, **{field: getattr(NO_LIMITS, field)})
    assert read_picture(data, "image", without).size == (40, 24)


def refused_animation(name: str) -> None:
    assert said(picture_limits.ANIMATED) in str(refused(ANIMATIONS[name]))


def forgiving(text: str, validate: bool, decode: Any = base64.b64decode) -> bytes:
    return bytes(decode(text))


@pytest.mark.parametrize(
    ("place", "name", "mutant", "test"),
    [
        (picture_files, "_PNG_ANIMATION", (), lambda: refused_animation("apng")),
        (picture_files, "_WEBP_ANIMATED", 0, lambda: refused_animation("webp by its flag")),
        (pictures.base64, "b64decode", forgiving, lambda: test_the_alphabet_is_strict("aGVs bG8=")),
        (pictures, "DAMAGED", Problem("{name}: 0x7f", "", ""), lambda: refused(png(40, 24, b"no zlib"))),
        (
            pictures,
            "_DATA_URL",
            re.compile(".*,"),
            lambda: test_the_alphabet_is_strict("data:image/png,aGVsbG8="),
        ),
        (pictures, "from_wide_grey", lambda image, name: image, lambda: test_modes_of_png("I;16")),
        (pictures, "upright", lambda image: image, lambda: test_pictures_are_turned_upright("PNG", 6)),
    ],
    ids=["apng", "webp", "alphabet", "texts", "data url", "16 bits", "orientation"],
)
def test_a_check_that_is_gone_is_noticed(
    place: Any, name: str, mutant: Any, test: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    test()
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test()


@given(
    kind=st.sampled_from(sorted(WHOLE)), edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)))
)
@settings(max_examples=300, deadline=None)
def test_whatever_the_file_the_error_is_ours(kind: str, edits: list[tuple[int, bytes]]) -> None:
    data = WHOLE[kind]
    for at, inserted in edits:
        data = data[:at] + inserted + data[at + len(inserted) // 2 :]
    try:
        read_picture(data, "init_images[0]")
    except PictureError:
        refused(data)


# ── nothing is fetched, nothing is opened ───────────────────────────────────────────────────────────────

_watched: list[tuple[str, Any]] | None = None
_WATCHED_EVENTS = (
    "open",
    "os.",
    "pathlib",
    "socket.",
    "urllib.",
    "http.",
    "ftplib.",
    "subprocess",
    "shutil.",
)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event.startswith(_WATCHED_EVENTS):
        _watched.append((event, arguments))


@pytest.fixture
def touched() -> Iterator[list[tuple[str, Any]]]:
    """What of the system a test touches: files, names, connections. (A hook stays for ever: there is one.)"""
    global _watched
    if not getattr(_watch, "added", False):
        sys.addaudithook(_watch)
        _watch.added = True  # type: ignore[attr-defined]
    refused("warm up: whatever is imported late")
    read_picture(WHOLE["PNG"], "image")
    _watched = []
    yield _watched
    _watched = None


def addresses(port: int) -> list[str]:
    host = f"127.0.0.1:{port}"
    return [
        *(
            f"http://{host}/a.png",
            f"https://{host}/a.png",
            f"HTTP://{host}",
            f" http://{host}/",
            f"\thttp://{host}",
        ),
        *(f"http:\\\\{host}\\a.png", f"http:/{host}/a.png", f"//{host}/a.png", f"\\\\{host}\\share\\a.png"),
        *(f"http://safe.example\\@{host}/", f"http://{host}#@safe.example/", f"http://safe.example@{host}/"),
        *(
            f"http://localhost:{port}/",
            f"http://[::1]:{port}/",
            f"http://0x7f000001:{port}/",
            f"http://0:{port}/",
        ),
        *(f"http://2130706433:{port}/", f"http://127.1:{port}/", f"http%3A%2F%2F{host}", f"h\nttp://{host}/"),
        *(
            f"ftp://{host}/a.png",
            f"gopher://{host}/",
            f"file://{host}/a.png",
            f"jar:http://{host}!/",
            f"ws://{host}",
        ),
        *(
            f"data:http://{host}/;base64,",
            f"data:image/png;base64,http://{host}/",
            f"url({host})",
            f"blob:{host}",
        ),
        *(f"data:text/html,<img src=http://{host}>", f"\uff48ttp://{host}/", host),
    ]


PATHS = [
    *(
        "/etc/passwd",
        "../../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "..%5Cwindows",
        "file:///etc/passwd",
    ),
    *(
        "C:\\Windows\\win.ini",
        "\\\\?\\C:\\a",
        "CON",
        "NUL",
        "/dev/zero",
        "/proc/self/environ",
        "a.png\0.txt",
        "~/a.png",
    ),
    *("\\\\server\\share\\a.png", "/dev/stdin", "etc/passwd00==", "////", "proc/self/mem+"),
]


def test_no_address_is_called(touched: list[tuple[str, Any]]) -> None:
    """Report 36: a socket that listens gets no connection, and no name is looked up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        touched.clear()
        for sent in addresses(server.getsockname()[1]):
            error = refused(sent)
            assert "ase64" in str(error) or said(picture_limits.EMPTY) in str(error)
        assert touched == []
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("path", PATHS)
def test_no_path_is_opened(path: str, touched: list[tuple[str, Any]]) -> None:
    """Report 37. A few paths are base64, of no picture."""
    touched.clear()
    refused(path)
    assert touched == []


def test_the_watch_sees_what_it_watches(touched: list[tuple[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 1))
    assert {"open", "socket.connect"} <= {event for event, _ in touched}


# ── pictures out ────────────────────────────────────────────────────────────────────────────────────────


class Drawn:
    """Stands for a `Result`, of which a file needs only this."""

    def __init__(self, infotext: str = "a circle\nSteps: 2") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._infotext = infotext

    def to_bytes(self, kind: str, index: int, *, quality: int | None, metadata: bool = True) -> bytes:
        from latentrt.runtime.pictures.write import encode_picture

        self.calls.append((kind, index, quality, metadata))
        told: dict[str, Any] = {"infotext": self._infotext, "record": {"seed": 1}} if metadata else {}
        return encode_picture(SMOOTH, kind, quality=quality, **told)


@pytest.mark.parametrize("name", [*FORMATS, "JPG", "PNG", "WebP"])
def test_a_result_as_a_file(name: str) -> None:
    out = write_picture(Drawn(), 0, format=name)  # type: ignore[arg-type]
    assert out.recorded
    assert Image.open(io.BytesIO(out.content)).format == out.format.kind
    assert Image.open(io.BytesIO(out.content)).get_format_mimetype() == out.format.media_type
    told = read_metadata(out.content)
    assert (told.parameters, told.record) == ("a circle\nSteps: 2", {"seed": 1})
    assert base64.b64decode(out.as_base64, validate=True) == out.content
    assert read_picture(out.as_base64, "image").size == RGB.size


@pytest.fixture(scope="module")
def result() -> Any:
    from latentrt.runtime.pipeline import Pipeline

    with Pipeline.open("demo") as pipe:
        return pipe("a red circle on a blue background", num_inference_steps=1, seed=1)


def test_a_real_result_keeps_its_record(result: Any) -> None:
    out = write_picture(result)
    assert out.content == result.to_bytes("PNG", 0)
    with Image.open(io.BytesIO(out.content)) as opened:
        assert isinstance(opened, PngImagePlugin.PngImageFile)
        assert opened.text["parameters"] == result.infotext(0)
        assert json.loads(opened.text["latentrt"]) == json.loads(json.dumps(result.record(0)))
    plain = write_picture(result, format="webp", quality=80, metadata=False)
    assert (plain.recorded, plain.format.suffix) == (False, ".webp")
    assert read_metadata(plain.content).parameters is None


def test_a_prompt_that_a_jpeg_cannot_hold_costs_the_record_alone() -> None:
    drawn = Drawn("x" * 40_000)
    out = write_picture(drawn, 2, format="jpeg", quality=90)  # type: ignore[arg-type]
    assert not out.recorded
    assert drawn.calls == [("JPEG", 2, 90, True), ("JPEG", 2, 90, False)]
    assert read_picture(out.content, "image").size == RGB.size


@pytest.mark.parametrize(
    "options", [{"format": "gif"}, {"format": ""}, {"quality": 50}, {"format": "webp", "quality": 0}]
)
def test_what_cannot_be_written(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        write_picture(Drawn(), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        write_preview(RGB, **{"format": "png", **options})


def test_an_unknown_format_is_cut_short() -> None:
    with pytest.raises(UsageError, match=f"the output format '{'x' * 40}'; expected one of png, jpeg, webp"):
        find_format("x" * 1000)


def test_previews_have_no_record() -> None:
    out: SentPicture = write_preview(RGB, quality=60)
    assert (out.format.media_type, out.recorded) == ("image/jpeg", False)
    assert read_metadata(out.content).parameters is None
    assert len(out.content) < len(write_preview(RGB, quality=95).content)
