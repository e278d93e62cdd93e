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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import UsageError
from ..runtime.loop.denoise import HostLoop
from ..runtime.model import SHIPPED, CheckpointOptions, is_package
from ..runtime.pipeline import Pipeline
from ..runtime.request.parameters import PARAMETERS, nearest

if TYPE_CHECKING:
    import torch

# Theirs by the same name, and what is theirs alone.
_SAME = frozenset(PARAMETERS) - {"seed", "rng", "sampler", "output_type"}
_OWN = frozenset(
    {
        *("generator", "output_type", "return_dict", "callback_on_step_end"),
        *("callback_on_step_end_tensor_inputs", "cross_attention_kwargs"),
    }
)
# Of `from_pretrained`: what `Pipeline.open` has too, and what needs no counterpart.
_OPENING = frozenset({"checkpoint", "backend", "threads", "loras", "embeddings", "allow_unused"})
_NEEDLESS = frozenset(
    {
        *("safety_checker", "requires_safety_checker", "feature_extractor", "add_watermarker"),
        *("variant", "use_safetensors", "local_files_only", "low_cpu_mem_usage", "cache_dir"),
    }
)
# Of a call: what nothing here is like.
_FOREIGN = frozenset({"prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "ip_adapter_image"})
_OUTPUTS = {"pil": "pil", "np": "float", "pt": "float", "latent": "latent"}
_STEPS = 50
_SEED_LIMIT = 2**63 - 1


class LatentrtPipeline:
    """An opened model that is called as a pipeline of diffusers.

    Args:
        pipe: what draws. It is closed with this one.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self._scheduler: Any = None
        self._interrupt = False  # a callback may set it, as in diffusers
        self._reopen: Callable[[str], Pipeline] | None = None

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
        place = pretrained_model_name_or_path
        made = str(place) in SHIPPED or is_package(Path(place))  # its arithmetic is what it was exported in
        if dtype is not None and not made:
            given["checkpoint"] = CheckpointOptions(dtype=cast(Any, _dtype(dtype)))

        def again(device: str) -> Pipeline:
            return Pipeline.open(place, device=device, **given)

        opened = cls(again(device))
        opened._reopen = again
        return opened

    from_single_file = from_pretrained

    def to(self, device: Any) -> LatentrtPipeline:
        """The pipeline on a device: it is opened anew where it is on another.

        Raises:
            UsageError: it was made of a pipeline that was open.
            BackendError: nothing installed runs there.
        """
        wanted = str(device)
        on_cpu = isinstance(self.pipe.loop, HostLoop)
        if (wanted == "cpu") == on_cpu and wanted in ("cpu", "cuda"):
            return self
        if self._reopen is None:
            raise UsageError(
                f"an open pipeline that is to go to {wanted}",
                expected="LatentrtPipeline.from_pretrained",
                fix="Open it there: Pipeline.open(…, device=…)",
            )
        fresh = self._reopen(wanted)
        self.pipe.close()
        self.pipe = fresh
        return self

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

    # ── drawing ────────────────────────────────────────────────────────────────────────────────────

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        """Draw, with the arguments of diffusers' pipelines.

        `image` makes it image-to-image, `mask_image` inpainting. A generator that nobody has drawn from means
        the pictures that its seed draws in diffusers, as do all pictures that need no noise behind the first;
        else each picture has a seed that is drawn from the generator.

        Returns:
            `StableDiffusionPipelineOutput`, or that of XL; with `return_dict=False` the tuple.

        Raises:
            UsageError: an argument that is unknown, out of range, or has no counterpart here.
            CancelledError: a callback has set `pipe._interrupt`.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        _refuse(given)
        own = {name: given.pop(name) for name in _OWN if name in given}
        values = {**self._defaults(given), **given, **_strength_of_loras(own, self._active())}
        if self._scheduler is not None:
            values["sampler"] = {**self._scheduler.config}
        values |= {name: _picture(values[name]) for name in ("image", "mask_image") if name in values}
        values |= self._noise(prompt, values, own.get("generator"))
        wanted = own.get("output_type", "pil")
        if wanted not in _OUTPUTS:
            raise UsageError(
                f"output_type is {wanted!r}", expected=f"one of {', '.join(_OUTPUTS)}", fix="Change it."
            )
        images = self._draw(prompt, values, _OUTPUTS[wanted], own.get("callback_on_step_end"))
        return self._output(_as_tensors(images, wanted), own.get("return_dict", True))

    def _draw(self, prompt: Any, values: Mapping[str, Any], output_type: Any, callback: Any) -> Any:
        self._interrupt, stop = False, Event()

        def after(_: Pipeline, index: int, timestep: float, state: dict[str, Any]) -> dict[str, Any]:
            import torch

            latents = cast(Any, torch).from_numpy(state["latents"])
            told = callback(self, index, timestep, {"latents": latents})
            if self._interrupt:
                stop.set()
            return {"latents": told["latents"].numpy()} if told and "latents" in told else {}

        called: Any = {} if callback is None else {"callback_on_step_end": after, "cancel": stop}
        return cast(Any, self.pipe)(prompt, output_type=output_type, **called, **values).images

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
        fresh = all(map(_is_fresh, several)) and len(several) == count
        rng = "torch-cuda" if several[0].device.type == "cuda" else "torch-cpu"
        seeds = [one.initial_seed() for one in several]
        drawn = _latents(several, shape)
        if fresh:
            return {"seed": seeds, "rng": rng}
        seeds = _seeds(several, count)
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

    def _needless(self, *_: Any, **__: Any) -> None:
        """Do nothing: pictures are the same without, and memory is this runtime's own affair."""

    enable_attention_slicing = disable_attention_slicing = _needless
    enable_vae_slicing = disable_vae_slicing = enable_vae_tiling = disable_vae_tiling = _needless
    enable_xformers_memory_efficient_attention = set_progress_bar_config = _needless
    enable_model_cpu_offload = enable_sequential_cpu_offload = _needless

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


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for what no pipeline here has."""
    for name in arguments:
        if name in _SAME or name in _OWN:
            continue
        near = None if name in _FOREIGN else nearest(name, (*_SAME, *_OWN))
        raise UsageError(
            f"the argument {name!r}",
            expected=f"{near!r}" if near else "one that this runtime has a counterpart of",
            fix=f"Write {near}=…" if near else f"Leave {name} out.",
        )
    inputs = list(arguments.get("callback_on_step_end_tensor_inputs", ["latents"]))
    if inputs != ["latents"]:
        raise UsageError(
            f"callback_on_step_end_tensor_inputs is {inputs!r:.80}",
            expected="['latents']",
            fix="Leave it out.",
        )
    extra = set(arguments.get("cross_attention_kwargs", {})) - {"scale"}
    if extra:
        raise UsageError(
            f"cross_attention_kwargs with {', '.join(sorted(map(str, extra)))}",
            expected="scale, of adapters",
            fix="Leave the rest out.",
        )


def _picture(given: Any) -> Any:
    """As `Pipeline` takes it: the only one of a list; a tensor (3, H, W) of 0 to 1 as an array."""
    several: Sequence[Any] = cast("Sequence[Any]", given) if isinstance(given, (list, tuple)) else (given,)
    one: Any = several[0] if len(several) == 1 else cast(Any, given)
    if not hasattr(one, "detach"):
        return one
    pixels: Any = one.detach().cpu().float().numpy()
    pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    return pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels  # (H, W, 3), or (H, W) of a mask


def _strength_of_loras(own: Mapping[str, Any], active: Sequence[str]) -> dict[str, Any]:
    """diffusers' scale of all adapters, for one call."""
    scale = own.get("cross_attention_kwargs", {}).get("scale")
    return {} if scale is None else {"loras": [(name, scale) for name in active]}


def _dtype(dtype: Any) -> str:
    """torch.float16 and "fp16" alike."""
    name = str(dtype).removeprefix("torch.")
    return {"float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}.get(name, name)


def _is_fresh(generator: torch.Generator) -> bool:
    """Whether nobody has drawn from it since it had its seed."""
    import torch

    same = torch.Generator(device=generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), same.get_state())


def _latents(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Any:
    """(N, C, H/8, W/8) float32: noise as diffusers draws it, each generator's in one draw."""
    import torch

    drawn = [torch.randn(shape, generator=one, device=one.device).cpu() for one in generators]
    return torch.cat(drawn).numpy()


def _seeds(generators: Sequence[torch.Generator], count: int) -> list[int]:
    """One a picture, each of the next generator. They stay as they are: diffusers draws no seeds."""
    import torch

    copies = [torch.Generator(device=one.device).set_state(one.get_state()) for one in generators]
    drawn = (copies[index % len(copies)] for index in range(count))
    return [int(torch.randint(_SEED_LIMIT, (1,), generator=one, device=one.device)) for one in drawn]


def _as_tensors(images: Any, wanted: str) -> Any:
    """What diffusers has for "pt" (N, 3, H, W) and "latent" (N, C, H/8, W/8): tensors."""
    if wanted not in ("pt", "latent"):
        return images
    import torch

    return cast(Any, torch).from_numpy(images if wanted == "latent" else images.transpose(0, 3, 1, 2).copy())
