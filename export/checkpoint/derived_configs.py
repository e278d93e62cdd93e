"""The configs of a one-file checkpoint's parts, from the shapes of their tensors.

A folder has `config.json`; in a single file the tensors have to say how a part is built. They come by
diffusers' and transformers' names (`ldm_names.py`). What no shape says is the family's convention, and an
argument here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...engines.errors import CheckpointError
from .tensors import TensorHeader

Tensors = Mapping[str, TensorHeader]

_CLIP_HEAD = 64  # channels of an attention head in ViT-L, ViT-H and ViT-bigG
_FIX = "Use a complete checkpoint of Stable Diffusion 1.x, 2.x or XL."
_ATTENTION_BLOCK = re.compile(r"(.+\.attentions\.\d{1,3})\.transformer_blocks\.(\d{1,3})\.")
_MIDDLE = "mid_block.attentions.0"


def unet_config(tensors: Tensors, *, head_size: int | None, ids: int = 6, pooled: int = 0) -> dict[str, Any]:
    """The config of UNet2DConditionModel.

    Args:
        tensors: by diffusers' names.
        head_size: channels of an attention head (2.x and XL: 64); None for 8 heads everywhere (1.x).
        ids: how many time ids the added embedding takes (XL: 6, its refiner: 5).
        pooled: the width of the pooled text embedding, which the added embedding takes too.

    Raises:
        CheckpointError: a tensor is missing, or no config can describe how the blocks are arranged.
    """
    levels = max(_count(tensors, "down_blocks."), 1)
    widths = [_shape(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    layers = _count(tensors, "down_blocks.0.resnets.")
    depths, middle = _depths(tensors, levels, layers)
    per_level = [*(depth or 1 for depth in depths[:-1]), middle]
    uniform = len({middle, *filter(None, depths)}) == 1
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": _shape(tensors, "conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "conv_out.weight", 4)[0],
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "up_block_types": [f"{'CrossAttn' if depth else ''}UpBlock2D" for depth in reversed(depths)],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "cross_attention_dim": _shape(tensors, f"{_MIDDLE}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "transformer_layers_per_block": middle if uniform else per_level,
        "attention_head_dim": 8 if head_size is None else [max(width // head_size, 1) for width in widths],
        "use_linear_projection": len(_shape(tensors, f"{_MIDDLE}.proj_in.weight")) == 2,
    }
    if "add_embedding.linear_1.weight" in tensors:
        added = _shape(tensors, "add_embedding.linear_1.weight", 2)[1]
        if added <= pooled or (added - pooled) % ids:
            raise CheckpointError(
                f"the UNet's added embedding takes {added} numbers",
                expected=f"the pooled text embedding's {pooled} and {ids} ids of equal width",
                fix=_FIX,
            )
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // ids,
            "projection_class_embeddings_input_dim": added,
        }
    return config


def _depths(tensors: Tensors, levels: int, layers: int) -> tuple[list[int], int]:
    """The transformer blocks of an attention: in each level (0 without attention), and in the middle."""
    blocks = {match.groups() for match in map(_ATTENTION_BLOCK.match, tensors) if match}
    found = Counter(place for place, _ in blocks)
    depths = [found[f"down_blocks.{level}.attentions.0"] for level in range(levels)]
    middle = found[_MIDDLE]
    expected = Counter({_MIDDLE: middle})
    for level, depth in enumerate(depths):
        expected.update({f"down_blocks.{level}.attentions.{i}": depth for i in range(layers)})
        expected.update({f"up_blocks.{levels - 1 - level}.attentions.{i}": depth for i in range(layers + 1)})
    if found != expected or middle == 0 or depths[-1] not in (0, middle):
        raise CheckpointError(
            f"the UNet's transformer blocks are arranged otherwise ({levels} levels of {layers} layers,"
            f" depths {depths}, {middle} in the middle)",
            expected="one depth in each level and its counterpart above (SSD-1B and Vega have several)",
            fix=_FIX,
        )
    return depths, middle


def vae_config(tensors: Tensors) -> dict[str, Any]:
    """The config of AutoencoderKL without its scaling factor, which no shape says.

    Raises:
        CheckpointError: a tensor is missing.
    """
    levels = max(_count(tensors, "encoder.down_blocks."), 1)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(tensors, "decoder.conv_in.weight", 4)[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [
            _shape(tensors, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0]
            for level in range(levels)
        ],
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets."),
        "norm_num_groups": 32,
        "act_fn": "silu",
    }
    convolutions = {
        option: False for option in ("quant_conv", "post_quant_conv") if f"{option}.weight" not in tensors
    }
    return config | {f"use_{option}": value for option, value in convolutions.items()}


def text_config(tensors: Tensors, *, hidden_act: str, projects: bool = False) -> dict[str, Any]:
    """The config of CLIPTextModel, or of CLIPTextModelWithProjection.

    Raises:
        CheckpointError: a tensor is missing, or has a shape that does not fit the others.
    """
    words, width = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)
    first = "text_model.encoder.layers.0"
    query = _shape(tensors, f"{first}.self_attn.q_proj.weight", 2)
    if query != (width, width):
        raise CheckpointError(
            f"a text encoder of width {width} has query projections of the shape {query}",
            expected=f"{(width, width)}",
            fix=_FIX,
        )
    return {
        "architectures": [f"CLIPTextModel{'WithProjection' if projects else ''}"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, f"{first}.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
        "num_attention_heads": max(width // _CLIP_HEAD, 1),
        "max_position_embeddings": _shape(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "projection_dim": _shape(tensors, "text_projection.weight", 2)[0] if projects else width,
        # As in the published configs. 2 means to transformers that the highest id of a prompt is its end.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def _shape(tensors: Tensors, name: str, rank: int | None = None) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in tensors:
        raise CheckpointError(f"the tensor {name!r} is missing", expected="a complete checkpoint", fix=_FIX)
    shape = tensors[name].shape
    if rank is not None and len(shape) != rank:
        raise CheckpointError(f"the tensor {name!r} has the shape {shape}", expected=f"{rank} axes", fix=_FIX)
    return shape
