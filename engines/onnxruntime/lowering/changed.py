"""Gives a session other weights than its graph names, for nets of a package with `Package.changes`.

ONNX Runtime takes values from memory in place of external initializers, before it optimises
(`SessionOptions.add_external_initializers`), so that folded, packed and blocked copies are made of those
values; `add_initializer` comes too late for that. They must have the initializers' type. Where a graph casts
a weight from a narrower stored type, what replaces it is float32, so that a sum is rounded once, to what the
graph computes with.

Needs onnx-ir where weights are stored in another type than float32; it is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...net_weights import changed_names, changed_values, check_range, net_tensors
from ...package import Package
from ...spec import Array

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT = 1  # TensorProto.DataType


@dataclass(frozen=True, kw_only=True)
class ChangedGraph:
    """A graph as bytes, and what a session of it gets in place of the initializers of these names."""

    graph: bytes
    values: dict[str, Array]


def changed_graph(package: Package, net: str, graph: bytes) -> ChangedGraph | None:
    """What a session computes with where the package has changes for a net; None where it has none.

    Args:
        package: the package.
        net: the net.
        graph: the package's graph of the net, or what runs in place of it with the same initializers.

    Raises:
        PackageError: a graph cannot be read.
        NumericError: a changed weight is beyond what the arithmetic holds.
        OSError, KeyError, ValueError: a weights file is not what the graph says.
    """
    names = changed_names(package, net, graph)
    if not names:
        return None
    values = changed_values(package, net, names)
    check_range(values, package.manifest.dtype)
    stored = net_tensors(package, net, graph)
    narrow = [name for name in names if stored[name].dtype != _FLOAT]
    if narrow:
        graph, kept = _widen(graph, narrow)
        for name in kept:
            values[name] = values[name].astype(np.float16)
    return ChangedGraph(graph=graph, values=values)


def _widen(graph: bytes, names: Sequence[str]) -> tuple[bytes, list[str]]:
    """A graph in which these initializers are float32 where nothing but casts (and turns) read them.

    Returns:
        The graph, and the names that stay as they are: what reads them computes with the stored type.
    """
    import onnx
    import onnx_ir

    library = cast(Any, onnx_ir)  # its own types of reading and writing are incomplete
    model = library.from_proto(onnx.ModelProto.FromString(graph))
    kept: list[str] = []
    for name in names:
        value: ir.Value = model.graph.initializers[name]
        turned = [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Transpose"]
        readers = [use.node for each in (value, *turned) for use in each.uses()]
        if all(node.op_type in ("Cast", "Transpose") for node in readers):
            for each in (value, *turned):
                each.dtype = library.DataType.FLOAT
            tensor: Any = value.const_value
            value.const_value = library.ExternalTensor(
                tensor.location,
                tensor.offset,
                2 * tensor.length,
                library.DataType.FLOAT,
                name=name,
                shape=tensor.shape,
            )
        else:
            kept.append(name)
    return library.to_proto(model).SerializeToString(), kept
