"""One part of a checkpoint, such as its UNet: a config, and the headers of its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from ...engines.errors import CheckpointError
from .tensors import TensorHeader, read_headers

DOWNLOAD = "Download the checkpoint again: hf download REPOSITORY --local-dir FOLDER."
SUPPORTED = (
    "Stable Diffusion 1.x or 2.x, SDXL or its refiner, a latent consistency model, or Stable unCLIP 2.1"
    " (image variations)"
)
# Channels of a UNet's input -> the family that has them, for families that are refused.
REFUSED_CHANNELS: Mapping[int, str] = {
    5: "Stable Diffusion 2 depth-to-image",
    7: "the Stable Diffusion upscaler",
    8: "InstructPix2Pix",
}
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
# The stem of a part's weights file, by the library that wrote the part.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a checkpoint: its config, and its tensors by diffusers' or transformers' names.

    `folder` is for messages: the part's folder, or the file that holds the whole checkpoint.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]


def read_component(folder: Path, name: str, stem: str, *, prefer_fp16: bool = False) -> Component:
    """Read a part that has a folder of its own.

    Args:
        folder: has `config.json` and weights.
        name: the part's.
        stem: DIFFUSERS or TRANSFORMERS, by the library that wrote it.
        prefer_fp16: take the `.fp16.safetensors` variant where both are there.

    Raises:
        CheckpointError: the config or the weights are missing or damaged, or the weights are pickles.
    """
    config = read_json(folder / "config.json")
    tensors: dict[str, TensorHeader] = {}
    for file in _weight_files(folder, stem, prefer_fp16):
        tensors.update(read_headers(file))
    return Component(name=name, folder=folder, config=config, tensors=tensors)


def refuse_quantised(part: Component) -> None:
    """Raise CheckpointError for weights in fp8 or integers: dequantising them needs more than the tensor."""
    for name, tensor in part.tensors.items():
        if tensor.dtype not in _WEIGHT_TYPES and not name.endswith("position_ids"):  # CLIP's buffer
            raise CheckpointError(
                f"{part.folder} stores the weight {name[:80]!r} as {tensor.dtype}",
                expected=f"one of {', '.join(_WEIGHT_TYPES)}",
                fix="Use the checkpoint's fp16 or fp32 weights.",
            )


def missing(path: Path) -> NoReturn:
    """Raise the CheckpointError for a file that is missing."""
    raise CheckpointError(f"{path} is missing", expected=SUPPORTED, fix=DOWNLOAD)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if it is missing, damaged or something else."""
    if not path.is_file():
        missing(path)
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error})", expected="a JSON object", fix=DOWNLOAD
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}", expected="a JSON object", fix=DOWNLOAD)
    return cast(dict[str, Any], data)


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
            fix=f"Convert them: latentrt convert {folder / pickles[0]} -o {folder / stem}.safetensors.",
        )
    raise CheckpointError(f"{folder} has no weights", expected=f"{stem}.safetensors", fix=DOWNLOAD)


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = (
        set(map(str, cast(dict[str, object], weight_map).values())) if isinstance(weight_map, dict) else {""}
    )
    if any(not name or Path(name).name != name for name in names):
        raise CheckpointError(
            f"{index} has no weight_map of plain file names",
            expected="shards in the same folder",
            fix=DOWNLOAD,
        )
    for name in names:
        if not (index.parent / name).is_file():
            missing(index.parent / name)
    return [index.parent / name for name in sorted(names)]
