"""Tiny checkpoints of odd shapes: a recipe for every family, made by the writer of the full-size ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from latentrt.benchmarks.models.checkpoints import config_of, make_checkpoint, write_part
from latentrt.benchmarks.models.recipes import (
    EULER,
    IMAGE_NOISE,
    REFINER,
    SCHEDULER,
    Recipe,
    text,
    text_2,
    unet,
    vae,
    xl,
)

__all__ = ["FAMILIES", "IMAGE_NOISE", "RECIPES", "Recipe", "make_checkpoint", "make_tiny_vae"]

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


def _unclip(width: int, hidden_act: str) -> Recipe:
    """Stable unCLIP with an image encoder whose embeddings have this width."""
    return replace(
        _SMALL,
        unet={
            **_SMALL_UNET,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * width,
            "use_linear_projection": True,
        },
        text=text(32, 2, 2, hidden_act="gelu", **TINY_TEXT),
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
        index=REFINER,
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
    **FAMILIES,
}

# The config of an AutoencoderTiny as TAESD's, but for the levels: as many as the tiny recipes have.
TINY_VAE: dict[str, Any] = {
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}


def make_tiny_vae(root: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Write the folder of an AutoencoderTiny that fits the tiny recipes of two levels."""
    with torch.device("meta"):
        net = AutoencoderTiny(**TINY_VAE)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    write_part(root, "diffusion_pytorch_model", config_of(net), shapes, dtype, seed)
    return root
