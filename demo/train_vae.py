"""First stages of the training: the autoencoder, the latents of the data set, the decoder's last polish."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch.nn import functional

from . import model, shapes
from .parallel import WORKERS, Stage, cosine, log

# (side of the crop in pixels, pictures per process, steps): small crops teach colour, large ones corners.
PHASES = ((32, 16, 900), (64, 8, 700), (128, 4, 800))
PEAK_RATE = 2e-3
TUNE_STEPS = 500
TUNE_BATCH = 4
TUNE_RATE = 1e-3
# The decoder will be given latents that diffusion left imperfect: noise up to this deviation, in scaled ones.
TUNE_NOISE = 0.12
CACHED_PICTURES = 10_000

_KL_WEIGHT = 3e-4
# Pixels within 2 px of an edge count this much more: edges are few, and all that is hard.
_EDGE_WEIGHT = 3.0
_EDGE_WINDOW = 5
_RANDOM_COLOURS = 0.15
_ENCODING_BATCH = 20
# Small shapes are the hard ones for an 8x autoencoder.
_VAE_SIZES = ("small", "small", "medium", "large")
_LATENT_SIZES = ("small", "small", "small", "small", "medium", "medium", "medium", "large", "large", "large")

Pixels = npt.NDArray[np.uint8]
Coverage = npt.NDArray[np.float32]


def half_precision() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: a step of the autoencoder then takes two thirds."""
    return bool(torch.cpu._is_amx_tile_supported())  # pyright: ignore[reportPrivateUsage]


def train(folder: Path, rank: int) -> tuple[AutoencoderKL, torch.Tensor]:
    """The finished autoencoder, and the scaled latents of the data set (N, 4, 16, 16): mean 0, std .5."""
    torch.manual_seed(0)
    vae = model.vae()
    _train_both(vae, folder, rank)
    latents = cached_latents(vae, folder, rank)
    latents = model.standardise(vae, latents) * model.SCALING
    _tune_decoder(vae, latents, folder, rank)
    return vae, latents


def _train_both(vae: AutoencoderKL, folder: Path, rank: int) -> None:
    """Encoder and decoder, on ever larger crops."""
    stage = Stage({"vae": vae}, list(vae.parameters()), folder / "vae.pt", rank, decay=0.995)
    plan = [(side, count) for side, count, steps in PHASES for _ in range(steps)]
    seen = np.cumsum([side * side * count for side, count in plan])
    while stage.step < len(plan):
        side, count = plan[stage.step]
        rng = shapes.generator(f"vae {rank} {stage.step}")
        target, coverage = crops(rng, side, count)
        generator = torch.Generator().manual_seed(stage.step * WORKERS + rank)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_precision()):
            moments = vae.encode(target).latent_dist.parameters
            mean, log_variance = moments.float().chunk(2, dim=1)
            noise = torch.randn(mean.shape, generator=generator)
            picture = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(picture.float(), target, coverage) + _KL_WEIGHT * divergence
        stage.advance(loss, cosine(float(seen[stage.step] / seen[-1]), PEAK_RATE, stage.step))
    stage.finish()


def reconstruction_loss(picture: torch.Tensor, target: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """L1 (edges count more), squared error, and L1 of the gradients.

    Pictures (N, 3, S, S) in -1..1; coverage (N, 1, S, S) in 0..1 tells where the edges are.
    """
    margin = _EDGE_WINDOW // 2
    high = functional.max_pool2d(coverage, _EDGE_WINDOW, 1, margin)
    low = -functional.max_pool2d(-coverage, _EDGE_WINDOW, 1, margin)
    weight = 1 + _EDGE_WEIGHT * (high - low)
    error = picture - target
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return (weight * error.abs()).mean() + 2 * error.square().mean() + 0.5 * (across + down)


def crops(rng: random.Random, side: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops around an edge: pictures (N, 3, side, side) in -1..1, coverage (N, 1, side, side)."""
    allowed = shapes.training_combos()
    pictures: list[Pixels] = []
    coverages: list[Coverage] = []
    for _ in range(count):
        scene = shapes.Scene(*rng.choice(allowed), size=rng.choice(_VAE_SIZES))
        coverage = shapes.mask(scene.shape, shapes.place(scene.size, rng))
        coverage = _edge_crop(coverage, side, rng)
        inside, outside = shapes.jittered(scene.colour, rng), shapes.jittered(scene.background, rng)
        if rng.random() < _RANDOM_COLOURS:
            inside, outside = _any_colour(rng), _any_colour(rng)
        pictures.append(shapes.blend(coverage, inside, outside))
        coverages.append(coverage)
    return as_tensor(pictures), torch.from_numpy(np.stack(coverages)[:, None].copy())


def _any_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _edge_crop(coverage: Coverage, side: int, rng: random.Random) -> Coverage:
    """A (side, side) window whose middle lies near a random edge pixel."""
    if side == shapes.SIDE:
        return coverage
    # Not the half-covered pixels: a square can lie exactly on the pixel grid.
    steps = np.abs(np.diff(coverage, axis=0))[:, :-1] + np.abs(np.diff(coverage, axis=1))[:-1]
    edges = np.argwhere(steps > 0.3)
    y, x = edges[rng.randrange(len(edges))]
    room = shapes.SIDE - side
    top = min(room, max(0, int(y) - side // 2 + rng.randint(-side // 4, side // 4)))
    left = min(room, max(0, int(x) - side // 2 + rng.randint(-side // 4, side // 4)))
    return coverage[top : top + side, left : left + side]


def as_tensor(pictures: list[Pixels]) -> torch.Tensor:
    """(H, W, 3) uint8 pictures -> (N, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def cached_scene(index: int) -> tuple[shapes.Scene, random.Random]:
    """The scene of a picture of the data set, and the generator that draws it: the same at every call."""
    rng = shapes.generator(f"picture {index}")
    return shapes.Scene(*rng.choice(shapes.training_combos()), size=rng.choice(_LATENT_SIZES)), rng


def cached_picture(index: int) -> Pixels:
    """One picture of the data set, (128, 128, 3) uint8."""
    scene, rng = cached_scene(index)
    return shapes.render(scene, rng)


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, folder: Path, rank: int) -> torch.Tensor:
    """Unscaled latent means of the data set, (N, 4, 16, 16) float32; each process encodes its share."""
    files = [folder / f"latents-{worker}.pt" for worker in range(WORKERS)]
    if not files[rank].exists():
        log(rank, f"encoding {CACHED_PICTURES} pictures")
        share: list[torch.Tensor] = []
        for start in range(rank * _ENCODING_BATCH, CACHED_PICTURES, WORKERS * _ENCODING_BATCH):
            pixels = as_tensor([cached_picture(i) for i in range(start, start + _ENCODING_BATCH)])
            with torch.autocast("cpu", torch.bfloat16, enabled=half_precision()):
                share.append(vae.encode(pixels).latent_dist.mean.float())
        torch.save(torch.stack(share), files[rank])
    dist.barrier()
    # Blocks of _ENCODING_BATCH pictures went to the processes in turn.
    blocks = torch.stack([torch.load(file, weights_only=True) for file in files], dim=1)
    return blocks.reshape(CACHED_PICTURES, 4, 16, 16)


def _tune_decoder(vae: AutoencoderKL, latents: torch.Tensor, folder: Path, rank: int) -> None:
    """Decoder alone, on slightly wrong scaled latents (N, 4, 16, 16): the encoder's output stays as it is."""
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    stage = Stage({"vae": vae}, parameters, folder / "decoder.pt", rank, decay=0.995)
    while stage.step < TUNE_STEPS:
        rng = shapes.generator(f"decoder {rank} {stage.step}")
        indices = [rng.randrange(CACHED_PICTURES) for _ in range(TUNE_BATCH)]
        target = as_tensor([cached_picture(i) for i in indices])
        generator = torch.Generator().manual_seed(stage.step * WORKERS + rank)
        deviation = TUNE_NOISE * torch.rand((TUNE_BATCH, 1, 1, 1), generator=generator)
        noisy = latents[indices] + deviation * torch.randn((TUNE_BATCH, 4, 16, 16), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_precision()):
            picture = vae.decode(noisy / model.SCALING).sample
        loss = reconstruction_loss(picture.float(), target, two_colour_coverage(target))
        stage.advance(loss, cosine(stage.step / TUNE_STEPS, TUNE_RATE, stage.step))
    stage.finish()


def two_colour_coverage(pictures: torch.Tensor) -> torch.Tensor:
    """Coverage (N, 1, S, S) of pictures of two flat colours: distance from the corner over the largest."""
    distance = (pictures - pictures[..., :1, :1]).square().sum(dim=1, keepdim=True).sqrt()
    return distance / distance.amax(dim=(2, 3), keepdim=True).clamp(min=1e-3)
