"""What random-weight checkpoints consist of: tiny ones of every family for tests, and full-size ones.

Sizes of full-size models are those of the published configs. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Config = Mapping[str, Any]

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **{key: SCHEDULER[key] for key in SCHEDULER if key.startswith(("beta", "num", "pred", "steps"))},
    "timestep_spacing": "leading",
}
TURBO: dict[str, Any] = {**_EULER, "timestep_spacing": "trailing"}
XL_TURBO: dict[str, Any] = {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}
_LCM = {**SCHEDULER, "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
# Of unCLIP's noise on embeddings.
IMAGE_NOISE: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The configs of one checkpoint. `index` is what model_index.json has besides the parts."""

    unet: Config
    vae: Config
    text: Config | None
    text_2: Config | None = None
    vision: Config | None = None
    scheduler: Config = field(default_factory=lambda: SCHEDULER)
    pipeline: str = "StableDiffusionPipeline"
    index: Config = field(default_factory=dict[str, Any])


def unet(channels: tuple[int, ...], attends: tuple[bool, ...] | None = None, **more: Any) -> dict[str, Any]:
    """The config of a UNet; `attends` says which levels have transformers: all but the last."""
    levels = attends or (True,) * (len(channels) - 1) + (False,)
    names = ["CrossAttn" if level else "" for level in levels]
    return {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "down_block_types": tuple(f"{name}DownBlock2D" for name in names),
        "up_block_types": tuple(f"{name}UpBlock2D" for name in reversed(names)),
        **more,
    }


def vae(channels: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """The config of an AutoencoderKL."""
    count = len(channels)
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "latent_channels": 4,
        **more,
    }


def text(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    """The config of a CLIP text encoder."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "projection_dim": width,
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
        **more,
    }


def _text_2(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    architecture = {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"}
    return text(width, heads, layers, **architecture, **more)


def _xl(ids: int, pooled: int, each: int) -> dict[str, Any]:
    """What SDXL's UNet has of its own: `ids` numbers, `each` as a sinusoid, behind the pooled embedding."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": pooled + ids * each,
        "use_linear_projection": True,
    }


SD_VAE = vae((128, 256, 512, 512), layers_per_block=2, sample_size=512, scaling_factor=0.18215)
TINY_TEXT = {"vocab_size": 700, "bos_token_id": 698, "eos_token_id": 699}
_XL_VAE = {**SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_BIG_G = _text_2(1280, 20, 32, projection_dim=1280)
_REFINER = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
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
        **_xl(6, 96, 8),
    ),
    text=text(64, 1, 2, hidden_act="quick_gelu", **TINY_TEXT),
    text_2=_text_2(128, 2, 3, projection_dim=96, **TINY_TEXT),
    vae=vae((32, 32), layers_per_block=1, sample_size=16, scaling_factor=0.13025, force_upcast=True),
    scheduler=_EULER,
    pipeline="StableDiffusionXLPipeline",
    index={"force_zeros_for_empty_prompt": True},
)


# Tiny ones of what SD 1.x and 2.x have not, and full-size SDXL.
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
        unet={**_SMALL_XL.unet, "cross_attention_dim": 128, **_xl(5, 96, 8)},
        text=None,
        pipeline="StableDiffusionXLImg2ImgPipeline",
        index=_REFINER,
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
    "sdxl": Recipe(
        unet=unet(
            (320, 640, 1280),
            (False, True, True),
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            sample_size=128,
            **_xl(6, 1280, 256),
        ),
        text=text(768, 12, 12, hidden_act="quick_gelu"),
        text_2=_BIG_G,
        vae=_XL_VAE,
        scheduler=_EULER,
        pipeline="StableDiffusionXLPipeline",
        index={"force_zeros_for_empty_prompt": True},
    ),
    "sdxl-refiner": Recipe(
        unet=unet(
            (384, 768, 1536, 1536),
            (False, True, True, False),
            cross_attention_dim=1280,
            attention_head_dim=[6, 12, 24, 24],
            transformer_layers_per_block=4,
            sample_size=128,
            **_xl(5, 1280, 256),
        ),
        text=None,
        text_2=_BIG_G,
        vae=_XL_VAE,
        scheduler=_EULER,
        pipeline="StableDiffusionXLImg2ImgPipeline",
        index=_REFINER,
    ),
}

# The config of an AutoencoderTiny as TAESD's, but for the levels: as many as the tiny recipes have.
TINY_VAE: dict[str, Any] = {
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
