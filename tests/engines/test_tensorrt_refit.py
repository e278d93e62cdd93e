import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from latentrt.engines.errors import BackendError
from latentrt.engines.tensorrt.log import messages
from latentrt.engines.tensorrt.nets import TensorRTNet
from tests.engines import tensorrt_setting as setting
from tests.engines.host_device import HostDevice
from tests.engines.simulated_tensorrt import SimulatedLibrary
from tests.engines.simulated_tensorrt_names import VARIANTS
from tests.engines.tensorrt_setting import LARGE, SMALL, bound, open_simulated, shapes

RTX, NET = "tensorrt-rtx", "unet_time"
MODEL = onnx.load(setting.graph(NET))
WEIGHTS = {item.name: numpy_helper.to_array(item) for item in MODEL.graph.initializer}
# Stored as the checkpoint had them, in half precision: the graph casts.
FIRST, SECOND = [name for name, array in WEIGHTS.items() if array.size > 1 and array.dtype == np.float16][:2]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def opened(device: HostDevice, variant: str = RTX, **extra: object) -> tuple[TensorRTNet, SimulatedLibrary]:
    trt = setting.library(variant, device)
    return open_simulated(trt, variant, NET, device, **extra), trt


# ── stripped engines ─────────────────────────────────────────────────────────────────────────────


@every_variant
def test_a_stripped_engine_takes_its_weights_from_the_package(variant: str, device: HostDevice) -> None:
    options = {"graph": setting.graph(NET)}
    net, _ = opened(device, variant, stripped=True, refittable=list(WEIGHTS), options=options)
    run, buffers, expected = bound(net, device, NET, SMALL)
    run.enqueue()
    for name, array in buffers.read().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_a_stripped_engine_without_its_weights_does_not_run(device: HostDevice) -> None:
    net, _ = opened(device, stripped=True, refittable=list(WEIGHTS))
    run, _, _ = bound(net, device, NET, SMALL)
    with pytest.raises(BackendError, match=r"could not be enqueued: .*weights are missing"):
        run.enqueue()


def test_weights_of_another_graph(device: HostDevice) -> None:
    other = {"graph": setting.graph("vae_decoder")}
    with pytest.raises(BackendError, match=r"does not take the weights of model.onnx: Failed to refit all"):
        opened(device, stripped=True, refittable=list(WEIGHTS), options=other)
    with pytest.raises(
        BackendError, match=r"does not take .* expected the graph it was built from .0 weights"
    ):
        opened(device, options=other)


# ── streaming ────────────────────────────────────────────────────────────────────────────────────


@every_variant
def test_streaming_frees_weights_and_closes_bindings(variant: str, device: HostDevice) -> None:
    extra = {} if variant == "tensorrt 10" else {"stat": 2_000_000}
    net, _ = opened(device, variant, streamable=100_000 if not extra else 1_500_000, **extra)
    before, scratch = net.memory.weights, net.scratch(shapes(NET, SMALL))
    run, _, _ = bound(net, device, NET, SMALL)
    freed = net.stream_weights()
    assert freed == (1_500_000 if extra else 100_000)
    assert net.memory.weights == max(0, before - freed)
    assert net.memory.io == 0
    with pytest.raises(BackendError, match="Bind the net again"):
        run.enqueue()
    assert net.scratch(shapes(NET, SMALL)) > scratch, "streaming needs room of its own"
    again, buffers, expected = bound(net, device, NET, SMALL)
    again.enqueue()
    for name, array in buffers.read().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
    assert net.stream_weights() == 0, "there is nothing left to free"
    again.enqueue()


def test_a_block_asked_for_before_streaming_is_too_small_after_it(device: HostDevice) -> None:
    net, _ = opened(device, streamable=10**6)
    net.scratch(shapes(NET, SMALL))
    net.stream_weights()
    arrays = setting.inputs(NET, SMALL)
    buffers = setting.Buffers(device, arrays, setting.reference(NET, arrays))
    with pytest.raises(BackendError, match="Ask scratch"):
        net.bind(shapes(NET, SMALL), buffers.addresses, device.allocate(4096))


def test_the_librarys_own_budget_where_none_is_too_little(device: HostDevice) -> None:
    net, _ = opened(device, streamable=1000, least=300, automatic=400, stat=5000)
    assert net.stream_weights() == 600
    assert net.memory.weights == 4400
    stubborn, _ = opened(device, streamable=1000, least=1000, automatic=400)
    assert stubborn.stream_weights() == 0


def test_engines_that_do_not_stream(device: HostDevice) -> None:
    net, trt = opened(device)
    run, _, _ = bound(net, device, NET, SMALL)
    assert net.stream_weights() == 0
    run.enqueue()
    assert messages(trt).since(0) == [], "the library must not be asked for a budget"


@every_variant
def test_all_weights_are_on_the_device_at_first(variant: str, device: HostDevice) -> None:
    net, trt = opened(device, variant, streamable=10**6, budget=0)
    plain, _ = opened(device, variant, streamable=10**6)
    assert net._loaded is not None
    assert net._loaded.engine.weight_streaming_budget_v2 == 10**6, "whatever the library would choose"
    assert net.scratch(shapes(NET, SMALL)) == plain.scratch(shapes(NET, SMALL))
    assert net.stream_weights() == 10**6
    assert messages(trt).since(0) == []


def test_weights_that_do_not_fit_are_streamed_from_the_start(device: HostDevice) -> None:
    net, _ = opened(device, streamable=1000, budget=400, most=500, stat=5000)
    assert net.memory.weights == 4400
    assert net.stream_weights() == 400
    assert net.memory.weights == 4000


@pytest.mark.parametrize("resizes", [True, False])
def test_scratch_has_room_for_the_weights_that_pass_through(device: HostDevice, resizes: bool) -> None:
    net, _ = opened(device, streamable=10**6, resizes=resizes)
    plain = net.scratch(shapes(NET, LARGE))
    net.stream_weights()
    assert net._loaded is not None
    staged = net._loaded.engine.weight_streaming_scratch_memory_size
    assert staged > 0
    assert net.scratch(shapes(NET, LARGE)) == plain + staged
    run, buffers, expected = bound(net, device, NET, SMALL)
    run.enqueue()
    for name, array in buffers.read().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
