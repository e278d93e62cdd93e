"""The pictures, latents and tables that a request starts from: names, hashes, and finding them again.

Hashes are of decoded pixels, so any lossless copy of a picture is the same input.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...engines.errors import UsageError
from ...engines.spec import Array
from ..pictures.read import read_image, read_latents
from ..sampling.table import Table
from ..sampling.table_file import read_table, table_sha256

INPUTS = ("image", "mask_image", "latents", "table")
_BACKGROUNDS = {"image": 255, "mask_image": 0}  # of what is transparent, see `read_image`
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
_MOST_FILES = 1000  # of a folder that are looked at


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: its file's name, if it came from a file, and the hash of its values."""

    name: str | None
    sha256: str

    def to_json(self) -> dict[str, str]:
        """As a record has it."""
        return {**({"name": self.name} if self.name else {}), "sha256": self.sha256}


Inputs = Mapping[str, tuple[Input, ...]]


def fingerprint(values: Array | Table) -> str:
    """The sha256 (hex) of an array with its shape, whose floats count as float32; or of a table."""
    if isinstance(values, Table):
        return table_sha256(values)
    values = np.asarray(values, np.float32) if values.dtype.kind == "f" else values
    digest = hashlib.sha256(f"{values.dtype}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def read_mask(mask: Any) -> Array | None:
    """The parameter `mask_image`, read: (H, W, 3) uint8, if there is one. Raises UsageError."""
    if mask is None:
        return None
    return read_image(mask, name="mask_image", background=_BACKGROUNDS["mask_image"])


def describe_inputs(passed: Mapping[str, Any], loaded: Mapping[str, Any]) -> Inputs:
    """What INPUTS a request has, in the order of its pictures: one for all, or one each.

    Args:
        passed: the parameters as the caller passed them; files have names.
        loaded: the same, read: `image` a list of pictures or (N, C, H/8, W/8), `latents` (N, C, H/8, W/8).
    """
    found: dict[str, tuple[Input, ...]] = {}
    for name in INPUTS:
        if (values := loaded[name]) is not None:
            rows = [values] if name in ("mask_image", "table") else _rows(values)
            names = _names(passed[name], len(rows))
            pairs = zip(names, rows, strict=True)
            found[name] = tuple(Input(name=file, sha256=fingerprint(row)) for file, row in pairs)
    return found


def describe_pictures(passed: Any, pictures: Sequence[Array]) -> list[dict[str, str]]:
    """Names and hashes of pictures that steer, as a record has them; they were read of what was `passed`."""
    names = _names(passed, len(pictures))
    pairs = zip(names, pictures, strict=True)
    return [Input(name=name, sha256=fingerprint(one)).to_json() for name, one in pairs]


def _rows(values: Any) -> list[Array]:
    """Pictures as they are; latents one by one, (1, C, H/8, W/8)."""
    return list(cast(Any, values)) if isinstance(values, list) else [row[None] for row in values]


def _names(passed: Any, count: int) -> list[str | None]:
    several: Sequence[Any] = cast(Any, passed) if isinstance(passed, (list, tuple)) else [passed]
    names = [_name(one) for one in several]
    return names if len(names) == count else [None] * count


def _name(passed: Any) -> str | None:
    """The name of the file that was passed, or that a Pillow image was read from."""
    file: Any = getattr(passed, "filename", passed)
    return Path(cast(str, file)).name or None if isinstance(file, (str, os.PathLike)) else None


def find_input(name: str, wanted: Mapping[str, str], given: Any, folder: Path | None) -> Array | Table:
    """The input of that hash: what was given, else a file of the folder.

    Returns:
        (H, W, 3) uint8 of a picture, latents (1, C, H/8, W/8), or a table.

    Raises:
        UsageError: it is not there, or what was given is another one.
    """
    flag = {"mask_image": "--mask"}.get(name, f"--{name}")
    called = f"{wanted['name']!r}, " if "name" in wanted else ""
    if given is not None:
        for row in _read(name, given):
            if fingerprint(row) == wanted["sha256"]:
                return row
        raise UsageError(
            f"{name} is not what the picture started from",
            expected=f"{called}sha256 {wanted['sha256']}",
            fix="Pass that one, or draw a new picture without redrawing an old one.",
        )
    for path in _candidates(folder, wanted.get("name"), (".json",) if name == "table" else _SUFFIXES):
        try:
            rows = _read(name, path)
        except (UsageError, ValueError):  # what cannot be read is not it
            continue
        for row in rows:
            if fingerprint(row) == wanted["sha256"]:
                return row
    raise UsageError(
        f"the {name} that the picture started from is missing",
        expected=f"{called}sha256 {wanted['sha256']}, beside the picture or passed",
        fix=f"Pass {name}=…, or {flag} FILE.",
    )


def _candidates(folder: Path | None, name: str | None, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The file of that name first, then the others of the folder that may be one."""
    if folder is None:
        return
    if name and (folder / Path(name).name).is_file():
        yield folder / Path(name).name
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes)
    yield from islice(files, _MOST_FILES)


def _read(name: str, source: Any) -> list[Any]:
    """Every input that a file or a value holds. Raises UsageError or ValueError."""
    if name == "table":
        return [read_table(source)]
    if isinstance(source, (str, Path)) and str(source).endswith(".npy"):
        source = read_latents(source)
    if isinstance(source, np.ndarray) and source.ndim == 4 and cast(Array, source).dtype.kind == "f":
        return _rows(source)
    several: Sequence[Any] = cast(Any, source) if isinstance(source, (list, tuple)) else [source]
    return [read_image(one, name=name, background=_BACKGROUNDS.get(name, 255)) for one in several]
