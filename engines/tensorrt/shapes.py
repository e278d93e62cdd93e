"""Dtypes and shapes between the net contract and the library: what is the same, and what a call makes."""

from __future__ import annotations

from ..device import Shapes
from ..errors import EngineError
from ..spec import Dim, NetSpec, output_shapes

# Names in the library's DataType: the contract's.
TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}


def shape_fits(
    shape: tuple[int, ...], dims: tuple[Dim, ...], *, bounded: bool = False, inferred: bool = False
) -> bool:
    """Whether the library's shape, with -1 for what is open, can be the contract's.

    Args:
        shape: the library's.
        dims: the contract's.
        bounded: a symbol may be a number, as in an engine whose profiles leave it no choice.
        inferred: a number may be open, as in what the library works out.
    """
    return len(shape) == len(dims) and all(
        bounded or size == -1 if isinstance(dim, str) else size == dim or (inferred and size == -1)
        for size, dim in zip(shape, dims, strict=True)
    )


def check_outputs(spec: NetSpec, shapes: Shapes, found: Shapes, *, net: str, fix: str) -> None:
    """Raise EngineError unless `found` are the shapes that the contract gives the outputs."""
    for name, expected in output_shapes(spec, shapes).items():
        if found[name] != expected:
            raise EngineError(
                f"the engine of {net!r} makes {name} of shape {found[name]} from {dict(shapes)}",
                expected=str(expected),
                fix=fix,
            )


def io_bytes(spec: NetSpec, shapes: Shapes) -> int:
    """Bytes of all inputs and outputs of a call."""
    every = {**shapes, **output_shapes(spec, shapes)}
    return sum(tensor.nbytes(every[tensor.name]) for tensor in (*spec.inputs, *spec.outputs))
