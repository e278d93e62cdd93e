"""One part of a checkpoint, such as its UNet: a config, and tensors.

Tensors are described from their files' headers, and read as views of the mapped files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from ...engines.errors import CheckpointError, command
from ...engines.lfs import refuse_pointer
from ...engines.safetensors_format import map_tensors, read_header
from ...engines.spec import Array
from ..stored_types import numpy_type, seen_as

DOWNLOAD = "Download the checkpoint again: hf download REPOSITORY --local-dir FOLDER"
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
# Suffixes of files that are pickles.
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# The stem of a part's weights file, by the library that wrote the part.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Where a tensor lies in a safetensors file, and how it is read from there.

    Attributes:
        file: the safetensors file.
        name: the tensor's name in `file`.
        dtype: safetensors' name of the type, "F16".
        shape: what results after `rows`, `transposed`, and after dropping axes of size 1 at the end (a 1x1
            convolution that is read as a linear layer).
        rows: only these rows of the first axis, begin and end (OpenCLIP stores query, key and value as one).
        transposed: stored as (in, out), read as (out, in) (OpenCLIP's `text_projection`).
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False


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
    """Read a part from a folder with `config.json` and weights.

    `stem` is DIFFUSERS or TRANSFORMERS; `prefer_fp16` takes the `.fp16` variant where both are there.

    Raises:
        CheckpointError: the config or the weights are missing or damaged, or the weights are pickles.
    """
    config = read_json(folder / "config.json")
    files = _weight_files(folder, stem, prefer_fp16)
    tensors = {name: header for file in files for name, header in read_headers(file).items()}
    return Component(name=name, folder=folder, config=config, tensors=tensors)


def missing(path: Path) -> NoReturn:
    """Raise the CheckpointError for a file that is missing."""
    raise CheckpointError(f"{path} is missing", expected=SUPPORTED, fix=DOWNLOAD)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if it is missing, damaged or something else."""
    if not path.is_file():
        missing(path)
    refuse_pointer(path)
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
    """The safetensors files of a component: one, or the shards of an index.

    Of several variants (`STEM.VARIANT.safetensors`), `fp16` and the one without a name are known; another is
    taken where it is the only one.
    """
    names = [path.name for path in folder.glob(f"{stem}*") if path.is_file()]
    found = {variant: folder / name for variant, name in weight_variants(names, stem).items()}
    order = ("fp16", "") if prefer_fp16 else ("", "fp16")
    if not found:
        _refuse_without_weights(folder, stem)
    variant = next((name for name in order if name in found), next(iter(found)))
    if variant not in order and len(found) > 1:
        first = next(iter(found.values()))
        raise CheckpointError(
            f"{folder} has its weights as {' and '.join(path.name for path in found.values())}",
            expected=f"one of them as {stem}{_ending(first)}",
            fix=f"Rename the one to use: {command('mv', first, folder / f'{stem}{_ending(first)}')}",
        )
    path = found[variant]
    return [path] if path.suffix == ".safetensors" else _shards(path)


def weight_variants(names: Iterable[str], stem: str) -> dict[str, str]:
    """The weights among the files' `names` in a folder: a variant's name ("" for none) -> its file or index.

    A file goes before an index.
    """
    # As transformers, diffusers and recent diffusers name them.
    forms = (r"(\.[\w-]+)?\.safetensors", r"\.safetensors\.index(\.[\w-]+)?\.json")
    forms = (*forms, r"(\.[\w-]+)\.safetensors\.index\.json")
    ordered = sorted(names)
    found: dict[str, str] = {}
    for form in forms:
        for name in ordered:
            match = re.fullmatch(re.escape(stem) + form, name)
            if match and not re.search(r"-\d{5}-of-\d{5}", name):
                found.setdefault((match[1] or "").removeprefix("."), name)
    return found


def _ending(path: Path) -> str:
    return ".safetensors" if path.suffix == ".safetensors" else ".safetensors.index.json"


def _refuse_without_weights(folder: Path, stem: str) -> NoReturn:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    expected = f"{stem}.safetensors"
    if pickles:
        for name in pickles:
            refuse_pointer(folder / name)
        whole = _one_of_pickles(pickles)
        convert = command("latentrt", "convert", *(folder / name for name in whole), "-o", folder / expected)
        raise CheckpointError(
            f"{folder} has its weights as pickles ({', '.join(pickles)}): reading them can run code",
            expected=expected,
            fix=f"Convert them: {convert}",
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    fix = DOWNLOAD
    if len(weights) == 1:
        fix = f"Rename them, if they are its weights: {command('mv', folder / weights[0], folder / expected)}"
    others = [name for name in names if name != "config.json"]
    there = f", only {', '.join(others)}" if others else ""
    raise CheckpointError(f"{folder} has no weights that are known{there}"[:500], expected=expected, fix=fix)


def _one_of_pickles(names: list[str]) -> list[str]:
    """The names of one set of weights: the plainest file that is whole, or all shards of one kind."""
    kinds = [re.sub(r"-\d{5}(?=-of-\d{5})", "", name) for name in names]
    whole = [name for name, kind in zip(names, kinds, strict=True) if name == kind]
    if whole:
        return [min(whole, key=lambda name: (name.count("."), name))]
    return [name for name, kind in zip(names, kinds, strict=True) if kind == min(kinds, key=len)]


def _shards(index: Path) -> list[Path]:
    paths = [index.parent / name for name in shard_names(read_json(index), index)]
    for path in paths:
        if not path.is_file():
            missing(path)
    return paths


def shard_names(index: Mapping[str, Any], where: object) -> list[str]:
    """The files that an index of shards names. Raises CheckpointError unless they are plain names."""
    weight_map = index.get("weight_map")
    shards = cast(dict[str, object], weight_map).values() if isinstance(weight_map, dict) else [""]
    names = sorted(set(map(str, shards)))
    if any(not name or Path(name).name != name for name in names):
        found = f"{where} has no weight_map of plain file names"
        raise CheckpointError(found, expected="shards in the same folder", fix=DOWNLOAD)
    return names


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file by name, in the order of the header. Nothing but the header is read.

    Raises:
        CheckpointError: no such file, or one that breaks a rule of the format.
    """
    tensors = read_header(path).tensors.items()
    return {name: TensorHeader(file=path, name=name, dtype=t.dtype, shape=t.shape) for name, t in tensors}


def read_tensors(headers: Mapping[str, TensorHeader], *, writable: bool = False) -> dict[str, Array]:
    """The tensors that `headers` describe, in types of weights (`stored_types`), by the mapping's names.

    All are views of the mapped files, slices and transposes too: memory is taken by the pages that are used.
    `writable` maps copy-on-write, for libraries that want arrays they could write to.

    Raises:
        CheckpointError: a file changed since its headers were read.
    """
    tensors: dict[str, Array] = {}
    for file in {header.file for header in headers.values()}:
        found, content = map_tensors(file, writable=writable)
        try:
            for name, header in headers.items():
                if header.file != file:
                    continue
                place = found.tensors[header.name]
                if place.dtype != header.dtype:
                    raise ValueError(f"{header.name} was {header.dtype}")
                flat = seen_as(np.asarray(content[header.name]), numpy_type(place.dtype))
                stored: Array = np.reshape(flat, place.shape)
                part = stored if header.rows is None else stored[slice(*header.rows)]
                tensors[name] = np.reshape(np.transpose(part) if header.transposed else part, header.shape)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file} changed while it was read ({error})",
                expected="a file nobody writes to",
                fix="Download the file again, or have it written again by the safetensors library.",
            ) from error
    return {name: tensors[name] for name in headers}
