"""What a number was measured on: stamped on every result."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..engines.cuda.facts import Nvml, available, facts
from ..engines.processors import processor, usable_processors

_LIBRARIES = (
    *("latentrt", "numpy", "onnxruntime", "onnxruntime-gpu", "onnx-ir", "torch", "diffusers", "openvino"),
    *("polygraphy", "tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    *("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    *("cuda-bindings", "nvidia-ml-py", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, load, GPU (None without one), versions and commit, as JSON."""
    return {
        "cpu": processor(),
        "cores": usable_processors(),
        "load_1min": _load(),
        "gpu": _gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: found for name in _LIBRARIES if (found := version_of(name))},
        "commit": _commit(),
    }


def clocks() -> dict[str, Any]:
    """What changes from one row to the next: the load and every clock, now."""
    gpu = None if available() else Nvml(facts().uuid).clocks()
    return {"load_1min": _load(), "cpu_mhz": _cpu_mhz(), "gpu_clocks": gpu}


def resident_bytes(pid: int | None = None) -> tuple[int, int]:
    """Bytes of a process, this one by default, that are resident now, and the most that ever were.

    Linux alone tells both (proc(5)); elsewhere, and of a process that has ended, it is (0, 0). The peak of
    getrusage would not do: a child's begins with what its parent had resident when it was forked.
    """
    try:
        text = Path("/proc", str(pid or "self"), "status").read_text(encoding="utf-8", errors="replace")
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):  # no /proc; or it is ending, and has no memory any more
        return 0, 0
    return now, max(now, peak)


def version_of(distribution: str) -> str | None:
    """Its version; None if it is not installed, or came by other means than pip."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any] | None:
    """The first CUDA device, its driver and the newest CUDA that it speaks; None where there is none."""
    if available():
        return None
    found = facts()
    return {
        "name": found.name,
        "compute_capability": "{}.{}".format(*found.compute_capability),
        "driver": found.driver,
        "cuda": found.cuda,
        "total_mib": found.total // 2**20,
        "unified_memory": found.unified,
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_mhz() -> list[int]:
    """The clock of every processor now, as Linux tells it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return [round(float(line.partition(":")[2])) for line in lines if line.startswith("cpu MHz")]


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):  # there is no git
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return found.stdout.strip() or None
    return None
