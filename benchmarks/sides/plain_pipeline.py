"""diffusers' plain pipeline of a task's checkpoint: a diffusers folder, or a single file."""

from __future__ import annotations

from typing import Any

from ...checkpoints.files.open import Checkpoint
from . import diffusers_pipeline
from .contract import Task, missing_checkpoint, missing_modules
from .single_file import not_set_up, open_file


def missing(task: Task, *modules: str) -> str | None:
    """None if diffusers and these modules are installed and can open the task's model, else the reason."""
    if reason := missing_modules("torch", "diffusers", "transformers", *modules):
        return reason
    if task.checkpoint is None and task.model.is_file():
        return not_set_up(Checkpoint.open(task.model))
    if reason := missing_checkpoint(task):
        return reason
    assert task.checkpoint is not None, "it is at hand"
    if (task.checkpoint / "text_encoder_2").is_dir():
        return "a model with two text encoders is opened as one file, and this checkpoint is a folder"
    return None


def open_plain(task: Task) -> Any:
    """The pipeline in float32, with every net loaded. Raises CheckpointError for a file that is none."""
    return diffusers_pipeline.assemble(task.checkpoint) if task.checkpoint else open_file(task.model)
