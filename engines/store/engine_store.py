"""The engine store: every engine built on this machine, one folder per key (`store/key.py`).

What it promises, whatever dies when:

1. An entry is complete or absent: its folder is renamed into place after every byte has reached the disk.
2. Bytes are hashed before any library sees them, and the bytes hashed are the bytes returned.
3. One process builds an engine; the others wait for it, and then use it.
4. A miss says why, and names every field of the key that differs.

The layout on disk is in `store/folder.py`. Nothing but the standard library and filelock is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, LatentrtError
from . import files
from .entry import ENGINE, MANIFEST, Entry, seal
from .folder import StoreFolder
from .key import SCHEMA, EngineKey, miss_reason

if TYPE_CHECKING:
    from .upkeep import Pruned, Verdict

Builder = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Miss:
    """There is no such engine. `reason` says why, in one line."""

    key: EngineKey
    reason: str


class EngineStore(StoreFolder):
    """A folder of engines: the given one, or LATENTRT_CACHE, or in the user's cache folder."""

    def find(self, key: EngineKey) -> Entry | Miss:
        """The engine of `key`, or why there is none. A damaged entry is moved to quarantine.

        Raises:
            StorageError: the store, or the entry, is a link or can be written by others.
        """
        self.check()
        path = self.engines / key.digest
        try:
            if (entry := Entry.load(self, path)) is not None:
                return entry
        except EngineError as error:
            reason = f"the engine of {key.net} was damaged: {error.found}"
            with self.try_lock(key.digest) as held:
                if held and (entry := self._load_or_set_aside(path)) is not None:
                    return entry
        else:
            why = self.why_aside(key.digest)
            reason = (
                f"the engine of {key.net} was damaged and is in quarantine: {why}"
                if why
                else miss_reason(key, [entry.key for entry in self.entries()])
            )
        return Miss(key=key, reason=reason)

    def entries(self) -> tuple[Entry, ...]:
        """Every readable entry, the most recently used first; damaged ones are left out (see `verify`).

        Raises:
            StorageError: the store's folder is none, or can be written by others.
        """
        found: list[Entry] = []
        for path in self.folders():
            with suppress(LatentrtError):
                if (entry := Entry.load(self, path)) is not None:
                    found.append(entry)
        return tuple(sorted(found, key=lambda entry: entry.last_used, reverse=True))

    def get_or_build(
        self,
        key: EngineKey,
        build: Builder,
        *,
        waiting: Callable[[str], None] | None = None,
        rebuild: bool = False,
    ) -> Entry:
        """The engine of `key`, built now if there is none; of many processes that ask, one builds.

        Args:
            key: which engine.
            build: writes the engine to the path it is given, and returns facts worth keeping (plain JSON).
            waiting: called about every second with what this process waits for; it may raise to give up.
            rebuild: build even if there is an engine. The old one stays until the new one is complete.

        Raises:
            StorageError: the disk is full, or the store cannot be written or is open to others. What was
                there before is still there.
            EngineError: `build` wrote no engine.
            TypeError, ValueError: the facts are not plain JSON.
            Exception: whatever `build` or `waiting` raises.
        """
        found = self.find(key)
        if isinstance(found, Entry) and not rebuild:
            return found
        self.make()
        path = self.engines / key.digest
        with self.lock(key, waiting):
            self.sweep(held=key.digest)
            entry = self._load_or_set_aside(path)  # someone else may have built it meanwhile
            if entry is not None and not rebuild:
                return entry
            with self.temporary(key.digest) as folder:
                self._build(key, build, folder)
                with files.storage_errors(self.root, f"{path} could not be written"):
                    self.place(folder, path)
            entry = Entry.load(self, path)
        assert entry is not None
        return entry

    def _load_or_set_aside(self, path: Path) -> Entry | None:
        try:
            return Entry.load(self, path)
        except EngineError as error:
            self.set_aside(path, error.found)
            return None

    def _build(self, key: EngineKey, build: Builder, folder: Path) -> None:
        """Fill a temporary folder: the engine first, its manifest last, both on the disk."""
        from importlib.metadata import version

        engine = folder / ENGINE
        failed = f"the engine of {key.net} could not be written"
        started = time.perf_counter()
        with files.storage_errors(self.root, failed, only_full=True):
            facts = build(engine)
        seconds = round(time.perf_counter() - started, 3)
        if engine.is_symlink() or not engine.is_file() or not engine.stat().st_size:
            raise EngineError(
                f"the builder wrote no engine of {key.net}",
                expected=f"a file that is not empty at {engine}",
                fix="Report it: this is a mistake in latentrt, or in the backend.",
            )
        with files.storage_errors(self.root, failed):
            engine.chmod(0o600)
            size, sha256 = files.hash_and_sync(engine)
            manifest = {
                "schema": SCHEMA,
                "key": key.to_json(),
                "size": size,
                "sha256": sha256,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "build_seconds": seconds,
                "producer": f"latentrt {version('latentrt')}",
                "facts": facts,
            }
            files.write_synced(folder / MANIFEST, seal(manifest))
            files.sync_folder(folder)

    def verify(self) -> Verdict:
        """Hash every engine, which reads every byte; damaged ones are moved to quarantine."""
        from .upkeep import verify

        return verify(self)

    def prune(
        self,
        *,
        keep_bytes: int | None = None,
        older_than_days: float | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove entries, the least recently used first; and, always, what is damaged or was abandoned.

        An entry that somebody builds at this moment stays.

        Args:
            keep_bytes: remove until the rest is no larger.
            older_than_days: remove what was not used for so long.
            everything: remove every entry, and the side files.
            dry_run: only say what would go.

        Raises:
            StorageError: an entry cannot be removed.
        """
        from .upkeep import prune

        return prune(self, keep_bytes, older_than_days, everything=everything, dry_run=dry_run)
