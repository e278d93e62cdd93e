"""What the engine store knows of the layouts of nets on the CPU, looked up when one is opened.

There are three: `plain`, the package's own graph; `fused`, in which group normalisation, GEGLU and
self-attention are lowered (`onnxruntime/group_norm.py`, `geglu.py`, `attention.py`); and `winograd`, in which
3x3 convolutions are, too (`winograd.py`). Which is the fastest is measured by `onnxruntime/cpu_tuning.py`.
Most machines have measured nothing, and every start passes here: so the store is imported only where it has
something, and the builder never.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LatentrtError
from ...package import Package
from ...store.files import default_root
from .choice import TUNED_NETS

if TYPE_CHECKING:
    from ...store.engine_store import EngineStore
    from ...store.key import EngineKey
    from ..lowering.winograd_kernels import Kernel

BACKEND = "onnxruntime"
CPU_LAYOUTS = ("plain", "fused", "winograd")  # the simplest first


@dataclass(frozen=True, kw_only=True)
class LoweredGraph:
    """A graph in a layout other than `plain`: its bytes, and the weights that a session of it needs."""

    layout: str
    graph: bytes
    kernels: tuple[Kernel, ...]


def cpu_key(package: Package, net: str, version: str) -> EngineKey:
    """Under which the store has a net's layout on this machine's CPU with onnxruntime `version`.

    The profile is written as `tuning.measured_profile` would, from the manifest alone.
    """
    from ...store.key import EngineKey, canonical_sha256

    manifest = package.manifest
    file = manifest.nets[net]
    return EngineKey(
        net=net,
        graph=manifest.files[file.graph].sha256,
        weights=manifest.files[file.weights].sha256 if file.weights else "",
        dtype=manifest.dtype,
        contract=canonical_sha256(file.spec.to_json()),
        backend=BACKEND,
        backend_version=version,
        compute_capability="cpu",
        gpu=f"{processor()}, {usable_processors()} cores",
        driver="any",
        platform=f"{sys.platform}-{platform.machine().lower()}",
        profiles=(f"{manifest.defaults.width}x{manifest.defaults.height}",),
        flags=tuple(sorted(CPU_LAYOUTS)),
        refittable="",
        optimization_level=0,
        workspace_limit=0,
        hardware_compatibility="",
    )


def lowered_graph(
    package: Package, net: str, version: str, store: EngineStore | None = None
) -> LoweredGraph | None:
    """The lowered graph of a net, if that was measured to be faster here; else None.

    Never raises for what is wrong with the store: None is always right, if slower. `store` is the user's own
    unless given.
    """
    if net not in TUNED_NETS or (store is None and not _has_engines(default_root())):
        return None
    from ...store.engine_store import EngineStore, Miss
    from ..lowering.winograd_kernels import Kernel

    with suppress(LatentrtError, OSError, ValueError, KeyError, TypeError):
        found = (store or EngineStore()).find(cpu_key(package, net, version))
        if isinstance(found, Miss):
            return None
        graph = found.read()  # also of `plain`: `prune` goes by when an entry was read last
        layout: str = found.facts["layout"]
        if layout in CPU_LAYOUTS[1:]:
            rows: list[Mapping[str, Any]] = found.facts["kernels"]
            return LoweredGraph(layout=layout, graph=graph, kernels=tuple(Kernel(**row) for row in rows))
    return None


def processor() -> str:
    """The processor's name, in one line."""
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split()) or "unknown"
    return " ".join(platform.processor().split()) or "unknown"


def usable_processors() -> int:
    """The processors this process may run on, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has_engines(root: Path) -> bool:
    try:
        with os.scandir(root / "engines") as entries:
            return next(entries, None) is not None
    except OSError:
        return False
