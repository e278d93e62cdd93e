"""What a number was measured on: stamped on every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..engines.cuda.facts import available, facts

_LIBRARIES = (
    "latentrt",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-ir",
    "torch",
    "diffusers",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "nvidia-ml-py",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, load, GPU (None without one), versions and commit, as JSON."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": describe_gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "commit": _commit(),
    }


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


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return None
    return found.stdout.strip() or None
