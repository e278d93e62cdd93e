"""What a checkpoint of each family consists of, a request's defaults for it, and what is refused by name.

Steps and guidance are the defaults of diffusers' pipelines of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...engines.errors import CheckpointError
from .component import DIFFUSERS, DOWNLOAD, REFUSED_CHANNELS, SUPPORTED, TRANSFORMERS, Component

OTHER = "Use a checkpoint of one of these families; others are not supported."


@dataclass(frozen=True, kw_only=True)
class PipelineFolder:
    """What the folder of a diffusers pipeline consists of.

    Attributes:
        parts: folders with weights -> the stem of the weights file.
        optional: parts that a checkpoint may do without (the SDXL refiner has one text encoder).
        configs: the folder of each JSON config -> its file.
        steps, guidance_scale, strength: a request's defaults.
        zero_empty_prompt: whether it reads `force_zeros_for_empty_prompt` in the index; true by default.
    """

    parts: Mapping[str, str]
    optional: tuple[str, ...] = ()
    configs: Mapping[str, str]
    steps: int = 50
    guidance_scale: float = 7.5
    strength: float = 0.8
    zero_empty_prompt: bool = False


_PARTS = {"text_encoder": TRANSFORMERS, "unet": DIFFUSERS, "vae": DIFFUSERS}
_SCHEDULER = {"scheduler": "scheduler_config.json"}
_SD = PipelineFolder(parts=_PARTS, configs=_SCHEDULER)
_SDXL = PipelineFolder(
    parts={**_PARTS, "text_encoder_2": TRANSFORMERS},
    optional=("text_encoder",),
    configs=_SCHEDULER,
    guidance_scale=5.0,
    strength=0.3,
    zero_empty_prompt=True,
)
_LCM = PipelineFolder(parts=_PARTS, configs=_SCHEDULER, steps=4, guidance_scale=8.5)
_UNCLIP = PipelineFolder(
    parts={**_PARTS, "image_encoder": TRANSFORMERS, "image_normalizer": DIFFUSERS},
    configs={
        **_SCHEDULER,
        "feature_extractor": "preprocessor_config.json",
        "image_noising_scheduler": "scheduler_config.json",
    },
    steps=20,
    guidance_scale=10.0,
)

# diffusers' pipeline class -> what its folder holds.
PIPELINES: Mapping[str, PipelineFolder] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "LatentConsistencyModelPipeline": _LCM,
    "LatentConsistencyModelImg2ImgPipeline": _LCM,
    "StableUnCLIPImg2ImgPipeline": _UNCLIP,
}

# The prefix of a refused pipeline class -> what its users call the family. First match wins.
_NAMES = {
    "StableDiffusionXLInstructPix2Pix": "InstructPix2Pix for SDXL",
    "StableDiffusionXLControlNet": "an SDXL ControlNet pipeline",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionControlNet": "a ControlNet pipeline",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableDiffusionUpscale": "the Stable Diffusion upscaler",
    "StableDiffusionLatentUpscale": "the Stable Diffusion latent upscaler",
    "StableDiffusionDepth2Img": "Stable Diffusion 2 depth-to-image",
    "StableDiffusionImageVariation": "Stable Diffusion image variations without a text encoder",
    "StableUnCLIPPipeline": "Stable unCLIP with a prior (text to image embedding)",
    "Flux": "Flux",
}

# An option of a UNet's config -> the family that sets it, and the values that can be exported.
_UNET_OPTIONS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "addition_embed_type": ("DeepFloyd IF or Kandinsky", (None, "text_time")),
    "class_embed_type": ("the upscaler, or another class-conditioned model", (None, "projection")),
    "class_embeddings_concat": ("the latent upscaler", (None, False)),
    "num_class_embeds": ("the upscaler, or another class-conditioned model", (None,)),
    "encoder_hid_dim_type": ("an IP-Adapter or Kandinsky model", (None,)),
    "encoder_hid_dim": ("an IP-Adapter or Kandinsky model", (None,)),
    "attention_type": ("GLIGEN", (None, "default")),
    "time_embedding_type": ("a model with Fourier time embeddings", (None, "positional")),
    "center_input_sample": ("a model with centred input", (None, False)),
    "cross_attention_norm": ("DeepFloyd IF", (None,)),
    "dual_cross_attention": ("Versatile Diffusion", (None, False)),
    "out_channels": ("a model that also predicts variance", (4,)),
}

# The schedulers of sd-turbo and sdxl-turbo as published. Turbo (arXiv 2311.17042) is trained at the last
# timestep, where `trailing` spacing begins. Models fine-tuned for zero terminal SNR have the same spacing and
# are not distilled: `defaults` tells them apart.
_TURBO_SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


# The pipelines that mend their scheduler's config.
_MENDED = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
# What schedulers can draw with, of what a config may say its UNet predicts.
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# A part -> the classes that are exported as it.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "image_normalizer": ("StableUnCLIPImageNormalizer",),
    "feature_extractor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# The prefix of a scheduler's class -> how a model that has it was trained.
_CONVENTIONS = {
    "EDM": "EDM's convention, as CosXL and Playground 2.5 are",
    "FlowMatch": "flow matching",
    "CMStochastic": "consistency over sigmas",
    "KarrasVe": "exploding variance",
    "ScoreSde": "score matching",
    "Cosine": "a cosine schedule over sigmas",
    "VQDiffusion": "discrete diffusion",
}


def layout_of(pipeline: str, where: object) -> PipelineFolder:
    """The layout of a pipeline class. Raises CheckpointError that names the family where it is refused."""
    pipeline = pipeline.removeprefix("Flax")
    if pipeline in PIPELINES:
        return PIPELINES[pipeline]
    family = next((name for prefix, name in _NAMES.items() if pipeline.startswith(prefix)), "another family")
    raise CheckpointError(f"{where} holds {family} ({pipeline})", expected=SUPPORTED, fix=OTHER)


def left_out(layout: PipelineFolder, index: Mapping[str, Any]) -> set[str]:
    """The optional parts that a model_index.json says the folder does without."""
    return {name for name in layout.optional if index.get(name) == [None, None]}


def defaults(layout: PipelineFolder, scheduler: Mapping[str, Any]) -> dict[str, float]:
    """The defaults of a checkpoint with this scheduler, by the names of `engines.package.Defaults`."""
    is_turbo = (
        scheduler.get("_class_name") in _TURBO_SCHEDULERS
        and scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
        and not scheduler.get("rescale_betas_zero_snr")
    )
    if is_turbo:  # its strength is 1 because a single step has no part that could be run alone
        return {"num_inference_steps": 1, "guidance_scale": 0.0, "strength": 1.0}
    steps, scale, strength = layout.steps, layout.guidance_scale, layout.strength
    return {"num_inference_steps": steps, "guidance_scale": scale, "strength": strength}


def class_of(index: Mapping[str, Any], name: str, default: object) -> str:
    """The class of a part: what model_index.json names, as in diffusers; `default` where it names none.

    Flax classes are those of the same name without it.

    Raises:
        CheckpointError: the index has something else than a library and a class.
    """
    entry: Any = index.get(name)
    if entry is None:
        return str(default).removeprefix("Flax")
    if not isinstance(entry, list) or [type(word) for word in cast(list[object], entry)] != [str, str]:
        raise CheckpointError(
            f"model_index.json says {str(cast(object, entry))[:100]} of {name}",
            expected='a library and a class, such as ["diffusers", "AutoencoderKL"]',
            fix=DOWNLOAD,
        )
    return str(cast(list[str], entry)[1]).removeprefix("Flax")


def refuse_class(name: str, found: str, where: Path) -> None:
    """Raise CheckpointError for a part of a class that is not exported."""
    if name in CLASSES and found not in CLASSES[name]:
        kinds = " or ".join(CLASSES[name])
        raise CheckpointError(f"{where} holds a {found}", expected=f"a {kinds} as {name}", fix=OTHER)


def refuse_scheduler(scheduler: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError for a model trained by another convention than that of discrete timesteps.

    A sampler's name would not tell: it takes what it knows from the config, and draws noise.
    """
    kind = str(scheduler.get("_class_name"))
    found = next((name for prefix, name in _CONVENTIONS.items() if kind.startswith(prefix)), None)
    predicts = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("use_flow_sigmas") or predicts == "flow_prediction":
        found = found or "flow matching"
    if found is not None:
        raise CheckpointError(f"{where} is trained by {found} ({kind})", expected=SUPPORTED, fix=OTHER)
    if predicts not in PREDICTIONS:
        raise CheckpointError(
            f"{where} says that its UNet predicts {predicts!r:.80}",
            expected=" or ".join(PREDICTIONS),
            fix="If you know better, pass --prediction-type epsilon or v_prediction.",
        )


def as_in_pipeline(scheduler: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """A scheduler's config after diffusers' pipeline `pipeline` mended what early folders of 1.x lack.

    An offset that the config lacks is mended for its own class alone, and listed under `_use_default_values`
    as in diffusers, so that a sampler that a request names keeps its own default.
    """
    if pipeline.removeprefix("Flax") not in _MENDED:
        return dict(scheduler)
    mended = {**scheduler, "steps_offset": 1, "clip_sample": False}
    if "Inpaint" in pipeline:
        mended["skip_prk_steps"] = True
    if "steps_offset" not in scheduler:
        mended["_use_default_values"] = ["steps_offset"]
    return mended


def refuse_unet(unet: Component) -> None:
    """Raise CheckpointError, naming the family, for a UNet with inputs or parts that are not exported."""
    found = None
    channels = unet.config.get("in_channels", 4)
    if channels not in (4, 9):
        kind = (isinstance(channels, int) and REFUSED_CHANNELS.get(channels)) or "another family"
        found = f"is the UNet of {kind} (in_channels {channels})"
    elif not isinstance(unet.config.get("cross_attention_dim", 1280), int):
        found = "has a cross_attention_dim of its own for each block"
    for option, (family, accepted) in _UNET_OPTIONS.items():
        value = unet.config.get(option, accepted[0])
        if value not in accepted:
            found = found or f"is the UNet of {family} ({option} {value!r})"
    if found is not None:
        raise CheckpointError(f"{unet.folder} {found}", expected=SUPPORTED, fix=OTHER)
