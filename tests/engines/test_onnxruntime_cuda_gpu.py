"""ONNX Runtime on a real GPU: `python -m pytest -m gpu tests/engines/test_onnxruntime_cuda_gpu.py`."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.device import BoundNet, Device, DeviceNet
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.cuda_backend import ONNXRUNTIME_CUDA
from latentrt.engines.onnxruntime.lowering.lower import lower
from latentrt.engines.onnxruntime.nets import cuda_available, open_onnxruntime_net
from latentrt.engines.onnxruntime.tuning.cuda import tune_package
from latentrt.engines.onnxruntime.tuning.cuda_layouts import CUDA_LAYOUTS
from latentrt.engines.package import Package
from latentrt.engines.profiles import fixed_profile, net_profiles
from latentrt.engines.spec import DTYPES, Array, output_shapes
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tolerances import NET_RELATIVE_L2, relative_l2
from latentrt.engines.tuning.choice import TUNED_NETS
from latentrt.runtime.model import SHIPPED
from tests.engines.net_inputs import random_inputs

DEMO = Package.open(SHIPPED["demo"])
REASON = cuda_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
FP32 = NET_RELATIVE_L2["fp32"]  # to the CPU, with TF32 off


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice()
    yield device
    device.close()


def inputs_of(name: str) -> dict[str, Array]:
    """Random inputs for one guided picture of odd size."""
    spec = DEMO.manifest.nets[name].spec
    profile = net_profiles(name, spec, [fixed_profile(136, 88, batch=1)])[0]
    return random_inputs(spec, {key: shapes[1] for key, shapes in profile.shapes.items()})


class Bound:
    """A net bound to memory of its own, with its inputs there."""

    def __init__(self, device: Device, net: DeviceNet, inputs: dict[str, Array]) -> None:
        self.device = device
        shapes = {name: array.shape for name, array in inputs.items()}
        self.outputs = {
            item.name: np.zeros(shape, DTYPES[item.dtype])
            for item in net.spec.outputs
            for shape in [output_shapes(net.spec, shapes)[item.name]]
        }
        arrays = {**inputs, **self.outputs}
        self.addresses = {name: device.allocate(array.nbytes) for name, array in arrays.items()}
        for name, array in arrays.items():
            device.upload(self.addresses[name], array)
        self.opened = net
        self.net: BoundNet = net.bind(shapes, self.addresses, 0)

    def clear(self) -> None:
        for name, array in self.outputs.items():
            self.device.upload(self.addresses[name], np.zeros_like(array))

    def read(self) -> dict[str, Array]:
        found = {name: np.empty_like(array) for name, array in self.outputs.items()}
        for name, array in found.items():
            self.device.download(self.addresses[name], array)
        self.device.synchronize()
        return found

    def close(self) -> None:
        self.net.close()
        for address in self.addresses.values():
            self.device.free(address)


@contextmanager
def opened(
    name: str, layout: str, device: CudaDevice, folder: Path
) -> Generator[tuple[Bound, dict[str, Array]]]:
    """A bound net in one of the layouts, and what the CPU makes of its inputs."""
    graph = lower(DEMO, name, folder) if layout == "nhwc" else None
    inputs = inputs_of(name)
    with ONNXRUNTIME.open_net(DEMO, name) as cpu:
        wanted = cpu(**inputs)
    net = open_onnxruntime_net(DEMO, name, device, graph=graph)
    bound = Bound(device, net, inputs)
    try:
        yield bound, wanted
    finally:
        bound.close()
        net.close()


CASES = [
    (name, layout)
    for name in DEMO.manifest.nets
    for layout in (CUDA_LAYOUTS if name in TUNED_NETS else ("plain",))
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_parity_with_the_cpu(device: CudaDevice, tmp_path: Path, name: str, layout: str) -> None:
    with opened(name, layout, device, tmp_path) as (bound, wanted):
        for _ in range(2):  # the second run of a shape takes other paths through the arena
            bound.clear()
            bound.net.enqueue()
            found = bound.read()
            assert set(found) == set(wanted)
            for output, array in found.items():
                assert relative_l2(array, wanted[output]) <= FP32, output


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_captured_net_replays_the_same_bytes(
    device: CudaDevice, tmp_path: Path, name: str, layout: str
) -> None:
    with opened(name, layout, device, tmp_path) as (bound, _):
        for _ in range(2):
            bound.net.enqueue()
        wanted = bound.read()
        with device.capture() as graphs:
            bound.net.enqueue()
        (graph,) = graphs
        for _ in range(2):
            bound.clear()
            graph.launch()
            found = bound.read()
            assert all(found[output].tobytes() == array.tobytes() for output, array in wanted.items())
        graph.close()


def test_activations_go_back(device: CudaDevice, tmp_path: Path) -> None:
    with opened("vae_decoder", "plain", device, tmp_path) as (bound, wanted):
        bound.net.enqueue()
        bound.read()
        before = device.memory().free
        bound.opened.release()
        assert device.memory().free > before
        bound.clear()
        bound.net.enqueue()
        for output, array in bound.read().items():
            assert relative_l2(array, wanted[output]) <= FP32, output


def test_measured_remembered_and_opened(tmp_path: Path, logged: list[str]) -> None:
    store = EngineStore(tmp_path)
    for item in tune_package(DEMO, store):
        facts = item.entry.facts
        print(item.net, facts["layout"], facts)  # `pytest -s` shows the figures
        assert facts["rejected"] == {}
        assert set(facts["milliseconds"]) == set(CUDA_LAYOUTS)
        assert max(facts["relative_l2"].values()) <= FP32
    assert not any(item.why for item in tune_package(DEMO, store))
    device, nets = ONNXRUNTIME_CUDA.open_device(DEMO, TUNED_NETS, store=store)
    assert (logged, set(nets)) == ([], set(TUNED_NETS))
    for net in nets.values():
        net.close()
    device.close()
