"""Picture files for the tests of reading: encoded by Pillow, or put together chunk by chunk."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[:3, :4]).resize((40, 24), Image.Resampling.BICUBIC))
RGB = Image.fromarray(SMOOTH)


def encoded(kind: str, image: Image.Image = RGB, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    parts = (header, *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
