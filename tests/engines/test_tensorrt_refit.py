"""Engines whose weights are set after they were loaded, and engines whose weights are streamed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from latentrt.engines.errors import (
    AdapterError,
    BackendError,
    LatentrtError,
    MemoryLimitError,
    NumericError,
    PackageError,
)
from latentrt.engines.net_weights import net_tensors
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import Change, Package
from latentrt.engines.spec import Array
from latentrt.engines.tensorrt import refit
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
STORED = net_tensors(setting.PACKAGE, NET)  # the others are constants of the graph
MATRICES = [name for name, tensor in STORED.items() if len(tensor.shape) > 1]
FIRST, SECOND = [name for name in MATRICES if WEIGHTS[name].dtype == np.float16][:2]
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


# ── weights that adapters change ─────────────────────────────────────────────────────────────────

REFIT = "refit unet/time"  # what the simulation counts


def changed(by: float) -> Change:
    """Every number another one, which half precision holds."""

    def change(weight: Array) -> Array:
        wide = weight.astype(np.float32)
        turned = by * np.arange(wide.size, dtype=np.float32).reshape(wide.shape) / wide.size
        return (wide + turned).astype(np.float16).astype(np.float32)

    return change


def adapted(*names: str, by: float = 0.1) -> Package:
    return replace(setting.PACKAGE, changes={"unet": dict.fromkeys(names or MATRICES, changed(by))})


def with_change(change: Callable[[Array], Any]) -> Package:
    return replace(setting.PACKAGE, changes={"unet": {FIRST: change}})


def refitted(
    device: HostDevice, package: Package, variant: str = RTX, **extra: object
) -> tuple[dict[str, Array], SimulatedLibrary]:
    """What the net computes with a package's changes."""
    options = {"changed": package, **({"graph": setting.graph(NET)} if "stripped" in extra else {})}
    net, trt = opened(device, variant, **{"refittable": MATRICES, **extra, "options": options})
    assert not device.queue, "they are in place before anybody binds the net"
    run, buffers, _ = bound(net, device, NET, SMALL)
    run.enqueue()
    found = {name: array.copy() for name, array in buffers.read().items()}
    net.close()
    return found, trt


def by_onnxruntime(package: Package) -> dict[str, Array]:
    with ONNXRUNTIME.open_net(package, NET, threads=1) as net:
        return net(**setting.inputs(NET, SMALL))


@every_variant
def test_an_engine_computes_with_what_it_was_given(variant: str, device: HostDevice) -> None:
    found, trt = refitted(device, adapted(), variant)
    for name, array in by_onnxruntime(adapted()).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
        assert np.abs(array - by_onnxruntime(setting.PACKAGE)[name]).max() > 0.01, "the changes tell"
    assert (trt._world.counts[REFIT], trt._world.counts["weights set"]) == (1, len(MATRICES))


def test_only_what_is_changed_is_set(device: HostDevice) -> None:
    for names, count in (((FIRST,), 1), ((FIRST, SECOND), 2), (("conv_in.weight",), 0)):
        found, trt = refitted(device, adapted(*names))
        for name, array in by_onnxruntime(adapted(*names)).items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
        assert trt._world.counts["weights set"] == count
        assert trt._world.counts[REFIT] == bool(count)


def test_weights_that_the_library_keeps_in_one_piece_are_set_together(device: HostDevice) -> None:
    """What is wanted of them: the stored values of those that nobody changed."""
    for names in ((FIRST,), (SECOND,), (FIRST, SECOND)):
        found, trt = refitted(device, adapted(*names), merged=[FIRST, SECOND])
        for name, array in by_onnxruntime(adapted(*names)).items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
        assert (trt._world.counts[REFIT], trt._world.counts["weights set"]) == (1, 2)


def test_a_host_with_little_memory_sets_them_in_turns(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = refitted(device, adapted())
    monkeypatch.setattr(refit, "_AT_ONCE", max(array.size for array in WEIGHTS.values()))
    found, trt = refitted(device, adapted(), merged=[MATRICES[0], MATRICES[-1]])
    assert 1 < trt._world.counts[REFIT] < len(MATRICES)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_swaps_are_exact(device: HostDevice) -> None:
    """T24: nothing of a set is left in the next one, not even in weights that this leaves alone."""
    sets = {"a": adapted(FIRST), "b": adapted(SECOND, by=-0.3), "none": setting.PACKAGE}
    wanted = {name: refitted(HostDevice(), package)[0] for name, package in sets.items()}
    for name in ("a", "b", "a", "none", "b", "a"):
        found, _ = refitted(device, sets[name])
        for output, array in wanted[name].items():
            np.testing.assert_array_equal(found[output], array)


@every_variant
def test_marks_alone_change_nothing(variant: str, device: HostDevice) -> None:
    """T34, as far as our code has a part in it; what a library's optimiser makes of marks takes a GPU."""
    marked, trt = refitted(device, setting.PACKAGE, variant)
    plain, _ = refitted(device, setting.PACKAGE, variant, refittable=[])
    for name, array in plain.items():
        np.testing.assert_array_equal(marked[name], array)
    assert trt._world.counts[REFIT] == 0


def test_a_stripped_engine_gets_its_weights_and_then_others(device: HostDevice) -> None:
    """T35."""
    for package, refits in ((setting.PACKAGE, 1), (adapted(FIRST), 2), (setting.PACKAGE, 1)):
        found, trt = refitted(device, package, stripped=True, refittable=list(WEIGHTS))
        for name, array in by_onnxruntime(package).items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
        assert trt._world.counts[REFIT] == refits


def test_weights_that_the_engine_keeps(device: HostDevice) -> None:
    with pytest.raises(BackendError, match=r"of 'unet_time' are fixed, .* change 1 of them") as caught:
        refitted(device, adapted(FIRST), refittable=[])
    assert "--weights refittable --nets unet_time" in caught.value.fix
    bias = next(name for name, array in WEIGHTS.items() if array.ndim == 1)
    with pytest.raises(BackendError, match=f"change {bias}, which engines of tensorrt-rtx do not"):
        refitted(device, adapted(FIRST, bias))


def test_a_piece_with_what_is_no_weight(device: HostDevice) -> None:
    constant = next(name for name in WEIGHTS if name not in STORED)
    with pytest.raises(BackendError, match=f"wants {constant} too, which is no weight"):
        refitted(device, adapted(FIRST), refittable=[*MATRICES, constant], merged=[FIRST, constant])


def beyond(value: float) -> Callable[[Array], Array]:
    return lambda weight: np.full(weight.shape, value, np.float32)


def fails(error: Exception) -> Callable[[Array], Array]:
    def change(weight: Array) -> Array:
        raise error

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        # The graph stores it in half precision, and so does the engine.
        (beyond(70000.0), NumericError, f"the weight {FIRST} reaches 70000; expected at most 65504"),
        (beyond(float("nan")), NumericError, f"the weight {FIRST} reaches nan"),
        (fails(AdapterError("odd", expected="even", fix="")), AdapterError, "odd; expected even"),
        (fails(MemoryError()), MemoryLimitError, "with the adapters do not fit the memory"),
        (fails(ValueError("no")), PackageError, r"no weights that adapters could change \(ValueError: no"),
        (lambda weight: weight[:1], BackendError, "has .* values of HALF for"),
    ],
)
def test_weights_that_cannot_be_set(
    device: HostDevice, change: Change, error: type[LatentrtError], message: str
) -> None:
    with pytest.raises(error, match=message):
        refitted(device, with_change(change))
    assert not device.queue


def test_numbers_of_a_type_that_would_lose_the_change(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(refit._TYPES, "HALF")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="values of HALF for"):
        refitted(device, adapted(FIRST))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("set_named_weights", f"refuses the weight {FIRST}: .*full"),
        ("refit", f"does not take 1 weights, first {FIRST}: .*full"),
    ],
)
def test_weights_that_the_library_refuses(device: HostDevice, call: str, message: str) -> None:
    trt = setting.library(RTX, device)
    trt._world.failing[call] = "full"
    options = {"changed": adapted(FIRST)}
    with pytest.raises(BackendError, match=message) as caught:
        open_simulated(trt, RTX, NET, device, options=options, refittable=MATRICES)
    assert "--weights refittable" in caught.value.fix
    trt._world.failing[call] = "out of memory"
    with pytest.raises(MemoryLimitError):
        open_simulated(trt, RTX, NET, device, options=options, refittable=MATRICES)
    assert trt._world.counts["contexts"] == 0
    open_simulated(trt, RTX, NET, device, options=options, refittable=MATRICES).close()


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
