import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import latentrt.demo
from latentrt.engines.device import ALIGNMENT, BoundNet, DeviceMemory, DeviceNet
from latentrt.engines.errors import BackendError, MemoryLimitError, PackageError, UsageError
from latentrt.engines.heap import give_back_heap
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.onnxruntime.session import library
from latentrt.engines.package import Package
from latentrt.engines.spec import DTYPES, NetSpec, output_shapes
from tests.engines.net_inputs import input_shapes, random_inputs
from tests.tiny_package import BIAS, add_graph

DEMO = Package.open(Path(latentrt.demo.__file__).parent / "package")
SIZES = {"P": 2, "B": 2, "N": 1, "S": 5, "T": 77, "H": 72, "W": 96, "H/8": 9, "W/8": 12}


class Host:
    """As much of a device as binding needs: aligned host memory by address."""

    name = "host memory"

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}

    def allocate(self, size: int) -> int:
        block = np.zeros(size + ALIGNMENT, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = block
        return address

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        array = np.empty(shape, DTYPES[dtype])
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def memory(self) -> DeviceMemory:
        return DeviceMemory(free=1, total=1, unified=True)


def inputs_of(spec: NetSpec, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
    return random_inputs(spec, input_shapes(spec, sizes), seed)


class Bound:
    """A net bound to memory of its own."""

    def __init__(self, host: Host, net: DeviceNet, sizes: dict[str, int] = SIZES) -> None:
        self.host, self.spec = host, net.spec
        self.inputs = input_shapes(net.spec, sizes)
        self.shapes = {**self.inputs, **output_shapes(net.spec, self.inputs)}
        self.addresses = {
            item.name: host.allocate(
                np.dtype(item.dtype).itemsize * int(np.prod(self.shapes[item.name])) or 1
            )
            for item in (*net.spec.inputs, *net.spec.outputs)
        }
        self.bound: BoundNet = net.bind(self.inputs, self.addresses, net.scratch(self.inputs))

    def upload(self, inputs: dict[str, np.ndarray]) -> None:
        for name, array in inputs.items():
            self.host.upload(self.addresses[name], array)

    def outputs(self) -> dict[str, np.ndarray]:
        return {
            item.name: self.host.read(self.addresses[item.name], self.shapes[item.name], item.dtype)
            for item in self.spec.outputs
        }


@pytest.fixture
def tiny(package: Package) -> DeviceNet:
    return open_onnxruntime_net(package, "unet", Host(), provider=CPU, threads=1)  # type: ignore[arg-type]


def tiny_addresses(host: Host) -> dict[str, int]:
    return {"x": host.allocate(64), "y": host.allocate(64)}


# ── for real, on host addresses ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DEMO.manifest.nets)
def test_every_net_equals_a_plain_call_bit_by_bit(name: str) -> None:
    host = Host()
    net: Any = open_onnxruntime_net(DEMO, name, host, provider=CPU, threads=1)  # type: ignore[arg-type]
    bound = Bound(host, net)
    with ONNXRUNTIME.open_net(DEMO, name, threads=1) as plain:
        for seed in (0, 1):  # the same addresses with other content
            inputs = inputs_of(net.spec, seed)
            bound.upload(inputs)
            bound.bound.enqueue()
            outputs = bound.outputs()
            for key, expected in plain(**inputs).items():
                np.testing.assert_array_equal(outputs[key], expected)
                assert outputs[key].dtype == expected.dtype
    net.close()


def test_two_bindings_of_one_net() -> None:
    host = Host()
    net: Any = open_onnxruntime_net(DEMO, "vae_decoder", host, provider=CPU, threads=1)  # type: ignore[arg-type]
    small, large = Bound(host, net), Bound(host, net, {**SIZES, "N": 2, "H/8": 16})
    a, b = inputs_of(net.spec, 0), inputs_of(net.spec, 1, {**SIZES, "N": 2, "H/8": 16})
    small.upload(a)
    large.upload(b)
    with ONNXRUNTIME.open_net(DEMO, "vae_decoder", threads=1) as plain:
        for bound, inputs in ((large, b), (small, a), (large, b)):
            bound.bound.enqueue()
            np.testing.assert_array_equal(bound.outputs()["image"], plain(**inputs)["image"])
    sizes = [
        sum(array.nbytes for array in group.values()) for group in (a, b, small.outputs(), large.outputs())
    ]
    assert net.memory.io == sum(sizes)
    small.bound.close()
    assert net.memory.io == sizes[1] + sizes[3]
    net.close()


def test_weights_are_what_the_graph_uses() -> None:
    host = Host()
    nets = [
        open_onnxruntime_net(DEMO, name, host, provider=CPU, threads=1)  # type: ignore[arg-type]
        for name in ("unet_whole", "unet", "unet_context", "unet_time")
    ]
    whole, *parts = [net.memory.weights for net in nets]
    model = onnx.load(DEMO.path(DEMO.manifest.nets["unet_whole"].graph), load_external_data=False)
    stored = [item for item in model.graph.initializer if item.external_data]
    assert whole == sum(4 * int(np.prod(item.dims)) for item in stored)  # stored in fp16, used in fp32
    assert all(part < whole for part in parts)
    assert sum(parts) <= 1.01 * whole
    assert nets[0].memory.activations is None
    assert [net.stream_weights() for net in nets] == [0] * 4


def test_a_lowered_graph_in_place_of_the_packages(package: Package, tmp_path: Path) -> None:
    model = add_graph(onnx.numpy_helper.from_array(BIAS * 2, "bias"))
    (tmp_path / "lowered.onnx").write_bytes(model.SerializeToString())
    host = Host()
    net = open_onnxruntime_net(
        package,
        "unet",
        host,  # type: ignore[arg-type]
        provider=CPU,
        graph=tmp_path / "lowered.onnx",
        threads=1,
    )
    bound = Bound(host, net)
    bound.bound.enqueue()
    np.testing.assert_array_equal(bound.outputs()["y"], [BIAS * 2] * 2)


def test_a_lowered_graph_finds_the_packages_weights(tmp_path: Path) -> None:
    file = DEMO.manifest.nets["vae_decoder"]
    (tmp_path / "moved.onnx").write_bytes(DEMO.path(file.graph).read_bytes())
    host = Host()
    net: Any = open_onnxruntime_net(
        DEMO,
        "vae_decoder",
        host,  # type: ignore[arg-type]
        provider=CPU,
        graph=tmp_path / "moved.onnx",
        threads=1,
    )
    bound, inputs = Bound(host, net), inputs_of(net.spec, 0)
    bound.upload(inputs)
    bound.bound.enqueue()
    with ONNXRUNTIME.open_net(DEMO, "vae_decoder", threads=1) as plain:
        np.testing.assert_array_equal(bound.outputs()["image"], plain(**inputs)["image"])


def test_a_graph_with_another_boundary(package: Package, tmp_path: Path) -> None:
    model = add_graph(onnx.numpy_helper.from_array(BIAS, "bias"))
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    path = tmp_path / "lowered.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(PackageError, match=r"lowered\.onnx: inputs differ"):
        open_onnxruntime_net(package, "unet", Host(), provider=CPU, graph=path)  # type: ignore[arg-type]


def test_submit_takes_the_runs(package: Package) -> None:
    host, queue = Host(), list[Callable[[], None]]()
    net = open_onnxruntime_net(package, "unet", host, provider=CPU, threads=1, submit=queue.append)  # type: ignore[arg-type]
    bound = Bound(host, net)
    bound.bound.enqueue()
    assert not bound.outputs()["y"].any()
    for value in (1, 2):
        bound.upload({"x": np.full((2, 4), value, np.float32)})
        queue[0]()
        np.testing.assert_array_equal(bound.outputs()["y"], [BIAS + value] * 2)
    bound.bound.close()
    with pytest.raises(BackendError, match="a binding of the net 'unet' is closed"):
        queue[0]()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells resident memory on Linux alone")
def test_activations_go_back() -> None:
    """For real: a run that is terminated before its first node shrinks the arena."""
    gc.collect()
    give_back_heap()  # else the arena may lie in what earlier tests have left in the heap, and stay there
    host, sizes = Host(), {**SIZES, "N": 4, "H/8": 32, "W/8": 32}
    net: Any = open_onnxruntime_net(DEMO, "vae_decoder", host, provider=CPU, threads=1)  # type: ignore[arg-type]
    bound = Bound(host, net, sizes)
    bound.upload(inputs_of(net.spec, 0, sizes))
    bound.bound.enqueue()
    wanted, held = bound.outputs()["image"], resident()
    net.release()
    give_back_heap()
    assert resident() < held - 2**26
    np.testing.assert_array_equal(bound.outputs()["image"], wanted)  # nothing ran
    bound.bound.enqueue()
    np.testing.assert_array_equal(bound.outputs()["image"], wanted)
    net.settle()
    net.close()
    net.release()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── what is refused ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shapes", [{"x": (2, 5)}, {"x": (2, 4, 1)}, {"z": (2, 4)}, {}])
def test_wrong_shapes(tiny: DeviceNet, shapes: dict[str, tuple[int, ...]]) -> None:
    for call in (lambda: tiny.scratch(shapes), lambda: tiny.bind(shapes, tiny_addresses(Host()), 0)):
        with pytest.raises(UsageError, match=r"expected (\(B, 4\)|exactly \['x'\])"):
            call()


def test_wrong_addresses(tiny: DeviceNet) -> None:
    right = tiny_addresses(Host())
    for wrong in ({"x": right["x"]}, {**right, "z": right["x"]}, {"x": right["x"], "z": right["y"]}):
        with pytest.raises(UsageError, match=r"bound with addresses for .*exactly \['x', 'y'\]"):
            tiny.bind({"x": (2, 4)}, wrong, 0)
    for address in (0, right["y"] + 4, -256):
        with pytest.raises(UsageError, match=r"the address of y of .*at a multiple of 256"):
            tiny.bind({"x": (2, 4)}, {**right, "y": address}, 0)


def test_closed(package: Package) -> None:
    host = Host()
    net = open_onnxruntime_net(package, "unet", host, provider=CPU, threads=1)  # type: ignore[arg-type]
    one, two = Bound(host, net), Bound(host, net)
    assert one.bound.profile == "onnxruntime CPU, any shape"
    assert one.bound.capturable
    one.bound.close()
    one.bound.close()
    with pytest.raises(BackendError, match="a binding of the net 'unet' is closed"):
        one.bound.enqueue()
    two.bound.enqueue()
    net.close()
    net.close()
    with pytest.raises(BackendError, match="is closed"):
        two.bound.enqueue()
    with pytest.raises(BackendError, match="the net 'unet' is closed"):
        net.bind({"x": (2, 4)}, one.addresses, 0)
    assert net.memory.io == 0


def test_an_unknown_provider(package: Package) -> None:
    with pytest.raises(UsageError, match=r"provider is .* expected CUDAExecutionProvider or CPU"):
        open_onnxruntime_net(package, "unet", Host(), provider="ROCMExecutionProvider")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer", MemoryLimitError),
        ("CUDA failure 2: out of memory", MemoryLimitError),
        ("CUDNN_STATUS_ALLOC_FAILED", MemoryLimitError),
        ("operation not permitted when stream is capturing ; expr=cudaMalloc(&p, size)", BackendError),
        ("Got invalid dimensions for input", BackendError),
    ],
)
def test_failures_of_a_run(
    package: Package, monkeypatch: pytest.MonkeyPatch, message: str, kind: type[Exception]
) -> None:
    host = Host()
    net: Any = open_onnxruntime_net(package, "unet", host, provider=CPU, threads=1)  # type: ignore[arg-type]
    bound = Bound(host, net)

    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(net._session, "run_with_iobinding", fail)
    with pytest.raises(kind, match="the net 'unet'") as failure:
        bound.bound.enqueue()
    assert getattr(failure.value, "culprit", "unet") == "unet"


def test_weights_that_do_not_fit(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 3")

    monkeypatch.setattr(library(), "InferenceSession", fail)
    with pytest.raises(MemoryLimitError, match=r"the weights of .*loop\.onnx do not fit") as failure:
        open_onnxruntime_net(package, "unet", Host(), provider=CPU)  # type: ignore[arg-type]
    assert failure.value.culprit == "unet"


def test_a_binding_that_is_refused(package: Package) -> None:
    net: Any = open_onnxruntime_net(package, "unet", Host(), provider=CPU, threads=1)  # type: ignore[arg-type]
    net._kind = "cuda"  # addresses that this session cannot read
    with pytest.raises(BackendError, match=r"'unet' failed on .*no data transfer registered"):
        net.bind({"x": (2, 4)}, tiny_addresses(Host()), 0)
    assert net.memory.io == 0


def test_a_net_without_a_profile() -> None:
    net: Any = open_onnxruntime_net(DEMO, "unet", Host(), provider=CPU, threads=1)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"'unet' has no profile.*Pass `profile`"):
        net.end_profile()
