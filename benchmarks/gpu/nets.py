"""Sections of the GPU check over single nets: built, opened, and on the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from ...engines.backends import BACKENDS
from ...engines.cuda import facts as cuda_facts
from ...engines.errors import BackendError, LatentrtError
from ...engines.onnxruntime.tuning.choice import tuned_nets
from ...engines.profiles import Profile
from ...engines.spec import TEXT_ENCODERS
from ...engines.store.engine_store import EngineStore
from ...engines.tensorrt.build import built_nets
from ..case import HOST_NETS
from ..records import Row
from ..verbs.build import Builds, build_net
from .opener import Opener, Scale, attempt, draw, failed, mebibytes, row_of, start_of

_DRAWING = {*HOST_NETS, *TEXT_ENCODERS, "vae_encoder", "step"}  # nets that run where `placement` draws
_NAMED = 4  # nodes in a reason
_CPU = "CPUExecutionProvider"
_FLOATS = frozenset({"float", "float16", "double", "bfloat16"})
_KERNEL = "_kernel_time"  # the event of a node's run is called by its name and this


def build(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Engines of every net, or the layouts of ONNX Runtime's, into the store (LATENTRT_CACHE)."""
    backend, package = opener.task.backend, opener.package
    if backend not in BACKENDS:
        yield row_of("engines", missing=f"{backend} builds nothing")
        return
    gpu = None if cuda_facts.available() else cuda_facts.facts()
    profile = Profile.parse(scale.profile, multiple=package.manifest.size_multiple)
    builds = Builds(backend=backend, profiles=(profile,))

    def built(net: str) -> Row:
        figures = build_net(net, package, builds, EngineStore(), gpu)
        problems = [] if figures.get("engine_mb", 1) > 0 else ["the engine is empty"]
        return row_of(net, figures, problems, [figures.pop("seconds")])

    for net in tuned_nets(package, ()) if builds.tunes else built_nets(package):
        yield attempt(net, built)


def placement(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net opens; ONNX Runtime runs floating-point nodes on the GPU, and copies nothing to or from it.

    Engines run on the GPU as a whole. A GPU that the library does not list may be refused: no failure.
    """
    with TemporaryDirectory() as folder:
        options: dict[str, Any] = {"profile": Path(folder)} if opener.onnxruntime else {}
        try:
            with opener.pipeline(**options) as opened:
                draw(opened.pipe, scale.case, **start_of(opener.package, scale.case))
                weights = sum(net.memory.weights for net in opened.loop.nets.values())
                figures = {"device": opened.loop.device.name, "weights_mib": mebibytes(weights)}
                yield row_of("every net", figures)
                for name in sorted(_DRAWING & opened.loop.nets.keys()) if opener.onnxruntime else ():
                    yield attempt(name, _placed, opened.loop.nets[name])
        except LatentrtError as error:
            row = failed("every net", error)
            if opener.unsupported:
                row = replace(row, status="not available", reason=f"{opener.unsupported}: {row.reason}")
            yield row


def _placed(name: str, net: Any) -> Row:
    nodes = read_profile(net.end_profile())
    on_cpu = {node: args for node, args in nodes.items() if args.get("provider") == _CPU}
    misplaced = {
        "copies between CPU and GPU": [node for node in nodes if "(Memcpy" in node],
        # activations that left the GPU; integer arithmetic on shapes belongs on the CPU
        "floating-point nodes on the CPU": [node for node, args in on_cpu.items() if _types(args) & _FLOATS],
    }
    problems = [
        f"{len(found)} {what}: {', '.join(sorted(found)[:_NAMED])}"
        for what, found in misplaced.items()
        if found
    ]
    return row_of(name, {"nodes": len(nodes), "on_cpu": len(on_cpu)}, problems)


def read_profile(profile: Path) -> dict[str, Mapping[str, Any]]:
    """Nodes that ran, each once: what the profile of a session has about it, by `name (operator)`.

    The file is that of SessionOptions.enable_profiling and InferenceSession.end_profiling.

    Raises BackendError for a file that is none, or in which no node has run.
    """
    nodes: dict[str, Mapping[str, Any]] = {}
    problem = f"{profile} has no node that ran"
    try:
        for event in cast("list[Mapping[str, Any]]", json.loads(profile.read_bytes())):
            name = str(event.get("name"))
            if event.get("cat") == "Node" and name.endswith(_KERNEL):
                args = cast("Mapping[str, Any]", event.get("args", {}))
                nodes[f"{name.removesuffix(_KERNEL)} ({args.get('op_name')})"] = args
    except (OSError, ValueError, TypeError, AttributeError) as error:
        nodes, problem = {}, f"{profile} is no profile of onnxruntime: {error}"
    if not nodes:
        raise BackendError(
            problem,
            expected="the JSON file that end_profiling() of an open session names, after a run",
            fix="Open the net with a folder for its profile, run it once, and try again.",
        )
    return nodes


def _types(args: Mapping[str, Any]) -> set[str]:
    """The types of inputs and outputs, which are listed like [{"float": [2, 4]}, {"int64": []}]."""
    tensors = [*args.get("input_type_shape", ()), *args.get("output_type_shape", ())]
    return {kind for tensor in tensors for kind in tensor}
