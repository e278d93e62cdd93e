"""Shapes between the net contract and an execution context: sizes of symbols, expected outputs, bytes."""

from __future__ import annotations

from math import prod

import numpy as np

from ..device import Shapes
from ..errors import EngineError, UsageError
from ..spec import DTYPES, Dim, NetSpec

_SCALE = 8  # pixels per latent cell: "H/8" and "H" in the contract


def input_sizes(spec: NetSpec, shapes: Shapes) -> dict[str, int]:
    """The value of each symbol.

    Raises:
        UsageError: a name, rank, fixed dimension or symbol contradicts the contract.
    """
    sizes: dict[str, int] = {}
    right = {tensor.name for tensor in spec.inputs} == set(shapes)
    for tensor in spec.inputs:
        shape = shapes.get(tensor.name, ())
        right = right and len(shape) == len(tensor.shape)
        for dim, size in zip(tensor.shape, shape, strict=False):
            right = right and size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
    if not right:
        raise UsageError(
            f"a net was given the input shapes {dict(shapes)}",
            expected=", ".join(f"{t.name} ({', '.join(map(str, t.shape))})" for t in spec.inputs),
            fix="Check the call against the net's spec (`latentrt inspect PACKAGE`).",
        )
    return sizes


def output_shapes(spec: NetSpec, shapes: Shapes) -> dict[str, tuple[int | None, ...]]:
    """The shape of each output for these input shapes; None for a symbol that no input has."""
    sizes = input_sizes(spec, shapes)
    return {tensor.name: tuple(_size(dim, sizes) for dim in tensor.shape) for tensor in spec.outputs}


def _size(dim: Dim, sizes: dict[str, int]) -> int | None:
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    cells = sizes.get(f"{dim}/{_SCALE}")
    return None if cells is None else cells * _SCALE


def check_outputs(spec: NetSpec, shapes: Shapes, found: Shapes, *, net: str, fix: str) -> None:
    """Raise EngineError unless `found` are the shapes that the contract gives the outputs."""
    for name, expected in output_shapes(spec, shapes).items():
        shape = found[name]
        same = len(shape) == len(expected) and all(
            size == wanted if wanted is not None else size > 0
            for size, wanted in zip(shape, expected, strict=True)
        )
        if not same:
            raise EngineError(
                f"the engine of {net!r} makes {name} of shape {shape} from {dict(shapes)}",
                expected=f"({', '.join('any' if size is None else str(size) for size in expected)})",
                fix=fix,
            )


def io_bytes(spec: NetSpec, shapes: Shapes) -> int:
    """Bytes of all inputs and outputs of a call."""
    outputs = output_shapes(spec, shapes)
    total = 0
    for tensor in (*spec.inputs, *spec.outputs):
        shape = shapes.get(tensor.name) or [size or 0 for size in outputs[tensor.name]]
        total += prod(shape) * np.dtype(DTYPES[tensor.dtype]).itemsize
    return total
