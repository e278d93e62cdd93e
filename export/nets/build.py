"""The torch nets of a package, one row a net, and the UNet of every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component
from ...checkpoints.files.source import Source
from ...engines import spec
from .clip import image_encoder, image_noiser, text_encoder
from .controlnet import controlnet, controlnet_hint
from .image_prompt import image_features, image_prompt
from .t2i_adapter import t2i_adapter
from .torch_net import Net, load, make_net, spelled
from .vae import vae_decoder, vae_encoder


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


def unet(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """The whole UNet, before hoisting."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        net: nn.Module = cast(Any, UNet2DConditionModel).from_config(dict(part.config))
    tensors = load(part, net, dtype)
    config = cast(Any, net).config
    contract = spec.unet_whole(
        channels=config.in_channels,
        width=config.cross_attention_dim,
        float_dtype=spelled(dtype),
        vectors=checkpoint.vectors,
    )
    return make_net(WholeUnet(net), contract, tensors, dtype)


@dataclass(frozen=True, kw_only=True)
class ExportedNet:
    """How one net is made.

    Attributes:
        part: the part of a checkpoint that has its weights.
        make: builds it from that part.
    """

    part: str
    make: Callable[[Source, Component, torch.dtype], Net]

    def build(self, checkpoint: Source, dtype: torch.dtype) -> Net:
        """The net with the checkpoint's weights.

        Raises:
            CheckpointError: the weights do not fit the part's config, or `dtype`.
        """
        return self.make(checkpoint, checkpoint.parts[self.part], dtype)


# A net's folder in a package -> how it is made.
NETS: Mapping[str, ExportedNet] = {
    name: ExportedNet(part=spec.NETS[name].part, make=make)
    for name, make in (
        ("text_encoder", text_encoder),
        ("text_encoder_2", text_encoder),
        ("image_encoder", image_encoder),
        ("image_noiser", image_noiser),
        ("vae_encoder", vae_encoder),
        ("unet", unet),
        ("vae_decoder", vae_decoder),
        ("preview_decoder", vae_decoder),
        ("controlnet_hint", controlnet_hint),
        ("controlnet", controlnet),
        ("t2i_adapter", t2i_adapter),
        ("image_features", image_features),
        ("image_prompt", image_prompt),
    )
}
