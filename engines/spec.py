"""The net contract: every name, dtype and shape that crosses a net's boundary, written once.

Export makes graphs that satisfy it, packages record it, engines check it, the runtime relies on it.

Symbols in shapes:

    B     rows of one UNet call: pictures, or twice that with guidance (unconditional rows first)
    N     pictures
    P     prompts encoded in one call
    S     rows of a sampler's table
    T     tokens of the context (77, or a multiple)
    H W   height and width of the picture in pixels; "H/8" is the latent's height
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PackageError, UsageError

Array = npt.NDArray[Any]
Dim = int | str
_CHECK_CALL = "Check the call against the net's spec (`latentrt inspect PACKAGE`)."

DTYPES: Mapping[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """What a tensor takes, its elements one after the other."""
    return np.dtype(DTYPES[dtype]).itemsize * prod(shape)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a net. A dimension is a number or one of the symbols above."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        """Raise PackageError for a dtype outside DTYPES."""
        if self.dtype not in DTYPES:
            raise PackageError(
                f"tensor {self.name!r} has dtype {self.dtype!r}",
                expected=f"one of {', '.join(DTYPES)}",
                fix="Export the package again with this release.",
            )

    def bind(self, array: Array, sizes: dict[str, int]) -> None:
        """Check `array` against this spec; symbols are looked up in, or added to, `sizes`."""
        if array.dtype != DTYPES[self.dtype] or not self.fits(array.shape, sizes):
            raise UsageError(
                f"{self.name} is {array.dtype} {array.shape} where {sizes}",
                expected=f"{self.dtype} ({', '.join(map(str, self.shape))})",
                fix=_CHECK_CALL,
            )

    def fits(self, shape: Sequence[int], sizes: dict[str, int]) -> bool:
        """Whether `shape` is one of this tensor's; symbols are looked up in, or added to, `sizes`."""
        return len(shape) == len(self.shape) and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for dim, size in zip(self.shape, shape, strict=True)
        )

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of this tensor at a shape."""
        return tensor_bytes(self.dtype, shape)

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """The reverse of `to_json`."""
        return cls(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """The boundary of one net."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raise UsageError unless `arrays` are exactly the inputs, by name, dtype and shape."""
        self.check_names(arrays)
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.bind(arrays[spec.name], sizes)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise UsageError unless `names` are exactly the inputs', in any order."""
        expected = [spec.name for spec in self.inputs]
        if (found := sorted(names)) != sorted(expected):
            raise UsageError(
                f"the net was called with {found}",
                expected=f"exactly {expected}",
                fix=_CHECK_CALL,
            )

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetSpec:
        """The reverse of `to_json`."""
        return cls(
            inputs=tuple(TensorSpec.from_json(item) for item in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(item) for item in data["outputs"]),
        )


def output_shapes(spec: NetSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every output when the inputs have these shapes; "H" follows from "H/8" exactly.

    Raises:
        UsageError: `shapes` are not exactly the inputs, or one of them does not fit.
        PackageError: an output has a symbol that no input decides.
    """
    spec.check_names(shapes)
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        if not tensor.fits(shapes[tensor.name], sizes):
            raise UsageError(
                f"{tensor.name} has the shape {tuple(shapes[tensor.name])} where {sizes}",
                expected=f"({', '.join(map(str, tensor.shape))})",
                fix=_CHECK_CALL,
            )
    for symbol, size in tuple(sizes.items()):
        stem, _, divisor = symbol.partition("/")
        if divisor:
            sizes.setdefault(stem, size * int(divisor))
    return {tensor.name: _numbers(tensor, sizes) for tensor in spec.outputs}


def _numbers(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    unknown = [dim for dim in tensor.shape if isinstance(dim, str) and dim not in sizes]
    if unknown:
        raise PackageError(
            f"no input decides the size {unknown[0]!r} of the output {tensor.name!r}",
            expected=f"one of {', '.join(sorted(sizes))}",
            fix="Export the package again with this release.",
        )
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape)


# The nets of a package, in the order of the data flow, with what each is for.
NETS: Mapping[str, str] = {
    "text_encoder": "token ids -> context, once per prompt",
    "unet_context": "context -> cross-attention keys and values, once per prompt",
    "unet_time": "timesteps -> time-embedding projections of the whole schedule, once per schedule",
    "unet": "latent and invariants -> prediction, once per step",
    "step": "guidance and the sampler's row update, once per step where the loop stays on a device",
    "vae_decoder": "latent -> uint8 picture, once",
    "unet_whole": "the UNet before hoisting, under diffusers' names, for other tools",
}

# What a row of the sampler's table is to `step`, in this order: the columns p, q, a, b, c of the table
# (docs/samplers.md), then the guidance scale and the guidance rescale of the request.
HISTORY = 5
ROW = ("p", "q", "a", *(f"b{j}" for j in range(HISTORY)), "c", "guidance_scale", "guidance_rescale")

# Prefixes of the invariants that cross from `unet_context` and `unet_time` into `unet`.
CONTEXT_INVARIANT = "context."
TIME_INVARIANT = "time."


def text_encoder(*, tokens: Dim, width: int, float_dtype: str) -> NetSpec:
    """Token ids to the context of cross-attention (last hidden state after the final norm)."""
    return NetSpec(
        inputs=(TensorSpec(name="input_ids", dtype="int32", shape=("P", tokens)),),
        outputs=(TensorSpec(name="context", dtype=float_dtype, shape=("P", tokens, width)),),
    )


def unet_whole(*, channels: int, width: int, float_dtype: str) -> NetSpec:
    """The UNet as diffusers and optimum name it, before hoisting."""
    latent: tuple[Dim, ...] = ("B", channels, "H/8", "W/8")
    return NetSpec(
        inputs=(
            TensorSpec(name="sample", dtype=float_dtype, shape=latent),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="encoder_hidden_states", dtype=float_dtype, shape=("B", "T", width)),
        ),
        outputs=(TensorSpec(name="out_sample", dtype=float_dtype, shape=("B", 4, "H/8", "W/8")),),
    )


def unet(*, channels: int, float_dtype: str, invariants: Sequence[TensorSpec]) -> NetSpec:
    """The loop graph. `invariants` are outputs of `unet_context` (B rows) and `unet_time` (1 row)."""
    return NetSpec(
        inputs=(
            TensorSpec(name="latent", dtype=float_dtype, shape=("B", channels, "H/8", "W/8")),
            *invariants,
        ),
        outputs=(TensorSpec(name="prediction", dtype=float_dtype, shape=("B", 4, "H/8", "W/8")),),
    )


def step(*, channels: int, float_dtype: str) -> NetSpec:
    """Guidance and row update. `prediction` has B = 2N rows with guidance (unconditional first), else N.

    `state` is the latent followed by the last HISTORY - 1 remembered predictions, newest first. `latent` is
    the new latent as the next UNet call wants it: once, or twice with guidance.
    """
    picture: tuple[Dim, ...] = (channels, "H/8", "W/8")
    return NetSpec(
        inputs=(
            TensorSpec(name="prediction", dtype=float_dtype, shape=("B", *picture)),
            TensorSpec(name="state", dtype="float32", shape=(HISTORY, "N", *picture)),
            TensorSpec(name="noise", dtype="float32", shape=("N", *picture)),
            TensorSpec(name="row", dtype="float32", shape=(len(ROW),)),
        ),
        outputs=(
            TensorSpec(name="next_state", dtype="float32", shape=(HISTORY, "N", *picture)),
            TensorSpec(name="latent", dtype=float_dtype, shape=("B", *picture)),
        ),
    )


def unet_context(*, width: int, float_dtype: str, invariants: Sequence[TensorSpec]) -> NetSpec:
    """Context to everything in the UNet that depends on the prompt alone."""
    return NetSpec(
        inputs=(TensorSpec(name="context", dtype=float_dtype, shape=("B", "T", width)),),
        outputs=tuple(invariants),
    )


def unet_time(*, invariants: Sequence[TensorSpec]) -> NetSpec:
    """Timesteps to everything in the UNet that depends on the schedule alone: one row per step."""
    return NetSpec(
        inputs=(TensorSpec(name="timestep", dtype="float32", shape=("S",)),),
        outputs=tuple(invariants),
    )


def vae_decoder(*, channels: int, float_dtype: str) -> NetSpec:
    """Latent to picture. `mean` is taken before clamping: not finite when any value is not."""
    return NetSpec(
        inputs=(TensorSpec(name="latent", dtype=float_dtype, shape=("N", channels, "H/8", "W/8")),),
        outputs=(
            TensorSpec(name="image", dtype="uint8", shape=("N", "H", "W", 3)),
            TensorSpec(name="mean", dtype="float32", shape=("N",)),
        ),
    )
