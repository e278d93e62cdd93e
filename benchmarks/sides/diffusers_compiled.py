"""diffusers with torch.compile on the UNet and the decoder, as its documentation advises for speed.

Whole graphs, and code of its own for every shape: what is compiled for any shape is slower. On CUDA in the
mode that also tunes kernels and captures graphs.
"""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

from . import diffusers_eager
from .contract import OpenSide, Task, missing_modules

NAME = "diffusers-compile"
# Beyond so many shapes of one function torch would give up compiling; a sweep over sizes has more than its 8.
_SHAPES = 256


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    if reason := diffusers_eager.available(task):
        return reason
    return missing_modules("triton") if task.device == "cuda" else _missing_compiler()


def _missing_compiler() -> str | None:
    """What inductor would call (torch._inductor.config.cpp.cxx)."""
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    compiler = os.environ.get("CXX", usual)
    return None if shutil.which(compiler) else f"torch.compile needs the C++ compiler {compiler}"


def open_side(task: Task) -> OpenSide:
    """Every net loaded; compiled is what the first run of a shape needs."""
    package, pipe = diffusers_eager.load(task)
    mode = "max-autotune" if task.device == "cuda" else "default"
    compile_nets(pipe, mode)
    return diffusers_eager.diffusers_side(
        NAME, package, pipe, {"compile": f"{mode}, fullgraph, static shapes"}
    )


def compile_nets(pipe: Any, mode: str) -> None:
    """Have the UNet and the decoder compiled, in place."""
    import torch

    config: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    config.recompile_limit = _SHAPES
    for net in (pipe.unet, pipe.vae.decoder):
        net.compile(mode=mode, fullgraph=True, dynamic=False)
