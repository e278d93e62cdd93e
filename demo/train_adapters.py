"""Trains the demo's adapters: `python -m latentrt.demo.train_adapters`, with the extra `[export]`.

Two LoRAs and an embedding (textual inversion) for what the model cannot draw: a texture and two shapes.
Each is trained on one thread, on drawn pictures, with a fixed number of steps and fixed seeds; held-out
combinations are never drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import CLIPTextModel

from . import model, shapes
from .lessons import LESSONS, Lesson
from .model import SCALING, Parts
from .parallel import cosine
from .train_unet import noise_loss

BATCH = 12

_LOG_EVERY = 50
# A LoRA is trained at strengths between this and 1, so that what it adds grows with the strength.
_WEAKEST = 0.6
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with a cosine of its own, on so many pictures, in these sizes.

    `weighing` are the floor and power of the loss (see `train_unet`): with a high floor the noisiest steps
    count, which decide whether there will be stripes or a hole at all.
    """

    steps: int
    rate: float
    pictures: int = 600
    sizes: tuple[str, ...] = shapes.SIZES
    weighing: tuple[float, float] = (0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a lesson is trained.

    `targets` are the ends of the names of the modules that get a LoRA, by net. `ordinary` is the share
    of scenes without what is taught, so that other words keep their meaning, and `empty` that of empty
    prompts. An embedding starts as the vectors of the words `start`.
    """

    stages: tuple[Stage, ...]
    rank: int = 8
    alpha: float = 8.0
    grammar: str = "peft"
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    start: tuple[str, ...] = ()
    ordinary: float = 0.0
    empty: float = 0.1


RECIPES = {
    "striped": Recipe(
        stages=(Stage(steps=700, rate=8e-3),),
        alpha=4.0,
        grammar="kohya",
        targets={"unet": (*_ATTENTION, *_CONVOLUTIONS)},
    ),
    "cross": Recipe(
        stages=(Stage(steps=250, rate=6e-3),),
        targets={"unet": (*_ATTENTION, *_CONVOLUTIONS), "text_encoder": _TEXT},
        ordinary=0.3,
    ),
    "frame": Recipe(
        stages=(
            Stage(steps=800, rate=4e-3),
            # Of large frames, where a hole shows best, and with more of the steps in which it gets its edge.
            Stage(steps=200, rate=4e-3, pictures=300, sizes=("large",), weighing=(0.1, 0.5)),
        ),
        start=("square", "ring") * 3,
        empty=0.0,  # there is nothing of it in an empty prompt
    ),
}


class LowRank(nn.Module):
    """A weight plus a LoRA's change of it: up (out, rank) @ down (rank, in), times alpha / rank."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.strength = 1.0
        self.down = nn.Parameter(torch.randn((rank, *weight.shape[1:])) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros((weight.shape[0], rank, *(1 for _ in weight.shape[2:]))))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, in the weight's own shape."""
        change = self.up.flatten(1) @ self.down.flatten(1)
        return weight + self.strength * self.scale * change.view_as(weight)


class Extended(nn.Module):
    """A table of token embeddings with further rows behind it, which are trained."""

    def __init__(self, table: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (N, T) -> embeddings (N, T, width)."""
        return nn.functional.embedding(ids, torch.cat([self.table, self.rows]))


def open_parts(checkpoint: Path) -> Parts:
    """The demo model in float32, frozen."""
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder", dtype=torch.float32)
    for net in (vae, unet, text_encoder):
        net.requires_grad_(False).eval()
    words = Tokenizer.from_file(str(checkpoint / "tokenizer" / "tokenizer.json"))
    return Parts(vae, unet, text_encoder, words)


def add_lora(parts: Parts, recipe: Recipe) -> dict[tuple[str, str], LowRank]:
    """Put a LoRA into the nets; by net and name of the module."""
    added: dict[tuple[str, str], LowRank] = {}
    for net, ends in recipe.targets.items():
        for name, module in list(getattr(parts, net).named_modules()):
            if name.endswith(tuple(f".{end}" for end in ends)):
                added[net, name] = LowRank(module.weight, recipe.rank, recipe.alpha)
                register_parametrization(module, "weight", added[net, name])
    return added


def words_of(lesson: Lesson, recipe: Recipe) -> list[str]:
    """The tokens that a lesson's word stands for, one for each vector."""
    return [f"<{lesson.name}-{i}>" for i in range(len(recipe.start))]


def add_vectors(parts: Parts, lesson: Lesson, recipe: Recipe) -> Extended:
    """Give the lesson's word embeddings of its own, at first those of known words."""
    table = parts.text_encoder.get_input_embeddings().weight
    extended = Extended(table, table[[parts.tokenizer.token_to_id(word + "</w>") for word in recipe.start]])
    parts.text_encoder.set_input_embeddings(extended)
    parts.tokenizer.add_tokens(words_of(lesson, recipe))
    return extended


@torch.no_grad()
def latents_of(parts: Parts, scene: shapes.Scene, key: str) -> torch.Tensor:
    """Scaled latents of a drawn scene, (1, 4, 16, 16)."""
    picture = torch.from_numpy(shapes.render(scene, shapes.generator(key)))
    pixels = picture.permute(2, 0, 1)[None] / 127.5 - 1
    return parts.vae.encode(pixels).latent_dist.mean * SCALING


def lesson_pictures(
    parts: Parts, lesson: Lesson, recipe: Recipe, stage: Stage
) -> tuple[list[shapes.Scene], torch.Tensor]:
    """Random scenes of training, some of them ordinary ones, and their scaled latents."""
    rng = shapes.generator(f"{lesson.name} pictures")
    combos, ordinary = lesson.training(), shapes.training_combos()
    scenes = [
        shapes.sample(rng, ordinary)
        if rng.random() < recipe.ordinary
        else lesson.scene(rng.choice(combos), rng.choice(stage.sizes))
        for _ in range(stage.pictures)
    ]
    latents = [latents_of(parts, scene, f"{lesson.name} {i}") for i, scene in enumerate(scenes)]
    return scenes, torch.cat(latents)


def train(
    parts: Parts, lesson: Lesson, recipe: Recipe, stage: Stage, adapter: Sequence[LowRank | Extended]
) -> Iterator[float]:
    """Train what was added to the parts for a stage, one step at a time; the losses."""
    scenes, latents = lesson_pictures(parts, lesson, recipe, stage)
    signal = model.scheduler().alphas_cumprod.float()
    parameters = [parameter for module in adapter for parameter in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(stage.steps):
        rng = shapes.generator(f"{lesson.name} {step}")
        generator = torch.Generator().manual_seed(step)
        chosen = rng.sample(range(stage.pictures), BATCH)
        strength = rng.uniform(_WEAKEST, 1.0)
        prompts = [_prompt(lesson, recipe, scenes[i], rng) for i in chosen]
        for low in (module for module in adapter if isinstance(module, LowRank)):
            low.strength = strength
        timesteps = ((torch.arange(BATCH) + torch.rand((BATCH,), generator=generator)) * 1000 / BATCH).long()
        loss = noise_loss(parts, latents[chosen], prompts, timesteps, signal, generator, stage.weighing)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = cosine(step / stage.steps, stage.rate, step, warmup=20)
        optimiser.step()
        yield float(loss.detach())


def _prompt(lesson: Lesson, recipe: Recipe, scene: shapes.Scene, rng: random.Random) -> str:
    """A sentence for a scene of training, or none; what has a new word is always called by it."""
    text = "" if rng.random() < recipe.empty else shapes.describe(scene, rng)
    if lesson.name == scene.shape and lesson.name not in text:
        text = scene.prompt()
    return text.replace(lesson.name, "".join(words_of(lesson, recipe)) or lesson.name)


def teach(parts: Parts, lesson: Lesson, recipe: Recipe, file: Path) -> None:
    """Train one adapter and write it."""
    torch.manual_seed(0)
    lora = add_lora(parts, recipe)
    vectors = add_vectors(parts, lesson, recipe) if recipe.start else None
    losses: list[float] = []
    adapter = [vectors] if vectors else list(lora.values())
    for loss in chain.from_iterable(train(parts, lesson, recipe, stage, adapter) for stage in recipe.stages):
        losses.append(loss)
        if len(losses) % _LOG_EVERY == 0:
            print(
                f"{lesson.name} {len(losses)} loss {sum(losses[-_LOG_EVERY:]) / _LOG_EVERY:.4f}", flush=True
            )
    if vectors:
        tensors = {lesson.name: vectors.rows}  # as diffusers writes an embedding
    else:
        tensors = {
            key: value for place, low in lora.items() for key, value in GRAMMARS[recipe.grammar](*place, low)
        }
    halves = {key: value.detach().half().contiguous() for key, value in tensors.items()}
    save_file(halves, file, metadata=metadata(lesson, recipe))


def kohya_tensors(net: str, module: str, low: LowRank) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's tensors as sd-scripts names them."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[net]
    name = prefix + module.replace(".", "_")
    yield f"{name}.lora_down.weight", low.down
    yield f"{name}.lora_up.weight", low.up
    yield f"{name}.alpha", torch.tensor(low.scale * low.down.shape[0])


def peft_tensors(net: str, module: str, low: LowRank) -> Iterator[tuple[str, torch.Tensor]]:
    """The same as PEFT names them: without alpha, so alpha is the rank."""
    name = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}[net] + module
    yield f"{name}.lora_A.weight", low.down
    yield f"{name}.lora_B.weight", low.up * low.scale


GRAMMARS = {"kohya": kohya_tensors, "peft": peft_tensors}


def metadata(lesson: Lesson, recipe: Recipe) -> dict[str, str]:
    """What sd-scripts says of a file; others say nothing."""
    if recipe.grammar != "kohya":
        return {"format": "pt"}
    return {
        "format": "pt",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.alpha),
        "ss_network_args": json.dumps({"conv_dim": str(recipe.rank), "conv_alpha": str(recipe.alpha)}),
        "ss_output_name": lesson.name,
        "ss_steps": str(sum(stage.steps for stage in recipe.stages)),
        "ss_v2": "False",
    }


def main() -> None:
    """Parse the command line and train one adapter after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LESSONS), help=f"of {', '.join(LESSONS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder with adapters/ and embeddings/"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoint"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        recipe = RECIPES[name]
        file: Path = arguments.out / ("embeddings" if recipe.start else "adapters") / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        teach(open_parts(arguments.checkpoint), LESSONS[name], recipe, file)
        print(f"{file}: {file.stat().st_size} bytes after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
