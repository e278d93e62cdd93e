"""The nodes. A model is a value that is passed on: what it is opened from, and what it draws with.

ComfyUI's LATENT has the decoder's own scale, {"samples": (B, C, H/8, W/8) float32}; the UNet's is that times
the model's scaling factor. IMAGE is (B, H, W, 3) float32 from 0 to 1.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .remote import Remote, check_url

MODEL, CATEGORY = "LATENTRT_MODEL", "latentrt"
OPEN_MODELS = 2
SEED_MAX = 2**64 - 1
# What ComfyUI multiplies a LATENT with for the UNet, by the family (comfy/latent_formats.py).
_SCALE = 0.18215
_SCALES = {"sdxl": 0.13025, "sdxl-refiner": 0.13025}
_PICTURE_NODE = "Use the node `latentrt picture`."


@dataclass(frozen=True)
class Model:
    """What is drawn with. `server` is the address of one that draws in this process' place."""

    path: str
    device: str = "auto"
    server: str = ""
    key: str = field(default="", repr=False)
    loras: tuple[tuple[str, float], ...] = ()
    controls: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Steering:
    """A control net's file or name, and the picture that it follows."""

    name: str
    image: Any
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preparation: str | None = None


@dataclass(eq=False)
class Opened:
    """A pipeline, and how many draw with it now."""

    pipe: Any
    users: int = 0


_open: OrderedDict[tuple[str, str], Opened] = OrderedDict()
_lock = threading.Lock()


@contextmanager
def opened(model: Model) -> Iterator[Any]:
    """The pipeline of a model, opened once; the longest unused gives room, once nobody draws with it."""
    import latentrt

    key = (model.path, model.device)
    with _lock:
        if key not in _open:
            _make_room(OPEN_MODELS - 1)
            _open[key] = Opened(latentrt.Pipeline.open(model.path, device=model.device))
        _open.move_to_end(key)
        one = _open[key]
        one.users += 1
    try:
        yield one.pipe
    finally:
        with _lock:
            one.users -= 1
            _make_room(OPEN_MODELS)


def _make_room(most: int) -> None:
    idle = [key for key, one in _open.items() if not one.users]
    for key in idle[: max(len(_open) - most, 0)]:
        _open.pop(key).pipe.close()


def _refused(found: str, expected: str, fix: str) -> Exception:
    from latentrt import UsageError

    return UsageError(found, expected=expected, fix=fix)


def _named(pipe: Any, path: str) -> str:
    """An adapter's or a control's own name, loaded if it is a file."""
    name = _name_of(path)
    with _lock:
        if name not in pipe.adapters.all_names():
            pipe.load_lora_weights(path, name)
    return name


def _name_of(path: str) -> str:
    """A file's own name, with what tells it from one of the same name in another folder."""
    return f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _controls(pipe: Any, model: Model) -> list[Any]:
    from latentrt import Control

    made = []
    for one in model.controls:
        name = _name_of(one.name)
        with _lock:
            if name not in pipe.controls.names:
                pipe.load_control(one.name, name)
        made.append(
            Control(
                model=name,
                image=_pictures(one.image)[0],
                strength=one.strength,
                start=one.start,
                end=one.end,
                preparation=one.preparation,
            )
        )
    return made


def _pictures(image: Any) -> list[np.ndarray]:
    """IMAGE as (H, W, 3) uint8 arrays."""
    pixels = (image.cpu().numpy() * 255.0).round().clip(0, 255).astype(np.uint8)
    return list(pixels)


def _checkpoints() -> list[str]:
    import folder_paths

    return ["demo", *folder_paths.get_filename_list("checkpoints")]


def _path_of(kind: str, name: str) -> str:
    import folder_paths

    return folder_paths.get_full_path(kind, name) or name


def _files(kind: str) -> list[str]:
    import folder_paths

    return list(folder_paths.get_filename_list(kind))


def _samplers() -> list[str]:
    from latentrt.runtime.sampling.samplers import SAMPLERS

    return list(SAMPLERS)


def _text(**more: Any) -> tuple[str, dict[str, Any]]:
    return "STRING", {"multiline": True, "dynamicPrompts": True, **more}


def _share(default: float) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01}


def _callback(steps: int) -> Any:
    """Shows ComfyUI's progress, and ends where its user interrupts."""
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(steps)

    def after(_: Any, index: int, __: float, state: dict[str, Any]) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(index + 1, state["total"])

    return after


class OpenModel:
    """A checkpoint as it is, or a package, drawn by this process."""

    CATEGORY, FUNCTION = CATEGORY, "choose"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"checkpoint": (_checkpoints(),)},
            "optional": {
                "package": (
                    "STRING",
                    {"default": "", "tooltip": "The path of an exported package, instead."},
                ),
                "device": (["auto", "cpu", "cuda"],),
            },
        }

    def choose(self, checkpoint: str, package: str = "", device: str = "auto") -> tuple[Model]:
        path = package or (checkpoint if checkpoint == "demo" else _path_of("checkpoints", checkpoint))
        return (Model(path=path, device=device),)


class ServerModel:
    """A model of a `latentrt serve` on this machine."""

    CATEGORY, FUNCTION = CATEGORY, "choose"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"address": ("STRING", {"default": "http://127.0.0.1:7860"})},
            "optional": {"model": ("STRING", {"default": ""}), "key": ("STRING", {"default": ""})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, address: str) -> bool | str:
        return check_url(address) or True

    def choose(self, address: str, model: str = "", key: str = "") -> tuple[Model]:
        if why := check_url(address):
            raise ValueError(why)
        return (Model(path=model, server=address, key=key),)


class AddLora:
    """Draw with an adapter."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05})
        return {"required": {"model": (MODEL,), "lora": (_files("loras"),), "strength": strength}}

    def add(self, model: Model, lora: str, strength: float) -> tuple[Model]:
        path = Path(lora).stem if model.server else _path_of("loras", lora)
        return (replace(model, loras=(*model.loras, (path, strength))),)


class AddControl:
    """Follow a picture's edges, depth, …: by a ControlNet or a T2I-Adapter."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from latentrt.runtime.controls.preparations import PREPARATIONS

        return {
            "required": {
                "model": (MODEL,),
                "control_net": (_files("controlnet"),),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}),
                "start": _share(0.0),
                "end": _share(1.0),
            },
            "optional": {"preparation": (["none", *PREPARATIONS],)},
        }

    def add(
        self,
        model: Model,
        control_net: str,
        image: Any,
        strength: float,
        start: float,
        end: float,
        preparation: str = "none",
    ) -> tuple[Model]:
        one = Steering(
            name=Path(control_net).stem if model.server else _path_of("controlnet", control_net),
            image=image,
            strength=strength,
            start=start,
            end=end,
            preparation=None if preparation == "none" else preparation,
        )
        return (replace(model, controls=(*model.controls, one)),)


_DRAWN: dict[str, Any] = {
    "model": (MODEL,),
    "positive": _text(),
    "negative": _text(default=""),
    "seed": ("INT", {"default": 0, "min": 0, "max": SEED_MAX, "control_after_generate": True}),
    "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
    "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1}),
}


class Sample:
    """A latent from a latent: an empty one is drawn from noise, another is redrawn by `denoise`."""

    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latent",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        more = {"sampler": (_samplers(),), "latent": ("LATENT",), "denoise": _share(1.0)}
        return {"required": {**_DRAWN, **more}}

    def sample(
        self,
        model: Model,
        positive: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        latent: dict[str, Any],
        denoise: float,
    ) -> tuple[dict[str, Any]]:
        if model.server:
            raise _refused("a server and a latent", "a server draws whole pictures", _PICTURE_NODE)
        if "noise_mask" in latent:
            raise _refused("a latent with a noise mask", "a latent alone, or picture and mask", _PICTURE_NODE)
        if denoise == 0:
            return (latent,)
        parameters: dict[str, Any] = {
            "negative_prompt": negative,
            "num_inference_steps": steps,
            "guidance_scale": cfg,
            "sampler": sampler,
            "output_type": "latent",
        }
        with opened(model) as pipe:
            samples = _sampled(pipe, model, positive, seed, latent["samples"], denoise, parameters)
        return ({**latent, "samples": samples},)


def _sampled(
    pipe: Any,
    model: Model,
    prompt: str,
    seed: int,
    latents: torch.Tensor,
    denoise: float,
    parameters: dict[str, Any],
) -> torch.Tensor:
    """(B, C, H/8, W/8) at the decoder's scale, of as many: each has a seed of its own."""
    manifest = pipe.package.manifest
    samples = latents.cpu().numpy().astype(np.float32)
    if samples.shape[1] != manifest.latent_channels:
        raise _refused(
            f"a latent of {samples.shape[1]} channels",
            f"{manifest.latent_channels}, which the model has",
            "Make the latent for this model.",
        )
    scale = np.float32(_SCALES.get(manifest.family, _SCALE))
    loras = [(_named(pipe, path), strength) for path, strength in model.loras]
    own = {**parameters, "loras": loras, "controls": _controls(pipe, model) or None}
    height, width = (side * manifest.latent_scale for side in samples.shape[2:])
    drawn: list[Any] = []
    for number, sample in enumerate(samples):
        if samples.any() or denoise < 1:
            own |= {"image": sample[None] * scale, "strength": denoise}
        else:
            own |= {"height": height, "width": width}
        callback = _callback(own["num_inference_steps"])
        drawn.append(pipe(prompt, seed=seed + number, callback_on_step_end=callback, **own).images)
    return torch.from_numpy(np.concatenate(drawn) / scale)


class Draw:
    """A whole picture from a prompt, perhaps from another picture; here, or by a server."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("image", "parameters")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = ("INT", {"default": 512, "min": 64, "max": 4096, "step": 8})
        return {
            "required": {
                **_DRAWN,
                "sampler": (_samplers(),),
                "width": size,
                "height": size,
                "count": ("INT", {"default": 1, "min": 1, "max": 16}),
            },
            "optional": {"image": ("IMAGE",), "mask": ("MASK",), "strength": _share(0.75)},
        }

    def draw(
        self,
        model: Model,
        positive: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        width: int,
        height: int,
        count: int,
        image: Any = None,
        mask: Any = None,
        strength: float = 0.75,
    ) -> tuple[Any, str]:
        values: dict[str, Any] = {
            "negative_prompt": negative,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": cfg,
            "sampler": sampler,
            "width": width,
            "height": height,
            "num_images_per_prompt": count,
        }
        if image is not None:
            if len(image) > 1:
                raise _refused(f"{len(image)} pictures to start from", "one", "`count` draws several of it.")
            values |= {"image": _pictures(image)[0], "strength": strength}
        if mask is not None and image is not None:
            values["mask_image"] = _pictures(mask[..., None])[0][..., 0]
        if model.server:
            pixels, told = Remote(model.server, model.key).draw(positive, values, model)
        else:
            with opened(model) as pipe:
                result = pipe(
                    positive,
                    output_type="np",
                    loras=[(_named(pipe, path), share) for path, share in model.loras],
                    controls=_controls(pipe, model) or None,
                    callback_on_step_end=_callback(steps),
                    **values,
                )
            pixels, told = result.images, result.infotext()
        return torch.from_numpy(pixels.astype(np.float32) / 255.0), told


NODE_CLASS_MAPPINGS = {
    "LatentrtModel": OpenModel,
    "LatentrtServer": ServerModel,
    "LatentrtLora": AddLora,
    "LatentrtControl": AddControl,
    "LatentrtSampler": Sample,
    "LatentrtPicture": Draw,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LatentrtModel": "latentrt model",
    "LatentrtServer": "latentrt server",
    "LatentrtLora": "latentrt LoRA",
    "LatentrtControl": "latentrt control",
    "LatentrtSampler": "latentrt sampler",
    "LatentrtPicture": "latentrt picture",
}
