"""Checkpoints that were opened before: what the cache has of each, listed, checked and removed.

An entry is a folder that `opened.py` made: a package, and a note of what it was made of. ::

    <cache>/checkpoints/<digest>/manifest.json, …   the package; its weights are mostly the user's own files
    <cache>/checkpoints/<digest>/opened.json        the note; its time is that of the last use

Nothing here reads, moves or removes a user's file. What is torn, foreign or half made is never listed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Generator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from ..engines.errors import CheckpointError, EngineError, LatentrtError, PackageError, UsageError, command
from ..engines.package import MANIFEST, Manifest, Package
from ..engines.store import files
from ..engines.store.engine_store import EngineStore, Prunable, Pruned
from ..engines.store.files import folder_bytes, storage_errors
from ..engines.store.folder import StoreFolder
from .beside import sweep_all, work_folders
from .contents import forget_gone, read_contents

OPENED = "opened.json"
_SCHEMA = 1  # of the note
_LIMIT = 2**20  # bytes of a note; that of an SDXL folder has 2 kB

State = Literal["there", "changed", "gone"]


@dataclass(frozen=True, kw_only=True)
class SeenFile:
    """A weights file as it was when a checkpoint was opened: its path, size in bytes, time of writing."""

    path: str
    size: int
    mtime_ns: int

    def __post_init__(self) -> None:
        """Raise TypeError for what no file could have."""
        _require(self, path=str, size=int, mtime_ns=int)


@dataclass(frozen=True, kw_only=True)
class Note:
    """What is noted when a checkpoint is opened.

    Attributes:
        name, family, dtype: as the package's manifest has them.
        control: what it is if it is a control: "controlnet", "t2i-adapter", "ip-adapter"; "" for a model.
        path: the checkpoint's file or folder, absolute.
        hub: the model of a hub, as the user wrote it; "" for a path.
        vae, tiny_vae: the other autoencoders it was opened with, absolute; "" for none.
        prediction_type: what the user said that its UNet predicts; "" for nothing.
        fused: the adapters that are part of its weights: their files, absolute, and strengths.
        few_steps: the few-step LoRA whose defaults the user asked for; "" for none.
        files: its weights files by their names in the manifest.
        manifest: the sha256 (hex) of the package's manifest.
        created: when it was first opened, in UTC (ISO 8601).
    """

    name: str
    family: str
    dtype: str
    path: str
    hub: str
    vae: str
    tiny_vae: str
    prediction_type: str
    files: Mapping[str, SeenFile]
    manifest: str
    created: str
    fused: list[list[Any]] = field(default_factory=list[list[Any]])
    few_steps: str = ""
    control: str = ""

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for what no note could have."""
        _require(self, **dict.fromkeys(set(self.__dataclass_fields__) - {"files", "fused"}, str), fused=list)
        for path, strength in self.fused:
            if not isinstance(path, str) or not isinstance(strength, (int, float, dict)):
                raise TypeError("fused is of the wrong type")

    @property
    def made_for(self) -> str:
        """The family, and what it is if it is a control."""
        return f"{self.control} for {self.family}" if self.control else self.family

    @property
    def weights_bytes(self) -> int:
        """The size of the weights files that were opened."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """As `opened.json` has it."""
        return {"schema": _SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Note:
        """The reverse of `to_json`. Raises KeyError, TypeError or ValueError for other data."""
        values: dict[str, Any] = {name: value for name, value in data.items() if name != "schema"}
        values["files"] = {name: SeenFile(**file) for name, file in data["files"].items()}
        return cls(**values)


def _require(item: object, **kinds: type) -> None:
    for name, kind in kinds.items():
        if type(getattr(item, name)) is not kind:
            raise TypeError(f"{name} is of the wrong type")


def manifest_sha256(entry: Path) -> str:
    """The sha256 (hex) of the manifest in an entry's folder. Raises OSError."""
    return hashlib.sha256((entry / MANIFEST).read_bytes()).hexdigest()


def write_note(folder: Path, note: Note) -> None:
    """Put a note into the folder of a package that nobody reads yet. Raises OSError."""
    files.write_synced(folder / OPENED, json.dumps(note.to_json()).encode())


def remember(store: StoreFolder, entry: Path, note: Note) -> None:
    """Note that an entry, whose lock is held, was opened now; where it cannot be written, nothing happens."""
    with suppress(LatentrtError, OSError):
        try:
            known = load_entry(entry)
        except PackageError:
            known = None
        if known is not None:
            note = replace(note, created=known.note.created)
            if note == known.note:
                os.utime(entry / OPENED)
                return
        with store.temporary(entry.name) as folder:
            write_note(folder, note)
            os.replace(folder / OPENED, entry / OPENED)


def now() -> str:
    """This moment, as a note has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class OpenedEntry:
    """An entry of the cache. `last_used` is in seconds since the epoch, `size` in bytes in the cache."""

    path: Path
    note: Note
    last_used: float

    @property
    def size(self) -> int:
        """What it takes in the cache, converted weights included."""
        return folder_bytes(self.path)

    @property
    def state(self) -> State:
        """Whether the user's files are as they were, were written to or replaced since, or one is gone."""
        found: State = "there"
        with suppress(OSError, ValueError):
            Path(self.note.path).stat()
            for file in self.note.files.values():
                status = os.stat(file.path)
                if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                    found = "changed"
            return found
        return "gone"

    def check(self) -> None:
        """Hash what the cache has of it. Raises PackageError if a byte has changed; the state is no part."""
        path = self.path
        with storage_errors(path, f"{path} cannot be read"):
            try:
                if manifest_sha256(path) != self.note.manifest:
                    raise _damaged(f"{path / MANIFEST} has changed", "a manifest as written")
                manifest = Manifest.from_json(json.loads((path / MANIFEST).read_bytes()))
                own = [name for name in manifest.files if name not in self.note.files]
                Package(root=path, manifest=manifest).verify(own)
            except FileNotFoundError as error:
                raise _damaged(f"{error.filename} is missing", "a file") from error
            except PackageError as error:
                raise _damaged(error.found, error.expected) from error


def load_entry(path: Path) -> OpenedEntry | None:
    """The entry in a folder; None if there is none, or one whose note only another release understands.

    Raises:
        PackageError: its note or its manifest is missing or damaged.
        StorageError: it is a link, or others can write it, or it cannot be read.
    """
    try:
        files.check_private(path, path.lstat(), stat.S_IFDIR)
    except FileNotFoundError:
        return None
    try:
        data: Any = json.loads(files.read_file(path / OPENED, limit=_LIMIT))
        if data["schema"] != _SCHEMA:
            return None
        entry = OpenedEntry(path=path, note=Note.from_json(data), last_used=_last_used(path))
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{MANIFEST} is missing beside it")
    except EngineError as error:
        raise _damaged(error.found, error.expected) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"{path / OPENED} is damaged ({error})", "a note as written") from error
    return entry


def refuse_entry(folder: Path) -> None:
    """Raise UsageError for the folder of an entry, which is no package that could be opened alone."""
    if not (folder / OPENED).is_file():
        return
    entry = load_entry(folder)
    raise UsageError(
        f"{folder} is what the cache keeps of a checkpoint that was opened",
        expected="the checkpoint itself, which has the weights",
        fix="Pass its path." if entry is None else f"Pass its path: {command(entry.note.path)}",
    )


def _last_used(path: Path) -> float:
    for name in (path / OPENED, path):
        with suppress(OSError):
            return name.lstat().st_mtime
    return 0.0


def _damaged(found: str, expected: str) -> PackageError:
    return PackageError(
        found,
        expected=expected,
        fix="It will not be used; the checkpoint is made ready anew when it is opened.",
    )


def entries(store: StoreFolder) -> tuple[OpenedEntry, ...]:
    """Every entry that can be read, the most recently used first.

    Raises:
        StorageError: the store's folder is none, or can be written by others.
    """
    found: list[OpenedEntry] = []
    for path in store.folders(store.checkpoints):
        with suppress(LatentrtError):
            if (entry := load_entry(path)) is not None:
                found.append(entry)
    return tuple(sorted(found, key=lambda entry: entry.last_used, reverse=True))


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A checkpoint that was opened once or more often from one place.

    Attributes:
        entries: a folder of the cache for each dtype, content and set of options, the latest first.
    """

    entries: tuple[OpenedEntry, ...]

    @property
    def note(self) -> Note:
        """The note of the latest opening."""
        return self.entries[0].note

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The arithmetics it was opened in."""
        return tuple(sorted({entry.note.dtype for entry in self.entries}))

    @property
    def size(self) -> int:
        """What it takes in the cache, in bytes."""
        return sum(entry.size for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """What `latentrt models --json` has of it."""
        note, latest = self.note, self.entries[0]
        names = (
            "name",
            "family",
            "control",
            "path",
            "hub",
            "vae",
            "tiny_vae",
            "prediction_type",
            "fused",
            "few_steps",
        )
        return {
            **{name: getattr(note, name) for name in names},
            "weights_bytes": note.weights_bytes,
            "dtypes": list(self.dtypes),
            "cache_bytes": self.size,
            "created": min(entry.note.created for entry in self.entries),
            "last_used": round(latest.last_used),
            "state": latest.state,
            "entries": [entry.path.name for entry in self.entries],
        }


def models(store: StoreFolder) -> tuple[OpenedModel, ...]:
    """What was opened before, the most recently used first.

    Raises:
        StorageError: as `entries`.
    """
    found: dict[str, list[OpenedEntry]] = {}
    for entry in entries(store):
        found.setdefault(entry.note.path, []).append(entry)
    return tuple(OpenedModel(entries=tuple(of_one)) for of_one in found.values())


# ── upkeep ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What hashing found: good entries, and (folder's name, what is wrong) of each damaged one."""

    good: tuple[OpenedEntry, ...]
    damaged: tuple[tuple[str, str], ...]


def state_by_content(store: StoreFolder, entry: OpenedEntry) -> State:
    """`OpenedEntry.state`, but a file that has the same content at another time counts as it was.

    Raises:
        PackageError: the entry's manifest is damaged.
    """
    if entry.state != "changed":
        return entry.state
    known = _manifest(entry.path).files
    files = {Path(file.path): known.get(name) for name, file in entry.note.files.items()}
    try:
        found = read_contents(files, store)
    except CheckpointError:
        return "changed"
    same = all(record in (None, found[path].record) for path, record in files.items())
    return "there" if same else "changed"


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.from_json(json.loads((path / MANIFEST).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f"{path / MANIFEST} is damaged ({error})", "a manifest as written") from error


def verify(store: StoreFolder) -> Verdict:
    """Hash every file that the cache has of opened checkpoints; damaged entries are moved to quarantine.

    Raises:
        StorageError: as `entries`.
    """
    good: list[OpenedEntry] = []
    damaged: list[tuple[str, str]] = []
    for path in store.folders(store.checkpoints):
        try:
            if (entry := load_entry(path)) is not None:
                entry.check()
                good.append(entry)
        except LatentrtError as error:
            damaged.append((path.name, error.found))
            with store.try_lock(path.name) as held:
                if held:
                    store.set_aside(path, error.found)
    return Verdict(good=tuple(good), damaged=tuple(damaged))


def prune(
    store: EngineStore,
    *,
    keep_bytes: int | None = None,
    older_than_days: float | None = None,
    everything: bool = False,
    names: Collection[str] = (),
    dry_run: bool = False,
) -> Pruned:
    """Remove engines and opened checkpoints as `EngineStore.prune` does, whose arguments these are.

    The rests of processes that were killed while they made a checkpoint ready go too, and what was remembered
    of weights files that are gone. The files themselves are the user's, and stay.

    Raises:
        UsageError: a name that no entry has.
        StorageError: an entry cannot be removed.
    """
    pruned = store.prune(
        keep_bytes=keep_bytes,
        older_than_days=older_than_days,
        everything=everything,
        names=names,
        dry_run=dry_run,
        others=_prunable(store),
    )
    freed = 0 if everything else forget_gone(store, dry_run=dry_run)  # everything: they are gone already
    rests = sum(map(folder_bytes, work_folders(store.checkpoints)))
    if not dry_run:
        sweep_all(store.checkpoints)
        rests -= sum(map(folder_bytes, work_folders(store.checkpoints)))
    return replace(pruned, freed_bytes=pruned.freed_bytes + freed + rests)


def _prunable(store: StoreFolder) -> Generator[Prunable]:
    for path in store.folders(store.checkpoints):
        name, usable = "", True
        try:
            if (entry := load_entry(path)) is not None:
                name = entry.note.name
        except LatentrtError:
            usable = False
        yield Prunable(path=path, kind="checkpoint", label=name, usable=usable, last_used=_last_used(path))
