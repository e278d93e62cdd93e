"""One entry of the engine store: its manifest, and its engine, which is hashed before anybody gets it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..errors import EngineError
from . import files
from .folder import StoreFolder
from .key import SCHEMA, EngineKey, canonical_json, canonical_sha256

ENGINE, MANIFEST = "engine.bin", "manifest.json"
_MANIFEST_LIMIT = 2**20  # bytes; one with fifty profiles has 5 kB


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
            manifest = unseal(content)
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
            return self._read_and_touch()
        except EngineError as error:
            with self.store.try_lock(self.path.name) as held:
                with suppress(EngineError):
                    fresh = Entry.load(self.store, self.path)
                    if fresh is not None and fresh != self:
                        return fresh._read_and_touch()  # built again since this entry was found
                if held:
                    self.store.set_aside(self.path, error.found)
            raise

    def _read_and_touch(self) -> bytes:
        data = self.checked_bytes()
        with suppress(OSError):
            os.utime(self.path / MANIFEST)  # for `prune`
        return data

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
        return last_used(self.path)

    def to_json(self) -> dict[str, Any]:
        """What the manifest says, without its check sum."""
        names = ("size", "sha256", "created", "build_seconds", "producer")
        plain = {name: getattr(self, name) for name in names}
        return {"schema": self.key.schema, "key": self.key.to_json(), **plain, "facts": dict(self.facts)}


def last_used(path: Path) -> float:
    """As `Entry.last_used`, of a folder that may hold no readable entry."""
    for name in (path / MANIFEST, path):
        with suppress(OSError):
            return name.lstat().st_mtime
    return 0.0


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes. Raises TypeError or ValueError for what JSON cannot express."""
    return canonical_json({**manifest, "check": canonical_sha256(manifest)}) + b"\n"


def unseal(content: bytes) -> dict[str, Any]:
    """The manifest, if no byte of it has changed. Raises ValueError otherwise."""
    manifest = cast(dict[str, Any], json.loads(content))
    if not isinstance(manifest, dict):
        raise ValueError("it is no JSON object")
    manifest.pop("check", None)
    # Its one spelling is written again, so that a changed blank or a repeated name is seen too.
    if seal(manifest) != content:
        raise ValueError("its check sum is wrong")
    return manifest
