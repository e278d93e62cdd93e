"""What a checkpoint of each family consists of, and a request's defaults for it.

Steps and guidance are the defaults of diffusers' pipelines of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.errors import CheckpointError
from .component import DIFFUSERS, REFUSED_CHANNELS, SUPPORTED, TRANSFORMERS, Component

OTHER = "Use a checkpoint of one of these families; others are not supported."


@dataclass(frozen=True, kw_only=True)
class PipelineFolder:
    """What the folder of a diffusers pipeline consists of.

    Attributes:
        parts: folders with weights -> the stem of the weights file.
        optional: parts that a checkpoint may do without (the SDXL refiner has one text encoder).
        configs: the folder of each JSON config -> its file.
        steps: a request's default.
        guidance_scale: a request's default.
        strength: the default of image to image.
        zero_empty_prompt: `force_zeros_for_empty_prompt` where model_index.json does not say.
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
# are not distilled: `_is_turbo` tells them apart.
_TURBO_SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


def layout_of(pipeline: str, where: object) -> PipelineFolder:
    """The layout of a pipeline class. Raises CheckpointError that names the family where it is refused."""
    if pipeline in PIPELINES:
        return PIPELINES[pipeline]
    family = next((name for prefix, name in _NAMES.items() if pipeline.startswith(prefix)), "another family")
    raise CheckpointError(f"{where} holds {family} ({pipeline})", expected=SUPPORTED, fix=OTHER)


def defaults(layout: PipelineFolder, scheduler: Mapping[str, Any]) -> tuple[int, float, float]:
    """The default steps, guidance scale and strength of a checkpoint with this scheduler."""
    if _is_turbo(scheduler):
        return 1, 0.0, 1.0  # a single step has no part that could be run alone
    return layout.steps, layout.guidance_scale, layout.strength


def _is_turbo(scheduler: Mapping[str, Any]) -> bool:
    return (
        scheduler.get("_class_name") in _TURBO_SCHEDULERS
        and scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
        and not scheduler.get("rescale_betas_zero_snr")
    )


def refuse_unet(unet: Component) -> None:
    """Raise CheckpointError, naming the family, for a UNet with inputs or parts that are not exported."""
    channels = unet.config.get("in_channels", 4)
    if channels not in (4, 9):
        kind = "another family"
        if isinstance(channels, int):
            kind = REFUSED_CHANNELS.get(channels, kind)
        raise CheckpointError(
            f"{unet.folder} is the UNet of {kind} (in_channels {channels})", expected=SUPPORTED, fix=OTHER
        )
    if not isinstance(unet.config.get("cross_attention_dim", 1280), int):
        raise CheckpointError(
            f"{unet.folder} has a cross_attention_dim of its own for each block",
            expected=SUPPORTED,
            fix=OTHER,
        )
    for option, (family, accepted) in _UNET_OPTIONS.items():
        value = unet.config.get(option, accepted[0])
        if value not in accepted:
            raise CheckpointError(
                f"{unet.folder} is the UNet of {family} ({option} {value!r})", expected=SUPPORTED, fix=OTHER
            )
