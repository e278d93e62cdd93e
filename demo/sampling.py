"""Generates pictures in torch, while the model still trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer
from transformers import CLIPTextModel

from . import model


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
    scheduler = model.scheduler()
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.cat([torch.randn((1, 4, 16, 16), generator=generator) for generator in generators])
    for t in scheduler.timesteps:
        without, conditional = parts.unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
        latents = scheduler.step(without + guidance * (conditional - without), t, latents).prev_sample
    pictures = torch.cat([parts.vae.decode(part / model.SCALING).sample for part in latents.split(10)])
    return pictures.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
