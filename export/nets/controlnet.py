"""ControlNet, in two nets: what becomes of its picture once, and its copy of the UNet's down path.

A Union (`ControlNetUnionModel` of diffusers) reads pictures of several types. What becomes of each depends
on it alone: diffusers' attention runs over the batch, not over a row's tokens, so that in the batch of one
picture, whose rows are equal, a token gets itself; and the latent's token is thrown away behind it. The sum
over the pictures takes the place of a plain ControlNet's embedding, and the types join the time embedding: so
behind its pictures, a Union is a plain ControlNet with one summand more.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component
from ...checkpoints.files.net_reads import HINT
from ...checkpoints.files.source import Source
from ...engines import spec
from .torch_net import Net, load, make_net, spelled

_PLAIN, _UNION = "ControlNetModel", "ControlNetUnionModel"
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


class UnionHint(nn.Module):
    """What `ControlNetUnionModel` makes of one of its pictures."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, hint: torch.Tensor, control_type: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W), (N, types) and (N,) float32 -> (N, C, H/8, W/8)."""
        net = cast(Any, self.net)
        seen = net.controlnet_cond_embedding(hint.to(net.task_embedding.dtype))
        scale = strength.to(seen.dtype)[:, None]
        token = seen.float().mean(dim=(2, 3)).to(seen.dtype)
        token = (token + control_type.to(seen.dtype) @ net.task_embedding) * scale
        for block in net.transformer_layes:
            token = _alone(block, token)
        return (seen + net.spatial_ch_projs(token)[:, :, None, None]) * scale[:, :, None, None]


def _alone(block: Any, token: torch.Tensor) -> torch.Tensor:
    """A `ResidualAttentionBlock` whose tokens, (N, C), attend each to itself: with a weight of 1."""
    attention, begin = block.attn, 2 * token.shape[-1]  # of query, key and value side by side
    weight, bias = attention.in_proj_weight[begin:], attention.in_proj_bias[begin:]
    token = token + attention.out_proj(nn.functional.linear(block.ln_1(token), weight, bias))
    return token + block.mlp(block.ln_2(token))


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
        control_type: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As `WholeUnet`, with (B, C, H/8, W/8) and (B, R) float32 -> R residuals, each times its scale."""
        down, middle = cast(Any, self.net)(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond=hint_embedding,
            class_labels=control_type,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        factors = scales.to(sample.dtype)[:, :, None, None, None]
        return tuple(value * factors[:, number] for number, value in enumerate((*down, middle)))


def controlnet_hint(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """What becomes of the picture, once."""
    types = checkpoint.vectors.get(spec.CONTROL_TYPE, 0)
    net = _model(part, _UNION if types else _PLAIN)
    others = [name for name, _ in net.named_children() if not f"{name}.".startswith(HINT)]
    for name in others:
        delattr(net, name)
    tensors = load(part, net, dtype, ignored=tuple(f"{name}." for name in others))
    width = int(cast(Any, net).config.block_out_channels[0])
    contract = spec.controlnet_hint(width=width, float_dtype=spelled(dtype), types=types)
    return make_net((UnionHint if types else ControlHint)(net), contract, tensors, dtype)


def controlnet(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """All behind it, before hoisting."""
    net = _model(part, _PLAIN)
    config = cast(Any, net).config
    if spec.CONTROL_TYPE in checkpoint.vectors:
        _embed_types(net, _model(part, _UNION))
    del cast(Any, net).controlnet_cond_embedding
    tensors = load(part, net, dtype, ignored=HINT)
    contract = spec.controlnet_whole(
        channels=config.in_channels,
        width=config.cross_attention_dim,
        residuals=spec.residuals(config.block_out_channels, config.layers_per_block),
        float_dtype=spelled(dtype),
        vectors=checkpoint.vectors,
    )
    return make_net(WholeControlNet(net), contract, tensors, dtype)


def _embed_types(net: Any, union: Any) -> None:
    """Let a plain net add a Union's embedding of types where diffusers adds that of classes."""
    net.control_add_embedding = union.control_add_embedding

    def embed(types: torch.Tensor) -> torch.Tensor:
        waves = union.control_type_proj(types.flatten()).reshape((types.shape[0], -1))
        return net.control_add_embedding(waves.to(net.dtype))

    net.class_embedding = embed


def _model(part: Component, kind: str) -> nn.Module:
    """A class of diffusers with the config's options that it takes."""
    from diffusers.models import controlnets

    found: Any = getattr(controlnets, kind)
    taken = inspect.signature(found.__init__).parameters
    options = {name: value for name, value in {**part.config, **_OUTSIDE}.items() if name in taken}
    with torch.device("meta"):
        return found.from_config(options)
