"""What the engine store needs of the file system: safe reads, durable writes, errors with numbers.

A library that deserialises an engine trusts it, so files are opened without following links, and refused
when others could have written them. On Windows permissions are not looked at: a user's profile is private.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import EngineError, StorageError, command

POSIX = os.name == "posix"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's quota, or the file size limit
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CHUNK = 1 << 20  # bytes
_BEGUN = ("building/*", "checkpoints/.*")  # where entries are that are being written


def default_root() -> Path:
    """The store's folder: LATENTRT_CACHE, or `latentrt` in the platform's cache folder of this user."""
    if named := os.environ.get("LATENTRT_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "latentrt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "latentrt"
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "latentrt"


def has_engines(root: Path) -> bool:
    """Whether a store has anything in it, without opening it. Never raises."""
    try:
        with os.scandir(root / "engines") as entries:
            return next(entries, None) is not None
    except OSError:
        return False


@contextmanager
def storage_errors(
    root: Path, what: str, *, only_full: bool = False, room: str = "the whole engine"
) -> Generator[None]:
    """Turn an OSError into a StorageError that says `what` failed, with the numbers if the disk is full.

    With `only_full`, other errors than a full disk pass: they are the builder's own. `room` is what there
    must be room for.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        if only_full and not full:
            raise
        reason = error.strerror or str(error)
        if not full:
            raise StorageError(
                f"{what}: {reason} ({error.filename or root})",
                expected=f"a folder that this user can write at {root}",
                fix="Mend its permissions, or set LATENTRT_CACHE to another folder.",
            ) from error
        begun = [path for pattern in _BEGUN for path in root.glob(pattern)]
        written, free = sum(map(folder_bytes, begun)), 0
        with suppress(OSError):
            free = shutil.disk_usage(root).free
        raise StorageError(
            f"{what}: {reason}, with {written} bytes of it written and {free} bytes free in {root}",
            expected=f"room for {room}",
            fix="Free disk space (latentrt cache prune --all), or set LATENTRT_CACHE to another disk.",
        ) from error


def folder_bytes(path: Path) -> int:
    """Bytes of the files in `path`, or of a file; 0 for a link, or for what is already gone."""
    total = 0
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        for item in path.iterdir():
            total += folder_bytes(item)
    return total


def check_private(path: Path, status: os.stat_result, kind: int) -> None:
    """Raise StorageError unless `status` is of the `kind` (stat.S_IFDIR, S_IFREG) and others cannot write."""
    expected = "a folder" if kind == stat.S_IFDIR else "a file"
    if stat.S_ISLNK(status.st_mode):
        found = "a link"
    elif stat.S_IFMT(status.st_mode) != kind:
        found = f"not {expected}"
    elif POSIX and status.st_mode & stat.S_IWOTH:
        found = f"open to others (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise StorageError(
        f"{path} is {found}",
        expected=f"{expected} of the engine store that nobody else can replace",
        fix="Remove it if you did not make it so (`latentrt cache prune`), or mend it: "
        + command("chmod", "o-w", path),
    )


def read_file(path: Path, *, size: int | None = None, limit: int = 2**62) -> bytes:
    """The whole file, read once, from a file that is no link and that others cannot write.

    Args:
        path: the file.
        size: its size in bytes, if known; checked before reading, and again on what was read.
        limit: bytes; a longer file is refused before reading.

    Raises:
        EngineError: it is missing, or of another size.
        StorageError: it is a link, or others can write it, or this user cannot read it.
    """
    # Only a missing file is damage: after any other error, the next attempt may find a good engine.
    with storage_errors(path, f"{path} cannot be read"):
        try:
            check_private(path, path.lstat(), stat.S_IFREG)
            with open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, _OPEN)) as stream:
                status = os.fstat(stream.fileno())
                check_private(path, status, stat.S_IFREG)
                fits = status.st_size <= limit and size in (None, status.st_size)
                data = stream.readall() if fits else b""
        except FileNotFoundError as error:
            raise damaged(f"{path} is missing", "a file") from error
    if not fits or size not in (None, len(data)):
        wanted = f"at most {limit} bytes" if size is None else f"{size} bytes"
        raise damaged(f"{path} has {len(data) if fits else status.st_size} bytes", wanted)
    return data


def damaged(found: str, expected: str) -> EngineError:
    """The error of an entry that cannot be used, whatever is wrong with it."""
    fix = "It will not be used; the next run builds it again, or: latentrt build PACKAGE --backend BACKEND."
    return EngineError(found, expected=expected, fix=fix)


def hash_and_sync(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of a file just written, after it has reached the disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb+") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        os.fsync(stream.fileno())
    return size, digest.hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file, for this user alone, and wait until it has reached the disk."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder have reached the disk (POSIX only)."""
    if POSIX:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_note(path: Path) -> str:
    """A short text in one line; "" if there is none."""
    with suppress(OSError, ValueError):
        return " ".join(path.read_text(encoding="utf-8").split())
    return ""
