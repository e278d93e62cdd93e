"""What TensorRT logs: a call that fails returns None or False, and the reason goes to a logger.

The library keeps the first logger of a process for everything it cannot attribute, so there is one per
library.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

from ..errors import BackendError, LatentrtError, MemoryLimitError
from .flavour import Trt

_KEPT = 200  # messages; a failure takes fewer than ten
_SHOWN = 3  # lines of one error message
_PROBLEMS = ("INTERNAL_ERROR", "ERROR", "WARNING")
_ERRORS = ("INTERNAL_ERROR", "ERROR")
# "cudaError 2" is cudaErrorMemoryAllocation.
_MEMORY = re.compile(r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|cudaError 2\b", re.IGNORECASE)
_DRIVER = re.compile(r"driver version is insufficient|no CUDA-capable device|cudaError (?:35|100)\b")


class Messages:
    """The messages of one library, in order. `logger` is what its objects are made with."""

    def __init__(self, trt: Trt) -> None:
        self._kept: deque[tuple[int, str, str]] = deque(maxlen=_KEPT)
        self._count = 0
        self.logger: Any = _listener(trt, self._keep)

    def _keep(self, severity: str, text: str) -> None:
        self._count += 1
        if severity in _PROBLEMS:
            self._kept.append((self._count, severity, text))

    def mark(self) -> int:
        """The present, for a later `since`."""
        return self._count

    def since(self, mark: int, *, errors_only: bool = False) -> list[str]:
        """Errors and warnings after `mark`, errors first, each once."""
        new = [(severity, text) for number, severity, text in self._kept if number > mark]
        errors = [text for severity, text in new if severity in _ERRORS]
        warnings = [] if errors_only else [text for severity, text in new if severity not in _ERRORS]
        return list(dict.fromkeys(errors + warnings))


@cache
def messages(trt: Trt) -> Messages:
    """The one listener of a library."""
    return Messages(trt)


def _listener(trt: Trt, keep: Callable[[str, str], None]) -> Any:
    class Listener(trt.ILogger):  # the base class is known only when the library is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 asks for exactly this spelling

        def log(self, severity: Any, msg: str) -> None:
            keep(severity.name, msg)

    return Listener()


def reason(lines: list[str]) -> str:
    """The library's own words, for the end of a sentence; "" if it logged nothing."""
    return f": {' | '.join(lines[:_SHOWN])}" if lines else ""


def failure(
    lines: list[str], what: str, *, net: str, expected: str, fix: str, memory: str = ""
) -> LatentrtError:
    """The error of a call that TensorRT refused, from what it logged meanwhile.

    `lines` are of `Messages.since`, `what` is a sentence without its end, `fix` is for where neither memory
    nor the driver is to blame, and `memory` are the device's numbers.

    Returns:
        MemoryLimitError, with the net as its culprit, if the lines speak of memory; else BackendError.
    """
    words = reason(lines)
    if any(map(_MEMORY.search, lines)):
        return MemoryLimitError(
            f"{what}{words}{f' ({memory})' if memory else ''}",
            expected="a size, a batch and nets that fit",
            fix="Draw fewer or smaller pictures at once, or close what else uses the device.",
            culprit=net,
        )
    if any(map(_DRIVER.search, lines)):
        fix = "Install or update the NVIDIA driver; `nvidia-smi` shows the one in use."
    return BackendError(f"{what}{words}", expected=expected, fix=fix)
