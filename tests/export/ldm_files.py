"""Diffusers' components written as one-file checkpoints, by the tables of diffusers' conversion scripts.

After `scripts/convert_diffusers_to_original_stable_diffusion.py` and `_sdxl.py`, for any number of levels and
layers. What the scripts leave out and trained files have is added: OpenCLIP's unused last block of 2.x, its
`text_projection` the other way round, averaged weights, buffers.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Tensors = dict[str, torch.Tensor]

UNET_ENDS = [
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
]
UNET_RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
]
OPEN_CLIP = [
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    (".c_fc.", ".fc1."),
    (".c_proj.", ".fc2."),
    (".attn", ".self_attn"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
]


def _replaced(name: str, pairs: list[tuple[str, str]]) -> str:
    for theirs, diffusers in pairs:
        name = name.replace(diffusers, theirs)
    return name


def unet_to_ldm(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    pairs: list[tuple[str, str]] = []
    for i in range(levels):
        attends = config["up_block_types"][i].startswith("CrossAttn")
        for j in range(layers):
            pairs.append((f"input_blocks.{(layers + 1) * i + j + 1}.0.", f"down_blocks.{i}.resnets.{j}."))
            pairs.append((f"input_blocks.{(layers + 1) * i + j + 1}.1.", f"down_blocks.{i}.attentions.{j}."))
        for j in range(layers + 1):
            pairs.append((f"output_blocks.{(layers + 1) * i + j}.0.", f"up_blocks.{i}.resnets.{j}."))
            pairs.append((f"output_blocks.{(layers + 1) * i + j}.1.", f"up_blocks.{i}.attentions.{j}."))
        down = f"input_blocks.{(layers + 1) * (i + 1)}.0.op."
        up = f"output_blocks.{(layers + 1) * i + layers}.{2 if attends else 1}."
        pairs += [(down, f"down_blocks.{i}.downsamplers.0.conv."), (up, f"up_blocks.{i}.upsamplers.0.")]
    pairs.append(("middle_block.1.", "mid_block.attentions.0."))
    pairs += [(f"middle_block.{2 * j}.", f"mid_block.resnets.{j}.") for j in range(2)]
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = next((s + name.removeprefix(d) for s, d in UNET_ENDS if name.startswith(d)), name)
        new = _replaced(new, UNET_RESNET) if ".resnets." in new else new
        renamed[_replaced(new, pairs)] = tensor
    return renamed


def vae_to_ldm(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    pairs = [("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out")]
    pairs.append(("mid.attn_1.", "mid_block.attentions.0."))
    for i in range(levels):
        for j in range(layers + 1):
            pairs.append((f"encoder.down.{i}.block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}."))
            pairs.append((f"decoder.up.{levels - 1 - i}.block.{j}.", f"decoder.up_blocks.{i}.resnets.{j}."))
        pairs.append((f"down.{i}.downsample.", f"down_blocks.{i}.downsamplers.0."))
        pairs.append((f"up.{levels - 1 - i}.upsample.", f"up_blocks.{i}.upsamplers.0."))
    pairs += [(f"mid.block_{i + 1}.", f"mid_block.resnets.{i}.") for i in range(2)]
    attention = [
        ("norm.", "group_norm."),
        ("q.", "to_q."),
        ("k.", "to_k."),
        ("v.", "to_v."),
        ("proj_out.", "to_out.0."),
    ]
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = _replaced(name, pairs)
        if ".attn_1." in new:
            new = _replaced(new, attention)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[new] = tensor
    return renamed


def text_to_open_clip(tensors: Tensors) -> Tensors:
    fused: dict[str, list[torch.Tensor]] = {}
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = _replaced(name, OPEN_CLIP)
        place, _, last = new.rpartition(".")
        if place.endswith(("q_proj", "k_proj", "v_proj")):  # a state dict has k, v, q
            fused.setdefault(f"{place[:-7]}.in_proj_{last}", [tensor] * 3)["qkv".index(place[-6])] = tensor
        elif name == "text_projection.weight":
            renamed["text_projection"] = tensor.T.contiguous()
        else:
            renamed[new] = tensor
    return renamed | {name: torch.cat(parts) for name, parts in fused.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_header_only(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of the right size whose tensors are a hole: nothing is allocated."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    position = 0
    for name, tensor in tensors.items():
        end = position + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)


CLIP_AT = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP_AT = {
    "sd2": ("text_encoder", "cond_stage_model.model."),
    "sdxl": ("text_encoder_2", "conditioner.embedders.1.model."),
    "sdxl-refiner": ("text_encoder_2", "conditioner.embedders.0.model."),
}


def unet(widths: tuple[int, ...], attends: str, **more: Any) -> dict[str, Any]:
    """`attends`: a letter for each level, "x" where there is cross-attention."""
    down = tuple("CrossAttnDownBlock2D" if letter == "x" else "DownBlock2D" for letter in attends)
    up = tuple("CrossAttnUpBlock2D" if letter == "x" else "UpBlock2D" for letter in reversed(attends))
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, **more}


def vae(*widths: int, layers: int = 1, size: int = 512, scale: float = 0.18215) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
        "latent_channels": 4,
        "sample_size": size,
        "scaling_factor": scale,
    }


def text(
    width: int, inner: int, layers: int, act: str, projection: int, words: int = 49408
) -> dict[str, Any]:
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_act": act,
        "projection_dim": projection,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def added(width: int, projection: int) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": width,
        "projection_class_embeddings_input_dim": projection,
    }


@dataclass(frozen=True)
class Recipe:
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any] | None = None
    text_encoder_2: dict[str, Any] | None = None


LINEAR = {"use_linear_projection": True, "sample_size": 128}
XL_VAE = {"size": 1024, "scale": 0.13025}
TINY = {
    "sd1": Recipe(
        unet=unet(
            (32, 64, 64),
            "xx-",
            layers_per_block=2,
            cross_attention_dim=64,
            attention_head_dim=8,
            sample_size=64,
        ),
        vae=vae(32, 64),
        text_encoder=text(64, 96, 2, "quick_gelu", 64, 100),
    ),
    "sd2": Recipe(
        unet=unet(
            (64, 128),
            "x-",
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=[1, 2],
            upcast_attention=True,
        )
        | LINEAR
        | {"sample_size": 96},
        vae=vae(32, 64, size=768),
        text_encoder=text(64, 32, 23, "gelu", 64, 100),
    ),
    "sdxl": Recipe(
        unet=unet(
            (64, 64, 128),
            "-xx",
            layers_per_block=2,
            cross_attention_dim=192,
            attention_head_dim=[1, 1, 2],
            transformer_layers_per_block=[1, 2, 3],
        )
        | LINEAR
        | added(16, 48 + 6 * 16),
        vae=vae(32, 32, 64, layers=2, **XL_VAE),
        text_encoder=text(64, 96, 2, "quick_gelu", 64, 100),
        text_encoder_2=text(128, 96, 2, "gelu", 48, 100),
    ),
    "sdxl-refiner": Recipe(
        unet=unet(
            (64, 128, 64, 64),
            "-xx-",
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=[1, 2, 1, 1],
            transformer_layers_per_block=2,
        )
        | LINEAR
        | added(16, 48 + 5 * 16),
        vae=vae(32, **XL_VAE),
        text_encoder_2=text(128, 96, 2, "gelu", 48, 100),
    ),
}
# As published in the repositories' config.json.
FULL = {
    "sd1": Recipe(
        unet=unet(
            (320, 640, 1280, 1280), "xxx-", cross_attention_dim=768, attention_head_dim=8, sample_size=64
        ),
        vae=vae(128, 256, 512, 512, layers=2),
        text_encoder=text(768, 3072, 12, "quick_gelu", 768),
    ),
    "sd2": Recipe(
        unet=unet(
            (320, 640, 1280, 1280), "xxx-", cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20]
        )
        | LINEAR
        | {"sample_size": 96, "upcast_attention": True},
        vae=vae(128, 256, 512, 512, layers=2, size=768),
        text_encoder=text(1024, 4096, 23, "gelu", 1024),
    ),
    "sdxl": Recipe(
        unet=unet(
            (320, 640, 1280),
            "-xx",
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
        )
        | LINEAR
        | added(256, 2816),
        vae=vae(128, 256, 512, 512, layers=2, **XL_VAE),
        text_encoder=text(768, 3072, 12, "quick_gelu", 768),
        text_encoder_2=text(1280, 5120, 32, "gelu", 1280),
    ),
    "sdxl-refiner": Recipe(
        unet=unet(
            (384, 768, 1536, 1536),
            "-xx-",
            cross_attention_dim=1280,
            attention_head_dim=[6, 12, 24, 24],
            transformer_layers_per_block=4,
        )
        | LINEAR
        | added(256, 2560),
        vae=vae(128, 256, 512, 512, layers=2, **XL_VAE),
        text_encoder_2=text(1280, 5120, 32, "gelu", 1280),
    ),
}

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_XL = {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
# scheduler_config.json of stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0 and
# stable-diffusion-xl-refiner-1.0 as published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd1": {**_BETAS, "_class_name": "PNDMScheduler"},
    "sd2": {**_BETAS, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": {**_BETAS, **_XL},
    "sdxl-refiner": {**_BETAS, **_XL},
}


def text_class(part: str) -> Any:
    return CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel


def build(recipe: Recipe) -> dict[str, Any]:
    """Modules of random weights, by the names of the folders that they would have."""
    torch.manual_seed(0)
    modules: dict[str, Any] = {
        "unet": UNet2DConditionModel(**recipe.unet),
        "vae": AutoencoderKL(**recipe.vae),
    }
    for part in ("text_encoder", "text_encoder_2"):
        if config := getattr(recipe, part):
            modules[part] = text_class(part)(CLIPTextConfig(**config))
    return modules


def tensors_of(part: str, module: Any) -> Tensors:
    """A folder's tensors; transformers 5 leaves out `text_model.` where there is no projection."""
    found = {name: tensor for name, tensor in module.state_dict().items() if "position_ids" not in name}
    prefix = "text_model." if part == "text_encoder" else ""
    return {prefix + name.removeprefix(prefix): tensor for name, tensor in found.items()}


def one_file(modules: dict[str, Any], family: str) -> Tensors:
    """The tensors of the single file, as the trainers' code wrote them."""
    found = {part: tensors_of(part, module) for part, module in modules.items()}
    stored = under("model.diffusion_model.", unet_to_ldm(found["unet"], modules["unet"].config))
    stored |= under("first_stage_model.", vae_to_ldm(found["vae"], modules["vae"].config))
    if family in CLIP_AT:
        stored |= under(CLIP_AT[family], found["text_encoder"])
        stored[f"{CLIP_AT[family]}text_model.embeddings.position_ids"] = torch.empty(1, 77, device="meta").to(
            "meta"
        )
    if family in OPEN_CLIP_AT:
        part, prefix = OPEN_CLIP_AT[family]
        tower = text_to_open_clip(found[part])
        if family == "sd2":  # the whole of ViT-H
            last = {name.replace(".22.", ".23."): 2 * x for name, x in tower.items() if ".22." in name}
            tower |= last | {
                "text_projection": torch.zeros_like(
                    tower["ln_final.weight"].repeat(len(tower["ln_final.weight"]), 1)
                )
            }
        stored |= under(
            prefix, {**tower, "logit_scale": torch.empty((), device=tower["ln_final.weight"].device)}
        )
    return stored
