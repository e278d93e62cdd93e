"""Rewrites files of `torch.save`, in both of its formats, as safetensors. Nothing else reads pickles.

Since 1.6 torch writes a ZIP archive without compression: `NAME/data.pkl`, and `NAME/data/KEY` for each
storage. Before, it wrote five pickles (a magic number, a version, facts of the system, the value, the keys of
the storages), then each storage as its length and its bytes.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ...checkpoints.beside import beside
from ...engines.errors import CheckpointError, StorageError, UsageError, command
from ...engines.lfs import refuse_pointer
from ...engines.safetensors_format import ITEM_SIZES, looks_like_safetensors, write_file
from .machine import PICKLE_LIMIT, Storage, StoredTensor, read_pickle, refuse

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # numbers are copied, not computed with
_MAGIC = 0x1950A86A20F9469CFC6C
_DIRECTORY_LIMIT = 2**23  # bytes; SD 1.5 with averaged weights and Adam's state has 0.24 MB
_DAMAGED = (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error)
_WRAPPERS = ("state_dict", "model", "adapter")
# An IP-Adapter's two dicts. Together they have the names that its safetensors files have.
_NESTED = ("image_proj", "ip_adapter")
# AUTOMATIC1111's textual inversion: the dict of its vectors, and what all programs call them in safetensors.
_INVERSION, _VECTORS = "string_to_param", "emb_params"

# A storage's key -> where its bytes begin in the file, and how many there are.
Places = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A safetensors file: its tensors and bytes, and how many entries of the state dict were no tensors."""

    path: Path
    tensors: int
    size: int
    left_out: int


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """An open file of torch.save: its tensors, and where the bytes of their storages are."""

    stream: BinaryIO
    tensors: Mapping[str, StoredTensor]
    places: Places
    left_out: int


def convert_pickle(source: Path | Sequence[Path], output: Path, *, overwrite: bool = False) -> Converted:
    """Write the tensors of files of `torch.save` to a safetensors file, which appears once it is complete.

    Args:
        source: a `.ckpt`, `.pt`, `.pth` or `.bin`, or all shards of one; nothing in it is run.
        output: ends in `.safetensors`.
        overwrite: replace an existing `output`.

    Raises:
        CheckpointError: a source is damaged or hostile, or holds no tensors; or two hold the same.
        UsageError: `output` exists, or has another ending.
        StorageError: `output` cannot be written.
    """
    if output.suffix != ".safetensors":
        raise UsageError(
            f"the output is {output}", expected="a .safetensors file", fix="Pass one with -o NAME.safetensors"
        )
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", expected="a new file", fix="Pass --overwrite to replace it.")
    sources = [source] if isinstance(source, Path) else source
    for path in sources:
        _refuse_safetensors(path, output)
    with ExitStack() as stack:
        opened = [_opened(path, stack) for path in sources]
        _refuse_twice(sources, opened)
        written = sum(_size(tensor) for one in opened for tensor in one.tensors.values())
        try:
            with beside(output) as work:
                _write(work / output.name, opened)
                os.replace(work / output.name, output)
        except OSError as error:
            raise StorageError(
                f"{output} cannot be written ({error.strerror})",
                expected=f"a folder with {written} bytes free",
                fix="Pass -o with another place.",
            ) from error
    return Converted(
        path=output,
        tensors=sum(len(one.tensors) for one in opened),
        size=output.stat().st_size,
        left_out=sum(one.left_out for one in opened),
    )


def _opened(path: Path, stack: ExitStack) -> _Opened:
    refuse_pointer(path)
    try:
        stream = stack.enter_context(path.open("rb"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror})",
            expected="a file of torch.save (.ckpt, .pt, .pth, .bin)",
            fix="Check the path.",
        ) from error
    try:
        tensors, places, left_out = _open(path, stream)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.found}", expected=error.expected, fix=error.fix) from error
    return _Opened(stream=stream, tensors=tensors, places=places, left_out=left_out)


def _refuse_safetensors(path: Path, output: Path) -> None:
    """Raise CheckpointError for a safetensors file: there is nothing to convert."""
    if looks_like_safetensors(path):
        raise CheckpointError(
            f"{path}: it is a safetensors file, whatever its name",
            expected="a file of torch.save (.ckpt, .pt, .pth, .bin)",
            fix=f"Rename it: {command('mv', path, output)}",
        )


def _refuse_twice(sources: Sequence[Path], opened: Sequence[_Opened]) -> None:
    """Raise CheckpointError for a tensor in two files: they are no shards of one."""
    seen: dict[str, Path] = {}
    for path, one in zip(sources, opened, strict=True):
        if twice := seen.keys() & one.tensors.keys():
            name = min(twice)
            raise CheckpointError(
                f"{seen[name]} and {path} both hold the tensor {name[:80]!r}",
                expected="shards of one checkpoint",
                fix="Convert each of them by itself.",
            )
        seen |= dict.fromkeys(one.tensors, path)


def _size(tensor: StoredTensor) -> int:
    return prod(tensor.shape) * ITEM_SIZES[tensor.storage.dtype]


def _write(output: Path, opened: Sequence[_Opened]) -> None:
    """One tensor at a time; those that share a storage follow each other, so that it is read once."""
    stored = {name: (i, tensor) for i, one in enumerate(opened) for name, tensor in one.tensors.items()}
    names = sorted(stored, key=lambda name: (stored[name][0], stored[name][1].storage.key))

    @lru_cache(maxsize=1)
    def read(number: int, storage: Storage) -> bytes:
        return _read(opened[number].stream, opened[number].places[storage.key])

    def content(name: str) -> memoryview:
        number, tensor = stored[name]
        bits = _BITS[ITEM_SIZES[tensor.storage.dtype]]
        flat = np.frombuffer(read(number, tensor.storage), bits)[tensor.offset :]
        strides = [stride * flat.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view).data

    described = {name: (stored[name][1].storage.dtype, stored[name][1].shape) for name in names}
    write_file(output, described, content, durable=True)


def _open(path: Path, stream: BinaryIO) -> tuple[dict[str, StoredTensor], Places, int]:
    """Tensors by name, where the bytes of their storages are, and how many entries were no tensors."""
    start = stream.read(4)
    size = stream.seek(0, 2)
    value, places = _zip(path) if start == b"PK\x03\x04" else _legacy(stream, size)
    tensors, left_out = _tensors(value)
    total = 0
    for storage in {tensor.storage for tensor in tensors.values()}:
        wanted = storage.length * ITEM_SIZES[storage.dtype]
        begin, length = places.get(storage.key, (0, -1))
        if length != wanted or begin + length > size:
            refuse(f"no {wanted} bytes for the storage {storage.key[:40]!r}", "as many as it says")
        total += wanted
    if total > size:
        refuse(f"storages of {total} bytes, one over the other", f"less than the file's {size} bytes")
    written = sum(map(_size, tensors.values()))
    if written > 2 * size:
        refuse(
            f"{written} bytes of tensors, because many share the same numbers",
            "at most twice the size of the file",
        )
    return tensors, places, left_out


def _tensors(value: object) -> tuple[dict[str, StoredTensor], int]:
    """The state dict's tensors, and how many of its entries are no tensors."""
    items = _items(value)
    for name in _WRAPPERS * 2:  # a loop until there is none would not end: a dict can hold itself
        items = _items(items.get(name)) or items
    if vectors := _items(items.get(_INVERSION)):  # its other tensors are the words' ids
        items = dict(zip([_VECTORS], vectors.values(), strict=False)) if len(vectors) == 1 else vectors
    if any(_items(items.get(name)) for name in _NESTED):
        items = _flattened(items)
    tensors = {name: found for name, found in items.items() if isinstance(found, StoredTensor)}
    if not tensors:
        refuse("no tensors by name", "a state dict, by itself or as `state_dict` or `model`")
    if "__metadata__" in tensors or any("\ud800" <= letter <= "\udfff" for letter in "".join(tensors)):
        refuse("a tensor whose name safetensors cannot have", "a name in UTF-8, other than __metadata__")
    return tensors, len(items) - len(tensors)


def _flattened(items: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an IP-Adapter: those of each dict behind its name, `ip_adapter.1.to_k_ip.weight`."""
    nested = {name: inner for name in _NESTED if (inner := _items(items.get(name)))}
    others = {name: value for name, value in items.items() if name not in nested}
    return others | {
        f"{name}.{key}": value
        for name, inner in nested.items()
        for key, value in inner.items()
        if isinstance(cast(object, key), str)
    }


def _items(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


class _DirectoryReader(io.FileIO):
    """Limits reads: `zipfile` reads an archive's directory at once, however long it claims to be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


def _zip(path: Path) -> tuple[object, Places]:
    """The pickled value, and each storage's place and length in bytes, of a ZIP archive."""
    try:
        with _DirectoryReader(path) as stream, zipfile.ZipFile(cast(Any, stream)) as archive:
            entries = archive.infolist()
            pickles = [entry.filename for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or len({entry.filename for entry in entries}) < len(entries):
                refuse(f"an archive with {len(pickles)} data.pkl, or names twice", "an archive of torch.save")
            root = pickles[0].removesuffix("data.pkl")
            places = {entry.filename.removeprefix(root): _place(stream, entry) for entry in entries}
            value, _ = read_pickle(io.BytesIO(_small(stream, places["data.pkl"])))
            order = _small(stream, places["byteorder"]) if "byteorder" in places else b"little"
    except (*_DAMAGED, OSError) as error:
        refuse(f"a damaged archive ({str(error)[:100]})", "an archive of torch.save")
    if order != b"little":
        refuse(f"numbers in the byte order {order[:10]!r}", "little")
    return value, {name.removeprefix("data/"): place for name, place in places.items()}


def _place(stream: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes begin, and how many there are. A compressed entry could become any size."""
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.flag_bits & 1:
        refuse(f"compressed or encrypted data ({entry.filename[:60]!r})", "an archive of torch.save")
    stream.seek(entry.header_offset)
    names, extra = struct.unpack("<26xHH", stream.read(30))
    return entry.header_offset + 30 + names + extra, entry.file_size


def _small(stream: BinaryIO, place: tuple[int, int]) -> bytes:
    if place[1] > PICKLE_LIMIT:
        refuse(f"a pickle of {place[1]} bytes", f"at most {PICKLE_LIMIT}")
    return _read(stream, place)


def _read(stream: BinaryIO, place: tuple[int, int]) -> bytes:
    stream.seek(place[0])
    return stream.read(place[1])


def _legacy(stream: BinaryIO, size: int) -> tuple[object, Places]:
    """The same of a file in the format before torch 1.6."""
    stream.seek(0)
    head = io.BytesIO(stream.read(PICKLE_LIMIT))
    if read_pickle(head)[0] != _MAGIC:
        refuse("a pickle that torch did not write", "a file of torch.save")
    read_pickle(head)
    if _items(read_pickle(head)[0]).get("little_endian") is not True:
        refuse("numbers in another byte order", "little")
    value, storages = read_pickle(head)
    keys, _ = read_pickle(head)
    position = head.tell()
    places: Places = {}
    for key in cast(list[Any], keys) if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        stream.seek(position)
        if storage is None or stream.read(8) != struct.pack("<q", storage.length):
            refuse("other storages than its tensors have", "each, with its length in front")
        places[storage.key] = (position + 8, storage.length * ITEM_SIZES[storage.dtype])
        position = min(sum(places[storage.key]), size)
    return value, places
