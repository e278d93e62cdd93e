"""The torch nets of a package, by its folders: each module is called with its contract's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..checkpoint.open import Checkpoint
from .clip import image_encoder, image_noiser, text_encoder, text_encoder_2
from .torch_net import Net
from .unet import unet
from .vae import preview_decoder, vae_decoder, vae_encoder

__all__ = ["BUILD", "Net"]

# A package's folder -> what makes its net.
BUILD: Mapping[str, Callable[[Checkpoint, torch.dtype], Net]] = {
    "text_encoder": text_encoder,
    "text_encoder_2": text_encoder_2,
    "image_encoder": image_encoder,
    "image_noiser": image_noiser,
    "vae_encoder": vae_encoder,
    "unet": unet,
    "vae_decoder": vae_decoder,
    "preview_decoder": preview_decoder,
}
