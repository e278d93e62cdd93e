"""One generation's parameters, validated once; everything after trusts them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, TypedDict

import numpy as np

from ..engines.errors import UsageError
from ..engines.package import Manifest
from ..engines.spec import Array
from .noise import RNGS
from .picture import MAX_PIXELS
from .samplers import SamplerConfig, resolve

OUTPUT_TYPES = ("pil", "np", "latent")
MAX_STEPS = 1000


class Parameters(TypedDict, total=False):
    """The keyword arguments of a generation: diffusers' names, plus `seed`, `rng` and `sampler`.

    What is left out comes from the package. `seed` is an integer (pictures get seed, seed + 1, …),
    one integer per picture, or None for a random one, which the result then has. `rng` is
    "torch-cpu" or "torch-cuda": whose noise a seed means. `sampler` is a name
    (`latentrt inspect --samplers` lists them) or a diffusers scheduler config. `eta` is DDIM's;
    `guidance_rescale` is phi of Lin et al. 2023; `latents` (N, C, H/8, W/8) is unit noise to start
    from; `output_type` is "pil", "np" (uint8) or "latent".
    """

    negative_prompt: str | Sequence[str] | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    num_images_per_prompt: int
    eta: float
    guidance_rescale: float
    sampler: str | Mapping[str, Any] | None
    seed: int | Sequence[int] | None
    rng: str
    latents: Array | None
    output_type: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. Made by `make_request`; lists have one entry per picture (N).

    Attributes:
        prompts, negative_prompts: N texts each.
        seeds: N seeds; each picture has a generator of its own, so it does not depend on its batch.
        guidance_scale: weight of the conditional prediction (Ho & Salimans 2022, with w + 1 = scale).
        guidance_rescale: phi of Lin et al. 2023, section 3.4; 0 is off.
        latents: (N, C, H/8, W/8) float32 unit noise to start from, in place of the seeds' own.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: SamplerConfig
    rng: str
    output_type: str
    latents: Array | None = field(default=None, compare=False)

    @property
    def guided(self) -> bool:
        """Whether the UNet sees unconditional rows too: at 1 they cancel, below it is off as in diffusers."""
        return self.guidance_scale > 1


def make_request(
    manifest: Manifest,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    eta: float = 0.0,
    guidance_rescale: float = 0.0,
    sampler: str | Mapping[str, Any] | None = None,
    seed: int | Sequence[int] | None = None,
    rng: str = "torch-cpu",
    latents: Array | None = None,
    output_type: str = "pil",
) -> Request:
    """Validate `Parameters`, taking what is not given from the package's defaults.

    Raises:
        UsageError: naming the parameter, what it was, and what it may be.
    """
    defaults = manifest.defaults
    count = _integer("num_images_per_prompt", num_images_per_prompt, 1, 1024)
    texts = _texts("prompt", prompt)
    negatives = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if len(negatives) not in (1, len(texts)):
        raise UsageError(
            f"negative_prompt has {len(negatives)} texts for {len(texts)} prompts",
            expected="one text, or as many as prompts",
            fix="Pass one negative prompt for all of them.",
        )
    negatives = negatives * len(texts) if len(negatives) == 1 else negatives
    pictures = len(texts) * count
    height = _size("height", defaults.height if height is None else height, manifest)
    width = _size("width", defaults.width if width is None else width, manifest)
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"{width}x{height} is {height * width / 1e6:.0f} megapixels",
            expected=f"at most {MAX_PIXELS / 1e6:.0f}",
            fix="Choose a smaller size.",
        )
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    chosen = sampler if sampler is not None else defaults.sampler
    return Request(
        prompts=tuple(text for text in texts for _ in range(count)),
        negative_prompts=tuple(text for text in negatives for _ in range(count)),
        seeds=_seeds(seed, pictures),
        height=height,
        width=width,
        num_inference_steps=_integer("num_inference_steps", steps, 1, MAX_STEPS),
        guidance_scale=_number("guidance_scale", scale, 0.0, 1000.0),
        guidance_rescale=_number("guidance_rescale", guidance_rescale, 0.0, 1.0),
        sampler=replace(resolve(chosen, manifest.scheduler), eta=_number("eta", eta, 0.0, 1.0)),
        rng=_choice("rng", rng, RNGS),
        output_type=_choice("output_type", output_type, OUTPUT_TYPES),
        latents=_latents(latents, (pictures, *latent_shape(manifest, height, width))),
    )


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """(C, H/8, W/8) of one picture's latent."""
    return manifest.latent_channels, height // manifest.latent_scale, width // manifest.latent_scale


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} is {value!r}", expected="a text or a list of texts", fix="Pass a str.")
    return texts


def _integer(name: str, value: int, low: int, high: int) -> int:
    if (
        isinstance(value, (bool, float))
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        raise UsageError(
            f"{name} is {value!r}", expected=f"an integer from {low} to {high}", fix=f"Change {name}."
        )
    return int(value)


def _number(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise UsageError(
            f"{name} is {value!r}", expected=f"a number from {low:g} to {high:g}", fix=f"Change {name}."
        )
    return float(value)


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise UsageError(
            f"{name} is {value!r}", expected=f"one of {', '.join(choices)}", fix=f"Change {name}."
        )
    return value


def _size(name: str, value: int, manifest: Manifest) -> int:
    step = manifest.size_multiple
    value = _integer(name, value, step, 16384)
    if value % step:
        lower, upper = value // step * step, (value // step + 1) * step
        raise UsageError(
            f"{name} is {value}", expected=f"a multiple of {step}", fix=f"Use {lower} or {upper}."
        )
    return value


def _seeds(seed: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    """An int seeds the first picture and counts up; a list has one seed per picture."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        first = _integer("seed", seed, -(2**63), 2**64 - pictures)
        return tuple(range(first, first + pictures))
    seeds = list(seed) if isinstance(seed, Sequence) else []
    if len(seeds) != pictures or isinstance(seed, str):
        raise UsageError(
            f"seed is {seed!r} for {pictures} pictures",
            expected="an integer, or a list with one integer per picture",
            fix="Pass one integer: pictures get seed, seed + 1, …",
        )
    return tuple(_integer("seed", value, -(2**63), 2**64 - 1) for value in seeds)


def _latents(latents: Array | None, shape: tuple[int, ...]) -> Array | None:
    if latents is None:
        return None
    try:
        array = np.asarray(latents, np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, np.float32)
    if array.shape != shape or not np.isfinite(array).all():
        raise UsageError(
            f"latents have shape {array.shape}" + ("" if array.shape != shape else " and are not all finite"),
            expected=f"finite numbers of shape {shape}",
            fix="Pass unit noise of that shape, or a seed.",
        )
    return array
