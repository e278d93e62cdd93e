"""Standard output and error of a command, also where they are closed, full, or nobody reads them.

A program that was started without them (`2>&-`, a service) has None in `sys`, where `print` falls back to the
other stream, and its next file gets the free number 2, into which libraries then write their messages.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

from ..engines.errors import StorageError

# Windows says EINVAL of a pipe that is closed at the other end.
_GONE = {errno.EPIPE, errno.EINVAL} if os.name == "nt" else {errno.EPIPE}


class ReaderGoneError(BaseException):
    """Whoever read standard output has had enough (`| head`). No Exception: it has to end the command."""


class _Guarded(io.RawIOBase):
    """The bytes below a standard stream. What cannot be written is told once; the rest is dropped."""

    def __init__(self, raw: Any, failed: Callable[[OSError], None]) -> None:
        self._raw = raw
        self._failed = failed
        self.lost = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def write(self, data: Any) -> int | None:
        if not self.lost:
            try:
                return self._raw.write(data)
            except OSError as error:
                self.lost = True
                self._failed(error)
        return len(data)


@contextmanager
def standard_streams() -> Generator[Callable[[], bool]]:
    """Guard the standard streams while the block runs. Yields a function: is anything of stdout lost?

    Raises:
        StorageError: by whatever prints, if standard output cannot be written. Standard error that cannot be
            written is nobody's mistake, and what was meant for it is dropped.
        ReaderGoneError: likewise, if nobody reads standard output any more.
    """
    before = sys.stdout, sys.stderr
    _open_missing()
    output = _guard("stdout", _output_failed)
    _guard("stderr", lambda error: None)
    try:
        yield lambda: output is not None and output.lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(StorageError, ReaderGoneError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _guard(name: str, failed: Callable[[OSError], None]) -> _Guarded | None:
    """Put a guarded stream in the place of one that Python opened; a test's or a notebook's own stays."""
    text: Any = getattr(sys, name)
    if text is not getattr(sys, f"__{name}__"):
        return None
    text.flush()
    raw = _Guarded(getattr(text.buffer, "raw", text.buffer), failed)
    guarded = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=text.encoding,
        # A name in another script must not end a command whose terminal or pipe knows few letters.
        errors="backslashreplace" if text.errors == "strict" else text.errors,
        line_buffering=text.line_buffering,
        write_through=text.write_through,
    )
    setattr(sys, name, guarded)
    return raw


def _output_failed(error: OSError) -> None:
    if error.errno in _GONE:
        raise ReaderGoneError
    raise StorageError(
        f"standard output cannot be written: {error.strerror or error}",
        expected="room for what the command prints",
        fix="Free space where it goes, or send it to another place: > FILE",
    ) from error


def _open_missing() -> None:
    """Put the null device where a standard stream is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)  # also makes children inherit it
            if null > 2:
                os.close(null)
    nowhere: Any = sys  # whose streams may be None, whatever their type promises
    for name in ("stdout", "stderr"):
        if getattr(nowhere, name) is None:
            setattr(nowhere, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
