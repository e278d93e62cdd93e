"""The architecture: a stock CLIPTextModel, UNet2DConditionModel and AutoencoderKL, only small.

128x128 pictures, 4x16x16 latents. Every attention head is at least 16 wide: TensorRT-RTX has no kernel below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

SCALING = 0.18215
# What a request gets that does not say; `latentrt export` copies it into the package.
RECOMMENDED: dict[str, object] = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "sampler": "dpmpp_2m",
    "height": 128,
    "width": 128,
}

# Scaled latents have this standard deviation. With 1, a flat background of 256 cells shows through even the
# last noise level, so the net reads the colour off the noise and never learns it from the text.
LATENT_STD = 0.5
TEXT_WIDTH = 96


def vae() -> AutoencoderKL:
    """The autoencoder, initialised so that its latents start out almost noiseless (log variance -5)."""
    model = AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        # Groups of 8 channels or more: GroupNorm over 2 channels erases a flat picture's colour.
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=SCALING,
    )
    weight, bias = _convolution(model.quant_conv)
    with torch.no_grad():
        weight[4:] *= 0.1
        bias[4:] = -5.0
    return model


def unet() -> UNet2DConditionModel:
    """The denoiser, with identity initialisation; attention heads 32 and 48 wide."""
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
    )
    identity_init(model)
    return model


@torch.no_grad()
def identity_init(model: UNet2DConditionModel) -> None:
    """Let the fresh net output its input: at high noise, epsilon is almost x itself.

    conv_in copies x to channels 0-3 and -x to 4-7; the last up block's shortcut takes them from the skip
    connection; conv_out adds them up again, as silu(a) - silu(-a) = a. A small net learns this path too late.
    """
    enter, enter_bias = _convolution(model.conv_in)
    leave, leave_bias = _convolution(model.conv_out)
    shortcut, shortcut_bias = _convolution(model.up_blocks[-1].resnets[-1].conv_shortcut)
    for tensor in (enter, enter_bias, shortcut, shortcut_bias):
        tensor[:8] = 0
    leave *= 0.1
    leave_bias.zero_()
    skip = shortcut.shape[1] - enter.shape[0]
    for channel in range(4):
        for sign, offset in ((1.0, 0), (-1.0, 4)):
            enter[channel + offset, channel, 1, 1] = sign
            shortcut[channel + offset, skip + channel + offset] = 1.0
            leave[channel, channel + offset] = 0
            leave[channel, channel + offset, 1, 1] = sign


def _convolution(module: nn.Module | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in, h, w) and bias (out,) of a convolution, to be changed in place."""
    assert isinstance(module, nn.Conv2d)
    assert module.bias is not None
    return module.weight, module.bias


def text_encoder(vocabulary_size: int) -> CLIPTextModel:
    """Two layers of CLIP text model; bos and eos are the last two ids."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
            pad_token_id=vocabulary_size - 1,
        )
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """The default sampler: DPM-Solver++ 2M over Stable Diffusion's own noise schedule."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
        steps_offset=1,
    )


@torch.no_grad()
def standardise(model: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Fold each channel's mean and spread into the two 1x1 convolutions around the latent; new latents.

    `latents` are unscaled means (N, 4, 16, 16). Afterwards SCALING times a latent has mean 0 and deviation
    LATENT_STD, and decoding gives the same pictures as before.
    """
    before, before_bias = _convolution(model.quant_conv)
    after, after_bias = _convolution(model.post_quant_conv)
    mean = latents.mean(dim=(0, 2, 3))
    gain = LATENT_STD / SCALING / latents.std(dim=(0, 2, 3))
    before[:4] *= gain.view(4, 1, 1, 1)
    before_bias[:4] = (before_bias[:4] - mean) * gain
    before_bias[4:] += 2 * gain.log()
    after_bias += after[:, :, 0, 0] @ mean
    after /= gain.view(1, 4, 1, 1)
    return (latents - mean.view(1, 4, 1, 1)) * gain.view(1, 4, 1, 1)


@dataclass(frozen=True)
class Parts:
    """The three nets and the tokenizer."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer


def encode(parts: Parts, prompts: list[str]) -> torch.Tensor:
    """Text context, (N, 77, 96) float32."""
    ids = torch.tensor([encoding.ids for encoding in parts.tokenizer.encode_batch(prompts)])
    return parts.text_encoder(input_ids=ids).last_hidden_state


@torch.no_grad()
def generate(
    parts: Parts, prompts: list[str], seeds: list[int], steps: int, guidance: float
) -> npt.NDArray[np.uint8]:
    """Pictures (N, 128, 128, 3) uint8 with classifier-free guidance; one seed per picture."""
    context = encode(parts, [""] * len(prompts) + prompts)
    sampler = scheduler()
    sampler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.cat([torch.randn((1, 4, 16, 16), generator=generator) for generator in generators])
    for t in sampler.timesteps:
        without, conditional = parts.unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
        latents = sampler.step(without + guidance * (conditional - without), t, latents).prev_sample
    pictures = torch.cat([parts.vae.decode(part / SCALING).sample for part in latents.split(10)])
    return pictures.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
