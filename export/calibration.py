"""The inputs that activation ranges are measured on: one small picture, drawn by the nets being measured.

Prompts go through the text encoder, their contexts and noise through a few DDIM steps with guidance, and the
latent of the last step through the decoder, so that each net sees what it sees in use. Made-up inputs miss
that: a UNet at timestep 0 has never met pure noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from ..engines.spec import Array
from .checkpoint import Checkpoint

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
        self._contexts: Array | None = None
        self._latent: Array | None = None

    def drive(self, component: str, call: Call) -> None:
        """Call a net once or more. `component`: "text_encoder", "unet" (before hoisting) or "vae_decoder"."""
        {"text_encoder": self._encode, "unet": self._denoise, "vae_decoder": self._decode}[component](call)

    def _encode(self, call: Call) -> None:
        """Prompts, and one row of ids from the whole vocabulary: (4, T) int32."""
        config = self._source.text_encoder.config
        ids = token_ids(self._source)
        ids = np.concatenate([ids, ids[:1]]).astype(np.int32)
        ids[-1, 1:-1] = self._random.integers(0, int(config["vocab_size"]), ids.shape[1] - 2)
        self._contexts = call({"input_ids": ids})[0]

    def _denoise(self, call: Call) -> None:
        """STEPS guided DDIM steps from noise, of rows (empty prompt, another)."""
        import torch

        config = self._source.unet.config
        contexts = self._contexts
        if contexts is None:
            contexts = self._normal(2, 77, int(config.get("cross_attention_dim", 1280)))
        scheduler = _scheduler(self._source.scheduler)
        latent = self._normal(1, 4, *_sides(config))
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            # Trained nets keep the variance at one; guidance, and random weights, may not.
            latent = latent / max(1.0, float(latent.std()))
            rows = {
                "sample": np.concatenate([latent, latent]),
                "timestep": np.full(2, timestep, np.float32),
                # Another prompt in every step: cross-attention's ranges depend on it more than the rest does.
                "encoder_hidden_states": contexts[[0, 1 + step % (len(contexts) - 1)]],
            }
            without, with_prompt = np.split(call(rows)[0], 2)
            guided = without + GUIDANCE * (with_prompt - without)
            moved = scheduler.step(torch.asarray(guided), timestep, torch.asarray(latent))
            latent = moved.prev_sample.numpy()
        self._latent = latent / max(1.0, float(latent.std()))

    def _decode(self, call: Call) -> None:
        """The latent of the last step, and noise, which reaches further: (2, 4, H/8, W/8)."""
        noise = self._normal(1, int(self._source.vae.config.get("latent_channels", 4)), SIDE, SIDE)
        drawn = noise if self._latent is None else self._latent
        for latent in (drawn, noise[..., : drawn.shape[-2], : drawn.shape[-1]]):
            call({"latent": latent})

    def _normal(self, *shape: int) -> Array:
        return self._random.standard_normal(shape, dtype=np.float32)


def token_ids(source: Checkpoint) -> Array:
    """PROMPTS as the checkpoint's tokenizer has them: (3, T) int64."""
    from transformers import CLIPTokenizer

    length = int(source.text_encoder.config.get("max_position_embeddings", 77))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that only other tokenizers need
        tokenizer: Any = cast(Any, CLIPTokenizer).from_pretrained(str(source.root / "tokenizer"))
    return tokenizer(
        list(PROMPTS), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    ).input_ids


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
