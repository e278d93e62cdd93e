"""What a UNet is called with while pictures are drawn: the inputs that ranges and errors are measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.backend import Net
from ...engines.device import MemoryLedger
from ...engines.errors import BackendError
from ...engines.onnxruntime.backend import ONNXRUNTIME
from ...engines.package import Package
from ...engines.spec import Array, NetSpec
from ...runtime.loop.denoise import HostLoop
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
    backend = ONNXRUNTIME if predict is None else _Answering(predict)
    with Pipeline.over(package, HostLoop(package, backend, None), backend.describe()) as pipe:
        return tuple(
            _draw(pipe, {**asked, "prompt": prompt, "seed": PROMPTS.index(prompt)}) for prompt in prompts
        )


def _draw(pipe: Pipeline, values: Mapping[str, Any]) -> Drawn:
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
            item.answer(item.run(**feeds)["prediction"])


@dataclass(frozen=True)
class _Answering:
    """ONNX Runtime's backend but for the UNet, which is not opened: `predict` answers in its place."""

    predict: Predict

    def refusal(self) -> BackendError | None:
        return ONNXRUNTIME.refusal()

    def describe(self) -> str:
        return ONNXRUNTIME.describe()

    def open_net(self, package: Package, name: str, *, threads: int | None = None) -> Net:
        if name == "unet":
            return _Answered(package.manifest.nets[name].spec, self.predict)
        return ONNXRUNTIME.open_net(package, name, threads=threads)


@dataclass
class _Answered:
    """A net that another function computes."""

    spec: NetSpec
    predict: Predict

    @property
    def memory(self) -> MemoryLedger:
        return MemoryLedger(weights=0, activations=None, io=0)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        return {self.spec.outputs[0].name: self.predict(arrays)}

    def close(self) -> None:
        """Free nothing."""
