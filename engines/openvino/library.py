"""The library itself: whether it is there, what devices it has, and what its errors mean."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import BackendError, LatentrtError, MemoryLimitError
from ..installed import install_command

HOST = "CPU"
_EXTRA = "openvino"
# How an exhausted memory reads: C++'s bad_alloc, oneDNN's and the GPU plugin's words.
_FULL = (
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "out_of_memory",
    "failed to allocate",
    "exceeded max size",
)


def library() -> Any:
    """The library, imported on first use (0.8 s); its type stubs are incomplete, hence Any."""
    return import_module("openvino")


def opset() -> Any:
    """The functions that make nodes of a graph."""
    return import_module("openvino.opset13")


@cache
def core() -> Any:
    """What reads and compiles graphs; one for all, which threads may share. It loads each device once."""
    return library().Core()


def refusal(device: str = HOST) -> BackendError | None:
    """None if OpenVINO can run nets on a device, else the error that says why not. Never raises."""
    try:
        if find_spec("openvino") is None:
            return BackendError(
                "openvino is not installed",
                expected="the library that runs nets on Intel's and other processors",
                fix=f"Install it: {install_command(_EXTRA)}",
            )
        there: list[str] = core().available_devices
    except Exception as error:  # ImportError, OSError, AttributeError, and RuntimeError of a plugin
        return BackendError(
            f"openvino is installed and broken: {type(error).__name__}: {error}",
            expected="all files of one wheel",
            fix=f"Install it anew: {install_command(_EXTRA, '--force-reinstall')}",
        )
    # "GPU" is the first of "GPU.0" and "GPU.1".
    if device not in {name for one in there for name in (one, one.partition(".")[0])}:
        return BackendError(
            f"openvino has no device {device}: there {'is' if len(there) == 1 else 'are'}"
            f" {', '.join(there) or 'none'}",
            expected="a device whose driver is installed",
            fix="Run on the CPU: --device cpu",
        )
    return None


def version() -> str:
    """The library's release, "2026.4.1", without the build."""
    return str(library().__version__).partition("-")[0]


def run_error(name: str, error: Exception, doing: str) -> LatentrtError:
    """What it means that the net `name` failed while `doing`: MemoryLimitError or BackendError."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _FULL):
        return MemoryLimitError(
            f"the net {name!r} ran out of memory {doing}: {text}",
            expected="a size and batch that fit",
            fix="Draw fewer or smaller pictures at once.",
            culprit=name,
        )
    return BackendError(
        f"openvino fails at the net {name!r} {doing}: {text}",
        expected="a net that it has kernels for",
        fix="Use another backend: --backend onnxruntime",
    )
