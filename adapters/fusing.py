"""Adapters that become part of a checkpoint's weights: read here, and merged by `checkpoints.fused`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ..checkpoints.files.net_reads import net_tensors
from ..checkpoints.files.open import Checkpoint
from ..checkpoints.fused import Fused
from ..engines.errors import UsageError
from ..engines.package import FusedAdapter
from .binding import BoundAdapter, bind
from .few_steps import looks_like, named, said_by
from .files import Adapter, read_adapter
from .loaded import unread_weights
from .names import FIRST, SECOND, Targets
from .sets import COMPONENTS, AdapterSet, Strength, check_count

# A file at strength 1, or with its strength as `Strength.parse` takes it.
LoraFile = str | Path | tuple[str | Path, Any]


def read_fused(
    source: Checkpoint,
    loras: Sequence[LoraFile],
    *,
    allow_unused: bool = False,
    few_steps: str | None = None,
) -> Fused:
    """Read adapters and bind them to a checkpoint. Nothing is merged yet.

    Args:
        source: the checkpoint, without adapters.
        loras: their files in the order in which they are applied.
        allow_unused: go on where the checkpoint has no weight for some keys of a file.
        few_steps: the name of the row of `FEW_STEPS` that requests get their defaults from; None is the one
            that a file's metadata speaks of, if any does.

    Raises:
        AdapterError: a file is damaged, or made for another model.
        UsageError: too many adapters, a strength that is none, an unknown name of a few-step LoRA or one
            without adapters, or files that speak of several.
    """
    pairs = files_and_strengths(loras)
    if few_steps is not None and not loras:
        raise UsageError(
            f"few-step defaults ({few_steps!r:.100}) without a LoRA",
            expected="the LoRA that draws in so few steps",
            fix="Pass its file too: --lora FILE",
        )
    targets = _targets(source)
    strengths = [Strength.parse(strength, targets) for _, strength in pairs]
    paths = [Path(os.path.abspath(os.path.expanduser(path))) for path, _ in pairs]
    files = [read_adapter(path) for path in paths]
    bound = [bind(file, targets, allow_unused=allow_unused) for file in files]
    row = few_steps if few_steps is not None else _said_by(files)
    used = AdapterSet(
        adapters=tuple((one.name, one, strength) for one, strength in zip(bound, strengths, strict=True))
    )
    return Fused(
        adapters=tuple(
            FusedAdapter(
                name=name,
                sha256=one.sha256,
                short_hash=one.short_hash,
                strength=strength.value,
                applied=one.applied,
                total=one.total,
            )
            for name, one, strength in used.adapters
        ),
        changes=used.changes,
        few_steps=named(row).defaults if row is not None else {},
        given=tuple((path, strength.value) for path, strength in zip(paths, strengths, strict=True)),
        few_steps_of=few_steps or "",
        notes=(*_steps_notes(files, row), *_embeddings_notes(bound)),
    )


def files_and_strengths(loras: object) -> list[tuple[Path, Any]]:
    """The files and their strengths, which may be wrong yet. Raises UsageError for anything else."""
    if not isinstance(loras, (list, tuple)):
        raise UsageError(
            f"the adapters are {loras!r:.100}",
            expected="a list of files, or of (file, strength)",
            fix='Pass [("FILE.safetensors", 0.8)].',
        )
    given = cast("Sequence[Any]", loras)
    check_count(given)
    return [file_and_strength(one) for one in given]


def file_and_strength(lora: Any) -> tuple[Path, Any]:
    """A file and its strength. Raises UsageError for anything else."""
    given = cast("Sequence[Any]", lora) if isinstance(lora, (tuple, list)) else (lora, 1.0)
    path, strength = given if len(given) == 2 else (None, None)
    if not isinstance(path, (str, Path)):
        raise UsageError(
            f"an adapter is given as {lora!r:.100}",
            expected="a file, or (file, strength)",
            fix='Pass [("FILE.safetensors", 0.8)].',
        )
    return Path(path), strength


def _targets(source: Checkpoint) -> Targets:
    """The checkpoint's weights that adapters may change: by component and name in packages, their shapes."""
    found = {
        name: {tensor: header.shape for tensor, header in net_tensors(source, name).items()}
        for name in COMPONENTS
        if name in source.parts
    }
    if {FIRST, SECOND} <= found.keys():
        found[FIRST] |= unread_weights(found[FIRST])
    return found


def _said_by(files: Sequence[Adapter]) -> str | None:
    """The few-step LoRA that the files' metadata speak of. Raises UsageError where they speak of several."""
    rows = list(dict.fromkeys(row for file in files if (row := said_by(file.metadata)) is not None))
    if len(rows) > 1:
        raise UsageError(
            f"adapters for different numbers of steps: {', '.join(rows)}",
            expected="one few-step LoRA",
            fix=f"Leave the others out, or say whose sampler and steps count: --few-steps {rows[0]}",
        )
    return rows[0] if rows else None


def _steps_notes(files: Sequence[Adapter], row: str | None) -> list[str]:
    """What requests get by default, or could get."""
    if row is not None:
        chosen = named(row)
        return [
            f"requests that say nothing else get what {row} wants: {chosen.steps} steps of {chosen.sampler},"
            " without guidance"
        ]
    looks = [(file, like) for file in files if (like := looks_like(file.name)) is not None]
    return [
        f"{file.path.name} is called like a LoRA for few steps, but does not say that it is one: for its"
        f" sampler and steps by default pass --few-steps {like}"
        for file, like in looks
    ]


def _embeddings_notes(bound: Sequence[BoundAdapter]) -> list[str]:
    return [
        f"{one.name} also has embeddings ({', '.join(one.embeddings)[:200]}), which are no weights: for these"
        " draw with the file at run time, in place of making it part of the weights"
        for one in bound
        if one.embeddings
    ]
