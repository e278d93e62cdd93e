"""Opens files of `torch.save`, in both of its formats, as tensors that are read one storage at a time.

Since 1.6 torch writes a ZIP archive without compression: `NAME/data.pkl`, and `NAME/data/KEY` for each
storage. Before, it wrote five pickles (a magic number, a version, facts of the system, the value, the keys of
the storages), then each storage as its length and its bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...engines.errors import CheckpointError
from ...engines.safetensors_format import ITEM_SIZES
from .machine import PICKLE_LIMIT, Storage, StoredTensor, read_pickle, refuse

_MAGIC = 0x1950A86A20F9469CFC6C
_DIRECTORY_LIMIT = 2**23  # bytes; SD 1.5 with averaged weights and Adam's state has 0.24 MB
_WRAPPERS = ("state_dict", "model")


@dataclass(frozen=True)
class TorchFile:
    """Tensors by name, the number of entries that were no tensors, and how to read a storage's bytes."""

    tensors: Mapping[str, StoredTensor]
    left_out: int
    read: Callable[[Storage], bytes]


@contextmanager
def open_torch_file(path: Path) -> Generator[TorchFile]:
    """Open a pickled checkpoint.

    Raises:
        CheckpointError: it is damaged or hostile, holds no tensors, or was written on a big-endian machine.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror})",
            expected="a file of torch.save (.ckpt, .pt, .pth, .bin)",
            fix="Check the path.",
        ) from error
    with stream:
        try:
            yield _open(path, stream)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.found}", expected=error.expected, fix=error.fix) from error


def _open(path: Path, stream: BinaryIO) -> TorchFile:
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

    def read(storage: Storage) -> bytes:
        begin, length = places[storage.key]
        stream.seek(begin)
        return stream.read(length)

    return TorchFile(tensors, left_out, read)


def _tensors(value: object) -> tuple[dict[str, StoredTensor], int]:
    """The state dict's tensors, and how many of its entries are no tensors."""
    items = _items(value)
    for name in _WRAPPERS * 2:  # a loop until there is none would not end: a dict can hold itself
        items = _items(items.get(name)) or items
    tensors = {name: found for name, found in items.items() if isinstance(found, StoredTensor)}
    if not tensors:
        refuse("no tensors by name", "a state dict, by itself or as `state_dict` or `model`")
    if "__metadata__" in tensors or any("\ud800" <= letter <= "\udfff" for letter in "".join(tensors)):
        refuse("a tensor whose name safetensors cannot have", "a name in UTF-8, other than __metadata__")
    return tensors, len(items) - len(tensors)


def _items(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


class _DirectoryReader(io.FileIO):
    """Limits reads: `zipfile` reads an archive's directory at once, however long it claims to be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


def _zip(path: Path) -> tuple[object, dict[str, tuple[int, int]]]:
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
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        OverflowError,
        struct.error,
        OSError,
    ) as error:
        refuse(f"a damaged archive ({str(error)[:100]})", "an archive of torch.save")
    if order != b"little":
        refuse(f"numbers in the byte order {order[:10]!r}", "little")
    return value, {name.removeprefix("data/"): place for name, place in places.items()}


def _place(stream: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes begin, and how many there are. A compressed entry could become any size."""
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.flag_bits & 1
        or entry.compress_size != entry.file_size
    ):
        refuse(f"compressed or encrypted data ({entry.filename[:60]!r})", "an archive of torch.save")
    stream.seek(entry.header_offset)
    names, extra = struct.unpack("<26xHH", stream.read(30))
    return entry.header_offset + 30 + names + extra, entry.file_size


def _small(stream: BinaryIO, place: tuple[int, int]) -> bytes:
    begin, length = place
    if length > PICKLE_LIMIT:
        refuse(f"a pickle of {length} bytes", f"at most {PICKLE_LIMIT}")
    stream.seek(begin)
    return stream.read(length)


def _legacy(stream: BinaryIO, size: int) -> tuple[object, dict[str, tuple[int, int]]]:
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
    places: dict[str, tuple[int, int]] = {}
    for key in cast(list[Any], keys) if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        stream.seek(position)
        if storage is None or stream.read(8) != struct.pack("<q", storage.length):
            refuse("other storages than its tensors have", "each, with its length in front")
        places[storage.key] = (position + 8, storage.length * ITEM_SIZES[storage.dtype])
        position = min(sum(places[storage.key]), size)
    return value, places
