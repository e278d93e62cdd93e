"""What a UNet is called with while pictures are drawn: the inputs that ranges and errors are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...engines.package import Package
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


def drawn_inputs(package: Package, prompts: Sequence[str] = PROMPTS, steps: int = STEPS) -> Iterator[Inputs]:
    """Inputs of every call that pictures of these prompts take, with guidance, on the CPU.

    Raises:
        LatentrtError: what drawing them raises.
    """
    manifest = package.manifest
    cells = {name: getattr(manifest.defaults, name) // manifest.latent_scale for name in ("width", "height")}
    size = {name: min(count, CELLS) * manifest.latent_scale for name, count in cells.items()}
    with Pipeline.open(package.root, backend="onnxruntime") as pipe:
        for seed, prompt in enumerate(prompts):
            asked = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "output_type": "latent"}
            for item in pipe.shared({**asked, **size}):
                if isinstance(item, UNetCall):
                    yield {name: np.array(value) for name, value in item.inputs.items()}
                    item.answer(item.run(**item.inputs)["prediction"])
