"""What a UNet is called with while pictures are drawn: the inputs that ranges and errors are measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.package import Package
from ...engines.spec import Array
from ...runtime.loop.job import UNetCall
from ...runtime.pipeline import Pipeline
from .ranges import Inputs

STEPS = 6  # of each picture
PROBED_CELLS = 16  # the same of the picture that sensitive data are looked for with, which takes fifty runs
CELLS = 32  # of the latent, a side at most: ranges hardly depend on the size of a picture; time and memory do
# What is measured on: usual prompts, a long one, and none.
SEEN = (
    "a photograph of an astronaut riding a horse",
    "a red circle on a blue background",
    "masterpiece, best quality, an old city by the sea at dawn, sharp focus, " * 4,
    "",
)
# What is compared on. One picture alone says little: of one package some are ten dB better than others.
UNSEEN = (
    "a small green heart on a pink background, oil on canvas",
    "a large red square on a white background",
    "portrait of a woman by a window, soft light",
)
PROMPTS = (*SEEN, *UNSEEN)
Predict = Callable[[Inputs], Array]  # a UNet, from its inputs to (B, C, H/8, W/8)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture, (1, H, W, 3) uint8, and the inputs of every call of the UNet that it took."""

    calls: tuple[Inputs, ...]
    image: Array


def drawn_pictures(
    package: Package,
    prompts: Sequence[str] = PROMPTS,
    *,
    predict: Predict | None = None,
    cells: int = CELLS,
) -> tuple[Drawn, ...]:
    """Pictures of these prompts with guidance, on the CPU; the seed of each is its place among PROMPTS.

    `predict` answers for the package's own UNet; `cells` is the most that a side of the latent has.

    Raises:
        LatentrtError: what drawing them raises.
    """
    manifest = package.manifest
    scale = manifest.latent_scale
    size = {
        name: min(getattr(manifest.defaults, name) // scale, cells) * scale for name in ("width", "height")
    }
    asked = {"num_inference_steps": STEPS, "output_type": "np", **size}
    with Pipeline.open(package.root, backend="onnxruntime") as pipe:
        return tuple(
            _draw(pipe, {**asked, "prompt": prompt, "seed": PROMPTS.index(prompt)}, predict)
            for prompt in prompts
        )


def _draw(pipe: Pipeline, values: Mapping[str, Any], predict: Predict | None) -> Drawn:
    calls: list[Inputs] = []
    turns = pipe.shared(values)
    while True:
        try:
            item = next(turns)
        except StopIteration as ended:
            return Drawn(calls=tuple(calls), image=ended.value.images)
        if isinstance(item, UNetCall):
            feeds = {name: np.array(value) for name, value in item.inputs.items()}
            calls.append(feeds)
            item.answer(predict(feeds) if predict else item.run(**item.inputs)["prediction"])
