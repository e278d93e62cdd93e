"""Weights as named tensors in one safetensors file, and graphs that point into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir

from ...engines.errors import DAMAGED_WEIGHTS, EXPORT_IN_FP32, CheckpointError
from ...engines.safetensors_format import TensorRange, write_file

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights.safetensors"

# safetensors' name -> ONNX type, of the weights that `checkpoint.component.refuse_quantised` lets through.
STORED: Mapping[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
_NAMES = {dtype: name for name, dtype in STORED.items()}


def stored_type(source: str, compute: ir.DataType) -> ir.DataType:
    """The type a package stores a tensor in: the graph's, unless the checkpoint's (`source`) is narrower."""
    found = STORED[source]
    return found if found.itemsize < compute.itemsize else compute


def write_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], types: Mapping[str, ir.DataType]
) -> dict[str, TensorRange]:
    """Write `tensors`, each converted to its type, one at a time.

    Returns:
        Name -> where the tensor lies in the file.

    Raises:
        CheckpointError: a tensor has a finite value that its stored type cannot hold.
    """
    described = {name: (_NAMES[types[name]], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_file(path, described, lambda name: _bytes(name, tensors[name], types[name]))


def _bytes(name: str, tensor: torch.Tensor, dtype: ir.DataType) -> memoryview:
    import torch

    target = {
        ir.DataType.DOUBLE: torch.float64,
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
    }[dtype]
    stored = tensor.detach().to(target).contiguous()
    if target is not tensor.dtype and bool((stored.isinf() & tensor.isfinite()).any()):
        raise CheckpointError(
            f"the tensor {name!r} has values up to {float(tensor.abs().max()):.3g}",
            expected=f"values that {_NAMES[dtype]} can hold",
            fix=EXPORT_IN_FP32 if target is torch.float16 else DAMAGED_WEIGHTS,
        )
    return memoryview(cast(Any, stored.reshape(-1).view(torch.uint8).numpy()))


def attach(model: ir.Model, folder: Path, slots: Mapping[str, TensorRange]) -> None:
    """Make the initializers that are checkpoint tensors external data in `folder`'s weights file.

    Where the stored type is not the graph's, a Cast follows the initializer. Engines fold it when they load,
    and the file holds no tensor twice, or wider than the checkpoint did.
    """
    for name, value in list(model.graph.initializers.items()):
        if name not in slots:
            continue
        slot = slots[name]
        stored, compute = STORED[slot.dtype], value.dtype
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            slot.offset,
            slot.length,
            stored,
            name=name,
            shape=ir.Shape(slot.shape),
            base_dir=folder,
        )
        value.shape = ir.Shape(slot.shape)
        if compute is None or compute == stored:
            value.dtype = stored
            continue
        widen = ir.node("Cast", [value], {"to": compute}, name=f"{name}/cast")
        widen.outputs[0].name = f"{name}/{_NAMES[compute]}"
        widen.outputs[0].shape = value.shape
        widen.outputs[0].dtype = compute
        ir.convenience.replace_all_uses_with(value, widen.outputs[0])
        widen.replace_input_with(0, value)
        value.dtype = stored
        model.graph.insert_before(model.graph[0], widen)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a checkpoint tensor."""
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)
