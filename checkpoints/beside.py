"""Writes that appear when they are complete: into a hidden folder beside the target, renamed at the end.

A run that is killed leaves its folder behind, and the next one for the same target removes it. A folder in
use is told by the lock file in it: the system lets go of a lock when the process dies that held it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK, _OLD = "lock", "old"
_MARK = ".latentrt-"  # in the names of work folders, between a dot with the target's name and a random part
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def beside(target: Path) -> Generator[Path]:
    """An empty folder on the file system of `target`; what is left in it is removed at the end.

    Raises:
        OSError: it cannot be made.
    """
    sweep(target)
    work, lock = _claim(target)
    try:
        (work / "new").mkdir()
        yield work / "new"
    finally:
        lock.release()
        shutil.rmtree(work, ignore_errors=True)


def put(new: Path, target: Path, work: Path) -> None:
    """Rename `new`, which was written into the folder `work` of `beside`, to `target`, and remove the old.

    Raises:
        OSError: it cannot be done; what was there before still is.
    """
    old = work.parent / _OLD
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise


def sweep(target: Path) -> None:
    """Remove the folders of killed runs for `target`; one killed between the renames of `put` is undone."""
    for work in work_folders(target.parent):
        if work.name.startswith(_prefix(target)):
            _sweep_one(work, target)


def sweep_all(folder: Path) -> None:
    """Do what `sweep` does, for every target in a folder."""
    for work in work_folders(folder):
        _sweep_one(work, folder / work.name[1:].rpartition(_MARK)[0])


def work_folders(folder: Path) -> list[Path]:
    """The folders of all runs for targets in a folder, killed or not."""
    with suppress(OSError):
        return sorted(
            work
            for work in folder.iterdir()
            if work.name.startswith(".") and _MARK in work.name and work.is_dir() and not work.is_symlink()
        )
    return []


def _sweep_one(work: Path, target: Path) -> None:
    lock = FileLock(work / _LOCK)
    try:
        lock.acquire(timeout=0)  # pyright: ignore[reportUnknownMemberType]
    except (Timeout, OSError, NotImplementedError):  # in use, another user's, or nobody can tell
        return
    if (work / _OLD).exists() and not target.exists():
        with suppress(OSError):
            os.replace(work / _OLD, target)
    shutil.rmtree(work, ignore_errors=True)
    lock.release()
    if os.name == "nt":  # which keeps a file that is open
        shutil.rmtree(work, ignore_errors=True)


def _claim(target: Path) -> tuple[Path, FileLock]:
    """A new folder and its lock, held. Another run may sweep a folder before its lock is."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        lock = FileLock(work / _LOCK)
        try:
            lock.acquire(timeout=0)  # pyright: ignore[reportUnknownMemberType]
            if (work / _LOCK).exists():
                return work, lock
            lock.release()
        except Timeout:
            continue
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            return work, lock  # a file system without locks: nobody will sweep it


def _prefix(target: Path) -> str:
    return f".{target.name}{_MARK}"
