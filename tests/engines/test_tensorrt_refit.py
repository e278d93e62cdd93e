from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from latentrt.engines.errors import BackendError, MemoryLimitError, UsageError
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


def with_weights(changed: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes with these weights."""
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    for item in model.graph.initializer:
        if item.name in changed:
            item.CopyFrom(numpy_helper.from_array(changed[item.name], item.name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, setting.inputs(NET, SMALL)), strict=True))


# ── refitting by name ────────────────────────────────────────────────────────────────────────────


@every_variant
def test_refitting_changes_the_net_in_place(variant: str, device: HostDevice, tmp_path: Path) -> None:
    net, trt = opened(device, variant, refittable=[FIRST, SECOND])
    run, buffers, before = bound(net, device, NET, SMALL)
    changed = {FIRST: (WEIGHTS[FIRST] * 1.5).astype(np.float16)}
    net.refit(changed)
    changed[FIRST][:] = 0  # the library has taken the content
    run.enqueue()
    expected = with_weights({FIRST: (WEIGHTS[FIRST] * 1.5).astype(np.float16)}, tmp_path)
    difference = 0.0
    for name, array in buffers.read().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
        difference += float(np.abs(array - before[name]).sum())
    assert difference > 0
    assert trt._world.counts["contexts"] == 1, "the binding is still the same"


def test_names_that_the_engine_cannot_change(device: HostDevice) -> None:
    net, _ = opened(device, refittable=[FIRST])
    with pytest.raises(UsageError, match=rf"cannot change the weight '{SECOND}' \(1 such.*latentrt build"):
        net.refit({FIRST: WEIGHTS[FIRST], SECOND: WEIGHTS[SECOND]})
    frozen, _ = opened(device)
    with pytest.raises(UsageError, match=r"names it was built to refit .0."):
        frozen.refit({FIRST: WEIGHTS[FIRST]})


def test_arrays_that_do_not_fit(device: HostDevice) -> None:
    net, _ = opened(device, refittable=[FIRST])
    for wrong in (WEIGHTS[FIRST].astype(np.float32), WEIGHTS[FIRST].reshape(-1)[1:]):
        with pytest.raises(UsageError, match=rf"the weight '{FIRST}' .* expected float16 with"):
            net.refit({FIRST: wrong})


def test_weights_that_belong_together(device: HostDevice) -> None:
    net, _ = opened(device, refittable=[FIRST, SECOND], merged=[FIRST, SECOND])
    with pytest.raises(BackendError, match=rf"misses 1 weights .* first '{SECOND}'"):
        net.refit({FIRST: WEIGHTS[FIRST]})
    net.refit({FIRST: WEIGHTS[FIRST], SECOND: WEIGHTS[SECOND]})


def test_refusals_of_the_library(device: HostDevice) -> None:
    net, trt = opened(device, refittable=[FIRST])
    for call, message in (("set_named_weights", "refuses the weight"), ("refit", "could not be replaced")):
        trt._world.failing[call] = "the library's reason"
        with pytest.raises(BackendError, match=rf"{message}.*the library's reason"):
            net.refit({FIRST: WEIGHTS[FIRST]})
        trt._world.failing[call] = "out of memory"
        with pytest.raises(MemoryLimitError, match=message) as caught:
            net.refit({FIRST: WEIGHTS[FIRST]})
        assert caught.value.culprit == NET
    net.close()
    with pytest.raises(BackendError, match="closed"):
        net.refit({FIRST: WEIGHTS[FIRST]})


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
