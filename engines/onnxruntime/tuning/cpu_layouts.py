"""What the engine store knows of the layouts of nets on the CPU, looked up when one is opened.

There are three: `plain`, the package's own graph; `fused`, in which group normalisation, GEGLU and
self-attention are lowered (`lowering/fused.py`); and `winograd`, in which 3x3 convolutions are lowered too
(`winograd.py`). Packages that are rounded to int8 have `int8` beside them, in which rounded products are
lowered (`rounded.py`), on processors that compute those right. `tuning/cpu.py` measures which is the fastest.
Every start passes here and most machines have measured nothing, so the store is imported only where it has
entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...errors import LatentrtError
from ...package import Package
from ...processors import adds_bytes, processor, usable_processors
from ...store.files import default_root, has_engines
from ...tuning.choice import TUNED_NETS, rounding_of
from ..lowering.files import LoweredGraph
from ..lowering.winograd import Kernel

if TYPE_CHECKING:
    from ...store.engine_store import EngineStore
    from ...store.key import EngineKey

CPU_LAYOUTS = ("plain", "fused", "winograd")  # the simplest first
INT8 = "int8"  # the layout, and the format of the packages that have it
# Raised when a layout makes other graphs, so that a stored one is never taken for today's.
_REVISION = 1


def layouts_of(package: Package, net: str) -> tuple[str, ...]:
    """The layouts of a net on this processor, the simplest first."""
    rounded = rounding_of(package, net).get("format") == INT8
    return (*CPU_LAYOUTS, INT8) if rounded and adds_bytes() else CPU_LAYOUTS


def cpu_key(package: Package, net: str, version: str) -> EngineKey:
    """The key of a net's layout on this machine's CPU with onnxruntime `version`.

    The profile is made from the manifest alone, because every start passes here.
    """
    from ...store.key import Target, package_key

    cores = f"{processor()}, {usable_processors()} cores"
    defaults = package.manifest.defaults
    return package_key(
        package,
        net,
        backend="onnxruntime",
        version=version,
        target=Target(compute_capability="cpu", gpu=cores, driver="any"),
        profiles=(f"{defaults.width}x{defaults.height}",),
        flags=sorted((*layouts_of(package, net), f"lowering {_REVISION}")),
    )


def lowered_graph(
    package: Package, net: str, version: str, store: EngineStore | None = None
) -> LoweredGraph | None:
    """The lowered graph of a net if that was measured to be faster here, else None.

    Whatever is wrong with the store, nothing is raised: None is always right, if slower. `store` is the
    user's own unless given.
    """
    if net not in TUNED_NETS or (store is None and not has_engines(default_root())):
        return None
    from ...store.engine_store import EngineStore, Miss

    with suppress(LatentrtError, OSError, ValueError, KeyError, TypeError):
        found = (store or EngineStore()).find(cpu_key(package, net, version))
        if isinstance(found, Miss):
            return None
        graph = found.read()  # also of `plain`: `prune` goes by when an entry was read last
        layout: str = found.facts["layout"]
        if layout in layouts_of(package, net)[1:]:
            rows: list[Mapping[str, Any]] = found.facts["kernels"]
            return LoweredGraph(layout=layout, graph=graph, kernels=tuple(Kernel(**row) for row in rows))
    return None


def known_layout(package: Package, net: str, version: str, store: EngineStore) -> str:
    """The name of the layout that was measured to be the fastest here, "plain" where none was."""
    from ...store.engine_store import Entry

    with suppress(LatentrtError, OSError, ValueError, KeyError):
        found = store.find(cpu_key(package, net, version))
        if isinstance(found, Entry):
            return str(found.facts["layout"])
    return "plain"
