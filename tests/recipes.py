"""Tiny checkpoints of odd shapes: a recipe for every family, made by the writer of the full-size ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from latentrt.benchmarks.models import checkpoints
from latentrt.benchmarks.models.checkpoints import config_of, parts_of, write_json, write_part
from latentrt.benchmarks.models.recipes import (
    EULER,
    SCHEDULER,
    Config,
    Recipe,
    text,
    text_2,
    unet,
    vae,
    xl,
)
from latentrt.export.architectures import Architecture

# Of unCLIP's noise on embeddings.
IMAGE_NOISE: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
}
# Colours of the pictures that OpenAI's CLIP was trained on.
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


@dataclass(frozen=True, kw_only=True)
class UnclipRecipe(Recipe):
    vision: Config  # of the image encoder


TURBO: dict[str, Any] = {**EULER, "timestep_spacing": "trailing"}
XL_TURBO: dict[str, Any] = {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}
_LCM = {**SCHEDULER, "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
TINY_TEXT = {"vocab_size": 700, "bos_token_id": 698, "eos_token_id": 699}
# One level with a transformer in the middle alone: a UNet that is traced in seconds.
_SMALL_UNET = unet(
    (32,),
    cross_attention_dim=32,
    attention_head_dim=2,
    sample_size=8,
    layers_per_block=1,
    norm_num_groups=8,
)
_SMALL_TEXT = text(32, 2, 2, hidden_act="quick_gelu", **TINY_TEXT)
_SMALL_VAE = vae((16, 32), layers_per_block=1, norm_num_groups=4, sample_size=16)
_SMALL = Recipe(unet=_SMALL_UNET, text=_SMALL_TEXT, vae=_SMALL_VAE)
# As one-file checkpoints are laid out: heads of 64, 32 groups. Two text encoders of different widths, and two
# layers in the transformer of the middle.
_SMALL_XL = Recipe(
    unet=unet(
        (64, 128),
        (False, False),
        cross_attention_dim=192,
        attention_head_dim=[1, 2],
        transformer_layers_per_block=2,
        sample_size=8,
        layers_per_block=1,
        **xl(6, 96, 8),
    ),
    text=text(64, 1, 2, hidden_act="quick_gelu", **TINY_TEXT),
    text_2=text_2(128, 2, 3, projection_dim=96, **TINY_TEXT),
    vae=vae((32, 32), layers_per_block=1, sample_size=16, scaling_factor=0.13025, force_upcast=True),
    scheduler=EULER,
    pipeline="StableDiffusionXLPipeline",
    index={"force_zeros_for_empty_prompt": True},
)
# Three levels, of which the first has no transformer, and latents of 8 pixels, as published: what controls
# add goes by levels.
_LEVELS_XL = replace(
    _SMALL_XL,
    unet=unet(
        (32, 64, 64),
        (False, True, True),
        cross_attention_dim=192,
        attention_head_dim=[1, 2, 4],
        transformer_layers_per_block=[1, 1, 2],
        sample_size=16,
        layers_per_block=1,
        **xl(6, 96, 8),
    ),
    vae=vae((32, 32, 32, 32), layers_per_block=1, sample_size=128, scaling_factor=0.13025, force_upcast=True),
)


def _unclip(width: int, hidden_act: str) -> UnclipRecipe:
    """Stable unCLIP with an image encoder whose embeddings have this width."""
    return UnclipRecipe(
        unet={
            **_SMALL_UNET,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * width,
            "use_linear_projection": True,
        },
        text=text(32, 2, 2, hidden_act="gelu", **TINY_TEXT),
        vae=_SMALL_VAE,
        vision={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": width,
            "hidden_act": hidden_act,
            "model_type": "clip_vision_model",
            "architectures": ["CLIPVisionModelWithProjection"],
        },
        scheduler={**SCHEDULER, "prediction_type": "v_prediction"},
        pipeline="StableUnCLIPImg2ImgPipeline",
    )


FAMILIES: Mapping[str, Recipe] = {
    "xl-tiny": _SMALL_XL,
    "xl-turbo-tiny": replace(_SMALL_XL, scheduler=XL_TURBO),
    "inpaint-xl-tiny": replace(
        _SMALL_XL, unet={**_SMALL_XL.unet, "in_channels": 9}, pipeline="StableDiffusionXLInpaintPipeline"
    ),
    "refiner-tiny": replace(
        _SMALL_XL,
        unet={**_SMALL_XL.unet, "cross_attention_dim": 128, **xl(5, 96, 8)},
        text=None,
        pipeline="StableDiffusionXLImg2ImgPipeline",
        index={"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    ),
    "turbo-tiny": replace(_SMALL, scheduler=TURBO),
    "inpaint-tiny": replace(
        _SMALL, unet={**_SMALL_UNET, "in_channels": 9}, pipeline="StableDiffusionInpaintPipeline"
    ),
    "lcm-tiny": replace(
        _SMALL,
        unet={**_SMALL_UNET, "time_cond_proj_dim": 24},
        scheduler=_LCM,
        pipeline="LatentConsistencyModelPipeline",
    ),
    # ViT-H, and ViT-L: another activation, and another width of the embedding.
    "unclip-tiny": _unclip(40, "gelu"),
    "unclip-l-tiny": _unclip(24, "quick_gelu"),
}

RECIPES: Mapping[str, Recipe] = {
    # Like 1.x: convolutional projections, one head count for all blocks, three heads of 16 to 32.
    "tiny1": Recipe(
        unet=unet(
            (48, 96),
            cross_attention_dim=80,
            attention_head_dim=3,
            sample_size=8,
            layers_per_block=1,
            norm_num_groups=6,
        ),
        text=text(80, 5, 2, hidden_act="quick_gelu", **TINY_TEXT),
        vae=vae((16, 32), layers_per_block=1, norm_num_groups=4, sample_size=16),
    ),
    # Like 2.x: linear projections, heads by block, upcast attention, v-prediction; three levels.
    "tiny2": Recipe(
        unet=unet(
            (32, 48, 48),
            cross_attention_dim=64,
            attention_head_dim=[2, 3, 1],
            sample_size=[12, 8],
            layers_per_block=1,
            norm_num_groups=8,
            use_linear_projection=True,
            upcast_attention=True,
        ),
        text=text(64, 4, 1, hidden_act="gelu", **TINY_TEXT),
        vae=vae((16, 16, 32), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.5),
        scheduler={**SCHEDULER, "prediction_type": "v_prediction"},
    ),
    "xl-levels-tiny": _LEVELS_XL,
    **FAMILIES,
}


def architecture(recipe: Recipe) -> Architecture:
    """What templates of its graphs are made of."""
    parts = named_parts(recipe.unet, recipe.vae, text_encoder=recipe.text, text_encoder_2=recipe.text_2)
    vision = seeing_parts(recipe.vision) if isinstance(recipe, UnclipRecipe) else {}
    return Architecture(parts=parts | vision, feature_extractor=PROCESSOR)


def named_parts(unet: Config, vae: Config, **encoders: Config | None) -> dict[str, Config]:
    """The configs of a checkpoint's parts as their files have them."""
    return {
        "unet": {"_class_name": "UNet2DConditionModel", **unet},
        "vae": {"_class_name": "AutoencoderKL", **vae},
        **{part: config for part, config in encoders.items() if config},
    }


def seeing_parts(vision: Config) -> dict[str, Config]:
    """What an unCLIP has besides."""
    return {"image_encoder": vision, "image_normalizer": {"embedding_dim": vision["projection_dim"]}}


# The config of an AutoencoderTiny as TAESD's, but for the levels: as many as the tiny recipes have.
TINY_VAE: dict[str, Any] = {
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}


def make_checkpoint(recipe: Recipe, root: Path, **options: Any) -> Path:
    """`checkpoints.make_checkpoint`, for unCLIP too."""
    if not isinstance(recipe, UnclipRecipe):
        return checkpoints.make_checkpoint(recipe, root, **options)
    # this module imports pipelines, and with them everything they can be
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    text_encoder, *rest = parts_of(recipe)
    with torch.device("meta"):
        encoder: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**recipe.vision))
        normalizer: Any = StableUnCLIPImageNormalizer(embedding_dim=recipe.vision["projection_dim"])
    image_encoder = "image_encoder", "model", encoder, dict(recipe.vision)
    last = "image_normalizer", "diffusion_pytorch_model", normalizer, config_of(normalizer)
    checkpoints.make_checkpoint(recipe, root, **options, parts=[text_encoder, image_encoder, *rest, last])
    size = recipe.vision["image_size"]
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    write_json(root / "feature_extractor" / "preprocessor_config.json", {**PROCESSOR, **sizes})
    write_json(root / "image_noising_scheduler" / "scheduler_config.json", IMAGE_NOISE)
    index = json.loads((root / "model_index.json").read_text())
    index |= {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    }
    write_json(root / "model_index.json", index)
    return root


def make_tiny_vae(root: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Write the folder of an AutoencoderTiny that fits the tiny recipes of two levels."""
    with torch.device("meta"):
        net = AutoencoderTiny(**TINY_VAE)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    write_part(root, "diffusion_pytorch_model", config_of(net), shapes, dtype, seed)
    return root
