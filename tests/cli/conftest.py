"""The tiny checkpoint of `tests/checkpoints`, for commands that open one."""

from tests.checkpoints.conftest import small_archive, small_file

__all__ = ["small_archive", "small_file"]
