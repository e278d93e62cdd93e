"""The engine store's folder: its layout, its locks, and what happens to the rests of killed processes.

::

    engines/<digest>/engine.bin      what the backend built
    engines/<digest>/manifest.json   its key, size, sha256, age, and a check sum over the manifest itself
    checkpoints/<digest>/            a checkpoint that was opened as it is (`checkpoints/opened.py`)
    building/<digest>-*/             engines in the making; renamed into place, or swept
    quarantine/<digest>/             damaged ones, and <digest>.txt that says why
    caches/<kind>/<name>             timing and runtime caches, each with a check sum at its end
    locks/<digest>.lock, .owner      held while an entry is made; the system frees it when its holder dies
    locks/<digest>.used-*.lock       held by each process that has an opened checkpoint in use
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import LatentrtError, UsageError
from . import files
from .files import default_root
from .key import is_sha256

_SIDE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FOOTER = b"latentrt"  # of a side file; then the sha256 of everything before it
SIDE = "side"  # the lock of all side files, and the prefix of their temporary folders


class StoreFolder:
    """The folder behind `EngineStore`. Making the object touches nothing."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root is not None else default_root()
        self.engines = self.root / "engines"
        self.checkpoints = self.root / "checkpoints"
        self.building = self.root / "building"
        self.quarantine = self.root / "quarantine"
        self.caches = self.root / "caches"
        self.locks = self.root / "locks"
        self._shelves = (self.engines, self.checkpoints)
        self._parts = (*self._shelves, self.building, self.quarantine, self.caches, self.locks)

    def check(self) -> None:
        """Raise StorageError if the store's folder is none, or if others can write it."""
        with files.storage_errors(self.root, "the engine store cannot be opened"):
            with suppress(FileNotFoundError):
                # The root may be a link, to another disk; what is in it may not.
                files.check_private(self.root, self.root.stat(), stat.S_IFDIR)
            for shelf in self._shelves:
                with suppress(FileNotFoundError):
                    files.check_private(shelf, shelf.lstat(), stat.S_IFDIR)

    def make(self) -> None:
        """Make the folders. Raises StorageError if that fails, or for what `check` refuses."""
        self.check()
        with files.storage_errors(self.root, "the engine store cannot be made"):
            for folder in (self.root, *self._parts):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def folders(self, shelf: Path) -> list[Path]:
        """The folder of every entry, readable or not, in `engines` or `checkpoints`."""
        self.check()
        with suppress(OSError):
            return sorted(path for path in shelf.iterdir() if is_sha256(path.name))
        return []

    @contextmanager
    def lock(self, digest: str, making: str, waiting: Callable[[str], None] | None) -> Generator[None]:
        """Hold the lock of an entry, however long another process makes it.

        Args:
            digest: the entry's.
            making: what whoever holds it does, such as "build the engine of unet".
            waiting: called every second with what is waited for.
        """
        lock, owner = self._file_lock(digest), self.locks / f"{digest}.owner"
        started, timeout = time.monotonic(), 0.0
        while not self._acquire(lock, timeout):
            timeout = 1.0
            if waiting is not None:
                pid = files.read_note(owner)
                who, seconds = f"process {pid}" if pid else "another process", time.monotonic() - started
                waiting(f"waiting for {who} to {making} ({seconds:.0f} s)")
        try:
            with suppress(OSError):  # it only serves the message above
                owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield
        finally:
            with suppress(OSError):
                owner.unlink()
            lock.release()

    @contextmanager
    def try_lock(self, name: str) -> Generator[bool]:
        """Hold an entry's lock if it is free; False if it is not, or if this user cannot write the store."""
        lock, held = self._file_lock(name), False
        with suppress(LatentrtError):
            held = self.locks.is_dir() and self._acquire(lock, 0.0)
        try:
            yield held
        finally:
            if held:
                lock.release()

    def use(self, digest: str) -> Callable[[], None]:
        """Keep an entry, whose lock is held, from being removed, until what is returned is called.

        It may be called from any thread, and twice. Where this user cannot write the store, nothing is kept.
        """
        path = self.locks / f"{digest}.used-{secrets.token_hex(8)}.lock"
        lock = FileLock(path, mode=0o600, thread_local=False)
        with suppress(LatentrtError):
            self._acquire(lock, 0.0)

        def let_go() -> None:
            if lock.is_locked:
                lock.release()
                with suppress(OSError):
                    path.unlink()

        return let_go

    def in_use(self, digest: str) -> bool:
        """Whether a process has an entry in use; what killed ones left of that goes."""
        return any(map(self._is_held, self.locks.glob(f"{digest}.used-*.lock")))

    def _is_held(self, path: Path) -> bool:
        lock = FileLock(path, mode=0o600)
        try:
            free = self._acquire(lock, 0.0)
        except LatentrtError:  # nobody can tell
            return True
        if free:
            lock.release()
            with suppress(OSError):
                path.unlink()
        return not free

    def _file_lock(self, name: str) -> BaseFileLock:
        return FileLock(self.locks / f"{name}.lock", mode=0o600)

    def _acquire(self, lock: BaseFileLock, timeout: float) -> bool:
        with files.storage_errors(self.root, "the engine store cannot be locked"):
            try:
                lock.acquire(timeout=timeout)  # pyright: ignore[reportUnknownMemberType]
            except Timeout:
                return False
        return True

    @contextmanager
    def temporary(self, name: str) -> Generator[Path]:
        """A folder on the store's file system that goes away; `name` is the lock that is held meanwhile."""
        with files.storage_errors(self.root, "the engine store cannot be written"):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.building))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def place(self, folder: Path, path: Path) -> None:
        """Rename a complete folder to `path`, whose lock is held; what was there stays if that fails."""
        with self.temporary(path.name) as aside:
            with suppress(FileNotFoundError):
                os.rename(path, aside / "old")
            try:
                os.rename(folder, path)
            except OSError:
                with suppress(FileNotFoundError):
                    os.rename(aside / "old", path)
                raise
            files.sync_folder(path.parent)

    def remove(self, path: Path) -> None:
        """Remove an entry whose lock is held; in one rename, so that nobody sees half of it."""
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        with self.temporary(path.name) as aside:
            os.rename(path, aside / "removed")

    def set_aside(self, path: Path, reason: str) -> None:
        """Move a damaged entry, whose lock is held, to quarantine."""
        target = self.quarantine / path.name
        with suppress(OSError):
            shutil.rmtree(target, ignore_errors=True)
            target.with_suffix(".txt").write_text(f"{reason}\n", encoding="utf-8")
            os.rename(path, target)

    def why_aside(self, name: str) -> str:
        """Why an entry is in quarantine, in one line; "" if it is not there."""
        target = self.quarantine / name
        return (files.read_note(target.with_suffix(".txt")) or "unknown") if target.exists() else ""

    def sweep(self, *, held: str = "") -> None:
        """Remove what killed processes left; whatever somebody builds at this moment stays.

        Args:
            held: the digest whose lock the caller holds itself.
        """
        for path in self.locks.glob("*.used-*.lock"):
            self._is_held(path)
        with suppress(OSError):
            for folder in sorted(self.building.iterdir()):
                name = folder.name.partition("-")[0]
                if name == held:
                    self._sweep_one(folder, name)
                elif name == SIDE or is_sha256(name):
                    with self.try_lock(name) as free:
                        if free:
                            self._sweep_one(folder, name)

    def _sweep_one(self, folder: Path, name: str) -> None:
        if not (self.engines / name).exists():
            with suppress(OSError):  # killed between the two renames of `place`
                os.rename(folder / "old", self.engines / name)
        shutil.rmtree(folder, ignore_errors=True)

    def side_file(self, kind: str, name: str) -> Path:
        """Where a timing cache or runtime cache lies. Raises UsageError for what is no plain name."""
        if not (_SIDE_NAME.fullmatch(kind) and _SIDE_NAME.fullmatch(name)):
            raise UsageError(
                f"a side file called {kind!r}, {name!r}",
                expected="letters, digits, '.', '_' and '-', and no '.' or '-' in front",
                fix="Replace the other characters.",
            )
        return self.caches / kind / name

    def read_side_file(self, path: Path) -> bytes:
        """What `write_side_file` wrote; b"" if it is missing, damaged, a link, or open to others."""
        with suppress(LatentrtError):
            self.check()
            content = files.read_file(path)
            data, footer = content[:-40], content[-40:]
            return data if footer == _FOOTER + hashlib.sha256(data).digest() else b""
        return b""

    def write_side_file(self, path: Path, data: bytes) -> None:
        """Replace a side file at once. Raises StorageError, and the old one stays, if that fails."""
        self.make()
        lock = self._file_lock(SIDE)
        self._acquire(lock, -1.0)  # however long it takes: nobody holds it for long
        failed = files.storage_errors(self.root, f"{path} could not be written")
        try:
            with self.temporary(SIDE) as folder, failed:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                files.write_synced(folder / path.name, data + _FOOTER + hashlib.sha256(data).digest())
                os.replace(folder / path.name, path)
                files.sync_folder(path.parent)
        finally:
            lock.release()
