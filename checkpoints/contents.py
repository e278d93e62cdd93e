"""What weights files contain, told by a hash that is computed once and remembered.

Engines and opened checkpoints are found by the content of the weights, wherever the file lies and whatever it
is called. Reading gigabytes at each start would take longer than all the rest, so the hash is kept beside the
engine store, with the size, the time and the header that the file had: while these are the same, the content
counts as the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engines.errors import CheckpointError, LatentrtError
from ..engines.package import Elsewhere, FileRecord
from ..engines.processors import usable_processors
from ..engines.safetensors_format import read_header
from ..engines.store.folder import StoreFolder

_KIND = "contents"
_CHUNK = 1 << 26  # bytes that one thread hashes at a time


@dataclass(frozen=True, kw_only=True)
class Content:
    """A weights file at one time.

    Attributes:
        path: the file itself: links are followed.
        size: in bytes.
        mtime_ns: when it was last written.
        header: the sha256 (hex) of its header.
        sha256: of its content: of the hashes of its pieces, so that several threads can compute it.
    """

    path: Path
    size: int
    mtime_ns: int
    header: str
    sha256: str

    @property
    def record(self) -> FileRecord:
        """As a manifest has it."""
        return FileRecord(size=self.size, sha256=self.sha256)

    @property
    def elsewhere(self) -> Elsewhere:
        """As an opened package has it."""
        return Elsewhere(path=self.path, mtime_ns=self.mtime_ns)


def read_contents(files: Iterable[Path], store: StoreFolder) -> dict[Path, Content]:
    """The content of each file, by the path that is given; remembered, or read now.

    Raises:
        CheckpointError: a file cannot be read, or changes meanwhile.
    """
    return {path: _read_content(path, store) for path in files}


def _read_content(path: Path, store: StoreFolder) -> Content:
    file = path.resolve()
    header = hashlib.sha256(read_header(file).text).hexdigest()
    try:
        status = file.stat()
        seen = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "header": header}
        side = store.side_file(_KIND, hashlib.sha256(str(file).encode()).hexdigest())
        known = _remembered(store.read_side_file(side))
        if known.items() >= seen.items():
            return Content(path=file, sha256=str(known["sha256"]), **seen)
        content = Content(path=file, sha256=_hash(file, status.st_size), **seen)
        if file.stat().st_mtime_ns != status.st_mtime_ns:
            raise OSError("it was written to meanwhile")
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error})",
            expected="a file that this user can read, and that nobody writes to",
            fix="Mend its permissions, or wait until it is complete.",
        ) from error
    with suppress(LatentrtError):  # a store that cannot be written costs the time of hashing again
        store.write_side_file(side, json.dumps({**asdict(content), "path": str(file)}).encode())
    return content


def forget_gone(store: StoreFolder, *, dry_run: bool = False) -> int:
    """Remove what is remembered of files that are gone, and notes that are damaged; the bytes that frees."""
    freed = 0
    with suppress(OSError):
        for side in sorted((store.caches / _KIND).iterdir()):
            if _is_gone(_remembered(store.read_side_file(side)).get("path")):
                size = side.lstat().st_size
                if not dry_run:
                    side.unlink()
                freed += size
    return freed


def _is_gone(path: object) -> bool:
    """Whether nothing has that path; a disk that does not answer is no proof of it."""
    try:
        Path(str(path)).lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return not isinstance(path, str)


def _remembered(text: bytes) -> dict[str, Any]:
    """What was noted of a file; nothing where there is no note, or another program's."""
    with suppress(ValueError):
        found: Any = json.loads(text)
        if isinstance(found, dict) and "sha256" in found:
            return found
    return {}


def _hash(path: Path, size: int) -> str:
    """The sha256 over the hashes of the file's pieces, which threads take in turns."""

    def piece(begin: int) -> bytes:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as stream:
            stream.seek(begin)
            left = min(_CHUNK, size - begin)
            while left > 0 and (found := stream.read(min(left, 1 << 20))):
                digest.update(found)
                left -= len(found)
        return digest.digest()

    with ThreadPoolExecutor(usable_processors()) as pool:
        return hashlib.sha256(b"".join(pool.map(piece, range(0, size, _CHUNK)))).hexdigest()
