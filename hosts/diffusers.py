"""A pipeline with the call of diffusers, so that an application changes the line that opens its model.

::

    from latentrt.hosts.diffusers import LatentrtPipeline
    pipe = LatentrtPipeline.from_pretrained("model.safetensors")      # was StableDiffusionPipeline…
    pipe("a red circle", generator=torch.Generator().manual_seed(7)).images[0].save("circle.png")

Arguments, defaults and output classes are those of diffusers 0.42: `StableDiffusionPipeline`, its Img2Img and
Inpaint, and the same of XL, in one class; which of them it is, is what is passed. What has no counterpart
here is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engines.backend import Place
from ..engines.errors import UsageError
from ..engines.spec import TEXT_ENCODERS
from ..runtime.loop.denoise import HostLoop
from ..runtime.model import SHIPPED, CheckpointOptions, is_package
from ..runtime.pipeline import Pipeline
from ..runtime.prompts.tokenizer import ClipTokenizer
from ..runtime.result import check_finite, finished
from ..runtime.sampling.names import resolve
from .diffusers_values import (
    OWN,
    as_tensors,
    dtype_name,
    is_fresh,
    latents_of,
    picture_of,
    refuse_foreign,
    scale_after,
    seeds_of,
    strength_of_loras,
)

if TYPE_CHECKING:
    import torch

# Of `from_pretrained`: what `Pipeline.open` has too, and what needs no counterpart.
_OPENING = frozenset({"checkpoint", "backend", "threads", "loras", "embeddings", "allow_unused"})
_NEEDLESS = frozenset(
    {
        *("safety_checker", "requires_safety_checker", "feature_extractor", "add_watermarker"),
        *("variant", "use_safetensors", "local_files_only", "low_cpu_mem_usage", "cache_dir"),
    }
)
_OUTPUTS = {"pil": "pil", "np": "float", "pt": "float", "latent": "latent"}
_PIPELINES = {  # (XL, what is drawn from): whose positional arguments are meant
    (False, "text"): "StableDiffusionPipeline",
    (False, "image"): "StableDiffusionImg2ImgPipeline",
    (False, "mask"): "StableDiffusionInpaintPipeline",
    (True, "text"): "StableDiffusionXLPipeline",
    (True, "image"): "StableDiffusionXLImg2ImgPipeline",
    (True, "mask"): "StableDiffusionXLInpaintPipeline",
}
_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a pipeline was opened from, and can be opened from again."""

    place: str | Path
    options: Mapping[str, Any]
    dtype: str | None  # that was asked for

    @property
    def is_made(self) -> bool:
        """Whether it is a package, whose arithmetic is what it was exported in."""
        return str(self.place) in SHIPPED or is_package(Path(self.place))

    def open(self, device: str) -> Pipeline:
        options = dict(self.options)
        if self.dtype is not None and not self.is_made:
            checkpoint = options.get("checkpoint") or CheckpointOptions()
            options["checkpoint"] = replace(checkpoint, dtype=cast(Any, self.dtype))
        return Pipeline.open(self.place, device=device, **options)


class LatentrtPipeline:
    """An opened model that is called as a pipeline of diffusers.

    Args:
        pipe: what draws. It is closed with this one.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self._scheduler: Any = None
        self._interrupt = False  # a callback may set it, as in diffusers
        self._bar: dict[str, Any] | None = None
        self._source: _Source | None = None
        self._place = Place()
        self._has_words = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, device: str = "auto", **options: Any
    ) -> LatentrtPipeline:
        """Open a folder of diffusers, a single file, a package, or a model of a hub.

        Args:
            pretrained_model_name_or_path: as `Pipeline.open` takes it.
            device: "auto", "cpu", "cuda", "cuda:1".
            options: of `Pipeline.open`; diffusers' `torch_dtype` chooses the arithmetic of a checkpoint.
                What needs no counterpart, such as `safety_checker` and `use_safetensors`, may stay.

        Raises:
            ModelError, UsageError, BackendError: as `Pipeline.open`.
        """
        given = {name: value for name, value in options.items() if name not in _NEEDLESS}
        dtype = given.pop("torch_dtype", None) or given.pop("dtype", None)
        for name in given:
            if name not in _OPENING:
                raise UsageError(
                    f"the argument {name!r}",
                    expected=f"one of {', '.join(sorted(_OPENING))}",
                    fix=f"Leave {name} out.",
                )
        asked = None if dtype is None else dtype_name(dtype)
        source = _Source(place=pretrained_model_name_or_path, options=given, dtype=asked)
        opened = cls(source.open(device))
        opened._source, opened._place = source, Place.parse(device)
        return opened

    from_single_file = from_pretrained

    def to(
        self, *where: Any, device: Any = None, dtype: Any = None, silence_dtype_warnings: bool = False
    ) -> LatentrtPipeline:
        """The pipeline on a device and in an arithmetic: it is opened anew where these are others.

        Args:
            where: a device, a dtype of torch, or both.
            device, dtype: the same by name. A package keeps the arithmetic that it was exported in.
            silence_dtype_warnings: there are none.

        Raises:
            UsageError: an unknown device or arithmetic, or the pipeline was made of one that was open, or
                draws with adapters or words that were loaded, which the new one would lack.
            BackendError: nothing installed runs there.
        """
        import torch

        for one in where:
            if isinstance(one, torch.dtype):
                dtype = one
            elif one is not None:
                device = one
        wanted = self.device if device is None else torch.device(device)
        arithmetic = None if dtype is None else dtype_name(dtype)
        here = wanted.type == self.device.type and wanted.index in (None, self.device.index)
        same = arithmetic in (None, self._dtype) or (self._source is not None and self._source.is_made)
        if here and same:
            return self
        place = Place.parse(str(wanted))
        if self._source is None or self.pipe.adapters.names or self._has_words:
            what = "an open pipeline" if self._source is None else "a pipeline with adapters or words"
            raise UsageError(
                f"{what} that is to go to {wanted}",
                expected="LatentrtPipeline.from_pretrained, and what is loaded after it is there",
                fix="Open it there: LatentrtPipeline.from_pretrained(…, device=…)",
            )
        source = replace(self._source, dtype=arithmetic or self._source.dtype)
        fresh = source.open(str(wanted))
        self.pipe.close()
        self.pipe, self._place, self._source = fresh, place, source
        return self

    # ── what it is ─────────────────────────────────────────────────────────────────────────────────

    @property
    def device(self) -> torch.device:
        """Where the nets run."""
        import torch

        on_cpu = isinstance(self.pipe.loop, HostLoop)
        return torch.device("cpu") if on_cpu else torch.device("cuda", self._place.index)

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the nets."""
        import torch

        return torch.float16 if self._dtype == "fp16" else torch.float32

    @property
    def _dtype(self) -> str:
        return self.pipe.package.manifest.dtype

    @property
    def components(self) -> dict[str, Any]:
        """Parts by diffusers' names: its scheduler, our tokenizers, and for a net its inputs and outputs."""
        package = self.pipe.package
        nets = {
            "vae" if net == "vae_decoder" else net: file.spec for net, file in package.manifest.nets.items()
        }
        tokenizers = {
            folder: ClipTokenizer.open(package.root / folder)
            for net, folder in TEXT_ENCODERS.items()
            if net in nets
        }
        parts = {"scheduler": self.scheduler, **tokenizers, **nets}
        return dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")) | parts

    # ── what is drawn with ─────────────────────────────────────────────────────────────────────────

    @property
    def scheduler(self) -> Any:
        """The scheduler as an object of diffusers; another may be assigned, `Other.from_config(….config)`."""
        if self._scheduler is None:
            import diffusers

            config = dict(self.pipe.package.manifest.scheduler)
            self._scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """Raises SamplerError for one that no coefficient table can express, such as with `clip_sample`."""
        resolve({**scheduler.config}, self.pipe.package.manifest.scheduler)
        self._scheduler = scheduler

    def load_lora_weights(
        self, path: str | Path, *, weight_name: str | None = None, adapter_name: str | None = None
    ) -> None:
        """Draw with a LoRA at full strength, until `set_adapters` says otherwise. Raises as `Pipeline`'s."""
        file = Path(path, weight_name) if weight_name else Path(path)
        self.pipe.set_adapters([*self._active(), self.pipe.load_lora_weights(file, adapter_name)])

    def _active(self) -> list[str]:
        return [name for name, _ in self.pipe.adapters.usual]

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Choose adapters, and how strongly they draw. Raises UsageError for an unknown name."""
        self.pipe.set_adapters(adapter_names, 1.0 if adapter_weights is None else adapter_weights)

    def unload_lora_weights(self) -> None:
        """Forget all adapters."""
        self.pipe.unload_lora_weights()

    def load_textual_inversion(self, source: Any, token: Any = None) -> None:
        """Give words embeddings. Raises as `Pipeline`'s."""
        self.pipe.load_textual_inversion(source, token)
        self._has_words = True

    # ── drawing ────────────────────────────────────────────────────────────────────────────────────

    def __call__(self, prompt: str | Sequence[str] = "", *placed: Any, **arguments: Any) -> Any:
        """Draw, with the arguments of diffusers' pipelines.

        `image` makes it image-to-image, `mask_image` inpainting; positional arguments have the order of that
        pipeline. A generator that nobody has drawn from means the pictures that its seed draws in diffusers,
        as do all pictures that need no noise behind the first; else each picture has a seed that is drawn
        from the generator. A callback that sets `pipe._interrupt` ends the steps, and what is there is
        decoded.

        Returns:
            `StableDiffusionPipelineOutput`, or that of XL; with `return_dict=False` the tuple.

        Raises:
            UsageError: an argument that is unknown, out of range, or has no counterpart here.
            TypeError: too many arguments, or one twice.
        """
        if placed:
            prompt, arguments = self._named(prompt, placed, arguments)
        given = {name: value for name, value in arguments.items() if value is not None}
        refuse_foreign(given)
        own = {name: given.pop(name) for name in OWN if name in given}
        values = {**self._defaults(given), **given, **strength_of_loras(own, self._active())}
        if self._scheduler is not None:
            values["sampler"] = {**self._scheduler.config}
        values |= {name: picture_of(values[name]) for name in ("image", "mask_image") if name in values}
        values |= self._noise(prompt, values, own.get("generator"))
        wanted = own.get("output_type", "pil")
        if wanted not in _OUTPUTS:
            raise UsageError(
                f"output_type is {wanted!r}", expected=f"one of {', '.join(_OUTPUTS)}", fix="Change it."
            )
        values["output_type"], callback = _OUTPUTS[wanted], own.get("callback_on_step_end")
        if callback is None and (self._bar is None or self._bar.get("disable")):
            images = cast(Any, self.pipe)(prompt, **values).images
        else:
            images = self._watched(prompt, values, callback)
        return self._output(as_tensors(images, wanted), own.get("return_dict", True))

    def _named(self, prompt: Any, placed: Sequence[Any], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Positional arguments by their names in the pipeline of diffusers that has such ones."""
        import diffusers

        image, mask, *_ = (*placed[1 if self._xl else 0 :], None, None)
        kind = "text" if image is None or isinstance(image, Integral) else "image"
        if kind == "image" and not isinstance(mask, (Real, type(None))):
            kind = "mask"
        call = inspect.signature(getattr(diffusers, _PIPELINES[self._xl, kind]).__call__)
        given = call.bind(self, prompt, *placed, **named).arguments
        given |= given.pop("kwargs", {})
        return prompt, {name: value for name, value in given.items() if name not in ("self", "prompt")}

    def _watched(self, prompt: Any, values: Mapping[str, Any], callback: Any) -> Any:
        """The same step by step, for a callback or a bar of progress."""
        import torch

        request = self.pipe.request_of({"prompt": prompt, **values})
        table, dtype = request.schedule(), self._dtype
        own = {name: value for name, value in values.items() if name != "output_type"}
        bar = self.progress_bar(total=len(table), **({} if self._bar else {"disable": True}))
        self._interrupt, drawn = False, np.empty(0, np.float32)
        with bar, closing(cast(Any, self.pipe).stream(prompt, **own)) as steps:
            for step in steps:
                if callback is not None:
                    scale = scale_after(step.index, table, request.sampler)
                    state = {"latents": cast(Any, torch).from_numpy(step.latent * scale)}
                    told: Any = callback(self, step.index, step.timestep, state) or {}
                    if "latents" in told:
                        step.state.replace(told["latents"].numpy() / scale)
                drawn = step.latent
                bar.update()
                if self._interrupt:
                    drawn = drawn * scale_after(step.index, table, request.sampler)
                    break
        if request.output_type == "latent":
            return drawn
        return finished(check_finite(*self.pipe.loop.decode(drawn, tile=request.tile), dtype), request, dtype)

    def _defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of diffusers' calls, where they differ from the model's own."""
        defaults: dict[str, Any] = {"guidance_scale": 5.0 if self._xl else 7.5, "prompt_syntax": "plain"}
        if not {"timesteps", "sigmas"} & given.keys():
            defaults["num_inference_steps"] = _STEPS
        if "mask_image" in given:
            defaults["strength"] = 0.9999 if self._xl else 1.0
        elif "image" in given:
            defaults["strength"] = 0.3 if self._xl else 0.8
        return defaults

    @property
    def _xl(self) -> bool:
        return "text_encoder_2" in self.pipe.package.manifest.nets

    def _noise(self, prompt: Any, values: Mapping[str, Any], generator: Any) -> dict[str, Any]:
        """Seeds, and latents where no seed means what diffusers would draw. Generators go on as there."""
        if generator is None or "latents" in values:
            return {}
        request = self.pipe.request_of({"prompt": prompt, **values, "seed": 0})
        several = cast("list[torch.Generator]", generator if isinstance(generator, list) else [generator])
        count = len(request.seeds)
        if len(several) not in (1, count):
            raise UsageError(
                f"{len(several)} generators for {count} pictures",
                expected="one, or one a picture",
                fix="Pass as many.",
            )
        scale = self.pipe.package.manifest.latent_scale
        channels = self.pipe.package.manifest.latent_channels
        shape = (count // len(several), channels, request.height // scale, request.width // scale)
        fresh = all(map(is_fresh, several)) and len(several) == count
        rng = "torch-cuda" if several[0].device.type == "cuda" else "torch-cpu"
        seeds = [one.initial_seed() for one in several]
        drawn = latents_of(several, shape)
        if fresh:
            return {"seed": seeds, "rng": rng}
        seeds = seeds_of(several, count)
        return {"seed": seeds, "rng": rng} | ({} if "image" in values else {"latents": drawn})

    def _output(self, images: Any, return_dict: bool) -> Any:
        if self._xl:
            from diffusers.pipelines.stable_diffusion_xl.pipeline_output import (
                StableDiffusionXLPipelineOutput,
            )

            return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)
        from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

        if not return_dict:
            return images, None
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)

    # ── the rest of a pipeline's life ──────────────────────────────────────────────────────────────

    def set_progress_bar_config(self, **config: Any) -> None:
        """Show a bar of tqdm with these arguments in every call, unless `disable` is among them.

        Without it there is none: on a device nobody then waits for a step.
        """
        self._bar = config

    def progress_bar(self, iterable: Any = None, total: int | None = None, **more: Any) -> Any:
        """A bar of tqdm, as configured."""
        return import_module("tqdm.auto").tqdm(iterable, total=total, **{**(self._bar or {}), **more})

    def _needless(self, *_: Any, **__: Any) -> None:
        """Do nothing: pictures are the same without, and memory is this runtime's own affair."""

    enable_attention_slicing = disable_attention_slicing = set_attention_slice = _needless
    enable_vae_slicing = disable_vae_slicing = enable_vae_tiling = disable_vae_tiling = _needless
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = _needless
    set_use_memory_efficient_attention_xformers = fuse_qkv_projections = unfuse_qkv_projections = _needless
    enable_model_cpu_offload = enable_sequential_cpu_offload = enable_group_offload = _needless
    maybe_free_model_hooks = remove_all_hooks = reset_device_map = _needless

    def close(self) -> None:
        """Free every net."""
        self.pipe.close()

    def __enter__(self) -> LatentrtPipeline:
        """The pipeline itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
