"""What a case's nets are called with, where a UNet is told more than a prompt."""

import shutil
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.case import Case, net_inputs, time_inputs, whole_inputs
from latentrt.benchmarks.sides.contract import NotAvailableError
from latentrt.benchmarks.sides.ours import host_side
from latentrt.benchmarks.sides.ours_device import device_side
from latentrt.benchmarks.sides.plain_loop import check_drawable
from latentrt.engines import spec
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import Package, write_manifest
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.loop.host import HostLoop
from latentrt.runtime.pipeline import SHIPPED, Pipeline
from latentrt.runtime.prompts.tokenizer import ClipTokenizer
from tests.engines.host_device import HostDevice
from tests.runtime.small_nets import IMAGE_CHANNELS, VECTORS, WIDTH, write_small_package

TOKENIZER = SHIPPED["demo"] / "tokenizer"
CASE = Case(width=64, height=48, guidance_scale=2.0, pictures=2, steps=3)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Whose UNet has vectors, and a picture behind the latent."""
    root = tmp_path_factory.mktemp("told") / "package"
    small = write_small_package(root, vectors=True, image=True)
    shutil.copytree(TOKENIZER, root / "tokenizer")
    return write_manifest(root, small.manifest)


def test_the_inputs_are_the_contracts(package: Package) -> None:
    manifest = package.manifest
    inputs = net_inputs("unet", CASE, manifest, ClipTokenizer.open(TOKENIZER))
    steps = np.linspace(999, 0, 3, dtype=np.float32)
    schedule = time_inputs(CASE, manifest, inputs, steps)
    manifest.nets["unet_time"].spec.check(schedule)
    np.testing.assert_array_equal(schedule["timestep"], np.repeat(steps, 4))
    for name in VECTORS:
        np.testing.assert_array_equal(schedule[name][4:8], inputs[name])
    whole = spec.unet_whole(channels=4 + IMAGE_CHANNELS, width=WIDTH, float_dtype="float32", vectors=VECTORS)
    whole.check(whole_inputs(CASE, manifest, inputs))


@pytest.mark.parametrize("workload", ["invariants", "unet"])
def test_both_loops_compute_them(package: Package, workload: str) -> None:
    device = HostDevice()
    nets: Any = {
        name: open_onnxruntime_net(package, name, device, provider=CPU, submit=device.submit, threads=1)
        for name in package.manifest.nets
    }
    host_loop = HostLoop(package, ONNXRUNTIME, 1)
    for name in ("unet_context", "unet_time", "unet"):
        host_loop.net(name)
    host = host_side(Pipeline.over(package, host_loop, "host", cache_bytes=0), host_loop)
    loop = DeviceLoop(device, nets, package.manifest)
    side = device_side(Pipeline.over(package, loop, "device", cache_bytes=0), loop)
    found, wanted = side.prepare(workload, CASE), host.prepare(workload, CASE)
    for prepared in (found, wanted):
        prepared.run()
    assert set(found.outputs()) == set(wanted.outputs())
    for name, array in wanted.outputs().items():
        assert array.std() > 0
        np.testing.assert_allclose(found.outputs()[name], array, rtol=1e-4, atol=1e-5)
    side.close()
    host.close()
    assert not device.blocks


def test_plain_loops_draw_no_such_pictures(package: Package) -> None:
    with pytest.raises(NotAvailableError, match="picture"):
        check_drawable("it", package.manifest)
