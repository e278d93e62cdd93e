"""Safetensors files: the header checked by ourselves before anything maps the file, tensors by name, writing.

The layout (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, a JSON
object, and the tensors' bytes without gaps. Whatever that page forbids is refused here, so that nothing
behind this module meets an offset, a shape or a name that the file cannot hold. A tensor's bytes are a plain
range of the file, which is what ONNX external data (location, offset, length) names.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, ModelError, PackageError
from .lfs import refuse_pointer

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
# Types of the format that no net computes with; some are smaller than a byte.
_QUANTISED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_OTHER_WEIGHTS = "Use the model's fp16 or fp32 weights."
# A float's bits without the sign, as unsigned numbers, are in the order of magnitudes: here is the first that
# is not finite. (F8_E4M3 has no infinity, and one NaN.)
NOT_FINITE: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
_CHUNK = 2**22  # numbers that are looked at together
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TensorRange:
    """One tensor of a file: safetensors' name of its type ("F16"), its shape, and its bytes' place.

    `offset` is counted from the start of the file; `length` is in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: what the file's writer noted, for example `modelspec.architecture`.
        text: the JSON as it stands in the file.
    """

    tensors: Mapping[str, TensorRange]
    metadata: Mapping[str, str]
    text: bytes


def read_header(path: Path, *, error: type[ModelError] = CheckpointError) -> Header:
    """Read and check the header of a file, and nothing else of it.

    Args:
        path: the file.
        error: which error to raise; PackageError for a file that export wrote.

    Raises:
        ModelError: no such file, or one that breaks a rule of the format.
    """
    stream, header = open_file(path, error=error)
    stream.close()
    return header


def open_file(path: Path, *, error: type[ModelError] = CheckpointError) -> tuple[BinaryIO, Header]:
    """A file that is open for reading, and its header; arguments and errors as of `read_header`."""
    reader = _Reader(path, error)
    stream = reader.open()
    try:
        return stream, reader.header(stream)
    except BaseException:
        stream.close()
        raise


def map_tensors(
    path: Path, *, error: type[ModelError] = CheckpointError, writable: bool = False
) -> tuple[Header, dict[str, Bytes]]:
    """The header of a file, and the bytes of each tensor in the mapped file: pages are read when used.

    Args:
        path: the file.
        error: as in `read_header`.
        writable: map it copy-on-write, for libraries that want arrays they could write to.

    Raises:
        ModelError: as `read_header`, of the very file that is mapped.
    """
    reader = _Reader(path, error)
    with reader.open() as stream:
        header = reader.header(stream)
        whole: Bytes = np.memmap(stream, np.uint8, mode="c" if writable else "r")
    places = header.tensors.items()
    return header, {name: whole[place.offset : place.offset + place.length] for name, place in places}


def first_not_finite(path: Path, *, error: type[ModelError] = CheckpointError) -> str | None:
    """The first tensor with NaN or infinity in it, by name. Reads the whole file.

    Raises:
        ModelError: as `read_header`.
    """
    return find_not_finite(*map_tensors(path, error=error))


def find_not_finite(header: Header, tensors: Mapping[str, Bytes]) -> str | None:
    """The same of a file that is mapped (`map_tensors`)."""
    for name, content in tensors.items():
        if header.tensors[name].dtype not in NOT_FINITE:
            continue
        kind, limit = NOT_FINITE[header.tensors[name].dtype]
        bits = np.frombuffer(content, kind)
        for begin in range(0, len(bits), _CHUNK):
            if (magnitudes(bits[begin : begin + _CHUNK]) >= limit).any():
                return name
    return None


def magnitudes(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Floats' bits, as unsigned numbers, without the sign."""
    return bits & bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    content: Callable[[str], bytes | memoryview],
    *,
    durable: bool = False,
) -> dict[str, TensorRange]:
    """Write a file, which appears when it is complete. One tensor is in memory at a time.

    Args:
        path: the file; replaced if it exists.
        tensors: type and shape by name. Wide types are written first, so that every tensor is aligned to its
            own item size; within one type, in this order.
        content: the bytes of a tensor; called in the order of writing.
        durable: wait until everything has reached the disk.

    Returns:
        Where each tensor lies.

    Raises:
        OSError: the file cannot be written; what was there before still is.
        ValueError: `content` has another length than type and shape say.
    """
    names = sorted(tensors, key=lambda name: -ITEM_SIZES[tensors[name][0]])
    places: dict[str, TensorRange] = {}
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    begin = 0
    for name in names:
        dtype, shape = tensors[name]
        length = prod(shape) * ITEM_SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + length]}
        places[name] = TensorRange(dtype=dtype, shape=tuple(shape), offset=begin, length=length)
        begin += length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: replace(place, offset=start + place.offset) for name, place in places.items()}
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                if stream.write(content(name)) != places[name].length:
                    raise ValueError(f"the content of {name!r} has another length than {places[name].length}")
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return places


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins as the format does, whatever it is called; not whether it is sound."""
    with suppress(OSError), path.open("rb") as stream:
        start = stream.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _HEADER_LIMIT
    return False


class _Reader:
    """Reads the header of one file, and refuses what the format forbids."""

    def __init__(self, path: Path, error: type[ModelError]) -> None:
        self._path, self._error = path, error

    def open(self) -> BinaryIO:
        if not self._path.is_file():
            self._refuse("is not a file", "a safetensors file")
        try:
            return self._path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error

    def header(self, stream: BinaryIO) -> Header:
        text, data_size = self._text(stream)
        entries = self._parse(text)
        metadata = entries.pop(_METADATA, None)
        if metadata is None:
            metadata = dict[str, object]()  # the library takes null for none
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in cast(dict[str, object], metadata).values()
        ):
            self._refuse("has a __metadata__ of other values than text", "text by name")
        start = 8 + len(text)
        tensors: dict[str, TensorRange] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in entries.items():
            dtype, shape, begin, end = self._entry(name, entry)
            tensors[name] = TensorRange(dtype=dtype, shape=shape, offset=start + begin, length=end - begin)
            spans.append((begin, end, name))
        self._check_spans(spans, data_size)
        return Header(tensors=tensors, metadata=cast(dict[str, str], metadata), text=text)

    def _text(self, stream: BinaryIO) -> tuple[bytes, int]:
        """The header, and how many bytes follow it."""
        try:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            word = stream.read(8)
            if len(word) < 8:
                self._refuse(f"has {size} bytes", "the 8 bytes of the header's length")
            (length,) = struct.unpack("<Q", word)
            if length > _HEADER_LIMIT:
                refuse_pointer(self._path, self._error)
                self._refuse_other_format(word + stream.read(24))
                self._refuse(f"says its header has {length} bytes", f"at most {_HEADER_LIMIT}")
            if length > size - 8:
                self._refuse(f"ends after {size} bytes, inside its header", f"{length + 8} bytes or more")
            return stream.read(length), size - 8 - length
        except OSError as error:
            raise self._unreadable(error) from error

    def _refuse_other_format(self, start: bytes) -> None:
        """Name what is no header: a page that a browser saved, or another format of weights."""
        if start.startswith(b"GGUF"):
            self._refuse("is a GGUF file", "a safetensors file", fix=_OTHER_WEIGHTS)
        if start.isascii() and start.decode().replace("\n", " ").strip().isprintable():
            self._refuse(f"begins with the text {start.decode()!r}", "a safetensors file")

    def _parse(self, text: bytes) -> dict[str, object]:
        """The header's JSON object. Besides JSON's own rules: no name twice, no number but 0, 1, 2, …"""
        if not text.startswith(b"{"):
            self._refuse("has a header that does not begin with '{'", "a JSON object")
        if (marks := _marks(text)) > _MARK_LIMIT:
            self._refuse(f"has a header of {marks} JSON marks", f"at most {_MARK_LIMIT}")
        try:
            header: object = json.loads(
                text.decode("utf-8"),
                object_pairs_hook=_unique,
                parse_int=_natural,
                parse_float=_natural,
                parse_constant=_natural,
            )
            if b"\\u" in text:
                json.dumps(header, ensure_ascii=False).encode()  # refuses half of a surrogate pair
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a header that is not valid ({error})", "JSON of the safetensors format")
        return cast(dict[str, object], header)

    def _entry(self, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's type, shape, and where its bytes begin and end behind the header."""
        if not isinstance(entry, dict) or cast(dict[str, object], entry).keys() != _FIELDS:
            self._refuse(f"describes {_short(name)} otherwise", "dtype, shape and data_offsets")
        fields = cast(dict[str, Any], entry)
        dtype = fields["dtype"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            known = f"one of {', '.join(ITEM_SIZES)}"
            other = _OTHER_WEIGHTS if dtype in _QUANTISED else None
            self._refuse(f"stores {_short(name)} as {_short(dtype)}", known, fix=other)
        shape = self._naturals(name, "shape", fields["shape"])
        if len(shape) > _RANK_LIMIT:
            self._refuse(f"has {len(shape)} axes in {_short(name)}", f"at most {_RANK_LIMIT}")
        size = reached = ITEM_SIZES[dtype]
        for extent in shape:
            size *= extent
            reached *= max(extent, 1)
        if reached >= _COUNT_LIMIT:  # without the zeros: a library multiplies in order
            self._refuse(f"has the shape {shape} in {_short(name)}", "a size that 63 bits can hold")
        offsets = self._naturals(name, "data_offsets", fields["data_offsets"])
        if len(offsets) != 2:
            self._refuse(f"has {len(offsets)} data_offsets for {_short(name)}", "where it begins and ends")
        begin, end = offsets
        if end - begin != size:
            self._refuse(
                f"keeps {end - begin} bytes for {_short(name)}", f"{size}: {dtype} of the shape {shape}"
            )
        return dtype, shape, begin, end

    def _naturals(self, name: str, field: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or not set(map(type, cast(list[object], value))) <= {int}:
            self._refuse(f"has no numbers as the {field} of {_short(name)}", "a list of 0, 1, 2, …")
        return tuple(cast(list[int], value))

    def _check_spans(self, spans: list[tuple[int, int, str]], data_size: int) -> None:
        """Tensors follow each other without hole or overlap, and end with the file."""
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                what = "a hole" if begin > position else "an overlap"
                self._refuse(
                    f"has {what} before {_short(name)} (byte {begin})", f"it to begin at byte {position}"
                )
            position = end
        if position != data_size:
            self._refuse(f"has {data_size} bytes of tensors", f"{position}: as its header says")

    def _refuse(self, found: str, expected: str, fix: str | None = None) -> NoReturn:
        usual = "Copy the package again, or export it again: latentrt export CHECKPOINT -o PACKAGE"
        if self._error is not PackageError:
            usual = "Download the file again, or have it written again by the safetensors library."
        raise self._error(f"{self._path} {found}", expected=expected, fix=fix or usual)

    def _unreadable(self, error: OSError) -> ModelError:
        found = f"{self._path} cannot be read ({error})"
        return self._error(found, expected="a readable file", fix="Check its owner and mode.")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice in one object")
    return found


def _natural(number: str) -> int:
    if len(number) > 20 or not number.isdecimal():
        raise ValueError(f"the number {_short(number)}")
    return int(number)


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


def _short(value: object) -> str:
    """A name from the file, for a message; the file decides how long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
