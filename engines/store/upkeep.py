"""Keeping the engine store in order: hashing every engine, and removing the ones not needed."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import LatentrtError
from .entry import Entry, last_used
from .files import folder_bytes, storage_errors
from .folder import StoreFolder

_DAY = 86400.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What hashing found: good entries, and (folder's name, what is wrong) of each damaged one."""

    good: tuple[Entry, ...]
    damaged: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """One entry that went: its folder's name, its net ("" if unreadable), bytes, and why."""

    name: str
    net: str
    size: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune` removed. `freed_bytes` counts also quarantine, side files and killed builders' rests."""

    removed: tuple[Removed, ...]
    freed_bytes: int
    kept: int
    kept_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Folder:
    path: Path
    size: int
    last_used: float
    net: str
    usable: bool

    @classmethod
    def at(cls, store: StoreFolder, path: Path) -> _Folder:
        net, usable = "", True
        try:
            if (entry := Entry.load(store, path)) is not None:
                net = entry.key.net
        except LatentrtError:
            usable = False
        return cls(path=path, size=folder_bytes(path), last_used=last_used(path), net=net, usable=usable)


def verify(store: StoreFolder) -> Verdict:
    """See `EngineStore.verify`."""
    good: list[Entry] = []
    damaged: list[tuple[str, str]] = []
    for path in store.folders():
        try:
            if (entry := Entry.load(store, path)) is not None:
                entry.checked_bytes()
                good.append(entry)
        except LatentrtError as error:
            damaged.append((path.name, error.found))
            with store.try_lock(path.name) as held:
                if held:
                    store.set_aside(path, error.found)
    return Verdict(good=tuple(good), damaged=tuple(damaged))


def prune(
    store: StoreFolder,
    keep_bytes: int | None,
    older_than_days: float | None,
    *,
    everything: bool,
    dry_run: bool,
) -> Pruned:
    """See `EngineStore.prune`."""
    folders = sorted(
        (_Folder.at(store, path) for path in store.folders()), key=lambda folder: folder.last_used
    )
    total, kept = sum(folder.size for folder in folders), len(folders)
    oldest = None if older_than_days is None else time.time() - older_than_days * _DAY
    removed: list[Removed] = []
    for folder in folders:
        if not folder.usable:
            why = "damaged"
        elif everything:
            why = "all"
        elif oldest is not None and folder.last_used < oldest:
            why = f"not used for {older_than_days:g} days"
        elif keep_bytes is not None and total > keep_bytes:
            why = "least recently used"
        else:
            continue
        if _remove(store, folder.path, dry_run):
            total, kept = total - folder.size, kept - 1
            removed.append(Removed(name=folder.path.name, net=folder.net, size=folder.size, why=why))
    freed = sum(item.size for item in removed) + _rests(store, everything, dry_run)
    return Pruned(removed=tuple(removed), freed_bytes=freed, kept=kept, kept_bytes=total)


def _remove(store: StoreFolder, path: Path, dry_run: bool) -> bool:
    """Remove an entry unless somebody holds its lock."""
    with store.try_lock(path.name) as free:
        if free and not dry_run:
            with storage_errors(store.root, f"{path} could not be removed"):
                store.remove(path)
        return free


def _rests(store: StoreFolder, everything: bool, dry_run: bool) -> int:
    """Bytes in quarantine, side files and abandoned temporary folders, which are removed."""
    folders = [store.quarantine, *([store.caches] if everything else [])]
    before = sum(map(folder_bytes, [*folders, store.building]))
    if not dry_run:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        store.sweep()
        with suppress(OSError):
            store.quarantine.mkdir(mode=0o700)
        before -= sum(map(folder_bytes, [*folders, store.building]))
    return before
