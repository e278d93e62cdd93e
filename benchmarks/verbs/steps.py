"""`latentrt bench steps`: how good a picture is after so many calls of the UNet, sampler by sampler.

Drawn is the demo model, whose prompts have right answers: the checker reads held-out ones back
(`demo/checker.py`). How far a sampler is from the end of its path is measured against a run of many steps
with the same seeds. All samplers here are deterministic, and solve one equation from one start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...demo.checker import score
from ...demo.shapes import Scene, held_out_scenes
from ...engines.errors import UsageError
from ...engines.spec import Array
from ..likeness import psnr
from ..records import Document, Row
from ..sides.contract import OURS, Task
from .latency import Progress, document_of, silent

if TYPE_CHECKING:
    from ...runtime.pipeline import Pipeline
    from ...runtime.request.parameters import Parameters

SIDE = 128  # pixels, of the demo model
CALLS = (4, 5, 6, 8, 10, 12, 15, 20, 30)
REFERENCE: Mapping[str, Any] = {"sampler": "dpmpp_2m", "num_inference_steps": 200}
REFERENCE_ROW = "reference"
_BATCH = 10

# What is compared, by the name that reports have for it.
VARIANTS: Mapping[str, Parameters] = {
    "euler": {"sampler": "euler"},
    "ddim": {"sampler": "ddim"},
    "plms": {"sampler": "plms"},
    "lms": {"sampler": "lms"},
    "heun": {"sampler": "heun"},
    "dpm2": {"sampler": "dpm2"},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "dpmpp_2m karras": {"sampler": "dpmpp_2m karras"},
    "dpmpp_3m": {"sampler": "dpmpp_3m"},
    "dpmpp_2s": {"sampler": "dpmpp_2s"},
    "deis": {"sampler": "deis"},
    "unipc": {"sampler": "unipc"},
    "dpmpp_2m guided to 0.6": {"sampler": "dpmpp_2m", "guidance_interval": (0.0, 0.6)},
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is drawn.

    Attributes:
        prompts: how many of the held-out ones; the seed of each is its place in their list.
        calls: of the UNet, at most.
        variants: keys of `VARIANTS`.
    """

    prompts: int = 100
    calls: tuple[int, ...] = CALLS
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        """Raise UsageError for more prompts than there are."""
        if not 1 <= self.prompts <= len(held_out_scenes()):
            raise UsageError(
                f"{self.prompts} prompts",
                expected=f"1 to {len(held_out_scenes())}, the held-out ones",
                fix="Choose a number in that range: --prompts 100.",
            )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures of all prompts.

    Attributes:
        latents: (N, 4, 16, 16) float32, the last ones.
        pictures: (N, 128, 128, 3) uint8.
    """

    latents: Array
    pictures: Array


def measure_steps(pipe: Pipeline, task: Task, inputs: Inputs, *, progress: Progress = silent) -> Document:
    """A row for each variant and number of calls; its samples are distances (unit "1") of the last latents.

    Raises what drawing raises.
    """
    scenes = held_out_scenes()[: inputs.prompts]
    progress(f"the reference, {REFERENCE['num_inference_steps']} steps")
    reference = draw(pipe, scenes, REFERENCE)
    rows = [row_of(pipe, REFERENCE_ROW, REFERENCE, scenes, reference, reference)]
    for variant in inputs.variants:
        for calls in inputs.calls:
            progress(f"{variant}, {calls} calls")
            parameters = {**VARIANTS[variant], "num_inference_steps": steps_within(pipe, variant, calls)}
            found = draw(pipe, scenes, parameters)
            rows.append(row_of(pipe, variant, parameters, scenes, found, reference))
    settings = {"prompts": inputs.prompts, "calls": list(inputs.calls), "reference": dict(REFERENCE)}
    return document_of("steps", pipe.package, task, rows, settings)


def steps_within(pipe: Pipeline, variant: str, calls: int) -> int:
    """The most steps of a variant that take so many calls of the UNet; 1 where none takes as few."""
    count = partial(_calls, pipe, VARIANTS[variant])
    return max((steps for steps in range(1, calls + 1) if count(steps) <= calls), default=1)


def draw(pipe: Pipeline, scenes: Sequence[Scene], parameters: Mapping[str, Any]) -> Drawing:
    """All prompts, by the model's own guidance; the seed of each is its place in the list."""
    latents: list[Array] = []
    for first in range(0, len(scenes), _BATCH):
        result: Any = pipe(
            [scene.prompt() for scene in scenes[first : first + _BATCH]],
            seed=first,
            height=SIDE,
            width=SIDE,
            output_type="latent",
            **parameters,
        )
        latents.append(result.images)
    pictures = [pipe.loop.decode(part)[0] for part in latents]
    return Drawing(latents=np.concatenate(latents), pictures=np.concatenate(pictures))


def row_of(
    pipe: Pipeline,
    variant: str,
    parameters: Mapping[str, Any],
    scenes: Sequence[Scene],
    found: Drawing,
    reference: Drawing,
) -> Row:
    """How right and how near the pictures are.

    Figures: `calls` and `unet_rows` of a picture, `strict` and `semantic` (shares of the pictures that the
    checker accepts), `psnr_db` (median; without pictures that are equal).
    """
    read = score(list(found.pictures), list(scenes))
    pairs = zip(found.pictures, reference.pictures, strict=True)
    near = [psnr(one[None], other[None]) for one, other in pairs]
    finite = [value for value in near if np.isfinite(value)]
    request = pipe.request_of({"prompt": "", "seed": 0, **parameters})
    guided = int((request.guidance_scales() > 1).sum())
    calls = len(request.schedule())
    return Row(
        side=OURS,
        workload=variant,
        case={"width": SIDE, "height": SIDE, "guidance_scale": request.guidance_scale},
        unit="1",
        rounds=(tuple(distances(found.latents, reference.latents)),),
        figures={
            "steps": request.num_inference_steps,
            "calls": calls,
            "unet_rows": calls + guided,
            "strict": read.strict / read.count,
            "semantic": read.semantic / read.count,
            "psnr_db": float(np.median(finite)) if finite else None,
        },
    )


def distances(found: Array, wanted: Array) -> Iterator[float]:
    """The relative L2 of each latent, (N, C, H/8, W/8)."""
    for one, other in zip(found.astype(np.float64), wanted.astype(np.float64), strict=True):
        yield float(np.linalg.norm(one - other)) / float(np.linalg.norm(other))


def _calls(pipe: Pipeline, parameters: Mapping[str, Any], steps: int) -> int:
    request = pipe.request_of({"prompt": "", "seed": 0, **parameters, "num_inference_steps": steps})
    return len(request.schedule())
