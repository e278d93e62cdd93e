"""What a generation returns: pictures, and the record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.spec import Array
from .pictures.infotext import format_infotext
from .pictures.write import save_picture
from .request.request import Request
from .request.source import Masked, Varied
from .sampling.config import SamplerConfig
from .sampling.names import a1111_name

if TYPE_CHECKING:
    from PIL.Image import Image


def _sampler_record(config: SamplerConfig) -> dict[str, Any]:
    """Name, diffusers class, and every option that differs from our default; the betas are the model's."""
    options = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "noise"}
    defaults = {item.name: item.default for item in fields(config)}
    return {name: value for name, value in options.items() if name == "eta" or value != defaults[name]}


def _strength(request: Request) -> float | None:
    """The strength of what the run started from; a latent that another model left has none."""
    return None if request.denoising_start is not None else request.strength


def _of_some(request: Request, index: int) -> dict[str, Any]:
    """What only some requests have, and this one does."""
    masked = request.source if isinstance(request.source, Masked) else None
    values: dict[str, Any] = {
        "prompt_2": request.prompts_2[index],
        "negative_prompt_2": request.negative_prompts_2[index],
        "clip_skip": request.clip_skip or None,
        "strength": _strength(request),
        "mask_region": masked.inpainting.region if masked else None,
        "mask_blur": masked.inpainting.blur or None if masked else None,
        "noise_level": request.noise_level if isinstance(request.source, Varied) else None,
        "timesteps": request.timesteps,
        "sigmas": request.sigmas,
        "denoising_start": request.denoising_start,
        "denoising_end": request.denoising_end,
        "sizes": dict(request.sizes.positive) or None,
        "negative_sizes": dict(request.sizes.negative) or None,
        "tile": request.tile,
    }
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Pictures of one call.

    Attributes:
        images: N PIL images (`output_type="pil"`), or an array: (N, H, W, 3) uint8 for "np",
            (N, C, H/8, W/8) float32 for "latent".
        request: what was asked, with every default filled in.
        seconds: wall time per stage.
        producer: package, backend and release, for the record.
    """

    images: list[Image] | Array
    request: Request
    seconds: Mapping[str, float]
    producer: Mapping[str, str]

    def record(self, index: int = 0) -> dict[str, Any]:
        """How picture `index` was made, as JSON: every parameter that was given as a value.

        Pictures, latents and callbacks are not in it, nor the betas of a scheduler config with its own.
        """
        request = self.request
        return {
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompts[index],
            "prompt_syntax": request.prompt_syntax,
            "seed": request.seeds[index],
            "rng": request.rng,
            "sampler": _sampler_record(request.sampler),
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "guidance_rescale": request.guidance_rescale,
            "height": request.height,
            "width": request.width,
            **_of_some(request, index),
            **self.producer,
        }

    def infotext(self, index: int = 0) -> str:
        """The `parameters` text of AUTOMATIC1111 for picture `index`."""
        request = self.request
        sampler, schedule = a1111_name(request.sampler)
        return format_infotext(
            {
                "prompt": request.prompts[index],
                "negative_prompt": request.negative_prompts[index] or "",
                "Steps": request.num_inference_steps,
                "Sampler": sampler,
                "Schedule type": schedule,
                "CFG scale": request.guidance_scale,
                "Seed": request.seeds[index],
                "Size": f"{request.width}x{request.height}",
                "Model": self.producer["model"],
                "Denoising strength": _strength(request),
                "Clip skip": request.clip_skip + 1,  # 1 is the last layer there
                "RNG": "CPU" if request.rng == "torch-cpu" else "GPU",
                "Version": f"latentrt {self.producer['latentrt']}",
            }
        )

    def save(self, path: str | Path, index: int = 0, *, metadata: bool = True) -> None:
        """Write picture `index` with its record; the format follows the suffix (.png, .jpg, .webp).

        Raises:
            StorageError: the file cannot be written; an existing one stays as it was.
            UsageError: the suffix is unknown, or the result holds latents.
        """
        infotext, record = (self.infotext(index), self.record(index)) if metadata else (None, None)
        save_picture(path, self.images[index], infotext=infotext, record=record)
