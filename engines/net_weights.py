"""Which weights one graph uses, and where they lie: read from the graph's bytes alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .external_data import ExternalTensor, external_tensors
from .package import Package
from .spec import NETS, Array

# The number of a type in onnx.proto3 -> NumPy's name of it; the second line's are from ml_dtypes.
_DTYPES = {1: "float32", 10: "float16", 11: "float64"}
_ML_DTYPES = {16: "bfloat16", 17: "float8_e4m3fn", 19: "float8_e5m2"}
# The node that `checkpoints.graphs.weights.attach` puts behind a weight; its output is called `….out`.
_TURNED = re.compile(rb"([\w.]+)/transpose(?!\.out)")
_WIDTHS = {"fp16": 2, "fp32": 4}  # bytes per value in an engine of that dtype


def net_tensors(package: Package, net: str, graph: bytes | None = None) -> dict[str, ExternalTensor]:
    """The weights of a net by the names that its graph has for them, in the graph's order.

    `graph` is what runs in place of the package's.

    Raises:
        PackageError: the graph cannot be read.
    """
    path = package.path(package.manifest.nets[net].graph)
    found = external_tensors(path.read_bytes() if graph is None else graph, path)
    return {tensor.name: tensor for tensor in found}


def part_shapes(package: Package, part: str) -> dict[str, tuple[int, ...]]:
    """The weights of a part of the checkpoint ("unet") by their names there, whichever nets read them.

    Shapes are those of the checkpoint's modules: a linear layer's weight is (out, in), however it is stored.

    Raises:
        PackageError: a graph cannot be read.
    """
    found: dict[str, tuple[int, ...]] = {}
    for net, file in package.manifest.nets.items():
        if net in NETS and NETS[net].part == part:
            graph = package.path(file.graph).read_bytes()
            turned = stored_transposed(graph)
            for name, tensor in net_tensors(package, net, graph).items():
                found[name] = tensor.shape[::-1] if name in turned else tensor.shape
    return found


def stored_transposed(graph: bytes) -> frozenset[str]:
    """The weights that a graph turns from (in, out), as they are stored, before anything reads them."""
    return frozenset(name.decode() for name in _TURNED.findall(graph))


def weight_values(tensor: ExternalTensor, folder: Path) -> Array:
    """A weight as it is stored: a view of the mapped file, whose pages are read when used.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError: it has not the bytes that the graph names, or numbers of an unknown type.
    """
    whole: Any = np.memmap(folder / tensor.location, np.uint8, mode="r")
    stored = whole[tensor.offset : tensor.offset + tensor.length]
    if tensor.dtype in _DTYPES:
        return stored.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
    import ml_dtypes

    return stored.view(getattr(ml_dtypes, _ML_DTYPES[tensor.dtype])).reshape(tensor.shape)


def engine_bytes(
    package: Package, net: str, graph: bytes | None = None, *, without: Collection[str] = ()
) -> int:
    """About how large the net's engine becomes: its weights at the width of the arithmetic.

    `graph` and errors as in `net_tensors`; `without` are weights that are not counted.
    """
    tensors = net_tensors(package, net, graph).items()
    values = sum(prod(tensor.shape) for name, tensor in tensors if name not in without)
    return values * _WIDTHS[package.manifest.dtype]
