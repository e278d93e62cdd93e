"""The inputs that activation ranges are measured on: one small picture, drawn by the nets being measured.

Prompts go through the text encoders, their contexts and noise through a few DDIM steps with guidance, and the
latent of the last step through the decoders, so that each net sees what it sees in use. Random inputs would
not do: a UNet never meets pure noise at timestep 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ...engines.spec import (
    CONTROL_TYPE,
    HINT_EMBEDDING,
    NETS,
    SCALES,
    STRENGTH,
    TEXT_ENCODERS,
    Array,
    guidance_embedding,
    residuals,
)
from ..controls.control_file import ControlFile
from ..files.open import Checkpoint
from ..files.source import Source
from .ddim import Ddim

# A net in float32: inputs by name -> outputs in the contract's order.
NetCall = Callable[[Mapping[str, Array]], list[Array]]
Drive = Callable[[NetCall], None]  # calls a net once or more
# A tokenizer's folder, texts and a length -> that many ids for each text, (texts, length), padded as the
# folder says. Callers bring one: there are several libraries for it, and nothing here needs another.
Tokenize = Callable[[Path, Sequence[str], int], Array]

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


class Calibration:
    """Calls the nets of one checkpoint in the order of a picture, and keeps what one hands to the next.

    Each method calls one net, once or more; with unit normal values where the net before was not called.
    """

    def __init__(self, source: Source, tokenize: Tokenize, seed: int = 0) -> None:
        self._any = source
        self._tokenize = tokenize
        self._random = np.random.default_rng(seed)
        self._contexts: dict[str, Array] = {}  # by encoder, a row for each prompt
        self._vectors: dict[str, Array] = {}  # some of VECTORS, a row for each prompt
        self._embeds: Array | None = None
        self._latent: Array | None = None
        self._hint: Array | None = None
        self._features: Array | None = None

    @property
    def _source(self) -> Checkpoint:
        """The checkpoint whose nets are called."""
        assert isinstance(self._any, Checkpoint)
        return self._any

    @property
    def _sides(self) -> tuple[int, ...]:
        """Height and width of the latent: what the UNet was trained at, but at most SIDE."""
        return tuple(min(side, SIDE) for side in self._source.sample_size)

    def encode_prompts(self, call: NetCall, *, name: str) -> None:
        """Call the text encoder `name` with PROMPTS and a row of random ids: (4, T) int32."""
        ids = token_ids(self._source, name, self._tokenize)
        ids = np.concatenate([ids, ids[:1]]).astype(np.int32)
        size = int(self._source.parts[name].config["vocab_size"])
        ids[-1, 1:-1] = self._random.integers(0, size, ids.shape[1] - 2)
        context, *pooled = call({"input_ids": ids, "clip_skip": np.zeros(1, np.int32)})
        self._contexts[name] = context
        if pooled:
            self._vectors["text_embeds"] = pooled[0]

    def embed_pictures(self, call: NetCall) -> None:
        """Call the image encoder with smooth pictures and noise, whose values reach further."""
        side = int(self._source.parts["image_encoder"].config.get("image_size", 224))
        self._embeds = call({"image": self._pictures(4, side, side)})[0]

    def noise_embeddings(self, call: NetCall) -> None:
        """Call unCLIP's noiser with their embeddings, without noise and with equal parts of both."""
        if self._embeds is None:
            width = int(self._source.parts["image_normalizer"].config["embedding_dim"])
            self._embeds = self._normal(4, width)
        for level, angle in ((0.0, 0.0), (500.0, np.pi / 4)):
            rows = {
                "image_embeds": self._embeds,
                "noise": self._normal(*self._embeds.shape),
                "noise_level": np.array([level], np.float32),
                "alpha": np.array([np.cos(angle)], np.float32),
                "sigma": np.array([np.sin(angle)], np.float32),
            }
            self._vectors["class_labels"] = call(rows)[0]

    def encode_pictures(self, call: NetCall) -> None:
        """Call the VAE's encoder with smooth pictures and noise, each kind with and without a mask."""
        height, width = (side * self._source.latent_scale for side in self._sides)
        for number, picture in enumerate(self._pictures(4, height, width)):
            mask = np.zeros((1, height, width, 1), np.uint8)
            mask[:, : height // 2] = 255 * (number % 2)
            call({"image": picture[None], "mask": mask})

    def _pictures(self, count: int, height: int, width: int) -> Array:
        """Smooth pictures, then as many of noise: (count, height, width, 3) uint8."""
        smooth = colour_fields(count // 2, max(height, width), seed=0)[:, :height, :width]
        noise = self._random.integers(0, 256, (count - len(smooth), height, width, 3), np.uint8)
        return np.concatenate([smooth, noise])

    def denoise(self, call: NetCall) -> None:
        """Call the UNet in STEPS guided DDIM steps from noise; its rows are the empty prompt and another."""
        contexts = self._joined_contexts()
        ddim = Ddim.of(self._source.scheduler, STEPS)
        latent = self._normal(1, 4, *self._sides)
        # An inpainting UNet's extra channels: a mask of the right half, and a masked picture's latent.
        behind: list[Array] = []
        if self._source.image_latents:
            mask = np.zeros_like(latent[:, :1])
            mask[..., mask.shape[-1] // 2 :] = 1
            behind = [mask, self._normal(*latent.shape)]
        for step, timestep in enumerate(ddim.timesteps):
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
            latent = ddim.step(guided, timestep, latent)
        self._latent = latent / max(1.0, float(latent.std()))

    def _joined_contexts(self) -> Array:
        """The encoders' features side by side: (prompts, T, width)."""
        names = [part.name for part in self._source.text_encoders]
        if self._contexts.keys() >= set(names):
            return np.concatenate([self._contexts[name] for name in names], axis=2)
        return self._normal(2, 77, int(self._source.unet.config.get("cross_attention_dim", 1280)))

    def _vector(self, name: str, width: int, prompts: list[int]) -> Array:
        """One of VECTORS for two prompts: (2, width)."""
        if name == "time_ids":
            height, wide = (side * self._source.latent_scale for side in self._sides)
            sizes = [height, wide, 0, 0, *([height, wide] if width == 6 else [6.0])]
            return np.array([sizes, sizes], np.float32)
        if name == "timestep_cond":
            return np.repeat(guidance_embedding(GUIDANCE, width)[None], 2, axis=0)
        found = self._vectors.get(name)
        return self._normal(2, width) if found is None else found[prompts]

    def decode(self, call: NetCall) -> None:
        """Call a decoder with the latent of the last step, and with noise, whose values reach further."""
        noise = self._normal(1, 4, SIDE, SIDE)
        drawn = noise if self._latent is None else self._latent
        for latent in (drawn, noise[..., : drawn.shape[-2], : drawn.shape[-1]]):
            call({"latent": latent})

    def embed_hint(self, call: NetCall) -> None:
        """Call what a ControlNet makes of its picture: smooth pictures, edges, and noise."""
        self._hint = call({"hint": self._hints(), **self._types(4, STRENGTH)})[0]

    def _hints(self) -> Array:
        """(4, 3, H, W) float32, 0 to 1."""
        assert isinstance(self._any, ControlFile)
        side = self._any.latent_scale * SIDE
        pictures = self._pictures(2, side, side)
        hints = np.moveaxis(pictures.astype(np.float32) / 255, 3, 1)
        edges = (np.abs(np.diff(hints, axis=3, prepend=0)) > 0.05).astype(np.float32)
        return np.concatenate([hints, edges])

    def _types(self, rows: int, *more: str) -> dict[str, Array]:
        """What a Union is told of its pictures, each of another type; nothing for other ControlNets."""
        if (types := self._any.vectors.get(CONTROL_TYPE)) is None:
            return {}
        told = np.eye(types, dtype=np.float32)[np.arange(rows) % types]
        return {CONTROL_TYPE: told, **{name: np.ones(rows, np.float32) for name in more}}

    def steer(self, call: NetCall) -> None:
        """Call a ControlNet with latents between noise and pictures, at the noise's timesteps."""
        config = self._any.parts["controlnet"].config
        width = int(config["block_out_channels"][0])
        hint = self._normal(4, width, SIDE, SIDE) if self._hint is None else self._hint
        outputs = len(residuals(config["block_out_channels"], config.get("layers_per_block", 2)))
        smooth = 2 * self._normal(len(hint), 4, 1, 1) + self._normal(len(hint), 4, 1, SIDE)
        for timestep in (999, 700, 350, 20):
            signal = np.cos(timestep / 1000 * np.pi / 2)
            noise = self._normal(len(hint), 4, SIDE, SIDE)
            latent = signal * smooth + (1 - signal**2) ** 0.5 * noise
            vectors = {name: self._normal(len(hint), size) for name, size in self._any.vectors.items()}
            if "time_ids" in vectors:
                vectors["time_ids"] = np.full_like(vectors["time_ids"], 1024)
            call(
                {
                    "sample": latent.astype(np.float32),
                    "timestep": np.full(len(hint), timestep, np.float32),
                    "encoder_hidden_states": self._normal(len(hint), 77, int(config["cross_attention_dim"])),
                    **(vectors | self._types(len(hint))),
                    HINT_EMBEDDING: hint,
                    SCALES: np.ones((len(hint), outputs), np.float32),
                }
            )

    def see_hint(self, call: NetCall) -> None:
        """Call a T2I-Adapter with the same, of as many channels as it reads."""
        channels = int(self._any.parts["t2i-adapter"].config.get("in_channels", 3))
        call({"hint": self._hints()[:, :channels]})

    def see_pictures(self, call: NetCall) -> None:
        """Call an IP-Adapter's image encoder with smooth pictures, noise, and nothing."""
        side = int(self._any.parts["vision"].config.get("image_size", 224))
        pictures = np.moveaxis(self._pictures(4, side, side).astype(np.float32), 3, 1)
        normal = (pictures - pictures.mean()) / pictures.std()
        self._features = call({"pixel_values": np.concatenate([normal, np.zeros_like(normal[:1])])})[0]

    def prompt_by_pictures(self, call: NetCall) -> None:
        """Call an IP-Adapter with what its encoder sees in these, and with zeros."""
        assert self._features is not None
        features = self._features
        call({"image_features": np.concatenate([features, np.zeros_like(features[:1])])})

    def _normal(self, *shape: int) -> Array:
        return self._random.standard_normal(shape, dtype=np.float32)


def token_ids(source: Checkpoint, encoder: str, tokenize: Tokenize) -> Array:
    """PROMPTS as the tokenizer of a text encoder reads them: (3, T) integers."""
    length = int(source.parts[encoder].config.get("max_position_embeddings", 77))
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "tokenizer"
        source.tokenizers[TEXT_ENCODERS[encoder]](files)
        return tokenize(files, PROMPTS, length)


def colour_fields(count: int, side: int, seed: int) -> Array:
    """Smooth pictures of many colours, sums of three waves in each channel: (count, side, side, 3) uint8."""
    random = np.random.default_rng(seed)
    along = np.linspace(0, 2 * np.pi, side)
    waves = np.zeros((count, side, side, 3))
    for _ in range(3):
        across, down, phase = (random.uniform(-1.5, 1.5, (count, 1, 1, 3)) for _ in range(3))
        waves += np.sin(across * along[None, None, :, None] + down * along[None, :, None, None] + 2 * phase)
    low, high = (edge(waves, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    return ((waves - low) / (high - low) * 255).round().astype(np.uint8)


# A net with weights -> how it is called while its ranges are measured, in the order in which nets feed each
# other.
CALIBRATIONS: Mapping[str, Callable[[Calibration, NetCall], None]] = {
    "text_encoder": partial(Calibration.encode_prompts, name="text_encoder"),
    "text_encoder_2": partial(Calibration.encode_prompts, name="text_encoder_2"),
    "image_encoder": Calibration.embed_pictures,
    "image_noiser": Calibration.noise_embeddings,
    "vae_encoder": Calibration.encode_pictures,
    "unet": Calibration.denoise,
    "vae_decoder": Calibration.decode,
    "preview_decoder": Calibration.decode,
    "controlnet_hint": Calibration.embed_hint,
    "controlnet": Calibration.steer,
    "t2i_adapter": Calibration.see_hint,
    "image_features": Calibration.see_pictures,
    "image_prompt": Calibration.prompt_by_pictures,
}


def components(source: Source) -> tuple[str, ...]:
    """The nets with weights that the package of a checkpoint has, in the order of CALIBRATIONS."""
    return tuple(name for name in CALIBRATIONS if NETS[name].part in source.parts)
