"""One-file checkpoints as diffusers opens them; nothing is fetched: the configs that it asks for are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...checkpoints.files.open import Checkpoint

# The pipeline that diffusers draws a family from a prompt with.
PIPELINES: Mapping[str, str] = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def not_set_up(source: Checkpoint) -> str | None:
    """None if diffusers' side has a pipeline for a checkpoint, else the reason."""
    if source.family not in PIPELINES or source.image_latents:
        return f"it is not set up for {source.family}, drawn from a prompt alone"
    return None


def without_checker(family: str) -> dict[str, Any]:
    """The options that leave the safety checker out, where a family has one."""
    return {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}


def open_file(path: Path) -> Any:
    """The pipeline of a one-file checkpoint in float32.

    Raises:
        CheckpointError: the file is missing, damaged, or of a family that is not supported.
    """
    torch, diffusers, source = import_module("torch"), import_module("diffusers"), Checkpoint.open(path)
    with TemporaryDirectory() as configs:
        write_configs(source, Path(configs))
        return getattr(diffusers, PIPELINES[source.family]).from_single_file(
            str(path),
            config=configs,
            local_files_only=True,
            torch_dtype=torch.float32,
            **without_checker(source.family),
        )


def write_configs(source: Checkpoint, folder: Path) -> None:
    """Write what diffusers' `from_single_file` reads beside the file: a diffusers folder without weights."""
    index: dict[str, Any] = {"_class_name": PIPELINES[source.family]}
    for name, part in source.parts.items():
        is_text = name.startswith("text_encoder")
        library, default = ("transformers", "CLIPTextModel") if is_text else ("diffusers", "")
        kind = "CLIPTextModelWithProjection" if name == "text_encoder_2" else default
        index[name] = [library, kind or part.config["_class_name"]]
        _write_json(folder / name / "config.json", part.config)
    for name, write in source.tokenizers.items():
        index[name] = ["transformers", "CLIPTokenizer"]
        write(folder / name)
    index["scheduler"] = ["diffusers", source.scheduler["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", source.scheduler)
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(data)), encoding="utf-8")
