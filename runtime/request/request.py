"""What to draw, checked once; everything after trusts it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from numbers import Integral
from secrets import randbelow
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ...engines.spec import Array
from ..pictures.tiling import tile_stride
from ..pictures.windows import Windows
from ..pictures.write import MAX_PIXELS
from ..prompts.lora_tags import lora_tags, tags_drawn_as_text
from ..sampling.config import SamplerConfig
from ..sampling.names import resolve
from ..sampling.samplers import SAMPLERS, count_steps, make_span, make_table
from ..sampling.step_lists import list_of_model
from ..sampling.table import Table
from ..sampling.table_file import check_fits, read_table
from .guidance import OFF, RunRows, scales_of_rows
from .inputs import INPUTS, Input, describe_inputs, read_mask
from .parameters import (
    GUIDED,
    PARAMETERS,
    CallParameters,
    OutputType,
    PromptSyntaxName,
    Rng,
    check_integer,
    read_parameters,
)
from .source import Source, check_latents, load_images, make_source, natural_size
from .tiles import tiled

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...adapters.embeddings import Embedding
    from ...adapters.sets import AdapterSet
    from ..controls.control import Control
    from ..controls.image_prompt import ImagePrompt

_LOG = logging.getLogger(__name__)
_OTHER_TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2")


@dataclass(frozen=True, kw_only=True)
class SizeConditions:
    """What SDXL's UNets see besides the prompt, in the order of the manifest's `time_ids`.

    Sizes, crop and aesthetic score: Podell et al. 2023 (arXiv 2307.01952), sections 2.2 and 2.3.
    """

    positive: Mapping[str, float]
    negative: Mapping[str, float]

    def rows(self, *, guided: bool) -> Array:
        """(2, count) float32 with guidance, negative first, else (1, count)."""
        values = (self.negative, self.positive) if guided else (self.positive,)
        return np.array([list(each.values()) for each in values], np.float32)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. Made by `make_request`; lists have one entry per picture (N).

    A field that is named like a parameter is that parameter (`parameters.Parameters`), checked.

    Attributes:
        prompts, negative_prompts: N texts each; a negative one that was not given is None.
        prompts_2, negative_prompts_2: N texts each for a second text encoder; None is the first one's.
        seeds: N seeds; each picture has a generator of its own, so it does not depend on its batch.
        guidance_scale: one of all steps, or one of each.
        guided: whether the UNet sees unconditional rows too, in any step: at a scale of 1 they cancel, below
            it is off as in diffusers, and models that take the scale as an input have none.
        latents: (N, C, H/8, W/8) float32 unit noise to start from, in place of the seeds' own.
        source: the pictures it starts from, if it does.
        sizes: SDXL's conditions; empty for models without.
        loras: the adapters to draw with, each with its strength; None are the pipeline's usual ones.
        tagged: those that the prompts name besides.
        controls: the pictures that steer.
        chosen: the parameters that are not their defaults, checked, but for pictures and latents.
        inputs: the pictures and latents it starts from, by parameter: one for all pictures, or one each.
        adapters: the set that it draws with; None before a pipeline has looked for it.
        embeddings: those of textual inversion that its texts call, by name.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    prompts_2: tuple[str | None, ...]
    negative_prompts_2: tuple[str | None, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    guided: bool
    sampler: SamplerConfig
    sizes: SizeConditions
    prompt_syntax: PromptSyntaxName
    clip_skip: int
    num_inference_steps: int
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    guidance_scale: float | tuple[float, ...]
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float
    rng: Rng
    denoising_start: float | None
    denoising_end: float | None
    noise_level: int
    tile: int | None
    draw_tile: int | None
    draw_overlap: int | None
    output_type: OutputType
    table: Table | None = field(default=None, compare=False)
    latents: Array | None = field(default=None, compare=False)
    source: Source | None = field(default=None, compare=False)
    loras: tuple[tuple[str, Any], ...] | None = None
    tagged: tuple[tuple[str, Any], ...] = ()
    controls: tuple[Control | ImagePrompt, ...] | None = field(default=None, compare=False)
    chosen: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    inputs: Mapping[str, tuple[Input, ...]] = field(
        default_factory=dict[str, "tuple[Input, ...]"], compare=False
    )
    adapters: AdapterSet | None = field(default=None, compare=False)
    embeddings: Mapping[str, Embedding] = field(default_factory=dict[str, "Embedding"], compare=False)

    @property
    def strength(self) -> float | None:
        """How much of the schedule runs on what the request starts from; None for noise, and of a table."""
        if self.table is not None:
            return None
        return getattr(self.source, "strength", None)

    def windows(self, scale: int) -> Windows | None:
        """Those in which the UNet sees the latent, of `scale` pixels a value; None if one shows all of it."""
        if self.draw_tile is None or max(self.height, self.width) <= self.draw_tile:
            return None
        return Windows(side=self.draw_tile // scale, overlap=(self.draw_overlap or 0) // scale)

    def schedule(self) -> Table:
        """The table that is run. Raises UsageError if none of its rows is left, SamplerError."""
        if self.table is not None:
            return self.table
        return make_span(
            self.sampler,
            self.num_inference_steps,
            timesteps=self.timesteps,
            sigmas=self.sigmas,
            strength=self.strength,
            denoising_start=self.denoising_start,
            denoising_end=self.denoising_end,
        )

    def guidance_scales(self) -> Array:
        """(S,) float32: the scale of each row that is run. Raises UsageError for too few or too many."""
        to_end = replace(self, denoising_end=None)
        whole = self.table or make_table(
            self.sampler, self.num_inference_steps, timesteps=self.timesteps, sigmas=self.sigmas
        )
        rows = RunRows(
            count=len(self.schedule()),
            to_end=len(to_end.schedule()),
            whole=len(whole),
            calls=SAMPLERS[self.sampler.name].calls if self.table is None else 1,
            steps=self.num_inference_steps,
            continues=self.denoising_start is not None,
        )
        return scales_of_rows(self.guidance_scale, self.guidance_interval, rows)


def make_request(
    manifest: Manifest, prompt: str | Sequence[str], **parameters: Unpack[CallParameters]
) -> Request:
    """Check the parameters, and take what is left out from the package or from the picture to start from.

    Raises:
        UsageError: naming the parameter, what it was, and what it may be (SamplerError for the sampler).
    """
    values = tiled(manifest, read_parameters(manifest, parameters))
    chosen = {name: value for name, value in values.items() if not PARAMETERS[name].is_default(value)}
    values["table"] = None if values["table"] is None else read_table(values["table"])
    values["image"], values["mask_image"] = load_images(values["image"]), read_mask(values["mask_image"])
    _check_span(values)
    prompts, count = check_texts("prompt", prompt), values["num_images_per_prompt"]
    _tell_of_tags(prompts, values)
    height, width = _size(manifest, values)
    shape = (len(prompts) * count, *latent_shape(manifest, height, width))  # (N, C, H/8, W/8)
    source = make_source(manifest, values, height, width, shape, prompts=len(prompts))
    if values["latents"] is not None:
        values["latents"] = check_latents("latents", values["latents"], shape)
    defaults = manifest.defaults
    scale = defaults.guidance_scale if values["guidance_scale"] is None else values["guidance_scale"]

    def each(name: str) -> tuple[str | None, ...]:
        """The texts of a parameter, one per picture."""
        found = check_texts_for(name, values[name], len(prompts))
        return tuple(text for text in found for _ in range(count))

    checked = {item.name: values[item.name] for item in fields(Request) if item.name in PARAMETERS}
    resolved: dict[str, Any] = {
        "prompts": tuple(text for text in prompts for _ in range(count)),
        "negative_prompts": each("negative_prompt"),
        "prompts_2": each("prompt_2"),
        "negative_prompts_2": each("negative_prompt_2"),
        "seeds": check_seeds(values["seed"], shape[0]),
        "height": height,
        "width": width,
        "clip_skip": values["clip_skip"] or 0,
        "num_inference_steps": _steps(manifest, values),
        "guidance_scale": scale,
        "guided": np.max(scale) > OFF and GUIDED.fits(manifest),
        "sampler": _sampler(manifest, values, source),
        "sizes": make_size_conditions(manifest, values, height, width),
        "latents": values["latents"],
        "source": source,
        "tagged": _tagged(prompts, values) if values["prompt_syntax"] == "a1111" else (),
        "chosen": {name: value for name, value in chosen.items() if name not in INPUTS},
        "inputs": describe_inputs(chosen, values),
    }
    return Request(**{**checked, **resolved})


def _tell_of_tags(prompts: Sequence[str], values: Mapping[str, Any]) -> None:
    """Log what looks like the tag of an adapter and is drawn as text; of a picture once, as it is begun."""
    if values["denoising_start"] is not None:
        return
    others = (check_texts_for(name, values[name], len(prompts)) for name in _OTHER_TEXTS)
    texts = filter(None, (*prompts, *chain.from_iterable(others)))
    lines = (tags_drawn_as_text(text, values["prompt_syntax"]) for text in texts)
    for line in filter(None, dict.fromkeys(lines)):
        _LOG.warning("%s", line)


def _tagged(prompts: Sequence[str], values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The adapters that the prompts of a batch name, which are drawn with the same nets."""
    for name in _OTHER_TEXTS:
        for text in check_texts_for(name, values[name], len(prompts)):
            if text and lora_tags(text):
                raise UsageError(
                    f"{name} is {text!r:.100}, with an adapter",
                    expected="tags of adapters in the prompt alone",
                    fix="Move it there, with a negative strength to have less of it.",
                )
    found = [lora_tags(prompt) for prompt in prompts]
    if other := next((prompts[i] for i, tags in enumerate(found) if tags != found[0]), None):
        raise UsageError(
            f"the prompts {prompts[0]!r:.60} and {other!r:.60} name other adapters",
            expected="the same ones in all prompts of a batch",
            fix="Draw them one by one.",
        )
    return found[0]


def check_texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list."""
    found = (
        [value] if isinstance(value, str) else list(cast(Any, value)) if isinstance(value, Sequence) else []
    )
    if not found or not all(isinstance(text, str) for text in found):
        raise UsageError(f"{name} is {value!r}", expected="a text or a list of texts", fix="Pass a str.")
    return found


def check_texts_for(name: str, value: Any, prompts: int) -> list[str | None]:
    """One text for every prompt; None stands for itself."""
    if value is None:
        return [None] * prompts
    found = check_texts(name, value)
    if len(found) not in (1, prompts):
        raise UsageError(
            f"{name} has {len(found)} texts for {prompts} prompts",
            expected="one text, or as many as prompts",
            fix=f"Pass one {name} for all of them.",
        )
    return [*found] * prompts if len(found) == 1 else [*found]


def check_seeds(seed: Any, pictures: int) -> tuple[int, ...]:
    """An int seeds the first picture and counts up; a list has one seed per picture; None and -1 are random.

    AUTOMATIC1111, ComfyUI's front ends and stable-diffusion.cpp draw a random seed for -1.
    """
    if _is_random(seed):
        seed = randbelow(2**32)
    if isinstance(seed, Integral) and not isinstance(seed, bool):
        first = check_integer("seed", seed, -(2**63), 2**64 - pictures)
        return tuple(range(first, first + pictures))
    found: list[Any] = list(cast(Any, seed)) if isinstance(seed, Sequence) else []
    if len(found) != pictures or isinstance(seed, str):
        raise UsageError(
            f"seed is {seed!r} for {pictures} pictures",
            expected="an integer, or a list with one integer per picture",
            fix="Pass one integer: pictures get seed, seed + 1, …",
        )
    chosen = [randbelow(2**32) if _is_random(value) else value for value in found]
    return tuple(check_integer("seed", value, -(2**63), 2**64 - 1) for value in chosen)


def _is_random(seed: Any) -> bool:
    return seed is None or (isinstance(seed, Integral) and not isinstance(seed, bool) and int(seed) == -1)


def make_size_conditions(
    manifest: Manifest, values: Mapping[str, Any], height: int, width: int
) -> SizeConditions:
    """Sizes are the picture's, or its tiles', unless given; negative ones that are not, are as the others.

    (diffusers' image-to-image pipeline puts a negative crop that is not given at (0, 0) instead.)
    """
    tile = values["draw_tile"] or max(height, width)
    here = (min(height, tile), min(width, tile))
    original, target = values["original_size"] or here, values["target_size"] or here
    crop = values["crops_coords_top_left"]
    positive = _named(original, crop, target, values["aesthetic_score"])
    negative = _named(
        values["negative_original_size"] or original,
        values["negative_crops_coords_top_left"] or crop,
        values["negative_target_size"] or target,
        values["negative_aesthetic_score"],
    )
    return SizeConditions(
        positive={name: positive[name] for name in manifest.time_ids},
        negative={name: negative[name] for name in manifest.time_ids},
    )


def _named(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int], score: float
) -> dict[str, float]:
    return {
        "original_height": original[0],
        "original_width": original[1],
        "crop_top": crop[0],
        "crop_left": crop[1],
        "target_height": target[0],
        "target_width": target[1],
        "aesthetic_score": score,
    }


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """(C, H/8, W/8) of one picture's latent."""
    return manifest.latent_channels, height // manifest.latent_scale, width // manifest.latent_scale


def _size(manifest: Manifest, values: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width: as asked, or the picture's that it starts from, or the model's."""
    natural = dict(zip(("height", "width"), natural_size(manifest, values), strict=True))
    height, width = (
        PARAMETERS[name].kind.check(name, side, manifest) if values[name] is None else values[name]
        for name, side in natural.items()
    )
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"{width}x{height} is {height * width / 1e6:.0f} megapixels",
            expected=f"at most {MAX_PIXELS / 1e6:.0f}",
            fix="Choose a smaller size.",
        )
    if values["tile"] is not None:  # a tile too small is refused before anything is drawn
        tile_stride(values["tile"], manifest.latent_scale)
    return height, width


def _steps(manifest: Manifest, values: Mapping[str, Any]) -> int:
    usual = values["num_inference_steps"] or manifest.defaults.num_inference_steps
    if values["table"] is not None:
        return len(values["table"])
    return count_steps(usual, values["timesteps"], values["sigmas"])


def _sampler(manifest: Manifest, values: Mapping[str, Any], source: Source | None) -> SamplerConfig:
    spelled = manifest.defaults.sampler if values["sampler"] is None else values["sampler"]
    step_list = list_of_model(manifest.vectors, manifest.time_ids)
    config = resolve(spelled, manifest.scheduler, step_list)
    if values["table"] is not None:
        continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
        last = config.noise.num_train_timesteps - 1
        check_fits(values["table"], config.prediction_type, last, continuous=continuous)
    return replace(config, eta=values["eta"], grid_share=_grid_share(manifest, source))


def _grid_share(manifest: Manifest, source: Source | None) -> float:
    """Latent consistency models run all their steps on a picture, spread over the end of the schedule.

    LCMScheduler.set_timesteps(strength=…), as diffusers' LatentConsistencyModelImg2ImgPipeline calls it.
    """
    strength: float = getattr(source, "strength", 1.0)
    return strength if "timestep_cond" in manifest.vectors else 1.0


def _check_span(values: Mapping[str, Any]) -> None:
    begin, end = values["denoising_start"], values["denoising_end"]
    if begin is not None and end is not None and begin >= end:
        raise UsageError(
            f"denoising_start {begin:g} is not before denoising_end {end:g}",
            expected="a part of the schedule",
            fix="Exchange the two.",
        )
