"""Where a package is written: beside its place, renamed at the end, so that nothing is left of a failure."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoints.beside import beside, put
from ..engines.errors import StorageError, UsageError
from ..engines.package import MANIFEST


def check_target(package: Path, overwrite: bool) -> None:
    """Raise UsageError where something is at a package's place that is not to be replaced."""
    is_package = (package / MANIFEST).is_file()
    empty = not package.exists() or (package.is_dir() and not any(package.iterdir()))
    if not empty and not (is_package and overwrite):
        raise UsageError(
            f"{package} {'is a package already' if is_package else 'exists and is no package'}",
            expected="a folder that does not exist yet, or an empty one",
            fix=f"{'Pass --overwrite to replace it, or choose' if is_package else 'Choose'} another path.",
        )


@contextmanager
def complete(package: Path, overwrite: bool) -> Generator[Path]:
    """A folder that takes the place of `package` if the block succeeds. Raises StorageError."""
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        with beside(package) as folder:
            yield folder
            check_target(package, overwrite)  # once more: minutes have passed
            put(folder, package, folder)
    except OSError as error:
        raise StorageError(
            f"{package} cannot be written ({error.strerror or error})",
            expected="a writable folder with room for twice the checkpoint",
            fix="Free some space, or choose another path.",
        ) from error
