"""Weights as named tensors in one safetensors file, and graphs that point into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ...engines.safetensors_format import TensorRange, write_file
from ...engines.spec import Array
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
) -> dict[str, TensorRange]:
    """Write `tensors`, each converted to its type (which can hold it: `check_values`), one at a time.

    Returns:
        Name -> where the tensor lies in the file.
    """
    described = {name: (_NAMES[types[name]], tensor.shape) for name, tensor in tensors.items()}

    def content(name: str) -> memoryview:
        flat = np.ravel(convert(tensors[name], _NAMES[types[name]]))
        return memoryview(cast(Any, seen_as(flat, np.uint8)))

    return write_file(path, described, content)


def attach(model: ir.Model, folder: Path, slots: Mapping[str, TensorRange]) -> None:
    """Make the initializers that are checkpoint tensors external data in `folder`'s weights file.

    Where the stored type is not the graph's, wider or narrower, a Cast follows the initializer. Engines fold
    it when they load, and the file holds no tensor twice, or wider than the checkpoint did.
    """
    for name, value in list(model.graph.initializers.items()):
        if name not in slots:
            continue
        slot, compute = slots[name], value.dtype
        shape, stored = ir.Shape(slot.shape), STORED[slot.dtype]
        value.const_value = ir.ExternalTensor(
            WEIGHTS, slot.offset, slot.length, stored, name=name, shape=shape, base_dir=folder
        )
        value.shape, value.dtype = shape, stored
        if compute is not None and compute != stored:
            used = ir.val(f"{name}/{_NAMES[compute]}", compute, shape)
            ir.convenience.replace_all_uses_with(value, used)
            converted = ir.node("Cast", [value], {"to": compute}, name=f"{name}/cast", outputs=[used])
            model.graph.insert_before(model.graph[0], converted)


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
