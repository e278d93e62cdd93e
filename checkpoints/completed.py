"""A ControlNet that is stored as a change of a checkpoint's UNet, with its weights written out.

As with fused adapters, the computed weights are in a file of their own, which the control names in place of
what it had, and whatever reads it (checks, ranges) knows nothing of the base.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .controls.control_file import ControlFile
from .made_weights import write_made
from .stages import OnProgress, stages

if TYPE_CHECKING:
    from .templates.archive import Dtype


def complete(
    control: ControlFile, folder: Path, dtype: Dtype, progress: OnProgress | None = None
) -> ControlFile:
    """Compute the weights of a control that no file has. One tensor at a time is in memory.

    Args:
        control: of `controls.with_base.completed`; one that is whole comes back as it is.
        folder: is made for the weights, which must stay there while the result is read.
        dtype: the arithmetic of the graphs.
        progress: is told that it begins.

    Raises:
        NumericError: a weight is beyond what fp16 holds.
        CheckpointError: a weights file changed meanwhile.
        OSError: the folder cannot be written.
    """
    if not control.made:
        return control
    stages(1, progress)("complete the ControlNet")
    folder.mkdir()
    written = write_made(folder / f"{control.part.name}.safetensors", control.made, dtype)
    part = replace(control.part, tensors={**control.part.tensors, **written})
    return replace(control, part=part, made={})
