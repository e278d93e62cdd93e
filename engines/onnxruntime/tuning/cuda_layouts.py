"""The layouts of nets on ONNX Runtime's CUDA provider, and what the engine store knows of them.

An entry of the store is one net on one kind of GPU with one release of ONNX Runtime: `engine.bin` is the
graph of the layout that won, whose weights are still the package's, and the facts are the figures.
`tuning/cuda.py` measures; opening a net only looks, so that it takes as long every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...cuda.facts import DeviceFacts
from ...errors import LatentrtError
from ...package import Package
from ...store.engine_store import EngineStore, Miss
from ...store.key import EngineKey, Target, package_key
from ..lowering.lower import REVISION
from ..session import library
from .choice import measured_profile


@dataclass(frozen=True, kw_only=True)
class CudaLayout:
    """How a net may be laid out.

    Attributes:
        name: as the store remembers it.
        lowered: whether `lowering.lower` makes the graph; else it is the package's own.
        convolutions: the argument of `lower`.
        prefer_nhwc: the CUDA provider's option.
    """

    name: str
    lowered: bool
    convolutions: bool
    prefer_nhwc: bool


# The simplest first. The first is also what the others are compared with.
CUDA_LAYOUTS: Mapping[str, CudaLayout] = {
    item.name: item
    for item in (
        CudaLayout(name="plain", lowered=False, convolutions=False, prefer_nhwc=False),
        CudaLayout(name="groupnorm", lowered=True, convolutions=False, prefer_nhwc=True),
        CudaLayout(name="nhwc", lowered=True, convolutions=True, prefer_nhwc=False),
    )
}


@dataclass(frozen=True, kw_only=True)
class StoredLayout:
    """What the store knows of a net.

    Attributes:
        layout: the one that was chosen; `plain` where nothing is known.
        graph: its graph; None where that is the package's own.
        why: why nothing is known; "" otherwise.
    """

    layout: CudaLayout
    graph: bytes | None
    why: str


def layout_key(package: Package, net: str, gpu: DeviceFacts, version: str | None = None) -> EngineKey:
    """The key of a net's layout on a GPU; `version` is the installed onnxruntime's unless given."""
    return package_key(
        package,
        net,
        backend="onnxruntime-cuda",
        version=version or str(library().__version__),
        # What is fast on one kind of GPU need not be fast on another.
        target=Target(compute_capability=gpu.sm, gpu=gpu.kind, driver=gpu.driver_line),
        profiles=(measured_profile(package, net).text,),
        # A release that knows other layouts, or makes other graphs for them, has to measure again.
        flags=sorted((*CUDA_LAYOUTS, f"lowering {REVISION}")),
    )


def stored_layout(package: Package, net: str, store: EngineStore, gpu: DeviceFacts) -> StoredLayout:
    """What was measured here before. Never raises for what is wrong with the store: `plain` needs none."""
    plain = CUDA_LAYOUTS["plain"]
    try:
        found = store.find(layout_key(package, net, gpu))
        if isinstance(found, Miss):
            return StoredLayout(layout=plain, graph=None, why=found.reason)
        layout = CUDA_LAYOUTS[str(found.facts.get("layout", ""))]
        graph = found.read()  # also of `plain`: `prune` goes by when an entry was read last
        return StoredLayout(layout=layout, graph=graph if layout.lowered else None, why="")
    except LatentrtError as error:
        return StoredLayout(layout=plain, graph=None, why=error.found)
    except KeyError as error:
        return StoredLayout(layout=plain, graph=None, why=f"the store names an unknown layout {error}")
