"""diffusers' own pipeline, run as its documentation says: SDPA, inference mode, no safety checker.

`Compiled` has torch.compile on the UNet and the decoder, which the documentation advises for speed: whole
graphs, and code of its own for every shape, as what is compiled for any shape is slower. On CUDA the mode
also tunes kernels and captures graphs.

On the CPU everything is float32, whatever the package's dtype: torch's fp16 is slower there. On CUDA it is
the package's dtype. Convolutions are in channels_last (huggingface.co/docs/diffusers, "Accelerate inference")
for fp16, as tensor cores take it without a transposition, and on the CPU. There, on two cores of a Xeon
(torch 2.13), the demo model is 1.1 to 1.3 times as fast so, SD 1.5's decoder at 256x256 takes 14 % less of
the CPU's time, and its UNet at 512x512 takes as long as with contiguous ones.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.package import Package
from ...engines.spec import Array
from ..case import Case, inputs_of
from ..machine import version_of
from .contract import (
    NotAvailableError,
    OpenSide,
    Task,
    Work,
    makers_of,
    missing_checkpoint,
    missing_modules,
    open_package,
)

# Beyond so many shapes of one function torch would give up compiling; a sweep over sizes has more than its 8.
_SHAPES = 256
# our sampler -> diffusers' class, and the options that make it the same one
SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler linspace": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    reason = missing_modules("torch", "diffusers", "transformers") or missing_checkpoint(task)
    if reason or task.device != "cuda":
        return reason
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def open_side(task: Task) -> OpenSide:
    """Every net loaded."""
    assert task.checkpoint is not None, "it is available"
    return side_over("diffusers", task, assemble(task.checkpoint))


class Compiled:
    """The pipeline with compiled nets, a side of its own."""

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        if reason := available(task):
            return reason
        if task.device == "cuda":
            return missing_modules("triton")
        # what inductor would call (torch._inductor.config.cpp.cxx)
        usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
        compiler = os.environ.get("CXX", usual)
        return None if shutil.which(compiler) else f"torch.compile needs the C++ compiler {compiler}"

    @staticmethod
    def open_side(task: Task) -> OpenSide:
        """Every net loaded; the first run of a shape compiles."""
        usual = "max-autotune" if task.device == "cuda" else "default"
        assert task.checkpoint is not None, "it is available"
        pipe = assemble(task.checkpoint)
        return side_over("diffusers-compile", task, pipe, compiled=task.compile_mode or usual)


def side_over(name: str, task: Task, pipe: Any, *, compiled: str = "") -> OpenSide:
    """The side of a pipeline: on the task's device, its nets compiled in a mode that is not ""."""
    import torch

    package = open_package(task)
    if task.threads:
        torch.set_num_threads(task.threads)
    half = task.device == "cuda" and package.manifest.dtype == "fp16"
    pipe.set_progress_bar_config(disable=True)
    dtype = torch.float16 if half else torch.float32
    layout = layout_of(task, dtype)
    pipe.to(task.device, dtype)
    for net in (pipe.unet, pipe.vae):
        net.to(memory_format=layout)
    set_up([pipe.unet, pipe.vae.decoder] if compiled else [], half=half, compiled=compiled)
    versions = {
        "torch": str(torch.__version__),
        "diffusers": version_of("diffusers") or "unknown",
        "transformers": version_of("transformers") or "unknown",
        "device": task.device,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "memory_format": str(layout).removeprefix("torch.").removesuffix("_format"),
        "compile": f"{compiled}, fullgraph, static shapes" if compiled else "no",
    }
    return OpenSide(name=name, versions=versions, makers=makers_of(_Diffusers(name, package, pipe)))


def drawing(name: str, task: Task, pipe: Any, case: Case, **steered: Any) -> Work:
    """The work `picture` of a pipeline whose nets are in place; `steered` joins its parameters."""
    return _Diffusers(name, open_package(task), pipe).drawing(case, **steered)


def layout_of(task: Task, dtype: Any) -> Any:
    """The layout of convolutions' weights that is faster on a task's device."""
    import torch

    last = task.device == "cpu" or dtype == torch.float16
    return torch.channels_last if last else torch.contiguous_format


def set_up(nets: Sequence[Any], *, half: bool, compiled: str) -> None:
    """Torch's own best practice for modules: cuDNN's switches; torch.compile in a mode that is not ""."""
    import torch

    if half:
        torch.backends.cudnn.benchmark = True
    else:
        torch.backends.cudnn.allow_tf32 = False  # it is on by default, and another arithmetic
    if compiled:
        config: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
        config.recompile_limit = _SHAPES
        for net in nets:
            net.compile(mode=compiled, fullgraph=True, dynamic=False)


def assemble(checkpoint: Path) -> Any:
    """`StableDiffusionPipeline` of a folder, part by part: the index of a converted one may not list them."""
    diffusers: Any = import_module("diffusers")
    transformers: Any = import_module("transformers")
    index = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "tokenizer": transformers.CLIPTokenizer,
        "scheduler": getattr(diffusers, index["_class_name"]),
    }
    parts = {name: kind.from_pretrained(str(checkpoint / name)) for name, kind in kinds.items()}
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


class _Diffusers:
    """The workloads, by the names of the contract."""

    def __init__(self, name: str, package: Package, pipe: Any) -> None:
        self._name, self._package, self._pipe = name, package, pipe
        self._own_scheduler = pipe.scheduler
        self._device, self._dtype = str(pipe.device.type), pipe.unet.dtype

    def _inputs(self, workload: str, case: Case) -> dict[str, Any]:
        """The same as everyone's, as tensors on the device."""
        import torch

        arrays = inputs_of(self._package, workload, case)
        return {name: torch.as_tensor(array, device=self._device) for name, array in arrays.items()}

    def _work(self, output: str, call: Callable[[], Any]) -> Work:
        """What `call` computes is the output, a tensor or an array."""
        import torch

        left: list[Any] = [None]

        def run() -> dict[str, Array]:
            with torch.inference_mode():
                left[0] = call()
            if self._device == "cuda":
                torch.cuda.synchronize()
            return {}

        # The output becomes an array in `fetch`: on a GPU that is a copy nobody should time.
        return Work(call=run, fetch=lambda: {output: np.asarray(torch.as_tensor(left[0]).cpu())})

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        ids, encoder = self._inputs("text_encoder", case)["input_ids"].long(), self._pipe.text_encoder
        return self._work("context", lambda: encoder(ids, attention_mask=None)[0])

    def unet(self, case: Case, stack: ExitStack) -> Work:
        inputs, unet = self._inputs("unet", case), self._pipe.unet
        latent, context = inputs["latent"].to(self._dtype), inputs["context"].to(self._dtype)
        # A whole number, as most schedulers have it: for another dtype everything would be compiled again.
        timestep = inputs["timestep"][0].long()
        call = partial(unet, latent, timestep, encoder_hidden_states=context, return_dict=False)
        return self._work("prediction", lambda: call()[0])

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        latent = self._inputs("vae_decoder", case)["latent"].to(self._dtype)
        vae, processor = self._pipe.vae, self._pipe.image_processor

        def call() -> Array:
            image = vae.decode(latent / vae.config.scaling_factor, return_dict=False)[0]
            return _pixels(processor.postprocess(image, output_type="np"))

        return self._work("image", call)

    def picture(self, case: Case, stack: ExitStack) -> Work:
        return self.drawing(case)

    def drawing(self, case: Case, **steered: Any) -> Work:
        import torch

        pipe, scheduler = self._pipe, self._scheduler(case.sampler)
        parameters: dict[str, Any] = {**case.parameters, **steered, "output_type": "np"}
        del parameters["sampler"], parameters["seed"]

        def call() -> Array:
            pipe.scheduler = scheduler
            seeds = range(case.seed, case.seed + case.pictures)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            return _pixels(pipe(case.prompt, generator=generators, **parameters).images)

        return self._work("image", call)

    def _scheduler(self, sampler: str) -> Any:
        if sampler not in SAMPLERS:
            raise NotAvailableError(
                f"{self._name} is not set up for the sampler {sampler!r}",
                expected=", ".join(SAMPLERS),
                fix="Choose one of these: --sampler dpmpp_2m.",
            )
        kind, options = SAMPLERS[sampler]
        return getattr(import_module("diffusers"), kind).from_config(self._own_scheduler.config, **options)


def _pixels(images: Array) -> Array:
    """(N, H, W, 3) in 0 to 1 -> uint8, as diffusers' `numpy_to_pil` rounds."""
    return np.rint(images * 255).astype(np.uint8)
