"""The package of a checkpoint that is opened as it is, made in the cache.

Nothing else of opening reads graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

import onnx_ir as ir

from ..engines.package import Package
from ..engines.safetensors_format import ITEM_SIZES
from ..engines.store.files import storage_errors
from ..engines.store.folder import StoreFolder
from .beside import beside, put
from .completed import complete
from .contents import Content
from .controls.control_file import ControlFile
from .entries import write_note
from .files.net_reads import net_tensors
from .files.open import Checkpoint
from .files.source import Source
from .fused import fuse
from .graphs.weights import attach, places
from .opening import Opening
from .precision.calibration import Tokenize
from .stages import OnProgress
from .writing import CopiedWeights, TemplateGraphs, copy_weights, weight_types, write_package

_STORED = {"fp16": "F16", "fp32": "F32"}
_GRAPHS_BYTES = 10_000_000  # what an entry takes at most without converted weights


def make(
    opening: Opening, cache: StoreFolder, entry: Path, tokenize: Tokenize, progress: OnProgress | None
) -> Package:
    """Write the package of a checkpoint into the cache, and open it.

    Args:
        opening: the checkpoint.
        cache: the store that the entry is in.
        entry: the package's folder, which is put there when it is whole.
        tokenize, progress: as in `open_checkpoint`.

    Raises:
        As `open_checkpoint`.
    """
    dtype = opening.options.dtype
    graphs = TemplateGraphs(opening.source, dtype, opening.options.templates)
    failed = partial(
        storage_errors, cache.root, f"{opening.source.root} cannot be made ready", room=_room(opening)
    )
    with failed(), beside(entry) as folder, failed():  # the inner one still sees what was written
        source = opening.source
        made = folder.parent / "made"
        if isinstance(source, Checkpoint):
            source = fuse(source, opening.fused, made, dtype, progress)
        elif isinstance(source, ControlFile):
            source = complete(source, made, dtype, progress)
        write_package(
            source,
            folder,
            graphs=graphs.of(source),
            weights=_WeightsElsewhere(opening, source),
            dtype=dtype,
            tokenize=tokenize,
            progress=progress,
            identity=opening.identity,
        )
        write_note(folder, opening.note(folder))
        put(folder, entry, folder)
    return opening.package(entry)


def _room(opening: Opening) -> str:
    """What an entry takes on the disk, for whoever has no room for it."""
    size = _GRAPHS_BYTES + ITEM_SIZES[_STORED[opening.options.dtype]] * sum(
        prod(header.shape) for name in opening.copied for header in opening.tensors[name].values()
    )
    copies = " and weights that are not as in the file" if opening.copied else ""
    return f"{size / 1e6:.0f} MB: the graphs{copies}"


class _WeightsElsewhere:
    """Weights that stay in the user's files, unless the backend does not read their type, adapters are in, or
    no file has them.

    Args:
        opening: the checkpoint as it lies.
        source: with all its weights in files.
    """

    def __init__(self, opening: Opening, source: Source) -> None:
        self._opening, self._source = opening, source

    @property
    def elsewhere(self) -> Mapping[str, Content]:
        """The user's files, by their names in the manifest."""
        return self._opening.files

    def attach(self, component: str, model: ir.Model, folder: Path) -> list[str]:
        """Give a graph its weights; their files' names in the manifest."""
        if component not in self._opening.unread and component in self._opening.copied:
            return CopiedWeights(self._source).attach(component, model, folder)
        tensors = net_tensors(self._source, component)
        if component in self._opening.unread:
            return copy_weights(component, model, folder, tensors, weight_types(model, tensors))
        attach(model, places(tensors))
        return list(dict.fromkeys(self._opening.names[header.file] for header in tensors.values()))
