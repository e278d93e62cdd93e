"""Which tensors of a weights file one graph uses, read from the file's header and the graph's bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .errors import PackageError
from .package import Package

_HEADER_LIMIT = 100 * 2**20  # bytes; the format's own limit
_WIDTHS = {"fp16": 2, "fp32": 4}  # bytes per value in an engine of that dtype


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One stored tensor, as the weights file's header has it."""

    name: str
    shape: tuple[int, ...]
    values: int


def net_tensors(package: Package, net: str, graph: bytes | None = None) -> tuple[Tensor, ...]:
    """The tensors of the weights file that the net's graph names, in the file's order.

    `graph` is what runs in place of the package's.

    Raises:
        PackageError: the weights file's header cannot be read.
    """
    file = package.manifest.nets[net]
    if file.weights is None:
        return ()
    content = package.path(file.graph).read_bytes() if graph is None else graph
    return tuple(tensor for tensor in _header(package.path(file.weights)) if _names(content, tensor.name))


def engine_bytes(package: Package, net: str, graph: bytes | None = None) -> int:
    """About how large the net's engine becomes: its weights at the width of the arithmetic.

    `graph` and errors as in `net_tensors`.
    """
    width = _WIDTHS[package.manifest.dtype]
    return sum(tensor.values * width for tensor in net_tensors(package, net, graph))


def _names(graph: bytes, name: str) -> bool:
    """Whether an ONNX graph has this string, behind its length as protobuf has it: not as part of another."""
    text = name.encode()
    size, prefix = len(text), bytearray()
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(prefix) + bytes([size]) + text in graph


def _header(path: Path) -> list[Tensor]:
    """What a safetensors file holds: eight bytes of length, then JSON (the format's README)."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _HEADER_LIMIT:
                raise ValueError(f"a header of {size} bytes")
            header = cast(dict[str, Any], json.loads(file.read(size)))
        header.pop("__metadata__", None)
        return [_tensor(name, entry["shape"]) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(
            f"{path} is no readable safetensors file ({error})",
            expected="the weights file that export wrote",
            fix="Copy the package again, or export it again: latentrt export CHECKPOINT -o PACKAGE.",
        ) from error


def _tensor(name: str, shape: list[int]) -> Tensor:
    values = 1
    for size in shape:
        values *= int(size)
    return Tensor(name=name, shape=tuple(shape), values=values)
