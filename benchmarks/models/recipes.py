"""What full-size checkpoints with random weights consist of: the sizes of the published configs.

Nothing here imports torch. Tests make tiny recipes of the same parts (`tests/recipes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **{key: SCHEDULER[key] for key in SCHEDULER if key.startswith(("beta", "num", "pred", "steps"))},
    "timestep_spacing": "leading",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The configs of one checkpoint. `index` is what model_index.json has besides the parts."""

    unet: Config
    vae: Config
    text: Config | None
    text_2: Config | None = None
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


def text_2(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    """The config of a CLIP text encoder with a projection, as SDXL has a second one."""
    architecture = {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"}
    return text(width, heads, layers, **architecture, **more)


def xl(ids: int, pooled: int, each: int) -> dict[str, Any]:
    """What SDXL's UNet has of its own: `ids` numbers, `each` as a sinusoid, behind the pooled embedding."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": pooled + ids * each,
        "use_linear_projection": True,
    }


SD_VAE = vae((128, 256, 512, 512), layers_per_block=2, sample_size=512, scaling_factor=0.18215)
RECIPES: Mapping[str, Recipe] = {
    "sd15": Recipe(
        unet=unet((320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        text=text(768, 12, 12, hidden_act="quick_gelu"),
        vae=SD_VAE,
    ),
    "sd21": Recipe(
        unet=unet(
            (320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            sample_size=96,
            use_linear_projection=True,
            upcast_attention=True,
        ),
        text=text(1024, 16, 23, hidden_act="gelu", projection_dim=512),
        vae={**SD_VAE, "sample_size": 768},
        scheduler={**SCHEDULER, "prediction_type": "v_prediction"},
    ),
    "sdxl": Recipe(
        unet=unet(
            (320, 640, 1280),
            (False, True, True),
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            sample_size=128,
            **xl(6, 1280, 256),
        ),
        text=text(768, 12, 12, hidden_act="quick_gelu"),
        text_2=text_2(1280, 20, 32, projection_dim=1280),
        vae={**SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        scheduler=EULER,
        pipeline="StableDiffusionXLPipeline",
        index={"force_zeros_for_empty_prompt": True},
    ),
}
