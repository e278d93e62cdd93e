"""Trains the demo's IP-Adapter: `python -m latentrt.demo.train_ip_adapter`, with the extra `[export]`.

First an image encoder learns to name what drawn pictures show, as one of CLIP comes to an IP-Adapter with
knowledge. Then it is trained on together with the image projection and the keys and values: where the model
predicts noise by a sentence, it has to predict the same by a picture. The model stays as it is. One thread,
a fixed number of steps and fixed seeds; held-out combinations are never drawn.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from . import model, shapes
from .likeness import SEEN, Asked, alone, another_shape, with_shape
from .model import TEXT_WIDTH, Parts, encode
from .parallel import cosine
from .shapes import Placement, Scene
from .train_adapters import latents_of, open_parts
from .train_controlnet import logged
from .train_unet import weights_of

FIRST_STEPS, STEPS = 1500, 500
FIRST_BATCH, BATCH = 32, 12
PICTURES = 600
WEIGHTS = "ip_adapter.safetensors"

_FIRST_RATE, _RATE, _ENCODER_RATE = 2e-3, 2e-3, 2e-4
_WEIGHING = (0.5, 0.5)  # as for adapters
_TOKENS = 4  # as diffusers takes of a plain IP-Adapter
_SIDE, _PATCH = 64, 8  # of the pictures that the encoder sees
# Of samples that have no picture; that have no sentence; and that have one which says another shape.
_NO_PICTURES, _NO_SENTENCES, _OTHER_SHAPES = 0.08, 0.6, 0.3


def image_encoder() -> CLIPVisionModelWithProjection:
    """Three layers of CLIP's vision model, 8x8 patches of 8 pixels each; heads 32 wide.

    Its patches begin with the waves of their places: by CLIP's initialisation places are faint, and shapes,
    which are made of places, were learned too late.
    """
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=_SIDE,
            patch_size=_PATCH,
            hidden_act="quick_gelu",
        )
    )
    places = encoder.get_submodule("vision_model.embeddings.position_embedding").weight
    with torch.no_grad():
        places[1:] = waves(_SIDE // _PATCH, places.shape[1])  # the first is none of a patch
    return encoder


def waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of rows and of columns, (side * side, width): a quarter of the width each."""
    frequencies = torch.pi / side * 2 ** torch.linspace(-1, 2, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def processor() -> CLIPImageProcessor:
    """What diffusers' pipelines make of a picture for an encoder of that size."""
    return CLIPImageProcessor(size=_SIDE, crop_size=_SIDE)


def pixels_of(scenes: Iterable[Scene], rng: random.Random) -> torch.Tensor:
    """Drawn pictures as the encoder sees them, (N, 3, 64, 64)."""
    pictures = [shapes.render(scene, rng) for scene in scenes]
    return processor()(images=pictures, return_tensors="pt").pixel_values


def drawn_small(scene: Scene, rng: random.Random) -> tuple[npt.NDArray[np.uint8], torch.Tensor]:
    """A picture drawn at the encoder's size, (64, 64, 3) uint8, and its mask by patches, (64, 64) float32."""
    large = shapes.place(scene.size, rng)
    scale = _SIDE / shapes.SIDE
    coverage = shapes.mask(
        scene.shape, Placement(scale * large.x, scale * large.y, scale * large.radius), side=_SIDE
    )
    colours = (shapes.jittered(colour, rng) for colour in (scene.colour, scene.background))
    patches = torch.from_numpy(coverage.copy()).unfold(0, _PATCH, _PATCH).unfold(1, _PATCH, _PATCH)
    return shapes.blend(coverage, *colours), patches.flatten(2).flatten(0, 1)


def learn_to_see(encoder: CLIPVisionModelWithProjection) -> Iterator[float]:
    """Teach the encoder to name what it sees, one step at a time; the losses.

    And to trace it: each patch has to know where in it the shape is, whatever the colours. By names alone it
    learned 3000 pictures by heart, and a third of the shapes of others.
    """
    config = encoder.config
    heads = nn.ModuleList(nn.Linear(config.projection_dim, len(values)) for values in SEEN.values())
    trace = nn.Linear(config.hidden_size, _PATCH**2)
    parameters = [*encoder.parameters(), *heads.parameters(), *trace.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.01)
    for step in range(FIRST_STEPS):
        rng = shapes.generator(f"likeness first {step}")
        scenes = [shapes.sample(rng, shapes.training_combos()) for _ in range(FIRST_BATCH)]
        pictures, masks = zip(*(drawn_small(scene, rng) for scene in scenes), strict=True)
        seen = encoder(processor()(images=list(pictures), return_tensors="pt").pixel_values)
        traced = nn.functional.binary_cross_entropy_with_logits(
            trace(seen.last_hidden_state[:, 1:]), torch.stack(masks)
        )
        named = [
            nn.functional.cross_entropy(
                head(seen.image_embeds), torch.tensor([values.index(getattr(one, name)) for one in scenes])
            )
            for head, (name, values) in zip(heads, SEEN.items(), strict=True)
        ]
        _step(optimiser, parameters, torch.stack([*named, 4 * traced]).sum(), step, FIRST_STEPS, _FIRST_RATE)
        yield float(torch.stack(named).sum().detach())


def _step(
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    loss: torch.Tensor,
    step: int,
    steps: int,
    peak: float,
) -> None:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimiser.param_groups:
        group["lr"] = cosine(step / steps, peak, step, warmup=50) * group.get("share", 1.0)
    optimiser.step()


def cross_attentions(unet: UNet2DConditionModel) -> dict[int, str]:
    """The attentions to a prompt, by their numbers in an IP-Adapter: diffusers' order, down, up, middle."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {number: name for number, name in enumerate(names) if name.endswith("attn2")}


def fresh(unet: UNet2DConditionModel, width: int) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter that knows nothing: the model's own keys and values, and a random projection."""
    adapter: dict[str, torch.Tensor] = {}
    for number, name in cross_attentions(unet).items():
        for letter in "kv":
            own = unet.get_submodule(f"{name}.to_{letter}").weight
            adapter[f"{number}.to_{letter}_ip.weight"] = own.detach().clone()
    projection = nn.Linear(width, _TOKENS * TEXT_WIDTH)
    norm = nn.LayerNorm(TEXT_WIDTH)
    parts = {"proj": projection, "norm": norm}
    image_proj = {
        f"{part}.{name}": value.detach().clone()
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }
    return {"image_proj": image_proj, "ip_adapter": adapter}


@dataclass(frozen=True)
class Pupil:
    """The image encoder, and the model with an IP-Adapter in it."""

    encoder: CLIPVisionModelWithProjection
    unet: UNet2DConditionModel

    def adapter(self) -> list[nn.Parameter]:
        """The weights of the IP-Adapter."""
        layers = [value for name, value in self.unet.named_parameters() if "_ip." in name]
        return [*layers, *self.unet.encoder_hid_proj.parameters()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same by the names of a file."""
        projection = self.unet.encoder_hid_proj.image_projection_layers[0]
        found = {
            f"image_proj.{name.replace('image_embeds.', 'proj.')}": value
            for name, value in projection.named_parameters()
        }
        for number, name in cross_attentions(self.unet).items():
            for letter in "kv":
                layers = getattr(self.unet.get_submodule(name).processor, f"to_{letter}_ip")
                found[f"ip_adapter.{number}.to_{letter}_ip.weight"] = layers[0].weight
        return found

    def __call__(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """The noise, by a context (N, 77, 96) and embeddings of pictures (N, 64)."""
        added = {"image_embeds": [embeddings[:, None]]}
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample


def pupil(checkpoint: Path, encoder: CLIPVisionModelWithProjection) -> Pupil:
    """The model with a new IP-Adapter, which alone is to be trained."""
    torch.manual_seed(1)
    unet = open_parts(checkpoint).unet
    unet._load_ip_adapter_weights([fresh(unet, encoder.config.projection_dim)])
    found = Pupil(encoder, unet)
    for parameter in found.adapter():
        parameter.requires_grad_(True)
    return found


def train(parts: Parts, learner: Pupil) -> Iterator[float]:
    """Train the IP-Adapter and the encoder, one step at a time; the losses."""
    rng = shapes.generator("likeness pictures")
    scenes = [shapes.sample(rng, shapes.training_combos()) for _ in range(PICTURES)]
    latents = torch.cat([latents_of(parts, scene, f"likeness {i}") for i, scene in enumerate(scenes)])
    signal = model.scheduler().alphas_cumprod.float()
    adapter, encoder = learner.adapter(), list(learner.encoder.parameters())
    groups = [{"params": adapter}, {"params": encoder, "share": _ENCODER_RATE / _RATE}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(STEPS):
        rng = shapes.generator(f"likeness {step}")
        generator = torch.Generator().manual_seed(step)
        chosen = rng.sample(range(PICTURES), BATCH)
        asked = [_asked(scenes[i], rng) for i in chosen]
        pictured = [rng.random() >= _NO_PICTURES for _ in asked]
        sentences = [
            one.wanted.prompt() if shown else one.prompt for one, shown in zip(asked, pictured, strict=True)
        ]
        timesteps = ((torch.arange(BATCH) + torch.rand((BATCH,), generator=generator)) * 1000 / BATCH).long()
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=generator)
        kept = signal[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents[chosen] + (1 - kept).sqrt() * noise
        with torch.no_grad():
            taught = parts.unet(noisy, timesteps, encode(parts, sentences)).sample
            context = encode(parts, [one.prompt for one in asked])
        # Without a picture its embedding is zero, as diffusers has it in unconditional rows.
        pixels = pixels_of((one.shown for one in asked), rng)
        embeddings = learner.encoder(pixels).image_embeds * torch.tensor(pictured)[:, None]
        error = learner(noisy, timesteps, context, embeddings) - taught
        loss = (weights_of(kept, _WEIGHING) * error.square()).mean()
        _step(optimiser, [*adapter, *encoder], loss, step, STEPS, _RATE)
        yield float(loss.detach())


def _asked(wanted: Scene, rng: random.Random) -> Asked:
    """A picture, and often a sentence, that ask for a scene."""
    chance = rng.random()
    if chance < _NO_SENTENCES:
        return alone(wanted)
    if chance < _NO_SENTENCES + _OTHER_SHAPES:
        return with_shape(another_shape(wanted, rng, shapes.training_combos()), wanted.shape)
    return Asked(wanted, shapes.describe(wanted, rng), wanted)


def main() -> None:
    """Parse the command line, train, and write what diffusers loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/controls/likeness"), help="their folder")
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoint"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = image_encoder()
    logged("encoder", learn_to_see(encoder))
    learner, parts = pupil(arguments.checkpoint, encoder), open_parts(arguments.checkpoint)
    for unet in (learner.unet, parts.unet):  # a fifth faster on a CPU
        unet.to(memory_format=torch.channels_last)
    logged("adapter", train(parts, learner))
    encoder.half().save_pretrained(arguments.out / "image_encoder")
    halves = {name: value.detach().half().contiguous() for name, value in learner.tensors().items()}
    save_file(halves, arguments.out / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
