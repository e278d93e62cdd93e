"""stable-diffusion.cpp, of the wheel `cyllama`, on a checkpoint's file: whole pictures on the CPU.

Weights are converted when the file is opened, and data stay as ggml has them: float32 beside f16 weights, and
blocks of 32 in eight bits beside q8_0 ones. Noise and steps are AUTOMATIC1111's, so a case's sampler must be
one that it has by the same steps: "euler linspace".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from ...engines.processors import thread_count
from ...engines.spec import Array
from ..case import Case
from .contract import PICTURE, NotAvailableError, OpenSide, Task, Work, missing_modules

SAMPLERS: Mapping[str, str] = {"euler linspace": "EULER", "dpmpp_2m linspace": "DPMPP2M"}


class F16:
    """With weights of sixteen bits."""

    NAME: ClassVar[str] = "sdcpp-f16"
    WEIGHTS: ClassVar[str] = "F16"

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        if reason := missing_modules("cyllama"):
            return reason
        return None if task.model.is_file() else "it opens one-file checkpoints, and no file was given"

    @classmethod
    def open_side(cls, task: Task) -> OpenSide:
        """The checkpoint, read whole. Raises NotAvailableError."""
        library: Any = import_module("cyllama.sd")
        asked = library.SDContextParams(model_path=str(task.model))
        asked.wtype = getattr(library.SDType, cls.WEIGHTS)
        asked.rng_type = asked.sampler_rng_type = library.RngType.CPU  # torch's stream, as ours
        asked.n_threads = thread_count(task.threads)
        asked.free_params_immediately = False  # they are wanted again: else the second picture is a crash
        if hasattr(asked, "eager_load"):  # newer releases read weights when they are used
            asked.eager_load = True
        context = library.SDContext(asked)
        versions = {"cyllama": str(import_module("cyllama").__version__), "weights": cls.WEIGHTS}
        return OpenSide(
            name=cls.NAME,
            versions=versions,
            makers={PICTURE: partial(_picture, cls.NAME, library, context)},
        )


class Q8(F16):
    """With weights in blocks of 32 that have eight bits each."""

    NAME: ClassVar[str] = "sdcpp-q8_0"
    WEIGHTS: ClassVar[str] = "Q8_0"


def _picture(name: str, library: Any, context: Any, case: Case, stack: ExitStack) -> Work:
    if case.sampler not in SAMPLERS:
        raise NotAvailableError(
            f"{name} has no sampler {case.sampler!r} with the same steps",
            expected=", ".join(SAMPLERS),
            fix=f'Choose one of them: --sampler "{next(iter(SAMPLERS))}".',
        )

    def draw() -> dict[str, Array]:
        images = context.generate(
            case.prompt,
            negative_prompt=case.negative_prompt,
            width=case.width,
            height=case.height,
            seed=case.seed,
            batch_count=case.pictures,
            sample_steps=case.steps,
            cfg_scale=case.guidance_scale,
            sample_method=getattr(library.SampleMethod, SAMPLERS[case.sampler]),
            scheduler=library.Scheduler.DISCRETE,
        )
        return {"image": np.stack([np.asarray(image.to_numpy(), np.uint8) for image in images])}

    return Work(call=draw)
