"""A folder of files that are called by their names, and read when they are first called."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar, cast

from ..engines.errors import CheckpointError, UsageError
from .stored import State, state_of

Content = TypeVar("Content")
_log = logging.getLogger("latentrt.adapters")
_LISTED = 5  # files in a message
_LONGEST = 255  # characters of a name


class NameTakenError(UsageError):
    """Another adapter or control has the name, which `name` is: the caller may choose a free one."""

    def __init__(self, found: str, *, expected: str, fix: str, name: str) -> None:
        super().__init__(found, expected=expected, fix=fix)
        self.name = name


def check_folder(folder: str | Path | None) -> None:
    """Raise UsageError for a folder of adapters or embeddings that is none."""
    if folder is None:
        return
    check_path(folder, "the folder", "the path of a folder of files", "Pass a str or a Path.")
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder", expected="a folder of files", fix="Check the path.")


def check_name(name: object, what: str, fix: str) -> None:
    """Raise UsageError for what is no name of an adapter or an embedding, which `what` says."""
    given = name if isinstance(name, str) else ""
    if not given or given != given.strip() or len(given) > _LONGEST or not given.isprintable():
        raise UsageError(
            f"{what} is called {name!r:.60}",
            expected=f"1 to {_LONGEST} printable characters, without spaces at the ends",
            fix=fix,
        )


def check_names(names: object, what: str, fix: str) -> list[str]:
    """One name or several, as a list; `what` says whose. Raises UsageError for anything else."""
    given = [names] if isinstance(names, str) else names
    found = list(cast("Iterable[object]", given)) if isinstance(given, Iterable) else [given]
    if wrong := [one for one in found if not isinstance(one, str)]:
        raise UsageError(f"{what} is called {wrong[0]!r:.60}", expected="a name, or a list of names", fix=fix)
    return cast("list[str]", found)


def check_path(path: object, what: str, expected: str, fix: str) -> None:
    """Raise UsageError for what is no path, or an empty one, where `what` stands."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise UsageError(f"{what} is {path!r:.100}", expected=expected, fix=fix)


class NamedFiles(Generic[Content]):
    """The files of a folder by name, its subfolders included. Threads may share it.

    A file's name is its path in the folder without the ending. Its stem is a name too: that of a file at the
    top first; of files in subfolders it is an error where several have it. The folder is looked through each
    time, and a file is read when it is first called, or when it has changed.

    Links to files and folders are followed wherever they lead, as whoever owns the folder put them there. A
    folder into which others may write, such as one that is served to them, is not safe here.

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
        self._told: set[str] = set()

    def paths(self) -> dict[str, Path]:
        """The files by name: of several, the first by its ending, then by its path."""
        return {name: paths[0] for name, paths in self._named().items()}

    def find(self, name: str, counts: Callable[[Path], bool] = lambda path: True) -> Path | None:
        """The file of a name; None where there is none.

        Args:
            name: a stem, or a path in the folder without the ending.
            counts: which files count where several in subfolders have the name.

        Raises:
            UsageError: several that count have it.
        """
        links: dict[str, Path] = {}  # by what they lead to
        for path in self._named().get(name, []):
            links.setdefault(os.path.realpath(path), path)
        paths = list(links.values())
        if len(paths) > 1:
            paths = [path for path in paths if counts(path)] or paths[:1]
        if len(paths) > 1:
            assert self._folder is not None
            inside = [path.relative_to(self._folder).with_suffix("").as_posix() for path in paths]
            more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
            raise UsageError(
                f"{len(inside)} files of {self._folder} are called {name!r:.100}",
                expected=f"one of {', '.join(map(repr, inside[:_LISTED]))}{more}",
                fix="Write the path in place of the name.",
            )
        return paths[0] if paths else None

    def content(self, path: Path) -> Content:
        """What is in one of these files.

        Raises:
            CheckpointError: it cannot be read.
            LatentrtError: what `read` raises.
        """
        try:
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

    def _named(self) -> dict[str, list[Path]]:
        """The files by name; several where a stem is that of several in subfolders."""
        folder = self._folder
        if folder is None:
            return {}
        by_ending: dict[str, list[Path]] = {ending: [] for ending in self._endings}
        for path in self._files(folder, ()):
            if path.suffix.lower() in by_ending:
                by_ending[path.suffix.lower()].append(path)
        found: dict[str, list[Path]] = {}
        for paths in by_ending.values():
            for path in sorted(paths):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), [path])
        for paths in by_ending.values():
            stems: dict[str, list[Path]] = {}
            for path in sorted(paths):
                stems.setdefault(path.stem, []).append(path)
            for stem, several in stems.items():
                found.setdefault(stem, several)
        return {name: paths for name, paths in found.items() if name == name.strip() and name.isprintable()}

    def _files(self, folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        """The files of a folder and of those in it; `above` are the folders that it is in."""
        try:
            entries = list(os.scandir(folder))
            status = folder.stat()
        except OSError as error:
            self._tell(f"{folder} cannot be looked through ({error.strerror})")
            return
        if (here := (status.st_dev, status.st_ino)) in above:
            self._tell(f"{folder} is a link to a folder that it lies in: left out")
            return
        for entry in entries:
            path = folder / entry.name
            if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                yield from self._files(path, (*above, here))
            elif entry.name[0] == ".":
                continue
            elif not entry.is_symlink() or os.path.exists(path):
                yield path
            elif path.suffix.lower() in (*self._endings, ""):
                self._tell(f"{path} is a link that leads to nothing: left out")

    def _tell(self, line: str) -> None:
        """Log a line once."""
        with self._lock:
            if line in self._told:
                return
            self._told.add(line)
        _log.warning("%s", line)
