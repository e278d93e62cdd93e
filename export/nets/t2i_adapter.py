"""T2I-Adapter: a picture to what is added to each down block of the UNet, once per picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.controls.t2i_adapter import feature_levels
from ...checkpoints.files.component import Component
from ...checkpoints.files.source import Source
from ...engines import spec
from .torch_net import Net, load, make_net, spelled


class Features(nn.Module):
    """`T2IAdapter` from diffusers."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype

    def forward(self, hint: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, 1 or 3, H, W) float32, 0 to 1 -> a map for each down block."""
        return tuple(cast(Any, self.net)(hint.to(self.dtype)))


def t2i_adapter(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """The whole of it."""
    from diffusers.models.adapter import T2IAdapter

    with torch.device("meta"):
        net: nn.Module = cast(Any, T2IAdapter).from_config(dict(part.config))
    config = cast(Any, net).config
    contract = spec.t2i_adapter(
        channels=config.in_channels, features=feature_levels(config), float_dtype=spelled(dtype)
    )
    made = make_net(Features(net, dtype), contract, load(part, net, dtype), dtype)
    return replace(made, multiple=max(8, int(config.downscale_factor)))
