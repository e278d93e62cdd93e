"""A checkpoint with adapters in its weights: what was one file more is part of the model, for good.

The merged weights are in files of their own, which the checkpoint names in place of those that it had.
Whatever reads a checkpoint (checks, ranges, torch) reads what adapters made of it, and knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.net_weights import check_range
from ..engines.package import Change, FusedAdapter
from ..engines.spec import NETS, Array
from .files.component import TensorHeader, read_tensors
from .files.net_reads import net_tensors
from .files.open import Checkpoint
from .files.source import Source
from .made_weights import Weight, write_made
from .precision.calibration import components
from .stages import OnProgress, stages

if TYPE_CHECKING:
    from .templates.archive import Dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """What adapters make of a checkpoint.

    Attributes:
        adapters: what the manifest says of them.
        changes: by part and weight, in the names of packages.
        few_steps: as in `Checkpoint`.
        given: the adapters' files, absolute, with their strengths as the user gave them.
        few_steps_of: the few-step LoRA that the user named; "" for none.
        notes: lines for the user.
    """

    adapters: tuple[FusedAdapter, ...] = ()
    changes: Mapping[str, Mapping[str, Change]] = field(default_factory=dict[str, "Mapping[str, Change]"])
    few_steps: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: tuple[tuple[Path, Any], ...] = ()
    few_steps_of: str = ""
    notes: tuple[str, ...] = ()

    def noted_in(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint, which says that these adapters are in it; its weights are as before."""
        return replace(source, fused=self.adapters, few_steps=self.few_steps)

    def touched(self, source: Source) -> dict[str, dict[str, TensorHeader]]:
        """The weights that change, by component, of those that its net reads."""
        found: dict[str, dict[str, TensorHeader]] = {}
        for component in components(source):
            changes = self.changes.get(NETS[component].part, {})
            tensors = net_tensors(source, component) if changes else {}
            if changed := {name: header for name, header in tensors.items() if name in changes}:
                found[component] = changed
        return found


def fuse(
    source: Checkpoint, fused: Fused, folder: Path, dtype: Dtype, progress: OnProgress | None = None
) -> Checkpoint:
    """Merge adapters into a checkpoint's weights. One tensor at a time is in memory.

    Each weight is the checkpoint's own with all changes, one sum, rounded once to the type that a package of
    `dtype` stores it in; what has 8 bits becomes float16.

    Args:
        source: the checkpoint, without adapters.
        fused: what to merge.
        folder: is made for the merged weights, which must stay there while the result is read.
        dtype: the arithmetic of the graphs.
        progress: is told that merging begins.

    Returns:
        The checkpoint, whose tensors that change are in `folder`; itself where there are no adapters.

    Raises:
        NumericError: a merged weight is beyond what fp16 holds.
        CheckpointError: a weights file changed meanwhile.
        OSError: the folder cannot be written.
    """
    if not fused.adapters:
        return source
    stages(1, progress)("merge the adapters")
    folder.mkdir()
    parts = dict(source.parts)
    for component, tensors in fused.touched(source).items():
        part = parts[NETS[component].part]
        merged = _merged(part.name, tensors, fused.changes[part.name], folder, dtype)
        found = {name: merged.get(header, header) for name, header in part.tensors.items()}
        parts[part.name] = replace(part, tensors=found)
    return replace(fused.noted_in(source), parts=parts)


def _merged(
    part: str,
    tensors: Mapping[str, TensorHeader],
    changes: Mapping[str, Change],
    folder: Path,
    dtype: Dtype,
) -> dict[TensorHeader, TensorHeader]:
    """Write the merged tensors of a part; by the header that each had, the one that it has there."""
    base = read_tensors(tensors)

    def merged(name: str) -> Array:
        changed = changes[name](base[name])
        check_range(f"{part}.{name}", changed)
        return changed

    weights = {
        name: Weight(shape=header.shape, dtype=header.dtype, read=partial(merged, name))
        for name, header in tensors.items()
    }
    written = write_made(folder / f"{part}.safetensors", weights, dtype)
    return {header: written[name] for name, header in tensors.items()}
