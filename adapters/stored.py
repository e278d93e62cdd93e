"""Tensors of a file that are read when they are computed with: by plain reads, and only of the very file.

A file that is mapped kills the process where it is cut behind its back, and has other numbers under the old
hash where it is written over.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np

from ..checkpoints.stored_types import seen_as
from ..engines.errors import AdapterError
from ..engines.safetensors_format import Bytes, Header, open_file
from ..engines.spec import Array

# What tells a file from others, and from itself before it was written to.
State = tuple[int, ...]


def state_of(status: os.stat_result) -> State:
    """Size, times of writing and of any change, and inode: a copy may keep the first two."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of adapters as it was when it was loaded."""

    path: Path
    state: State

    def check(self, stream: BinaryIO) -> None:
        """Raise AdapterError unless the open file is the one that was loaded, and as it was."""
        if state_of(os.fstat(stream.fileno())) != self.state:
            self.refuse("has changed since it was loaded")

    def read(self, offset: int, length: int) -> Bytes:
        """Bytes of the file. Raises AdapterError if it has changed, or cannot be read any more."""
        content = np.empty(length, np.uint8)
        try:
            with self.path.open("rb") as stream:
                self.check(stream)
                stream.seek(offset)
                found = stream.readinto(cast(Any, content))
                self.check(stream)
        except OSError as error:
            self.refuse(f"cannot be read any more ({error.strerror})")
        if found != length:
            self.refuse("has changed since it was loaded")
        return content

    def refuse(self, what: str) -> NoReturn:
        """Raise the AdapterError for a file that is another one now."""
        raise AdapterError(
            f"{self.path} {what}",
            expected="the file as it was",
            fix="Load it again: pipe.unload_lora_weights(NAME), then pipe.load_lora_weights(FILE).",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredArray:
    """A tensor of a file, read anew each time that NumPy takes it for an array.

    Its shape, size and type are those of the array that it becomes.
    """

    file: StoredFile
    offset: int
    length: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    name: str = field(default="", repr=False)

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    def __len__(self) -> int:
        """The length of its first axis."""
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Its numbers, as NumPy asks for them. Raises AdapterError if the file has changed."""
        found = np.reshape(seen_as(self.file.read(self.offset, self.length), self.dtype), self.shape)
        return found if dtype is None else found.astype(dtype, copy=False)


@contextmanager
def reading_whole(path: Path) -> Generator[tuple[StoredFile, Header, BinaryIO]]:
    """A file of safetensors, its header, and a stream of it; what is read of it is one state of the file.

    Raises:
        AdapterError: it breaks a rule of the format, or is written to meanwhile.
    """
    file = StoredFile(path=path, state=state_of(path.stat()))
    stream, header = open_file(path, error=AdapterError)
    with stream:
        yield file, header, stream
        file.check(stream)
