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
CELLS = 32  # of the latent, a side at most: ranges hardly depend on the size of a picture; time and memory do
# Usual prompts, a long one, and none; the last is not measured but compared on.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red circle on a blue background",
    "masterpiece, best quality, an old city by the sea at dawn, sharp focus, " * 4,
    "",
    "a small green heart on a pink background, oil on canvas",
)
Predict = Callable[[Inputs], Array]  # a UNet, from its inputs to (B, C, H/8, W/8)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture, (1, H, W, 3) uint8, and the inputs of every call of the UNet that it took."""

    calls: tuple[Inputs, ...]
    image: Array


def drawn_pictures(
    package: Package, prompts: Sequence[str] = PROMPTS, *, predict: Predict | None = None
) -> tuple[Drawn, ...]:
    """Pictures of these prompts with guidance, on the CPU; the seed of each is its place among PROMPTS.

    `predict` answers for the package's own UNet.

    Raises:
        LatentrtError: what drawing them raises.
    """
    manifest = package.manifest
    cells = {name: getattr(manifest.defaults, name) // manifest.latent_scale for name in ("width", "height")}
    size = {name: min(count, CELLS) * manifest.latent_scale for name, count in cells.items()}
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
