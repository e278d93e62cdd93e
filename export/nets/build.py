"""The torch nets of a package, one row a net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ...engines import spec
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
            CheckpointError: the weights do not fit the part's config, or `dtype`.
        """
        return self.make(checkpoint, checkpoint.parts[self.part], dtype)


# A net's folder in a package -> how it is made and calibrated, in the order in which nets feed each other.
NETS: Mapping[str, ExportedNet] = {
    name: ExportedNet(part=spec.NETS[name].part, make=make, calibrate=calibrate)
    for name, make, calibrate in (
        ("text_encoder", text_encoder, partial(Calibration.encode_prompts, name="text_encoder")),
        ("text_encoder_2", text_encoder, partial(Calibration.encode_prompts, name="text_encoder_2")),
        ("image_encoder", image_encoder, Calibration.embed_pictures),
        ("image_noiser", image_noiser, Calibration.noise_embeddings),
        ("vae_encoder", vae_encoder, Calibration.encode_pictures),
        ("unet", unet, Calibration.denoise),
        ("vae_decoder", vae_decoder, Calibration.decode),
        ("preview_decoder", vae_decoder, Calibration.decode),
    )
}


def components(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The rows of NETS that the package of this checkpoint has."""
    return tuple(name for name, net in NETS.items() if net.part in checkpoint.parts)
