"""The net contract, compared with what the library has: an engine's boundary, the outputs of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..device import Shapes
from ..errors import EngineError
from ..profiles import NetProfile
from ..spec import Dim, NetSpec, TensorSpec, output_shapes
from .flavour import Engine, Trt

# Names in the library's DataType: the contract's.
TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}


def shape_fits(
    shape: tuple[int, ...], dims: tuple[Dim, ...], *, bounded: bool = False, inferred: bool = False
) -> bool:
    """Whether the library's shape, with -1 for what is open, can be the contract's.

    With `bounded` a symbol may be a number, as in an engine whose profiles leave it no choice; with
    `inferred` a number may be open, as in what the library works out.
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


def check_engine(
    trt: Trt, engine: Engine, spec: NetSpec, profiles: Sequence[NetProfile], *, net: str, fix: str
) -> None:
    """Compare an engine's boundary and profiles with what the package and the store say they are.

    Raises:
        EngineError: names, dtypes, dimensions, places, layouts or profiles differ; `fix` is its last part.
    """
    differences = [
        *_boundary_differences(trt, engine, spec),
        *_profile_differences(trt, engine, spec, profiles),
    ]
    if differences:
        raise EngineError(
            f"the engine of {net!r} differs from the net: {'; '.join(differences[:4])}",
            expected="the boundary that the package's manifest records",
            fix=fix,
        )


def _boundary_differences(trt: Trt, engine: Engine, spec: NetSpec) -> Iterator[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    for kind, found, tensors in (
        ("inputs", inputs, spec.inputs),
        ("outputs", set(names) - inputs, spec.outputs),
    ):
        if found != (expected := {tensor.name for tensor in tensors}):
            yield f"{kind} {sorted(found ^ expected)}"
            return  # the rest asks the engine for tensors by name
    for tensor in (*spec.inputs, *spec.outputs):
        yield from _tensor_differences(trt, engine, tensor)


def _tensor_differences(trt: Trt, engine: Engine, tensor: TensorSpec) -> Iterator[str]:
    name = tensor.name
    kind = engine.get_tensor_dtype(name).name
    if TYPES.get(kind) != tensor.dtype:
        yield f"{name} is {TYPES.get(kind, kind)}, not {tensor.dtype}"
    shape = tuple(engine.get_tensor_shape(name))
    if not shape_fits(shape, tensor.shape, bounded=True, inferred=True):
        yield f"{name} is {shape}, not ({', '.join(map(str, tensor.shape))})"
    if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
        yield f"{name} has to lie in host memory"


def _profile_differences(
    trt: Trt, engine: Engine, spec: NetSpec, profiles: Sequence[NetProfile]
) -> Iterator[str]:
    if engine.num_optimization_profiles != len(profiles):
        yield f"it has {engine.num_optimization_profiles} profiles, not {len(profiles)}"
        return
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for index, profile in enumerate(profiles):
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in names and (
                engine.get_tensor_format(tensor.name, index) != trt.TensorFormat.LINEAR
            ):
                yield f"{tensor.name} is not laid out in rows"
        # An input of one fixed shape has no profile of its own.
        moving = [t.name for t in spec.inputs if t.name in names and -1 in engine.get_tensor_shape(t.name)]
        for name in moving:
            found = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            if found != profile.shapes[name]:
                yield f"profile {index} ({profile.label}) takes {name} from {found[0]} to {found[-1]}"
