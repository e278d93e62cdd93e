"""Trains the demo's IP-Adapter: `python -m latentrt.demo.train_ip_adapter`, with the extra `[export]`.

First an image encoder learns to name what drawn pictures show, as one of CLIP comes to an IP-Adapter with
knowledge. Then it is trained on together with the image projection and the keys and values. The model teaches
them: what a sentence makes of it a picture has to make of it too, at first in each attention, then in the
noise that is predicted. It stays as it is. One thread, fixed numbers of steps and fixed seeds; held-out
combinations are never drawn.
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

FIRST_STEPS = 1500
FIRST_BATCH, BATCH = 32, 12
PICTURES = 600
WEIGHTS = "ip_adapter.safetensors"

_FIRST_RATE = 2e-3
_WEIGHING = (0.5, 0.5)  # as for adapters
_TOKENS = 4  # as diffusers takes of a plain IP-Adapter
_SIDE, _PATCH = 64, 8  # of the pictures that the encoder sees
# Of samples that have no picture; that have no sentence; and that have one which says another shape.
_NO_PICTURES, _NO_SENTENCES, _OTHER_SHAPES = 0.08, 0.75, 0.1


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


@dataclass(frozen=True)
class Batch:
    """What a step sees: noisy latents, and what they are to be denoised by.

    `kept` is what is left of the signal's power. `taught` is the context (N, 77, 96) of the sentence by which
    the model shall be imitated, and `context` that of the sentence that comes beside the picture's embedding.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    kept: torch.Tensor
    taught: torch.Tensor
    context: torch.Tensor
    embeddings: torch.Tensor


def batches(parts: Parts, learner: Pupil, stage: str, steps: int) -> Iterator[Batch]:
    """One for each step."""
    rng = shapes.generator("likeness pictures")
    scenes = [shapes.sample(rng, shapes.training_combos()) for _ in range(PICTURES)]
    latents = torch.cat([latents_of(parts, scene, f"likeness {i}") for i, scene in enumerate(scenes)])
    signal = model.scheduler().alphas_cumprod.float()
    for step in range(steps):
        rng = shapes.generator(f"likeness {stage} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        chosen = rng.sample(range(PICTURES), BATCH)
        asked = [_asked(scenes[i], rng) for i in chosen]
        pictured = [rng.random() >= _NO_PICTURES for _ in asked]
        pairs = zip(asked, pictured, strict=True)
        sentences = [one.wanted.prompt() if shown else one.prompt for one, shown in pairs]
        timesteps = ((torch.arange(BATCH) + torch.rand((BATCH,), generator=generator)) * 1000 / BATCH).long()
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=generator)
        kept = signal[timesteps].view(-1, 1, 1, 1)
        pixels = pixels_of((one.shown for one in asked), rng)
        with torch.no_grad():
            taught, context = encode(parts, sentences), encode(parts, [one.prompt for one in asked])
        # Without a picture its embedding is zero, as diffusers has it in unconditional rows.
        embeddings = learner.encoder(pixels).image_embeds * torch.tensor(pictured)[:, None]
        noisy = kept.sqrt() * latents[chosen] + (1 - kept).sqrt() * noise
        yield Batch(noisy, timesteps, kept, taught, context, embeddings)


def whole_loss(parts: Parts, learner: Pupil, batch: Batch) -> torch.Tensor:
    """How far the predicted noise is from what the model predicts by the sentence."""
    with torch.no_grad():
        wanted = parts.unet(batch.noisy, batch.timesteps, batch.taught).sample
    found = learner(batch.noisy, batch.timesteps, batch.context, batch.embeddings)
    return (weights_of(batch.kept, _WEIGHING) * (found - wanted).square()).mean()


def layer_loss(parts: Parts, learner: Pupil, batch: Batch) -> torch.Tensor:
    """How far each attention to a picture is from what the sentence adds there, relative to its size.

    A step is half as long as with `whole_loss`, as no gradient goes through the model, and teaches more: each
    layer is told what it has to say.
    """
    seen: dict[str, torch.Tensor] = {}
    names = cross_attentions(parts.unet).values()
    hooks = [
        parts.unet.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0]})
        )
        for name in names
    ]
    with torch.no_grad():
        parts.unet(batch.noisy, batch.timesteps, batch.taught)
    for hook in hooks:
        hook.remove()
    (tokens,) = learner.unet.encoder_hid_proj([batch.embeddings[:, None]])  # (N, 1, 4, 96)
    tokens = tokens.flatten(1, 2)
    losses: list[torch.Tensor] = []
    for name in names:
        layer, own = parts.unet.get_submodule(name), learner.unet.get_submodule(name).processor
        with torch.no_grad():
            query = layer.to_q(seen[name])
            taught, context = (
                _attended(layer, query, layer.to_k(text), layer.to_v(text))
                for text in (batch.taught, batch.context)
            )
        found = _attended(layer, query, own.to_k_ip[0](tokens), own.to_v_ip[0](tokens))
        wanted = taught - context
        losses.append((found - wanted).square().mean() / wanted.square().mean())
    return torch.stack(losses).mean()


def _attended(layer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What an attention adds to its input (N, places, C), without its bias; keys and values (N, T, C)."""
    q, k, v = (part.unflatten(2, (layer.heads, -1)).transpose(1, 2) for part in (query, key, value))
    found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return nn.functional.linear(found, layer.to_out[0].weight)


# (its name, the loss, steps, peak learning rates of the adapter and of the encoder) of each stage
STAGES = (("layers", layer_loss, 1000, 2e-3, 5e-4), ("whole", whole_loss, 200, 5e-4, 1e-4))


def train(parts: Parts, learner: Pupil, stage: int) -> Iterator[float]:
    """Train the IP-Adapter and the encoder for a stage, one step at a time; the losses."""
    name, loss_of, steps, peak, slower = STAGES[stage]
    adapter, encoder = learner.adapter(), list(learner.encoder.parameters())
    groups = [{"params": adapter}, {"params": encoder, "share": slower / peak}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    for step, batch in enumerate(batches(parts, learner, name, steps)):
        loss = loss_of(parts, learner, batch)
        _step(optimiser, [*adapter, *encoder], loss, step, steps, peak)
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
    for number, (name, *_) in enumerate(STAGES):
        logged(name, train(parts, learner, number))
    encoder.half().save_pretrained(arguments.out / "image_encoder")
    halves = {name: value.detach().half().contiguous() for name, value in learner.tensors().items()}
    save_file(halves, arguments.out / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
