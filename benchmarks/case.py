"""The request that every side carries out, and the inputs that all of them get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.package import Manifest, Package
from ..engines.spec import TEXT_ENCODERS, Array, has_time_of_each_row, no_extra_embeddings, shape_of
from ..runtime.prompts.tokenizer import ClipTokenizer
from ..runtime.request.request import latent_shape, make_request
from ..runtime.sampling.noise import NoiseSource
from ..runtime.sampling.samplers import make_table
from ..runtime.sampling.table import Table

PROMPT = "a red circle on a blue background"
NEGATIVE = "a small yellow star"
# One call each, of nets; `update` is guidance and the row update; `picture` is all of it, prompt to pixels.
NETS = ("text_encoder", "unet", "vae_decoder")
# The nets that a picture is drawn with from a prompt, on the host; a device has `step` besides.
HOST_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "vae_decoder")
WORKLOADS = ("text_encoder", "invariants", "unet", "update", "vae_decoder", "picture")
BETWEEN = 20  # steps of the loop in one run of `update`


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request, the same for every side. Pixels; `pictures` are drawn at once; guidance is off at 1."""

    width: int
    height: int
    guidance_scale: float
    pictures: int = 1
    steps: int = 20
    sampler: str = "dpmpp_2m"
    seed: int = 7
    prompt: str = PROMPT
    negative_prompt: str = NEGATIVE

    @classmethod
    def of(cls, manifest: Manifest, **changes: Any) -> Case:
        """The package's own size and guidance, with `changes`; None changes nothing."""
        values = {name: getattr(manifest.defaults, name) for name in ("width", "height", "guidance_scale")}
        return cls(**values | {name: value for name, value in changes.items() if value is not None})

    @property
    def guided(self) -> bool:
        """Whether the UNet sees unconditional rows too."""
        return self.guidance_scale > 1

    @property
    def batch(self) -> int:
        """B: rows of a UNet call."""
        return self.pictures * (2 if self.guided else 1)

    def to_json(self) -> dict[str, Any]:
        """What tells rows apart."""
        return asdict(self)

    @property
    def parameters(self) -> dict[str, Any]:
        """For `Pipeline.__call__`."""
        names = ("width", "height", "guidance_scale", "negative_prompt", "sampler", "seed")
        own = {name: getattr(self, name) for name in names}
        return {**own, "num_images_per_prompt": self.pictures, "num_inference_steps": self.steps}


def rows_per_step(case: Case, manifest: Manifest) -> int:
    """Time invariants of a step: one for all UNet rows, or with vectors one for each."""
    return case.batch if manifest.vectors else 1


def sizes_of(case: Case, manifest: Manifest) -> dict[str, int]:
    """The symbols of the net contract (`engines/spec.py`) as a case has them."""
    cell = manifest.latent_scale
    return {
        "N": case.pictures,
        "B": case.batch,
        "E": 1,
        "G": 1,
        "I": 1,
        "P": 2 if case.guided else 1,
        "S": case.steps * rows_per_step(case, manifest),
        "T": manifest.max_tokens,
        "H": case.height,
        "W": case.width,
        "H/8": case.height // cell,
        "W/8": case.width // cell,
    }


def inputs_of(package: Package, workload: str, case: Case) -> dict[str, Array]:
    """The inputs of one call of a net, float32 where they are floats; never zeros, the same for every side.

    Returns:
        text_encoder, text_encoder_2: `input_ids` (P, T) int32, P = 2 with guidance, unconditional first; and
            where the net asks for them, `clip_skip` (1,) int32, none, and `extra_embeddings` (1, D), which no
            id reads.
        unet: `latent` (B, C, H/8, W/8), `timestep` (1,), `context` (B, T, D); and where the UNet asks for
            them, `image_latents` (B, C', H/8, W/8) and vectors (B, width) by name.
        vae_decoder: `latent` (N, C, H/8, W/8), in the units of the UNet (before the scaling factor).
    """
    manifest, random = package.manifest, np.random.default_rng(case.seed)
    spec, latent = manifest.net(workload).spec, latent_shape(manifest, case.height, case.width)
    if workload in TEXT_ENCODERS:
        texts = [case.negative_prompt, case.prompt] if case.guided else [case.prompt]
        tokenizer = _tokenizer(package.root / TEXT_ENCODERS[workload])
        ids = tokenizer.encode(texts, length=manifest.max_tokens).ids
        asked = {item.name for item in spec.inputs}
        skip = {"clip_skip": np.zeros(1, np.int32)} if "clip_skip" in asked else {}
        return {"input_ids": ids, **skip, **no_extra_embeddings(spec)}
    if workload == "vae_decoder":
        return {"latent": random.standard_normal((case.pictures, *latent), np.float32)}
    shapes: dict[str, tuple[int, ...]] = {
        "latent": (case.batch, *latent),
        "context": (case.batch, manifest.max_tokens, manifest.context_width),
        **{name: (case.batch, width) for name, width in manifest.vectors.items()},
    }
    for item in spec.inputs:
        if item.name == "image_latents":
            shapes[item.name] = shape_of(item.shape, sizes_of(case, manifest))
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {**arrays, "timestep": random.integers(1, 1000, 1).astype(np.float32)}


@cache
def _tokenizer(folder: Path) -> ClipTokenizer:
    return ClipTokenizer.open(folder)


def schedule_of(case: Case, manifest: Manifest) -> tuple[Table, Callable[[], Array]]:
    """The sampler's table, and what draws unit noise (N, C, H/8, W/8) float32, from the seeds on."""
    request = make_request(manifest, case.prompt, **case.parameters)
    source = NoiseSource(request.seeds, request.rng)
    shape = latent_shape(manifest, case.height, case.width)
    return make_table(request.sampler, request.num_inference_steps), partial(source.draw, shape)


def time_inputs(
    case: Case, manifest: Manifest, inputs: Mapping[str, Array], timesteps: Array
) -> dict[str, Array]:
    """What `unet_time` is called with: `timesteps` (steps,) and the vectors among `inputs`, S rows each."""
    vectors = {name: np.tile(inputs[name], (len(timesteps), 1)) for name in manifest.vectors}
    return {"timestep": np.repeat(timesteps, rows_per_step(case, manifest)), **vectors}


def row_time_inputs(case: Case, manifest: Manifest, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What `unet_time` is called with for one call of the loop graph: as many rows as that takes."""
    rows = case.batch if has_time_of_each_row(manifest.net("unet").spec) else 1
    return {
        "timestep": np.repeat(inputs["timestep"], rows),
        **{name: inputs[name] for name in manifest.vectors},
    }


def whole_inputs(case: Case, manifest: Manifest, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What `unet_whole` is called with, of the UNet's `inputs`; float32."""
    behind = [inputs[name] for name in ("image_latents",) if name in inputs]
    return {
        "sample": np.concatenate([inputs["latent"], *behind], axis=1),
        "timestep": np.repeat(inputs["timestep"], case.batch),
        "encoder_hidden_states": inputs["context"],
        **{name: inputs[name] for name in manifest.vectors},
    }
