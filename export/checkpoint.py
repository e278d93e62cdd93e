"""Read a checkpoint: find its parts, recognise its family, and refuse what no net can be made of.

Nothing here imports torch, and nothing here unpickles: only JSON and safetensors headers are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from ..engines.errors import CheckpointError
from .single_file import refuse_file

_DOWNLOAD = "Download the checkpoint again: hf download REPOSITORY --local-dir FOLDER."
_SUPPORTED = "a Stable Diffusion 1.x or 2.x text-to-image folder in diffusers' layout"
_OTHER = "Use a Stable Diffusion 1.x or 2.x checkpoint; other families are not supported yet."

# Pipeline classes whose nets are those of text-to-image.
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# diffusers' class prefix -> what its users call it. First match wins.
_FAMILIES = {
    "StableDiffusionXLInpaint": "SDXL inpainting",
    "StableDiffusionXL": "SDXL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionInpaint": "Stable Diffusion inpainting",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableDiffusionUpscale": "the Stable Diffusion upscaler",
    "StableDiffusionLatentUpscale": "the Stable Diffusion latent upscaler",
    "StableDiffusionDepth2Img": "Stable Diffusion 2 depth-to-image",
    "StableUnCLIP": "Stable unCLIP",
    "LatentConsistencyModel": "a latent consistency model",
    "Flux": "Flux",
}
# UNet options that add inputs or nets this release does not export: option -> (family, accepted values).
_UNET_OPTIONS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "addition_embed_type": ("SDXL", (None,)),
    "time_cond_proj_dim": ("a latent consistency model", (None,)),
    "class_embed_type": ("unCLIP, or another class-conditioned model", (None,)),
    "num_class_embeds": ("the upscaler, or another class-conditioned model", (None,)),
    "encoder_hid_dim_type": ("an IP-Adapter or Kandinsky model", (None,)),
    "encoder_hid_dim": ("an IP-Adapter or Kandinsky model", (None,)),
    "addition_embed_type_num_heads": ("DeepFloyd IF", (None, 64)),
    "time_embedding_type": ("a model with Fourier time embeddings", (None, "positional")),
    "center_input_sample": ("a model with centred input", (None, False)),
    "cross_attention_norm": ("DeepFloyd IF", (None,)),
    "dual_cross_attention": ("Versatile Diffusion", (None, False)),
    "out_channels": ("a model that also predicts variance", (4,)),
}


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor of a safetensors file: where it is, its type (safetensors' name) and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a checkpoint: its config, and its tensors by the checkpoint's own names."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusers folder that can be exported."""

    root: Path
    family: str
    text_encoder: Component
    unet: Component
    vae: Component
    scheduler: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path, *, prefer_fp16: bool = False) -> Checkpoint:
        """Read configs and safetensors headers.

        Args:
            path: the checkpoint's folder.
            prefer_fp16: take the `.fp16.safetensors` variant where both are there.

        Raises:
            CheckpointError: nothing there; a family not supported (named); a damaged config or
                weights file; weights that are pickles.
        """
        root = Path(path)
        if root.is_file():
            refuse_file(root)
        _refuse_pipeline(root)
        unet = _component(root, "unet", "diffusion_pytorch_model", prefer_fp16)
        _refuse_unet(unet)
        text_encoder = _component(root, "text_encoder", "model", prefer_fp16)
        vae = _component(root, "vae", "diffusion_pytorch_model", prefer_fp16)
        if not (root / "tokenizer").is_dir():
            _missing(root / "tokenizer")
        return cls(
            root=root,
            family="sd2" if text_encoder.config.get("hidden_act") == "gelu" else "sd1",
            text_encoder=text_encoder,
            unet=unet,
            vae=vae,
            scheduler=_json(root / "scheduler" / "scheduler_config.json"),
        )


def _missing(path: Path) -> NoReturn:
    raise CheckpointError(f"{path} is missing", expected=_SUPPORTED, fix=_DOWNLOAD)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        _missing(path)
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error})", expected="a JSON object", fix=_DOWNLOAD
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}", expected="a JSON object", fix=_DOWNLOAD
        )
    return cast(dict[str, Any], data)


def _refuse_pipeline(root: Path) -> None:
    if not root.exists():
        raise CheckpointError(
            f"{root} does not exist", expected=_SUPPORTED, fix="Check the path; downloads are up to you."
        )
    pipeline = str(_json(root / "model_index.json").get("_class_name"))
    if pipeline in _PIPELINES:
        return
    family = next(
        (name for prefix, name in _FAMILIES.items() if pipeline.startswith(prefix)), "another family"
    )
    raise CheckpointError(f"{root} holds {family} ({pipeline})", expected=_SUPPORTED, fix=_OTHER)


def _refuse_unet(unet: Component) -> None:
    channels = unet.config.get("in_channels", 4)
    if channels != 4:
        kinds = {
            9: "an inpainting model",
            8: "InstructPix2Pix",
            5: "a depth-to-image model",
            7: "an upscaler",
        }
        kind = kinds.get(channels, "another family") if isinstance(channels, int) else "another family"
        raise CheckpointError(
            f"{unet.folder} is the UNet of {kind} (in_channels {channels})", expected=_SUPPORTED, fix=_OTHER
        )
    if not isinstance(unet.config.get("cross_attention_dim", 1280), int):
        raise CheckpointError(
            f"{unet.folder} has a cross_attention_dim of its own for each block",
            expected=_SUPPORTED,
            fix=_OTHER,
        )
    for option, (family, accepted) in _UNET_OPTIONS.items():
        value = unet.config.get(option, accepted[0])
        if value not in accepted:
            raise CheckpointError(
                f"{unet.folder} is the UNet of {family} ({option} {value!r})", expected=_SUPPORTED, fix=_OTHER
            )


def _component(root: Path, name: str, stem: str, prefer_fp16: bool) -> Component:
    folder = root / name
    config = _json(folder / "config.json")
    tensors: dict[str, TensorHeader] = {}
    for file in _weight_files(folder, stem, prefer_fp16):
        tensors.update(_headers(file))
    return Component(name=name, folder=folder, config=config, tensors=tensors)


def _weight_files(folder: Path, stem: str, prefer_fp16: bool) -> list[Path]:
    """The safetensors files of a component: one, or the shards of an index."""
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors.index.json",
    ]
    for candidate in half + plain if prefer_fp16 else plain + half:
        path = folder / candidate
        if path.is_file():
            return [path] if path.suffix == ".safetensors" else _shards(path)
    pickles = sorted(path.name for pattern in ("*.bin", "*.ckpt", "*.pt") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights as pickles ({', '.join(pickles)}): reading them can run code",
            expected=f"{stem}.safetensors",
            fix="Convert them where you trust the source:"
            ' python -c "from diffusers import StableDiffusionPipeline as P;'
            " P.from_pretrained('FOLDER').save_pretrained('NEW')\".",
        )
    raise CheckpointError(f"{folder} has no weights", expected=f"{stem}.safetensors", fix=_DOWNLOAD)


def _shards(index: Path) -> list[Path]:
    weight_map = _json(index).get("weight_map")
    names = (
        set(map(str, cast(dict[str, object], weight_map).values())) if isinstance(weight_map, dict) else {""}
    )
    if any(not name or Path(name).name != name for name in names):
        raise CheckpointError(
            f"{index} has no weight_map of plain file names",
            expected="shards in the same folder",
            fix=_DOWNLOAD,
        )
    for name in names:
        if not (index.parent / name).is_file():
            _missing(index.parent / name)
    return [index.parent / name for name in sorted(names)]


def _headers(file: Path) -> dict[str, TensorHeader]:
    from safetensors import SafetensorError, safe_open

    headers: dict[str, TensorHeader] = {}
    try:
        with cast(Any, safe_open)(file, framework="np") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                part = stream.get_slice(name)
                headers[name] = TensorHeader(file=file, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file ({error})", expected="a complete download", fix=_DOWNLOAD
        ) from error
    return headers
