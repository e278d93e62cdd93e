"""Where a graph says its weights lie, read without an ONNX library, and refused unless that is allowed.

ONNX Runtime and TensorRT follow the path that a graph names. A package may come from a stranger, so
the path is checked first, on the protobuf wire format (protobuf.dev, "Encoding") with the field
numbers of onnx.proto3. The walk enters nested graphs, functions, sparse tensors and attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

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
# The fields of Tensor that say what it is.
_DIMS, _DATA_TYPE, _NAME = 1, 2, 8
# The fields of Model and Graph on the way to a Node, and its input and name.
_GRAPH, _NODE, _NODE_INPUT, _NODE_NAME = 7, 1, 1, 3
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


@dataclass(frozen=True, kw_only=True)
class ExternalTensor:
    """A weight of a graph, and what the graph says of its place.

    Attributes:
        name: the initializer's.
        dtype: the number of its type in onnx.proto3 (`TensorProto.DataType`).
        shape: in the graph.
        place: the pairs `location`, `offset` and `length` as they are written.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    place: Mapping[str, str]

    @property
    def location(self) -> str:
        """The file, relative to the folder that weights are looked for in."""
        return self.place.get("location", "")

    @property
    def offset(self) -> int:
        """Its first byte in the file. Raises ValueError where none is written that is a number."""
        return int(self.place.get("offset", "0"))

    @property
    def length(self) -> int:
        """Its bytes; -1 where none are written. Raises ValueError for what is no number."""
        return int(self.place.get("length", "-1"))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of one message as (field number, payload or integer); those of fixed width are left out."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key >> 32 or not key >> 3:  # C++ parsers drop the bits above 32 and would see another field
            raise ValueError(f"the field key {key}")
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
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


def _places(data: memoryview, message: str, depth: int = 0) -> Iterator[tuple[memoryview, dict[str, str]]]:
    """Every tensor below `message` that has `external_data`: its own message, and those pairs."""
    if depth > _DEPTH_LIMIT:
        raise ValueError(f"messages nested deeper than {_DEPTH_LIMIT}")
    children = _CHILDREN[message]
    place = dict[str, str]()
    for number, payload in _fields(data):
        child = children.get(number)
        if child is None or isinstance(payload, int):
            continue
        if child == "Entry":
            pair = {key: bytes(text).decode() for key, text in _fields(payload) if not isinstance(text, int)}
            place[pair.get(1, "")] = pair.get(2, "")
        else:
            yield from _places(payload, child, depth + 1)
    if place:
        yield data, place


def _described(tensor: memoryview, place: Mapping[str, str]) -> ExternalTensor:
    """What a Tensor message says besides its place."""
    name, dtype, dims = "", 0, list[int]()
    for number, payload in _fields(tensor):
        if number == _NAME and not isinstance(payload, int):
            name = bytes(payload).decode()
        elif number == _DATA_TYPE and isinstance(payload, int):
            dtype = payload
        elif number == _DIMS and isinstance(payload, int):
            dims.append(payload)
        elif number == _DIMS:  # packed, as proto3 writes them
            dims += _varints(cast(memoryview, payload))
    return ExternalTensor(name=name, dtype=dtype, shape=tuple(dims), place=place)


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def external_tensors(graph: bytes, path: Path) -> tuple[ExternalTensor, ...]:
    """The tensors of a graph whose bytes lie in other files. `path` is the graph's, for the error.

    Raises:
        PackageError: it is not a readable ONNX protobuf.
    """
    try:
        return tuple(_described(tensor, place) for tensor, place in _places(memoryview(graph), "Model"))
    except (ValueError, IndexError) as error:
        raise _unreadable(path, error) from error


def node_names(graph: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """The name and the first input ("" for none) of every node of a graph, without those inside nodes.

    `path` is the graph's, for the error.

    Raises:
        PackageError: it is not a readable ONNX protobuf.
    """
    try:
        for number, inside in _fields(memoryview(graph)):
            if number == _GRAPH and not isinstance(inside, int):
                for kind, node in _fields(inside):
                    if kind == _NODE and not isinstance(node, int):
                        found = dict(reversed(list(_fields(node))))  # the first of a kind
                        name, first = (found.get(key, b"") for key in (_NODE_NAME, _NODE_INPUT))
                        yield bytes(cast(memoryview, name)).decode(), bytes(cast(memoryview, first)).decode()
    except (ValueError, IndexError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> PackageError:
    return PackageError(
        f"{path} is not a readable ONNX graph ({error})",
        expected="an ONNX protobuf",
        fix="Copy or export the package again.",
    )


def check_external_data(path: Path, allowed: Mapping[str, int]) -> None:
    """Check that a graph's weights all lie within the files that it may use, before any parser opens it.

    Args:
        path: the graph.
        allowed: the location of each of these files, and how many bytes the file has.

    Raises:
        PackageError: the graph is not a readable ONNX protobuf, names another file, or bytes past the end of
            one.
    """
    try:  # without what a tensor is besides: packages are opened at every start
        places = [place for _, place in _places(memoryview(path.read_bytes()), "Model")]
    except (ValueError, IndexError) as error:
        raise _unreadable(path, error) from error
    for place in places:
        location = place.get("location", "")
        try:
            offset = int(place.get("offset", "0"))
            end = offset + int(place.get("length", "-1"))
            inside = 0 <= offset <= end <= allowed.get(location, -1)
        except ValueError:
            inside = False
        if not inside:
            files = ", ".join(f"{name!r} ({size} bytes)" for name, size in allowed.items())
            raise PackageError(
                f"{path} takes weights from {location!r} (offset {place.get('offset')}, length"
                f" {place.get('length')})",
                expected=f"bytes within {files}" if files else "no weights outside the graph",
                fix="Do not use this package: it was not written by latentrt, or is damaged.",
            )
