"""Arrays that a file holds in place of memory, where memory is short."""

from __future__ import annotations

from contextlib import suppress
from os import SEEK_CUR
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from .spec import Array

_ALIGNMENT = 64  # bytes, as NumPy's own arrays
_TOLD_BY_LINUX = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """What the system can still give without swapping, as Linux estimates it; None where nothing tells."""
    with suppress(OSError, ValueError, IndexError):
        for line in _TOLD_BY_LINUX.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def spill(arrays: dict[str, Array], folder: Path) -> None:
    """Replace arrays by such in a file without a name, which goes with the last of them.

    What was read once, such as weights that a library keeps a packed copy of, leaves memory when others want
    it. They may be written to, as some libraries want it, and what is written stays in memory. What the disk
    has no room for stays in memory too.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            for name, array in arrays.items():
                if array.size:
                    start = file.seek(-file.tell() % _ALIGNMENT, SEEK_CUR)
                    file.write(np.ascontiguousarray(array).data)
                    file.flush()
                    arrays[name] = np.memmap(file, array.dtype, "c", start, array.shape)
