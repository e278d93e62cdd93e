"""The architectures in circulation: the configs of their parts, as published or as one-file checkpoints have.

What a config leaves out has its class's default. Sizes of pictures and what acts in training alone stand in
no template, and not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A checkpoint of which only configs are known.

    Attributes:
        parts: by the names of `Checkpoint.parts`, what `config.json` says.
        feature_extractor: what `preprocessor_config.json` says (unCLIP).
        image_features: of an IP-Adapter, what it reads of its image encoder (`ControlFile.image_features`).
    """

    parts: Mapping[str, Config]
    feature_extractor: Config | None = None
    image_features: str = ""

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
_DEMO_LAYERS = (64, 64, 64, 96)
_DEMO_VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 8,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
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


def _t2i(adapter_type: str, picture: int, factor: int = 8, **more: Any) -> Architecture:
    """A T2I-Adapter (TencentARC) that reads a picture of so many channels."""
    config = {
        "_class_name": "T2IAdapter",
        "adapter_type": adapter_type,
        "in_channels": picture,
        "channels": [320, 640, 1280, 1280],
        "num_res_blocks": 2,
        "downscale_factor": factor,
        **more,
    }
    return Architecture(parts={"t2i-adapter": config})


def _ip_adapter(projection: Config, layers: Sequence[int], vision: Config, features: str) -> Architecture:
    """An IP-Adapter for a UNet whose cross-attentions have these widths."""
    parts = {"ip-adapter": {**projection, "layer_widths": list(layers)}, "vision": vision}
    return Architecture(parts=parts, image_features=features)


def _embedding(width: int, context: int) -> Config:
    """The classic projection of a picture's embedding to four tokens."""
    return {
        "_class_name": "ImageProjection",
        "image_embed_dim": width,
        "cross_attention_dim": context,
        "num_image_text_embeds": 4,
    }


def _resampler(hidden: int, context: int) -> Config:
    """The projection of the "plus" adapters: 16 tokens of all places of ViT-H."""
    return {
        "_class_name": "IPAdapterPlusImageProjection",
        "embed_dims": 1280,
        "output_dims": context,
        "hidden_dims": hidden,
        "depth": 4,
        "dim_head": 64,
        "heads": hidden // 64,
        "num_queries": 16,
        "ffn_ratio": 4,
    }


def _full(width: int, context: int) -> Config:
    """The projection of "full-face": every place is a token."""
    return {
        "_class_name": "IPAdapterFullImageProjection",
        "image_embed_dim": width,
        "cross_attention_dim": context,
    }


def _union(types: int) -> Config:
    """What a ControlNet of this many types has otherwise."""
    return {"_class_name": "ControlNetUnionModel", "num_control_type": types}


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

_VISION_H = _vision(1280, 32, 1024, "gelu")
_VISION_BIG_G = {**_vision(1664, 48, 1280, "gelu"), "intermediate_size": 8192}
# The widths of the cross-attentions: down blocks, up blocks, the middle.
_SD1_LAYERS = (*[320] * 2, *[640] * 2, *[1280] * 2, *[1280] * 3, *[640] * 3, *[320] * 3, 1280)
_SDXL_LAYERS = (*[640] * 4, *[1280] * 20, *[1280] * 30, *[640] * 6, *[1280] * 10)

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
    # TencentARC/T2I-Adapter: sketch and canny read one channel, color is light
    "sd1-t2i": _t2i("full_adapter", 3),
    "sd1-t2i-gray": _t2i("full_adapter", 1),
    "sd1-t2i-light": _t2i("light_adapter", 3, channels=[320, 640, 1280], num_res_blocks=4),
    "sdxl-t2i": _t2i("full_adapter_xl", 3, 16),
    "sdxl-t2i-gray": _t2i("full_adapter_xl", 1, 16),
    # h94/IP-Adapter: ViT-H for all but the first of XL, which reads ViT-bigG
    "sd1-ip": _ip_adapter(_embedding(1024, 768), _SD1_LAYERS, _VISION_H, "image_embeds"),
    "sd1-ip-plus": _ip_adapter(_resampler(768, 768), _SD1_LAYERS, _VISION_H, "hidden_states"),
    "sd1-ip-full": _ip_adapter(_full(1280, 768), _SD1_LAYERS, _VISION_H, "hidden_states"),
    "sdxl-ip": _ip_adapter(_embedding(1280, 2048), _SDXL_LAYERS, _VISION_BIG_G, "image_embeds"),
    "sdxl-ip-h": _ip_adapter(_embedding(1024, 2048), _SDXL_LAYERS, _VISION_H, "image_embeds"),
    "sdxl-ip-plus": _ip_adapter(_resampler(1280, 2048), _SDXL_LAYERS, _VISION_H, "hidden_states"),
    # xinsir/controlnet-union-sdxl-1.0, and its ProMax
    "sdxl-control-union": _control(_SDXL_UNET, **_union(6)),
    "sdxl-control-promax": _control(_SDXL_UNET, **_union(8)),
    "demo-control": _control(_DEMO_UNET, **_DEMO_CONTROL),
    "demo-ip": _ip_adapter(_embedding(64, 96), _DEMO_LAYERS, _DEMO_VISION, "image_embeds"),
}
