"""Sections of the GPU check over single nets: built, opened, on the GPU, and right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...engines.backends import BACKENDS
from ...engines.cuda import facts as cuda_facts
from ...engines.device import Device, DeviceNet
from ...engines.errors import LatentrtError
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
from .judge import attempt, failed, judged, mebibytes, not_available
from .opener import Opener, Scale
from .placement import read_placement

_NAMED = 4  # nodes, or outputs, in a reason


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

    nets = tuned_nets(package, ()) if builds.tunes else built_nets(package)
    for net in nets:
        yield attempt(net, lambda net=net: built(net))


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
            yield attempt(name, lambda name=name, net=net: _placed(name, device, net, sizes))


def _placed(name: str, device: Device, net: OnnxRuntimeDeviceNet, sizes: Sizes) -> Row:
    run_once(device, net, sizes, 0)
    found = read_placement(net.end_profile())
    problems = [
        f"{len(nodes)} {what}: {', '.join(nodes[:_NAMED])}"
        for nodes, what in (
            (found.copies, "copies between CPU and GPU"),
            (found.floats, "floating-point nodes on the CPU"),
        )
        if nodes
    ]
    return judged(name, problems, {"nodes": found.nodes, "on_cpu": found.on_cpu})


def parity(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net at two shapes against ONNX Runtime on the CPU, the same seeded random inputs."""
    dtype = opener.package.manifest.dtype
    with opener.nets() as (device, nets):
        for name in nets:
            with ONNXRUNTIME.open_net(opener.package, name, threads=scale.threads) as plain:
                for seed, sizes in enumerate(shapes(scale, opener.package)):
                    what = f"{name} {sizes['W']}x{sizes['H']} b{sizes['N']}"
                    wanted = plain(**random_inputs(plain.spec, sizes, seed))

                    def compared(
                        what: str = what,
                        net: DeviceNet = nets[name],
                        sizes: Sizes = sizes,
                        seed: int = seed,
                        wanted: Mapping[str, Array] = wanted,
                    ) -> Row:
                        found, profile = run_once(device, net, sizes, seed)
                        return _compared(what, found, wanted, dtype, profile)

                    yield attempt(what, compared)


def _compared(
    what: str, found: Mapping[str, Array], wanted: Mapping[str, Array], dtype: str, profile: str
) -> Row:
    """Figures are of the worst output."""
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
    """What a net makes of `random_inputs`, and the profile that served.

    Raises:
        LatentrtError: whatever the net and the device raise; the memory is free then.
    """
    with ExitStack() as stack:
        block, (bound,) = DeviceNets(device=device, nets={"net": net}).bind(stack, ("net", sizes))
        upload(block, random_inputs(net.spec, sizes, seed))
        bound.enqueue()
        found = {item.name: block.download(item.name) for item in net.spec.outputs}
        device.synchronize()
        return found, bound.profile
