"""Which tensors of a weights file one graph uses, read from the file's header and the graph's bytes."""

from __future__ import annotations

from math import prod

from .errors import PackageError
from .package import Package
from .safetensors_format import TensorRange, read_header

_WIDTHS = {"fp16": 2, "fp32": 4}  # bytes per value in an engine of that dtype


def net_tensors(package: Package, net: str, graph: bytes | None = None) -> dict[str, TensorRange]:
    """The tensors of the weights file that the net's graph names, in the file's order.

    `graph` is what runs in place of the package's.

    Raises:
        PackageError: the weights file's header cannot be read.
    """
    file = package.manifest.nets[net]
    if file.weights is None:
        return {}
    content = package.path(file.graph).read_bytes() if graph is None else graph
    stored = read_header(package.path(file.weights), error=PackageError).tensors
    return {name: place for name, place in stored.items() if _names(content, name)}


def engine_bytes(package: Package, net: str, graph: bytes | None = None) -> int:
    """About how large the net's engine becomes: its weights at the width of the arithmetic.

    `graph` and errors as in `net_tensors`.
    """
    values = sum(prod(place.shape) for place in net_tensors(package, net, graph).values())
    return values * _WIDTHS[package.manifest.dtype]


def _names(graph: bytes, name: str) -> bool:
    """Whether an ONNX graph has this string, behind its length as protobuf has it: not as part of another."""
    text = name.encode()
    size, prefix = len(text), bytearray()
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(prefix) + bytes([size]) + text in graph
