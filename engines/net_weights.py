"""Which weights one graph uses, and where they lie: read from the graph's bytes alone."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MemoryLimitError, NumericError, PackageError, command
from .external_data import ExternalTensor, external_tensors, node_names
from .package import Package
from .processors import usable_processors
from .spec import NETS, Array

# The number of a type in onnx.proto3 -> NumPy's name of it; the second line's are from ml_dtypes.
_DTYPES = {1: "float32", 3: "int8", 10: "float16", 11: "float64"}
_ML_DTYPES = {16: "bfloat16", 17: "float8_e4m3fn", 19: "float8_e5m2"}
_INT4 = 22  # two values to a byte, the first in the low bits
_SIZES = {3: 1, 17: 1, 19: 1, _INT4: 0.5}  # bytes per value that a rounded package's engines keep
# How `checkpoints.graphs.weights.attach` calls the node that it puts behind a weight.
_TURNED = "/transpose"
_WIDTHS = {"fp16": 2, "fp32": 4}  # bytes per value in an engine of that dtype
# The largest number of fp16.
LARGEST = float(np.finfo(np.float16).max)


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
            turned = stored_transposed(graph, package.path(file.graph))
            for name, tensor in net_tensors(package, net, graph).items():
                found[name] = tensor.shape[::-1] if name in turned else tensor.shape
    return found


def stored_transposed(graph: bytes, path: Path) -> frozenset[str]:
    """The weights that a graph turns from (in, out), as they are stored, before anything reads them.

    `path` and errors as in `external_data.node_names`.
    """
    return frozenset(first for name, first in node_names(graph, path) if name == f"{first}{_TURNED}")


def changed_names(package: Package, net: str, graph: bytes | None = None) -> tuple[str, ...]:
    """The weights of a net that `Package.changes` has others for, in the graph's order.

    `graph` and errors as in `net_tensors`.
    """
    changes = package.changes_of(net)
    return tuple(name for name in net_tensors(package, net, graph) if name in changes) if changes else ()


def changed_values(
    package: Package, net: str, names: Iterable[str], *, by_columns: Collection[str] = ()
) -> dict[str, Array]:
    """What a net computes with in place of these weights: float32, in the shape that the graph stores.

    Args:
        package: the package.
        net: the net.
        names: of the weights.
        by_columns: those whose matrix lies in memory column by column, for who transposes it next.

    Raises:
        PackageError: the graph cannot be read.
        OSError, KeyError, ValueError: as `weight_values`.
        LatentrtError: what a change raises.
    """
    path = package.path(package.manifest.nets[net].graph)
    graph = path.read_bytes()
    stored, turned = net_tensors(package, net, graph), stored_transposed(graph, path)
    changes, folder = package.changes_of(net), package.weights_folder(net)

    def value(name: str) -> Array:
        weight = weight_values(stored[name], folder)
        order = "F" if name in by_columns else "C"
        if name not in turned:
            return np.asarray(changes[name](np.asarray(weight, order=order)), order=order)
        # A change keeps the order, so that narrow numbers are moved, not wide ones.
        flipped = np.asarray(np.transpose(weight), order="C" if order == "F" else "F")
        return np.asarray(np.transpose(changes[name](flipped)), order=order)

    names = tuple(names)
    with ThreadPoolExecutor(usable_processors()) as pool:
        return dict(zip(names, pool.map(value, names), strict=True))


def peak(value: Array) -> float:
    """The largest magnitude of an array; 0 of one without numbers."""
    return float(max(value.max(initial=0.0), -value.min(initial=0.0)))


def check_range(name: str, value: Array) -> None:
    """Raise NumericError for a changed weight that is not finite, or beyond what fp16 holds.

    That is refused in fp32 too: every model is published in fp16, and such a weight draws noise.
    """
    found = peak(value)
    if not found <= LARGEST:  # NaN neither
        raise NumericError(
            f"with the adapters the weight {name} reaches {found:.6g}",
            expected=f"at most {LARGEST:.6g}, the largest number of fp16, as every model's weights are",
            fix="Use less of them.",
        )


@contextmanager
def reading_changes(package: Package, net: str) -> Generator[None]:
    """Raises what reading and changing a net's weights raises as MemoryLimitError or PackageError."""
    try:
        yield
    except MemoryError as error:
        raise MemoryLimitError(
            f"the weights of {net!r} with the adapters do not fit the memory",
            expected="enough free memory",
            fix="Close other programs, or use fewer adapters.",
            culprit=net,
        ) from error
    except (ValueError, KeyError, OSError) as error:
        path = package.path(package.manifest.nets[net].graph)
        raise PackageError(
            f"{path} has no weights that adapters could change ({type(error).__name__}: {error})",
            expected="the weights that it names",
            fix="Check the package: " + command("latentrt", "inspect", package.root, "--verify"),
        ) from error


def weight_values(tensor: ExternalTensor, folder: Path, *, writable: bool = False) -> Array:
    """A weight as it is stored: a view of the mapped file, whose pages are read when used; four bits as int8.

    Some libraries take no array that they could not write to. What is written to a `writable` one stays in
    memory, and never reaches the file.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError: it has not the bytes that the graph names, or numbers of an unknown type.
    """
    whole: Any = np.memmap(folder / tensor.location, np.uint8, mode="c" if writable else "r")
    stored = whole[tensor.offset : tensor.offset + tensor.length]
    if tensor.dtype in _DTYPES:
        return stored.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
    if tensor.dtype == _INT4:
        pairs: Any = np.stack([stored << 4, stored], axis=1)
        return (pairs.view(np.int8) >> 4).reshape(tensor.shape)
    import ml_dtypes

    return stored.view(getattr(ml_dtypes, _ML_DTYPES[tensor.dtype])).reshape(tensor.shape)


def engine_bytes(
    package: Package, net: str, graph: bytes | None = None, *, without: Collection[str] = ()
) -> int:
    """About how large the net's engine becomes: its weights at the width of the arithmetic, or rounded.

    `graph` and errors as in `net_tensors`; `without` are weights that are not counted.
    """
    width = _WIDTHS[package.manifest.dtype]
    narrow = _SIZES if package.manifest.quantised else {}
    tensors = net_tensors(package, net, graph).items()
    counted = (tensor for name, tensor in tensors if name not in without)
    return int(sum(prod(tensor.shape) * narrow.get(tensor.dtype, width) for tensor in counted))
