"""A device loop over the demo model on host memory: everything of it but the driver."""

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.checkpoints.graphs.step import write_step
from latentrt.engines import spec
from latentrt.engines.device import DeviceNet
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import NetFile, Package, write_manifest
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.loop.device.verdicts import Graphs
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.prompts.encode import CACHE_BYTES
from tests.engines.host_device import HostDevice

Wrap = Callable[[str, DeviceNet], DeviceNet]


def package_with_step(folder: Path) -> Package:
    """The shipped package; a copy with the nets that end a row, if it lacks any."""
    shipped = Package.open(SHIPPED["demo"])
    contracts = {
        "step": spec.step(channels=4, float_dtype="float32"),
        "step_masked": spec.step_masked(channels=4, float_dtype="float32"),
    }
    missing = {name: contract for name, contract in contracts.items() if name not in shipped.manifest.nets}
    if not missing:
        return shipped
    shutil.copytree(shipped.root, folder)
    nets = dict(shipped.manifest.nets)
    for name, contract in missing.items():
        (folder / name).mkdir()
        write_step(folder / name / "model.onnx", contract)
        nets[name] = NetFile(graph=f"{name}/model.onnx", weights=(), spec=contract)
    return write_manifest(folder, replace(shipped.manifest, nets=nets))


@contextmanager
def device_pipeline(
    package: Package,
    device: HostDevice,
    *,
    graphs: Graphs = "off",
    wrap: Wrap = lambda name, net: net,
    log: Callable[[str], None] = lambda line: None,
    **more: Any,
) -> Generator[tuple[Pipeline, DeviceLoop]]:
    """A pipeline whose loop runs on `device`, its nets on ONNX Runtime CPU at the device's addresses.

    `more` is of `Pipeline.over`.
    """

    def open_net(package: Package, name: str) -> DeviceNet:
        return wrap(name, open_onnxruntime_net(package, name, device, provider=CPU, submit=device.submit))

    nets = {name: open_net(package, name) for name in package.manifest.nets if spec.NETS[name].usual}
    loop = DeviceLoop(device, nets, package.manifest, graphs=graphs, log=log, open_net=open_net)
    pipe = Pipeline.over(package, loop, device.name, cache_bytes=CACHE_BYTES, **more)
    try:
        yield pipe, loop
    finally:
        pipe.close()
    assert not device.blocks, "memory that was not given back"
