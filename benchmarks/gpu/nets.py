"""Sections of the GPU check over single nets: built, opened, on the GPU, and right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from ...engines.backends import BACKENDS
from ...engines.cuda import facts as cuda_facts
from ...engines.device import Device, DeviceNet
from ...engines.errors import BackendError, LatentrtError
from ...engines.onnxruntime.backend import ONNXRUNTIME
from ...engines.onnxruntime.nets import OnnxRuntimeDeviceNet
from ...engines.onnxruntime.tuning.choice import tuned_nets
from ...engines.package import Package
from ...engines.profiles import Profile
from ...engines.spec import DTYPES, Array, NetSpec
from ...engines.store.engine_store import EngineStore
from ...engines.tensorrt.build import built_nets
from ...engines.tolerances import DECODED_DB, NET_RELATIVE_L2
from ...runtime.loop.device.programs import Sizes, input_shapes, shape_of
from ..case import sizes_of
from ..likeness import difference
from ..records import Row
from ..sides.device_work import DeviceNets, upload
from ..verbs.build import Builds, build_net
from .opener import Opener, Scale, attempt, failed, judged, mebibytes, not_available

_NAMED = 4  # nodes, or outputs, in a reason
_CPU = "CPUExecutionProvider"
_FLOATS = frozenset({"float", "float16", "double", "bfloat16"})
_KERNEL = "_kernel_time"  # the event of a node's run is called by its name and this


def build(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Engines of every net, or the layouts of ONNX Runtime's, into the store (LATENTRT_CACHE)."""
    backend, package = opener.task.backend, opener.package
    if backend not in BACKENDS:
        yield not_available("engines", f"{backend} builds nothing")
        return
    gpu = None if cuda_facts.available() else cuda_facts.facts()
    profile = Profile.parse(scale.profile, multiple=package.manifest.size_multiple)
    builds = Builds(backend=backend, profiles=(profile,))

    def built(net: str) -> Row:
        figures = build_net(net, package, builds, EngineStore(), gpu)
        problems = [] if figures.get("engine_mb", 1) > 0 else ["the engine is empty"]
        return judged(net, problems, figures, [figures.pop("seconds")])

    for net in tuned_nets(package, ()) if builds.tunes else built_nets(package):
        yield attempt(net, partial(built, net))


def opens(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net on the device. A GPU that the library does not list may be refused: that is no failure."""
    try:
        with opener.nets() as (device, nets):
            sizes = shapes(scale, opener.package)[0]
            for net in nets.values():
                net.scratch(input_shapes(net.spec, sizes))  # engines are opened by their first request
            weights = sum(net.memory.weights for net in nets.values())
            yield judged("every net", [], {"device": device.name, "weights_mib": mebibytes(weights)})
    except LatentrtError as error:
        row = failed("every net", error)
        if opener.unsupported:
            row = replace(row, status="not available", reason=f"{opener.unsupported}: {row.reason}")
        yield row


def placement(opener: Opener, scale: Scale) -> Iterator[Row]:
    """ONNX Runtime ran all floating-point nodes of each net on the GPU, and copied nothing to or from it."""
    if not opener.onnxruntime:
        yield not_available("every net", "engines run on the GPU as a whole")
        return
    sizes = shapes(scale, opener.package)[0]
    with TemporaryDirectory() as folder, opener.nets(profile=Path(folder)) as (device, nets):
        for name, net in nets.items():
            yield attempt(name, partial(_placed, name, device, net, sizes))


def _placed(name: str, device: Device, net: OnnxRuntimeDeviceNet, sizes: Sizes) -> Row:
    run_once(device, net, sizes, 0)
    found = read_placement(net.end_profile())
    misplaced = {"copies between CPU and GPU": found.copies, "floating-point nodes on the CPU": found.floats}
    problems = [
        f"{len(nodes)} {what}: {', '.join(nodes[:_NAMED])}" for what, nodes in misplaced.items() if nodes
    ]
    return judged(name, problems, {"nodes": found.nodes, "on_cpu": found.on_cpu})


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Nodes that ran, each once: how many, and by name and operator those that should not be.

    `copies` moved a tensor between CPU and GPU. `floats` ran on the CPU with floating-point tensors: those
    are activations that left the GPU, while integer arithmetic on shapes belongs on the CPU.
    """

    nodes: int
    on_cpu: int
    copies: tuple[str, ...]
    floats: tuple[str, ...]


def read_placement(profile: Path) -> Placement:
    """What the profile of a session says (SessionOptions.enable_profiling, InferenceSession.end_profiling).

    Raises BackendError for a file that is none, or in which no node has run.
    """
    nodes: dict[str, Mapping[str, Any]] = {}  # by name with operator: what the profile has about its run
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
    on_cpu = {name: args for name, args in nodes.items() if args.get("provider") == _CPU}
    copies = (name for name, args in nodes.items() if str(args.get("op_name")).startswith("Memcpy"))
    floats = (name for name, args in on_cpu.items() if _types(args) & _FLOATS)
    return Placement(
        nodes=len(nodes), on_cpu=len(on_cpu), copies=tuple(sorted(copies)), floats=tuple(sorted(floats))
    )


def _types(args: Mapping[str, Any]) -> set[str]:
    """The types of inputs and outputs, which are listed like [{"float": [2, 4]}, {"int64": []}]."""
    tensors = [*args.get("input_type_shape", ()), *args.get("output_type_shape", ())]
    return {kind for tensor in tensors for kind in tensor}


def parity(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net at two shapes against ONNX Runtime on the CPU, the same seeded random inputs."""
    dtype = opener.package.manifest.dtype
    with opener.nets() as (device, nets):
        for name in nets:
            with ONNXRUNTIME.open_net(opener.package, name, threads=scale.threads) as plain:
                for seed, sizes in enumerate(shapes(scale, opener.package)):
                    what = f"{name} {sizes['W']}x{sizes['H']} b{sizes['N']}"
                    wanted = plain(**random_inputs(plain.spec, sizes, seed))
                    run = partial(run_once, device, nets[name], sizes, seed)
                    yield attempt(what, partial(_compared, what, run, wanted, dtype))


def _compared(
    what: str, run: Callable[[], tuple[dict[str, Array], str]], wanted: Mapping[str, Array], dtype: str
) -> Row:
    """Figures are of the worst output."""
    found, profile = run()
    bar, problems = NET_RELATIVE_L2[dtype], list[str]()
    worst: dict[str, Any] = {"relative_l2": -1.0}
    for name, array in wanted.items():
        figures = difference(name, found[name], array)
        shades = array.dtype == np.uint8
        good = figures["psnr_db"] >= DECODED_DB[dtype] if shades else figures["relative_l2"] <= bar
        if not good:
            problems.append(f"{name}: relative L2 {figures['relative_l2']:.2e}, {figures['psnr_db']:.1f} dB")
        if figures["relative_l2"] > worst["relative_l2"]:
            worst = {**figures, "output": name}
    return judged(what, problems[:_NAMED], {**worst, "bar": bar, "outputs": len(wanted), "profile": profile})


def shapes(scale: Scale, package: Package) -> tuple[Sizes, Sizes]:
    """The contract's symbols as numbers, for one guided picture, and for three that are not square."""
    several = replace(scale.case, pictures=3, steps=7, height=scale.short)
    manifest = package.manifest
    return sizes_of(scale.timed, manifest), {**sizes_of(several, manifest), "P": 4}


def random_inputs(spec: NetSpec, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Seeded: unit normal, timesteps uniform in 0 to 999, token ids and shades below 99, no layer skipped."""
    random = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = shape_of(tensor.shape, sizes)
        if tensor.name == "clip_skip":
            values = np.zeros(shape)
        elif np.issubdtype(DTYPES[tensor.dtype], np.integer):
            values = random.integers(0, 99, shape)
        elif tensor.name == "timestep":
            values = random.uniform(0, 999, shape)
        else:
            values = random.standard_normal(shape)
        arrays[tensor.name] = np.asarray(values, DTYPES[tensor.dtype])
    return arrays


def run_once(device: Device, net: DeviceNet, sizes: Sizes, seed: int) -> tuple[dict[str, Array], str]:
    """What a net makes of `random_inputs`, and the profile that served."""
    with ExitStack() as stack:
        block, (bound,) = DeviceNets(device=device, nets={"net": net}).bind(stack, ("net", sizes))
        upload(block, random_inputs(net.spec, sizes, seed))
        bound.enqueue()
        found = {item.name: block.download(item.name) for item in net.spec.outputs}
        device.synchronize()
        return found, bound.profile
