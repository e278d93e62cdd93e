"""Where ONNX Runtime ran the nodes of a net: one without a CUDA kernel goes to the CPU silently.

A node on the CPU waits for the GPU and makes it wait; what moves between them passes through Memcpy nodes.
Integer arithmetic on shapes belongs on the CPU. Floats there are activations that left the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...engines.errors import BackendError

_CPU = "CPUExecutionProvider"
_FLOATS = frozenset({"float", "float16", "double", "bfloat16"})
_KERNEL = "_kernel_time"  # the event of a node's run is called by its name and this


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Nodes that ran, each once: how many, and by name and operator those that should not be.

    `copies` moved a tensor between CPU and GPU; `floats` ran on the CPU with floating-point tensors.
    """

    nodes: int
    on_cpu: int
    copies: tuple[str, ...]
    floats: tuple[str, ...]


def read_placement(profile: Path) -> Placement:
    """What the profile of a session says (SessionOptions.enable_profiling, InferenceSession.end_profiling).

    Raises BackendError for a file that is none, or in which no node has run.
    """
    try:
        events = cast("list[Mapping[str, Any]]", json.loads(profile.read_bytes()))
        nodes = dict(_nodes(events))
        problem = "" if nodes else f"{profile} has no node that ran"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        nodes, problem = {}, f"{profile} is no profile of onnxruntime: {error}"
    if problem:
        raise BackendError(
            problem,
            expected="the JSON file that end_profiling() of an open session names, after a run",
            fix="Open the net with a folder for its profile, run it once, and try again.",
        )
    on_cpu = {name: args for name, args in nodes.items() if args.get("provider") == _CPU}
    copies = (name for name, args in nodes.items() if str(args.get("op_name")).startswith("Memcpy"))
    floats = (name for name, args in on_cpu.items() if _types(args) & _FLOATS)
    return Placement(
        nodes=len(nodes), on_cpu=len(on_cpu), copies=tuple(sorted(copies)), floats=tuple(sorted(floats))
    )


def _nodes(events: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Name with operator, and what the profile has about it, of every run of a node."""
    for event in events:
        name = str(event.get("name"))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            args = cast("Mapping[str, Any]", event.get("args", {}))
            yield f"{name.removesuffix(_KERNEL)} ({args.get('op_name')})", args


def _types(args: Mapping[str, Any]) -> set[str]:
    """The types of inputs and outputs, which are listed like [{"float": [2, 4]}, {"int64": []}]."""
    tensors = [*args.get("input_type_shape", ()), *args.get("output_type_shape", ())]
    return {kind for tensor in tensors for kind in tensor}
