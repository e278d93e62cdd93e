"""Weights as named tensors in one safetensors file, and graphs that point into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir

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
    return min(compute, STORED[source], key=lambda dtype: dtype.itemsize)


def write_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], types: Mapping[str, ir.DataType]
) -> dict[str, TensorRange]:
    """Write `tensors`, each converted to its type (which can hold it: `make_net`), one at a time.

    Returns:
        Name -> where the tensor lies in the file.
    """
    import torch

    described = {name: (_NAMES[types[name]], tuple(tensor.shape)) for name, tensor in tensors.items()}

    def content(name: str) -> memoryview:
        dtype = getattr(torch, types[name].name.lower())  # torch's names too: float16, float, …
        flat = tensors[name].detach().to(dtype).contiguous().reshape(-1)
        return memoryview(cast(Any, flat.view(torch.uint8).numpy()))

    return write_file(path, described, content)


def attach(model: ir.Model, folder: Path, slots: Mapping[str, TensorRange]) -> None:
    """Make the initializers that are checkpoint tensors external data in `folder`'s weights file.

    Where the stored type is not the graph's, a Cast follows the initializer. Engines fold it when they load,
    and the file holds no tensor twice, or wider than the checkpoint did.
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
            wide = ir.val(f"{name}/{_NAMES[compute]}", compute, shape)
            ir.convenience.replace_all_uses_with(value, wide)
            widen = ir.node("Cast", [value], {"to": compute}, name=f"{name}/cast", outputs=[wide])
            model.graph.insert_before(model.graph[0], widen)


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
