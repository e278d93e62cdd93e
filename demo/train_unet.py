"""Second half of the training: denoiser and text encoder together, on the cached latents."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from . import model, shapes, tokenizer
from .checker import score
from .model import Parts, encode, generate
from .parallel import WORKERS, Stage, cosine, log, total
from .train_vae import CACHED_PICTURES, cached_scene

# (steps, peak learning rate) of each cosine cycle. In the second, more than half of the scenes are small, as
# most of the pictures were that still failed after the first.
_CYCLES = ((7200, 1.5e-3), (1800, 4e-4))
STEPS = sum(steps for steps, _ in _CYCLES)
BATCH = 12
PROBE_EVERY = 400

_EMPTY_PROMPTS = 0.1
# How the loss weighs the error of the predicted latent: clamp(signal-to-noise, floor, ceiling) ** power, with
# (first step, floor, power). A low floor is enough to learn what pictures look like. A high one teaches the
# noisiest steps, where the text decides on colour and size (6 of 40 colours right at step 800, 33 at 2400).
# The root gives an equal say to the steps in between, where shapes form; the decoder forgives what is left.
_WEIGHTS = ((0, 0.05, 1.0), (1200, 0.3, 1.0), (2600, 0.1, 1.0), (4200, 0.01, 0.5))
_CEILING = 5.0
_PROBE_SCENES = 40
_PROBE_STEPS = 12
_PROBE_GUIDANCE = 3.5


def train(
    vae: AutoencoderKL, latents: torch.Tensor, folder: Path, rank: int, checkpoint: Callable[[Parts], None]
) -> Parts:
    """The finished model. `latents` are scaled, (N, 4, 16, 16); `checkpoint` gets the averaged model."""
    torch.manual_seed(1)
    words = tokenizer.build(shapes.vocabulary())
    parts = Parts(vae, model.unet(), model.text_encoder(words.get_vocab_size()), words)
    modules: dict[str, nn.Module] = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    parameters = [p for module in modules.values() for p in module.parameters()]
    stage = Stage(modules, parameters, folder / "unet.pt", rank, decay=0.997)
    log(rank, f"unet: {sum(p.numel() for p in parameters)} parameters with the text encoder")
    scenes = [cached_scene(i)[0] for i in range(CACHED_PICTURES)]
    signal = model.scheduler().alphas_cumprod.float()
    while stage.step < STEPS:
        stage.advance(_loss(parts, latents, scenes, signal, stage.step, rank), _rate(stage.step))
        if stage.step % PROBE_EVERY == 0 and stage.step < STEPS:
            stage.average.swap()
            _probe(parts, stage.step, rank)
            checkpoint(parts)
            stage.average.swap()
    stage.finish()
    _probe(parts, stage.step, rank)
    return parts


def _rate(step: int) -> float:
    (first, peak), (second, low_peak) = _CYCLES
    if step < first:
        return cosine(step / first, peak, step)
    return cosine((step - first) / second, low_peak, step - first)


def _choose(scenes: list[shapes.Scene], step: int, rng: random.Random) -> int:
    """Index of a scene; in the second cycle every other one is small."""
    only_small = step >= _CYCLES[0][0] and rng.random() < 0.5
    while True:
        index = rng.randrange(len(scenes))
        if not only_small or scenes[index].size == "small":
            return index


def _loss(
    parts: Parts,
    latents: torch.Tensor,
    scenes: list[shapes.Scene],
    signal: torch.Tensor,
    step: int,
    rank: int,
) -> torch.Tensor:
    """Weighted squared error of the predicted noise, over this process's share of the step's batch."""
    rng = shapes.generator(f"unet {rank} {step}")
    generator = torch.Generator().manual_seed(step * WORKERS + rank)
    chosen = [_choose(scenes, step, rng) for _ in range(BATCH)]
    prompts = ["" if rng.random() < _EMPTY_PROMPTS else shapes.describe(scenes[i], rng) for i in chosen]
    # One timestep from each of BATCH * WORKERS equal strata, dealt to the processes in turn.
    strata = torch.arange(BATCH) * WORKERS + rank + torch.rand((BATCH,), generator=generator)
    timesteps = (strata * len(signal) / (BATCH * WORKERS)).long()
    _, floor, power = next(row for row in reversed(_WEIGHTS) if step >= row[0])
    return noise_loss(parts, latents[chosen], prompts, timesteps, signal, generator, (floor, power))


def noise_loss(
    parts: Parts,
    clean: torch.Tensor,
    prompts: list[str],
    timesteps: torch.Tensor,
    signal: torch.Tensor,
    generator: torch.Generator,
    weighing: tuple[float, float],
) -> torch.Tensor:
    """Squared error of the predicted noise, for scaled latents (N, 4, 16, 16).

    `signal` are the schedule's 1000 products of alphas; `weighing` is a floor and a power (see `_WEIGHTS`).
    """
    noise = torch.randn(clean.shape, generator=generator)
    kept = signal[timesteps].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    predicted = parts.unet(noisy, timesteps, encode(parts, prompts)).sample
    return (weights_of(kept, weighing) * (predicted - noise).square()).mean()


def weights_of(kept: torch.Tensor, weighing: tuple[float, float]) -> torch.Tensor:
    """What squared errors of noise are multiplied with, where `kept` is left of the signal's power."""
    floor, power = weighing
    ratio = kept / (1 - kept) * model.LATENT_STD**2
    return ratio.clamp(floor, _CEILING) ** power / ratio


def _probe(parts: Parts, step: int, rank: int) -> None:
    """Log how many prompts of training combinations are obeyed: the loss says little about it."""
    rng = shapes.generator("probe")
    scenes = [shapes.sample(rng, shapes.training_combos()) for _ in range(_PROBE_SCENES)]
    mine = list(range(rank, _PROBE_SCENES, WORKERS))
    pictures = generate(parts, [scenes[i].prompt() for i in mine], mine, _PROBE_STEPS, _PROBE_GUIDANCE)
    found = score(pictures, [scenes[i] for i in mine])
    sums = total(vars(found).values())
    table = ", ".join(f"{name} {value:.0f}" for name, value in zip(vars(found), sums, strict=True))
    log(rank, f"probe at {step}: {table}")
