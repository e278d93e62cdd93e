"""git-lfs pointers: the few lines that stand in place of a large file until it has been fetched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .errors import CheckpointError, ModelError, command

_FETCH = "Download the file itself: hf download REPOSITORY FILE --local-dir FOLDER"
_START = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, error: type[ModelError] = CheckpointError) -> None:
    """Raise `error` for a file that is a pointer; what else may be wrong with it is for its reader to say.

    The format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
    """
    start = b""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(len(_START))
    if start == _START:
        raise error(
            f"{path} is a git-lfs pointer, a few lines in place of the file",
            expected="the file itself",
            fix=_pull(path) if _is_cloned(path) else _FETCH,
        )


def _pull(path: Path) -> str:
    return f"Fetch it: {command('git', '-C', path.parent, 'lfs', 'pull')}"


def _is_cloned(path: Path) -> bool:
    """Whether a file lies in a clone of a repository."""
    return any((parent / ".git").exists() for parent in path.absolute().parents)
