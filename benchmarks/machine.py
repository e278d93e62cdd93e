"""What a number was measured on: stamped on every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
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
        "gpu": describe_gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: found for name in _LIBRARIES if (found := version_of(name))},
        "commit": _commit(),
    }


def clocks() -> dict[str, Any]:
    """What changes from one row to the next: the load and every clock, now."""
    return {"load_1min": _load(), "cpu_mhz": _cpu_mhz(), "gpu_clocks": gpu_clocks()}


def resident_bytes() -> tuple[int, int]:
    """Bytes of this process that are resident now, and the most that ever were.

    Linux tells both (proc(5)); elsewhere getrusage's peak stands for both. On Linux that one would not do: a
    child's begins with what its parent had resident when it was forked. Windows tells neither: (0, 0).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    if find_spec("resource") is None:
        return 0, 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return peak, peak


def describe_gpu(*, runtime: Any = None, nvml: Any = None) -> dict[str, Any] | None:
    """The first CUDA device, its driver and the newest CUDA that speaks; None where there is none.

    Tests pass a CUDA runtime and an NVML of their own.
    """
    if available(runtime):
        return None
    found = facts(runtime=runtime, nvml=nvml)
    return {
        "name": found.name,
        "compute_capability": "{}.{}".format(*found.compute_capability),
        "driver": found.driver,
        "cuda": found.cuda,
        "total_mib": found.total // 2**20,
        "unified_memory": found.unified,
    }


def gpu_clocks(*, runtime: Any = None, nvml: Any = None) -> dict[str, int] | None:
    """Clocks, temperature and power of the first CUDA device now (`Nvml.clocks`); None without one."""
    if available(runtime):
        return None
    return Nvml(facts(runtime=runtime, nvml=nvml).uuid, nvml).clocks()


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_mhz() -> list[int]:
    """The clock of every processor now, as Linux tells it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return [round(float(line.partition(":")[2])) for line in lines if line.startswith("cpu MHz")]


def version_of(distribution: str) -> str | None:
    """Its version; None if it is not installed, or came by other means than pip."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return None
    return found.stdout.strip() or None
