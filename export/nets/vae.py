"""Both halves of an autoencoder with uint8 pictures: AutoencoderKL, and AutoencoderTiny (TAESD)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component
from ...checkpoints.files.net_reads import HALVES, modern_attention
from ...checkpoints.files.open import is_tiny
from ...checkpoints.files.source import Source
from ...engines import spec
from .torch_net import Net, load, make_net, spelled


class Scaling(nn.Module):
    """Converts latents between the autoencoder's scale and the UNet's, which is about unit normal.

    Every config has `scaling_factor`. A few also have `shift_factor`, or `latents_mean` and `latents_std` for
    each channel.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        self.shift: Any = getattr(config, "shift_factor", None) or 0.0
        self.scale: Any = config.scaling_factor
        if mean is not None and std is not None:
            self.shift = torch.tensor(mean).reshape(1, -1, 1, 1)
            self.scale = config.scaling_factor / torch.tensor(std).reshape(1, -1, 1, 1)

    def raw(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents (N, 4, H/8, W/8) from the UNet's scale to the autoencoder's."""
        latent = latent / self._like(self.scale, latent)
        return latent + self._like(self.shift, latent) if self._shifts() else latent

    def scaled(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents (N, 4, H/8, W/8) from the autoencoder's scale to the UNet's."""
        latent = latent - self._like(self.shift, latent) if self._shifts() else latent
        return latent * self._like(self.scale, latent)

    def _shifts(self) -> bool:
        return isinstance(self.shift, torch.Tensor) or bool(self.shift)

    @staticmethod
    def _like(value: Any, latent: torch.Tensor) -> Any:
        return value.to(latent.dtype) if isinstance(value, torch.Tensor) else value


class VaeDecoder(nn.Module):
    """`decode` of either autoencoder between diffusers' scaling and its conversion to uint8."""

    def __init__(self, net: nn.Module, scaling: Scaling) -> None:
        super().__init__()
        self.net = net
        self.scaling = scaling

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 4, H/8, W/8) -> (N, H, W, 3) uint8, (N,) float32."""
        raw = self.scaling.raw(latent)
        pixels = cast(Any, self.net).decode(raw, return_dict=False)[0].float()  # (N, 3, H, W), about -1 ... 1
        # As VaeImageProcessor: denormalize, pt_to_numpy, numpy_to_pil. Transposed before the cast because
        # TensorRT has uint8 as a type of inputs and outputs only.
        shades = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return shades.round().to(torch.uint8), pixels.mean(dim=(1, 2, 3))


class VaeEncoder(nn.Module):
    """`encode` of either autoencoder between diffusers' conversion from uint8 and its scaling."""

    def __init__(self, net: nn.Module, scaling: Scaling, *, posterior: bool) -> None:
        super().__init__()
        self.net = net
        self.scaling = scaling
        self.posterior = posterior

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> Any:
        """(N, H, W, 3) uint8, (N, H, W, 1) uint8 -> mean (and deviation) (N, 4, H/8, W/8) float32."""
        shown = mask.float() < 127.5  # VaeImageProcessor binarises so: half and above is painted
        pixels = (image.float() / 255 * 2 - 1) * shown.float()
        net = cast(Any, self.net)
        found = net.encode(pixels.permute(0, 3, 1, 2).to(next(net.parameters()).dtype), return_dict=False)[0]
        if not self.posterior:
            return self.scaling.scaled(found.float())
        mean, log_variance = found.parameters.float().chunk(2, dim=1)
        # DiagonalGaussianDistribution of diffusers, in float32
        std = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
        return self.scaling.scaled(mean), std * self.scaling.scale


def vae_decoder(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """The decoder of an autoencoder, full or tiny. Its encoder is not even read."""
    net, tensors = _half(part, "decoder", dtype)
    contract = spec.vae_decoder(channels=net.config.latent_channels, float_dtype=spelled(dtype))
    return make_net(VaeDecoder(net, Scaling(net.config)), contract, tensors, dtype)


def vae_encoder(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """The encoder of an autoencoder, full or tiny. Its decoder is not even read."""
    net, tensors = _half(part, "encoder", dtype)
    posterior = not is_tiny(part)
    contract = spec.vae_encoder(channels=net.config.latent_channels, posterior=posterior)
    module = VaeEncoder(net, Scaling(net.config), posterior=posterior)
    return make_net(module, contract, tensors, dtype)


def _half(part: Component, half: str, dtype: torch.dtype) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The module with one half alone, and its tensors as `load` returns them."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    kind: Any = AutoencoderTiny if is_tiny(part) else AutoencoderKL
    config = dict(part.config)
    if is_tiny(part):
        config.pop("block_out_channels", None)  # which AutoencoderTiny writes for pipelines, and refuses
    with torch.device("meta"):
        net: Any = kind.from_config(config)
    other = HALVES["decoder" if half == "encoder" else "encoder"]
    for prefix in other:
        if hasattr(net, prefix.removesuffix(".")):
            setattr(net, prefix.removesuffix("."), None)
    stored = {modern_attention(name): name for name in part.tensors}
    names = {name: stored.get(name, name) for name in cast(nn.Module, net).state_dict()}
    tensors = load(part, net, dtype, names, ignored=other)
    # The package stores today's names, whatever the checkpoint's are.
    return net, {name: (name, stored) for name, (_, stored) in tensors.items()}
