"""The architectures in circulation: the configs of their parts, as published or as one-file checkpoints have.

What a config leaves out has its class's default. Sizes of pictures and what acts in training alone stand in
no template, and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A checkpoint of which only configs are known.

    Attributes:
        parts: by the names of `Checkpoint.parts`, what `config.json` says.
        feature_extractor: what `preprocessor_config.json` says (unCLIP).
    """

    parts: Mapping[str, Config]
    feature_extractor: Config | None = None

    def with_unet(self, **more: Any) -> Architecture:
        """The same with other values in the UNet's config."""
        return replace(self, parts={**self.parts, "unet": {**self.parts["unet"], **more}})


def _blocks(attends: tuple[bool, ...]) -> dict[str, list[str]]:
    """The types of a UNet's levels, from the largest; `attends` says which have transformers."""
    names = ["CrossAttn" if level else "" for level in attends]
    return {
        "down_block_types": [f"{name}DownBlock2D" for name in names],
        "up_block_types": [f"{name}UpBlock2D" for name in reversed(names)],
    }


def _text_time(pooled: int, ids: int) -> dict[str, Any]:
    """SDXL's vectors: the pooled embedding, and numbers of which each becomes 256."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": pooled + 256 * ids,
    }


_UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
_FOUR_LEVELS = {"block_out_channels": [320, 640, 1280, 1280], **_blocks((True, True, True, False))}
_SD1_UNET = {**_UNET, **_FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD2_UNET = {
    **_UNET,
    **_FOUR_LEVELS,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL_UNET = {
    **_UNET,
    **_blocks((False, True, True)),
    **_text_time(1280, 6),
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
_REFINER_UNET = {
    **_UNET,
    **_blocks((False, True, True, False)),
    **_text_time(1280, 5),
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "use_linear_projection": True,
}
# One residual block is left in the middle of both, and no transformer.
_SSD_1B = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
_VEGA = {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]}


def _text(width: int, layers: int, **more: Any) -> dict[str, Any]:
    """The config of CLIPTextModel with heads of 64."""
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        # As in the published configs. 2 means to transformers that the highest id of a prompt is its end.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **more,
    }


_VIT_L = _text(768, 12, hidden_act="quick_gelu", projection_dim=768)
# 2.x takes the context one layer early, and its folders come without the last layer.
_VIT_H = _text(1024, 23, hidden_act="gelu", projection_dim=512)
_BIG_G = _text(1280, 32, hidden_act="gelu", projection_dim=1280)

_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
_SDXL_VAE = {**_VAE, "scaling_factor": 0.13025}
# TAESD and TAESDXL differ in weights alone. Their latents have the UNet's scale.
_TINY_VAE = {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}


def _vision(width: int, layers: int, projection: int, hidden_act: str) -> dict[str, Any]:
    """The config of CLIPVisionModelWithProjection for pictures of 224 pixels, in patches of 14."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": projection,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
    }


# What a ControlNet makes of its picture, from 3 channels to 320.
_HINT = {
    "_class_name": "ControlNetModel",
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}
# Colours of the pictures that OpenAI's CLIP was trained on.
_PROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# The ControlNet of the model that ships, which reads a hint and no prompt (`demo/train_controlnet.py`).
_DEMO_UNET = {
    "in_channels": 4,
    "block_out_channels": [64, 96],
    "layers_per_block": 1,
    "cross_attention_dim": 96,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_DEMO_CONTROL = {
    "down_block_types": ["DownBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2D",
    "conditioning_embedding_out_channels": [8, 16, 32, 64],
}


def _control(unet: Config, **more: Any) -> Architecture:
    """A ControlNet that was made of this UNet: its down path and its middle."""
    left = ("out_channels", "up_block_types", "sample_size")
    config = {name: value for name, value in unet.items() if name not in left}
    return Architecture(parts={"controlnet": {**config, **_HINT, **more}})


def _unclip(vision: Config) -> Architecture:
    """unCLIP 2.1 with this image encoder: its embedding and the noise level are the UNet's class."""
    width: int = vision["projection_dim"]
    unet = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * width}
    parts = {**_SD2.parts, "image_encoder": vision, "image_normalizer": {"embedding_dim": width}}
    return replace(_SD2, parts=parts, feature_extractor=_PROCESSOR).with_unet(**unet)


_SD1 = Architecture(parts={"text_encoder": _VIT_L, "unet": _SD1_UNET, "vae": _VAE, "tiny_vae": _TINY_VAE})
_SD2 = Architecture(parts={"text_encoder": _VIT_H, "unet": _SD2_UNET, "vae": _VAE})
_SDXL = Architecture(
    parts={
        "text_encoder": _VIT_L,
        "text_encoder_2": _BIG_G,
        "unet": _SDXL_UNET,
        "vae": _SDXL_VAE,
        "tiny_vae": _TINY_VAE,
    }
)
_REFINER = Architecture(parts={"text_encoder_2": _BIG_G, "unet": _REFINER_UNET, "vae": _SDXL_VAE})

# SD-Turbo is a 2.x, SDXL-Turbo, Lightning and Hyper are SDXL: what differs are weights and schedulers.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sd1": _SD1,
    "sd1-inpainting": _SD1.with_unet(in_channels=9),
    "sd2": _SD2,
    "sd2-inpainting": _SD2.with_unet(in_channels=9),
    "sdxl": _SDXL,
    "sdxl-inpainting": _SDXL.with_unet(in_channels=9),
    "sdxl-refiner": _REFINER,
    # The same with the id of a prompt's end that transformers' own CLIP configs have since 4.31.
    "sdxl-end-by-id": replace(
        _SDXL, parts={**_SDXL.parts, "text_encoder_2": {**_BIG_G, "eos_token_id": 49407}}
    ),
    "lcm-sd1": _SD1.with_unet(time_cond_proj_dim=256),
    "lcm-sdxl": _SDXL.with_unet(time_cond_proj_dim=256),
    "ssd-1b": _SDXL.with_unet(**_SSD_1B),
    "segmind-vega": _SDXL.with_unet(**_VEGA),
    # A tiny autoencoder in place of the checkpoint's has its encoder read too.
    "sd1-taesd": replace(_SD1, parts={**_SD1.parts, "vae": _TINY_VAE}),
    "unclip-h": _unclip(_vision(1280, 32, 1024, "gelu")),
    "unclip-l": _unclip(_vision(1024, 24, 768, "quick_gelu")),
    "sd1-control": _control(_SD1_UNET),
    "sd2-control": _control(_SD2_UNET),
    "sdxl-control": _control(_SDXL_UNET),
    # diffusers/controlnet-canny-sdxl-1.0-mid and -small, and those for depth
    "sdxl-control-mid": _control(_SDXL_UNET, transformer_layers_per_block=[0, 0, 1]),
    "sdxl-control-small": _control(
        _SDXL_UNET, down_block_types=["DownBlock2D"] * 3, mid_block_type="UNetMidBlock2D"
    ),
    "demo-control": _control(_DEMO_UNET, **_DEMO_CONTROL),
}
