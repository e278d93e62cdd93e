"""Where the model that a user names lies: a path, or a model of a hub, which is then fetched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..engines.errors import CheckpointError, UsageError
from .hub.download import Progress, download
from .hub.ids import is_hub_id, parse

_WANTED = "a file or folder that exists, or a model of a hub as ORG/NAME, ORG/NAME@REVISION or its page"


def locate(model: str, *, progress: Progress | None = None) -> Path:
    """The file or folder of a model: a path, which may begin with `~`, or a model of a hub (`is_hub_id`).

    What exists here is never looked for elsewhere. Nothing is opened: there may be a checkpoint, a package,
    or something else.

    Args:
        model: as the user wrote it.
        progress: is told how far a download is.

    Raises:
        CheckpointError: no such path, and no name that a model of a hub has.
        UsageError: an address that is none of a hub's model.
        ModelError, StorageError: as `download`.
    """
    path = Path(model)
    with suppress(OSError, ValueError, RuntimeError):  # no name for a file; a home that is not known
        path = path.expanduser()
        if path.exists():
            return path
    found = parse(model)
    if found is not None and is_hub_id(model):
        return download(found, progress=progress)
    if "://" in model:
        raise UsageError(
            f"{model[:200]} is not the page of a model of a hub",
            expected=_WANTED,
            fix="Download the file yourself, and pass its path.",
        )
    raise CheckpointError(
        f"{model[:200]} does not exist (looked for at {path.absolute()})"[:500],
        expected=_WANTED,
        fix="Check the path.",
    )
