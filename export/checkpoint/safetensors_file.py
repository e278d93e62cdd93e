"""Safetensors files: the header checked by ourselves before anything maps the file, then tensors by name.

The layout (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, a JSON
object, and the tensors' bytes without gaps. Whatever that page forbids is refused here, so that nothing
behind this module meets an offset, a shape or a name that the file cannot hold.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ...engines.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own
# A parsed value takes up to 64 bytes of memory, so values are counted before they are parsed. A tensor has
# about 20 marks: the limit is over 200,000 tensors, where SDXL has 2,515.
_MARK_LIMIT = 2**22
_RANK_LIMIT = 32  # NumPy's, up to 1.x
_COUNT_LIMIT = 2**63  # sizes in bytes are signed 64-bit numbers everywhere
ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_FIX = "Download the file again, or have it written again by the safetensors library."


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Where a tensor lies in a safetensors file, and how it is read from there.

    Attributes:
        file: the safetensors file.
        name: the tensor's name in `file`.
        dtype: safetensors' name of the type, "F16".
        shape: what results after `rows`, `transposed`, and after dropping axes of size 1 at the end (a 1x1
            convolution that is read as a linear layer).
        rows: only these rows of the first axis, begin and end (OpenCLIP stores query, key and value as one).
        transposed: stored as (in, out), read as (out, in) (OpenCLIP's `text_projection`).
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file by name, in the order of the header. Nothing but the header is read.

    Raises:
        CheckpointError: no such file, or one that breaks a rule of the format.
    """
    return _read(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The file's `__metadata__`: what its writer noted, for example `modelspec.architecture`.

    Raises:
        CheckpointError: as `read_headers`.
    """
    return _read(path)[1]


def read_tensors(headers: Mapping[str, TensorHeader]) -> dict[str, torch.Tensor]:
    """The tensors that `headers` describe, by the mapping's names.

    All are views of the mapped files, slices and transposes too: memory is taken by the pages that are used.

    Raises:
        CheckpointError: a file changed since its headers were read.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in {header.file for header in headers.values()}:
        read_headers(file)  # the file that is mapped now is the one that is checked
        wanted = {name: header for name, header in headers.items() if header.file == file}
        try:
            with cast(Any, safe_open)(file, framework="pt") as stream:
                for name, header in wanted.items():
                    tensors[name] = _as_described(stream.get_tensor(header.name), header)
        except (SafetensorError, RuntimeError) as error:
            _refuse(file, f"changed while it was read ({error})", "a file nobody writes to")
    return {name: tensors[name] for name in headers}


def _as_described(stored: torch.Tensor, header: TensorHeader) -> torch.Tensor:
    tensor = stored if header.rows is None else stored[slice(*header.rows)]
    return (tensor.T if header.transposed else tensor).reshape(header.shape)


def _short(value: object) -> str:
    """A name from the file, for a message; the file decides how long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _refuse(path: Path, found: str, expected: str) -> NoReturn:
    raise CheckpointError(f"{path} {found}", expected=expected, fix=_FIX)


def _read(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    text, data_size = _header_bytes(path)
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in cast(dict[str, object], metadata).values()
    ):
        _refuse(path, "has a __metadata__ of other values than text", "text by name")
    tensors: dict[str, TensorHeader] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        tensors[name] = TensorHeader(file=path, name=name, dtype=dtype, shape=shape)
        spans.append((begin, end, name))
    _check_spans(path, spans, data_size)
    return tensors, cast(dict[str, str], metadata)


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The header, and how many bytes follow it."""
    if not path.is_file():
        _refuse(path, "is not a file", "a safetensors file")
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            word = stream.read(8)
            if len(word) < 8:
                _refuse(path, f"has {size} bytes", "the 8 bytes of the header's length")
            (length,) = struct.unpack("<Q", word)
            if length > _HEADER_LIMIT:
                _refuse(path, f"says its header has {length} bytes", f"at most {_HEADER_LIMIT}")
            if length > size - 8:
                _refuse(path, f"ends after {size} bytes, inside its header", f"{length + 8} bytes or more")
            return stream.read(length), size - 8 - length
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error})", expected="a readable file", fix="Check its owner and mode."
        ) from error


def _parse(path: Path, text: bytes) -> dict[str, object]:
    """The header's JSON object. Besides JSON's own rules: no name twice, no number but 0, 1, 2, …"""
    if not text.startswith(b"{"):
        _refuse(path, "has a header that does not begin with '{'", "a JSON object")
    if (marks := _marks(text)) > _MARK_LIMIT:
        _refuse(path, f"has a header of {marks} JSON marks", f"at most {_MARK_LIMIT}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice in one object")
        return found

    def natural(number: str) -> int:
        if len(number) > 20 or not number.isdecimal():
            raise ValueError(f"the number {_short(number)}")
        return int(number)

    try:
        header: object = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=natural,
            parse_float=natural,
            parse_constant=natural,
        )
        if b"\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as error:
        _refuse(path, f"has a header that is not valid ({error})", "JSON of the safetensors format")
    return cast(dict[str, object], header)


def _marks(text: bytes) -> int:
    """How many quotes there are, and how many marks outside of text that begin a value.

    Quotes are counted first: splitting at each of 100 million would itself be the flood.
    """
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = bare.count(b'"')
    if quotes > _MARK_LIMIT:
        return quotes
    outside = b"".join(bare.split(b'"')[::2])
    return quotes + sum(outside.count(mark) for mark in (b"{", b"[", b","))


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's type, shape, and where its bytes begin and end."""
    if not isinstance(entry, dict) or cast(dict[str, object], entry).keys() != _FIELDS:
        _refuse(path, f"describes {_short(name)} otherwise", "dtype, shape and data_offsets")
    fields = cast(dict[str, Any], entry)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        _refuse(path, f"stores {_short(name)} as {_short(dtype)}", f"one of {', '.join(ITEM_SIZES)}")
    shape = _naturals(path, name, "shape", fields["shape"])
    if len(shape) > _RANK_LIMIT:
        _refuse(path, f"has {len(shape)} axes in {_short(name)}", f"at most {_RANK_LIMIT}")
    size = reached = ITEM_SIZES[dtype]
    for extent in shape:
        size *= extent
        reached *= max(extent, 1)
    if reached >= _COUNT_LIMIT:  # without the zeros: a library multiplies in order
        _refuse(path, f"has the shape {shape} in {_short(name)}", "a size that 63 bits can hold")
    offsets = _naturals(path, name, "data_offsets", fields["data_offsets"])
    if len(offsets) != 2:
        _refuse(path, f"has {len(offsets)} data_offsets for {_short(name)}", "where it begins and ends")
    begin, end = offsets
    if end - begin != size:
        _refuse(
            path, f"keeps {end - begin} bytes for {_short(name)}", f"{size}: {dtype} of the shape {shape}"
        )
    return dtype, shape, begin, end


def _naturals(path: Path, name: str, field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not set(map(type, cast(list[object], value))) <= {int}:
        _refuse(path, f"has no numbers as the {field} of {_short(name)}", "a list of 0, 1, 2, …")
    return tuple(cast(list[int], value))


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    """Tensors follow each other without hole or overlap, and end with the file."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "a hole" if begin > position else "an overlap"
            _refuse(
                path, f"has {what} before {_short(name)} (byte {begin})", f"it to begin at byte {position}"
            )
        position = end
    if position != data_size:
        _refuse(path, f"has {data_size} bytes of tensors", f"{position}: as its header says")
