"""Gives a session other weights than its graph names, for nets of a package with `Package.changes`.

ONNX Runtime takes values from memory in place of external initializers, before it optimises
(`SessionOptions.add_external_initializers`), so that folded, packed and blocked copies are made of those
values; `add_initializer` comes too late for that. They must have the initializers' type. Where a graph casts
a weight from a narrower stored type, what replaces it is float32, so that a sum is rounded once, to what the
graph computes with.

Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..net_weights import changed_names, changed_values, check_range
from ..package import Package
from ..spec import Array

if TYPE_CHECKING:
    import onnx_ir as ir


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
        NumericError: a changed weight is beyond what fp16 holds.
        OSError, KeyError, ValueError: a weights file is not what the graph says.
    """
    names = changed_names(package, net, graph)
    if not names:
        return None
    import onnx
    import onnx_ir

    library = cast(Any, onnx_ir)  # its own types of reading and writing are incomplete
    model = library.from_proto(onnx.ModelProto.FromString(graph))
    turns = {name: _settle(model, name) for name in names}
    # From here on the graph names these weights as its operators take them: turned, and in their type.
    by_columns = {name for name, perms in turns.items() if len(perms) % 2 and perms[0] == (1, 0)}
    values = changed_values(package, net, names, by_columns=by_columns)
    for name, value in values.items():
        check_range(name, value)
    for name, perms in turns.items():
        dtype = model.graph.initializers[name].dtype.numpy()
        values[name] = np.ascontiguousarray(reduce(np.transpose, perms, values[name]), dtype)
    return ChangedGraph(graph=library.to_proto(model).SerializeToString(), values=values)


def _settle(model: Any, name: str) -> list[tuple[int, ...]]:
    """Take away the turns and casts behind a weight, and have the initializer be what comes out of them.

    ONNX Runtime folds them, but copies a value from memory each time: opening the UNet of SD 1.5 with its
    transformers' matrices changed took 10.5 s, and takes 2.7 s so. Where several nodes read the weight, they
    stay, and it is float32 if they all cast it.

    Returns:
        The permutations of the turns, in their order.
    """
    import onnx_ir

    library = cast(Any, onnx_ir)
    value: Any = model.graph.initializers[name]
    dtype, shape, end = value.dtype, value.shape, value
    perms: list[tuple[int, ...]] = []
    behind: list[ir.Node] = []
    while len(uses := list(end.uses())) == 1 and uses[0].node.op_type in ("Transpose", "Cast"):
        node = uses[0].node
        if node.op_type == "Cast":
            dtype = library.DataType(node.attributes.get_int("to"))
        else:
            perms.append(tuple(node.attributes.get_ints("perm")))
            shape = library.Shape([shape[axis] for axis in perms[-1]])
        behind.append(node)
        end = node.outputs[0]
    if not behind and value.uses() and all(use.node.op_type == "Cast" for use in value.uses()):
        dtype = library.DataType.FLOAT
    if behind:
        library.convenience.replace_all_uses_with(end, value)
        model.graph.remove(behind[::-1], safe=True)
    tensor: Any = value.const_value
    value.dtype, value.shape = dtype, shape
    value.const_value = library.ExternalTensor(
        tensor.location, tensor.offset, prod(shape.numpy()) * dtype.itemsize, dtype, name=name, shape=shape
    )
    return perms
