"""The shapes of a ControlNet's tensors, by its config: those of diffusers' classes (0.42)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .stored import Shapes, layer

UNION = "task_embedding"  # which no other ControlNet has


def controlnet_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a ControlNet with this config, complete with the class' defaults."""
    widths: Sequence[int] = config["block_out_channels"]
    time = 4 * widths[0]
    shapes = {
        **layer("conv_in", widths[0], int(config["in_channels"]), 3, 3),
        **layer("time_embedding.linear_1", time, widths[0]),
        **layer("time_embedding.linear_2", time, time),
        **_hint_shapes(config),
    }
    if config["addition_embed_type"] is not None:
        shapes |= layer("add_embedding.linear_1", time, int(config["projection_class_embeddings_input_dim"]))
        shapes |= layer("add_embedding.linear_2", time, time)
    if config["_class_name"] == "ControlNetUnionModel":
        shapes |= _union_shapes(config, time)
    residuals = [widths[0]]
    for level in range(len(widths)):
        shapes |= _level_shapes(config, level, residuals)
    shapes |= _middle_shapes(config)
    for index, width in enumerate(residuals):
        shapes |= layer(f"controlnet_down_blocks.{index}", width, width, 1, 1)
    return shapes | layer("controlnet_mid_block", widths[-1], widths[-1], 1, 1)


def _hint_shapes(config: Mapping[str, Any]) -> Shapes:
    """The convolutions that bring the picture to the size of the latent."""
    place, channels = "controlnet_cond_embedding", config["conditioning_embedding_out_channels"]
    shapes = layer(f"{place}.conv_in", channels[0], int(config["conditioning_channels"]), 3, 3)
    for index, (before, after) in enumerate(pairwise(channels)):
        shapes |= layer(f"{place}.blocks.{2 * index}", before, before, 3, 3)
        shapes |= layer(f"{place}.blocks.{2 * index + 1}", after, before, 3, 3)
    return shapes | layer(f"{place}.conv_out", config["block_out_channels"][0], channels[-1], 3, 3)


def _union_shapes(config: Mapping[str, Any], time: int) -> Shapes:
    """What a Union has besides: the types' embeddings, and a transformer over the pictures' means."""
    types, width = int(config["num_control_type"]), int(config["num_trans_channel"])
    joined = types * int(config["addition_time_embed_dim"])
    shapes: dict[str, tuple[int, ...]] = {
        UNION: (types, width),
        **layer("control_add_embedding.linear_1", time, joined),
        **layer("control_add_embedding.linear_2", time, time),
        **layer("spatial_ch_projs", int(config["num_proj_channel"]), width),
    }
    for index in range(int(config["num_trans_layer"])):
        place = f"transformer_layes.{index}"  # diffusers' own spelling
        shapes |= {
            f"{place}.attn.in_proj_weight": (3 * width, width),
            f"{place}.attn.in_proj_bias": (3 * width,),
        }
        shapes |= layer(f"{place}.attn.out_proj", width, width)
        shapes |= layer(f"{place}.ln_1", width) | layer(f"{place}.ln_2", width)
        shapes |= layer(f"{place}.mlp.c_fc", 4 * width, width) | layer(
            f"{place}.mlp.c_proj", width, 4 * width
        )
    return shapes


def _level_shapes(config: Mapping[str, Any], level: int, residuals: list[int]) -> Shapes:
    """The tensors of a down block. The widths of what it hands on join `residuals`."""
    widths: Sequence[int] = config["block_out_channels"]
    width, place = widths[level], f"down_blocks.{level}"
    attends = str(config["down_block_types"][level]).startswith("CrossAttn")
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(int(config["layers_per_block"])):
        before = width if index else widths[max(level - 1, 0)]
        shapes |= _resnet(f"{place}.resnets.{index}", before, width, 4 * widths[0])
        if attends:
            shapes |= _transformer(f"{place}.attentions.{index}", width, _depth(config, level), config)
        residuals.append(width)
    if level < len(widths) - 1:
        shapes |= layer(f"{place}.downsamplers.0.conv", width, width, 3, 3)
        residuals.append(width)
    return shapes


def _middle_shapes(config: Mapping[str, Any]) -> Shapes:
    widths: Sequence[int] = config["block_out_channels"]
    width, time = widths[-1], 4 * widths[0]
    shapes = _resnet("mid_block.resnets.0", width, width, time)
    if config.get("mid_block_type") == "UNetMidBlock2D":
        return shapes
    shapes |= _transformer("mid_block.attentions.0", width, _depth(config, -1), config)
    return shapes | _resnet("mid_block.resnets.1", width, width, time)


def _depth(config: Mapping[str, Any], level: int) -> int:
    depths: int | Sequence[int] = config["transformer_layers_per_block"]
    return depths if isinstance(depths, int) else depths[level]


def _resnet(place: str, before: int, width: int, time: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        **layer(f"{place}.norm1", before),
        **layer(f"{place}.conv1", width, before, 3, 3),
        **layer(f"{place}.time_emb_proj", width, time),
        **layer(f"{place}.norm2", width),
        **layer(f"{place}.conv2", width, width, 3, 3),
    }
    return shapes | (layer(f"{place}.conv_shortcut", width, before, 1, 1) if before != width else {})


def _transformer(place: str, width: int, depth: int, config: Mapping[str, Any]) -> Shapes:
    kernel = () if config["use_linear_projection"] else (1, 1)
    shapes = layer(f"{place}.norm", width)
    for index in range(depth):
        shapes |= dict(
            _block(f"{place}.transformer_blocks.{index}", width, int(config["cross_attention_dim"]))
        )
    for name in ("proj_in", "proj_out"):
        shapes |= layer(f"{place}.{name}", width, width, *kernel)
    return shapes


def _block(place: str, width: int, context: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A transformer's block: attention to the picture and to the prompt, and a gated feed-forward."""
    for number in (1, 2, 3):
        yield from layer(f"{place}.norm{number}", width).items()
    for name, read in (("attn1", width), ("attn2", context)):
        yield f"{place}.{name}.to_q.weight", (width, width)
        yield f"{place}.{name}.to_k.weight", (width, read)
        yield f"{place}.{name}.to_v.weight", (width, read)
        yield from layer(f"{place}.{name}.to_out.0", width, width).items()
    yield from layer(f"{place}.ff.net.0.proj", 8 * width, width).items()
    yield from layer(f"{place}.ff.net.2", width, 4 * width).items()
