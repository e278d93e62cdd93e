"""Of the GPU check: engines are built, opened, and compute what ONNX Runtime computes on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from ...engines.cuda import facts as cuda_facts
from ...engines.device import Device, DeviceNet
from ...engines.errors import LatentrtError
from ...engines.onnxruntime.backend import ONNXRUNTIME
from ...engines.package import Package
from ...engines.profiles import Profile
from ...engines.spec import DTYPES, Array, NetSpec
from ...engines.store.engine_store import EngineStore
from ...engines.tensorrt.build import build_package, built_nets
from ...engines.tensorrt.flavour import ENGINE_BACKENDS
from ...engines.tensorrt.options import BuildOptions
from ...engines.tolerances import DECODED_DB, NET_RELATIVE_L2
from ...runtime.loop.device.buffers import Sizes, shape_of
from ...runtime.loop.device.programs import input_shapes
from ..likeness import difference
from ..verbs.build import describe_engine
from .opener import Opener, Scale
from .rows import Row, attempt, failed, judged, mebibytes

# ── building ───────────────────────────────────────────────────────────────────────────────────


def build(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Engines of every net, or the layouts of ONNX Runtime's, into the store (LATENTRT_CACHE)."""
    if opener.backend == "onnxruntime-cuda":
        yield from _tune(opener)
    elif opener.backend in ENGINE_BACKENDS:
        for net in built_nets(opener.package):
            yield attempt(net, lambda net=net: _build(opener, scale, net))
    else:
        yield Row(what="engines", status="not available", reason=f"{opener.backend} builds nothing")


def _build(opener: Opener, scale: Scale, net: str) -> Row:
    package = opener.package
    gpu = None if cuda_facts.available() else cuda_facts.facts()
    profile = Profile.parse(scale.profile, multiple=package.manifest.size_multiple)
    (built,) = build_package(
        package, opener.backend, [profile], BuildOptions(), EngineStore(), nets=[net], gpu=gpu
    )
    figures = describe_engine(package, built)
    figures.pop("net")
    return judged(net, [] if figures["engine_mb"] > 0 else ["the engine is empty"], figures)


def _tune(opener: Opener) -> Iterator[Row]:
    """Which layout of each net is the fastest here."""
    from ...engines.onnxruntime.tuning.cuda import tune_package

    for tuned in tune_package(opener.package, EngineStore()):
        told = tuned.entry.facts
        names = ("milliseconds", "relative_l2", "rejected")
        figures = {"layout": told["layout"], **{name: told[name] for name in names}}
        yield judged(tuned.net, [], {**figures, "seconds": tuned.entry.build_seconds})


# ── opening ────────────────────────────────────────────────────────────────────────────────────


def opens(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net on the device. A GPU that the library does not list may be refused: it is tried, and told."""
    try:
        with opener.nets() as (device, nets):
            sizes = shapes(scale, opener.package)[0]
            for net in nets.values():
                net.scratch(input_shapes(net.spec, sizes))  # engines are opened by their first request
            weights = sum(net.memory.weights for net in nets.values())
            figures = {"device": device.name, "weights_mib": mebibytes(weights)}
            yield judged("every net", [], figures)
    except LatentrtError as error:
        row = failed("every net", error)
        if not opener.unsupported:
            yield row
        else:
            yield replace(row, status="not available", reason=f"{opener.unsupported}: {row.reason}")


# ── parity ─────────────────────────────────────────────────────────────────────────────────────


def shapes(scale: Scale, package: Package) -> tuple[Sizes, Sizes]:
    """The contract's symbols as numbers, for one guided picture, and for three that are not square."""
    manifest = package.manifest

    def sizes(pictures: int, steps: int, width: int, height: int) -> Sizes:
        cell = manifest.latent_scale
        return {
            "N": pictures,
            "B": 2 * pictures,
            "P": pictures + 1,
            "S": steps * (2 * pictures if manifest.vectors else 1),
            "T": manifest.max_tokens,
            "H": height,
            "W": width,
            "H/8": height // cell,
            "W/8": width // cell,
        }

    return sizes(1, 20, scale.width, scale.height), sizes(3, 7, scale.width, scale.short)


def parity(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net at two shapes against ONNX Runtime on the CPU, the same seeded random inputs."""
    dtype = opener.package.manifest.dtype
    with opener.nets() as (device, nets):
        for name in nets:
            with ONNXRUNTIME.open_net(opener.package, name, threads=scale.threads) as plain:
                for seed, sizes in enumerate(shapes(scale, opener.package)):
                    what = f"{name} {sizes['W']}x{sizes['H']} b{sizes['N']}"
                    arrays = random_inputs(plain.spec, sizes, seed)
                    wanted = plain(**arrays)
                    yield attempt(
                        what,
                        lambda what=what, net=nets[name], arrays=arrays, wanted=wanted: _parity(
                            what, device, net, arrays, wanted, dtype
                        ),
                    )


def _parity(
    what: str,
    device: Device,
    net: DeviceNet,
    arrays: Mapping[str, Array],
    wanted: Mapping[str, Array],
    dtype: str,
) -> Row:
    found, profile = run_once(device, net, arrays, wanted)
    bar, problems = NET_RELATIVE_L2[dtype], list[str]()
    worst: dict[str, Any] = {"relative_l2": -1.0}
    for name, b in wanted.items():
        figures = difference(name, found[name], b)
        shades = b.dtype == np.uint8
        good = figures["psnr_db"] >= DECODED_DB[dtype] if shades else figures["relative_l2"] <= bar
        if not good:
            problems.append(f"{name}: relative L2 {figures['relative_l2']:.2e}, {figures['psnr_db']:.1f} dB")
        if figures["relative_l2"] > worst["relative_l2"]:
            worst = {**figures, "output": name}
    return judged(what, problems[:4], {**worst, "bar": bar, "outputs": len(wanted), "profile": profile})


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


def run_once(
    device: Device, net: DeviceNet, arrays: Mapping[str, Array], outputs: Mapping[str, Array]
) -> tuple[dict[str, Array], str]:
    """What a net makes of `arrays`, and the profile that served. `outputs` have the outputs' shapes.

    Raises:
        LatentrtError: whatever the net and the device raise; the memory is free then.
    """
    found = {name: np.empty_like(array) for name, array in outputs.items()}
    called = {name: array.shape for name, array in arrays.items()}
    with ExitStack() as stack:

        def allocate(size: int) -> int:
            address = device.allocate(size)
            stack.callback(device.free, address)
            return address

        needed = net.scratch(called)
        addresses = {name: allocate(array.nbytes) for name, array in (*arrays.items(), *outputs.items())}
        bound = net.bind(called, addresses, allocate(needed) if needed else 0)
        stack.callback(bound.close)
        for name, array in arrays.items():
            device.upload(addresses[name], array)
        bound.enqueue()
        for name, array in found.items():
            device.download(addresses[name], array)
        device.synchronize()
        return found, bound.profile
