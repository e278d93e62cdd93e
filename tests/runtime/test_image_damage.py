"""Bombs and damaged files: a picture or an error, little memory, no warnings."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.read import FORMATS, read_image
from tests.runtime.picture_files import NOISE, RGB, chunk, encoded, png

# ── bombs ──────────────────────────────────────────────────────────────────────────────────────


def tiff(side: int, strip: bytes, tile: int = 0) -> bytes:
    """8-bit grey, deflated: one strip, or one tile."""
    where = {322: tile, 323: tile, 324: 0, 325: len(strip)} if tile else {273: 0, 278: side, 279: len(strip)}
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, **where}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[324 if tile else 273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip


def with_size(kind: str, at: int, size: bytes) -> bytes:
    data = bytearray(encoded(kind))
    data[at : at + len(size)] = size
    return bytes(data)


def webp(side: int) -> bytes:
    canvas = bytes(4) + 2 * (side - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + encoded("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


ZEROS = zlib.compress(bytes(10**8), 1)  # 0.4 MB
DOT = zlib.compress(bytes(14))  # 2 x 2 pixels
BOMBS = {
    "PNG of 100k x 100k": png(100_000, 100_000, b""),
    "PNG of 8200 x 8200": png(8200, 8200, b""),
    "PNG of 10k x 10k": png(10_000, 10_000, b""),  # Pillow warns of it, and goes on
    "PNG's zTXt": png(2, 2, DOT, chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "PNG's iTXt": png(2, 2, DOT, chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "PNG's iCCP": png(2, 2, DOT, chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "PNG's many texts": png(
        2, 2, DOT, *[chunk(b"zTXt", b"a%d\0\0" % n + zlib.compress(bytes(10**6), 1)) for n in range(80)]
    ),
    "JPEG of 64k x 64k": with_size("JPEG", encoded("JPEG").index(b"\xff\xc0") + 5, b"\xff" * 4),
    "WebP of 100k x 100k": webp(100_000),
    "WebP of 13k x 13k": webp(13_000),
    "BMP of 100k x 100k": with_size("BMP", 18, struct.pack("<ii", 100_000, 100_000)),
    "GIF of 64k x 64k": with_size("GIF", 6, b"\xff" * 4),
    "TIFF of 100k x 100k": tiff(100_000, b""),
    "TIFF's tile": tiff(16, ZEROS, tile=10_000),
}
HARMLESS = {"PNG's pixels": png(2, 2, ZEROS), "TIFF's strip": tiff(16, ZEROS)}  # read no further than needed

CHILD = """
import pathlib, resource, sys
from PIL import Image
from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.read import read_image
Image.init()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 512 * 2**20,) * 2)
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before = peak()
    try:
        result = str(read_image(path).shape)
    except UsageError as error:
        result = str(error)
    print(path.name, peak() - before, result, sep="|")
"""


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for name, data in {**BOMBS, **HARMLESS}.items():
        (tmp_path / name).write_bytes(data)
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, tmp_path], capture_output=True, text=True, check=True
    )
    assert not child.stderr
    found = {name: (int(grown), result) for name, grown, result in map(_fields, child.stdout.splitlines())}
    assert set(found) == {*BOMBS, *HARMLESS}
    for name, (grown, result) in found.items():
        # [54 MiB, for many texts, of which Pillow reads 64 MB]
        assert grown < 100, (name, grown)
        assert "MemoryError" not in result
        assert ("expected" in result) == (name in BOMBS), (name, result)


def _fields(line: str) -> list[str]:
    return line.split("|", 2)


def test_size_is_checked_before_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    (tmp_path / "p").write_bytes(BOMBS["PNG of 8200 x 8200"])
    with pytest.raises(UsageError, match=r"image has 8200 x 8200 pixels; expected .* at most 67 megapixels"):
        read_image(tmp_path / "p")
    (tmp_path / "p").write_bytes(BOMBS["TIFF's tile"])
    with pytest.raises(UsageError, match="16 x 16 pixels in tiles of 10000 x 10000"):
        read_image(tmp_path / "p")


def test_warnings_of_pillow_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").write_bytes(BOMBS["PNG of 10k x 10k"])
    open_now = Image.open

    def open_slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.002)  # so that other threads come in between, unless something keeps them out
        return open_now(*arguments, **options)

    def attempt(_: int) -> None:
        with pytest.raises(UsageError, match="10000 x 10000 pixels"):
            read_image(tmp_path / "p")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        monkeypatch.setattr(Image, "open", open_slowly)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(attempt, range(16)))
        assert warnings.filters == before
    assert seen == []


# ── damage ─────────────────────────────────────────────────────────────────────────────────────

TRANSLUCENT = RGB.convert("RGBA")
TRANSLUCENT.putalpha(RGB.getchannel("G"))
EXIF = Image.Exif()
EXIF[ExifTags.Base.Orientation] = 6
EXIF[ExifTags.Base.ImageDescription] = "a picture"
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("parameters", "a picture " * 9)
TEXT.add_itxt("other", "a picture " * 9, zip=True)
WHOLE = {
    "PNG": [
        encoded("PNG", exif=EXIF, icc_profile=b"p" * 40),
        encoded("PNG", RGB.quantize(8), transparency=3),
    ],
    "JPEG": [encoded("JPEG", exif=EXIF), encoded("JPEG", progressive=True)],
    "WEBP": [encoded("WEBP", exif=EXIF), encoded("WEBP", TRANSLUCENT, lossless=True)],
    "BMP": [encoded("BMP"), encoded("BMP", RGB.quantize(16))],
    "GIF": [encoded("GIF"), encoded("GIF", RGB, save_all=True, append_images=[Image.fromarray(NOISE)])],
    "TIFF": [
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", compression="tiff_adobe_deflate", exif=EXIF),
        encoded("TIFF", RGB.convert("1"), compression="group4"),
    ],
}
CASES = 2000 // len(WHOLE) + 1


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Cut off, or with bytes changed; most of a file's structure is in front."""
    if generator.random() < 0.25:
        return data[: generator.integers(0, len(data))]
    content = bytearray(data)
    for _ in range(generator.integers(1, 6)):
        end = len(content) if generator.random() < 0.3 else min(len(content), 200)
        content[generator.integers(0, end)] = generator.choice([0, 1, 0x7F, 0xFF, generator.integers(0, 256)])
    return resealed(content) if data[1:4] == b"PNG" and generator.random() < 0.7 else bytes(content)


def resealed(content: bytearray) -> bytes:
    """A PNG with checksums that are right: else the damage reaches nobody but who compares them."""
    at = 8
    while at + 8 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(content)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_pictures_or_errors(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(FORMATS.index(kind))
    pictures = 0
    for case in range(CASES):
        (tmp_path / "p").write_bytes(damaged(WHOLE[kind][case % len(WHOLE[kind])], generator))
        try:
            image = read_image(tmp_path / "p")
        except UsageError:
            continue
        pictures += 1
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
    assert 10 < pictures < CASES - 50  # some of both; checksums make pictures rare in PNG
