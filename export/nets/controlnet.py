"""ControlNet, in two nets: what becomes of its picture once, and its copy of the UNet's down path."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component
from ...checkpoints.files.net_reads import HINT
from ...checkpoints.files.source import Source
from ...engines import spec
from .torch_net import Net, load, make_net, spelled

# What is done outside of the graphs, to the picture and to the outputs.
_OUTSIDE = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}


class ControlHint(nn.Module):
    """`ControlNetConditioningEmbedding` from diffusers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, hint: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32, 0 to 1 -> (N, C, H/8, W/8)."""
        embedding = cast(Any, self.net).controlnet_cond_embedding
        return embedding(hint.to(embedding.conv_in.weight.dtype))


class WholeControlNet(nn.Module):
    """`ControlNetModel` from diffusers, behind its picture's embedding."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        cast(Any, net).controlnet_cond_embedding = nn.Identity()
        self.net = net

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        hint_embedding: torch.Tensor,
        scales: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As `WholeUnet`, with (B, C, H/8, W/8) and (B, R) float32 -> R residuals, each times its scale."""
        down, middle = cast(Any, self.net)(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond=hint_embedding,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        factors = scales.to(sample.dtype)[:, :, None, None, None]
        return tuple(value * factors[:, number] for number, value in enumerate((*down, middle)))


def controlnet_hint(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """What becomes of the picture, once."""
    net = _model(part)
    others = [name for name, _ in net.named_children() if f"{name}." != HINT]
    for name in others:
        delattr(net, name)
    tensors = load(part, net, dtype, ignored=tuple(f"{name}." for name in others))
    width = int(cast(Any, net).config.block_out_channels[0])
    contract = spec.controlnet_hint(width=width, float_dtype=spelled(dtype))
    return make_net(ControlHint(net), contract, tensors, dtype)


def controlnet(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """All behind it, before hoisting."""
    net = _model(part)
    config = cast(Any, net).config
    delattr(net, HINT[:-1])
    tensors = load(part, net, dtype, ignored=(HINT,))
    contract = spec.controlnet_whole(
        channels=config.in_channels,
        width=config.cross_attention_dim,
        residuals=spec.residuals(config.block_out_channels, config.layers_per_block),
        float_dtype=spelled(dtype),
        vectors=checkpoint.vectors,
    )
    return make_net(WholeControlNet(net), contract, tensors, dtype)


def _model(part: Component) -> nn.Module:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    with torch.device("meta"):
        return cast(Any, ControlNetModel).from_config({**part.config, **_OUTSIDE})
