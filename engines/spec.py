"""The net contract: every name, dtype and shape that crosses a net's boundary, written once.

Export makes graphs that satisfy it, packages record it, engines check it, the runtime relies on it.

Symbols in shapes:

    B     rows of one UNet call: pictures, or twice that with guidance (unconditional rows first)
    E     extra rows behind a text encoder's table of embeddings, at least one (`extra_embeddings`)
    N     pictures
    P     prompts encoded in one call
    G     groups of image tokens; I tokens of each (`with_image_prompt`)
    S     rows of a sampler's table; times B, where the UNet is conditioned by vectors (VECTORS)
    T     tokens of the context (77, or a multiple)
    H W   height and width of the picture in pixels; "H/8" is the latent's height, and "H/16", "H/32", … those
          of the UNet's lower levels: half of the level above, rounded up
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PackageError, UsageError

Array = npt.NDArray[Any]
Dim = int | str
_PIXELS = ("H", "W")
_CELL = 8  # pixels of a latent cell's side: symbols with a larger divisor are levels of the UNet
_CHECK_CALL = "Check the call against the net's spec (`latentrt inspect PACKAGE`)."

DTYPES: Mapping[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}


# What a package calls its arithmetic -> the type of its nets' latents.
FLOAT_TYPES: Mapping[str, str] = {"fp16": "float16", "fp32": "float32"}


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
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, _level_size(dim, sizes) or size))
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


def level_symbol(side: str, level: int) -> str:
    """The symbol of a UNet level's `side` ("H" or "W"): "H/8" of level 0, the latent, then "H/16", ….

    Each is half of the level above, rounded up: what a convolution of stride 2 and padding 1 makes of it.
    """
    return f"{side}/{_CELL << level}"


def level_shape(level: int) -> tuple[str, str]:
    """The height and width of a UNet's level."""
    return level_symbol("H", level), level_symbol("W", level)


def _level_size(symbol: str, sizes: Mapping[str, int]) -> int | None:
    """What a level's symbol is where the latent's size is known; None for other symbols."""
    side, _, divisor = symbol.partition("/")
    latent = sizes.get(level_symbol(side, 0))
    return None if latent is None or not divisor else -(-latent * _CELL // int(divisor))


def shape_of(dims: Sequence[Dim], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape of the contract with its symbols replaced by numbers; a level's follows from the latent's."""
    return tuple(
        dim if isinstance(dim, int) else (sizes.get(dim) or _level_size(dim, sizes) or sizes[dim])
        for dim in dims
    )


def output_shapes(spec: NetSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every output when the inputs have these shapes; "H" follows from "H/8", and that from "H".

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
        elif symbol in _PIXELS:
            sizes.setdefault(f"{symbol}/8", size // 8)
    wanted = {tensor.name: tensor.shape for tensor in spec.outputs}
    for name, shape in wanted.items():
        named = (dim for dim in shape if isinstance(dim, str) and dim not in sizes)
        if unknown := [dim for dim in named if _level_size(dim, sizes) is None]:
            raise PackageError(
                f"no input decides the size {unknown[0]!r} of the output {name!r}",
                expected=f"one of {', '.join(sorted(sizes))}",
                fix="Export the package again with this release.",
            )
    return {name: shape_of(shape, sizes) for name, shape in wanted.items()}


# The text encoders in the order in which their features are joined to the context; each one's tokenizer.
TEXT_ENCODERS: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

# Conditions of the UNet that join its time embedding, under diffusers' names: (S, width) float32 inputs of
# `unet_time`, one row per UNet row. A UNet has those that it was trained with, most have none.
VECTORS: Mapping[str, str] = {
    "timestep_cond": "embedding of the guidance scale (latent consistency models)",
    "class_labels": "noised embedding of a picture, and of its noise level (unCLIP)",
    "text_embeds": "pooled embedding of the prompt (SDXL)",
    "time_ids": "sizes, crop and aesthetic score (SDXL; the manifest names each)",
    "control_type": "1 for each type that a Union ControlNet's pictures are of, else 0",
}


def guidance_embedding(scale: float, width: int) -> Array:
    """What `timestep_cond` holds: sines and cosines of 1000 (scale - 1) (Meng et al. 2023, arXiv 2210.03142).

    Returns:
        (width,) float32; the last number of an odd width is zero.
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half, dtype=np.float32))
    angles = np.float32((scale - 1) * 1000) * frequencies.astype(np.float32)
    row = np.zeros(width, np.float32)
    row[: 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return row


# What a row of the sampler's table is to `step`, in this order: the columns p, q, a, b, c of the table
# (docs/samplers.md), then the guidance scale and the guidance rescale of the request.
HISTORY = 5
ROW = ("p", "q", "a", *(f"b{j}" for j in range(HISTORY)), "c", "guidance_scale", "guidance_rescale")
# `step_masked` wants two more: how much of the kept picture, and of its noise, the new latent has.
MASKED_ROW = (*ROW, "keep_signal", "keep_noise")

# Inputs of `unet_controlled`, numbered from 0: what a ControlNet, and what a T2I-Adapter, adds to the UNet.
RESIDUAL = "residual_"
FEATURE = "feature_"
FEATURES = 4  # a T2I-Adapter makes so many

# Inputs of `unet_image_prompt`: what an IP-Adapter makes of a picture for each cross-attention, in the order
# of the adapter's layers; and where it counts, at each of the UNet's levels.
IMAGE_KEYS = "image_keys_"
IMAGE_VALUES = "image_values_"
IMAGE_MASK = "image_mask_"

# A control's picture, and what an image encoder makes of an IP-Adapter's.
HINT = "hint"
IMAGE_FEATURES = "image_features"
# Inputs of `controlnet`: what its hint became, and what each of its outputs is multiplied with.
HINT_EMBEDDING = "hint_embedding"
SCALES = "scales"
# Inputs of a Union's `controlnet_hint`: what its picture is, and what it is multiplied with. Its
# `controlnet_time` has the first as well, of all its pictures together.
CONTROL_TYPE = "control_type"
STRENGTH = "strength"

# The input of a text encoder that has the embeddings of tokens beyond its vocabulary.
EXTRA_EMBEDDINGS = "extra_embeddings"

# Prefixes of the invariants that cross from `unet_context` and `unet_time` into `unet`.
CONTEXT_INVARIANT = "context."
TIME_INVARIANT = "time."


def text_encoder(*, tokens: Dim, width: int, pooled: int | None = None, float_dtype: str) -> NetSpec:
    """Token ids to the context of cross-attention; `pooled` is the width of the pooled embedding, if any.

    `clip_skip` is how many of the last layers are left out, on top of those that the family leaves out.
    """
    context = TensorSpec(name="context", dtype=float_dtype, shape=("P", tokens, width))
    return NetSpec(
        inputs=(
            TensorSpec(name="input_ids", dtype="int32", shape=("P", tokens)),
            TensorSpec(name="clip_skip", dtype="int32", shape=(1,)),
        ),
        outputs=(context, TensorSpec(name="pooled", dtype=float_dtype, shape=("P", pooled)))
        if pooled
        else (context,),
    )


def with_extra_embeddings(plain: NetSpec, *, width: int, float_dtype: str) -> NetSpec:
    """A text encoder that also knows the ids V, V + 1, …, where V is the size of its vocabulary.

    `extra_embeddings` has their rows, those of textual inversion; without any, one row of zeros. No id may be
    V + E or more. The pooled embedding is taken where the prompt ends, whichever ids are in it.
    """
    extra = TensorSpec(name=EXTRA_EMBEDDINGS, dtype=float_dtype, shape=("E", width))
    return replace(plain, inputs=(*plain.inputs, extra))


def no_extra_embeddings(encoder: NetSpec) -> dict[str, Array]:
    """What a text encoder is called with where no prompt has ids beyond the vocabulary: one row of zeros.

    Nothing, for an encoder of a package of before 2026-11-29.
    """
    return {
        item.name: np.zeros([1 if dim == "E" else int(dim) for dim in item.shape], DTYPES[item.dtype])
        for item in encoder.inputs
        if item.name == EXTRA_EMBEDDINGS
    }


def image_encoder(*, size: int, width: int, float_dtype: str) -> NetSpec:
    """A picture, cut to the encoder's size but not normalised, to its CLIP embedding."""
    return NetSpec(
        inputs=(TensorSpec(name="image", dtype="uint8", shape=("N", size, size, 3)),),
        outputs=(TensorSpec(name="image_embeds", dtype=float_dtype, shape=("N", width)),),
    )


def image_noiser(*, width: int, float_dtype: str) -> NetSpec:
    """A CLIP embedding and unit noise to unCLIP's class labels.

    `noise_level` is the timestep of the image noise's schedule, `alpha` and `sigma` that level's factors of
    the (normalised) embedding and of the noise.
    """
    return NetSpec(
        inputs=(
            TensorSpec(name="image_embeds", dtype=float_dtype, shape=("N", width)),
            TensorSpec(name="noise", dtype="float32", shape=("N", width)),
            TensorSpec(name="noise_level", dtype="float32", shape=(1,)),
            TensorSpec(name="alpha", dtype="float32", shape=(1,)),
            TensorSpec(name="sigma", dtype="float32", shape=(1,)),
        ),
        outputs=(TensorSpec(name="class_labels", dtype="float32", shape=("N", 2 * width)),),
    )


def vae_encoder(*, channels: int, posterior: bool) -> NetSpec:
    """Picture to latent, in the UNet's scale: mean and standard deviation of the posterior.

    A tiny autoencoder has no posterior, and so no `std`. Where `mask` is 255 the picture is grey to the net,
    as inpainting UNets want it; 0 leaves it as it is.
    """
    latent: tuple[Dim, ...] = ("N", channels, "H/8", "W/8")
    names = ("mean", "std") if posterior else ("mean",)
    return NetSpec(
        inputs=(
            TensorSpec(name="image", dtype="uint8", shape=("N", "H", "W", 3)),
            TensorSpec(name="mask", dtype="uint8", shape=("N", "H", "W", 1)),
        ),
        outputs=tuple(TensorSpec(name=name, dtype="float32", shape=latent) for name in names),
    )


def unet_whole(
    *, channels: int, width: int, float_dtype: str, vectors: Mapping[str, int] | None = None
) -> NetSpec:
    """The UNet as diffusers and optimum name it, before hoisting.

    `channels` are of the latent and whatever is laid behind it (mask, picture); `vectors` are names of
    VECTORS and their widths.
    """
    return NetSpec(
        inputs=(
            TensorSpec(name="sample", dtype=float_dtype, shape=("B", channels, "H/8", "W/8")),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="encoder_hidden_states", dtype=float_dtype, shape=("B", "T", width)),
            *_vectors("B", vectors or {}),
        ),
        outputs=(TensorSpec(name="out_sample", dtype=float_dtype, shape=("B", 4, "H/8", "W/8")),),
    )


def _vectors(rows: str, widths: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """In the order of VECTORS."""
    return tuple(
        TensorSpec(name=name, dtype="float32", shape=(rows, widths[name]))
        for name in VECTORS
        if name in widths
    )


def unet(
    *, channels: int, float_dtype: str, invariants: Sequence[TensorSpec], image_channels: int = 0
) -> NetSpec:
    """The loop graph. `invariants` are outputs of `unet_context` and of `unet_time`, B rows of each.

    So every UNet row may be at a timestep of its own. In packages of before 2026-11-29 the invariants of the
    time have 1 row, for all UNet rows, unless there are vectors (`has_time_of_each_row`).

    `image_latents` is what an inpainting UNet sees behind the latent: the mask and the masked picture.
    """
    image = TensorSpec(name="image_latents", dtype=float_dtype, shape=("B", image_channels, "H/8", "W/8"))
    return NetSpec(
        inputs=(
            TensorSpec(name="latent", dtype=float_dtype, shape=("B", channels, "H/8", "W/8")),
            *((image,) if image_channels else ()),
            *invariants,
        ),
        outputs=(TensorSpec(name="prediction", dtype=float_dtype, shape=("B", 4, "H/8", "W/8")),),
    )


def has_time_of_each_row(unet: NetSpec) -> bool:
    """Whether the loop graph takes time invariants of B rows; older packages have 1 row without vectors."""
    return any(item.name.startswith(TIME_INVARIANT) and item.shape[0] == "B" for item in unet.inputs)


def with_controls(
    plain: NetSpec, *, residuals: Sequence[tuple[int, int]], features: Sequence[tuple[int, int]]
) -> NetSpec:
    """The loop graph with what controls add to it; each is given by its channels and its level (0: latent).

    `residual_0` … are diffusers' `down_block_additional_residuals`, one for each skip connection in the order
    in which the down blocks make them, and last its `mid_block_additional_residual`: a ControlNet's outputs.
    `feature_0` … are its `down_intrablock_additional_residuals`: a T2I-Adapter's. Inputs that are not
    wanted are zeros of their shape; with all of them zero the prediction is that of the plain graph.
    """
    float_dtype = plain.inputs[0].dtype
    added = [
        TensorSpec(
            name=f"{prefix}{number}",
            dtype=float_dtype,
            shape=("B", channels, *level_shape(level)),
        )
        for prefix, group in ((RESIDUAL, residuals), (FEATURE, features))
        for number, (channels, level) in enumerate(group)
    ]
    return replace(plain, inputs=(*plain.inputs, *added))


def with_image_prompt(
    plain: NetSpec, *, attentions: Sequence[tuple[int, int]], levels: Sequence[int]
) -> NetSpec:
    """The loop graph with a second attention beside each cross-attention, over G groups of I image tokens.

    A cross-attention is given by its heads and their width. The keys have the queries' factor
    1 / sqrt(width) in them. Each group is weighted pixel by pixel with `image_mask_L` at the level L. Where
    there is no image prompt, one group of one token, all zeros, leaves the prediction as it is.
    """
    float_dtype = plain.inputs[0].dtype
    shapes: dict[str, tuple[Dim, ...]] = {}
    for number, (heads, width) in enumerate(attentions):
        shapes[f"{IMAGE_KEYS}{number}"] = ("B", "G", heads, width, "I")
        shapes[f"{IMAGE_VALUES}{number}"] = ("B", "G", heads, "I", width)
    shapes |= {f"{IMAGE_MASK}{level}": ("B", "G", *level_shape(level)) for level in levels}
    added = [TensorSpec(name=name, dtype=float_dtype, shape=shape) for name, shape in shapes.items()]
    return replace(plain, inputs=(*plain.inputs, *added))


def residuals(widths: Sequence[int], layers: int) -> tuple[tuple[int, int], ...]:
    """The channels and the level of a ControlNet's outputs: skip connections, then the middle block."""
    found = [(widths[0], 0)]
    for level, width in enumerate(widths):
        found += [(width, level)] * layers
        if level < len(widths) - 1:
            found.append((width, level + 1))
    return *found, (widths[-1], len(widths) - 1)


def cross_attentions(unet: NetSpec) -> tuple[str, ...]:
    """The modules of a loop graph's cross-attentions, by the names of its invariants.

    In the order of diffusers' `attn_processors`, by which an IP-Adapter's layers are numbered: those of the
    down path, of the up path, and the middle.
    """
    names = [
        item.name[len(CONTEXT_INVARIANT) : -len(".to_k")]
        for item in unet.inputs
        if item.name.startswith(CONTEXT_INVARIANT) and item.name.endswith(".to_k")
    ]
    return tuple(sorted(names, key=lambda name: ("down_", "up_bl", "mid_b").index(name[:5])))


def attention_level(module: str, levels: int) -> int:
    """How often the latent has been halved where a module of a UNet of so many levels attends."""
    side, number = module.split(".")[:2]
    if side == "mid_block":
        return levels - 1
    return int(number) if side == "down_blocks" else levels - 1 - int(number)


def controlnet_hint(*, width: int, float_dtype: str, types: int = 0) -> NetSpec:
    """A ControlNet's picture, RGB in 0 ... 1 (-1 where one for inpainting is to paint), to its embedding.

    A Union of several types is told which of them each picture is, 1 among zeros, and its strength.
    """
    told = (
        TensorSpec(name=CONTROL_TYPE, dtype="float32", shape=("N", types)),
        TensorSpec(name=STRENGTH, dtype="float32", shape=("N",)),
    )
    return NetSpec(
        inputs=(
            TensorSpec(name=HINT, dtype="float32", shape=("N", 3, "H", "W")),
            *(told if types else ()),
        ),
        outputs=(TensorSpec(name=HINT_EMBEDDING, dtype=float_dtype, shape=("N", width, "H/8", "W/8")),),
    )


def t2i_adapter(*, channels: int, features: Sequence[tuple[int, int]], float_dtype: str) -> NetSpec:
    """A T2I-Adapter: a picture, 0 ... 1, to what is added to each down block; channels and level of each."""
    return NetSpec(
        inputs=(TensorSpec(name=HINT, dtype="float32", shape=("N", channels, "H", "W")),),
        outputs=tuple(
            TensorSpec(name=f"{FEATURE}{number}", dtype=float_dtype, shape=("N", width, *level_shape(level)))
            for number, (width, level) in enumerate(features)
        ),
    )


def image_features(*, size: int, shape: Sequence[Dim], float_dtype: str) -> NetSpec:
    """A picture of an IP-Adapter, cut to `size` and normalised, to what the adapter reads of it.

    Args:
        size: height and width.
        shape: of one picture's: (width,) of its embedding, or (places, width) of hidden states.
        float_dtype: of the features.
    """
    return NetSpec(
        inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, size, size)),),
        outputs=(TensorSpec(name=IMAGE_FEATURES, dtype=float_dtype, shape=("N", *shape)),),
    )


def image_prompt(*, shape: Sequence[Dim], tokens: Dim, widths: Sequence[int], float_dtype: str) -> NetSpec:
    """An IP-Adapter: those features to the keys and values of `tokens` image tokens for each layer.

    Args:
        shape: of one picture's features.
        tokens: of one picture.
        widths: of each layer: its heads' together.
        float_dtype: of all.
    """
    return NetSpec(
        inputs=(TensorSpec(name=IMAGE_FEATURES, dtype=float_dtype, shape=("N", *shape)),),
        outputs=tuple(
            TensorSpec(name=f"{kind}{number}", dtype=float_dtype, shape=("N", tokens, width))
            for number, width in enumerate(widths)
            for kind in (IMAGE_KEYS, IMAGE_VALUES)
        ),
    )


def controlnet_whole(
    *,
    channels: int,
    width: int,
    residuals: Sequence[tuple[int, int]],
    float_dtype: str,
    vectors: Mapping[str, int] | None = None,
) -> NetSpec:
    """A ControlNet behind its hint, before hoisting; `residuals` has each output's channels and level."""
    plain = unet_whole(channels=channels, width=width, float_dtype=float_dtype, vectors=vectors)
    return NetSpec(
        inputs=(*plain.inputs, *_control_inputs(residuals, float_dtype)),
        outputs=_residuals(residuals, float_dtype),
    )


def _control_inputs(residuals: Sequence[tuple[int, int]], float_dtype: str) -> tuple[TensorSpec, ...]:
    first, _ = residuals[0]
    return (
        TensorSpec(name=HINT_EMBEDDING, dtype=float_dtype, shape=("B", first, "H/8", "W/8")),
        TensorSpec(name=SCALES, dtype="float32", shape=("B", len(residuals))),
    )


def _residuals(residuals: Sequence[tuple[int, int]], float_dtype: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=f"{RESIDUAL}{number}", dtype=float_dtype, shape=("B", channels, *level_shape(level)))
        for number, (channels, level) in enumerate(residuals)
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


def step_masked(*, channels: int, float_dtype: str) -> NetSpec:
    """`step`, after which the latent is that of `kept`, noised, wherever `mask` is 0 (1 is repainted)."""
    plain = step(channels=channels, float_dtype=float_dtype)
    picture: tuple[Dim, ...] = ("N", channels, "H/8", "W/8")
    return NetSpec(
        inputs=(
            *plain.inputs[:-1],
            TensorSpec(name="row", dtype="float32", shape=(len(MASKED_ROW),)),
            TensorSpec(name="kept", dtype="float32", shape=picture),
            TensorSpec(name="kept_noise", dtype="float32", shape=picture),
            TensorSpec(name="mask", dtype="float32", shape=("N", 1, "H/8", "W/8")),
        ),
        outputs=plain.outputs,
    )


def unet_context(*, width: int, float_dtype: str, invariants: Sequence[TensorSpec]) -> NetSpec:
    """Context to everything in the UNet that depends on the prompt's text alone."""
    return NetSpec(
        inputs=(TensorSpec(name="context", dtype=float_dtype, shape=("B", "T", width)),),
        outputs=tuple(invariants),
    )


def unet_time(*, invariants: Sequence[TensorSpec], vectors: Mapping[str, int] | None = None) -> NetSpec:
    """Timesteps, and vectors where there are some, to everything in the UNet that depends on these alone.

    Without vectors one row per step; with them one per step and UNet row, the rows of a step together.
    """
    return NetSpec(
        inputs=(TensorSpec(name="timestep", dtype="float32", shape=("S",)), *_vectors("S", vectors or {})),
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


@dataclass(frozen=True, kw_only=True)
class NetRow:
    """What is known of a net by its name.

    Attributes:
        use: what it computes of what, and how often.
        part: the part of a checkpoint that its weights come from; "" for a net without weights.
        in_loop: whether it is called once per step, with a row per picture, or two with guidance.
        tiled: whether it may be called with tiles of a picture.
        for_others: whether it is in the package for other tools alone, and never runs here.
        when_asked: whether it is built and opened only where somebody names it. Older packages lack it.
    """

    use: str
    part: str = ""
    in_loop: bool = False
    tiled: bool = False
    for_others: bool = False
    when_asked: bool = False

    @property
    def usual(self) -> bool:
        """Whether it is built and opened for every package that has it."""
        return not (self.for_others or self.when_asked)


# The nets of a package, in the order of the data flow. No package has all of them.
NETS: Mapping[str, NetRow] = {
    "text_encoder": NetRow(use="token ids -> context, once per prompt", part="text_encoder"),
    "text_encoder_2": NetRow(
        use="token ids -> more features of the context, and the pooled embedding, once per prompt",
        part="text_encoder_2",
    ),
    "image_encoder": NetRow(
        use="uint8 picture -> its embedding, once per picture to vary", part="image_encoder"
    ),
    "image_noiser": NetRow(
        use="embedding, noise and noise level -> class labels, once per picture to vary",
        part="image_normalizer",
    ),
    "vae_encoder": NetRow(
        use="uint8 picture -> latent's mean and deviation, once per picture to start from",
        part="vae",
        tiled=True,
    ),
    "unet_context": NetRow(use="context -> cross-attention keys and values, once per prompt", part="unet"),
    "unet_time": NetRow(
        use="timesteps -> time-embedding projections of the whole schedule, once per schedule", part="unet"
    ),
    "unet": NetRow(use="latent and invariants -> prediction, once per step", part="unet", in_loop=True),
    "unet_controlled": NetRow(
        use="the same with what a ControlNet or a T2I-Adapter adds, in place of `unet` in their steps",
        part="unet",
        in_loop=True,
        when_asked=True,
    ),
    "unet_image_prompt": NetRow(
        use="the same with what an IP-Adapter adds too, in place of both where one is loaded",
        part="unet",
        in_loop=True,
        when_asked=True,
    ),
    "controlnet_hint": NetRow(
        use="picture that steers -> its embedding, once per picture", part="controlnet"
    ),
    "controlnet_context": NetRow(
        use="context -> a ControlNet's keys and values, once per prompt", part="controlnet"
    ),
    "controlnet_time": NetRow(
        use="timesteps -> a ControlNet's time-embedding projections, once per schedule", part="controlnet"
    ),
    "controlnet": NetRow(
        use="latent, hint and invariants -> residuals of `unet_controlled`, once per step",
        part="controlnet",
        in_loop=True,
    ),
    "t2i_adapter": NetRow(
        use="picture that steers -> features of `unet_controlled`, once per picture", part="t2i-adapter"
    ),
    "image_features": NetRow(
        use="picture to draw after -> an IP-Adapter's features of it, once per picture", part="vision"
    ),
    "image_prompt": NetRow(
        use="those features -> keys and values of `unet_image_prompt`, once per picture", part="ip-adapter"
    ),
    "step": NetRow(
        use="guidance and the sampler's row update, once per step where the loop stays on a device",
        in_loop=True,
    ),
    "step_masked": NetRow(use="the same, keeping a picture outside a mask", in_loop=True),
    "vae_decoder": NetRow(use="latent -> uint8 picture, once", part="vae", tiled=True),
    "preview_decoder": NetRow(
        use="latent -> uint8 picture, nearly: a tiny autoencoder, for previews", part="tiny_vae", tiled=True
    ),
    "unet_whole": NetRow(
        use="the UNet before hoisting, under diffusers' names, for other tools",
        part="unet",
        in_loop=True,
        for_others=True,
    ),
}
