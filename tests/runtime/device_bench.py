"""A device loop over the demo model on host memory: everything of it but the driver."""

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.engines import spec
from latentrt.engines.device import DeviceNet
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import NetFile, Package, write_manifest
from latentrt.export.step_graph import write_step
from latentrt.runtime.device_loop import DeviceLoop
from latentrt.runtime.loops import DEVICE_NETS
from latentrt.runtime.pipeline import SHIPPED, Pipeline
from latentrt.runtime.replay import Graphs
from latentrt.runtime.tokenizer import ClipTokenizer
from tests.engines.host_device import HostDevice

Wrap = Callable[[str, DeviceNet], DeviceNet]


def package_with_step(folder: Path) -> Package:
    """The shipped package; a copy with the net `step` if it has none."""
    shipped = Package.open(SHIPPED["demo"])
    if "step" in shipped.manifest.nets:
        return shipped
    shutil.copytree(shipped.root, folder)
    (folder / "step").mkdir()
    contract = spec.step(channels=4, float_dtype="float32")
    write_step(folder / "step" / "model.onnx", contract)
    step = NetFile(graph="step/model.onnx", weights=None, spec=contract)
    manifest = replace(shipped.manifest, nets={**shipped.manifest.nets, "step": step})
    return write_manifest(folder, manifest)


@contextmanager
def device_pipeline(
    package: Package,
    device: HostDevice,
    *,
    graphs: Graphs = "off",
    wrap: Wrap = lambda name, net: net,
    log: Callable[[str], None] = lambda line: None,
) -> Generator[tuple[Pipeline, DeviceLoop]]:
    """A pipeline whose loop runs on `device`, its nets on ONNX Runtime CPU at the device's addresses."""
    nets: dict[str, Any] = {
        name: wrap(name, open_onnxruntime_net(package, name, device, provider=CPU, submit=device.submit))
        for name in DEVICE_NETS
    }
    loop = DeviceLoop(device, nets, package.manifest.latent_scale, graphs=graphs, log=log)
    pipe = Pipeline(package, ClipTokenizer.open(package.root / "tokenizer"), loop, device.name)
    try:
        yield pipe, loop
    finally:
        pipe.close()
    assert not device.blocks, "memory that was not given back"
