"""Weights as named tensors in one safetensors file, and graphs that point into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ...engines.package import common_folder
from ...engines.safetensors_format import read_header, write_file
from ...engines.spec import Array
from ..files.component import TensorHeader
from ..stored_types import convert, seen_as

WEIGHTS = "weights.safetensors"

# safetensors' name -> ONNX type, of the weights that `stored_types` knows.
STORED: Mapping[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
}
_NAMES = {dtype: name for name, dtype in STORED.items()}


def stored_type(source: str, compute: ir.DataType) -> ir.DataType:
    """The type a package stores a tensor in: the graph's, unless the checkpoint's (`source`) is narrower."""
    return min(compute, STORED[source], key=lambda dtype: dtype.itemsize)


def write_weights(
    path: Path, tensors: Mapping[str, Array], types: Mapping[str, ir.DataType]
) -> dict[str, Place]:
    """Write `tensors`, each converted to its type (which can hold it: `check_values`), one at a time.

    Returns:
        Where each tensor lies.
    """
    described = {name: (_NAMES[types[name]], tensor.shape) for name, tensor in tensors.items()}

    def content(name: str) -> memoryview:
        flat = np.ravel(convert(tensors[name], _NAMES[types[name]]))
        return memoryview(cast(Any, seen_as(flat, np.uint8)))

    return {
        name: Place(file=path.resolve(), dtype=slot.dtype, offset=slot.offset, length=slot.length)
        for name, slot in write_file(path, described, content).items()
    }


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the numbers of one weight lie.

    Attributes:
        file: a path without links: ONNX Runtime follows none out of the weights' folder.
        dtype: safetensors' name of the stored type.
        offset, length: in bytes.
        transposed: stored as (in, out) where the graph has (out, in).
    """

    file: Path
    dtype: str
    offset: int
    length: int
    transposed: bool = False


def places(tensors: Mapping[str, TensorHeader]) -> dict[str, Place]:
    """Where a checkpoint's tensors lie, by the mapping's names.

    Raises:
        CheckpointError: a file cannot be read any more.
    """
    stored = {file: read_header(file).tensors for file in {header.file for header in tensors.values()}}
    found: dict[str, Place] = {}
    for name, header in tensors.items():
        whole = stored[header.file][header.name]
        begin, end = header.rows or (0, max(whole.shape[0] if whole.shape else 1, 1))
        row = whole.length // max(whole.shape[0] if whole.shape else 1, 1)
        found[name] = Place(
            file=header.file.resolve(),
            dtype=whole.dtype,
            offset=whole.offset + begin * row,
            length=(end - begin) * row,
            transposed=header.transposed,
        )
    return found


def attach(model: ir.Model, found: Mapping[str, Place]) -> None:
    """Make the initializers that are checkpoint tensors external data, in the folder that all of them share.

    Where what is stored is not what the graph computes with, a Transpose or a Cast follows the initializer.
    Engines fold it when they load, and no tensor is stored twice, or wider than the checkpoint has it.
    """
    folder = common_folder(place.file for place in found.values())
    for name, value in list(model.graph.initializers.items()):
        if name not in found:
            continue
        place, compute = found[name], value.dtype
        assert value.shape is not None
        shape = ir.Shape([*value.shape][::-1] if place.transposed else value.shape)
        value.const_value = ir.ExternalTensor(
            place.file.relative_to(folder).as_posix(),
            place.offset,
            place.length,
            STORED[place.dtype],
            name=name,
            shape=shape,
            base_dir=folder,
        )
        value.shape, value.dtype = shape, STORED[place.dtype]
        if compute is not None and compute != value.dtype:
            for source in _to_convert(value, compute):
                _follow(model.graph, source, "Cast", {"to": compute}, compute)
        if place.transposed:
            _follow(model.graph, value, "Transpose", {"perm": [1, 0]}, value.dtype)


def _to_convert(weight: ir.Value, compute: ir.DataType) -> list[ir.Value]:
    """What to cast so that a weight is used as `compute`: itself, or what it is transposed to if it widens.

    ONNX Runtime keeps what it folds on the way until all is folded, and narrow copies take half as much: for
    SDXL's UNet 4 GB less.
    """
    turns = [use.node for use in weight.uses()]
    stored = weight.dtype
    assert stored is not None
    if stored.itemsize >= compute.itemsize or any(node.op_type != "Transpose" for node in turns):
        return [weight]
    for node in turns:
        node.outputs[0].type = ir.TensorType(stored)
    return [node.outputs[0] for node in turns]


def _follow(
    graph: ir.Graph, value: ir.Value, operator: str, attributes: dict[str, Any], dtype: ir.DataType
) -> None:
    """Put a node behind a weight, or what was made of it, for all that read it."""
    name = f"{value.name}/{operator.lower()}"
    output = ir.val(f"{name}.out", dtype)
    ir.convenience.replace_all_uses_with(value, output)
    node = ir.node(operator, [value], attributes, name=name, outputs=[output])
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(maker, node)


def unbind(model: ir.Model, names: Iterable[str]) -> None:
    """Make these initializers external data that lies nowhere, as a template has a checkpoint's tensors."""
    for name in names:
        value = model.graph.initializers[name]
        assert value.shape is not None
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            "", None, None, value.dtype, name=name, shape=value.shape, base_dir=""
        )


def weight_shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the checkpoint tensors among a graph's initializers."""
    return {
        name: tuple(value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a checkpoint tensor."""
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of intermediate values: torch's expressions for them mean nothing to an engine."""
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
