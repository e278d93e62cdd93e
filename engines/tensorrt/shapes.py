"""Dtypes and shapes between the net contract and the library: what is the same, sizes of symbols, outputs."""

from __future__ import annotations

from ..device import Shapes
from ..errors import EngineError, UsageError
from ..spec import Dim, NetSpec

# Names in the library's DataType: the contract's.
TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}

_SCALE = 8  # pixels per latent cell: "H/8" and "H" in the contract


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
        total += tensor.nbytes(shape)
    return total
