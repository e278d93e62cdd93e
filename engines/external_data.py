"""Where a graph says its weights lie, read without an ONNX library, and refused unless that is allowed.

ONNX Runtime and TensorRT follow the path that a graph names. A package may come from a stranger, so
the path is checked first, on the protobuf wire format (protobuf.dev, "Encoding") with the field
numbers of onnx.proto3. The walk enters nested graphs, functions, sparse tensors and attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import PackageError

# Message type -> field number -> message type of that field (onnx.proto3).
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_DEPTH_LIMIT = 32
_BYTES, _VARINT, _FIXED64, _FIXED32 = 2, 0, 1, 5


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of one message, as (field number, payload)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key >> 32 or not key >> 3:  # C++ parsers drop the bits above 32 and would see another field
            raise ValueError(f"the field key {key}")
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError("a field longer than its message")
            yield key >> 3, data[at : at + size]
            at += size
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _external_entries(data: memoryview, message: str, depth: int = 0) -> Iterator[dict[str, str]]:
    """The `external_data` key-value pairs of every tensor below `message`."""
    if depth > _DEPTH_LIMIT:
        raise ValueError(f"messages nested deeper than {_DEPTH_LIMIT}")
    children = _CHILDREN[message]
    entries: dict[str, str] = {}
    for number, payload in _fields(data):
        child = children.get(number)
        if child == "Entry":
            pair = {key: bytes(text).decode() for key, text in _fields(payload)}
            entries[pair.get(1, "")] = pair.get(2, "")
        elif child is not None:
            yield from _external_entries(payload, child, depth + 1)
    if entries:
        yield entries


def check_external_data(root: Path, graph: str, *, allowed: str | None) -> None:
    """Check that the graph's weights all lie within the file `allowed`, before any parser opens it.

    Args:
        root: the package's folder.
        graph: the graph's path within the package.
        allowed: the one weights file it may use, as a path within the package; None for no weights.

    Raises:
        PackageError: the graph is not a readable ONNX protobuf, names another file, or bytes
            past the end of that file.
    """
    path = root / graph
    limit = (root / allowed).stat().st_size if allowed else 0
    try:
        entries = list(_external_entries(memoryview(path.read_bytes()), "Model"))
    except (ValueError, IndexError) as error:
        raise PackageError(
            f"{path} is not a readable ONNX graph ({error})",
            expected="an ONNX protobuf",
            fix="Copy or export the package again.",
        ) from error
    for entry in entries:
        location = entry.get("location", "")
        # The location is relative to the graph's own folder; "" and "." are no file either.
        inside = Path(location).name == location and (Path(graph).parent / location).as_posix() == allowed
        try:
            end = int(entry.get("offset", "0")) + int(entry.get("length", "-1"))
            inside = inside and 0 <= int(entry.get("offset", "0")) <= end <= limit
        except ValueError:
            inside = False
        if not inside:
            raise PackageError(
                f"{path} takes weights from {location!r} (offset {entry.get('offset')},"
                f" length {entry.get('length')})",
                expected=f"bytes within {allowed!r} ({limit} bytes)",
                fix="Do not use this package: it was not written by latentrt, or is damaged.",
            )
