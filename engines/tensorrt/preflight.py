"""Before minutes of building: is there room, and can this GPU run it? Refuses only what is certain to fail.

A build that fails for want of memory takes long to do so, and may take other programs with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..cuda.facts import DeviceFacts
from ..errors import BackendError, MemoryLimitError, StorageError
from ..package import Manifest

_MIB = 2**20
_ENGINE_EXTRA = 64 * _MIB  # kernels and tables, beside the weights

# Measured with TensorRT-RTX 1.7 on SD 1.5 in fp16 (benchmarks/verbs/build.py): 6.1 GB for 1.62 GB of weights.
_USUAL_FACTOR, _USUAL_EXTRA = 3.6, 256 * _MIB
# What no build can do without: the weights as read, and the engine in the making.
_LEAST_FACTOR, _LEAST_EXTRA = 2.0, 128 * _MIB

FreeVram = Callable[[], "int | None"]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What is free, in bytes; None where the system does not tell, which refuses nothing."""

    disk: int | None
    ram: int | None
    vram: int | None = None


def read_room(
    folder: Path,
    *,
    vram: FreeVram | None = None,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> Room:
    """What is free for a build in `folder`, which need not exist yet.

    The engine never lies on two file systems at once. `vram` reads the free device memory, where the builder
    needs it; the control groups are those of containers.
    """
    known = [size for size in (_available(proc), _within_limit(proc, cgroups)) if size is not None]
    return Room(disk=_free_disk(folder), ram=min(known, default=None), vram=vram() if vram else None)


def check_room(net: str, weights: int, room: Room) -> None:
    """Refuse a build that cannot succeed; `weights` are the net's, in bytes.

    Raises:
        StorageError: the engine does not fit on the disk.
        MemoryLimitError: RAM or device memory is certain to be too little.
    """
    engine = weights + _ENGINE_EXTRA
    if room.disk is not None and room.disk < engine:
        raise StorageError(
            f"{_gb(room.disk)} of disk are free for the engine of {net!r}",
            expected=f"{_gb(engine)}: its weights and {_ENGINE_EXTRA // _MIB} MiB",
            fix="Free some (latentrt cache prune --older-than 30), or name another disk: --store FOLDER.",
        )
    least = int(weights * _LEAST_FACTOR) + _LEAST_EXTRA
    usual = int(weights * _USUAL_FACTOR) + _USUAL_EXTRA
    if room.ram is not None and room.ram < least:
        raise MemoryLimitError(
            f"{_gb(room.ram)} of memory are available to build {net!r}, whose weights have {_gb(weights)}",
            expected=f"at least {_gb(least)}, and usually {_gb(usual)}",
            fix="Close other programs, raise the container's limit, or build on a larger machine.",
            culprit=net,
        )
    if room.vram is not None and room.vram < engine:
        raise MemoryLimitError(
            f"{_gb(room.vram)} of device memory are free to build {net!r}, whose weights have {_gb(weights)}",
            expected=f"at least {_gb(engine)}: tactics are timed on the device",
            fix="Close what else uses the GPU (nvidia-smi lists it).",
            culprit=net,
        )


def check_capability(manifest: Manifest, gpu: DeviceFacts | None) -> None:
    """Refuse a rounded package on a GPU without instructions for its format; None is any GPU.

    Raises:
        BackendError: it is older.
    """
    needed = str(manifest.quantised.get("capability", "0.0"))
    if gpu is not None and gpu.compute_capability < tuple(map(int, needed.split("."))):
        raise BackendError(
            f"{manifest.name} is in {manifest.quantised['format']}, and {gpu.name} is {gpu.sm}",
            expected=f"a GPU of compute capability {needed} or above",
            fix="Use the package that it was made of, or another format: latentrt quantise --help",
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _free_disk(folder: Path) -> int | None:
    for path in (folder, *folder.absolute().parents):
        if path.is_dir():
            return shutil.disk_usage(path).free
    return None


def _available(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _within_limit(proc: Path, cgroups: Path) -> int | None:
    """What the tightest control group of this process leaves, counting cached files as free."""
    line = next((line for line in _read(proc / "self/cgroup").splitlines() if line.startswith("0::")), "0::/")
    group = cgroups / line[3:].strip().lstrip("/")
    groups = [group, *(parent for parent in group.parents if parent.is_relative_to(cgroups))]
    left = [_left(path, "memory.max", "memory.current", "inactive_file") for path in groups]
    left.append(
        _left(
            cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        )  # version 1
    )
    return min((size for size in left if size is not None), default=None)


def _left(group: Path, limit: str, current: str, cached: str) -> int | None:
    most, used = _read(group / limit).strip(), _read(group / current).strip()
    if not (most.isdecimal() and used.isdecimal()):  # "max", or no such group
        return None
    stat = dict(
        line.split()[:2] for line in _read(group / "memory.stat").splitlines() if len(line.split()) > 1
    )
    return max(0, int(most) - int(used) + int(stat.get(cached, "0")))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
