"""A folder of files that are called by their names, and read when they are first called."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from ..engines.errors import CheckpointError, UsageError
from .stored import State, state_of

Content = TypeVar("Content")


def check_folder(folder: str | Path | None) -> None:
    """Raise UsageError for a folder of adapters or embeddings that is none."""
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder", expected="a folder of files", fix="Check the path.")


class NamedFiles(Generic[Content]):
    """The files of a folder by name, its subfolders included. Threads may share it.

    A file's name is its stem, or its path in the folder without the ending. The folder is looked through each
    time, and a file is read when it is first called, or when it has changed.

    Args:
        folder: None is an empty one.
        endings: of the files, the preferred first.
        read: reads one.
    """

    def __init__(
        self, folder: str | Path | None, endings: Sequence[str], read: Callable[[Path], Content]
    ) -> None:
        check_folder(folder)
        self._folder = None if folder is None else Path(folder)
        self._endings, self._read = endings, read
        self._lock = Lock()
        self._known: dict[Path, tuple[State, Content]] = {}

    def paths(self) -> dict[str, Path]:
        """The files by name: of several, the first by its ending, then by its path."""
        folder, found = self._folder, dict[str, Path]()
        if folder is None:
            return found
        paths = [Path(place, file) for place, _, files in os.walk(folder) for file in files if file[0] != "."]
        for ending in self._endings:
            for path in sorted(path for path in paths if path.suffix.lower() == ending):
                inside = path.relative_to(folder).with_suffix("").as_posix()
                for name in (path.stem, inside):
                    if name == name.strip() and name.isprintable():
                        found.setdefault(name, path)
        return found

    def content(self, path: Path) -> Content:
        """What is in one of these files.

        Raises:
            CheckpointError: it is a link out of the folder, or cannot be read.
            LatentrtError: what `read` raises.
        """
        assert self._folder is not None
        try:
            if not path.resolve().is_relative_to(self._folder.resolve()):
                raise CheckpointError(
                    f"{path} is a link to {path.resolve()}, outside of the folder",
                    expected="files that are in it",
                    fix="Copy the file into the folder.",
                )
            status = path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror})",
                expected="a file that this user may read",
                fix="Mend its permissions, or remove it.",
            ) from error
        state = state_of(status)
        with self._lock:
            known = self._known.get(path)
        if known is not None and known[0] == state:
            return known[1]
        content = self._read(path)
        with self._lock:
            self._known[path] = state, content
        return content
