"""What a folder without `model_index.json` is: of one part, of an adapter, or of files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from ...engines.errors import CheckpointError, command
from .component import DIFFUSERS, TRANSFORMERS, TensorHeader, read_component, read_headers, read_json
from .file_kinds import STEER, UNUSABLE_CONTROL, FileKind, kind_of_tensors
from .ldm_names import usual_names

_NOT_YET = "It cannot be used alone, or not yet: open a whole checkpoint."
_PEFT = FileKind(
    name="lora",
    what="a PEFT adapter's folder (LoRA)",
    todo="Draw with it and a model that it is made for: latentrt generate PROMPT -m MODEL --lora {file}",
)
_GIVE = "Give it to a checkpoint: latentrt generate PROMPT -m CHECKPOINT"
# The class in a folder's config.json -> what the folder is.
_CLASSES: Mapping[str, FileKind] = {
    name: FileKind(name=kind, what=what, todo=todo)
    for name, kind, what, todo in (
        ("ControlNetModel", "controlnet", "a ControlNet's folder", STEER["controlnet"]),
        ("ControlNetUnionModel", "controlnet", "a ControlNet's folder (Union)", STEER["controlnet"]),
        ("ControlNetModel_Union", "controlnet", "a ControlNet's folder (Union)", STEER["controlnet"]),
        ("ControlNetXSAdapter", UNUSABLE_CONTROL, "a ControlNet-XS' folder", _NOT_YET),
        ("T2IAdapter", "t2i-adapter", "a T2I-Adapter's folder", STEER["t2i-adapter"]),
        ("MotionAdapter", "animatediff", "a folder of AnimateDiff", _NOT_YET),
        ("AutoencoderKL", "vae", "an autoencoder's folder", f"{_GIVE} --vae {{file}}"),
        ("AutoencoderTiny", "tiny-vae", "a tiny autoencoder's folder", f"{_GIVE} --tiny-vae {{file}}"),
        ("UNet2DConditionModel", "unet", "a UNet's folder", _NOT_YET),
        ("CLIPTextModel", "text-encoder", "a text encoder's folder", _NOT_YET),
        ("CLIPTextModelWithProjection", "text-encoder", "a text encoder's folder", _NOT_YET),
        ("CLIPVisionModelWithProjection", "image-encoder", "an image encoder's folder", _NOT_YET),
    )
}


def kind_of_folder(root: Path) -> FileKind | None:
    """What a folder with a config is, or one of files; None where there is nothing that could be a model's.

    Raises:
        CheckpointError: its config is damaged.
    """
    if (root / "adapter_config.json").is_file():
        return _PEFT
    if (root / "config.json").is_file():
        config = read_json(root / "config.json")
        listed: Any = config.get("architectures")
        architectures = cast(list[Any], listed) if isinstance(listed, list) and listed else [None]
        found = str(config.get("_class_name") or architectures[0])
        other = FileKind(name="other", what=f"a folder of {found[:100]}", todo=_NOT_YET)
        return _CLASSES.get(found.removeprefix("Flax"), other)
    files = files_in(root)
    if not files:
        return None
    names = ", ".join(path.name for path in files[:3]) + (" …" if len(files) > 3 else "")
    whole = [path for path in files if _is_checkpoint(path)]
    largest = max(whole or files, key=lambda path: path.stat().st_size)
    todo = f"Look at a file: {command('latentrt', 'inspect', largest)}"
    if whole:
        todo = f"Open the file: {command('latentrt', 'generate', 'PROMPT', '-m', largest)}"
    what = f"a folder of files ({names}), without model_index.json"
    return FileKind(name="files", what=what[:500], todo=todo.replace("{", "{{").replace("}", "}}"))


def files_in(root: Path) -> list[Path]:
    """The safetensors files in a folder; none of what is no folder, but a pipe, say."""
    there = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in there if path.suffix.lower() == ".safetensors" and path.is_file())


def tensors_in(root: Path) -> list[TensorHeader]:
    """The tensors of a folder: of its part, as a reader takes them, else of all files that can be read."""
    for stem in (DIFFUSERS, TRANSFORMERS):
        with suppress(CheckpointError):
            return list(read_component(root, root.name, stem).tensors.values())
    found: list[TensorHeader] = []
    for path in files_in(root):
        with suppress(CheckpointError):
            found += read_headers(path).values()
    return found


def _is_checkpoint(path: Path) -> bool:
    """Whether a file's header is that of a whole checkpoint."""
    with suppress(CheckpointError):
        return kind_of_tensors(usual_names(read_headers(path))).name == "checkpoint"
    return False
