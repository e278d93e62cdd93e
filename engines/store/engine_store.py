"""The engine store: every engine built on this machine, one folder per key (`store/key.py`).

What it promises, whatever dies when:

1. An entry is complete or absent: its folder is renamed into place after every byte has reached the disk.
2. Bytes are hashed before any library sees them, and the bytes hashed are the bytes returned.
3. One process builds an engine; the others wait for it, and then use it.
4. A miss says why, and names every field of the key that differs.

The layout on disk is in `store/folder.py`. Nothing but the standard library and filelock is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import EngineError, LatentrtError, UsageError
from ..installed import latentrt_version
from . import files
from .files import folder_bytes, storage_errors
from .folder import StoreFolder
from .key import SCHEMA, EngineKey, canonical_json, canonical_sha256, miss_reason

ENGINE, MANIFEST = "engine.bin", "manifest.json"
_MANIFEST_LIMIT = 2**20  # bytes; one with fifty profiles has 5 kB
_DAY = 86400.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An engine in the store.

    `size` is in bytes; `created` is UTC (ISO 8601); `facts` is what the builder thought worth keeping.
    """

    path: Path
    key: EngineKey
    size: int
    sha256: str
    created: str
    build_seconds: float
    producer: str
    facts: Mapping[str, Any]
    store: StoreFolder = field(repr=False, compare=False)

    @classmethod
    def load(cls, store: StoreFolder, path: Path) -> Entry | None:
        """The entry in a folder; None if there is none, or one whose key only another release understands.

        Raises:
            EngineError: it is damaged. The engine's own bytes are not read.
            StorageError: it is a link, or others can write it.
        """
        try:
            files.check_private(path, path.lstat(), stat.S_IFDIR)
        except FileNotFoundError:
            return None
        content = files.read_file(path / MANIFEST, limit=_MANIFEST_LIMIT)
        try:
            manifest = _unseal(content)
            if canonical_sha256(manifest["key"]) != path.name:
                raise ValueError("it describes another engine")
            if manifest.pop("schema") != SCHEMA:
                return None
            key = EngineKey.from_json(manifest.pop("key"))
            entry = cls(path=path, key=key, store=store, **manifest)
            status = (path / ENGINE).lstat()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise files.damaged(f"{path / MANIFEST} is damaged ({error})", "a manifest as written") from error
        files.check_private(path / ENGINE, status, stat.S_IFREG)
        if status.st_size != entry.size:
            raise files.damaged(f"{path / ENGINE} has {status.st_size} bytes", f"{entry.size} bytes")
        return entry

    def read(self) -> bytes:
        """The engine, read once and checked: exactly these bytes have the manifest's sha256.

        Raises:
            EngineError: it is damaged, and now in quarantine, so that the next `get_or_build` builds it.
            StorageError: it is a link, or others can write it.
        """
        self.store.check()
        try:
            data = self.checked_bytes()
        except EngineError as error:
            data = self._built_since(error)
        with suppress(OSError):
            os.utime(self.path / MANIFEST)  # for `prune`
        return data

    def _built_since(self, error: EngineError) -> bytes:
        """The engine, if it was built again since this was found; else set it aside and raise `error`."""
        with self.store.try_lock(self.path.name) as held:
            with suppress(EngineError):
                fresh = Entry.load(self.store, self.path)
                if fresh is not None and fresh != self:
                    return fresh.checked_bytes()
            if held:
                self.store.set_aside(self.path, error.found)
        raise error

    def checked_bytes(self) -> bytes:
        """What `read` returns, or the same errors; the store stays as it is."""
        data = files.read_file(self.path / ENGINE, size=self.size)
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            wanted = f"{self.sha256[:12]}… as its manifest says"
            raise files.damaged(f"{self.path / ENGINE} has sha256 {found[:12]}…", wanted)
        return data

    @property
    def last_used(self) -> float:
        """Seconds since the epoch at which the engine was last read (or built); 0 if it is gone."""
        return _last_used(self.path)

    def to_json(self) -> dict[str, Any]:
        """What the manifest says, without its check sum."""
        names = ("size", "sha256", "created", "build_seconds", "producer")
        plain = {name: getattr(self, name) for name in names}
        return {"schema": self.key.schema, "key": self.key.to_json(), **plain, "facts": dict(self.facts)}


def _last_used(path: Path) -> float:
    for name in (path / MANIFEST, path):
        with suppress(OSError):
            return name.lstat().st_mtime
    return 0.0


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes. Raises TypeError or ValueError for what JSON cannot express."""
    return canonical_json({**manifest, "check": canonical_sha256(manifest)}) + b"\n"


def _unseal(content: bytes) -> dict[str, Any]:
    """The manifest, if no byte of it has changed. Raises ValueError otherwise."""
    manifest = cast(dict[str, Any], json.loads(content))
    if not isinstance(manifest, dict):
        raise ValueError("it is no JSON object")
    manifest.pop("check", None)
    # Its one spelling is written again, so that a changed blank or a repeated name is seen too.
    if seal(manifest) != content:
        raise ValueError("its check sum is wrong")
    return manifest


@dataclass(frozen=True, kw_only=True)
class Miss:
    """There is no such engine. `reason` says why, in one line."""

    key: EngineKey
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What hashing found: good entries, and (folder's name, what is wrong) of each damaged one."""

    good: tuple[Entry, ...]
    damaged: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """An entry of any kind that `prune` may remove.

    Attributes:
        path: its folder in the store.
        kind: what it is.
        label: an engine's net, or a checkpoint's name; "" if it cannot be read.
        usable: whether it is undamaged.
        last_used: seconds since the epoch; 0 if nobody can tell.
    """

    path: Path
    kind: Literal["engine", "checkpoint"]
    label: str
    usable: bool
    last_used: float

    def is_called(self, name: str) -> bool:
        """Whether a user means it by a name: a checkpoint's, or the beginning of its folder's."""
        of_folder = len(name) >= 8 and self.path.name.startswith(name)
        return of_folder or (self.kind == "checkpoint" and name == self.label)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """One entry that went: its folder's name, its kind and label (`Prunable`), bytes, and why."""

    name: str
    kind: str
    label: str
    size: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune` removed. `freed_bytes` counts also quarantine, side files and killed builders' rests."""

    removed: tuple[Removed, ...]
    freed_bytes: int
    kept: int
    kept_bytes: int


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
        for path in self.folders(self.engines):
            with suppress(LatentrtError):
                if (entry := Entry.load(self, path)) is not None:
                    found.append(entry)
        return tuple(sorted(found, key=lambda entry: entry.last_used, reverse=True))

    def get_or_build(
        self,
        key: EngineKey,
        build: Callable[[Path], dict[str, Any]],
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
        with self.lock(key.digest, f"build the engine of {key.net}", waiting):
            self.sweep(held=key.digest)
            entry = self._load_or_set_aside(path)  # someone else may have built it meanwhile
            if entry is not None and not rebuild:
                return entry
            with self.temporary(key.digest) as folder:
                self._build(key, build, folder)
                with storage_errors(self.root, f"{path} could not be written"):
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

    def _build(self, key: EngineKey, build: Callable[[Path], dict[str, Any]], folder: Path) -> None:
        """Fill a temporary folder: the engine first, its manifest last, both on the disk."""
        engine = folder / ENGINE
        failed = f"the engine of {key.net} could not be written"
        started = time.perf_counter()
        with storage_errors(self.root, failed, only_full=True):
            facts = build(engine)
        seconds = round(time.perf_counter() - started, 3)
        if engine.is_symlink() or not engine.is_file() or not engine.stat().st_size:
            raise EngineError(
                f"the builder wrote no engine of {key.net}",
                expected=f"a file that is not empty at {engine}",
                fix="Report it: this is a mistake in latentrt, or in the backend.",
            )
        with storage_errors(self.root, failed):
            engine.chmod(0o600)
            size, sha256 = files.hash_and_sync(engine)
            manifest = {
                "schema": SCHEMA,
                "key": key.to_json(),
                "size": size,
                "sha256": sha256,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "build_seconds": seconds,
                "producer": f"latentrt {latentrt_version()}",
                "facts": facts,
            }
            files.write_synced(folder / MANIFEST, seal(manifest))
            files.sync_folder(folder)

    # ── upkeep ───────────────────────────────────────────────────────────────────────────────────

    def verify(self) -> Verdict:
        """Hash every engine, which reads every byte; damaged ones are moved to quarantine."""
        good: list[Entry] = []
        damaged: list[tuple[str, str]] = []
        for path in self.folders(self.engines):
            try:
                if (entry := Entry.load(self, path)) is not None:
                    entry.checked_bytes()
                    good.append(entry)
            except LatentrtError as error:
                damaged.append((path.name, error.found))
                with self.try_lock(path.name) as held:
                    if held:
                        self.set_aside(path, error.found)
        return Verdict(good=tuple(good), damaged=tuple(damaged))

    def prune(
        self,
        *,
        keep_bytes: int | None = None,
        older_than_days: float | None = None,
        everything: bool = False,
        names: Collection[str] = (),
        dry_run: bool = False,
        others: Iterable[Prunable] = (),
    ) -> Pruned:
        """Remove entries, the least recently used first; and, always, what is damaged or was abandoned.

        An entry that somebody builds at this moment, or has open, stays.

        Args:
            keep_bytes: remove until the rest is no larger.
            older_than_days: remove what was not used for so long.
            everything: remove every entry, and the side files.
            names: remove these: checkpoints by their names, and entries by their folders' names, or eight or
                more letters that these begin with.
            dry_run: only say what would go.
            others: entries of other kinds in this store, which count like engines.

        Raises:
            UsageError: a name that no entry has.
            StorageError: an entry cannot be removed.
        """
        entries = sorted([*self._prunable(), *others], key=lambda entry: entry.last_used)
        for name in names:
            if not any(entry.is_called(name) for entry in entries):
                raise UsageError(
                    f"{name!r} is no entry of the cache",
                    expected="a name of `latentrt models`, or of `latentrt cache ls`",
                    fix="See what there is: latentrt cache ls",
                )
        sizes = {entry: folder_bytes(entry.path) for entry in entries}
        total = sum(sizes.values())
        oldest = None if older_than_days is None else time.time() - older_than_days * _DAY
        removed: list[Removed] = []
        for entry, size in sizes.items():
            if not entry.usable:
                why = "damaged"
            elif everything:
                why = "all"
            elif any(map(entry.is_called, names)):
                why = "named"
            elif oldest is not None and entry.last_used < oldest:
                why = f"not used for {older_than_days:g} days"
            elif keep_bytes is not None and total > keep_bytes:
                why = "least recently used"
            else:
                continue
            if self._remove_unless_locked(entry.path, dry_run):
                total -= size
                name = entry.path.name
                removed.append(Removed(name=name, kind=entry.kind, label=entry.label, size=size, why=why))
        freed = sum(item.size for item in removed) + self._remove_rests(everything, dry_run)
        kept = len(entries) - len(removed)
        return Pruned(removed=tuple(removed), freed_bytes=freed, kept=kept, kept_bytes=total)

    def _prunable(self) -> Generator[Prunable]:
        """Every engine; the net is "" where this release cannot tell it."""
        for path in self.folders(self.engines):
            net, usable = "", True
            try:
                if (entry := Entry.load(self, path)) is not None:
                    net = entry.key.net
            except LatentrtError:
                usable = False
            yield Prunable(path=path, kind="engine", label=net, usable=usable, last_used=_last_used(path))

    def _remove_unless_locked(self, path: Path, dry_run: bool) -> bool:
        with self.try_lock(path.name) as held:
            free = held and not self.in_use(path.name)
            if free and not dry_run:
                with storage_errors(self.root, f"{path} could not be removed"):
                    self.remove(path)
            return free

    def _remove_rests(self, everything: bool, dry_run: bool) -> int:
        """Bytes in quarantine, side files and abandoned temporary folders, which are removed."""
        folders = [self.quarantine, *([self.caches] if everything else [])]
        before = sum(map(folder_bytes, [*folders, self.building]))
        if not dry_run:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            self.sweep()
            with suppress(OSError):
                self.quarantine.mkdir(mode=0o700)
            before -= sum(map(folder_bytes, [*folders, self.building]))
        return before


# ── engines of several nets, one net after the other ─────────────────────────────────────────────

Report = Callable[[str, float], None]  # what is being done, and how much of one net is done (0 to 1)
Build = Callable[[str, Path, Report], dict[str, Any]]  # net, where its engine goes -> facts for the store


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far a build is: net `index` of `total`, and `fraction` (0 to 1) of that net."""

    net: str
    index: int
    total: int
    phase: str
    fraction: float


OnProgress = Callable[[BuildProgress], None]


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An entry that is in the store now. `why` it had to be built; "" where it was there before."""

    entry: Entry
    why: str

    @property
    def net(self) -> str:
        """The net's name."""
        return self.entry.key.net


def build_missing(
    store: EngineStore, found: Sequence[Entry | Miss], build: Build, progress: OnProgress | None = None
) -> tuple[BuiltEngine, ...]:
    """An entry for each of `found`, which `EngineStore.find` returned; `build` makes what was missed.

    Raises:
        StorageError: the store cannot be written.
        Exception: whatever `build` raises. Entries that were complete stay.
    """

    def ensure(index: int, item: Entry | Miss) -> BuiltEngine:
        if isinstance(item, Entry):
            return BuiltEngine(entry=item, why="")
        net = item.key.net

        def report(phase: str, fraction: float) -> None:
            if progress is not None:
                progress(
                    BuildProgress(net=net, index=index, total=len(found), phase=phase, fraction=fraction)
                )

        entry = store.get_or_build(
            item.key,
            lambda path: build(net, path, report),
            waiting=lambda message: report(message, 0.0),
        )
        return BuiltEngine(entry=entry, why=item.reason)

    return tuple(ensure(index, item) for index, item in enumerate(found))
