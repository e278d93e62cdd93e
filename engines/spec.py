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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PackageError, UsageError

Array = npt.NDArray[Any]
Dim = int | str

DTYPES: Mapping[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}


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
        fits = array.dtype == DTYPES[self.dtype] and array.ndim == len(self.shape)
        for dim, size in zip(self.shape, array.shape, strict=False):
            fits = fits and size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
        if not fits:
            raise UsageError(
                f"{self.name} is {array.dtype} {array.shape} where {sizes}",
                expected=f"{self.dtype} ({', '.join(map(str, self.shape))})",
                fix="Check the call against the net's spec (`latentrt inspect PACKAGE`).",
            )

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
        names = [spec.name for spec in self.inputs]
        if sorted(arrays) != sorted(names):
            raise UsageError(
                f"the net was called with {sorted(arrays)}",
                expected=f"exactly {names}",
                fix="Check the call against the net's spec (`latentrt inspect PACKAGE`).",
            )
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.bind(arrays[spec.name], sizes)

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


# The nets of a package, in the order of the data flow, with what each is for.
NETS: Mapping[str, str] = {
    "text_encoder": "token ids -> context, once per prompt",
    "unet_context": "context -> cross-attention keys and values, once per prompt",
    "unet_time": "timesteps -> time-embedding projections of the whole schedule, once per schedule",
    "unet": "latent and invariants -> prediction, once per step",
    "vae_decoder": "latent -> uint8 picture, once",
    "unet_whole": "the UNet before hoisting, under diffusers' names, for other tools",
}

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
