"""Makes inputs of a graph's weights, for a library that is given them as arrays.

Such a library reads them where they lie, be that the user's own files, and needs no graph with another path
in it. It takes mapped files as they are, so memory holds no more than what it makes of them.

Needs onnx, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MemoryLimitError, PackageError, command
from ..net_weights import net_tensors, reading_changes, weight_values
from ..package import Package
from ..processors import usable_processors
from ..spec import Array
from .changed import changed_graph

# What a graph computes with without a cast, by its arithmetic: that of fp16 has islands of float32.
_COMPUTED = {"fp32": ("float32",), "fp16": ("float16", "float32")}


@dataclass(frozen=True, kw_only=True)
class GivenGraph:
    """A graph as bytes, whose last inputs are the weights, and their values by name: floats, or int8."""

    graph: bytes
    values: dict[str, Array]


def given_graph(package: Package, net: str) -> GivenGraph:
    """The graph of a net with its weights beside it, those of `Package.changes` in place of the stored ones.

    Weights that the graph casts are float32: each is then in memory once, however often a library opens the
    graph. All others are views of the files.

    Raises:
        PackageError: the graph cannot be read, or its weights are not what it says.
        NumericError: a changed weight is beyond what fp16 holds.
        MemoryLimitError: the weights do not fit.
    """
    path = package.path(package.manifest.nets[net].graph)
    content, values = path.read_bytes(), dict[str, Array]()
    if package.changes:
        with reading_changes(package, net):
            changed = changed_graph(package, net, content)
        if changed is not None:
            content, values = changed.graph, changed.values
    stored = net_tensors(package, net)
    with _reading(package, net, path):
        import onnx

        model = onnx.ModelProto.FromString(content)
        weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
        _check_all_are_here(stored.keys() - {tensor.name for tensor in weights})
        folder = package.weights_folder(net)
        computed = _COMPUTED[package.manifest.dtype]

        def value(name: str) -> Array:
            found = weight_values(stored[name], folder, writable=True)
            stays = str(found.dtype) in computed or found.dtype.kind == "i"  # which the graph scales back
            return found if stays else np.asarray(found, np.float32)

        names = [tensor.name for tensor in weights if tensor.name not in values]
        with ThreadPoolExecutor(usable_processors()) as pool:
            values |= zip(names, pool.map(value, names), strict=True)
        for tensor in weights:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(values[tensor.name].dtype)
            info = onnx.helper.make_tensor_value_info(tensor.name, dtype, tensor.dims)
            model.graph.input.append(info)
            model.graph.initializer.remove(tensor)
        del model.graph.value_info[:]  # which has the narrower types
        return GivenGraph(graph=model.SerializeToString(), values=values)


def _check_all_are_here(missing: set[str]) -> None:
    """Raise ValueError for weights inside nodes, where no input can take their place."""
    if missing:
        raise ValueError(f"the weight {min(missing)!r} is inside a node")


@contextmanager
def _reading(package: Package, net: str, path: Path) -> Generator[None]:
    """Raises what goes wrong with a graph and its weights as PackageError or MemoryLimitError."""
    try:
        yield
    except MemoryError as error:
        raise MemoryLimitError(
            f"the weights of {net!r} do not fit the memory",
            expected="enough free memory",
            fix="Close other programs.",
            culprit=net,
        ) from error
    except (ValueError, KeyError, OSError) as error:
        raise PackageError(
            f"{path} has no weights to give ({type(error).__name__}: {error})",
            expected="the weights that it names",
            fix="Check the package: " + command("latentrt", "inspect", package.root, "--verify"),
        ) from error
