"""Of the GPU check: the host's part. Nodes that run on the CPU, and its memory, which may not grow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...engines.device import Device
from ...engines.onnxruntime.nets import OnnxRuntimeDeviceNet
from ...engines.onnxruntime.placement import read_placement
from ...engines.spec import DTYPES, output_shapes
from ...engines.tensorrt.build import built_nets
from ...runtime.loop.device.buffers import Sizes
from .nets import random_inputs, run_once, shapes
from .opener import Opener, Scale
from .pictures import draw
from .rows import Row, attempt, judged, mebibytes

FLAT = 8 * 2**20  # bytes of growth over all pictures: a leak in each run of the UNet is many times that
_STATM = Path("/proc/self/statm")
_NAMED = 4  # nodes in a reason

# ── placement ──────────────────────────────────────────────────────────────────────────────────


def placement(opener: Opener, scale: Scale) -> Iterator[Row]:
    """ONNX Runtime ran all floating-point nodes of each net on the GPU, and copied nothing to or from it."""
    if opener.open_profiled is None:
        yield Row(what="every net", status="not available", reason="engines run on the GPU as a whole")
        return
    sizes = shapes(scale, opener.package)[0]
    with TemporaryDirectory() as folder:
        device, nets = opener.open_profiled(opener.package, built_nets(opener.package), Path(folder))
        try:
            for name, net in nets.items():
                yield attempt(name, lambda name=name, net=net: _placed(name, device, net, sizes))
        finally:
            for net in nets.values():
                net.close()
            device.close()


def _placed(name: str, device: Device, net: OnnxRuntimeDeviceNet, sizes: Sizes) -> Row:
    arrays = random_inputs(net.spec, sizes, 0)
    every = output_shapes(net.spec, {key: array.shape for key, array in arrays.items()})
    run_once(
        device,
        net,
        arrays,
        {item.name: np.empty(every[item.name], DTYPES[item.dtype]) for item in net.spec.outputs},
    )
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


# ── memory ─────────────────────────────────────────────────────────────────────────────────────


def host_memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Plain loops draw many pictures, and the process's resident memory stays as it is."""
    if not _STATM.exists():
        yield Row(what="pictures", status="not available", reason="the system does not tell resident memory")
        return
    with opener.pipeline("off") as opened:
        for seed in range(max(scale.pictures // 5, 2)):  # arenas grow, and libraries compile
            draw(opened.pipe, scale.request(seed=seed))
        size, resident = _process()
        for seed in range(scale.pictures):
            draw(opened.pipe, scale.request(seed=seed))
        size, grown = _process()[0] - size, _process()[1] - resident
    problems = [f"{mebibytes(grown)} MiB more, which is over {mebibytes(FLAT)}"] if grown > FLAT else []
    figures = {"pictures": scale.pictures, "steps": scale.steps, "resident_mib": mebibytes(resident)}
    told = {"grown_mib": mebibytes(grown), "address_space_grown_mib": mebibytes(size)}
    yield judged("pictures", problems, {**figures, **told})


def _process() -> tuple[int, int]:
    """Bytes of this process's address space, and of it what is resident."""
    size, resident = _STATM.read_text(encoding="ascii").split()[:2]
    page = os.sysconf("SC_PAGE_SIZE")
    return int(size) * page, int(resident) * page
