"""Trains the demo's ControlNet: `python -m latentrt.demo.train_controlnet`, with the extra `[export]`.

Its hints are edges, white on black, as `runtime.controls.canny` finds them in a picture. The model stays as
it is. One thread, drawn pictures, a fixed number of steps and fixed seeds; held-out combinations are never
drawn.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from ..runtime.controls.canny import canny
from . import model, shapes
from .checker import size_of
from .model import SCALING, Parts, encode
from .parallel import cosine
from .placed import Placed, anywhere
from .shapes import Combo, Scene
from .train_adapters import open_parts
from .train_unet import weights_of


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """Steps with one fall of the learning rate from its peak.

    A scene is as frequent as its faintness to the power `frequent`, its loss multiplied by that to the power
    `heavy`.
    """

    steps: int
    peak: float
    frequent: int = 0
    heavy: int = 0


# An error in a faint shape is a small one: of 100 held-out drawings 75 were followed after the first cycle,
# then 80, then 85, and those that were not are faint.
CYCLES = (
    Cycle(steps=500, peak=2e-3),
    Cycle(steps=600, peak=1e-3, frequent=1),
    Cycle(steps=500, peak=1e-3, frequent=1, heavy=2),
    Cycle(steps=600, peak=1e-3, frequent=1, heavy=2),
)
BATCH = 12
PICTURES = 1500  # of each cycle

_LOG_EVERY = 50
_EMPTY_PROMPTS = 0.15
# So often the prompt says another shape than the edges: they have to win.
_WRONG_PROMPTS = 0.2
_WEIGHING = (0.5, 0.5)  # as for adapters
_HINT_WIDTHS = (8, 16, 32, 64)  # of the convolutions that read the hint, each but the first half as large


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """One for the demo's UNet, with the UNet's weights, but without transformers.

    Edges say where, the prompt says what: a net that reads edges alone is half as large. As ever its outputs
    are zero before the training. Not so what reads the hint: by torch's own initialisation edges are lost on
    the way through its eight convolutions, and by diffusers' zeros behind them; after 300 steps the net had
    not begun to see any.
    """
    copied = ("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    own = {name: unet.config[name] for name in (*copied, "cross_attention_dim", "attention_head_dim")}
    net = ControlNetModel(
        **own,
        down_block_types=("DownBlock2D",) * len(unet.config["block_out_channels"]),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=_HINT_WIDTHS,
    )
    theirs, own_weights = unet.state_dict(), net.state_dict()
    net.load_state_dict({name: theirs.get(name, weight) for name, weight in own_weights.items()})
    for module in net.controlnet_cond_embedding.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net


def hint_of(placed: Placed) -> torch.Tensor:
    """The edges of a drawing, (1, 3, 128, 128): 1 where there are any."""
    return torch.from_numpy(canny(placed.drawing())).float().expand(1, 3, -1, -1)


def faintness(combo: Combo) -> float:
    """How near a colour is to its background, 1 at a distance of 255."""
    colour, _, ground = combo
    return 255 / math.dist(shapes.RGB[colour], shapes.RGB[ground])


@torch.no_grad()
def pictures(parts: Parts, number: int) -> tuple[list[Placed], torch.Tensor, torch.Tensor]:
    """Random scenes of a cycle, their scaled latents, and their hints."""
    rng = shapes.generator(f"placed pictures{number or ''}")
    combos, frequent = shapes.training_combos(), CYCLES[number].frequent
    weights = [faintness(combo) ** frequent for combo in combos]
    placed: list[Placed] = []
    for _ in range(PICTURES):
        place = anywhere(rng)
        combo = rng.choices(combos, weights)[0] if frequent else rng.choice(combos)
        placed.append(Placed(Scene(*combo, size=size_of(place.radius)), place))
    latents: list[torch.Tensor] = []
    for one in placed:
        pixels = torch.from_numpy(one.picture(rng)).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(parts.vae.encode(pixels).latent_dist.mean * SCALING)
    return placed, torch.cat(latents), torch.cat([hint_of(one) for one in placed])


def train(parts: Parts, net: ControlNetModel, number: int) -> Iterator[float]:
    """Train a ControlNet for a cycle, one step at a time; the losses."""
    cycle = CYCLES[number]
    placed, latents, hints = pictures(parts, number)
    scenes = [one.scene for one in placed]
    shares = torch.tensor([faintness((s.colour, s.shape, s.background)) ** cycle.heavy for s in scenes])
    optimiser = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(cycle.steps):
        seed = number * cycle.steps + step
        rng = shapes.generator(f"controlnet {seed}")
        chosen = rng.sample(range(PICTURES), BATCH)
        prompts = [_prompt(scenes[i], rng) for i in chosen]
        errors = _errors(parts, net, latents[chosen], hints[chosen], prompts, seed)
        loss = (errors * shares[chosen]).mean() / shares.mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = cosine(step / cycle.steps, cycle.peak, step, warmup=50)
        optimiser.step()
        yield float(loss.detach())


def _errors(
    parts: Parts,
    net: ControlNetModel,
    clean: torch.Tensor,
    hints: torch.Tensor,
    prompts: list[str],
    seed: int,
) -> torch.Tensor:
    """Squared errors (N,) of the noise that is predicted of latents (N, 4, 16, 16) with hints."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = ((torch.arange(BATCH) + torch.rand((BATCH,), generator=generator)) * 1000 / BATCH).long()
    noise = torch.randn(clean.shape, generator=generator)
    kept = model.scheduler().alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
    noisy, context = kept.sqrt() * clean + (1 - kept).sqrt() * noise, encode(parts, prompts)
    seen = net(noisy, timesteps, context, hints)
    predicted = parts.unet(
        noisy,
        timesteps,
        context,
        down_block_additional_residuals=seen.down_block_res_samples,
        mid_block_additional_residual=seen.mid_block_res_sample,
    ).sample
    return (weights_of(kept, _WEIGHING) * (predicted - noise).square()).mean(dim=(1, 2, 3))


def _prompt(scene: Scene, rng: random.Random) -> str:
    """A sentence for a scene of training, one with another shape, or none."""
    chance = rng.random()
    if chance < _EMPTY_PROMPTS:
        return ""
    if chance < _EMPTY_PROMPTS + _WRONG_PROMPTS:
        scene = replace(scene, shape=rng.choice(shapes.SHAPES))
    return shapes.describe(scene, rng)


def logged(name: str, losses: Iterator[float]) -> None:
    """Run a training, and print its mean losses."""
    for number, some in enumerate(iter(lambda: list(itertools.islice(losses, _LOG_EVERY)), []), 1):
        mean = sum(some) / len(some)
        print(f"{time.strftime('%H:%M:%S')} {name} {number * _LOG_EVERY} loss {mean:.4f}", flush=True)


def main() -> None:
    """Parse the command line, train, and write a folder as diffusers has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/controls/edges"), help="the net's folder")
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoint"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = open_parts(arguments.checkpoint)
    # A fifth faster on a CPU, and the same net.
    parts.unet.to(memory_format=torch.channels_last)
    net = controlnet(parts.unet).to(memory_format=torch.channels_last)
    losses = itertools.chain.from_iterable(train(parts, net, cycle) for cycle in range(len(CYCLES)))
    logged("controlnet", losses)
    net.register_to_config(_name_or_path="")  # else the folder of the cycle before stands in the file
    net.to(dtype=torch.float16, memory_format=torch.contiguous_format).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
