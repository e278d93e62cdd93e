"""Keys and builders for the tests of the store; light, for the child processes import it too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.engines.store.key import EngineKey, canonical_sha256

KEY = EngineKey(
    net="unet",
    graph=canonical_sha256("graph"),
    weights=canonical_sha256("weights"),
    dtype="fp16",
    contract=canonical_sha256("contract"),
    backend="tensorrt-rtx",
    backend_version="1.6.0",
    compute_capability="sm_89",
    gpu="NVIDIA GeForce RTX 4090",
    driver="580",
    platform="linux-x86_64",
    profiles=("512x512:b1-4", "768x768:b1"),
    flags=("REFIT_INDIVIDUAL", "STRIP_PLAN"),
    optimization_level=3,
    workspace_limit=0,
    hardware_compatibility="",
)
OTHER: dict[str, Any] = {  # another value for every field
    "net": "vae_decoder",
    "graph": canonical_sha256("other graph"),
    "weights": "",
    "dtype": "fp32",
    "contract": canonical_sha256("other contract"),
    "backend": "tensorrt",
    "backend_version": "1.7.1",
    "compute_capability": "portable",
    "gpu": "any",
    "driver": "any",
    "platform": "win32-amd64",
    "profiles": ("512x512:b1-4", "1024x1024:b1"),
    "flags": ("REFIT_INDIVIDUAL",),
    "optimization_level": 5,
    "workspace_limit": 2**30,
    "hardware_compatibility": "ampere+",
    "recipe": 99,
    "schema": 99,
}


def numbered(number: int) -> EngineKey:
    """One of many keys."""
    return replace(KEY, workspace_limit=number)


def builder(content: bytes, **facts: Any) -> Callable[[Path], dict[str, Any]]:
    """A builder of an engine with this content."""

    def build(path: Path) -> dict[str, Any]:
        path.write_bytes(content)
        return facts

    return build
