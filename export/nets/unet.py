"""The UNet of every family: `UNet2DConditionModel` with the conditions that its config asks for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ...engines import spec
from ..checkpoint.component import Component
from ..checkpoint.open import Checkpoint
from .torch_net import Net, load, make_net, spelled


class WholeUnet(nn.Module):
    """`UNet2DConditionModel` from diffusers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        # diffusers upsamples by two where the latent is a multiple of 2**num_upsamplers, else to the size of
        # the skip connection. The latter works for all sizes, and gives the same numbers where both apply.
        cast(Any, net).num_upsamplers = 30
        self.net = net

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, C, H/8, W/8), (B,) float32, (B, T, width), and vectors (B, width) -> (B, 4, H/8, W/8).

        Vectors are float32, and are cast to the UNet's type where it reads them.
        """
        return cast(Any, self.net)(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=None if timestep_cond is None else timestep_cond.to(sample.dtype),
            class_labels=None if class_labels is None else class_labels.to(sample.dtype),
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]


def unet(checkpoint: Checkpoint, part: Component, dtype: torch.dtype) -> Net:
    """The whole UNet, before hoisting."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        net: nn.Module = cast(Any, UNet2DConditionModel).from_config(dict(part.config))
    tensors = load(part, net)
    config = cast(Any, net).config
    contract = spec.unet_whole(
        channels=config.in_channels,
        width=config.cross_attention_dim,
        float_dtype=spelled(dtype),
        vectors=checkpoint.vectors,
    )
    return make_net(part, WholeUnet(net), contract, tensors, dtype)
