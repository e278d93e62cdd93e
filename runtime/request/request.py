"""One generation's parameters, validated once; everything after trusts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ...engines.spec import TEXT_ENCODERS, Array
from ..pictures.tiling import Tiling
from ..pictures.write import MAX_PIXELS
from ..prompts.syntax import PROMPT_SYNTAXES
from ..sampling.config import SamplerConfig
from ..sampling.names import resolve
from ..sampling.noise import RNGS
from . import checks as check
from .sizes import SizeConditions, make_size_conditions
from .source import Source, load_images, make_source, natural_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..pictures.read import ImageSource

OUTPUT_TYPES = ("pil", "np", "latent")
MAX_STEPS = 1000


class Parameters(TypedDict, total=False):
    """The keyword arguments of a generation: diffusers' names, plus `seed`, `rng`, `sampler` and a few.

    What is left out comes from the package. `seed` is an integer (pictures get seed, seed + 1, …),
    one integer per picture, or None for a random one, which the result then has. `rng` is
    "torch-cpu" or "torch-cuda": whose noise a seed means. `sampler` is a name
    (`latentrt inspect --samplers` lists them) or a diffusers scheduler config. `eta` is DDIM's;
    `guidance_rescale` is phi of Lin et al. 2023; `latents` (N, C, H/8, W/8) is unit noise to start
    from; `output_type` is "pil", "np" (uint8) or "latent".

    `prompt_syntax` is "a1111", "comfyui" or "plain"; `clip_skip` is how many of the text encoder's last
    layers are left out; the texts with `_2` are for a second text encoder.

    `image` is a picture (path, Pillow image, array), one per prompt, or latents (N, C, H/8, W/8) float32;
    `strength` (0 to 1) is how much of the schedule is run on it. `mask_image` is white where it is
    repainted; `padding_mask_crop` draws only the mask's surroundings, at full size; `mask_blur` softens the
    edge, in pixels; `resize_mode` is "default" (stretch), "fill" or "crop". For models that vary a picture
    (unCLIP) `image` is that, and `noise_level` (0 to 999) how far to depart from it.

    `denoising_end` stops after that share of the schedule, with the latent as it is then;
    `denoising_start` goes on from such a latent. Sizes, crops (top, left) and aesthetic scores are SDXL's
    conditions; `tile` decodes and encodes in tiles of so many pixels.
    """

    negative_prompt: str | Sequence[str] | None
    prompt_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    prompt_syntax: str
    clip_skip: int | None
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
    image: ImageSource | Sequence[ImageSource] | None
    mask_image: ImageSource | None
    strength: float | None
    padding_mask_crop: int | None
    mask_blur: float
    resize_mode: str
    noise_level: int
    denoising_start: float | None
    denoising_end: float | None
    original_size: Sequence[int] | None
    crops_coords_top_left: Sequence[int]
    target_size: Sequence[int] | None
    negative_original_size: Sequence[int] | None
    negative_crops_coords_top_left: Sequence[int] | None
    negative_target_size: Sequence[int] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    tile: int | None
    output_type: str


@dataclass(frozen=True, kw_only=True)
class Given:
    """`Parameters` with diffusers' defaults; None is for the package, or the picture, to say."""

    negative_prompt: str | Sequence[str] | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    prompt_syntax: str = "a1111"
    clip_skip: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    guidance_rescale: float = 0.0
    sampler: str | Mapping[str, Any] | None = None
    seed: int | Sequence[int] | None = None
    rng: str = "torch-cpu"
    latents: Array | None = None
    image: ImageSource | Sequence[ImageSource] | None = None
    mask_image: ImageSource | None = None
    strength: float | None = None
    padding_mask_crop: int | None = None
    mask_blur: float = 0.0
    resize_mode: str = "default"
    noise_level: int = 0
    denoising_start: float | None = None
    denoising_end: float | None = None
    original_size: Sequence[int] | None = None
    crops_coords_top_left: Sequence[int] = (0, 0)
    target_size: Sequence[int] | None = None
    negative_original_size: Sequence[int] | None = None
    negative_crops_coords_top_left: Sequence[int] | None = None
    negative_target_size: Sequence[int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    tile: int | None = None
    output_type: str = "pil"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. Made by `make_request`; lists have one entry per picture (N).

    Attributes:
        prompts, negative_prompts: N texts each; a negative one that was not given is None.
        prompts_2, negative_prompts_2: N texts each for a second text encoder; None is the first one's.
        clip_skip: how many of the text encoders' last layers are left out.
        seeds: N seeds; each picture has a generator of its own, so it does not depend on its batch.
        guided: whether the UNet sees unconditional rows too: at a scale of 1 they cancel, below it is off as
            in diffusers, and models that take the scale as an input have none.
        guidance_scale: weight of the conditional prediction (Ho & Salimans 2022, with w + 1 = scale).
        guidance_rescale: phi of Lin et al. 2023, section 3.4; 0 is off.
        latents: (N, C, H/8, W/8) float32 unit noise to start from, in place of the seeds' own.
        source: the pictures it starts from, if it does.
        noise_level: for models that vary a picture, the timestep of the noise on its embedding.
        sizes: SDXL's conditions; empty for models without.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    prompts_2: tuple[str | None, ...]
    negative_prompts_2: tuple[str | None, ...]
    prompt_syntax: str
    clip_skip: int
    seeds: tuple[int, ...]
    height: int
    width: int
    num_inference_steps: int
    guided: bool
    guidance_scale: float
    guidance_rescale: float
    sampler: SamplerConfig
    rng: str
    denoising_start: float | None
    denoising_end: float | None
    noise_level: int
    sizes: SizeConditions
    tile: int | None
    output_type: str
    latents: Array | None = field(default=None, compare=False)
    source: Source | None = field(default=None, compare=False)


def make_request(
    manifest: Manifest, prompt: str | Sequence[str], **parameters: Unpack[Parameters]
) -> Request:
    """Validate `Parameters`, taking what is not given from the package's defaults.

    Raises:
        UsageError: naming the parameter, what it was, and what it may be.
    """
    given = Given(**parameters)
    given = replace(given, image=load_images(given.image))
    _refuse_unfitting(manifest, given)
    defaults = manifest.defaults
    count = check.integer("num_images_per_prompt", given.num_images_per_prompt, 1, 1024)
    prompts = check.texts("prompt", prompt)
    pictures = len(prompts) * count
    height, width = _size(manifest, given)
    shape = (pictures, *latent_shape(manifest, height, width))
    source = make_source(manifest, given, height, width, shape, prompts=len(prompts))
    steps = defaults.num_inference_steps if given.num_inference_steps is None else given.num_inference_steps
    scale = defaults.guidance_scale if given.guidance_scale is None else given.guidance_scale
    scale = check.number("guidance_scale", scale, 0.0, 1000.0)
    chosen = given.sampler if given.sampler is not None else defaults.sampler

    def each(name: str) -> tuple[str | None, ...]:
        """The texts of a parameter, one per picture."""
        found = check.texts_for(name, getattr(given, name), len(prompts))
        return tuple(text for text in found for _ in range(count))

    return Request(
        prompts=tuple(text for text in prompts for _ in range(count)),
        negative_prompts=each("negative_prompt"),
        prompts_2=each("prompt_2"),
        negative_prompts_2=each("negative_prompt_2"),
        prompt_syntax=check.choice("prompt_syntax", given.prompt_syntax, tuple(PROMPT_SYNTAXES)),
        clip_skip=check.integer("clip_skip", given.clip_skip or 0, 0, manifest.max_clip_skip),
        seeds=check.seeds(given.seed, pictures),
        height=height,
        width=width,
        num_inference_steps=check.integer("num_inference_steps", steps, 1, MAX_STEPS),
        guided=scale > 1 and "timestep_cond" not in manifest.vectors,
        guidance_scale=scale,
        guidance_rescale=check.number("guidance_rescale", given.guidance_rescale, 0.0, 1.0),
        sampler=replace(
            resolve(chosen, manifest.scheduler),
            eta=check.number("eta", given.eta, 0.0, 1.0),
            grid_share=_grid_share(manifest, source),
        ),
        rng=check.choice("rng", given.rng, RNGS),
        **_span(given),
        noise_level=check.integer("noise_level", given.noise_level, 0, _most_noise(manifest)),
        sizes=make_size_conditions(manifest, given, height, width),
        tile=None if given.tile is None else _tile(given.tile, manifest),
        output_type=check.choice("output_type", given.output_type, OUTPUT_TYPES),
        latents=check.latents("latents", given.latents, shape),
        source=source,
    )


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """(C, H/8, W/8) of one picture's latent."""
    return manifest.latent_channels, height // manifest.latent_scale, width // manifest.latent_scale


# What a model must have for these parameters, in words, and whether it does.
_FOR_SOME: Sequence[tuple[tuple[str, ...], str, Callable[[Manifest], bool]]] = (
    (
        ("prompt_2", "negative_prompt_2"),
        "two text encoders",
        lambda manifest: set(TEXT_ENCODERS) <= set(manifest.nets),
    ),
    (
        ("noise_level",),
        "a picture to vary (unCLIP)",
        lambda manifest: "class_labels" in manifest.vectors,
    ),
    (
        (
            "original_size",
            "crops_coords_top_left",
            "negative_original_size",
            "negative_crops_coords_top_left",
        ),
        "size conditions (SDXL)",
        lambda manifest: "original_height" in manifest.time_ids,
    ),
    (
        ("target_size", "negative_target_size"),
        "target sizes as a condition (SDXL base)",
        lambda manifest: "target_height" in manifest.time_ids,
    ),
    (
        ("aesthetic_score", "negative_aesthetic_score"),
        "aesthetic scores (the SDXL refiner)",
        lambda manifest: "aesthetic_score" in manifest.time_ids,
    ),
)


def _refuse_unfitting(manifest: Manifest, given: Given) -> None:
    """A parameter that this model could only ignore is an error."""
    usual = Given()
    for names, what, fits in _FOR_SOME:
        said = [name for name in names if not _same(getattr(given, name), getattr(usual, name))]
        if said and not fits(manifest):
            value = getattr(given, said[0])
            raise UsageError(
                f"{said[0]} is {value!r}, and the model {manifest.name!r} has no use for it",
                expected=f"a model with {what}",
                fix=f"Leave {said[0]} out.",
            )


def _most_noise(manifest: Manifest) -> int:
    """The last timestep of the noise on pictures to vary."""
    steps = (manifest.image_noise or {}).get("num_train_timesteps", 1000)
    return steps - 1 if isinstance(steps, int) else 999


def _tile(value: int, manifest: Manifest) -> int:
    """A side that tiles can have; refused before anything is drawn."""
    size = check.side("tile", value, manifest.size_multiple)
    Tiling(size=size).stride(manifest.latent_scale)
    return size


def _same(one: object, other: object) -> bool:
    """Equal, whether written as a tuple, a list or an array."""
    return repr(np.asarray(one).tolist()) == repr(np.asarray(other).tolist())


def _grid_share(manifest: Manifest, source: Source | None) -> float:
    """Latent consistency models run all their steps on a picture, spread over the end of the schedule.

    LCMScheduler.set_timesteps(strength=…), as diffusers' LatentConsistencyModelImg2ImgPipeline calls it.
    """
    strength: float = getattr(source, "strength", 1.0)
    return strength if "timestep_cond" in manifest.vectors else 1.0


def _size(manifest: Manifest, given: Given) -> tuple[int, int]:
    """Height and width: as asked, or the picture's that it starts from, or the model's."""
    natural = natural_size(manifest, given)
    height, width = (
        check.side(name, natural[place] if getattr(given, name) is None else getattr(given, name), step)
        for place, (name, step) in enumerate(
            (("height", manifest.size_multiple), ("width", manifest.size_multiple))
        )
    )
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"{width}x{height} is {height * width / 1e6:.0f} megapixels",
            expected=f"at most {MAX_PIXELS / 1e6:.0f}",
            fix="Choose a smaller size.",
        )
    return height, width


def _span(given: Given) -> dict[str, float | None]:
    """`denoising_start` and `denoising_end`, in that order on the schedule."""
    ends = {name: getattr(given, name) for name in ("denoising_start", "denoising_end")}
    checked = {
        name: None if value is None else check.number(name, value, 0.0, 1.0) for name, value in ends.items()
    }
    begin, end = checked["denoising_start"], checked["denoising_end"]
    if begin is not None and (end is not None and begin >= end):
        raise UsageError(
            f"denoising_start {begin:g} is not before denoising_end {end:g}",
            expected="a part of the schedule",
            fix="Exchange the two.",
        )
    unused = [name for name in ("strength", "mask_image", "latents") if getattr(given, name) is not None]
    if begin is not None and unused:
        raise UsageError(
            f"{unused[0]} with denoising_start",
            expected="the latent that another model stopped at, with its noise, alone",
            fix=f"Leave {unused[0]} out, or use strength in place of denoising_start.",
        )
    if begin is not None and given.image is None:
        raise UsageError(
            "denoising_start without an image",
            expected="the latent that another model stopped at, as image",
            fix="Draw it with denoising_end and output_type='latent'.",
        )
    return checked
