"""The layouts of nets on ONNX Runtime's CUDA provider, and what the engine store knows of them.

An entry of the store is one net on one kind of GPU with one release of ONNX Runtime: `engine.bin` is the
graph of the layout that won, whose weights are still the package's, and the facts are the figures.
`tuning/cuda.py` measures; opening a net only looks, so that it takes as long every time.
"""

from __future__ import annotations

from contextlib import suppress

from ...cuda.facts import DeviceFacts
from ...errors import LatentrtError
from ...package import Package
from ...spec import TEXT_ENCODERS
from ...store.engine_store import EngineStore, Entry
from ...store.key import EngineKey, Target, package_key
from ...tuning.choice import TUNED_NETS, measured_profile
from ..lowering.lower import REVISION
from ..session import library

# The simplest first, which is also what others are compared with: `plain` is the package's own graph, and
# `nhwc` what `lowering.lower` makes of it.
CUDA_LAYOUTS = ("plain", "nhwc")
# Beside those that are measured: what is not worth measuring, and what is laid out as `unet` is.
LOWERED_NETS = (*TUNED_NETS, "vae_encoder", *TEXT_ENCODERS, "unet_controlled")


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


def stored_graph(
    package: Package, net: str, store: EngineStore, gpu: DeviceFacts
) -> tuple[str, bytes] | None:
    """The layout that was measured as the fastest here, and its graph; None if nothing is known.

    Never raises for what is wrong with the store: a net needs none.
    """
    with suppress(LatentrtError):
        found = store.find(layout_key(package, net, gpu))
        if isinstance(found, Entry) and found.facts.get("layout") in CUDA_LAYOUTS:
            return str(
                found.facts["layout"]
            ), found.read()  # also of `plain`: `prune` goes by the last reading
    return None
