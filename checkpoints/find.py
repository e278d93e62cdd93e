"""Where the model that a user names lies: a path, one that was opened before, or a model of a hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..engines.errors import CheckpointError, DownloadError, LatentrtError, StorageError, UsageError
from ..engines.store.folder import StoreFolder
from .hub.download import Progress, download
from .hub.ids import is_hub_id, parse

if TYPE_CHECKING:
    from .entries import OpenedModel

_WANTED = (
    "a file or folder that exists, a name that `latentrt models` lists, or a model of a hub as ORG/NAME,"
    " ORG/NAME@REVISION or its page"
)


def locate(model: str, *, progress: Progress | None = None, store: Path | None = None) -> Path:
    """The file or folder of a model: a path, which may begin with `~`, a short name, or a model of a hub.

    What exists here is never looked for elsewhere. Nothing is opened: there may be a checkpoint, a package,
    or something else.

    Args:
        model: as the user wrote it: a path, a name as `recall` takes it, or one of a hub (`is_hub_id`).
        progress: is told how far a download is.
        store: the cache's folder, which knows the short names; None is the user's own.

    Raises:
        CheckpointError: no such path, and no name that a model of a hub has.
        UsageError: no name, an address that is none of a hub's model, or a short name of several models.
        ModelError, StorageError: as `download`.
    """
    if path := here(model, store=store):
        return path
    if earlier := recall(model, store=store):
        model = earlier.note.hub  # its copy here is gone, and fetched again
    found = parse(model)
    if found is not None and is_hub_id(model):
        try:
            return download(found, progress=progress)
        except DownloadError as error:
            if "://" in model:
                raise
            there = f"there is no file or folder {Path(model).absolute()}, and {error.found}"
            raise DownloadError(there, expected=error.expected, fix=error.fix) from None
    if "://" in model:
        raise UsageError(
            f"{model[:200]} is not the page of a model of a hub",
            expected=_WANTED,
            fix="Download the file yourself, and pass its path.",
        )
    raise _nothing_at(model)


def refuse_link(model: str) -> None:
    """Raise CheckpointError for a link that leads nowhere, or in circles."""
    place = Path(model).absolute()
    with suppress(OSError, ValueError):  # no link, none that this user may read, or no name for a file
        raise CheckpointError(
            f"{place} is a link to {place.readlink()}, which does not exist"[:500],
            expected=_WANTED,
            fix="Mend the link, or put back what it leads to.",
        )


def _nothing_at(model: str) -> LatentrtError:
    """The error for a path where nothing is, or for no name at all; raises that of a link to nothing."""
    if not model.strip():
        return UsageError("the model's name is empty", expected=_WANTED, fix="Pass one, or leave it out.")
    refuse_link(model)
    return CheckpointError(
        f"{model[:200]} does not exist (looked for at {Path(model).absolute()})"[:500],
        expected=_WANTED,
        fix="Check the path.",
    )


def here(model: str, *, store: Path | None = None) -> Path | None:
    """What `locate` finds without a hub: an existing path, or that of a short name; None if there is neither.

    Raises:
        UsageError, CheckpointError: as `recall`.
    """
    if path := _existing(model):
        return path
    earlier = recall(model, store=store)
    return _existing(earlier.note.path) if earlier is not None else None


def recall(model: str, *, store: Path | None = None) -> OpenedModel | None:
    """The model that a short name stands for, by how it was opened last; None for what is no short name.

    A short name is the exact name of a model that was opened before. What exists here is a path instead, and
    a name with a slash is never short. Models whose file is gone count where there is no other of that name.

    Args:
        model: as the user wrote it.
        store: the cache's folder; None is the user's own.

    Raises:
        UsageError: several models have that name.
        CheckpointError: its file or folder is gone, and no hub has it.
    """
    if "/" in model or "\\" in model or _existing(model):
        return None
    from .entries import models

    known: list[OpenedModel] = []
    with suppress(StorageError):  # a cache that cannot be read knows no names
        known = [item for item in models(StoreFolder(store)) if item.note.name == model]
    found = [item for item in known if _existing(item.note.path)] or known
    if len(found) > 1:
        raise UsageError(
            f"{model} is the name of {len(found)} models: {', '.join(item.note.path for item in found)}",
            expected="a name that one model has",
            fix="Pass the path of the one that is meant.",
        )
    for item in found:
        if not (_existing(item.note.path) or item.note.hub):
            raise CheckpointError(
                f"{model} was opened from {item.note.path}, which is gone",
                expected="the file or folder that it was opened from",
                fix="Put it back (is its disk there?), or pass the path where it is now.",
            )
        return item
    return None


def _existing(model: str) -> Path | None:
    """What a user wrote as the path of something that exists; None if it is none."""
    with suppress(OSError, ValueError, RuntimeError):  # no name for a file; a home that is not known
        path = Path(model).expanduser()
        if model and path.exists():
            return path
    return None
