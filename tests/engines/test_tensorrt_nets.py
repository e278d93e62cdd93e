import gc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from latentrt.engines.device import DeviceMemory, DeviceNet
from latentrt.engines.errors import BackendError, EngineError, MemoryLimitError, UsageError
from latentrt.engines.tensorrt.contract import check_outputs
from latentrt.engines.tensorrt.nets import TensorRTNet
from tests.engines import tensorrt_setting as setting
from tests.engines.host_device import HostDevice
from tests.engines.simulated_tensorrt_names import VARIANTS
from tests.engines.tensorrt_setting import DEMO_NETS, LARGE, SMALL, bound, open_simulated, shapes

RTX = "tensorrt-rtx"
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def opened(device: HostDevice, variant: str = RTX, net: str = "vae_decoder", **extra: object) -> TensorRTNet:
    return open_simulated(setting.library(variant, device), variant, net, device, **extra)


def world(net: TensorRTNet) -> object:
    assert net._loaded is not None
    return net._loaded.trt._world


@every_variant
@pytest.mark.parametrize("name", DEMO_NETS)
def test_nets_compute_what_onnx_runtime_computes(name: str, variant: str, device: HostDevice) -> None:
    net: DeviceNet = opened(device, variant, name)
    for sizes in (SMALL, LARGE):
        run, buffers, expected = bound(net, device, name, sizes)
        run.enqueue()
        for tensor, array in buffers.read().items():
            np.testing.assert_allclose(array, expected[tensor], rtol=1e-5, atol=1e-5, err_msg=tensor)
    net.close()


def test_nothing_runs_before_the_stream_does(device: HostDevice) -> None:
    run, buffers, _ = bound(opened(device), device, "vae_decoder", SMALL)
    run.enqueue()
    assert not any(array.any() for array in buffers.results.values())
    assert any(array.any() for array in buffers.read().values())


def test_the_profile_is_the_nearest_that_covers(device: HostDevice) -> None:
    net = opened(device, net="unet")
    labels = [profile.label for profile in setting.profiles("unet")]
    assert len(labels) == 4
    guided, plain = SMALL, {**SMALL, "B": 1}
    chosen = [bound(net, device, "unet", sizes)[0].profile for sizes in (guided, plain, LARGE)]
    assert chosen[0] == labels[0]
    assert chosen[1] == labels[1]
    assert chosen[2] == labels[2]
    with pytest.raises(UsageError, match=r"latentrt build PACKAGE --backend tensorrt-rtx"):
        net.scratch(shapes("unet", {**LARGE, "H/8": 64}))


def test_inputs_that_contradict_each_other_are_refused(device: HostDevice) -> None:
    net = opened(device, net="unet")
    wrong = {**shapes("unet", SMALL), "latent": (4, 4, 8, 8)}
    with pytest.raises(UsageError, match=r"context\..* has the shape \(2, .*'B': 4"):
        net.scratch(wrong)


def test_contexts_share_one_scratch_block(device: HostDevice) -> None:
    calls = []
    for name in DEMO_NETS:
        net = opened(device, net=name)
        calls.append((net, name, net.scratch(shapes(name, LARGE))))
    block = device.allocate(max(size for _, _, size in calls))
    runs = []
    for net, name, _ in calls:
        arrays = setting.inputs(name, LARGE)
        expected = setting.reference(name, arrays)
        buffers = setting.Buffers(device, arrays, expected)
        run = net.bind(shapes(name, LARGE), buffers.addresses, block)
        run.enqueue()
        run.enqueue()
        runs.append((run, buffers, expected))
    for _, buffers, expected in runs:
        for tensor, array in buffers.read().items():
            np.testing.assert_allclose(array, expected[tensor], rtol=1e-5, atol=1e-5)


def test_one_context_per_binding_and_one_address_per_tensor(device: HostDevice) -> None:
    net = opened(device)
    counts = world(net).counts  # type: ignore[attr-defined]
    small = net.scratch(shapes("vae_decoder", SMALL))
    assert net.scratch(shapes("vae_decoder", LARGE)) > small
    assert net.scratch(shapes("vae_decoder", SMALL)) == small
    assert counts["contexts"] == 1
    first = bound(net, device, "vae_decoder", SMALL)[0]
    assert counts["contexts"] == 1
    second = bound(net, device, "vae_decoder", LARGE)[0]
    assert counts["contexts"] == 2
    for _ in range(10):
        first.enqueue()
        second.enqueue()
    assert counts["enqueued"] == 20
    for tensor in (*net.spec.inputs, *net.spec.outputs):
        assert counts[f"address {tensor.name}"] == 2, "set once per binding"


def test_the_ledger(device: HostDevice) -> None:
    for unknown in (opened(device, "tensorrt 10"), opened(device, stat=-1)):
        assert unknown._loaded is not None
        assert unknown.memory.weights == unknown._loaded.size > 100  # the library does not tell
    net = opened(device, stat=7_000_000)
    assert net.memory.weights == 7_000_000
    assert (net.memory.activations, net.memory.io) == (0, 0)
    small, _, _ = bound(net, device, "vae_decoder", SMALL)
    one = 4 * 8 * 8 * 4 + 64 * 64 * 3 + 4  # latent, image, mean
    assert net.memory.io == one
    large, _, _ = bound(net, device, "vae_decoder", LARGE)
    assert net.memory.io == one + 2 * (4 * 12 * 16 * 4 + 96 * 128 * 3 + 4)
    assert net.memory.activations == net.scratch(shapes("vae_decoder", LARGE))
    large.close()
    assert net.memory.io == one
    del small
    gc.collect()
    assert net.memory.io == 0, "it does not keep a binding alive"
    net.close()
    assert (net.memory.weights, net.memory.activations, net.memory.io) == (0, 0, 0)


def test_closing_frees_contexts_after_the_stream(device: HostDevice) -> None:
    net = opened(device)
    engine = net._loaded.engine  # type: ignore[union-attr]
    run, buffers, expected = bound(net, device, "vae_decoder", SMALL)
    net.scratch(shapes("vae_decoder", LARGE))
    assert len(engine._contexts) == 2
    run.enqueue()
    before = device.synchronisations
    net.close()
    net.close()
    run.close()
    assert device.synchronisations == before + 2, "a context must not be destroyed while it runs"
    assert len(engine._contexts) == 0
    np.testing.assert_allclose(buffers.read()["mean"], expected["mean"], rtol=1e-5)
    for call in (run.enqueue, lambda: run.capturable, lambda: net.scratch({}), net.stream_weights):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_capture(device: HostDevice) -> None:
    net = opened(device)
    run, buffers, expected = bound(net, device, "vae_decoder", SMALL)
    assert run.capturable
    with pytest.raises(BackendError), device.capture():
        run.enqueue()  # the first run of a shape: the simulation refuses it, as the library does
    run.enqueue()
    device.synchronize()
    with device.capture() as graphs:
        run.enqueue()
    graphs[0].launch()
    np.testing.assert_array_equal(buffers.read()["image"], expected["image"])
    world(net).failing["capture"] = "no"  # type: ignore[attr-defined]
    assert not run.capturable
    plain, _, _ = bound(opened(device, "tensorrt 11"), device, "vae_decoder", SMALL)
    assert plain.capturable, "the library does not say"


def test_the_upper_bound_serves_where_the_exact_size_is_not_told(device: HostDevice) -> None:
    exact, bounds = opened(device), opened(device, resizes=False)
    asked = shapes("vae_decoder", SMALL)
    assert bounds.scratch(asked) > exact.scratch(asked)
    run, buffers, expected = bound(bounds, device, "vae_decoder", SMALL)
    run.enqueue()
    np.testing.assert_array_equal(buffers.read()["image"], expected["image"])


def addresses(device: HostDevice, value: Callable[[int], int] = int) -> dict[str, int]:
    names = ("latent", "image", "mean")
    return {name: value(device.allocate(2**16)) for name in names}


def test_wrong_addresses(device: HostDevice) -> None:
    net, asked = opened(device), shapes("vae_decoder", SMALL)
    block = device.allocate(net.scratch(asked))
    for wrong in (
        {**addresses(device), "image": 12_345},
        {**addresses(device), "image": 0},
    ):
        with pytest.raises(UsageError, match=r"image .*expected device memory at a multiple of 256"):
            net.bind(asked, wrong, block)
    with pytest.raises(UsageError, match="scratch memory"):
        net.bind(asked, addresses(device), block + 8)
    with pytest.raises(UsageError, match=r"expected exactly \['image', 'latent', 'mean'\]"):
        net.bind(asked, {"latent": block}, block)


def test_a_block_of_unknown_size_is_refused(device: HostDevice) -> None:
    net, asked = opened(device), shapes("vae_decoder", SMALL)
    with pytest.raises(BackendError, match=r"expected at most the 0 bytes.*Ask scratch"):
        net.bind(asked, addresses(device), device.allocate(2**20))
    net.scratch(asked)
    with pytest.raises(BackendError, match="expected at most the 0 bytes"):
        net.bind(asked, addresses(device), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("set_optimization_profile_async", r"refuses its profile 0 \(64x64"),
        ("set_input_shape", "refuses the shapes"),
        ("set_device_memory", "refuses the addresses of its scratch memory"),
        ("set_tensor_address", r"refuses the addresses of \['latent'\]"),
        ("create_execution_context", "gets no execution context"),
    ],
)
def test_refusals_in_the_librarys_words(call: str, message: str, device: HostDevice) -> None:
    net, asked = opened(device), shapes("vae_decoder", SMALL)
    failing = world(net).failing  # type: ignore[attr-defined]
    block = device.allocate(net.scratch(asked))
    net._spare = None
    failing[call] = "the library's reason"
    with pytest.raises(BackendError, match=f"{message}.*the library's reason.*latentrt build"):
        net.bind(asked, addresses(device), block)
    failing[call] = "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)"
    net._spare = None
    with pytest.raises(MemoryLimitError, match=f"{message}.*4096 bytes.*bytes free") as caught:
        net.bind(asked, addresses(device), block)
    assert caught.value.culprit == "vae_decoder"
    net.bind(asked, addresses(device), block).enqueue()  # and nothing is broken afterwards


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        ("create_execution_context", 0),
        ("set_optimization_profile_async", 1),
        ("set_input_shape", 1),
        ("infer_shapes", 1),
        ("set_device_memory", 1),
        ("set_tensor_address", 1),
    ],
)
def test_a_context_that_an_error_drops_is_idle(call: str, waits: int, device: HostDevice) -> None:
    net, asked = opened(device), shapes("vae_decoder", SMALL)
    block = device.allocate(net.scratch(asked))
    net._spare = None
    world(net).failing[call] = "the library's reason"  # type: ignore[attr-defined]
    places, before = addresses(device), device.synchronisations
    with pytest.raises(BackendError):
        net.bind(asked, places, block)
    assert device.synchronisations == before + waits, "its change of profile may have enqueued copies"
    world(net).failing[call] = "the library's reason"  # type: ignore[attr-defined]
    net._spare = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "synchronize", broken)
        with pytest.raises(BackendError, match=r"the library's reason"):
            net.bind(asked, places, block)
    before = device.synchronisations
    with pytest.raises(BackendError, match="expected at most the 0 bytes"):
        net.bind(asked, places, 0)
    assert device.synchronisations == before + 1


def test_release_frees_the_context_that_is_not_bound(device: HostDevice) -> None:
    net = opened(device)
    engine = net._loaded.engine  # type: ignore[union-attr]
    run, buffers, expected = bound(net, device, "vae_decoder", SMALL)
    net.scratch(shapes("vae_decoder", LARGE))
    assert len(engine._contexts) == 2
    before = device.synchronisations
    net.release()
    assert (len(engine._contexts), device.synchronisations) == (1, before + 1)
    run.enqueue()
    np.testing.assert_array_equal(buffers.read()["image"], expected["image"])
    net.close()
    net.release()


def test_refused_runs(device: HostDevice) -> None:
    net = opened(device)
    run, _, _ = bound(net, device, "vae_decoder", SMALL)
    failing = world(net).failing  # type: ignore[attr-defined]
    failing["execute_async_v3"] = "the library's reason"
    with pytest.raises(BackendError, match=r"'vae_decoder' could not be enqueued: the library's reason"):
        run.enqueue()
    failing["execute_async_v3"] = "Cuda failure: out of memory"
    with pytest.raises(MemoryLimitError, match="out of memory"):
        run.enqueue()
    failing["execute_async_v3"] = "Cuda failure: out of memory"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "memory", broken)
        with pytest.raises(MemoryLimitError, match="out of memory"):
            run.enqueue()
    run.enqueue()


def broken() -> DeviceMemory:
    raise BackendError("the device does not answer", expected="an answer", fix="Ask again.")


def test_shapes_that_the_engine_finds_inconsistent(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = opened(device, net="unet")
    wrong = {**shapes("unet", SMALL), "latent": (4, 4, 8, 8)}
    monkeypatch.setattr("latentrt.engines.tensorrt.nets.output_shapes", lambda *_: {})
    with pytest.raises(BackendError, match="inconsistent"):
        net.scratch(wrong)
    world(net).failing["infer_shapes"] = "latent"  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match=r"does not know the shapes of \['latent'\]"):
        net.scratch(shapes("unet", SMALL))


def test_an_engine_whose_outputs_are_not_the_contracts(device: HostDevice) -> None:
    spec = setting.PACKAGE.manifest.nets["vae_decoder"].spec
    turned = replace(spec, outputs=(replace(spec.outputs[0], shape=("N", "W", "H", 3)), spec.outputs[1]))
    net = opened(device, options={"spec": turned})
    net.scratch(shapes("vae_decoder", SMALL))  # a square has no sides to mistake
    with pytest.raises(EngineError, match=r"makes image of shape \(2, 96, 128, 3\).*latentrt build"):
        net.scratch(shapes("vae_decoder", LARGE))


def test_outputs_of_other_shapes_than_the_contract() -> None:
    spec = setting.PACKAGE.manifest.nets["vae_encoder"].spec
    given, right = shapes("vae_encoder", LARGE), (2, 4, 12, 16)
    check_outputs(spec, given, {"mean": right, "std": right}, net="n", fix="F.")
    for wrong in ((2, 4, 96, 128), (2, 4, 12, -1), (2, 4, 12)):
        with pytest.raises(EngineError, match=r"'n' makes std of shape .* expected \(2, 4, 12, 16\)\. F\."):
            check_outputs(spec, given, {"mean": right, "std": wrong}, net="n", fix="F.")
