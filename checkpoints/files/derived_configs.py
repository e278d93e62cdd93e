"""The configs of a one-file checkpoint's parts, derived from names and shapes.

They say what a diffusers folder of the same model says. What no shape says (heads, activations, sizes) is
given by the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...engines.errors import CheckpointError
from .component import TensorHeader

Tensors = Mapping[str, TensorHeader]

WHOLE = "Use a complete checkpoint of Stable Diffusion 1.x, 2.x or XL."
_CLIP_HEAD = 64  # channels of an attention head in the text towers ViT-L, ViT-H and ViT-bigG
_VISION_HEADS = 16  # in the vision towers ViT-L (1024 channels) and ViT-H (1280)
_BLOCK = re.compile(
    r"((?:(?:down|up)_blocks\.\d{1,3}|mid_block)\.attentions\.\d{1,3})\.transformer_blocks\.(\d{1,3})\.(.+)"
)
_TO_K = re.compile(r".+\.attn2\.to_k\.weight")
_PROJ_IN = re.compile(r".+\.attentions\.\d{1,3}\.proj_in\.weight")
_SOME_ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
GUIDANCE = "time_embedding.cond_proj.weight"  # of latent consistency models


def unet_config(tensors: Tensors, *, head_size: int | None, ids: int, pooled: int) -> dict[str, Any]:
    """The config of UNet2DConditionModel, without its `sample_size`.

    Args:
        tensors: by diffusers' names.
        head_size: channels of an attention head; None for 1.x, which has eight heads at every width.
        ids: how many size ids join the pooled text embedding in XL.
        pooled: the width of the pooled text embedding, 0 for none.

    Raises:
        CheckpointError: a tensor is missing, or no config can describe how the blocks are arranged.
    """
    levels = max(_count(tensors, "down_blocks."), 1)
    widths = [shape_of(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shape_of(tensors, "conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "conv_out.weight", 4)[0],
        "block_out_channels": widths,
        **_arrangement(tensors, levels),
        "norm_num_groups": 32,
        "cross_attention_dim": shape_of(tensors, _first(tensors, _TO_K), 2)[1],
        "attention_head_dim": 8 if head_size is None else [max(width // head_size, 1) for width in widths],
        "use_linear_projection": len(shape_of(tensors, _first(tensors, _PROJ_IN))) == 2,
        **_conditions(tensors, ids, pooled),
    }


def _conditions(tensors: Tensors, ids: int, pooled: int) -> dict[str, Any]:
    """What the config says about conditions that join the time embedding."""
    found: dict[str, Any] = {}
    if "add_embedding.linear_1.weight" in tensors:
        added = shape_of(tensors, "add_embedding.linear_1.weight", 2)[1]
        if added <= pooled or (added - pooled) % ids:
            raise CheckpointError(
                f"the UNet's added embedding takes {added} numbers",
                expected=f"the pooled text embedding's {pooled} and {ids} ids of equal width",
                fix=WHOLE,
            )
        found = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // ids,
            "projection_class_embeddings_input_dim": added,
        }
    if "class_embedding.linear_1.weight" in tensors:
        joined = shape_of(tensors, "class_embedding.linear_1.weight", 2)[1]
        found = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": joined}
    if GUIDANCE in tensors:
        found["time_cond_proj_dim"] = shape_of(tensors, GUIDANCE, 2)[1]
    return found


def _first(tensors: Tensors, pattern: re.Pattern[str]) -> str:
    """The first name of that pattern; where there is none, the name of one that must be there."""
    return next(filter(pattern.fullmatch, tensors), _SOME_ATTENTION)


def _arrangement(tensors: Tensors, levels: int) -> dict[str, Any]:
    """Which blocks have transformers, and how deep they are.

    Distilled UNets differ from the rest: KOALA, SSD-1B and Vega have no transformer in the middle, and in
    SSD-1B the depths of a level going up are several.
    """
    layers = _count(tensors, "down_blocks.0.resnets.")
    depths = _depths(tensors)
    places = {f"{side}_blocks.{level}" for side in ("down", "up") for level in range(levels)}
    blocks = {
        place: [depths.pop(f"{place}.attentions.{i}", 0) for i in range(layers + place.startswith("up"))]
        for place in places
    }
    down = [blocks[f"down_blocks.{level}"] for level in range(levels)]
    up = [blocks[f"up_blocks.{level}"] for level in range(levels)]
    middle = depths.pop("mid_block.attentions.0", 0)
    # diffusers' config has no word for the depth in the middle: it is the last level's.
    fits = not middle or set(down[-1]) in ({middle}, {0})
    if depths or not fits or any(0 in block and any(block) for block in (*down, *up)):
        raise CheckpointError(
            f"the UNet's transformer blocks are arranged otherwise ({levels} levels of {layers} layers,"
            f" depths {down} going down, {middle} in the middle, {up} going up)",
            expected="in each level, transformers in every layer or in none",
            fix=WHOLE,
        )
    return {
        "down_block_types": [f"{'CrossAttn' if any(block) else ''}DownBlock2D" for block in down],
        "mid_block_type": _middle_type(tensors, middle),
        "up_block_types": [f"{'CrossAttn' if any(block) else ''}UpBlock2D" for block in up],
        "layers_per_block": layers,
        **_depth_config(down, middle, up),
    }


def _middle_type(tensors: Tensors, depth: int) -> str | None:
    if depth:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if "mid_block.resnets.0.conv1.weight" in tensors else None


def _depth_config(down: list[list[int]], middle: int, up: list[list[int]]) -> dict[str, Any]:
    """`transformer_layers_per_block`, as short as it can be said, and its reverse where up is not as down."""
    going_down = [_shortest(block) or 1 for block in down]
    if middle:
        going_down[-1] = middle
    going_up = [_shortest(block) or 1 for block in up]
    mirrored = all(a[:1] == b[:1] and len({*a, *b}) == 1 for a, b in zip(down, reversed(up), strict=True))
    if not mirrored:
        return {
            "transformer_layers_per_block": going_down,
            "reverse_transformer_layers_per_block": going_up,
        }
    used = {depth for depth in (middle, *(block[0] for block in down)) if depth} or {1}
    return {"transformer_layers_per_block": used.pop() if len(used) == 1 else going_down}


def _shortest(block: list[int]) -> int | list[int]:
    return block[0] if len(set(block)) == 1 else block


def _depths(tensors: Tensors) -> dict[str, int]:
    """The place of each transformer -> its blocks, which are all complete."""
    blocks: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, map(_BLOCK.fullmatch, tensors)):
        blocks.setdefault((match[1], match[2]), set()).add(match[3])
    every = set[str]().union(*blocks.values())
    depths: dict[str, int] = {}
    for (place, number), found in blocks.items():
        if lacking := sorted(every - found):
            raise CheckpointError(
                f"the tensor '{place}.transformer_blocks.{number}.{lacking[0]}' is missing",
                expected="a complete checkpoint",
                fix=WHOLE,
            )
        depths[place] = depths.get(place, 0) + 1
    return depths


def vae_config(tensors: Tensors) -> dict[str, Any]:
    """The config of AutoencoderKL without its scaling factor, which no shape says.

    Raises:
        CheckpointError: a tensor is missing.
    """
    levels = max(_count(tensors, "encoder.down_blocks."), 1)
    firsts = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", 4)[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [shape_of(tensors, first, 4)[0] for first in firsts],
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets."),
        "norm_num_groups": 32,
        "act_fn": "silu",
    }
    optional = ("quant_conv", "post_quant_conv")
    return config | {f"use_{name}": False for name in optional if f"{name}.weight" not in tensors}


def is_vae(tensors: Tensors) -> bool:
    """Whether these are an AutoencoderKL's tensors."""
    with suppress(CheckpointError):
        return bool(vae_config(tensors))
    return False


def text_config(tensors: Tensors, *, hidden_act: str, projects: bool) -> dict[str, Any]:
    """The config of CLIPTextModel, or where it `projects` of CLIPTextModelWithProjection.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    words, width = shape_of(tensors, "text_model.embeddings.token_embedding.weight", 2)
    first = "text_model.encoder.layers.0"
    query = shape_of(tensors, f"{first}.self_attn.q_proj.weight", 2)
    if query != (width, width):
        raise CheckpointError(
            f"a text encoder of width {width} has query projections of the shape {query}",
            expected=f"{(width, width)}",
            fix=WHOLE,
        )
    return {
        "architectures": [f"CLIPTextModel{'WithProjection' if projects else ''}"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{first}.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
        "num_attention_heads": max(width // _CLIP_HEAD, 1),
        "max_position_embeddings": shape_of(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "projection_dim": shape_of(tensors, "text_projection.weight", 2)[0] if projects else width,
        # As in the published configs. 2 means to transformers that the highest id of a prompt is its end.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


# What CLIPImageProcessor does, with the colours of the pictures that CLIP was trained on.
CLIP_PROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def vision_config(tensors: Tensors, *, hidden_act: str) -> dict[str, Any]:
    """The config of CLIPVisionModelWithProjection.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    embeddings, first = "vision_model.embeddings", "vision_model.encoder.layers.0"
    width, _, patch, _ = shape_of(tensors, f"{embeddings}.patch_embedding.weight", 4)
    places = shape_of(tensors, f"{embeddings}.position_embedding.weight", 2)[0]
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{first}.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(tensors, "vision_model.encoder.layers."),
        "num_attention_heads": _VISION_HEADS,
        "image_size": patch * round((places - 1) ** 0.5),  # a square of patches, and the class
        "patch_size": patch,
        "num_channels": 3,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "projection_dim": shape_of(tensors, "visual_projection.weight", 2)[0],
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def shape_of(tensors: Tensors, name: str, rank: int | None = None) -> tuple[int, ...]:
    """The shape of a tensor that must be there.

    Raises:
        CheckpointError: it is missing, or has another number of axes than `rank`.
    """
    if name not in tensors:
        raise CheckpointError(f"the tensor {name!r} is missing", expected="a complete checkpoint", fix=WHOLE)
    shape = tensors[name].shape
    if rank is not None and len(shape) != rank:
        raise CheckpointError(
            f"the tensor {name!r} has the shape {shape}", expected=f"{rank} axes", fix=WHOLE
        )
    return shape
