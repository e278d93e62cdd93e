"""The inputs that activation ranges are measured on: one small picture, drawn by the nets being measured.

Prompts go through the text encoders, their contexts and noise through a few DDIM steps with guidance, and the
latent of the last step through the decoders, so that each net sees what it sees in use. Made-up inputs miss
that: a UNet at timestep 0 has never met pure noise.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...engines.spec import TEXT_ENCODERS, Array
from ..checkpoint.open import Checkpoint
from ..nets.latent_rgb import colour_fields

# Float arrays in float32, by name; the net's outputs, in float32 too.
Call = Callable[[Mapping[str, Array]], list[Array]]

# The empty prompt is half of every guided call. The others: a usual one, and one that fills all 77 tokens.
PROMPTS = (
    "",
    "a photograph of an astronaut riding a horse",
    "masterpiece, best quality, " + "an old city by the sea at dawn, (detailed:1.3), sharp focus, 8k, " * 8,
)
STEPS = 4
GUIDANCE = 7.5
# Latent pixels a side, at most. Ranges hardly depend on the size of the picture; time and memory do.
SIDE = 32

_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps")


class Calibration:
    """Calls the nets of one checkpoint in the order of a picture; remembers what one hands to the next.

    A net that is asked for before the one that feeds it gets unit normal values instead.
    """

    def __init__(self, source: Checkpoint, seed: int = 0) -> None:
        self._source = source
        self._random = np.random.default_rng(seed)
        self._contexts: dict[str, Array] = {}  # by encoder, a row for each prompt
        self._vectors: dict[str, Array] = {}  # of VECTORS, a row for each prompt
        self._embeds: Array | None = None
        self._latent: Array | None = None

    def drive(self, component: str, call: Call) -> None:
        """Call a net once or more. `component`: a folder of the package; the UNet before hoisting."""
        drives: dict[str, Callable[[Call], None]] = {
            "text_encoder": lambda call: self._encode("text_encoder", call),
            "text_encoder_2": lambda call: self._encode("text_encoder_2", call),
            "image_encoder": self._embed,
            "image_noiser": self._noise,
            "vae_encoder": self._encode_pictures,
            "unet": self._denoise,
            "vae_decoder": self._decode,
            "preview_decoder": self._decode,
        }
        drives[component](call)

    def _encode(self, name: str, call: Call) -> None:
        """Prompts, and one row of ids from the whole vocabulary: (4, T) int32."""
        ids = token_ids(self._source, name)
        ids = np.concatenate([ids, ids[:1]]).astype(np.int32)
        size = int(self._source.parts[name].config["vocab_size"])
        ids[-1, 1:-1] = self._random.integers(0, size, ids.shape[1] - 2)
        context, *pooled = call({"input_ids": ids, "clip_skip": np.zeros(1, np.int32)})
        self._contexts[name] = context
        if pooled:
            self._vectors["text_embeds"] = pooled[0]

    def _embed(self, call: Call) -> None:
        """Smooth pictures and noise, which reaches further: (4, size, size, 3) uint8."""
        side = int(self._source.parts["image_encoder"].config.get("image_size", 224))
        self._embeds = call({"image": self._pictures(4, side, side)})[0]

    def _noise(self, call: Call) -> None:
        """The same pictures at little noise and at much; alpha and sigma as on a cosine."""
        if self._embeds is None:
            self._embeds = self._normal(
                4, int(self._source.parts["image_normalizer"].config["embedding_dim"])
            )
        for level, angle in ((0.0, 0.0), (500.0, np.pi / 4)):
            rows = {
                "image_embeds": self._embeds,
                "noise": self._normal(*self._embeds.shape),
                "noise_level": np.array([level], np.float32),
                "alpha": np.array([np.cos(angle)], np.float32),
                "sigma": np.array([np.sin(angle)], np.float32),
            }
            self._vectors["class_labels"] = call(rows)[0]

    def _encode_pictures(self, call: Call) -> None:
        """Smooth pictures and noise, with and without a mask, one at a time."""
        height, width = (side * self._source.latent_scale for side in _sides(self._source.unet.config))
        for number, picture in enumerate(self._pictures(4, height, width)):
            mask = np.zeros((1, height, width, 1), np.uint8)
            mask[:, : height // 2] = 255 * (number % 2)
            call({"image": picture[None], "mask": mask})

    def _pictures(self, count: int, height: int, width: int) -> Array:
        """Half of them noise: (count, height, width, 3) uint8."""
        smooth = colour_fields(count // 2, max(height, width), seed=0)[:, :height, :width]
        noise = self._random.integers(0, 256, (count - len(smooth), height, width, 3), np.uint8)
        return np.concatenate([smooth, noise])

    def _denoise(self, call: Call) -> None:
        """STEPS guided DDIM steps from noise, of rows (empty prompt, another)."""
        import torch

        config = self._source.unet.config
        contexts = self._joined_contexts()
        scheduler = _scheduler(self._source.scheduler)
        latent = self._normal(1, 4, *_sides(config))
        behind = self._image_latents(latent)
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            # Trained nets keep the variance at one; guidance, and random weights, may not.
            latent = latent / max(1.0, float(latent.std()))
            # Another prompt in every step: cross-attention's ranges depend on it more than the rest does.
            prompts = [0, 1 + step % (len(contexts) - 1)]
            sample = np.concatenate([latent, *behind], axis=1)
            rows = {
                "sample": np.concatenate([sample, sample]),
                "timestep": np.full(2, timestep, np.float32),
                "encoder_hidden_states": contexts[prompts],
                **{name: self._vector(name, width, prompts) for name, width in self._source.vectors.items()},
            }
            without, with_prompt = np.split(call(rows)[0], 2)
            guided = without + GUIDANCE * (with_prompt - without)
            moved = scheduler.step(torch.asarray(guided), timestep, torch.asarray(latent))
            latent = moved.prev_sample.numpy()
        self._latent = latent / max(1.0, float(latent.std()))

    def _joined_contexts(self) -> Array:
        """The encoders' features side by side: (prompts, T, width)."""
        found = [
            self._contexts[part.name] for part in self._source.text_encoders if part.name in self._contexts
        ]
        if len(found) == len(self._source.text_encoders):
            return np.concatenate(found, axis=2)
        return self._normal(2, 77, int(self._source.unet.config.get("cross_attention_dim", 1280)))

    def _image_latents(self, latent: Array) -> list[Array]:
        """What an inpainting UNet has behind the latent: the right half to be repainted, and a picture."""
        if not self._source.image_latents:
            return []
        mask = np.zeros_like(latent[:, :1])
        mask[..., mask.shape[-1] // 2 :] = 1
        return [mask, self._normal(*latent.shape)]

    def _vector(self, name: str, width: int, prompts: list[int]) -> Array:
        """Of VECTORS, a row for each of two prompts: (2, width)."""
        if name == "time_ids":
            height, wide = (side * self._source.latent_scale for side in _sides(self._source.unet.config))
            sizes = [height, wide, 0, 0, *([height, wide] if width == 6 else [6.0])]
            return np.array([sizes, sizes], np.float32)
        if name == "timestep_cond":
            return np.repeat(guidance_embedding(GUIDANCE, width), 2, axis=0)
        found = self._vectors.get(name)
        return self._normal(2, width) if found is None else found[prompts]

    def _decode(self, call: Call) -> None:
        """The latent of the last step, and noise, which reaches further: (2, 4, H/8, W/8)."""
        noise = self._normal(1, int(self._source.vae.config.get("latent_channels", 4)), SIDE, SIDE)
        drawn = noise if self._latent is None else self._latent
        for latent in (drawn, noise[..., : drawn.shape[-2], : drawn.shape[-1]]):
            call({"latent": latent})

    def _normal(self, *shape: int) -> Array:
        return self._random.standard_normal(shape, dtype=np.float32)


def token_ids(source: Checkpoint, encoder: str) -> Array:
    """PROMPTS as that encoder's tokenizer has them: (3, T) int64."""
    from transformers import CLIPTokenizer

    length = int(source.parts[encoder].config.get("max_position_embeddings", 77))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that only other tokenizers need
        files = Path(folder) / "tokenizer"
        source.tokenizers[TEXT_ENCODERS[encoder]].write(files)
        tokenizer: Any = cast(Any, CLIPTokenizer).from_pretrained(str(files))
        return tokenizer(
            list(PROMPTS), padding="max_length", max_length=length, truncation=True, return_tensors="np"
        ).input_ids


def guidance_embedding(scale: float, width: int) -> Array:
    """The vector `timestep_cond`: diffusers' `get_guidance_scale_embedding` of `scale` - 1, (1, width)."""
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(torch.tensor([(scale - 1) * 1000]), width).numpy()


def _sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latent: the UNet's own, SIDE at most."""
    size = config.get("sample_size") or 64
    height, width = cast(list[int], size) if isinstance(size, list | tuple) else (size, size)
    return min(height, SIDE), min(width, SIDE)


def _scheduler(config: Mapping[str, Any]) -> Any:
    """DDIM with the checkpoint's betas and kind of prediction, set to STEPS steps over all its timesteps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    kept = {key: config[key] for key in (*_BETAS, "prediction_type") if config.get(key) is not None}
    scheduler: Any = cast(Any, DDIMScheduler)(**kept, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    return scheduler
