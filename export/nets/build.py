"""The torch nets of a package, one row a net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.component import Component
from ..checkpoint.open import Checkpoint
from .calibration import Calibration, NetCall
from .clip import image_encoder, image_noiser, text_encoder
from .torch_net import Net
from .unet import unet
from .vae import vae_decoder, vae_encoder


@dataclass(frozen=True, kw_only=True)
class ExportedNet:
    """How one net is made, and called while its ranges are measured.

    Attributes:
        part: the part of a checkpoint that has its weights.
        make: builds it from that part.
        calibrate: calls it with the inputs of a small picture.
    """

    part: str
    make: Callable[[Checkpoint, Component, torch.dtype], Net]
    calibrate: Callable[[Calibration, NetCall], None]

    def build(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Net:
        """The net with the checkpoint's weights.

        Raises:
            CheckpointError: the weights do not fit the part's config, or float16 if `dtype` is that.
        """
        return self.make(checkpoint, checkpoint.parts[self.part], dtype)


def _text_encoder(name: str) -> ExportedNet:
    def calibrate(calibration: Calibration, call: NetCall) -> None:
        calibration.encode_prompts(name, call)

    return ExportedNet(part=name, make=text_encoder, calibrate=calibrate)


# A net's folder in a package -> how it is made, in the order in which nets feed each other.
NETS: Mapping[str, ExportedNet] = {
    "text_encoder": _text_encoder("text_encoder"),
    "text_encoder_2": _text_encoder("text_encoder_2"),
    "image_encoder": ExportedNet(
        part="image_encoder", make=image_encoder, calibrate=Calibration.embed_pictures
    ),
    "image_noiser": ExportedNet(
        part="image_normalizer", make=image_noiser, calibrate=Calibration.noise_embeddings
    ),
    "vae_encoder": ExportedNet(part="vae", make=vae_encoder, calibrate=Calibration.encode_pictures),
    "unet": ExportedNet(part="unet", make=unet, calibrate=Calibration.denoise),
    "vae_decoder": ExportedNet(part="vae", make=vae_decoder, calibrate=Calibration.decode),
    "preview_decoder": ExportedNet(part="tiny_vae", make=vae_decoder, calibrate=Calibration.decode),
}


def components(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The rows of NETS that the package of this checkpoint has."""
    return tuple(name for name, net in NETS.items() if net.part in checkpoint.parts)
